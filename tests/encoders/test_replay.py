"""Replayed passes equal the passes that were recorded, in whatever order forward and backward passes come."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import CLASS_NAMES
from sordino.encoders.frozen import replay
from sordino.encoders.frozen.pullback import apply, batched_gradients
from sordino.encoders.frozen.replay import BEFORE, MOST, Pass, Replays, repeated
from sordino.encoders.prompt_model import PromptModel

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
PLACES = ["cpu", pytest.param("cuda", marks=CUDA)]


@cache
def weight(device: torch.device) -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)


def compute(x: Tensor) -> Tensor:
    return torch.tanh(x @ weight(x.device)) ** 2


def again(work: Callable[[], None]) -> Callable[[], None]:
    """A recording that does the work once more, in the same places."""
    work()
    return work


def inputs(device: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(count, 3, 5, dtype=torch.float64, generator=generator).to(device)
    return [each.clone().requires_grad_() for each in drawn]


def gradient(output: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(output, [x], torch.ones_like(output), retain_graph=True)
    return found


@pytest.fixture(params=PLACES)
def recorded(request: pytest.FixtureRequest) -> tuple[Pass, str]:
    device: str = request.param
    record = replay.cuda_graph if device == "cuda" else again
    return Pass(compute, torch.zeros(3, 5, dtype=torch.float64, device=device), record), device


def test_any_order_of_passes_gives_each_input_its_own_result(recorded: tuple[Pass, str]) -> None:
    """Two forward passes before the first backward pass, a backward pass twice, and one that waited."""
    operation, device = recorded
    one, two, three = inputs(device, 3)
    first, second = apply(operation, one), apply(operation, two)
    for output, x in ((first, one), (second, two), (second, two), (first, one)):
        torch.testing.assert_close(gradient(output, x), gradient(compute(x), x))
    third = apply(operation, three)
    for output, x in ((first, one), (second, two), (third, three)):
        torch.testing.assert_close(output, compute(x))
        torch.testing.assert_close(gradient(output, x), gradient(compute(x), x))


def test_many_cotangents_of_one_pass_come_one_after_the_other(recorded: tuple[Pass, str]) -> None:
    operation, device = recorded
    (x,) = inputs(device, 1)
    cotangents = torch.randn(4, 3, 4, dtype=torch.float64).to(device)
    (found,) = batched_gradients(apply(operation, x), [x], cotangents)
    output = compute(x)
    for each, cotangent in zip(found, cotangents, strict=True):
        (expected,) = torch.autograd.grad(output, [x], cotangent, retain_graph=True)
        torch.testing.assert_close(each, expected)


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Records passes wherever they are; what was recorded so far, by its first input."""
    made: list[Tensor] = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        made.append(torch.zeros(()))
        return again(work)

    monkeypatch.setattr(replay, "records", lambda tensor: True)
    monkeypatch.setattr(replay, "cuda_graph", record)
    return made


def features(model: PromptModel, context: Tensor, wanted: bool = True) -> tuple[Tensor, Tensor]:
    leaf = context.clone().requires_grad_()
    with repeated(wanted):
        output = model.text_features(leaf)
    return output.detach(), gradient(output, leaf)


def test_a_model_replays_what_it_repeats(model: PromptModel, on_any_device: list[Tensor]) -> None:
    """The same features and gradients, for other contexts than the recorded one, in float64 to the last bits."""
    model = PromptModel(copy.copy(model.encoder), model.classes)
    contexts = torch.randn(BEFORE + 3, 2, 4, model.encoder.context_width, generator=torch.Generator().manual_seed(3))
    for number, context in enumerate(contexts):
        expected = features(model, context, wanted=False)
        for found, known in zip(features(model, context), expected, strict=True):
            torch.testing.assert_close(found, known, rtol=1e-12, atol=1e-12)
        assert len(on_any_device) == (2 if number >= BEFORE else 0)  # forward and backward, once


@pytest.mark.parametrize("reason", ["not wanted", "no gradient", "large"])
def test_other_passes_are_not_recorded(
    reason: str, model: PromptModel, on_any_device: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "large":  # one context fits, two do not
        monkeypatch.setattr(PromptModel, "_budget", 1.5 * model.encoder.text_flops(1, 2, model.classes))
    context = torch.zeros(2, 2, model.encoder.context_width, requires_grad=reason != "no gradient")
    for _ in range(BEFORE + 2):
        with repeated(reason != "not wanted"):
            model.text_features(context)
    assert not on_any_device


def test_few_recordings_are_kept_and_only_idle_ones_go(
    on_any_device: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "IDLE", 20)
    replays = Replays()

    def passes(width: int, count: int = BEFORE + 1) -> int:
        """Go through a pass some times; the number of passes that were recorded for it."""
        made, x = len(on_any_device), torch.ones(width, requires_grad=True)
        for _ in range(count):
            with repeated():
                torch.testing.assert_close(replays(lambda x, factor: x * factor, x, 3.0, MOST / 4), 3 * x)
        return (len(on_any_device) - made) // 2  # forward and backward

    assert [passes(width) for width in range(1, 5)] == [1, 1, 1, 1]
    assert passes(5) == 0, "there is no room, and no recording is idle"
    assert passes(4, 21) == 0, "a recording that is kept was made again"
    assert passes(5, 1) == 1, "an idle recording should make room"
    assert passes(4, 1) == 0, "that is in use"
    assert passes(1) == 1, "the oldest recording should have gone"


def test_what_cannot_be_recorded_runs_as_it_is(
    on_any_device: list[Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(work: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(replay, "cuda_graph", fails)
    replays, x = Replays(), torch.ones(2, requires_grad=True)
    for _ in range(BEFORE + 3):
        with repeated():
            torch.testing.assert_close(replays(lambda x, factor: x * factor, x, 3.0, 1.0), 3 * x)
    assert caplog.text.count("out of memory") == 1


def test_a_copy_of_an_encoder_has_no_recordings(on_any_device: list[Tensor]) -> None:
    replays, x = Replays(), torch.ones(2, requires_grad=True)
    with repeated():
        for _ in range(BEFORE + 1):
            replays(lambda x, factor: x * factor, x, 3.0, 1.0)
        assert len(on_any_device) == 2
        copied = copy.deepcopy(replays)
        copied(lambda x, factor: x * factor, x, 3.0, 1.0)
    assert len(on_any_device) == 2


@CUDA
def test_a_real_tower_is_recorded(model: PromptModel) -> None:
    from sordino.encoders import load_encoder

    encoder = load_encoder("bundled", None, "float32", torch.device("cuda"))
    there = PromptModel(encoder, encoder.class_tokens(CLASS_NAMES))
    for seed in range(BEFORE + 3):
        context = torch.randn(2, 4, encoder.context_width, generator=torch.Generator().manual_seed(seed))
        expected = features(there, context.cuda(), wanted=False)
        for found, known in zip(features(there, context.cuda()), expected, strict=True):
            torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-5)
    assert any(each.recorded is not None for each in encoder.replays._kept.values())
