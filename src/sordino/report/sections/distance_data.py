"""The distances that a server saw, as arrays: put together, and laid out on a plane."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sordino.report.runs import Distances

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """Distances that a server saw.

    Attributes:
        clients: those whose distances they are, ascending.
        sets: the sets of clients to whose means they are. If they are `mutual`, each of `clients` alone, in order.
        squared: [clients, sets], squared, in the points' units; NaN if one was not opened.
        others: the number of sets of several clients that were asked about beside mutual ones.
    """

    clients: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    squared: Floats
    others: int = 0

    @property
    def mutual(self) -> bool:
        """True if these are the distances between all clients."""
        return self.sets == tuple((client,) for client in self.clients) and not np.isnan(self.squared).any()

    def shown(self, ratios: bool) -> Floats:
        """Return distances [clients, sets], not squared; with `ratios`, divided by the mean of the row."""
        distances = np.sqrt(self.squared)
        if not ratios:
            return distances
        known = ~np.isnan(distances)
        means = np.where(known, distances, 0).sum(1) / np.maximum(known.sum(1), 1)
        relative: Floats = distances / np.where(means > 0, means, 1)[:, None]
        return relative


def seen(distances: Distances) -> Seen:
    """Put the columns of a round together: those of single clients if they are complete, else all of them."""
    columns = {tuple(sorted({*column.members})): column for column in distances.columns}
    clients = tuple(sorted({client for column in columns.values() for client in column.clients}))
    row = {client: number for number, client in enumerate(clients)}
    squared = np.full((len(clients), len(columns)), np.nan)
    for number, (members, column) in enumerate(columns.items()):
        values = np.array(column.values, dtype=np.float64) / len(members) ** 2
        squared[[row[client] for client in column.clients], number] = values * distances.step**2
    everything = Seen(clients, tuple(columns), squared)
    singles = [everything.sets.index((client,)) for client in clients if (client,) in columns]
    single_sets = tuple(everything.sets[place] for place in singles)
    between_clients = Seen(clients, single_sets, squared[:, singles], others=len(columns) - len(singles))
    return between_clients if between_clients.mutual else everything


def plane(squared: Floats) -> tuple[Floats, float]:
    """Lay points out in two dimensions by classical multidimensional scaling (Torgerson, 1952).

    Args:
        squared: [N, N], squared distances, symmetric.

    Returns:
        Coordinates [N, 2], about their mean, the wider axis first; and the share of the sum of the squared distances
        that they keep, in [0, 1].
    """
    count = len(squared)
    centering = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-centering @ squared @ centering / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    points = np.zeros((count, 2))
    axes = min(2, count)
    points[:, :axes] = vectors[:, :axes] * np.sqrt(values[:axes].clip(min=0))
    # An axis may point either way: its largest entry is made positive, so that a page comes out alike every time.
    points *= np.where(points[np.abs(points).argmax(0), [0, 1]] < 0, -1, 1)
    total = values.sum()
    return points, float(np.clip((points**2).sum() / total, 0, 1)) if total > 0 else 1.0
