"""Estimates of canaries in noised sums: generalized least squares, the noise's covariance estimated from the sums.

Each call of each client gives a released sum R = sum_i b_i g_i + sum_j c_j h_j + noise. The inclusion bits b_i, the
lengths c_j and the noise are unknown; the rest is known. The h_j are directions in which the rest of the sum lies.
Honest noise is independent in every entry. Dependent noise is the same in every step, or for every class, token or
client, because a key was not split. It cancels in differences of entries, steps or clients, and generalized least
squares uses such differences, once the covariance shows them:

1. Fit bits and lengths by least squares. The residual is mostly noise.
2. Estimate the noise's covariance from the residual, as a product of one matrix over calls and one for each short axis
   of each parameter. Shrink each to the identity: by more, the fewer samples it has.
3. Whiten sums and gradients by it, and repeat from 1, `FITS` times. Then estimate the covariance over clients.
4. Project out the directions h_j of every call. Their lengths stay open, so that scores do not depend on a mechanism's
   scaling of its releases, as long as it keeps directions.
5. Solve for the bits with a ridge, of the size at which the whitened sums are the most likely. Inner products alone
   would be scores as well, but canaries that train on the same client then hide each other.

No step sees an inclusion bit, so a bound from these scores holds whatever the estimated covariance is. If there is no
noise, or more to keep than `NUMBERS`, plain least squares with a ridge of `RIDGE` times the mean square is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

RIDGE = 0.1  # of the mean square of canaries' gradients: less lets noise through, more lets them hide each other
NUMBERS = 1 << 25  # kept for the second fit, in float64: a quarter of a gigabyte, and twice that during the fit
FITS = 4  # of bits and covariance in turn: under large noise the first fit's residual is far from noise alone
LONGEST = 64  # axis of a parameter along which the noise's covariance is estimated
SAMPLES = 30  # for each entry of such an axis, at least
NOISELESS = 1e-10  # share of the sums' squares that counts as rounding
STRENGTHS = torch.logspace(-6, 9, 61, dtype=torch.float64)  # of bits beside noise; the likeliest is used


@dataclass
class Seen:
    """One client's sum in one call, in float64 on the CPU; parameter names to tensors.

    Attributes:
        client: its number.
        call: the number of this gradient in the training.
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
    """One client's sums in all calls, and their regressors.

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
        """Return the system of one client, in the order of calls."""
        canaries = len(next(iter(seen[0].own.values())))
        ends = list(accumulate([_directions(one) for one in seen], initial=canaries))
        calls, regressors, released = {}, {}, {}
        for name in dict.fromkeys(name for one in seen for name in one.own):
            present = [(place, one) for place, one in enumerate(seen) if name in one.own]
            calls[name] = [one.call for _, one in present]
            released[name] = torch.stack([one.released[name] for _, one in present])
            table = torch.zeros(ends[-1], *released[name].shape, dtype=torch.float64)
            for column, (place, one) in enumerate(present):
                table[:canaries, column] = one.own[name]
                table[ends[place] : ends[place + 1], column] = one.others[name]
            regressors[name] = table
        return cls(canaries, calls, regressors, released)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return regressors [n + d calls, D] and sums [D], of all parameters."""
        return (
            torch.cat([table.flatten(1) for table in self.regressors.values()], 1),
            torch.cat([sums.flatten() for sums in self.released.values()]),
        )

    def equations(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normal equations of all unknowns, and a mask of the inclusion bits among these."""
        table, sums = self.flat()
        return table @ table.T, table @ sums, torch.arange(len(table)) < self.canaries

    def fitted(self) -> Tensor:
        """Return all unknowns, by least squares."""
        gram, along, _ = self.equations()
        values: Tensor = _inverse(gram) @ along
        return values

    def left_over(self, fitted: Tensor) -> dict[str, Tensor]:
        """Return the residual [T, ...] of the sums at these values of the unknowns."""
        return {name: sums - torch.tensordot(fitted, self.regressors[name], 1) for name, sums in self.released.items()}


class Decoder:
    """Collects sums as they are released, and estimates the inclusion bits from them.

    Args:
        by_clients: true if clients' noises are separate. If these are alike, one then tells of another.
    """

    def __init__(self, by_clients: bool) -> None:
        self._by_clients = by_clients
        self._plain: dict[int, tuple[Tensor, Tensor]] = {}  # client to normal equations, [n, n] and [n]
        self._squares = 0.0
        self._kept: dict[int, list[Seen]] | None = {}

    def add(self, seen: Seen) -> None:
        """Add one client's sum of one call; calls come in order."""
        system = System.of([seen])
        gram, along = _without_others(*system.equations())
        before = self._plain.get(seen.client, (torch.zeros_like(gram), torch.zeros_like(along)))
        self._plain[seen.client] = before[0] + gram, before[1] + along
        self._squares += sum(float(sums.square().sum()) for sums in seen.released.values())
        if self._kept is not None:
            self._kept.setdefault(seen.client, []).append(seen)
            if sum(map(_numbers, self._kept.values())) > NUMBERS:
                self._kept = None

    def estimates(self) -> dict[int, Tensor]:
        """Return each client's scores [n] of its canaries: without noise about 1 if included, 0 if not."""
        if self._kept is not None:
            clients, systems = list(self._kept), [System.of(seen) for seen in self._kept.values()]
            residuals = [system.left_over(system.fitted()) for system in systems]
            squares = sum(float(part.square().sum()) for residual in residuals for part in residual.values())
            if squares > NOISELESS * self._squares:
                return dict(zip(clients, _decorrelated(systems, self._by_clients), strict=True))
        return {client: _ridge(*equations) for client, equations in self._plain.items()}


def _directions(seen: Seen) -> int:
    """Return the number of directions in which the rest of a sum lies."""
    return len(next(iter(seen.others.values())))


def _numbers(seen: Sequence[Seen]) -> int:
    """Return the number of values in the system of one client."""
    unknowns = len(next(iter(seen[0].own.values()))) + sum(_directions(one) for one in seen)
    return unknowns * sum(value.numel() for one in seen for value in one.released.values())


def _ridge(gram: Tensor, along: Tensor) -> Tensor:
    ridge = RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    bits: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), along)
    return bits


