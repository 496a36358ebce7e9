"""A number of clusters that adapts, from squared distances of clients to centers of sets alone.

After Ball and Hall's ISODATA (1965): clusters split where they spread, and merge where they are close. Everything
that it takes follows from the columns that `lloyd` opens, and two more a split. With the squared distances of the
members of S' to the centers of S and of S', the squared distance between the centers is the difference of their means
(Huygens and Steiner's parallel axis theorem), so it is not opened. With "ratios", where the rows of different clients
are of unknown scales, each row is first divided by the client's distance to the center of all; spreads and distances
between centers are then in terms of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from sordino.secure.clustering import Clusters, Distances, Exchange, Set, common_scale, lloyd, numbered, real_distances


@dataclass(frozen=True)
class Adaptive:
    """How the number of clusters adapts.

    Attributes:
        most: the largest number of clusters; by default as many as the clients allow with `smallest` in each.
        smallest: how many clients a cluster should have at least; with fewer in every cluster, there are too many.
        split: a cluster is split while its spread (mean squared distance to the center, unbiased) is above this share
            of the spread of all clients.
        merge: two clusters are merged if the squared distance of their centers, less what chance alone puts between
            them, is below this share of their spread.
        silhouette: a number of clusters other than one must have a silhouette above this.
    """

    most: int | None = None
    smallest: int = 2
    split: float = 0.1
    merge: float = 0.25
    silhouette: float = 0.15


def adaptive(distances: Distances, how: Adaptive, iterations: int) -> Exchange[Clusters]:
    """K-means with as many clusters as fit, one being possible.

    1. Start with one cluster.
    2. Split the cluster of the largest spread, if that is above a share of the whole spread. Run `lloyd`.
    3. Merge clusters whose centers are closer than chance allows, the closest pair first. Run `lloyd` after each.
    4. Repeat from 2 until there are enough clusters, or nothing new comes of it.
    5. Of all that was seen, take the clustering of the best silhouette.

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
    worth = [
        each.silhouette if each.count > 1 and max(map(len, each.sets)) >= how.smallest else how.silhouette
        for each in seen.values()
    ]
    best = list(seen.values())[int(np.argmax(worth))]
    return replace(best, iterations=sum(each.iterations for each in seen.values()))


def _halves(distances: Distances, members: Set) -> Exchange[list[Set]]:
    """A cluster cut in two: by which of two of its members is nearer, one farthest from the center, one from that one.

    A single member is a poor center in many dimensions, since all its noise is in every distance to it. That cancels in
    the comparison of two members.
    """
    rows = [distances.clients.index(client) for client in sorted(members)]
    poles: list[Set] = []
    for _ in range(2):
        if not distances.affords(poles[-1:]):
            return [members]
        column = yield from real_distances(distances, poles[-1:] or [members])
        poles.append(frozenset({distances.clients[max(rows, key=lambda row: column[row, 0])]}))
    if poles[0] == poles[1] or not distances.affords(poles):  # all members are in one place, or too few columns left
        return [members]
    matrix = yield from common_scale(distances, poles)
    near = frozenset(distances.clients[row] for row in rows if matrix[row, 0] < matrix[row, 1])
    return [near, members - near]


def closest(distances: Distances, state: Clusters, merge: float) -> Exchange[tuple[Set, Set] | None]:
    """The pair of clusters whose centers are the closest beside their spread, if that is below `merge`."""
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
                float((matrix[state.labels == here, there] - matrix[state.labels == here, here]).mean()) / 2
                for here, there in ((i, j), (j, i))
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
