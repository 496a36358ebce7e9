"""Hyper-parameters of `feddpg`; `sordino.algorithms.feddpg` says what they do."""

from dataclasses import field

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: n, the number of generated vectors.
        initial_context: words that the prompt starts from, at its end; empty for random vectors alone.
        hidden_width: of the generator.
        local_steps: gradient steps a client takes between averagings.
        batch_size: examples a step and client; 0 takes all of them. Each has a pass through the text tower.
        optimizer: of a client's local steps.
    """

    context_length: PositiveInt = 10
    initial_context: str = ""
    hidden_width: PositiveInt = 10
    local_steps: PositiveInt = 3
    batch_size: NonNegativeInt = 256
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(name="adamw", learning_rate=0.001, weight_decay=0.01)
    )
