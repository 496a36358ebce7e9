"""Lloyd's k-means from squared distances of clients to centers of sets alone.

The algorithm is written against an oracle that opens columns of distances. On shares it is the server of SecPC; in the
clear it is `PlainDistances`. It is a generator, because on shares every opening is an exchange of messages: it yields
what is to be sent, and is sent what came back.

A column of a set S of s clients holds s^2 times the squared distance of every client to the mean of S, an integer.
Which of two centers is nearer is decided on these integers, exactly: by D s'^2 < D' s^2.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from sordino.secure.errors import SecureError

Result = TypeVar("Result")
Exchange = Generator[dict[int, bytes], Sequence[tuple[int, bytes]], Result]
Set = frozenset[int]
NOBODY = -1  # the label of who is in no cluster
Integers = NDArray[np.object_]  # of Python's integers
Floats = NDArray[np.float64]


class Distances(Protocol):
    """Where distances come from.

    Attributes:
        clients: whose they are, in the order of the rows, ascending.
        comparable: whether rows of different clients are of the same scale.
    """

    @property
    def clients(self) -> tuple[int, ...]: ...

    @property
    def comparable(self) -> bool: ...

    def affords(self, sets: Sequence[Set]) -> bool:
        """Whether so many columns may still be opened."""
        ...

    def columns(self, sets: Sequence[Set]) -> Exchange[Integers]:
        """[rows, sets]: |S|^2 times the squared distance to the center of S, times the row's scale."""
        ...


@dataclass(frozen=True)
class Clusters:
    """A clustering, and how it came about.

    Attributes:
        clients: who is clustered, ascending.
        labels: the cluster number of each, [rows].
        sets: the clients of each cluster; some may be empty.
        iterations: how often all clients were assigned.
        converged: whether the last time changed nothing.
        silhouette: how well clients fit their clusters, from -1 to 1; see `silhouette`. 0 for one cluster.
        spreads: unbiased mean squared distance of each cluster's members to its center, in squared quantization steps;
            NaN for clusters of one. With "ratios", relative to the distance to the center of all.
    """

    clients: tuple[int, ...]
    labels: NDArray[np.int64]
    sets: tuple[Set, ...]
    iterations: int
    converged: bool
    silhouette: float = 0.0
    spreads: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """How many clusters have members."""
        return sum(bool(members) for members in self.sets)


def lloyd(distances: Distances, sets: Sequence[Set], iterations: int) -> Exchange[Clusters]:
    """K-means from the centers of given sets.

    1. Assign every client to the nearest center, the lowest number first where several are as near.
    2. Stop if nobody moved.
    3. Take the new clusters as sets; refound empty ones; repeat.

    The same assignments as scikit-learn's `KMeans(init=..., n_init=1, algorithm="lloyd", tol=0)`. It also stops where
    the columns that may be opened are spent.

    Args:
        distances: where they come from.
        sets: whose means are the first centers, one a cluster.
        iterations: at most so many times are new centers computed.

    Raises:
        SecureError: there are fewer columns left than sets.
    """
    if not distances.affords(sets):
        raise SecureError(
            f"the columns of distances that were agreed do not suffice for {len(sets)} clusters; plan for more"
        )
    labels = np.full(len(distances.clients), -1)
    done, converged = 0, False
    while not converged and done <= iterations and distances.affords(sets):
        matrix = yield from common_scale(distances, sets)
        nearest = matrix.argmin(1).astype(np.int64)
        converged = bool((nearest == labels).all())
        labels, done = nearest, done + 1
        sets = _members(distances.clients, labels, len(sets))
        if not converged and not all(sets):
            own = matrix[np.arange(len(labels)), labels]
            scores = own if distances.comparable else (yield from _relative(distances, own))
            sets = _refounded(sets, scores, distances.clients, labels)
    members = _members(distances.clients, labels, len(sets))
    return (yield from _described(distances, Clusters(distances.clients, labels, tuple(members), done, converged)))


def numbered(found: Clusters) -> Clusters:
    """The same without empty clusters, numbered by their lowest client."""
    order = sorted((number for number, members in enumerate(found.sets) if members), key=lambda n: min(found.sets[n]))
    labels = np.array([order.index(label) for label in found.labels], np.int64)
    sets = tuple(found.sets[number] for number in order)
    return replace(found, labels=labels, sets=sets, spreads=tuple(found.spreads[number] for number in order))


