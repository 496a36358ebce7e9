"""From where a clustering starts, or how the number of its clusters is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sordino.secure.adaptive import Adaptive, adaptive
from sordino.secure.clustering import Clusters, Distances, Exchange, farthest_first, lloyd
from sordino.secure.errors import SecureError
from sordino.secure.pairs import Pairs, by_pairs

Start = int | Sequence[int] | Sequence[Iterable[int]] | Adaptive | Pairs


def search(distances: Distances, start: Start, iterations: int) -> Exchange[Clusters]:
    """Cluster by k-means.

    Args:
        distances: where they come from.
        start: first centers as client numbers; or as sets of clients, whose means they are; or a number of clusters,
            with first centers by `farthest_first`; or how the number of clusters adapts.
        iterations: at most so many times are new centers computed.

    Raises:
        SecureError: a first center is a client who has no row, or more distances are needed than were agreed.
    """
    if isinstance(start, Adaptive):
        return (yield from adaptive(distances, start, iterations))
    if isinstance(start, Pairs):
        return (yield from by_pairs(distances, start, iterations))
    if isinstance(start, int):
        sets = yield from farthest_first(distances, start)
    else:
        sets = [frozenset({each}) if isinstance(each, int | np.integer) else frozenset(each) for each in start]
    for members in sets:
        if not members or not members <= {*distances.clients}:
            raise SecureError(
                f"first center {sorted(members)}: dealt no shares, or is empty; choose among {distances.clients}"
            )
    return (yield from lloyd(distances, sets, iterations))
