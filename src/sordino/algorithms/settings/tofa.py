"""Hyper-parameters of `tofa`; `sordino.algorithms.tofa` says what they do."""

from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        prompt_text: the words before the class name.
        text_strength: kappa, how many examples of all clients the text counts as.
        shared_strength: rho, how many examples of a client the shared prototype counts as.
        covariance_strength: f, how many examples the prior of the covariance counts as.
    """

    prompt_text: str = "a photo of a"
    text_strength: PositiveFloat = 1.0
    shared_strength: PositiveFloat = 1.0
    covariance_strength: PositiveFloat = 1.0
