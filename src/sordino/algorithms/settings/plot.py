"""Hyper-parameters of `plot`; `sordino.algorithms.plot` says what they do."""

from dataclasses import field

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors of each context.
        initial_context: words that all contexts start from, at their end; empty for random vectors alone.
        local_steps: gradient steps a client takes between averagings.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's local steps.
        contexts: N, the number of contexts.
        regularization: the weight of the plan's entropy.
        iterations, tolerance: of the transport; it ends at whichever is reached first, for each image and class alone.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=Optimizer)
    contexts: PositiveInt = 4
    regularization: PositiveFloat = 0.1
    iterations: PositiveInt = 100
    tolerance: PositiveFloat = 0.01
