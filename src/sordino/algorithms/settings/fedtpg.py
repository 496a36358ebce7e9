"""Hyper-parameters of `fedtpg`; `sordino.algorithms.fedtpg` says what they do."""

from dataclasses import field

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT


def _optimizer() -> Optimizer:
    """Return the authors' optimizer."""
    return Optimizer(learning_rate=0.003, momentum=0.9, weight_decay=1e-5, schedule="cosine")


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of queries, and of vectors that the generator makes.
        local_steps: gradient steps a client takes between averagings.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's local steps.
        heads: of the generator's attention; they share the width of a context.
    """

    context_length: PositiveInt = 4
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 128
    optimizer: Optimizer = field(default_factory=_optimizer)
    heads: PositiveInt = 4
