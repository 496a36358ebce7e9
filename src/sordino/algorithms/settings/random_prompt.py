"""Hyper-parameters of `random-prompt`; `sordino.algorithms.random_prompt` says what they do."""

from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of random vectors.
        initial_context: words that the context ends with; empty for random vectors alone.
        deviation: standard deviation of the random numbers; 0.02 is that of the initial prompts of all methods.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    deviation: NonNegativeFloat = 0.02
