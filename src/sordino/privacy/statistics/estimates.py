"""From a release to what clients train on: estimates of their classes, and examples drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.privacy.statistics.posterior import Observed, observed, personal, pooled, shrunk, within
from sordino.randomness import Streams

EXAMPLES = 64  # that are drawn for a class that a client holds, on average


@dataclass(frozen=True)
class ClassStatistics:
    """Estimates of each client's classes from a release; without noise they are what the images say.

    Attributes:
        counts: [K, C], the expected number of the client's examples of each class.
        count_deviation: [K], the standard deviation of the noise on a count.
        probability: [K, C], that the client holds any.
        means: [K, C, D], the expected mean of the client's features of each class.
        variance: [K, C], of each number of them.
        within: [K], the variance of a feature around its class's mean, in one direction.
        shared: [C, D], the expected means over all clients; None if what they released is not joined.
    """

    counts: Tensor
    count_deviation: Tensor
    probability: Tensor
    means: Tensor
    variance: Tensor
    within: Tensor
    shared: Tensor | None


@dataclass(frozen=True)
class Noise:
    """Standard deviations of the noise on the two matrices of a release, in units of their contributions.

    Attributes:
        own: on each client's own matrix; None if it is not released.
        total: on the sum of all clients' matrices; None if it is not released by itself, but is the sum of theirs.
    """

    own: float | None
    total: float | None


@dataclass(frozen=True)
class Estimator:
    """Turns released matrices [C, 1 + r] into estimates.

    Attributes:
        noise: of the release.
        share: a^2, the counts' share of a contribution's squared norm.
        rate: the probability with which an example was in the sums.
        sizes: how many examples, or persons times the clip, each client holds; known to all.
        directions: [D, r], or None for all.
        text: [C, D], the hand-written prompt's text features.
        only_averaged: whether all that clients learn is averaged over them.
        everybody: whether the clients' sums are joined; if not, a client knows its own only.
    """

    noise: Noise
    share: float
    rate: float
    sizes: Sequence[float]
    directions: Tensor | None
    text: Tensor
    only_averaged: bool
    everybody: bool

    def pooled(self, own: Tensor, total: Tensor | None) -> Observed:
        """Return the statistics of all clients together, from what the server has.

        Args:
            own: [K, C, 1 + r], the clients' matrices; not used if there is a total.
            total: [C, 1 + r], their sum, with noise of its own; or None.
        """
        if total is not None:
            assert self.noise.total is not None
            return self._observed(total, self.noise.total, sum(self.sizes))
        return pooled(_stacked([self._own(matrix, client) for client, matrix in enumerate(own)]))

    def statistics(self, own: Tensor | None, everybody: Observed | None, clients: Sequence[int]) -> ClassStatistics:
        """Return the estimates of some clients.

        Args:
            own: [K, C, 1 + r], their own matrices, or None if they have none.
            everybody: the statistics of all clients together, or None.
            clients: [K], their numbers.
        """
        prior = self.text if self.directions is None else self.text @ self.directions
        shared = None if everybody is None else shrunk(everybody, prior)
        parts = []
        for place, client in enumerate(clients):
            seen = everybody if own is None else self._own(own[place], client)
            assert seen is not None
            if own is None:
                assert shared is not None
                means = shared
            elif everybody is None or shared is None:
                means = shrunk(seen, prior)
            elif self.only_averaged:
                means = shrunk(seen, prior, everybody.holders.clamp(min=1))
            else:
                means = personal(seen, shared)
            spread = within(everybody, shared) if everybody and shared else within(seen, means)
            parts.append((seen, means, spread))
        return ClassStatistics(
            torch.stack([seen.expected for seen, _, _ in parts]),
            torch.stack([seen.count_variance.mean().sqrt() for seen, _, _ in parts]),
            torch.stack([seen.probability for seen, _, _ in parts]),
            self._back(torch.stack([means.means for _, means, _ in parts])),
            torch.stack([means.variance for _, means, _ in parts]),
            torch.tensor([spread for _, _, spread in parts]).to(self.text),
            None if shared is None else self._back(shared.means),
        )

    def _own(self, matrix: Tensor, client: int) -> Observed:
        assert self.noise.own is not None
        return self._observed(matrix, self.noise.own, self.sizes[client])

    def _observed(self, matrix: Tensor, deviation: float, size: float) -> Observed:
        counts_scale, sums_scale = self.rate * self.share**0.5, self.rate * (1 - self.share) ** 0.5
        constant = torch.ones_like(matrix[:, 0])
        return observed(
            matrix[:, 1:] / sums_scale,
            matrix[:, 0] / counts_scale,
            (deviation / sums_scale) ** 2 * constant,
            (deviation / counts_scale) ** 2 * constant,
            size,
        )

    def _back(self, means: Tensor) -> Tensor:
        """Return means [..., r] as features [..., D]; what was projected away is taken from the text features."""
        if self.directions is None:
            return means
        kept = means @ self.directions.T
        rest = self.text - (self.text @ self.directions) @ self.directions.T
        length = (means * (self.text @ self.directions)).sum(-1, keepdim=True)
        return kept + length.clamp(min=0) * rest


def drawn(statistics: ClassStatistics, streams: Streams, certainty: float) -> tuple[Tensor, Tensor, list[int]]:
    """Draw every client's training examples from the predictive distribution of its classes.

    A class is held if its probability is at least `certainty`; the likeliest one always is. A client has 64 examples
    for each class that it holds, divided in proportion to the expected counts. An example is the class's mean plus
    normal deviations: those of images within a class, and those of the mean that noise leaves open.

    Args:
        statistics: of K clients.
        streams: of the K clients; the drawn examples depend on the release and the seed alone.
        certainty: between 0 and 1.

    Returns:
        Features [N, D] of unit norm, labels [N], client by client, and K numbers of examples.
    """
    features, labels, sizes = [], [], []
    width = statistics.means.shape[-1]
    for place, generator in enumerate(streams.generators("examples of statistics")):
        counts = statistics.counts[place]
        probability = statistics.probability[place]
        held = probability >= min(certainty, float(probability.max()))
        expected = torch.where(held, counts, torch.zeros_like(counts)).double()
        expected = expected / expected.sum().clamp(min=1e-12)
        numbers = (expected * EXAMPLES * int(held.sum())).round().long().clamp(min=1) * held
        chosen = torch.arange(len(counts), device=counts.device).repeat_interleave(numbers)
        deviation = (statistics.within[place] + statistics.variance[place]).sqrt()[chosen]
        normal = torch.from_numpy(generator.standard_normal((len(chosen), width))).to(deviation)
        examples = statistics.means[place][chosen] + deviation[:, None] * normal
        features.append(F.normalize(examples, dim=-1))
        labels.append(chosen)
        sizes.append(len(chosen))
    return torch.cat(features), torch.cat(labels), sizes


def _stacked(parts: Sequence[Observed]) -> Observed:
    return Observed(*(torch.stack([getattr(part, entry.name) for part in parts]) for entry in fields(Observed)))
