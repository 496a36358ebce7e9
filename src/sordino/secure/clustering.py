"""Lloyd's k-means from squared distances of clients to centers of sets alone.

The algorithm is written against an oracle of distances (`secure.distances`), and is a generator as
that is. The nearer of two centers is determined on the oracle's integers, exactly: a client with D
to a set of s, and D' to a set of s', is nearer to the first if D s'^2 < D' s^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sordino.secure.distances import (
    Distances,
    Exchange,
    Floats,
    Integers,
    PlainDistances,
    Set,
    common_scale,
    finish,
    real_distances,
    to_one_scale,
)
from sordino.secure.errors import SecureError

__all__ = [
    "NOBODY",
    "Clusters",
    "Exchange",
    "PlainDistances",
    "farthest_first",
    "finish",
    "lloyd",
    "numbered",
    "renamed",
    "silhouette",
    "to_one_scale",
]


NOBODY = -1  # the label of clients in no cluster


@dataclass(frozen=True)
class Clusters:
    """A clustering, and the course of its computation.

    Attributes:
        clients: the clients that are clustered, ascending.
        labels: the cluster number of each, [rows].
        sets: the clients of each cluster; some may be empty.
        iterations: number of assignments of all clients.
        converged: whether the last assignment changed nothing.
        silhouette: the fit of clients to their clusters, from -1 to 1; see `silhouette`. 0 for one
            cluster.
        spreads: unbiased mean squared distance of each cluster's members to its center, in squared
            quantization steps; NaN for clusters of one. With "ratios", relative to the distance to
            the center of all.
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
        """Return the number of clusters that have members."""
        return sum(bool(members) for members in self.sets)


