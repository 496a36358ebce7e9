"""From a release to what clients train on: estimates of their classes, and examples drawn from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.privacy.statistics.posterior import (
    ClassMeans,
    Observed,
    center_of,
    observed,
    personal,
    pooled,
    principal,
    shrunk,
    within,
)
from sordino.privacy.statistics.release import CENTER_COUNTS, unpacked
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
        principal: [q, D], directions in which features vary more than that, times the standard deviation that is added.
        shared_counts: [C], the expected number of examples behind `shared`; None as that.
    """

    counts: Tensor
    count_deviation: Tensor
    probability: Tensor
    means: Tensor
    variance: Tensor
    within: Tensor
    shared: Tensor | None
    principal: Tensor | None = None
    shared_counts: Tensor | None = None


@dataclass(frozen=True)
class Noise:
    """Standard deviations of the noise on a release's parts, in units of their contributions; None for no such part.

    Attributes:
        own: on each client's own matrix.
        total: on the sum of all clients' matrices, if it is released by itself and not as the sum of theirs.
        center, scatter: on these, of each client or of all, as the matrices.
    """

    own: float | None
    total: float | None
    center: float | None = None
    scatter: float | None = None

    @property
    def parts(self) -> dict[str, float]:
        """Return the parts that are released, by name."""
        return {entry.name: z for entry in fields(self) if (z := getattr(self, entry.name)) is not None}

    def times(self, unit: float) -> Noise:
        """Return the deviations in another unit."""
        return Noise(**{"own": None, "total": None} | {name: z * unit for name, z in self.parts.items()})


