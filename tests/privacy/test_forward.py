"""Losses of candidates: no derivative is ever taken, and one example moves an answer by at most the clip."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sordino.algorithms import METHODS, algorithm
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy.forward.losses import ExactLosses, Question, anchor, measured, without_a_model
from sordino.privacy.forward.noised import NoisedLosses
from sordino.privacy.gradients import Batch, example_losses
from sordino.privacy.sampling import Sampling
from sordino.randomness import Streams
from sordino.runtime.local import LocalRuntime

FORWARD_ONLY = [name for name in METHODS if algorithm(name).ABOUT.forward_only]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
TABLES: dict[str, Any] = {"context_length": 3, "local_steps": 2, "fedbpt": {"search_width": 6}}


def context_of(parts: Any) -> Tensor:
    return parts["context"]


def candidates_of(model: PromptModel, clients: int, count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (clients, count, 3, model.encoder.context_width)
    return {"context": torch.randn(shape, generator=generator, dtype=torch.float64)}


def batch_of(table: tuple[Tensor, Tensor], clients: int = 1, size: int = 6, **more: Any) -> Batch:
    features, labels = (part[: clients * size].clone().unflatten(0, (clients, size)) for part in table)
    return Batch(features, labels, torch.ones(clients, size, dtype=torch.bool), **more)


def sampled_whole(clients: int, size: int) -> Sampling:
    ones = torch.ones(clients, dtype=torch.float64)
    return Sampling(ones, size * ones, 0)


def test_an_answer_is_the_mean_loss_of_each_candidate(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    """And the error is the share of images with another class on top; relative ones are less their own mean."""
    candidates, batch = candidates_of(model, 2, 3), batch_of(table, 2)
    exact = ExactLosses(model)
    plain = exact(Question(context_of, relative=False), candidates, {}, batch)
    error = exact(Question(context_of, "error", relative=False), candidates, {}, batch)
    relative = exact(Question(context_of), candidates, {}, batch)
    for client in range(2):
        logits = model.predict(candidates["context"][client], batch.features[client])
        for place in range(3):
            alone = Batch(batch.features[[client]], batch.labels[[client]], batch.mask[[client]])
            expected = example_losses(logits[[place]], alone).mean()
            torch.testing.assert_close(plain.losses[client, 0, place], expected)
            wrong = (logits[place].argmax(-1) != batch.labels[client]).double().mean()
            torch.testing.assert_close(error.losses[client, 0, place], wrong)
    torch.testing.assert_close(relative.losses, plain.losses - plain.losses.mean(-1, keepdim=True))
    torch.testing.assert_close(plain.loss, plain.losses[:, 0].mean(-1))
    assert without_a_model(Question(context_of), candidates, {}, batch).losses.shape == relative.losses.shape


def test_a_second_look_is_at_the_same_images(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    candidates, batch = candidates_of(model, 1, 2), batch_of(table)
    flipped = ExactLosses(model)(
        Question(context_of, relative=False, view=lambda features: -features), candidates, {}, batch
    )
    other = Batch(-batch.features, batch.labels, batch.mask)
    once = ExactLosses(model)(Question(context_of, relative=False), candidates, {}, other)
    torch.testing.assert_close(flipped.losses[:, 1], once.losses[:, 0])


def noiseless(model: PromptModel, clip: float) -> NoisedLosses:
    return NoisedLosses(model, clip, 0.0, Streams(0, 1, [0], torch.device("cpu")))


@settings(max_examples=40)
@given(
    clip=st.floats(1e-3, 3.0),
    count=st.integers(1, 5),
    relative=st.booleans(),
    looks=st.booleans(),
    measure=st.sampled_from(["loss", "error"]),
    out=st.integers(0, 5),
    scale=st.sampled_from([1.0, 1e3, 1e30, 1e200, math.inf, math.nan]),
    label=st.integers(0, 3),
)
def test_one_example_moves_a_release_by_at_most_the_clip(
    model: PromptModel,
    table: tuple[Tensor, Tensor],
    clip: float,
    count: int,
    relative: bool,
    looks: bool,
    measure: Any,
    out: int,
    scale: float,
    label: int,
) -> None:
    """Whatever it is, and whatever the others are; and by what it contributes alone, so it moves nobody else's."""
    batch, candidates = batch_of(table, sampling=sampled_whole(1, 6)), candidates_of(model, 1, count, seed=out)
    batch.features[0, out] *= scale
    batch.labels[0, out] = label
    question = Question(context_of, measure, relative, (lambda x: -x) if looks else None)
    take = noiseless(model, clip)

    def released(mask: Tensor) -> Tensor:
        return 6 * (take(question, candidates, {}, _masked(batch, mask)).losses - anchor(model, question))

    everyone = torch.ones(1, 6, dtype=torch.bool)
    rest, alone = everyone.clone(), ~everyone
    rest[0, out], alone[0, out] = False, True
    moved = released(everyone) - released(rest)
    assert float(moved.norm()) <= clip * (1 + 1e-6)
    torch.testing.assert_close(moved, released(alone), rtol=0, atol=1e-9 + 1e-6 * clip)
    if not math.isfinite(scale):
        assert not released(alone).abs().max() > 1e-9


