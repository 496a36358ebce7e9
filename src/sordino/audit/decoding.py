"""Which canaries are in noised sums: generalized least squares, with the noise's covariance estimated from the sums.

Each call of each client gives a released sum R = sum_i b_i g_i + sum_j c_j h_j + noise, of which all but the coins
b_i, the lengths c_j and the noise are known; h_j are directions in which the rest of the sum lies. Honest noise is
independent in every entry. Noise that is not (the same in every step, for every class, token or client, because a key
was not split) cancels in differences of entries, steps or clients, and differences are what generalized least squares
looks at, once the covariance says so:

1. Fit coins and lengths by least squares; what is left over is mostly noise.
2. Estimate the noise's covariance from that, as a product of one matrix over calls and one for each short axis of each
   parameter. Shrink each to the identity by as much as it has too few samples.
3. Whiten sums and gradients by it, and repeat from 1, `FITS` times; then estimate the covariance over clients.
4. Project out the directions h_j of every call. Their lengths are left open, so that scores do not depend on how a
   mechanism scales what it releases, as long as it keeps to directions.
5. Solve for the coins with a ridge, of the size at which the whitened sums are the most likely. Inner products alone
   would be scores as well, but canaries that train on the same client then hide each other.

No step sees a coin, so that a bound from these scores holds whatever the covariance came to. Where there is no noise,
or there is more to keep than `NUMBERS`, plain least squares with a ridge of `RIDGE` times the mean square stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

RIDGE = 0.1  # of the mean square of canaries' gradients: less lets noise through, more lets them hide each other
NUMBERS = 1 << 25  # kept for the second fit, in float64: a quarter of a gigabyte, and twice that while it is fitted
FITS = 4  # of coins and covariance in turn: large noise leaves the first fit's remainder far from noise alone
LONGEST = 64  # axis of a parameter along which noise is looked at
SAMPLES = 30  # for each entry of such an axis, at least
NOISELESS = 1e-10  # share of the sums' squares that counts as rounding
STRENGTHS = torch.logspace(-6, 9, 61, dtype=torch.float64)  # of coins beside noise, among which the likeliest is taken


@dataclass
class Seen:
    """One client's sum in one call, in float64 on the CPU; parameter names to tensors.

    Attributes:
        client: its number.
        call: which gradient of the training this is.
        own: its n canaries' gradients [n, ...], clipped, and weighed by the sampling rate.
        others: [d, ...], directions in which the rest of the sum lies, each of a length of its own.
        released: the noised sum [...].
    """

    client: int
    call: int
    own: dict[str, Tensor]
    others: dict[str, Tensor]
    released: dict[str, Tensor]


@dataclass
class System:
    """One client's sums in all calls, and what they are sums of.

    Attributes:
        canaries: n.
        calls: parameter name to the T calls that have it.
        regressors: parameter name to [n + d calls, T, ...]: canaries first, then the directions of each call.
        released: parameter name to [T, ...].
    """

    canaries: int
    calls: dict[str, list[int]]
    regressors: dict[str, Tensor]
    released: dict[str, Tensor]

    @classmethod
    def of(cls, seen: Sequence[Seen]) -> System:
        """The system of one client, in the order of calls."""
        canaries = len(next(iter(seen[0].own.values())))
        ends = list(accumulate([len(next(iter(each.others.values()))) for each in seen], initial=canaries))
        calls, regressors, released = {}, {}, {}
        for name in dict.fromkeys(name for each in seen for name in each.own):
            there = [(place, each) for place, each in enumerate(seen) if name in each.own]
            calls[name] = [each.call for _, each in there]
            released[name] = torch.stack([each.released[name] for _, each in there])
            table = torch.zeros(ends[-1], *released[name].shape, dtype=torch.float64)
            for column, (place, each) in enumerate(there):
                table[:canaries, column] = each.own[name]
                table[ends[place] : ends[place + 1], column] = each.others[name]
            regressors[name] = table
        return cls(canaries, calls, regressors, released)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Regressors [n + d calls, D] and sums [D], of all parameters."""
        return (
            torch.cat([each.flatten(1) for each in self.regressors.values()], 1),
            torch.cat([each.flatten() for each in self.released.values()]),
        )

    def equations(self) -> tuple[Tensor, Tensor, Tensor]:
        """The normal equations of all unknowns, and which of these are coins."""
        table, sums = self.flat()
        return table @ table.T, table @ sums, torch.arange(len(table)) < self.canaries

    def fitted(self) -> Tensor:
        """All unknowns, by least squares."""
        gram, along, _ = self.equations()
        values: Tensor = _inverse(gram) @ along
        return values

    def left_over(self, fitted: Tensor) -> dict[str, Tensor]:
        """The sums without what these values of the unknowns explain, [T, ...]."""
        return {name: self.released[name] - torch.tensordot(fitted, self.regressors[name], 1) for name in self.released}


