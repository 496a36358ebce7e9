"""Local training, which most methods share: steps on all parameters at once, or on parts in turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from sordino.algorithms.base import ClientData, RoundContext
from sordino.algorithms.optimizer import Optimizer
from sordino.privacy.gradients import Batch, Gradients, Parameters, PromptOf

ROUNDING = 1e-9  # so that 0.29 of 100 steps are 29, though the product of the two floats is below 29


class Training(Protocol):
    """The settings of local training."""

    @property
    def local_steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def optimizer(self) -> Optimizer: ...


def local_steps(
    settings: Training,
    prompt_of: PromptOf,
    parameters: Parameters,
    fixed: Parameters,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> dict[str, Tensor]:
    """Return the parameters after `settings.local_steps` steps of an optimizer that starts afresh.

    Args:
        settings: number of steps, batch size (0 takes all examples), and optimizer.
        prompt_of: makes prompts of `parameters` and `fixed` together.
        parameters: the trained tensors, each [K, ...].
        fixed: the other tensors of the prompt, each [K, ...].
        data, gradients, round_context: as a method's `client_round` gets them.
    """
    batches = data.batches(settings.local_steps, settings.batch_size or None, round_context.streams)
    return descend(settings.optimizer, None, prompt_of, parameters, fixed, batches, gradients, round_context)[0]


def descend(
    optimizer: Optimizer,
    states: Mapping[str, Mapping[str, Tensor]] | None,
    prompt_of: PromptOf,
    parameters: Parameters,
    fixed: Parameters,
    batches: Iterable[Batch],
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Take a step on `parameters` for each of `batches`, with all other tensors fixed.

    Args:
        optimizer: of all parameters.
        states: its state by parameter; None starts it afresh.
        prompt_of, parameters, fixed, gradients, round_context: as for `local_steps`.
        batches: one for each step. Parts that take turns share one `ClientData.batches`, so that no Poisson sample is
            drawn twice.

    Returns:
        The parameters, and the optimizer's state by parameter.
    """
    trained, rate = dict(parameters), optimizer.rate(round_context)
    kept = {name: dict(states[name] if states else optimizer.initial_state(value)) for name, value in trained.items()}
    for batch in batches:
        for name, gradient in gradients(prompt_of, trained, fixed, batch).values.items():
            trained[name], kept[name] = optimizer.step(trained[name], gradient, kept[name], rate)
    return trained, kept


def first_steps(steps: int, share: float) -> int:
    """Return the number of a round's steps that train the first part: a share of them, rounded down."""
    return math.floor(share * steps + ROUNDING)


def untrained(steps: int, share: float, table: str, key: str, part: str) -> list[str]:
    """Return in words that the first part of a round has no step, though it has a share of them; nothing otherwise.

    Args:
        steps, share: as for `first_steps`.
        table: of the method's settings, with dots.
        key: of the share.
        part: the first part, in words.
    """
    if not 0 < share < 1 or first_steps(steps, share):
        return []
    enough = math.ceil((1 - ROUNDING) / share)
    return [
        f"{table}.local_steps = {steps}: {part} never trained, as {key} = {share:g} of {steps} is no whole step; "
        f"set local_steps to {enough} or more, or {key} to 0 or 1"
    ]