def _masked(batch: Batch, mask: Tensor) -> Batch:
    return Batch(batch.features, batch.labels, mask, batch.sampling)


def test_the_bound_is_attained(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    """So it is no larger than need be: an example whose losses differ by more than the clip moves a sum by the clip."""
    batch, candidates = batch_of(table, sampling=sampled_whole(1, 6)), candidates_of(model, 1, 4)
    clip, question = 1e-3, Question(context_of)
    mask = batch.mask.clone()
    mask[0, 2] = False
    whole, rest = (noiseless(model, clip)(question, candidates, {}, each) for each in (batch, _masked(batch, mask)))
    torch.testing.assert_close((6 * (whole.losses - rest.losses)).norm(), torch.tensor(clip, dtype=torch.float64))


def test_two_candidates_are_a_clipped_scalar(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    """The difference of two relative losses is the sum of differences clipped to sqrt(2) c, as in DPZero."""
    batch, candidates = batch_of(table, sampling=sampled_whole(1, 6)), candidates_of(model, 1, 2)
    clip = 0.05
    found = noiseless(model, clip)(Question(context_of), candidates, {}, batch).losses[0, 0]
    each = measured(model, Question(context_of, relative=False), candidates, {}, batch).each[0, :, 0]  # [B, 2]
    bound = math.sqrt(2) * clip
    scalars = (each[:, 0] - each[:, 1]).clamp(-bound, bound)
    assert 0 < int((scalars.abs() == bound).sum()) <= 6
    torch.testing.assert_close(found[0] - found[1], scalars.sum() / 6)


def test_noise_is_as_large_as_the_ledger_says_and_never_the_same(
    model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    batch, candidates = batch_of(table, sampling=sampled_whole(1, 6)), candidates_of(model, 1, 400)
    clip, multiplier, question = 0.3, 5.0, Question(context_of)
    streams = Streams(0, 1, [0], torch.device("cpu"))
    first, second = (
        NoisedLosses(model, clip, multiplier, streams, call)(question, candidates, {}, batch) for call in (0, 1)
    )
    plain = noiseless(model, clip)(question, candidates, {}, batch)
    deviation = float((6 * (first.losses - plain.losses)).std())
    assert abs(deviation / (clip * multiplier) - 1) < 5 / math.sqrt(2 * 400)
    assert not torch.equal(first.losses, second.losses)


def test_a_person_counts_once(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    """With all their images: the sum of their vectors is clipped to the same norm."""
    owners = torch.tensor([[0, 1, 0, 1, 0, 0]])
    batch = batch_of(table, sampling=sampled_whole(1, 6), persons=owners)
    candidates, clip = candidates_of(model, 1, 3), 1e-3
    found = noiseless(model, clip)(Question(context_of), candidates, {}, batch).losses
    each = measured(model, Question(context_of), candidates, {}, batch).each[0]
    sums = torch.stack([each[owners[0] == person].sum(0) for person in (0, 1)])
    clipped = sums * (clip / sums.flatten(1).norm(dim=1)).view(-1, 1, 1)
    torch.testing.assert_close(6 * found[0], clipped.sum(0))


def test_nobody_in_the_sample_is_an_answer_too(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    batch = _masked(batch_of(table, sampling=sampled_whole(1, 6)), torch.zeros(1, 6, dtype=torch.bool))
    found = noiseless(model, 1.0)(Question(context_of), candidates_of(model, 1, 3), {}, batch)
    assert not found.losses.any()


@pytest.mark.parametrize("name", FORWARD_ONLY)
@pytest.mark.parametrize("mechanism", ["none", "dp-sgd"])
def test_no_gradient_is_ever_computed(
    name: str, mechanism: str, make_runtime: Callable[..., LocalRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole round in inference mode, where torch builds no graph, and with a backward pass that fails."""

    def refuse(*given: Any, **more: Any) -> Any:
        raise AssertionError("a derivative was asked for")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    privacy = {"mechanism": mechanism, "noise_multiplier": 1.0, "delta": 0.01} if mechanism != "none" else {}
    with torch.inference_mode():
        runtime = make_runtime(name, ROWS, TABLES, privacy=privacy)
        training, _ = runtime.round(runtime.start())
    assert training.round == 1
    local = make_runtime("local", ROWS, TABLES)
    start = local.start()
    with pytest.raises(AssertionError, match="derivative"):  # the trap works
        local.round(start)


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_a_mechanism_for_derivatives_is_refused_with_the_remedy(
    name: str, make_runtime: Callable[..., LocalRuntime]
) -> None:
    with pytest.raises(ConfigError, match="no derivative.*use 'dp-sgd'"):
        make_runtime(name, ROWS, TABLES, privacy={"mechanism": "cotangent", "noise_multiplier": 1.0})


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_the_ledger_says_that_losses_were_released(name: str, make_runtime: Callable[..., LocalRuntime]) -> None:
    runtime = make_runtime(name, ROWS, TABLES, privacy={"mechanism": "dp-sgd", "noise_multiplier": 1.0})
    training, _ = runtime.round(runtime.start())
    contents = {release.content for release in training.ledger.releases}
    assert contents == {"sum of clipped losses of candidate prompts"}
    assert training.ledger.private
    assert training.ledger.releases[0].noise_multipliers == (1.0,)
