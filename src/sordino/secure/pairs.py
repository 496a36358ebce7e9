"""Clustering with an adaptive number of clusters, from the distances between all clients.

If a few clients lie in many dimensions, their distances are mostly noise. A search from single
clients, as in `adaptive`, then ends in one of many poor local optima. This search reveals more: it
opens the squared distances between all pairs of clients, which give all points up to a rotation and
a shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from sordino.secure.clustering import Clusters, lloyd, numbered
from sordino.secure.distances import Distances, Exchange, Floats, Integers, Set, real_distances, to_one_scale
from sordino.secure.errors import SecureError

if TYPE_CHECKING:
    from scipy.cluster.hierarchy import ClusterNode

DRAWS = 200  # of noise, for the distribution of silhouettes under chance
MOST_CUTS = 8  # the most clusters in cuts of a branch whose silhouettes are compared
MOST_DIMENSIONS = 1024  # noise in more dimensions splits no differently
FAMILY = 3  # average size of the small clusters within which noise is measured


@dataclass(frozen=True)
class Pairs:
    """Settings of the choice of the number of clusters.

    Attributes:
        smallest: fewest clients of a cluster.
        significance: in (0, 1), the probability that noise alone is as structured as a cluster that
            is split.
        count: the number of clusters, if it is known; None lets the test choose.
    """

    smallest: int = 2
    significance: float = 0.05
    count: int | None = None


def by_pairs(distances: Distances, how: Pairs, iterations: int) -> Exchange[Clusters]:
    """Run k-means from Ward's hierarchy, cut at splits that are more than noise.

    1. Open the distances between all clients.
    2. Build Ward's hierarchy (1963), which at every step merges the two clusters whose union
       spreads the least.
    3. From the top, keep a split whose silhouette is above that of noise. The silhouette
       (Rousseeuw, 1987) is that of the split, or the best one over cuts of its branch into more
       clusters. The first detects a weak split in many dimensions, the second detects clusters that
       do not form two groups. The noise is Gaussian, of as many clients in as many effective
       dimensions, under the same hierarchy. The silhouette must be above it in all but
       `significance` of `DRAWS` draws. The idea is that of SigClust (Liu, Hayes, Nobel and Marron,
       2008).
    4. Run `lloyd` from there. With "distances" nothing more is opened, as distances to centers
       follow.

    Clusters are numbered by their lowest client.

    Raises:
        SecureError: more distances are needed than were agreed.
    """
    clients = distances.clients
    singles = [frozenset({client}) for client in clients]
    if not distances.affords(singles):
        raise SecureError(
            f"distances between all of {len(clients)} clients are more than were agreed; plan for more columns"
        )
    columns = yield from distances.columns(singles)
    matrix = yield from real_distances(distances, singles)
    if not distances.comparable:
        matrix = to_one_scale(matrix)
    sets = _cut(np.sqrt(matrix), how)
    oracle = _Derived(clients, columns) if distances.comparable else distances
    starts = [frozenset(clients[row] for row in rows) for rows in sets]
    return numbered((yield from lloyd(oracle, starts, iterations)))


def _cut(matrix: Floats, how: Pairs) -> list[list[int]]:
    """Cut distances [N, N] into clusters, and return the rows of each."""
    from scipy.cluster.hierarchy import fcluster, to_tree, ward  # slow to import
    from scipy.spatial.distance import squareform

    if len(matrix) < 2:
        return [[*range(len(matrix))]]
    tree = ward(squareform(matrix, checks=False))
    if how.count:
        labels = fcluster(tree, how.count, "maxclust")
        return [np.flatnonzero(labels == number).tolist() for number in np.unique(labels)]
    dimensions = effective_dimensions(
        matrix,
        fcluster(tree, max(1, len(matrix) // FAMILY), "maxclust"),
    )

    def parts(node: ClusterNode) -> list[list[int]]:
        rows = node.pre_order()
        halves = [] if node.is_leaf() else [node.left, node.right]
        if not halves or min(half.get_count() for half in halves) < how.smallest:
            return [rows]
        branch = matrix[np.ix_(rows, rows)]
        noise = chance(len(rows), dimensions, how.smallest, how.significance)
        fits = structure(branch, how.smallest)
        if not any(fit > bar for fit, bar in zip(fits, noise, strict=True)):
            return [rows]
        return [part for half in halves for part in parts(half)]

    return parts(to_tree(tree))


def structure(matrix: Floats, smallest: int) -> tuple[float, float]:
    """Compute silhouettes of Ward's hierarchy of points with these distances [n, n], for two and for some clusters.

    Returns:
        The silhouette of the cut into two, 0 if one has fewer than `smallest`; and the best one of
        cuts into up to `MOST_CUTS`.
    """
    from scipy.cluster.hierarchy import fcluster, ward
    from scipy.spatial.distance import squareform

    tree = ward(squareform(matrix, checks=False))
    cuts = range(2, max(2, min(MOST_CUTS, len(matrix) // 2)) + 1)
    labels = [fcluster(tree, count, "maxclust") for count in cuts]
    fits = [silhouette_of(matrix, cut) for cut in labels]
    halves_are_large = np.bincount(labels[0])[1:].min() >= smallest
    return fits[0] if halves_are_large else 0.0, max(fits)


def silhouette_of(matrix: Floats, labels: NDArray[np.int32]) -> float:
    """Compute the mean silhouette (Rousseeuw, 1987), from -1 to 1. A client alone and a single cluster count 0.

    Args:
        matrix: [n, n] distances.
        labels: [n], from 1.
    """
    members = labels[:, None] == np.arange(1, labels.max() + 1)  # [n, clusters]
    sizes = members.sum(0)
    if len(sizes) < 2:
        return 0.0
    own_sizes = sizes[labels - 1]
    totals = matrix @ members
    near = totals[members] / np.maximum(own_sizes - 1, 1)
    away = np.where(members, np.inf, totals / sizes).min(1)
    fit = (away - near) / np.maximum(np.maximum(away, near), np.finfo(float).tiny)
    return float(np.where(own_sizes > 1, fit, 0.0).mean())


def effective_dimensions(matrix: Floats, labels: Sequence[int]) -> int:
    """Estimate the number of dimensions of an isotropic scatter that equals that of the clients of a cluster.

    The estimate is the squared sum of the scatter's eigenvalues over the sum of their squares. Few
    clients span few dimensions; the estimate is corrected for that. It is rounded to a quarter of a
    doubling, as more precision is noise.

    Args:
        matrix: [N, N] distances.
        labels: [N], each client's cluster.
    """
    count, marks = len(matrix), np.unique(labels)
    within = np.eye(count)
    for mark in marks:
        rows = np.flatnonzero(np.asarray(labels) == mark)
        within[np.ix_(rows, rows)] -= 1 / len(rows)
    values = np.linalg.eigvalsh(-within @ matrix**2 @ within / 2).clip(min=0)
    rank = count - len(marks)
    if rank < 2 or values.sum() == 0:
        return MOST_DIMENSIONS
    inverse = (values**2).sum() / values.sum() ** 2 - 1 / rank
    dimensions = min(MOST_DIMENSIONS, 1 / max(inverse, 1 / MOST_DIMENSIONS))
    return max(1, round(2 ** (round(4 * math.log2(dimensions)) / 4)))


@lru_cache(maxsize=256)
def chance(count: int, dimensions: int, smallest: int, significance: float) -> tuple[float, float]:
    """Compute the `structure` that noise reaches in `significance` of the cases.

    Args:
        count: number of clients, whose points are standard normal.
        dimensions: number of dimensions of the points.
        smallest: see `structure`.
        significance: in (0, 1).
    """
    from scipy.spatial.distance import pdist, squareform

    generator = np.random.default_rng([count, dimensions])
    normals = (generator.standard_normal((count, dimensions)) for _ in range(DRAWS))
    draws = [structure(squareform(pdist(points)), smallest) for points in normals]
    two, some = np.quantile(draws, 1 - significance, axis=0).tolist()
    return two, some


@dataclass(frozen=True)
class _Derived:
    """An oracle that derives distances to any center from those between all clients, exactly.

    || s x_i - sum over S of x_l ||^2 = s sum over S of D_il - sum over pairs in S of D_ll', with s = |S|.

    Attributes:
        clients: the clients of the rows.
        between: [N, N] integers, squared distances between clients.
    """

    clients: tuple[int, ...]
    between: Integers
    comparable: ClassVar[bool] = True

    def affords(self, sets: Sequence[Set]) -> bool:
        """Return true always."""
        return True

    def columns(self, sets: Sequence[Set]) -> Exchange[Integers]:
        """Compute the columns; see `distances.Distances`."""
        columns = np.empty((len(self.clients), len(sets)), object)
        for number, members in enumerate(sets):
            inside = [self.clients.index(client) for client in members]
            within = int(self.between[np.ix_(inside, inside)].sum()) // 2
            columns[:, number] = len(members) * self.between[:, inside].sum(1) - within
        return columns
        yield {}
