"""Evidence for attacks on a release of class statistics: its parts, their noise, and what an example adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sordino.audit.membership import Indices
from sordino.privacy.statistics.estimates import Released
from sordino.privacy.statistics.mechanism import CENTER, MATRIX, SCATTER, StatisticsMechanism
from sordino.privacy.statistics.release import CENTER_COUNTS, contributions, unpacked
from sordino.runtime.local import LocalRuntime, Training

LEAST_DEVIATION = 1e-3  # assumed of a release without noise, so that its weight is finite


@dataclass(frozen=True)
class Examples:
    """Images of some clients, on the CPU.

    Attributes:
        features, labels: [n, D] and [n].
        owner: [n], the party whose release each of them is in, if it is in any.
    """

    features: Tensor
    labels: Tensor
    owner: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, rows: NDArray[np.int64], owner: Indices) -> Examples:
        chosen = torch.from_numpy(rows).to(features.device)
        return cls(features[chosen].cpu(), labels[chosen].cpu(), torch.from_numpy(owner))


@dataclass(frozen=True)
class Source:
    """A part of what was released.

    Attributes:
        part: which; see `sordino.privacy.statistics.mechanism`.
        sums: [C, 1 + r], [1 + D] or [r, r], by part; float64 on the CPU.
        deviation: of its noise, as it was planned; positive.
        client: whose it is; None if it is the sum over all clients.
    """

    part: str
    sums: Tensor
    deviation: float
    client: int | None

    def has(self, owner: Tensor) -> Tensor:
        """Return which examples may be in it, given their owners [n]."""
        return torch.ones_like(owner, dtype=torch.bool) if self.client is None else owner == self.client


@dataclass(frozen=True)
class Evidence:
    """All that an attacker knows of a release: its parts, and what an example contributes to them.

    Attributes:
        mechanism: of the run.
        sources: the parts.
        centers: [K, D], from where each client's features are seen, on the CPU; or None.
    """

    mechanism: StatisticsMechanism
    sources: Sequence[Source]
    centers: Tensor | None

    @classmethod
    def of(cls, runtime: LocalRuntime, training: Training) -> Evidence:
        """Return what a run released, from what clients keep of it.

        The sum of all clients' matrices is told as counts and sums of features as they are seen from the center, and a
        sum of clients' centers, or of their scatters, has the noise of them all.
        """
        mechanism = statistics_mechanism(runtime)
        known = Released.of({name: part.cpu().double() for name, part in training.at_clients.release.items()})
        noise = mechanism.multipliers
        sources = []

        def add(part: str, sums: Tensor, multiplier: float | None, client: int | None = None, noises: int = 1) -> None:
            assert multiplier is not None
            deviation = max(multiplier * mechanism.clip * noises**0.5, LEAST_DEVIATION)
            sources.append(Source(part, sums, deviation, client))

        noises = len(mechanism.inputs.sizes) if mechanism.by_client else 1
        if noise.own is not None and known.own is not None:
            for client, matrix in enumerate(known.own):
                add(MATRIX, matrix, noise.own, client)
        centers = mechanism.centers(known, range(len(mechanism.inputs.sizes)))
        if noise.total is not None and known.pooled is not None:
            rate, share = mechanism.rate, mechanism.count_share
            shorter = 1.0 if centers is None else float((1 - centers[0].pow(2).sum()).sqrt())
            counts, sums = known.pooled.counts, known.pooled.sums / shorter
            matrix = rate * torch.cat([share**0.5 * counts[:, None], (1 - share) ** 0.5 * sums], 1)
            add(MATRIX, matrix, noise.total)
        if known.center is not None:
            add(CENTER, known.center, noise.center, None, noises)
        if known.own_center is not None:
            for client, center in enumerate(known.own_center):
                add(CENTER, center, noise.center, client)
        if known.scatter is not None:
            add(SCATTER, unpacked(known.scatter), noise.scatter, None, noises)
        return cls(mechanism, sources, centers)

    def rows(self, part: str, examples: Examples) -> Tensor:
        """Return what examples are expected to add to a part: rows [n, ...], of u in place of u u^T, float64."""
        mechanism, features = self.mechanism, examples.features
        directions = None if mechanism.directions is None else mechanism.directions.cpu().to(features)
        if part == CENTER:
            return mechanism.rate * contributions(features, CENTER_COUNTS, None)
        share = mechanism.count_share if part == MATRIX else 0.0
        rows = torch.zeros(len(features), mechanism.shape[1], dtype=torch.float64)
        for owner in examples.owner.unique():
            own = examples.owner == owner
            center = None if self.centers is None else self.centers[int(owner)]
            rows[own] = contributions(features[own], share, directions, center)
        return mechanism.rate * rows if part == MATRIX else mechanism.rate**0.5 * rows[:, 1:]


def along_sums(sums: Tensor, rows: Tensor, part: str) -> Tensor:
    """Return the products [n] of what examples add to a part with its sums, of all or of each."""
    return ((rows @ sums) * rows).sum(1) if part == SCATTER else (rows * sums).sum(1)


def added(rows: Tensor, part: str) -> Tensor:
    """Return what examples add to a part together."""
    return rows.mT @ rows if part == SCATTER else rows.sum(0)


def statistics_mechanism(runtime: LocalRuntime) -> StatisticsMechanism:
    mechanism = runtime.mechanism
    assert isinstance(mechanism, StatisticsMechanism)
    return mechanism
