"""Hyper-parameters of `feddtpt` and `feddtpt-votes`; `sordino.algorithms.feddtpt` says what they do."""

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of words of the prompt.
        initial_context: words that the prompt starts from, at its end; the words before them are drawn.
        vocabulary: words that a prompt may be made of, separated by spaces; empty takes frequent words, and words for
            pictures. Only those that are one token of the encoder are used.
        local_steps: proposals for one place of the prompt that a client tries, one place after the other.
        proposals: words that are proposed for a place at once.
        batch_size: examples on which they are tried; 0 takes all of a client's.
        smallest_group: fewest tokens within reach of each other that are a cluster.
    """

    context_length: PositiveInt = 10
    initial_context: str = ""
    vocabulary: str = ""
    local_steps: PositiveInt = 5
    proposals: PositiveInt = 8
    batch_size: NonNegativeInt = 0
    smallest_group: PositiveInt = 2
