"""Poisson sampling: every unit, example or person, is in a batch with one probability, independently of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.randomness import Randomness


@dataclass(frozen=True)
class Sampling:
    """The sampling of a batch.

    Attributes:
        rate: [K] float64, the probability with which each of a client's units was in the batch. A unit is an example,
            or a person.
        expected: [K] float64, the expected number of units, rate times the client's number of them.
        draw: which draw of the round it was; two releases of one draw would not be two independent samples.
    """

    rate: Tensor
    expected: Tensor
    draw: int


def sampling_rate(batch_size: int | None, units: int) -> float:
    """Return the probability with which each of so many units is in a batch; None takes all."""
    return 1.0 if batch_size is None else min(1.0, batch_size / max(1, units))


class PoissonSampler:
    """Draw the batches of one round. No two draws share random numbers, in however many loops a method asks for them.

    Args:
        randomness: the source of the samples.
        person_images: if set, the units that are drawn are persons, with at most so many images each; None draws
            examples.
    """

    def __init__(self, randomness: Randomness, person_images: int | None = None) -> None:
        self._randomness, self.person_images = randomness, person_images
        self._draws = 0

    def draw(self, counts: Sequence[int], batch_size: int | None) -> tuple[list[Tensor], Sampling]:
        """Draw one batch of every client.

        Args:
            counts: K, how many units each client holds.
            batch_size: the expected number of units; None takes all.

        Returns:
            For each client the places of the chosen units, ascending, int64; and how they were sampled.
        """
        number, self._draws = self._draws, self._draws + 1
        rates = [sampling_rate(batch_size, count) for count in counts]
        drawn = self._randomness.uniform(f"batch {number}", counts)
        chosen = [(numbers < rate).nonzero().flatten() for numbers, rate in zip(drawn, rates, strict=True)]
        rate = torch.tensor(rates, dtype=torch.float64)
        return chosen, Sampling(rate, rate * torch.tensor(counts, dtype=torch.float64), number)