class Decoder:
    """Collects sums as they are released, and estimates the coins from them.

    Args:
        by_clients: whether clients' noises are separate, so that one may tell of another's where they are alike.
    """

    def __init__(self, by_clients: bool) -> None:
        self._by_clients = by_clients
        self._plain: dict[int, tuple[Tensor, Tensor]] = {}  # client to normal equations, [n, n] and [n]
        self._squares = 0.0
        self._kept: dict[int, list[Seen]] | None = {}

    def add(self, seen: Seen) -> None:
        """Take in one client's sum of one call; calls come in order."""
        system = System.of([seen])
        gram, along = _without_others(*system.equations())
        before = self._plain.get(seen.client, (torch.zeros_like(gram), torch.zeros_like(along)))
        self._plain[seen.client] = before[0] + gram, before[1] + along
        self._squares += sum(float(each.square().sum()) for each in seen.released.values())
        if self._kept is not None:
            self._kept.setdefault(seen.client, []).append(seen)
            if sum(map(_numbers, self._kept.values())) > NUMBERS:
                self._kept = None

    def estimates(self) -> dict[int, Tensor]:
        """Client to its canaries' scores [n]: without noise about 1 for what was in and 0 for what was not."""
        if self._kept is not None:
            clients, systems = list(self._kept), [System.of(each) for each in self._kept.values()]
            left = [system.left_over(system.fitted()) for system in systems]
            if sum(float(each.square().sum()) for one in left for each in one.values()) > NOISELESS * self._squares:
                return dict(zip(clients, _decorrelated(systems, self._by_clients), strict=True))
        return {client: _ridge(*equations) for client, equations in self._plain.items()}


def _numbers(seen: Sequence[Seen]) -> int:
    """What the system of one client takes."""
    directions = [len(next(iter(each.others.values()))) for each in seen]
    unknowns = len(next(iter(seen[0].own.values()))) + sum(directions)
    return unknowns * sum(value.numel() for each in seen for value in each.released.values())


def _ridge(gram: Tensor, along: Tensor) -> Tensor:
    ridge = RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    coins: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), along)
    return coins


def _decorrelated(systems: Sequence[System], by_clients: bool) -> list[Tensor]:
    """Coins of every client by generalized least squares."""
    noise = Covariance.unknown(systems)
    for _ in range(FITS):
        left = [system.left_over(noise.whitened(system).fitted()) for system in systems]
        noise = noise.refined(systems, left)
    white = [noise.whitened(system) for system in systems]
    precision = torch.eye(len(systems), dtype=torch.float64)
    if by_clients and all(system.calls == systems[0].calls for system in systems):
        precision = _precision([each.left_over(each.fitted()) for each in white])
    gram, along = _without_others(*_joint(white, precision))
    return list(_likeliest(gram, along).split([system.canaries for system in systems]))


