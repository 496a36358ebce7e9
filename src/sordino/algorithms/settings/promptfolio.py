"""Hyper-parameters of `promptfolio`; `sordino.algorithms.promptfolio` says what they do."""

from dataclasses import field

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors of each context.
        initial_context: words that both contexts start from, at their end; empty for random vectors alone.
        local_steps: gradient steps a client takes between averagings.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's local steps, for both contexts.
        personal: theta, the part of the personal context's features; 0 leaves PromptFL, 1 leaves training alone.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.001))
    personal: float = Field(default=0.2, ge=0, le=1)
