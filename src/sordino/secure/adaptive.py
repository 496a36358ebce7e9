"""Clustering with an adaptive number of clusters, from squared distances of clients to centers of sets alone.

The method follows Ball and Hall's ISODATA (1965): clusters split where they spread, and merge where
they are close. Everything that it needs follows from the columns that `lloyd` opens, and two more
columns a split. The squared distance between the centers of S and S' is not opened. It is the
difference of the mean squared distances of the members of S' to these two centers (Huygens and
Steiner's parallel axis theorem). With "ratios", the rows of different clients have unknown scales.
Each row is then first divided by the client's distance to the center of all clients, and spreads
and distances between centers are relative to that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sordino.secure.clustering import Clusters, lloyd, numbered
from sordino.secure.distances import Distances, Exchange, Set, common_scale, real_distances


@dataclass(frozen=True)
class Adaptive:
    """Settings of the adaptation of the number of clusters.

    Attributes:
        most: the largest number of clusters; by default as many as the clients allow with
            `smallest` in each.
        smallest: the intended fewest clients of a cluster; if every cluster has fewer, there are
            too many clusters.
        split: a cluster is split while its spread (unbiased mean squared distance to the center) is
            above this fraction of the spread of all clients.
        merge: two clusters are merged if the squared distance of their centers, less its
            expectation under chance alone, is below this fraction of their spread.
        silhouette: a number of clusters other than one must have a silhouette above this.
    """

    most: int | None = None
    smallest: int = 2
    split: float = 0.1
    merge: float = 0.25
    silhouette: float = 0.15


def adaptive(distances: Distances, how: Adaptive, iterations: int) -> Exchange[Clusters]:
    """Run k-means with as many clusters as fit, possibly one.

    1. Start with one cluster.
    2. Split the cluster of the largest spread, if that is above a fraction of the whole spread. Run
       `lloyd`.
    3. Merge clusters whose centers are closer than chance allows, the closest pair first. Run
       `lloyd` after each.
    4. Repeat from 2 until there are enough clusters, or a clustering repeats.
    5. Choose the clustering with the best silhouette among all of these.

    Clusters are numbered by their lowest client.
    """
    everybody = frozenset(distances.clients)
    most = how.most or max(1, len(everybody) // how.smallest)
    state = yield from lloyd(distances, [everybody], 1)
    threshold = how.split * state.spreads[0]
    seen = {state.sets: state}
    for _ in range(2 * most):
        if state.count >= most:
            break
        widest = max(state.sets, key=lambda members: _spread_of(state, members))
        if len(widest) < 2 or _spread_of(state, widest) <= threshold or not distances.affords([widest]):
            break
        halves = yield from _halves(distances, widest)
        sets = [members for members in state.sets if members != widest] + halves
        if not distances.affords(sets):
            break
        state = numbered((yield from lloyd(distances, sets, iterations)))
        for _ in range(len(sets)):
            pair = yield from closest(distances, state, how.merge)
            if pair is None:
                break
            sets = [members for members in state.sets if members not in pair] + [pair[0] | pair[1]]
            if not distances.affords(sets):
                break
            state = numbered((yield from lloyd(distances, sets, iterations)))
        if not state.converged or state.sets in seen:
            break
        seen[state.sets] = state
    states = list(seen.values())
    scores = [
        state.silhouette if state.count > 1 and max(map(len, state.sets)) >= how.smallest else how.silhouette
        for state in states
    ]
    best = states[int(np.argmax(scores))]
    return replace(best, iterations=sum(state.iterations for state in states))


def _halves(distances: Distances, members: Set) -> Exchange[list[Set]]:
    """Cut a cluster in two by the nearer of two of its members.

    The first is the member farthest from the center, the second the one farthest from the first. A
    single member is a poor center in many dimensions, since all its noise is in every distance to
    it. The noise cancels in the comparison of two members.
    """
    rows = [distances.clients.index(client) for client in sorted(members)]
    poles: list[Set] = []
    for _ in range(2):
        if not distances.affords(poles[-1:]):
            return [members]
        column = yield from real_distances(distances, poles[-1:] or [members])
        poles.append(frozenset({distances.clients[max(rows, key=lambda row: column[row, 0])]}))
    # Stop if the members coincide, or too few columns are left.
    if poles[0] == poles[1] or not distances.affords(poles):
        return [members]
    matrix = yield from common_scale(distances, poles)
    near = frozenset(distances.clients[row] for row in rows if matrix[row, 0] < matrix[row, 1])
    return [near, members - near]


def closest(
    distances: Distances,
    state: Clusters,
    merge: float,
) -> Exchange[tuple[Set, Set] | None]:
    """Find the pair of clusters with the closest centers relative to their spread, if the ratio is below `merge`."""
    if state.count < 2 or not state.converged or not distances.affords(state.sets):
        return None
    matrix = yield from real_distances(distances, state.sets)
    best, pair = merge, None
    for i, first in enumerate(state.sets):
        for j, second in enumerate(state.sets[:i]):
            spreads = [s for s in (state.spreads[i], state.spreads[j]) if not math.isnan(s)]
            if not spreads:
                continue
            # By Huygens and Steiner, from either side; the two agree where rows are comparable.
            gap = sum(
                float(
                    (matrix[state.labels == near, far] - matrix[state.labels == near, near]).mean(),
                )
                / 2
                for near, far in ((i, j), (j, i))
            )
            spread = sum(spreads) / len(spreads)
            excess = gap - spread / len(first) - spread / len(second)
            ratio = excess / spread if spread > 0 else math.copysign(math.inf, gap) if gap else -math.inf
            if ratio < best:
                best, pair = ratio, (first, second)
    return pair


def _spread_of(state: Clusters, members: Set) -> float:
    spread = state.spreads[state.sets.index(members)]
    return -1.0 if math.isnan(spread) else spread