def renamed(labels: NDArray[np.int64], clients: NDArray[np.int64], found: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels [K] with those of some clients replaced by what was found, under the old clusters' numbers where possible.

    Each new cluster takes the number of the old one that it has most clients in common with, none twice; others get
    numbers that are not in use.
    """
    old = sorted({*labels.tolist()} - {NOBODY})
    new = sorted({*found.tolist()})
    common = np.array([[np.sum((found == n) & (labels[clients] == o)) for o in old] for n in new]).reshape(len(new), -1)
    names = {
        new[row]: old[column]
        for row, column in zip(*linear_sum_assignment(common, maximize=True), strict=True)
        if common[row, column]
    }
    free = (number for number in range(len(old) + len(new)) if number not in old)
    after = labels.copy()
    after[clients] = [names.setdefault(n, names[n] if n in names else next(free)) for n in found.tolist()]
    return after


def farthest_first(distances: Distances, count: int) -> Exchange[list[Set]]:
    """First centers: the client farthest from the center of all, then always the one farthest from those chosen.

    Gonzalez, Clustering to Minimize the Maximum Intercluster Distance, 1985. It opens distances between clients. With
    "ratios", where the first choice is not possible, the first client is taken.
    """
    nearest = yield from real_distances(distances, [frozenset(distances.clients)])
    chosen: list[Set] = []
    for _ in range(min(count, len(distances.clients))):
        chosen.append(frozenset({distances.clients[int(nearest.min(1).argmax())]}))
        column = yield from real_distances(distances, chosen[-1:])
        nearest = column if len(chosen) == 1 else np.concatenate([nearest, column], axis=1)
    return chosen


def silhouette(own: Floats, other: Floats, sizes: NDArray[np.int64]) -> float:
    """The mean simplified silhouette with the client's own influence on its center taken away.

    The simplified silhouette (Hruschka, Campello and de Castro, 2006) of a client is (b - a) / max(a, b), with a and
    b its distances to its own center and to the nearest other one. A client draws its own center towards itself, by a
    factor of (s - 1) / s in a cluster of s, so that noise in small clusters would look like structure; here a is the
    distance to the center of the *other* members, a s / (s - 1). Noise then gives zero or less. A client alone counts
    0, as for Rousseeuw (1987).

    Args:
        own: squared distances to the own center, [rows].
        other: squared distances to the nearest other center, [rows].
        sizes: of each client's cluster, [rows].
    """
    alone = sizes < 2
    a = np.sqrt(own) * sizes / np.where(alone, 1, sizes - 1)
    b = np.sqrt(other)
    larger = np.maximum(a, b)
    return float(np.where(alone | (larger == 0), 0.0, (b - a) / np.where(larger == 0, 1.0, larger)).mean())


class PlainDistances:
    """The oracle in the clear: of integer points, or of any numbers that are exact in float64.

    Args:
        points: [N, d] integers.
        clients: their numbers; by default from 0.
    """

    comparable = True

    def __init__(self, points: ArrayLike, clients: Sequence[int] | None = None) -> None:
        self.points = np.asarray(points, np.int64)
        self.clients = tuple(range(len(self.points)) if clients is None else clients)

    def affords(self, sets: Sequence[Set]) -> bool:
        """Always."""
        return True

    def columns(self, sets: Sequence[Set]) -> Exchange[Integers]:
        """See `Distances`."""
        found = np.empty((len(self.points), len(sets)), object)
        for number, members in enumerate(sets):
            total = self.points[[self.clients.index(client) for client in members]].sum(0)
            found[:, number] = ((len(members) * self.points - total) ** 2).sum(1).tolist()
        return found
        yield {}


def finish(exchange: Exchange[Result]) -> Result:
    """The result of an exchange that sends nothing, as those over `PlainDistances`."""
    try:
        next(exchange)
    except StopIteration as end:
        result: Result = end.value
        return result
    raise ValueError("the exchange has something to send")


def _described(distances: Distances, found: Clusters) -> Exchange[Clusters]:
    """With silhouette and spreads, if the columns that it takes are or may be opened."""
    full = [number for number, members in enumerate(found.sets) if members]
    spreads = np.full(len(found.sets), math.nan)
    wanted = [found.sets[number] for number in full]
    everybody = [] if distances.comparable else [frozenset(distances.clients)]
    if not full or not distances.affords(wanted + everybody):
        return replace(found, spreads=tuple(spreads.tolist()))
    matrix = np.full((len(found.clients), len(found.sets)), np.inf)
    matrix[:, full] = yield from real_distances(distances, wanted)
    rows, sizes = np.arange(len(found.clients)), np.array([len(members) for members in found.sets])
    own = matrix[rows, found.labels]
    for number in full:
        if sizes[number] > 1:
            spreads[number] = own[found.labels == number].sum() / (sizes[number] - 1)
    fit = 0.0
    if len(full) > 1:
        matrix[rows, found.labels] = np.inf
        fit = silhouette(own, matrix.min(1), sizes[found.labels])
    return replace(found, silhouette=fit, spreads=tuple(spreads.tolist()))


def _refounded(sets: list[Set], scores: ArrayLike, clients: Sequence[int], labels: NDArray[np.int64]) -> list[Set]:
    """Sets with empty ones refounded, as scikit-learn's `KMeans` does.

    The clients that are farthest from their centers found them, one each, and leave the cluster that they were in. A
    set that is empty even so takes the center of the largest.
    """
    empty = [number for number, members in enumerate(sets) if not members]
    order = sorted(range(len(clients)), key=lambda row: -np.asarray(scores)[row])
    if empty and np.asarray(scores)[order[0]] > 0:
        for number, row in zip(empty, order, strict=False):
            founder = frozenset({clients[row]})
            sets[int(labels[row])] -= founder
            sets[number] = founder
    largest = max(sets, key=len)
    return [members or largest for members in sets]


def _members(clients: Sequence[int], labels: NDArray[np.int64], count: int) -> list[Set]:
    rows = np.asarray(clients)
    return [frozenset(rows[labels == number].tolist()) for number in range(count)]


def to_one_scale(squared: Floats) -> Floats:
    """Squared distances [N, N] between clients, made symmetric where each row has a factor of its own.

    D_ij = D_ji, so the quotient of two factors is M_ij / M_ji: all follow from one of them, up to a common scale.
    """
    # Of two clients in one place only remainders are left: both count as close, on the scale of their rows.
    safe = np.maximum(squared, np.maximum(1e-9 * squared.mean(1, keepdims=True), np.finfo(float).tiny))
    logs = np.log(safe) - np.log(safe.T)
    np.fill_diagonal(logs, 0)
    level = squared / np.exp(logs.mean(1))[:, None]
    symmetric: Floats = (level + level.T) / 2
    np.fill_diagonal(symmetric, 0)
    return symmetric


def common_scale(distances: Distances, sets: Sequence[Set]) -> Exchange[Integers]:
    """Squared distances [rows, sets] as integers in one scale: times the least common multiple of all |S|^2."""
    squares = [len(members) ** 2 for members in sets]
    common = math.lcm(*squares)
    columns = yield from distances.columns(sets)
    scaled: Integers = columns * np.array([common // square for square in squares], object)
    return scaled


def _relative(distances: Distances, own: Integers) -> Exchange[Floats]:
    """Distances to the own center, up to one factor for all, beside those to the center of all."""
    if not distances.affords([frozenset(distances.clients)]):
        return np.zeros(len(own))
    overall = yield from distances.columns([frozenset(distances.clients)])
    return np.array([a / max(b, 1) for a, b in zip(own, overall[:, 0], strict=True)])


def real_distances(distances: Distances, sets: Sequence[Set]) -> Exchange[Floats]:
    """Squared distances [rows, sets], in squared quantization steps; with "ratios", over those to the center of all."""
    everybody = frozenset(distances.clients)
    wanted = list(sets) if distances.comparable else [*sets, everybody]
    columns = yield from distances.columns(wanted)
    real: Floats = (columns / np.array([len(members) ** 2 for members in wanted], object)).astype(np.float64)
    if not distances.comparable:
        real = real[:, :-1] / np.maximum(real[:, -1:], np.finfo(float).tiny)
    return real
