"""Hyper-parameters of `proda`; `sordino.algorithms.proda` says what they do."""

from dataclasses import field

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT, Weight


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
        contexts_at_once: contexts that a step trains, at most; the last of a pass may be fewer.
        orthogonality: lambda, the weight of the cosines between contexts; 0 leaves them out.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.001))
    contexts: PositiveInt = 32
    contexts_at_once: PositiveInt = 4
    orthogonality: Weight = 0.1
