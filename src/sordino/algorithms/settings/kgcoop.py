"""Hyper-parameters of `kgcoop`; `sordino.algorithms.kgcoop` says what they do."""

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT, Weight, promptfl


@dataclass(frozen=True, config=STRICT)
class Settings(promptfl.Settings):
    """Hyper-parameters: those of PromptFL, and two more.

    Attributes:
        context_length: M, the number of learned vectors.
        guidance: lambda, the weight of the distance to the hand-written prompt's class features; 0 leaves PromptFL.
        hand_written: the prompt whose class features stand for general knowledge.
    """

    context_length: PositiveInt = 4
    guidance: Weight = 8.0
    hand_written: str = "a photo of a"
