"""Hyper-parameters of `pfedmoap`; `sordino.algorithms.pfedmoap` says what they do."""

from dataclasses import field

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT, Weight


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors.
        initial_context: words that all contexts start from, at their end; empty for random vectors alone.
        local_steps: gradient steps a client takes a round.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's context.
        gate_optimizer: of a client's gate.
        experts: the most contexts that a client mixes, its own among them; with 1 the mean is PromptFL's context.
        local_weight: lambda, the weight of the logits of the client's own context.
        heads: of the gate's attention; they share the gate's width.
        scaling: of the products that the gate's softmax is taken of.
        gate_width: w, how many numbers of a feature the gate works on, at most.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=Optimizer)
    gate_optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.01))
    experts: PositiveInt = 10
    local_weight: Weight = 0.5
    heads: PositiveInt = 8
    scaling: PositiveFloat = 10.0
    gate_width: PositiveInt = 128
