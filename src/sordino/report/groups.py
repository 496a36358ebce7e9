"""Bring runs together that differ in nothing but the seed."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sordino.errors import RunError
from sordino.report.markup import plain
from sordino.report.runs import Run
from sordino.results import ClientResult, Measure, Results, Spread, listed

# The page's names of the measures.
TITLES: dict[Measure, str] = {
    "local": "Local",
    "neighbor": "Neighbor",
    "overall": "Overall",
    "novel": "Novel",
    "domain": "Domain",
}

EPSILON = "privacy.epsilon"
NO_EPSILON = "no\N{NO-BREAK SPACE}ε"  # of a run that promises none

# Settings (by the last part of their name) that do not make two runs two methods. Each simulated run has a nonce of its
# own, as it has a seed.
_NOT_THE_METHOD = {"seed", "nonce", "out", "device", "cache"}


@dataclass(frozen=True)
class Point:
    """A point of an accuracy curve, over the seeds that were evaluated in this round."""

    round: int
    accuracy: Spread


@dataclass(frozen=True)
class Group:
    """The runs of one algorithm with the same settings: one row of the table, one curve.

    Attributes:
        label: its name on the page.
        runs: one for each seed.
        difference: all settings that other groups of the algorithm have otherwise, in full; the label is short, and may
            name fewer.
        line: the label without epsilon: the name of a line over epsilon.
    """

    label: str
    runs: tuple[Run, ...]
    difference: str = ""
    line: str = ""

    @property
    def results(self) -> Results:
        """The aggregates of the runs, which the terminal shows too."""
        return Results(tuple(run.summary for run in self.runs))

    @property
    def over_seeds(self) -> bool:
        """True if spreads are over seeds; those of a single run are over its clients."""
        return self.results.over_seeds

    def curve(self, measure: Measure) -> list[Point]:
        """Return the accuracy by round, with its spread over seeds."""
        by_round: dict[int, list[float]] = {}
        for run in self.runs:
            for entry in run.rounds:
                value = entry.accuracy.of(measure) if entry.accuracy else None
                if value is not None:
                    by_round.setdefault(entry.round, []).append(value)
        spreads = ((number, Spread.of(values)) for number, values in sorted(by_round.items()))
        return [Point(number, spread) for number, spread in spreads if spread]

    def clients(self) -> Iterator[ClientResult]:
        """Iterate over every client of every run."""
        return (client for run in self.runs for client in run.summary.per_client)


@dataclass(frozen=True)
class Clients:
    """Who the clients of a run are.

    Attributes:
        names: by number.
        domains: by number; empty where they are not known.
    """

    names: Mapping[int, str]
    domains: Mapping[int, tuple[str, ...]]

    @classmethod
    def of(cls, entries: Sequence[ClientResult]) -> "Clients":
        """Return the clients of a run's summary."""
        return cls(client_names(entries), {entry.client: entry.domains or () for entry in entries})

    def name(self, client: int) -> str:
        """Return its name, or its number if it has none; as HTML, which labels of plotly show too."""
        return plain(self.names.get(client, str(client)))

    def called(self, clients: Iterable[int]) -> list[str]:
        """Return the names of several clients as plain text, or their numbers if they have none."""
        return [self.names.get(client, str(client)) for client in clients]

    def holding(self, client: int) -> str:
        """Return its domains for its hover label; nothing if they are not known."""
        domains = self.domains.get(client, ())
        return plain(f"domain: {listed(domains)}") if domains else ""


