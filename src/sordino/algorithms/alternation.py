"""Local training that alternates: some steps on one part of the parameters, then some on the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from sordino.algorithms.base import Clock
from sordino.algorithms.optimizer import Optimizer
from sordino.privacy.gradients import Batch, Gradients, Parameters, PromptOf


def descend(
    optimizer: Optimizer,
    states: Mapping[str, Mapping[str, Tensor]] | None,
    prompt_of: PromptOf,
    parameters: Parameters,
    fixed: Parameters,
    batches: Iterable[Batch],
    gradients: Gradients,
    clock: Clock,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A step on `parameters` for each of `batches`, with all else fixed.

    Args:
        optimizer: of all parameters.
        states: its state by parameter; None starts it afresh.
        prompt_of, parameters, fixed, gradients, clock: as for `Gradients`.
        batches: one for each step. Parts that alternate share one `ClientData.batches`, so that no coin is tossed
            twice.

    Returns:
        The parameters, and the optimiser's state by parameter.
    """
    trained = dict(parameters)
    kept = {name: dict(states[name]) if states else optimizer.initial_state(trained[name]) for name in trained}
    for batch in batches:
        by = gradients(prompt_of, trained, fixed, batch).by
        for name, gradient in by.items():
            trained[name], kept[name] = optimizer.step(trained[name], gradient, kept[name], optimizer.rate(clock))
    return trained, kept


def first_steps(steps: int, share: float) -> int:
    """How many of a round's steps come before the alternation: the share of them, rounded down."""
    return int(share * steps)
