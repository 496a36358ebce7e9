"""Hyper-parameters of `maple`; `sordino.algorithms.maple` says what they do."""

from dataclasses import field

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors of a layer.
        initial_context: words that the first layer's vectors start from, at their end; empty for random vectors alone.
        local_steps: gradient steps a client takes between averagings.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's local steps.
        layers: J, the number of first layers of both towers with prompts, at most all.
    """

    context_length: PositiveInt = 2
    initial_context: str = ""
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.0035))
    layers: PositiveInt = 9
