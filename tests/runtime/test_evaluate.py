import pytest
import torch
from torch import Tensor

from sordino.encoders.prompt_model import PromptModel
from sordino.runtime.evaluate import Evaluation, EvaluationSet, Scores


def evaluation(model: PromptModel, table: tuple[Tensor, Tensor]) -> Evaluation:
    features, labels = table
    local = torch.zeros(2, 40, dtype=torch.float64)
    local[0, :10] = 0.1
    local[1, 10:12] = torch.tensor([0.25, 0.75], dtype=torch.float64)
    neighbor = torch.zeros(2, 40, dtype=torch.float64)
    neighbor[0, 10:] = 1 / 30
    everything = EvaluationSet(model, features, labels)
    return Evaluation(everything, local, neighbor, None, EvaluationSet(model, features[:5], labels[:5]))


def contexts(model: PromptModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, model.encoder.context_width, generator=generator, dtype=torch.float64)


def test_scores_equal_counting_by_hand(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    prompts = contexts(model)
    scores = evaluation(model, table).scores(prompts)
    hits = []
    for prompt in prompts:
        text = model.text_features(prompt)
        hits.append([int((text @ image).argmax()) == int(label) for image, label in zip(*table, strict=True)])
    assert scores.local == pytest.approx([sum(hits[0][:10]) / 10, 0.25 * hits[1][10] + 0.75 * hits[1][11]])
    assert scores.neighbor == [pytest.approx(sum(hits[0][10:]) / 30), None]
    assert scores.overall == pytest.approx([sum(hits[0]) / 40, sum(hits[1]) / 40])
    assert scores.domain == pytest.approx([sum(hits[0][:5]) / 5, sum(hits[1][:5]) / 5])
    assert scores.novel == [None, None]
    assert scores.means()["neighbor"] == scores.neighbor[0]
    assert scores.means()["novel"] is None


def test_a_shared_prompt_scores_as_copies_of_it(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    shared = contexts(model)[:1]
    splits = evaluation(model, table)
    assert splits.scores(shared) == splits.scores(shared.expand(2, -1, -1))


def test_attackers_count_in_no_mean() -> None:
    scores = Scores([0.0, 1.0, 0.5], [0.0, None, 0.5], [0.0, 1.0, 1.0], [None] * 3, [0.2] * 3, [None, 0.4, 0.6], 1)
    means = {"local": 0.75, "neighbor": 0.5, "overall": 1.0, "novel": None, "domain": pytest.approx(0.2)}
    assert scores.means() == means
    assert scores.mean_attack_success() == pytest.approx(0.5)
