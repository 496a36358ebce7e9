"""Hyper-parameters of `head`; `sordino.algorithms.head` says what they do."""

from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        prompt_text: the words before the name of a class that nobody has statistics of.
    """

    prompt_text: str = "a photo of a"
