"""Hyper-parameters of `promptsrc`; `sordino.algorithms.promptsrc` says what they do."""

from dataclasses import field

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT, Weight


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors of a layer, in each tower.
        initial_context: words that the first text vectors start from, at their end; empty for random vectors alone.
        local_steps: gradient steps a client takes between averagings.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's local steps.
        layers: J, the number of first layers of both towers with prompts, at most all.
        text_guidance: weight of the distance to the frozen tower's class features; 0 leaves it out.
        image_guidance: weight of the distance to the frozen tower's image features.
        logit_guidance: weight of the divergence from the frozen towers' predictions.
        sentences: the number of hand-written sentences whose mean is a frozen class feature.
        peak: the round whose prompts weigh most in their mean over rounds, as a share of all rounds.
        spread: the deviation of these weights, as a share of all rounds.
    """

    context_length: PositiveInt = 4
    initial_context: str = ""
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.0025))
    layers: PositiveInt = 9
    text_guidance: Weight = 25.0
    image_guidance: Weight = 10.0
    logit_guidance: Weight = 1.0
    sentences: int = Field(default=60, ge=1, le=60)
    peak: float = Field(default=0.75, ge=0, le=1)
    spread: float = Field(default=0.05, ge=0.001, le=100)
