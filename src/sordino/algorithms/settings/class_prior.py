"""Hyper-parameters of `class-prior`; `sordino.algorithms.class_prior` says what they do."""

from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT, Weight


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        prompt_text: the words before the class name.
        prior: the weight of the log prior; 0 leaves zero-shot.
    """

    prompt_text: str = "a photo of a"
    prior: Weight = 1.0