@dataclass
class Covariance:
    """The covariance of noise, but for that over clients: a product of matrices of mean variance 1, and a scale.

    Attributes:
        scales: parameter name to its standard deviation.
        calls: [T, T] over all calls.
        axes: parameter name to [d, d] over each of its axes; None for an axis that is too long to tell.
    """

    scales: dict[str, Tensor]
    calls: Tensor
    axes: dict[str, list[Tensor | None]]

    @classmethod
    def unknown(cls, systems: Sequence[System]) -> Covariance:
        """Noise that is independent everywhere."""
        last = max(call for system in systems for calls in system.calls.values() for call in calls)
        axes: dict[str, list[Tensor | None]] = {}
        for name in _names(systems):
            together = [system.released[name] for system in systems if name in system.released]
            numbers, shape = sum(each.numel() for each in together), together[0].shape[1:]
            told = [1 < length <= LONGEST and numbers >= SAMPLES * length**2 for length in shape]
            axes[name] = [_identity(length) if tell else None for length, tell in zip(shape, told, strict=True)]
        return cls({name: torch.ones(()).double() for name in axes}, _identity(last + 1), axes)

    def refined(self, systems: Sequence[System], left: Sequence[dict[str, Tensor]]) -> Covariance:
        """The covariance of what is left over, one factor after the other, each with the others taken off."""
        scales = {}
        for name in self.axes:
            pooled = torch.cat([one[name].flatten() for one in left if name in one])
            scales[name] = pooled.square().mean().sqrt().clamp(min=math.ulp(0.0) ** 0.5)
        found = Covariance(scales, self.calls, {name: list(axes) for name, axes in self.axes.items()})
        found.calls = found._over_calls(systems, left)
        for name, axes in found.axes.items():
            for axis, known in enumerate(axes):
                if known is not None:
                    axes[axis] = found._over_axis(name, axis, systems, left)
        return found

    def whitened(self, system: System) -> System:
        """A client's system, as if noise were independent and of variance 1."""
        regressors, released = {}, {}
        for name, numbers in system.calls.items():
            whole = torch.cat([system.regressors[name], system.released[name][None]])
            white = self._white(name, whole, self.calls[numbers][:, numbers], self.axes[name])
            regressors[name], released[name] = white[:-1], white[-1]
        return System(system.canaries, system.calls, regressors, released)

    def _over_calls(self, systems: Sequence[System], left: Sequence[dict[str, Tensor]]) -> Tensor:
        """From those clients and parameters that two calls have in common."""
        total, samples = torch.zeros_like(self.calls), torch.zeros_like(self.calls)
        for system, one in zip(systems, left, strict=True):
            for name, numbers in system.calls.items():
                flat = self._white(name, one[name][None], None, self.axes[name])[0].flatten(1)
                both = torch.tensor(numbers)
                total[both[:, None], both] += flat @ flat.T
                samples[both[:, None], both] += flat.shape[1]
        diagonal = samples.diagonal()
        unseen = torch.diag((diagonal == 0).double())
        return _regular(total / samples.clamp(min=1) + unseen, float(diagonal[diagonal > 0].mean()))

    def _over_axis(self, name: str, axis: int, systems: Sequence[System], left: Sequence[dict[str, Tensor]]) -> Tensor:
        others: list[Tensor | None] = [None if at == axis else each for at, each in enumerate(self.axes[name])]
        unfolded = []
        for system, one in zip(systems, left, strict=True):
            if name in one:
                numbers = system.calls[name]
                white = self._white(name, one[name][None], self.calls[numbers][:, numbers], others)[0]
                unfolded.append(white.movedim(axis + 1, 0).flatten(1))
        together = torch.cat(unfolded, 1)
        samples = together.shape[1]
        return _regular(together @ together.T / samples, samples)

    def _white(self, name: str, values: Tensor, calls: Tensor | None, axes: Sequence[Tensor | None]) -> Tensor:
        """Values [n, T, ...] multiplied by the inverse roots of the factors that are given."""
        values = values / self.scales[name]
        for axis, covariance in enumerate([calls, *axes], 1):
            if covariance is not None:
                moved = values.movedim(axis, 0)
                root = torch.linalg.cholesky(covariance)
                solved = torch.linalg.solve_triangular(root, moved.flatten(1), upper=False)
                values = solved.view(moved.shape).movedim(0, axis)
        return values


