"""Hyper-parameters of `pfedpt`; `sordino.algorithms.pfedpt` says what they do."""

from dataclasses import field

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors.
        initial_context: words that the context starts from, at its end; empty for random vectors alone.
        local_steps: gradient steps a client takes between averagings, of both parts together.
        frame_share: the share of these steps, rounded down, that trains the frame; they come first.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of the context.
        frame_optimizer: of the frame; a client keeps its state.
        frame_width: of the frame's edges, as a share of the image's side.
        frame_deviation: standard deviation of the numbers that the frame starts from, in units of normalized pixels.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    local_steps: PositiveInt = 4
    frame_share: float = Field(default=0.5, ge=0, le=1)
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=Optimizer)
    frame_optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1.0, momentum=0.5))
    frame_width: float = Field(default=1 / 16, gt=0, le=0.5)
    frame_deviation: NonNegativeFloat = 1.0
