"""Hyper-parameters of `prograd`; `sordino.algorithms.prograd` says what they do."""

from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT, Weight, promptfl


@dataclass(frozen=True, config=STRICT)
class Settings(promptfl.Settings):
    """Hyper-parameters: those of PromptFL, and three more.

    Attributes:
        alignment: lambda, how much of the component against general knowledge is taken out; 0 leaves PromptFL.
        temperature: T, of the predictions that are compared.
        hand_written: the prompt whose predictions stand for general knowledge.
    """

    alignment: Weight = 1.0
    temperature: PositiveFloat = 1.0
    hand_written: str = "a photo of a"
