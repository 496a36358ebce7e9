"""What forward-only tuning is compared with: the towers are what they should be, and each method learns its shots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sordino.encoders.bundled import TextTower
from sordino.mpc.tower.distill import teacher_of
from sordino.mpc.tower.sentences import in_the_clear
from sordino.mpc.tower.tower import PrivateTower, SoftmaxTower, bundled_tower
from sordino.private_tuning import baselines
from sordino.private_tuning.baselines import Descent
from sordino.private_tuning.search_settings import Search
from sordino.private_tuning.tasks import TextTask

GOOD = ["a fine film", "a delight from start to end", "moving", "the best of the year , and by far the funniest"]
BAD = ["a dull film", "it drags and drags , and then it drags some more", "awful", "not worth the price of popcorn"]
QUICK = Descent(steps=8, learning_rate=3e-2)


@pytest.fixture(scope="module")
def embedder() -> TextTower:
    return teacher_of(None)


@pytest.fixture(scope="module")
def towers(embedder: TextTower) -> dict[str, PrivateTower]:
    """Both kinds, two layers of each."""
    softmax, features = SoftmaxTower.of(embedder), bundled_tower()
    return {
        "softmax": replace(softmax, layers=softmax.layers[:2]),
        "features": replace(features, layers=features.layers[:2]),
    }


@pytest.fixture(scope="module")
def task(embedder: TextTower) -> TextTask:
    """It tests on what it trains on, so that a method that learns is seen to."""
    labels = torch.tensor([0] * 4 + [1] * 4)
    texts = (*BAD, *GOOD)
    descriptions = ("the weather", "a number")  # say nothing, so that there is something to learn
    return TextTask(embedder, ("bad", "good"), descriptions, "it was", 2, 24, texts, labels, texts, labels)


def batch(embedder: TextTower) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 20000, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 6, 7])[:, None]).float()
    return embedder.words[tokens] + embedder.positions[:9], mask


def test_the_softmax_tower_does_not_see_padding(embedder: TextTower) -> None:
    """That it is the encoder's own tower is tested beside the private one."""
    tower, (embeddings, mask) = SoftmaxTower.of(embedder), batch(embedder)
    together = tower(embeddings, mask)
    for number, length in enumerate(mask.sum(1).int().tolist()):
        alone = tower(embeddings[number : number + 1, :length], torch.ones(1, length))
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[number, :length], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "features"])
def test_methods_learn_their_shots(task: TextTask, towers: dict[str, PrivateTower], kind: str) -> None:
    tower = towers[kind]
    assert baselines.zero_shot(task, tower) < 0.9
    assert baselines.prompt_tuning(task, tower, Descent(30, 3e-2)) == 1.0
    assert baselines.fine_tuning(task, tower, Descent(15, 3e-4)) == 1.0
    assert baselines.logistic_regression(task, tower) > 0.75  # cross-validation chooses a strong penalty, on so few


def test_forward_only_lowers_the_loss_without_a_graph(task: TextTask, towers: dict[str, PrivateTower]) -> None:
    forward, asked = in_the_clear(towers["features"]), []

    class Watched(TextTask):
        def losses(self, forward, prompts):  # type: ignore[no-untyped-def]
            found = super().losses(forward, prompts)
            asked.append((len(prompts), found.requires_grad, float(found.min())))
            return found

    watched = Watched(**{name: getattr(task, name) for name in TextTask.__dataclass_fields__})
    baselines.forward_only(watched, forward, Search(width=8, population=8, generations=5, scale=0.1))
    assert [(count, graph) for count, graph, _ in asked] == [(8, False)] * 5 + [(1, False)]  # at last the mean alone
    before = float(task.losses(forward, task.start()[None]))
    assert min(loss for _, _, loss in asked) < before


def test_fine_tuning_leaves_the_tower_as_it_was(task: TextTask, towers: dict[str, PrivateTower]) -> None:
    tower = towers["softmax"]
    before = [part.clone() for layer in tower.layers for part in layer.values()]
    accuracy = baselines.fine_tuning(task, tower, QUICK)
    assert 0 <= accuracy <= 1
    for part, was in zip((part for layer in tower.layers for part in layer.values()), before, strict=True):
        assert part.equal(was)
        assert not part.requires_grad


def test_a_method_gives_the_same_twice(task: TextTask, towers: dict[str, PrivateTower]) -> None:
    for method in (baselines.prompt_tuning, baselines.fine_tuning):
        assert method(task, towers["features"], QUICK) == method(task, towers["features"], QUICK)


def test_no_steps_are_zero_shot(task: TextTask, towers: dict[str, PrivateTower]) -> None:
    none = Descent(steps=0, learning_rate=1.0)
    tower = towers["features"]
    assert baselines.prompt_tuning(task, tower, none) == baselines.zero_shot(task, tower)
    assert baselines.fine_tuning(task, tower, none) == baselines.zero_shot(task, tower)
