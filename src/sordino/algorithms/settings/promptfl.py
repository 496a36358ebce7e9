"""Hyper-parameters of `promptfl`; `sordino.algorithms.promptfl` says what they do."""

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
        local_steps: gradient steps a client takes between averagings.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's local steps.
        server_optimizer: of the server's step along the mean change; SGD with rate 1 is plain averaging.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=Optimizer)
    server_optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1.0))
