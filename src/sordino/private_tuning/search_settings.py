"""The settings of a search for a prompt, apart from it, as they are checked before torch and cma are imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """Settings of a search.

    Attributes:
        width: of z.
        population: candidates a generation.
        generations: their number.
        deviation: standard deviation of z's entries at the start.
        scale: standard deviation of a prompt's entries if z's entries have a standard deviation of 1.
        seed: of A and of candidates.
        keep_norms: give each token of a prompt its norm in p_0. A tower normalizes its input, so this loses little. It
            keeps prompts away from values for which a tower on shares was not calibrated.
    """

    width: int = 64
    population: int = 16
    generations: int = 50
    deviation: float = 1.0
    scale: float = 0.05
    seed: int = 0
    keep_norms: bool = False