def client_names(entries: Iterable[ClientResult]) -> dict[int, str]:
    """Return the name of each client by its number: its number itself, where runs do not give each one name."""
    names: dict[int, str] = {}
    for entry in entries:
        if names.setdefault(entry.client, entry.called) != entry.called:
            names[entry.client] = str(entry.client)
    distinct = len(set(names.values())) == len(names)
    return {client: name if distinct else str(client) for client, name in names.items()}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by algorithm and settings (all but the seed), in order of first appearance.

    An algorithm that was run with several settings gives one group for each, so that no two settings are averaged. It
    is labeled with what differs, in short ("dp-fpl, ε 8"): as few settings as tell the groups apart, epsilon first.

    Raises:
        RunError: two runs agree in everything, the seed included; averaging them would feign a smaller spread.
    """
    by_algorithm: dict[str, list[Run]] = {}
    for run in runs:
        by_algorithm.setdefault(run.summary.algorithm, []).append(run)
    groups: list[Group] = []
    for algorithm, members in by_algorithm.items():
        by_settings: dict[tuple[str, ...], list[Run]] = {}
        settings = [settings_of(run) for run in members]
        names = _differing(settings)
        for run, setting in zip(members, settings, strict=True):
            by_settings.setdefault(tuple(_full(name, setting) for name in names), []).append(run)
        told = _telling(names, list(by_settings))
        pairs = list(zip(_short_names([names[place] for place in told]), told, strict=True))
        for difference, same in by_settings.items():
            _refuse_repeats(same)
            setting = settings_of(same[0])
            # A name and its value stay on one line.
            short = {names[at]: f"{word}\N{NO-BREAK SPACE}{_short(setting.get(names[at]))}" for word, at in pairs}
            if EPSILON in short and setting.get(EPSILON) is None and same[0].summary.privacy.epsilon is None:
                short[EPSILON] = NO_EPSILON  # not a budget that was left open
            others = [part for name, part in short.items() if name != EPSILON]
            label, line = ", ".join([algorithm, *short.values()]), ", ".join([algorithm, *others])
            groups.append(Group(label, tuple(same), ", ".join(difference), line))
    return groups


def _telling(names: Sequence[str], differences: Sequence[tuple[str, ...]]) -> list[int]:
    """Return the places of the settings that tell groups apart.

    They are taken in order, epsilon first; one that tells no more groups apart is left out.
    """

    def distinct(places: Sequence[int]) -> int:
        return len({tuple(settings[place] for place in places) for settings in differences})

    kept: list[int] = []
    for place in sorted(range(len(names)), key=lambda at: names[at] != EPSILON):
        if distinct(kept) < distinct([*kept, place]):
            kept.append(place)
    return sorted(kept)


def _short_names(names: Sequence[str]) -> list[str]:
    """Return settings' names by their last parts, as many as tell them apart; that of epsilon as a letter."""
    shortened = []
    for name in names:
        parts = name.split(".")
        count = next(n for n in range(1, len(parts) + 1) if _ends(names, parts[-n:]) == 1 or n == len(parts))
        shortened.append("ε" if name == EPSILON else " ".join(parts[-count:]).replace("_", " "))
    return shortened


def _ends(names: Sequence[str], parts: Sequence[str]) -> int:
    return sum(name.split(".")[-len(parts) :] == list(parts) for name in names)


def _short(value: Any) -> str:
    """Return a setting's value as a label has it; one that is not set is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return "∞" if value == float("inf") else f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def settings_of(run: Run) -> dict[str, Any]:
    """Return a run's settings without the seed, flat, with dots in the names."""
    summary = run.summary
    # From the summary too: a configuration may leave these to a default.
    stated = {"dataset": summary.dataset, "encoder": summary.encoder, "clients": summary.clients}
    flat = dict(_flatten(run.config))
    return {**{name: value for name, value in stated.items() if name not in flat}, **flat}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif name not in _NOT_THE_METHOD:
            yield prefix + name, value


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for setting in settings for name in setting)
    unset = object()
    return [
        name
        for name in names
        if any(one.get(name, unset) != other.get(name, unset) for one, other in pairwise(settings))
    ]


def _full(name: str, setting: Mapping[str, Any]) -> str:
    if name not in setting:
        return f"{name} unset"
    return f"{name} = {json.dumps(setting[name], ensure_ascii=False, default=str)}"


def _refuse_repeats(runs: Sequence[Run]) -> None:
    repeated = [seed for seed, times in Counter(run.summary.seed for run in runs).items() if times > 1]
    if repeated:
        first, second = [run for run in runs if run.summary.seed == repeated[0]][:2]
        raise RunError(
            f"{second.directory}: summary.json has the algorithm, the settings and the seed ({repeated[0]}) "
            f"of {first.directory}; give only one of the two"
        )