def _decorrelated(systems: Sequence[System], by_clients: bool) -> list[Tensor]:
    """Return the inclusion bits of every client by generalized least squares."""
    noise = Covariance.unknown(systems)
    for _ in range(FITS):
        residuals = [system.left_over(noise.whitened(system).fitted()) for system in systems]
        noise = noise.refined(systems, residuals)
    white = [noise.whitened(system) for system in systems]
    precision = torch.eye(len(systems), dtype=torch.float64)
    if by_clients and all(system.calls == systems[0].calls for system in systems):
        precision = _precision([system.left_over(system.fitted()) for system in white])
    gram, along = _without_others(*_joint(white, precision))
    return list(_likeliest(gram, along).split([system.canaries for system in systems]))


@dataclass
class Covariance:
    """The covariance of noise, except over clients: a product of matrices of mean variance 1, and a scale.

    Attributes:
        scales: parameter name to its standard deviation.
        calls: [T, T] over all calls.
        axes: parameter name to [d, d] over each of its axes; None for an axis that is too long to estimate.
    """

    scales: dict[str, Tensor]
    calls: Tensor
    axes: dict[str, list[Tensor | None]]

    @classmethod
    def unknown(cls, systems: Sequence[System]) -> Covariance:
        """Return the covariance of noise that is independent everywhere."""
        last = max(call for system in systems for calls in system.calls.values() for call in calls)
        axes: dict[str, list[Tensor | None]] = {}
        for name in _names(systems):
            sums = [system.released[name] for system in systems if name in system.released]
            numbers, shape = sum(part.numel() for part in sums), sums[0].shape[1:]
            axes[name] = [
                _identity(length) if 1 < length <= LONGEST and numbers >= SAMPLES * length**2 else None
                for length in shape
            ]
        return cls({name: torch.ones(()).double() for name in axes}, _identity(last + 1), axes)

    def refined(self, systems: Sequence[System], residuals: Sequence[dict[str, Tensor]]) -> Covariance:
        """Estimate the covariance of residuals, one factor after the other, each with the other factors removed."""
        scales = {}
        for name in self.axes:
            pooled = torch.cat([residual[name].flatten() for residual in residuals if name in residual])
            scales[name] = pooled.square().mean().sqrt().clamp(min=math.ulp(0.0) ** 0.5)
        estimate = Covariance(scales, self.calls, {name: list(axes) for name, axes in self.axes.items()})
        estimate.calls = estimate._over_calls(systems, residuals)
        for name, axes in estimate.axes.items():
            for axis, known in enumerate(axes):
                if known is not None:
                    axes[axis] = estimate._over_axis(name, axis, systems, residuals)
        return estimate

    def whitened(self, system: System) -> System:
        """Return a client's system, transformed so that its noise is independent and of variance 1."""
        regressors, released = {}, {}
        for name, numbers in system.calls.items():
            whole = torch.cat([system.regressors[name], system.released[name][None]])
            white = self._white(name, whole, self.calls[numbers][:, numbers], self.axes[name])
            regressors[name], released[name] = white[:-1], white[-1]
        return System(system.canaries, system.calls, regressors, released)

    def _over_calls(self, systems: Sequence[System], residuals: Sequence[dict[str, Tensor]]) -> Tensor:
        """Estimate the factor over calls, from the clients and parameters that two calls have in common."""
        total, samples = torch.zeros_like(self.calls), torch.zeros_like(self.calls)
        for system, residual in zip(systems, residuals, strict=True):
            for name, numbers in system.calls.items():
                flat = self._white(name, residual[name][None], None, self.axes[name])[0].flatten(1)
                calls = torch.tensor(numbers)
                total[calls[:, None], calls] += flat @ flat.T
                samples[calls[:, None], calls] += flat.shape[1]
        diagonal = samples.diagonal()
        unseen = torch.diag((diagonal == 0).double())
        return _regular(total / samples.clamp(min=1) + unseen, float(diagonal[diagonal > 0].mean()))

    def _over_axis(
        self, name: str, axis: int, systems: Sequence[System], residuals: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        """Estimate the factor over one axis of a parameter."""
        others = [None if place == axis else factor for place, factor in enumerate(self.axes[name])]
        unfolded = []
        for system, residual in zip(systems, residuals, strict=True):
            if name in residual:
                numbers = system.calls[name]
                white = self._white(name, residual[name][None], self.calls[numbers][:, numbers], others)[0]
                unfolded.append(white.movedim(axis + 1, 0).flatten(1))
        pooled = torch.cat(unfolded, 1)
        samples = pooled.shape[1]
        return _regular(pooled @ pooled.T / samples, samples)

    def _white(self, name: str, values: Tensor, calls: Tensor | None, axes: Sequence[Tensor | None]) -> Tensor:
        """Return values [n, T, ...] multiplied by the inverse roots of the given factors."""
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


def _precision(residuals: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return the inverse covariance [K, K] over clients of the residuals after whitening."""
    flat = torch.stack([torch.cat([part.flatten() for part in residual.values()]) for residual in residuals])
    precision: Tensor = torch.linalg.inv(_regular(flat @ flat.T / flat.shape[1], flat.shape[1]))
    return precision


def _joint(systems: Sequence[System], precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all clients' normal equations: matrix, right side, and a mask of the inclusion bits among the unknowns."""
    flat = [system.flat() for system in systems]
    ends = torch.tensor([len(table) for table, _ in flat]).cumsum(0).tolist()
    places = [slice(end - len(table), end) for end, (table, _) in zip(ends, flat, strict=True)]
    gram, along = torch.zeros(ends[-1], ends[-1]).double(), torch.zeros(ends[-1]).double()
    for one, (rows, (table, _)) in enumerate(zip(places, flat, strict=True)):
        for other, (columns, (second, sums)) in enumerate(zip(places, flat, strict=True)):
            if weight := float(precision[one, other]):
                gram[rows, columns] = weight * table @ second.T
                along[rows] += weight * table @ sums
    bits = [torch.arange(len(table)) < system.canaries for system, (table, _) in zip(systems, flat, strict=True)]
    return gram, along, torch.cat(bits)


def _without_others(gram: Tensor, along: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normal equations of the inclusion bits alone, with every other unknown left open."""
    other = ~bits
    between = gram[bits][:, other] @ _inverse(gram[other][:, other])
    return gram[bits][:, bits] - between @ gram[other][:, bits], along[bits] - between @ along[other]


def _likeliest(gram: Tensor, along: Tensor) -> Tensor:
    """Return inclusion bits [m], with the ridge under which the whitened sums are the likeliest.

    Were the bits normal with variance v, a sum along an eigenvector of `gram` with eigenvalue w, divided by sqrt(w),
    would be normal with variance v w + 1. The ridge is 1 / v.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-9 * values.clamp(min=0).max()
    values, vectors = values[kept], vectors[:, kept]
    if not len(values):
        return torch.zeros_like(along)
    parts = vectors.T @ along
    variances = STRENGTHS[:, None] / values.mean() * values + 1
    likelihoods = -(variances.log() + parts.square() / values / variances).sum(1)
    ridge = values.mean() / STRENGTHS[likelihoods.argmax()]
    bits: Tensor = vectors @ (parts / (values + ridge))
    return bits


def _regular(covariance: Tensor, samples: float) -> Tensor:
    """Return a covariance [d, d] with mean variance 1, shrunk to the identity: by more, the fewer samples there are."""
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
    """Return the pseudo-inverse of a positive semidefinite matrix."""
    return torch.linalg.pinv(matrix, rtol=1e-12, hermitian=True) if len(matrix) else matrix
