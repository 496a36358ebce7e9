"""Rounds of local training, which most methods share: steps on all parameters at once, or on parts in turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from sordino.algorithms.base import ClientData, RoundContext
from sordino.algorithms.optimizer import Optimizer
from sordino.privacy.gradients import Batch, Gradients, Parameters, PromptOf

ROUNDING = 1e-9  # 0.29 of 100 steps are 29, whatever the product of the two floats


class Training(Protocol):
    """The settings that it takes."""

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
    """Parameters after `settings.local_steps` steps of an optimizer that starts afresh.

    Args:
        settings: how many steps, on batches of which size (0 takes all examples), with which optimizer.
        prompt_of: makes prompts of `parameters` and `fixed` together.
        parameters: what is trained, each [K, ...].
        fixed: what is not.
        data, gradients, round_context: as a method is given them.
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
    """A step on `parameters` for each of `batches`, with all else fixed.

    Args:
        optimizer: of all parameters.
        states: its state by parameter; None starts it afresh.
        prompt_of, parameters, fixed, gradients, round_context: as for `local_steps`.
        batches: one for each step. Parts that take turns share one `ClientData.batches`, so that no coin is tossed
            twice.

    Returns:
        The parameters, and the optimizer's state by parameter.
    """
    trained, rate = dict(parameters), optimizer.rate(round_context)
    kept = {name: dict(states[name] if states else optimizer.initial_state(trained[name])) for name in trained}
    for batch in batches:
        for name, gradient in gradients(prompt_of, trained, fixed, batch).values.items():
            trained[name], kept[name] = optimizer.step(trained[name], gradient, kept[name], rate)
    return trained, kept


def first_steps(steps: int, share: float) -> int:
    """How many of a round's steps are those of the first part: the share of them, rounded down."""
    return math.floor(share * steps + ROUNDING)