def lloyd(distances: Distances, sets: Sequence[Set], iterations: int) -> Exchange[Clusters]:
    """Run k-means from the centers of given sets.

    1. Assign every client to the nearest center; among equally near ones, to the lowest number.
    2. Stop if no client moved.
    3. Take the new clusters as sets, refound empty ones, and repeat.

    Assignments are those of scikit-learn's `KMeans(init=..., n_init=1, algorithm="lloyd", tol=0)`.
    The search also stops once the agreed columns are spent.

    Args:
        distances: the oracle.
        sets: the sets whose means are the first centers, one a cluster.
        iterations: the largest number of computations of new centers.

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
            to_center = matrix[np.arange(len(labels)), labels]
            scores = to_center if distances.comparable else (yield from _relative(distances, to_center))
            sets = _refounded(sets, scores, distances.clients, labels)
    members = _members(distances.clients, labels, len(sets))
    clusters = Clusters(distances.clients, labels, tuple(members), done, converged)
    return (yield from _described(distances, clusters))


def numbered(clusters: Clusters) -> Clusters:
    """Remove empty clusters, and number the others by their lowest client."""
    full = (number for number, members in enumerate(clusters.sets) if members)
    order = sorted(full, key=lambda number: min(clusters.sets[number]))
    labels = np.array([order.index(label) for label in clusters.labels], np.int64)
    sets = tuple(clusters.sets[number] for number in order)
    spreads = tuple(clusters.spreads[number] for number in order)
    return replace(clusters, labels=labels, sets=sets, spreads=spreads)


def renamed(
    labels: NDArray[np.int64],
    clients: NDArray[np.int64],
    update: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Replace the labels of some clients, and keep the old clusters' numbers where possible.

    Each new cluster takes the number of the old one with which it shares most clients, none twice.
    Others get numbers that are not in use.

    Args:
        labels: [K], the old labels of all clients.
        clients: [n], the clients with new labels.
        update: [n], their new labels.

    Returns:
        [K].
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    old = sorted({*labels.tolist()} - {NOBODY})
    new = sorted({*update.tolist()})
    shared = [[np.sum((update == n) & (labels[clients] == o)) for o in old] for n in new]
    common = np.array(shared).reshape(len(new), -1)
    names = {
        new[row]: old[column]
        for row, column in zip(*linear_sum_assignment(common, maximize=True), strict=True)
        if common[row, column]
    }
    free = (number for number in range(len(old) + len(new)) if number not in old)
    after = labels.copy()
    for n in update.tolist():
        if n not in names:
            names[n] = next(free)
    after[clients] = [names[n] for n in update.tolist()]
    return after


def farthest_first(distances: Distances, count: int) -> Exchange[list[Set]]:
    """Choose first centers: the client farthest from the center of all, then always the one farthest from those chosen.

    Gonzalez, Clustering to Minimize the Maximum Intercluster Distance, 1985. It opens distances
    between clients. With "ratios" the first choice is not possible, and the first client is taken.
    """
    nearest = yield from real_distances(distances, [frozenset(distances.clients)])
    chosen: list[Set] = []
    for _ in range(min(count, len(distances.clients))):
        chosen.append(frozenset({distances.clients[int(nearest.min(1).argmax())]}))
        column = yield from real_distances(distances, chosen[-1:])
        nearest = column if len(chosen) == 1 else np.concatenate([nearest, column], axis=1)
    return chosen


def silhouette(to_center: Floats, to_other: Floats, sizes: NDArray[np.int64]) -> float:
    """Compute the mean simplified silhouette, without each client's influence on its own center.

    The simplified silhouette (Hruschka, Campello and de Castro, 2006) of a client is (b - a) /
    max(a, b). Here a and b are its distances to its own center and to the nearest other one. In a
    cluster of s, a client draws its own center towards itself by a factor of (s - 1) / s, so that
    noise in small clusters would look like structure. Therefore a is the distance to the center of
    the *other* members, a s / (s - 1). Noise then gives zero or less. A client alone counts 0, as
    for Rousseeuw (1987).

    Args:
        to_center: squared distances to the own center, [rows].
        to_other: squared distances to the nearest other center, [rows].
        sizes: the size of each client's cluster, [rows].
    """
    alone = sizes < 2
    a = np.sqrt(to_center) * sizes / np.where(alone, 1, sizes - 1)
    b = np.sqrt(to_other)
    larger = np.maximum(a, b)
    return float(
        np.where(alone | (larger == 0), 0.0, (b - a) / np.where(larger == 0, 1.0, larger)).mean(),
    )


def _described(distances: Distances, clusters: Clusters) -> Exchange[Clusters]:
    """Add silhouette and spreads, if the columns that they need are or may be opened."""
    full = [number for number, members in enumerate(clusters.sets) if members]
    spreads = np.full(len(clusters.sets), math.nan)
    wanted = [clusters.sets[number] for number in full]
    everybody = [] if distances.comparable else [frozenset(distances.clients)]
    if not full or not distances.affords(wanted + everybody):
        return replace(clusters, spreads=tuple(spreads.tolist()))
    labels = clusters.labels
    matrix = np.full((len(clusters.clients), len(clusters.sets)), np.inf)
    matrix[:, full] = yield from real_distances(distances, wanted)
    rows = np.arange(len(clusters.clients))
    sizes = np.array([len(members) for members in clusters.sets])
    to_center = matrix[rows, labels]
    for number in full:
        if sizes[number] > 1:
            spreads[number] = to_center[labels == number].sum() / (sizes[number] - 1)
    fit = 0.0
    if len(full) > 1:
        matrix[rows, labels] = np.inf
        fit = silhouette(to_center, matrix.min(1), sizes[labels])
    return replace(clusters, silhouette=fit, spreads=tuple(spreads.tolist()))


def _refounded(
    sets: list[Set],
    scores: ArrayLike,
    clients: Sequence[int],
    labels: NDArray[np.int64],
) -> list[Set]:
    """Refound empty sets, as scikit-learn's `KMeans` does.

    Each gets one of the clients that are farthest from their centers, which leaves its old cluster.
    A set that is still empty takes the center of the largest.
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


def _relative(distances: Distances, to_center: Integers) -> Exchange[Floats]:
    """Divide distances to the own center by those to the center of all, up to one factor for all."""
    if not distances.affords([frozenset(distances.clients)]):
        return np.zeros(len(to_center))
    overall = yield from distances.columns([frozenset(distances.clients)])
    return np.array([a / max(b, 1) for a, b in zip(to_center, overall[:, 0], strict=True)])
