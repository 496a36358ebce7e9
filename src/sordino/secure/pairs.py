"""A number of clusters that adapts, from the distances between all clients.

Where a few clients lie in many dimensions, their distances are mostly noise, and a search that starts from single
clients, as `adaptive` does, ends in one of many poor local optima. This one reveals more: it opens the squared
distances between all pairs of clients, which give all points up to a rotation and a shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from scipy.cluster.hierarchy import ClusterNode, fcluster, to_tree, ward
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics import silhouette_score

from sordino.secure.clustering import (
    Clusters,
    Distances,
    Exchange,
    Floats,
    Integers,
    Set,
    lloyd,
    numbered,
    real_distances,
)
from sordino.secure.errors import SecureError

DRAWS = 200  # of noise, to see what chance makes of it
MOST_DIMENSIONS = 1024  # noise in more splits no differently
FAMILY = 3  # clients of the small clusters within which noise is measured


@dataclass(frozen=True)
class Pairs:
    """How the number of clusters is chosen.

    Attributes:
        smallest: fewest clients of a cluster.
        significance: how often noise alone may look as split as what is split, in the (0, 1) of a test's level.
        count: the number of clusters, where it is known; None lets the test choose.
    """

    smallest: int = 2
    significance: float = 0.05
    count: int | None = None


def by_pairs(distances: Distances, how: Pairs, iterations: int) -> Exchange[Clusters]:
    """K-means from Ward's hierarchy, cut where splits are more than noise.

    1. Open the distances between all clients.
    2. Build Ward's hierarchy of them (1963), which at every step merges the two clusters whose union spreads the least.
    3. Keep a split in it if its silhouette (Rousseeuw, 1987) is above what the same hierarchy finds in Gaussian noise
       of as many clients in as many effective dimensions, in all but `significance` of `DRAWS` draws; or if a split
       further down is kept. The idea is that of SigClust (Liu, Hayes, Nobel and Marron, 2008).
    4. Run `lloyd` from there. With "distances" nothing more is opened, as those to centres follow.

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
    matrix = (matrix + matrix.T) / 2  # with "ratios", rows are of scales of their own
    np.fill_diagonal(matrix, 0.0)
    sets = _cut(np.sqrt(matrix), how)
    oracle = _Derived(clients, columns) if distances.comparable else distances
    return numbered((yield from lloyd(oracle, [frozenset(clients[row] for row in rows) for rows in sets], iterations)))


def _cut(matrix: Floats, how: Pairs) -> list[list[int]]:
    """Rows of each cluster, from distances [N, N]."""
    if len(matrix) < 2:
        return [[*range(len(matrix))]]
    tree = ward(squareform(matrix, checks=False))
    if how.count:
        labels = fcluster(tree, how.count, "maxclust")
        return [np.flatnonzero(labels == number).tolist() for number in np.unique(labels)]
    dimensions = effective_dimensions(matrix, fcluster(tree, max(1, len(matrix) // FAMILY), "maxclust"))

    def parts(node: ClusterNode) -> list[list[int]]:
        rows = node.pre_order()
        halves = [] if node.is_leaf() else [node.left, node.right]
        if not halves or min(half.get_count() for half in halves) < how.smallest:
            return [rows]
        found = [part for half in halves for part in parts(half)]
        if len(found) > 2:
            return found
        fit = split_silhouette(matrix, *(half.pre_order() for half in halves))
        return found if fit > chance(len(rows), dimensions, how.significance) else [rows]

    return parts(to_tree(tree))


def split_silhouette(matrix: Floats, one: Sequence[int], other: Sequence[int]) -> float:
    """How well two sets of rows are apart, from -1 to 1; 0 where one has a single row.

    Args:
        matrix: [N, N] distances.
        one, other: disjoint rows.
    """
    if min(len(one), len(other)) < 2:
        return 0.0
    rows = [*one, *other]
    labels = [0] * len(one) + [1] * len(other)
    return float(silhouette_score(matrix[np.ix_(rows, rows)], labels, metric="precomputed"))


def effective_dimensions(matrix: Floats, labels: Sequence[int]) -> int:
    """In how many dimensions the clients of a cluster are scattered, as many as an isotropic scatter would need.

    The squared sum of the scatter's eigenvalues over the sum of their squares. Few clients span few dimensions, by
    which the estimate is corrected. Rounded to a quarter of a doubling, as more is noise.

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
def chance(count: int, dimensions: int, significance: float) -> float:
    """The silhouette that the upper split of Ward's hierarchy reaches in noise, in `significance` of the cases.

    Args:
        count: clients, whose points are standard normal.
        dimensions: of the points.
        significance: in (0, 1).
    """
    generator = np.random.default_rng([count, dimensions])
    found = []
    for _ in range(DRAWS):
        pairs = pdist(generator.standard_normal((count, dimensions)))
        root = to_tree(ward(pairs))
        found.append(split_silhouette(squareform(pairs), root.left.pre_order(), root.right.pre_order()))
    return float(np.quantile(found, 1 - significance))


@dataclass(frozen=True)
class _Derived:
    """Distances to any centre, from those between all clients, exactly.

    || s x_i - sum over S of x_l ||^2 = s sum over S of D_il - sum over pairs in S of D_ll', with s = |S|.

    Attributes:
        clients: whose they are.
        between: [N, N] integers, squared distances between clients.
    """

    clients: tuple[int, ...]
    between: Integers
    comparable: ClassVar[bool] = True

    def affords(self, sets: Sequence[Set]) -> bool:
        """Always."""
        return True

    def columns(self, sets: Sequence[Set]) -> Exchange[Integers]:
        """See `clustering.Distances`."""
        found = np.empty((len(self.clients), len(sets)), object)
        for number, members in enumerate(sets):
            inside = [self.clients.index(client) for client in members]
            within = int(self.between[np.ix_(inside, inside)].sum()) // 2
            found[:, number] = len(members) * self.between[:, inside].sum(1) - within
        return found
        yield {}
