"""The start of a clustering, or the choice of the number of its clusters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sordino.secure.adaptive import Adaptive, adaptive
from sordino.secure.clustering import Clusters, farthest_first, lloyd
from sordino.secure.distances import Distances, Exchange
from sordino.secure.errors import SecureError
from sordino.secure.pairs import Pairs, by_pairs

Start = int | Sequence[int] | Sequence[Iterable[int]] | Adaptive | Pairs


def search(distances: Distances, start: Start, iterations: int) -> Exchange[Clusters]:
    """Cluster by k-means.

    Args:
        distances: the oracle of distances.
        start: the first centers as client numbers, or as sets of clients whose means they are. Or a
            number of clusters, with first centers by `farthest_first`. Or settings with which the
            number of clusters adapts.
        iterations: the largest number of computations of new centers.

    Raises:
        SecureError: a first center is a client without a row, or more distances are needed than
            were agreed.
    """
    if isinstance(start, Adaptive):
        return (yield from adaptive(distances, start, iterations))
    if isinstance(start, Pairs):
        return (yield from by_pairs(distances, start, iterations))
    if isinstance(start, int):
        sets = yield from farthest_first(distances, start)
    else:
        sets = [frozenset({center}) if isinstance(center, int | np.integer) else frozenset(center) for center in start]
    for members in sets:
        if not members or not members <= {*distances.clients}:
            raise SecureError(
                f"first center {sorted(members)}: dealt no shares, or is empty; choose among {distances.clients}"
            )
    return (yield from lloyd(distances, sets, iterations))
