"""Hyper-parameters of `zero-shot`; `sordino.algorithms.zero_shot` says what they do."""

from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes: prompt_text: the words before the class name.
    """

    prompt_text: str = "a photo of a"
