"""Hyper-parameters of `dp-fpl`; `sordino.algorithms.dp_fpl` says what they do."""

from dataclasses import field
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT
from sordino.errors import ConfigError


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors.
        initial_context: words that the shared context starts from, at its end; empty for random vectors alone.
        parameterization: of the personal prompt: "residual" (the method), "lora" (no residual), "full" (no factors).
        rank: k, at most M.
        local_steps: gradient steps of the personal prompt a round; 1 in the paper.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of the shared context, at the server; its state stays there.
        local_learning_rate: of the personal prompt; on the optimizer's schedule, and with its `max_norm`.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    parameterization: Literal["residual", "lora", "full"] = "residual"
    rank: PositiveInt = 8
    local_steps: PositiveInt = 1
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.001))
    local_learning_rate: NonNegativeFloat = 0.001

    def __post_init__(self) -> None:
        if self.parameterization != "full" and self.rank > self.context_length:
            raise ConfigError("rank", self.rank, f"must be at most context_length = {self.context_length}")
