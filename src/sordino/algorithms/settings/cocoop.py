"""Hyper-parameters of `cocoop`; `sordino.algorithms.cocoop` says what they do."""

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
        reduction: how many times narrower than a feature the network is within.
    """

    context_length: PositiveInt = 4
    initial_context: str = ""
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=Optimizer)
    reduction: PositiveInt = 16
