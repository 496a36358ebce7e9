"""Hyper-parameters of `dp-residual`; `sordino.algorithms.dp_residual` says what they do."""

from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT, Weight


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        prompt_text: the words before the class name.
        residual: strength of the residual; 0 leaves the text features, 1 replaces them by the means' directions.
        prior: the weight of the client's log prior; 0 leaves it out.
    """

    prompt_text: str = "a photo of a"
    residual: Weight = 1.0
    prior: Weight = 1.0
