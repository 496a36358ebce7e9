"""Hyper-parameters of `fedperfix`; `sordino.algorithms.fedperfix` says what they do."""

from dataclasses import field
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
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
        optimizer: of a client's local steps, for context and adapters.
        bottleneck: R, the width within an adapter.
        scale: s, of an adapter's output; with join = "add", 0 leaves PromptFL.
        join: "add" adds prefixes to the layer's keys and values; "append" puts them beside these.
        adapted_layers: number of the last layers that have adapters, at most all; those below are computed once.
        initial_up: start of the up-projections: "zero", which is the pretrained tower, or "random".
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 64
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.01))
    bottleneck: PositiveInt = 256
    scale: NonNegativeFloat = 1.5
    join: Literal["add", "append"] = "add"
    adapted_layers: PositiveInt = 12
    initial_up: Literal["zero", "random"] = "zero"
