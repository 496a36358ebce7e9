"""Hyper-parameters of `local`; `sordino.algorithms.local` says what they do."""

from dataclasses import field

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors.
        initial_context: words that the context starts from, at its end; empty for random vectors alone.
        local_steps: gradient steps a round.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of the steps; a client keeps its state from round to round.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    local_steps: PositiveInt = 1
    batch_size: NonNegativeInt = 0
    optimizer: Optimizer = field(default_factory=Optimizer)