def _names(systems: Sequence[System]) -> list[str]:
    return list(dict.fromkeys(name for system in systems for name in system.calls))


def _identity(length: int) -> Tensor:
    return torch.eye(length, dtype=torch.float64)


def _precision(left: Sequence[dict[str, Tensor]]) -> Tensor:
    """The inverse covariance [K, K] over clients of what is left over after whitening."""
    flat = torch.stack([torch.cat([each.flatten() for each in one.values()]) for one in left])
    precision: Tensor = torch.linalg.inv(_regular(flat @ flat.T / flat.shape[1], flat.shape[1]))
    return precision


def _joint(systems: Sequence[System], precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All clients' normal equations: their matrix, their right side, and which unknowns are coins."""
    flat = [system.flat() for system in systems]
    ends = torch.tensor([len(table) for table, _ in flat]).cumsum(0).tolist()
    places = [slice(end - len(table), end) for end, (table, _) in zip(ends, flat, strict=True)]
    gram, along = torch.zeros(ends[-1], ends[-1]).double(), torch.zeros(ends[-1]).double()
    for one, (here, (table, _)) in enumerate(zip(places, flat, strict=True)):
        for other, (there, (second, sums)) in enumerate(zip(places, flat, strict=True)):
            if weight := float(precision[one, other]):
                gram[here, there] = weight * table @ second.T
                along[here] += weight * table @ sums
    coins = [torch.arange(len(table)) < system.canaries for system, (table, _) in zip(systems, flat, strict=True)]
    return gram, along, torch.cat(coins)


def _without_others(gram: Tensor, along: Tensor, coins: Tensor) -> tuple[Tensor, Tensor]:
    """Normal equations of the coins alone, with every other unknown left open."""
    other = ~coins
    between = gram[coins][:, other] @ _inverse(gram[other][:, other])
    return gram[coins][:, coins] - between @ gram[other][:, coins], along[coins] - between @ along[other]


def _likeliest(gram: Tensor, along: Tensor) -> Tensor:
    """Coins [m], with the ridge under which the whitened sums are the likeliest.

    Were the coins normal with variance v, a sum along an eigenvector of `gram` with eigenvalue w, divided by sqrt(w),
    would be normal with variance v w + 1. The ridge is 1 / v.
    """
    values, vectors = torch.linalg.eigh(gram)
    there = values > 1e-9 * values.clamp(min=0).max()
    values, vectors = values[there], vectors[:, there]
    if not len(values):
        return torch.zeros_like(along)
    parts = vectors.T @ along
    variances = STRENGTHS[:, None] / values.mean() * values + 1
    likelihoods = -(variances.log() + parts.square() / values / variances).sum(1)
    ridge = values.mean() / STRENGTHS[likelihoods.argmax()]
    coins: Tensor = vectors @ (parts / (values + ridge))
    return coins


def _regular(covariance: Tensor, samples: float) -> Tensor:
    """A covariance [d, d] with a mean variance of 1, shrunk to the identity: by more, the fewer samples there are."""
    length = len(covariance)
    mean = covariance.diagonal().mean()
    if not mean > 0:
        return torch.eye(length).to(covariance)
    shrinkage = max(1e-6, (length / (length + samples)) ** 2)
    values, vectors = torch.linalg.eigh(covariance / mean)
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage
    shrunk: Tensor = (vectors * values) @ vectors.T
    return shrunk


def _inverse(matrix: Tensor) -> Tensor:
    """The pseudo-inverse of a positive semidefinite matrix."""
    return torch.linalg.pinv(matrix, rtol=1e-12, hermitian=True) if len(matrix) else matrix
