"""Costs of a computation on shares: rounds, and bytes online and offline, by protocol and label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Cost:
    """A cost, or a sum of costs.

    Attributes:
        rounds: openings that wait for each other.
        online: bytes that each party sends to the other.
        offline: bytes that the dealer sends to party 1. Party 0 needs none.
    """

    rounds: int = 0
    online: int = 0
    offline: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.rounds + other.rounds, self.online + other.online, self.offline + other.offline)


class Costs:
    """A party's costs, entered under the current label and the protocols under way."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, tuple[str, ...]], Cost] = defaultdict(Cost)
        self._label, self._path = "", tuple[str, ...]()

    def add(self, cost: Cost) -> None:
        """Enter a cost under the current label and protocols."""
        self._entries[self._label, self._path] += cost

    @contextmanager
    def label(self, label: str) -> Iterator[None]:
        """Enter the costs within the context under a label, such as a layer's name."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    @contextmanager
    def protocol(self, name: str) -> Iterator[None]:
        """Enter the costs within the context under a protocol, nested in those under way."""
        before, self._path = self._path, (*self._path, name)
        try:
            yield
        finally:
            self._path = before

    @property
    def total(self) -> Cost:
        """The sum of all costs."""
        return sum(self._entries.values(), Cost())

    def by_label(self) -> dict[str, Cost]:
        """Sum costs by label, in the order of first entry."""
        return self._grouped(lambda label, _: label)

    def by_protocol(self, depth: int | None = 1) -> dict[str, Cost]:
        """Sum costs by protocol.

        Args:
            depth: nested protocols that are told apart, as in "layer_norm/inverse_root"; None for all.
        """
        return self._grouped(lambda _, path: "/".join(path[:depth]))

    def by_label_and_protocol(self) -> dict[str, dict[str, Cost]]:
        """Sum costs by label, and within a label by outermost protocol."""
        grouped: dict[str, dict[str, Cost]] = defaultdict(dict)
        for (label, name), cost in self._grouped(lambda label, path: (label, "/".join(path[:1]))).items():
            grouped[label][name] = cost
        return dict(grouped)

    def taken(self) -> list[list[Any]]:
        """Remove all entries and return them for JSON: rows of label, protocols, rounds, online, offline."""
        rows = [[label, list(path), *astuple(cost)] for (label, path), cost in self._entries.items()]
        self._entries.clear()
        return rows

    def add_taken(self, rows: Sequence[Sequence[Any]]) -> None:
        """Enter rows that `taken` returned elsewhere.

        Raises:
            ValueError, TypeError: the rows are malformed.
        """
        for label, path, rounds, online, offline in rows:
            self._entries[str(label), tuple(map(str, path))] += Cost(int(rounds), int(online), int(offline))

    def table(self) -> str:
        """Format one line for each label and protocol, and one for the total."""
        rows = [(label, *entry) for label, inner in self.by_label_and_protocol().items() for entry in inner.items()]
        lines = [f"{'label':<16}{'protocol':<28}{'rounds':>9}{'online':>17}{'offline':>17}"]
        for label, name, cost in [*rows, ("total", "", self.total)]:
            lines.append(f"{label:<16}{name:<28}{cost.rounds:>9,}{cost.online:>17,}{cost.offline:>17,}")
        return "\n".join(lines)

    def _grouped(self, key: Callable[[str, tuple[str, ...]], Any]) -> dict[Any, Cost]:
        groups: dict[Any, Cost] = defaultdict(Cost)
        for (label, path), cost in self._entries.items():
            groups[key(label, path)] += cost
        return dict(groups)


class Accountable(Protocol):
    """An object that keeps costs, such as a party."""

    @property
    def costs(self) -> Costs: ...


A = TypeVar("A", bound=Accountable)


def protocol(function: Callable[Concatenate[A, P], R]) -> Callable[Concatenate[A, P], R]:
    """Decorate a function of a party: its costs are entered under its name."""

    @wraps(function)
    def counted(party: A, *args: P.args, **kwargs: P.kwargs) -> R:
        with party.costs.protocol(function.__name__):
            return function(party, *args, **kwargs)

    return cast(Callable[Concatenate[A, P], R], counted)