@dataclass(frozen=True)
class Released:
    """A release as a stack of clients keeps it; all of it has noise.

    Attributes:
        own: [K, C, 1 + r], their own matrices, or None.
        own_center: [K, 1 + D], the sums for a center of each client's own, or None.
        center: [1 + D], those of all clients, or None.
        pooled: what all clients' matrices tell together, or None.
        scatter: [r (r + 1) / 2], of all clients, or None.
    """

    own: Tensor | None = None
    own_center: Tensor | None = None
    center: Tensor | None = None
    pooled: Observed | None = None
    scatter: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Released:
        """Return them from tensors by name, as of `tensors`."""
        joined = {entry.name: tensors[entry.name] for entry in fields(Observed) if entry.name in tensors}
        if joined and "examples" not in joined:  # a file of an earlier version
            joined["examples"] = joined["expected"]
        own, own_center, center, scatter = (tensors.get(name) for name in ("own", "own_center", "center", "scatter"))
        return cls(own, own_center, center, Observed(**joined) if joined else None, scatter)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return all that there is as tensors by name, for files and messages."""
        named = {name: value for name, value in vars(self).items() if name != "pooled"}
        joined = {} if self.pooled is None else dict(vars(self.pooled))
        return {name: tensor for name, tensor in named.items() if tensor is not None} | joined


@dataclass(frozen=True)
class Viewpoint:
    """From where a client sees features.

    Attributes:
        own: [D], the center of its matrix.
        joint: [D], the one from which it is compared with those of others; its own if it is not.
        trust: how far that is the mean feature, from 0 to 1.
    """

    own: Tensor
    joint: Tensor
    trust: Tensor


@dataclass(frozen=True)
class Estimator:
    """Turns what was released into estimates.

    Attributes:
        noise: of the release.
        share: a^2, the counts' share of a contribution's squared norm.
        rate: the probability with which an example was in the sums.
        sizes: how many examples, or persons times the clip, each client holds; known to all.
        directions: [D, r], or None for all.
        text: [C, D], the hand-written prompt's text features.
        only_averaged: whether all that clients learn is averaged over them.
        everybody: whether the clients' sums are joined; if not, a client knows its own only.
        counted: whether sizes are numbers of examples. What a person counts in sums depends on that person's images.
    """

    noise: Noise
    share: float
    rate: float
    sizes: Sequence[float]
    directions: Tensor | None
    text: Tensor
    only_averaged: bool
    everybody: bool
    counted: bool

    @property
    def noises(self) -> int:
        """Return how many noises are in the sum of all clients' center or scatter: one each, or the sum's."""
        return len(self.sizes) if self.noise.total is None else 1

    def centers(self, released: Released, clients: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Return the points [K, D] from which features are seen, and how far each is trusted [K]; None for the origin.

        Args:
            released: what K clients keep of the release.
            clients: [K], their numbers.
        """
        if released.own_center is not None:
            noisy, noises, sizes = released.own_center, 1, [self.sizes[client] for client in clients]
        elif released.center is not None:
            noisy, noises, sizes = released.center.expand(len(clients), -1), self.noises, [sum(self.sizes)]
        else:
            return None
        assert self.noise.center is not None
        expected = self.rate * torch.tensor(sizes, dtype=torch.float64) if self.counted else None
        return center_of(noisy, noises * self.noise.center**2, CENTER_COUNTS, expected, self.rate)

    def pooled(self, released: Released, total: Tensor | None) -> Observed:
        """Return the statistics of all clients together, from what the server has.

        Args:
            released: the matrices of all clients, which are not used if there is a total, and the center.
            total: [C, 1 + r], the sum of the matrices, with noise of its own; or None.
        """
        if total is not None:
            assert self.noise.total is not None
            return self._observed(total, self.noise.total, sum(self.sizes), self._views(released, [0])[0])
        own, views = released.own, self._views(released, range(len(self.sizes)))
        assert own is not None
        return pooled(_stacked([self._own(*each) for each in zip(own, range(len(own)), views, strict=True)]))

    def statistics(self, released: Released, clients: Sequence[int]) -> ClassStatistics:
        """Return the estimates of some clients.

        Args:
            released: what they keep of the release.
            clients: [K], their numbers.
        """
        views, everybody = self._views(released, clients), released.pooled
        shared = None if everybody is None else shrunk(everybody, self._prior(views[0], everybody))
        parts = []
        for place, (client, view) in enumerate(zip(clients, views, strict=True)):
            seen = everybody if released.own is None else self._own(released.own[place], client, view)
            assert seen is not None
            if released.own is None:
                assert shared is not None
                means = shared
            elif everybody is None or shared is None:
                means = shrunk(seen, self._prior(view, seen))
            elif self.only_averaged:
                means = shrunk(seen, self._prior(view, everybody), everybody.holders.clamp(min=1))
            else:
                means = personal(seen, shared)
            spread = within(*((everybody, shared) if everybody and shared else (seen, means)), self._squares(view))
            parts.append((seen, means, spread))
        spreads = torch.tensor([spread for _, _, spread in parts]).to(self.text)
        most = self._principal(released.scatter, everybody, shared, views[0], float(spreads.mean()))
        added = 0.0 if most is None else float(most.pow(2).sum()) / self._rank
        return ClassStatistics(
            torch.stack([seen.examples for seen, _, _ in parts]),
            torch.stack([seen.count_variance.mean().sqrt() for seen, _, _ in parts]),
            torch.stack([seen.probability for seen, _, _ in parts]),
            torch.stack([self._back(means.means, view) for (_, means, _), view in zip(parts, views, strict=True)]),
            torch.stack([means.variance for _, means, _ in parts]),
            spreads - added,
            None if shared is None else self._back(shared.means, views[0]),
            most if most is None or self.directions is None else most @ self.directions.T,
            None if everybody is None else everybody.examples,
        )

    @property
    def _rank(self) -> int:
        return self.text.shape[1] if self.directions is None else self.directions.shape[1]

    def _views(self, released: Released, clients: Sequence[int]) -> list[Viewpoint]:
        """Return from where clients see features; where their centers differ, they are compared from the mean."""
        if (centers := self.centers(released, clients)) is None:
            nothing = torch.zeros(self.text.shape[1]).to(self.text)
            return [Viewpoint(nothing, nothing, nothing[0])] * len(clients)
        points, trust = (part.to(self.text) for part in centers)
        if not self.everybody:
            return [Viewpoint(own, own, its) for own, its in zip(points, trust, strict=True)]
        joint, common = points[0], trust[0]
        if released.own_center is not None:
            weights = torch.tensor([self.sizes[client] for client in clients]).to(self.text)
            weights = weights / weights.sum().clamp(min=1e-12)
            joint, common = weights @ points, weights @ trust
        return [Viewpoint(own, joint, common) for own in points]

    @staticmethod
    def _squares(view: Viewpoint) -> Tensor:
        """Return the mean squared norm of features of unit norm that are seen from their mean."""
        return 1 - view.joint.pow(2).sum()

    def _prior(self, view: Viewpoint, seen: Observed) -> Tensor:
        """Return the text features [C, r] as seen from their mean, as far as the center is that of the images."""
        weights = seen.examples / seen.examples.sum().clamp(min=1e-12)
        prior = self.text - view.trust * (weights.to(self.text) @ self.text)
        return prior if self.directions is None else prior @ self.directions

    def _own(self, matrix: Tensor, client: int, view: Viewpoint) -> Observed:
        assert self.noise.own is not None
        return self._observed(matrix, self.noise.own, self.sizes[client], view)

    def _observed(self, matrix: Tensor, deviation: float, size: float, view: Viewpoint) -> Observed:
        """Return what a matrix tells, with sums of features as seen from the joint center.

        What was released is u = (z - m) / |z - m|. As |z| = 1, the mean of |z - m|^2 is 1 - |m|^2.
        """
        counts_scale, sums_scale = self.rate * self.share**0.5, self.rate * (1 - self.share) ** 0.5
        sums_scale = sums_scale / float((1 - view.own.pow(2).sum()).sqrt())
        constant = torch.ones_like(matrix[:, 0])
        seen = observed(
            matrix[:, 1:] / sums_scale,
            matrix[:, 0] / counts_scale,
            (deviation / sums_scale) ** 2 * constant,
            (deviation / counts_scale) ** 2 * constant,
            size,
        )
        moved = (view.own - view.joint).to(seen.sums)
        if self.directions is not None:
            moved = moved @ self.directions.to(moved)
        return replace(seen, sums=seen.sums + seen.expected[:, None] * moved)

    def _principal(
        self,
        scatter: Tensor | None,
        everybody: Observed | None,
        shared: ClassMeans | None,
        view: Viewpoint,
        width: float,
    ) -> Tensor | None:
        """Return the principal directions within classes [q, r], from the scatter of all clients' features."""
        if scatter is None or everybody is None or shared is None:
            return None
        assert self.noise.scatter is not None
        squares, total = float(self._squares(view)), unpacked(scatter.double())
        examples = max(1.0, float(total.trace()))  # each u has unit norm
        weights = everybody.examples.double() / everybody.examples.double().sum().clamp(min=1e-12)
        means = shared.means.double()
        noise = squares * self.noise.scatter * math.sqrt(self.noises / 2) / examples
        noise = math.hypot(noise, width / math.sqrt(examples))  # of a finite number of examples
        most = principal(squares * total / examples, noise, means.mT @ (weights[:, None] * means), width)
        return most.to(self.text)

    def _back(self, means: Tensor, view: Viewpoint) -> Tensor:
        """Return means [..., r] as features [..., D]; what was projected away is taken from the text features."""
        if self.directions is None:
            return means + view.joint
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
        if statistics.principal is not None:
            along = torch.from_numpy(generator.standard_normal((len(chosen), len(statistics.principal))))
            examples = examples + along.to(deviation) @ statistics.principal.to(deviation)
        features.append(F.normalize(examples, dim=-1))
        labels.append(chosen)
        sizes.append(len(chosen))
    return torch.cat(features), torch.cat(labels), sizes


def _stacked(parts: Sequence[Observed]) -> Observed:
    return Observed(*(torch.stack([getattr(part, entry.name) for part in parts]) for entry in fields(Observed)))
