"""Hyper-parameters of `fed-bbpt`; `sordino.algorithms.fed_bbpt` says what they do."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of vectors of the generated prompt.
        initial_context: words that the prompt starts from, at its end; frequent words stand before them.
        latent_width: width of each position's trigger.
        hidden_width: width of the generator's hidden layer.
        local_steps: steps a client takes between averagings, each on a batch of its own.
        batch_size: examples a step and client; 0 takes all of them.
        directions: random directions a step, in each of which the loss is asked for twice.
        smoothing: c, how far from the generator the loss is asked for, in its parameters; before its decay.
        smoothing_decay: gamma, the power of the step's number by which c is divided.
        step_size: a, of a step; before its decay.
        step_decay: alpha, the power of the step's number plus `step_offset` by which a is divided.
        step_offset: o.
        momentum: beta, of the gradient correction, which starts afresh each round.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    latent_width: PositiveInt = 4
    hidden_width: PositiveInt = 4
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 128
    directions: PositiveInt = 5
    smoothing: PositiveFloat = 0.01
    smoothing_decay: NonNegativeFloat = 0.1
    step_size: NonNegativeFloat = 0.1
    step_decay: NonNegativeFloat = 0.4
    step_offset: NonNegativeFloat = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
