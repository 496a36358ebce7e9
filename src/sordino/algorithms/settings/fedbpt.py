"""Hyper-parameters of `fedbpt`; `sordino.algorithms.fedbpt` says what they do."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of vectors of the prompt.
        initial_context: words that the prompt starts from, at its end; frequent words stand before them.
        search_width: N, the number of searched numbers z.
        population: P, candidates a generation at a client, at least 2.
        local_steps: generations that a client takes between two steps of the server.
        batch_size: examples on which a generation is measured; 0 takes all of a client's.
        initial_step: sigma, standard deviation of z at the start.
        embedding_scale: standard deviation of the searched part of the prompt at the start, in units of that of word
            embeddings.
        masked_share: of an image feature's entries that are random in the second look at each image, by whose loss the
            first one's is divided; 0 leaves the second look out.
        projection_seed: of the fixed random projection from z to the prompt.
    """

    context_length: PositiveInt = 50
    initial_context: str = ""
    search_width: PositiveInt = 500
    population: Annotated[int, Field(ge=2)] = 5
    local_steps: PositiveInt = 8
    batch_size: NonNegativeInt = 0
    initial_step: PositiveFloat = 1.0
    embedding_scale: PositiveFloat = 1.0
    masked_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    projection_seed: NonNegativeInt = 0
