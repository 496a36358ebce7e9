"""Squared distances of clients to centers of sets, from an oracle that opens them column by column.

An oracle is a generator, because on shares every opening is an exchange of messages: it yields the
messages to send, and receives the replies. On shares the oracle is the server of SecPC; in the
clear it is `PlainDistances`.

A column of a set S of s clients holds s^2 times the squared distance of every client to the mean of
S, an integer.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Result = TypeVar("Result")
Exchange = Generator[dict[int, bytes], Sequence[tuple[int, bytes]], Result]
Set = frozenset[int]
Integers = NDArray[np.object_]  # of Python's integers
Floats = NDArray[np.float64]


class Distances(Protocol):
    """An oracle that opens columns of distances.

    Attributes:
        clients: the clients of the rows, ascending.
        comparable: whether rows of different clients have the same scale.
    """

    @property
    def clients(self) -> tuple[int, ...]: ...

    @property
    def comparable(self) -> bool: ...

    def affords(self, sets: Sequence[Set]) -> bool:
        """Return true if the columns of these sets may still be opened."""
        ...

    def columns(self, sets: Sequence[Set]) -> Exchange[Integers]:
        """Open [rows, sets]: |S|^2 times the squared distance to the center of S, times the row's scale."""
        ...


@dataclass(frozen=True)
class RevealedDistances:
    """One column of distances that was revealed to the server.

    Attributes:
        members: the set to whose center the distances are.
        clients: the clients of the rows, [rows].
        values: the decoded whole numbers: |S|^2 times the squared distance in quantization steps.
            With "ratios" they are multiplied by the row's factor, plus a remainder below it.
    """

    members: tuple[int, ...]
    clients: tuple[int, ...]
    values: tuple[int, ...]

    def squared(self, step: float) -> Floats:
        """Return squared distances [rows] in the points' units, if a quantization step is `step`."""
        return np.array([value / len(self.members) ** 2 for value in self.values]) * step**2


class PlainDistances:
    """The oracle in the clear, for integer points, or for any numbers that are exact in float64.

    Args:
        points: [N, d] integers.
        clients: the clients' numbers; by default from 0.
    """

    comparable = True

    def __init__(self, points: ArrayLike, clients: Sequence[int] | None = None) -> None:
        self.points = np.asarray(points, np.int64)
        self.clients = tuple(range(len(self.points)) if clients is None else clients)

    def affords(self, sets: Sequence[Set]) -> bool:
        """Return true always."""
        return True

    def columns(self, sets: Sequence[Set]) -> Exchange[Integers]:
        """Compute the columns; see `Distances`."""
        columns = np.empty((len(self.points), len(sets)), object)
        for number, members in enumerate(sets):
            total = self.points[[self.clients.index(client) for client in members]].sum(0)
            columns[:, number] = ((len(members) * self.points - total) ** 2).sum(1).tolist()
        return columns
        yield {}


def finish(exchange: Exchange[Result]) -> Result:
    """Return the result of an exchange that sends nothing, such as those over `PlainDistances`.

    Raises:
        ValueError: the exchange has something to send.
    """
    try:
        next(exchange)
    except StopIteration as end:
        result: Result = end.value
        return result
    raise ValueError("the exchange has something to send")


def common_scale(distances: Distances, sets: Sequence[Set]) -> Exchange[Integers]:
    """Return squared distances [rows, sets] as integers in one scale: times the least common multiple of all |S|^2."""
    squares = [len(members) ** 2 for members in sets]
    common = math.lcm(*squares)
    columns = yield from distances.columns(sets)
    scaled: Integers = columns * np.array([common // square for square in squares], object)
    return scaled


def real_distances(distances: Distances, sets: Sequence[Set]) -> Exchange[Floats]:
    """Return squared distances [rows, sets], in squared quantization steps.

    With "ratios" they are divided by those to the center of all.
    """
    everybody = frozenset(distances.clients)
    wanted = list(sets) if distances.comparable else [*sets, everybody]
    columns = yield from distances.columns(wanted)
    squares = np.array([len(members) ** 2 for members in wanted], object)
    real: Floats = (columns / squares).astype(np.float64)
    if not distances.comparable:
        real = real[:, :-1] / np.maximum(real[:, -1:], np.finfo(float).tiny)
    return real


def to_one_scale(squared: Floats) -> Floats:
    """Make squared distances [N, N] between clients symmetric, if each row has its own factor.

    D_ij = D_ji, so the quotient of two factors is M_ij / M_ji. All follow from one of them, up to a
    common scale.
    """
    # Of two clients in one place only remainders are left: both count as close, on the scale of
    # their rows.
    smallest = np.maximum(1e-9 * squared.mean(1, keepdims=True), np.finfo(float).tiny)
    safe = np.maximum(squared, smallest)
    logs = np.log(safe) - np.log(safe.T)
    np.fill_diagonal(logs, 0)
    level = squared / np.exp(logs.mean(1))[:, None]
    symmetric: Floats = (level + level.T) / 2
    np.fill_diagonal(symmetric, 0)
    return symmetric
