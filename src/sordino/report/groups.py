"""Bring runs that differ in nothing but the seed together, and say how far they spread."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sordino.errors import RunError
from sordino.report.runs import Client, Measure, Run

# What the page calls each measure, in the order in which it shows them.
MEASURES: dict[Measure, str] = {
    "local": "Local",
    "neighbor": "Neighbor",
    "overall": "Overall",
    "novel": "Novel",
    "domain": "Domain",
}

# Settings (by the last part of their name) that do not make two runs two methods.
_NOT_THE_METHOD = {"seed", "out", "device", "cache"}


@dataclass(frozen=True)
class Spread:
    """A mean and, where there are two values or more, their sample standard deviation (n - 1)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Spread of the values that are there; None where there is none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class Point:
    """A point of an accuracy curve, over the seeds that were evaluated in this round."""

    round: int
    accuracy: Spread


@dataclass(frozen=True)
class Group:
    """The runs of one algorithm with the same settings: one row of the table, one curve."""

    label: str
    runs: tuple[Run, ...]
    difference: str = ""  # all settings that other groups of the algorithm have otherwise; the label may name fewer

    @property
    def seeds(self) -> list[int]:
        return sorted(run.summary.seed for run in self.runs)

    @property
    def over_seeds(self) -> bool:
        return len(self.runs) > 1

    def accuracy(self, measure: Measure) -> Spread | None:
        """Final accuracy: spread over seeds where there are several runs, else over the clients of the one run."""
        headline = Spread.of(run.summary.accuracy.of(measure) for run in self.runs)
        return self._spread(headline, [client.of(measure) for client in self.runs[0].summary.per_client])

    def attack_success(self) -> Spread | None:
        """Likewise, how often an attacker's trigger gets its target; None where nobody attacks."""
        headline = Spread.of(run.summary.attack_success for run in self.runs)
        return self._spread(headline, [client.attack_success for client in self.runs[0].summary.per_client])

    def _spread(self, headline: Spread | None, of_clients: Sequence[float | None]) -> Spread | None:
        if headline is None or self.over_seeds:
            return headline
        clients = Spread.of(of_clients)
        # The mean stays the run's own, which may weight clients by their examples.
        return Spread(headline.mean, clients.deviation if clients else None)

    def curve(self, measure: Measure) -> list[Point]:
        """Accuracy by round, with its spread over seeds."""
        by_round: dict[int, list[float]] = {}
        for run in self.runs:
            for entry in run.rounds:
                value = entry.accuracy.of(measure) if entry.accuracy else None
                if value is not None:
                    by_round.setdefault(entry.round, []).append(value)
        found = ((number, Spread.of(values)) for number, values in sorted(by_round.items()))
        return [Point(number, spread) for number, spread in found if spread]

    def client_accuracy(self, measure: Measure) -> dict[int, float | None]:
        """Client to its accuracy, the mean over seeds."""
        values: dict[int, list[float | None]] = {}
        for client in self.clients():
            values.setdefault(client.client, []).append(client.of(measure))
        spreads = {client: Spread.of(found) for client, found in values.items()}
        return {client: spread.mean if spread else None for client, spread in spreads.items()}

    def clients(self) -> Iterator[Client]:
        """Every client of every run."""
        return (client for run in self.runs for client in run.summary.per_client)

    def mean(self, quantity: str) -> float:
        """Mean over runs of a number in the summary, named as `communication.total_upload_bytes`."""
        section, name = quantity.split(".")
        return statistics.fmean(getattr(getattr(run.summary, section), name) for run in self.runs)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by algorithm and settings (all but the seed), in order of first appearance.

    An algorithm that was run with several settings gives one group for each, so that no two settings are averaged. It
    is labeled with what differs: with as few settings as tell the groups apart, epsilon first.

    Raises:
        RunError: two runs agree in everything, the seed included: averaging them would feign a smaller spread.
    """
    by_algorithm: dict[str, list[Run]] = {}
    for run in runs:
        by_algorithm.setdefault(run.summary.algorithm, []).append(run)
    groups: list[Group] = []
    for algorithm, members in by_algorithm.items():
        by_settings: dict[tuple[str, ...], list[Run]] = {}
        for run, difference in zip(members, _differences([_settings(run) for run in members]), strict=True):
            by_settings.setdefault(difference, []).append(run)
        for (difference, same), short in zip(by_settings.items(), _shortest(list(by_settings)), strict=True):
            _refuse_repeats(same)
            groups.append(Group(f"{algorithm} ({short})" if short else algorithm, tuple(same), ", ".join(difference)))
    return groups


def _shortest(differences: Sequence[tuple[str, ...]]) -> list[str]:
    """For each group the settings that tell it from the others, as few as do it when taken in order, epsilon first."""
    count = len(differences[0])
    order = sorted(range(count), key=lambda at: not differences[0][at].startswith("privacy.epsilon"))
    kept: list[int] = []
    for at in order:
        told = len({tuple(each[k] for k in kept) for each in differences})
        if told < len({tuple(each[k] for k in [*kept, at]) for each in differences}):
            kept.append(at)
    more = ["…"] if len(kept) < count else []
    return [", ".join([*(each[at] for at in sorted(kept)), *more]) for each in differences]


def _settings(run: Run) -> dict[str, Any]:
    """A run's settings without the seed, flat, with dots in the names."""
    summary = run.summary
    # The summary's own words too: a configuration may leave to a default what the run then found.
    stated = {"dataset": summary.dataset, "encoder": summary.encoder, "clients": summary.clients}
    flat = dict(_flatten(run.config))
    return {**{name: value for name, value in stated.items() if name not in flat}, **flat}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif name not in _NOT_THE_METHOD:
            yield prefix + name, value


def _differences(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """For each run, in words, the settings that are not the same in all; empty where all agree."""
    names = dict.fromkeys(name for setting in settings for name in setting)
    unset = object()
    differing = [
        name
        for name in names
        if any(one.get(name, unset) != other.get(name, unset) for one, other in pairwise(settings))
    ]
    return [
        tuple(
            f"{name} = {json.dumps(setting[name], ensure_ascii=False, default=str)}"
            if name in setting
            else f"{name} unset"
            for name in differing
        )
        for setting in settings
    ]


def _refuse_repeats(runs: Sequence[Run]) -> None:
    repeated = [seed for seed, times in Counter(run.summary.seed for run in runs).items() if times > 1]
    if repeated:
        first, second = [run for run in runs if run.summary.seed == repeated[0]][:2]
        raise RunError(
            f"{second.directory}: summary.json has the algorithm, the settings and the seed ({repeated[0]}) "
            f"of {first.directory}; give only one of the two"
        )
