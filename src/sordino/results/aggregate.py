"""What several runs that differ in their seed say together: means, deviations, and one claim of privacy."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sordino.results.summary import Measure, Summary


class Spread(NamedTuple):
    """A mean, and the sample standard deviation (n - 1) of the values that it is of.

    Attributes:
        mean: of the values.
        deviation: None if there are fewer than two values.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Return the spread of the values that are not None; None if there is no such value."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)

    def percent(self) -> str:
        """Return the spread of a fraction in percent, `38.9 ± 6.9`; without the deviation if there is none."""
        mean = f"{100 * self.mean:.1f}"
        return mean if self.deviation is None else f"{mean} ± {100 * self.deviation:.1f}"


@dataclass(frozen=True)
class Claim:
    """The strongest statement of privacy that holds for every one of several runs.

    Attributes:
        private: every run is private.
        simulated: the noise of some run can be drawn again.
        bounded: every run is private, or simulates noise of a known epsilon.
        epsilon: the largest over runs, of a simulation that of the noise it simulates; None if a run has none.
        delta: the largest over runs; None if no run has one.
        units: the units of privacy, each once.
    """

    private: bool
    simulated: bool
    bounded: bool
    epsilon: float | None
    delta: float | None
    units: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """The summaries of runs that differ in nothing but the seed, at least one, and their aggregates."""

    summaries: tuple[Summary, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted(summary.seed for summary in self.summaries)

    @property
    def over_seeds(self) -> bool:
        """True if spreads are over seeds; those of a single run are over its clients."""
        return len(self.summaries) > 1

    def accuracy(self, measure: Measure) -> Spread | None:
        """Return the spread of an accuracy; None if the measure does not apply."""
        of_clients = [result.of(measure) for result in self.summaries[0].honest]
        return self._spread([summary.accuracy.of(measure) for summary in self.summaries], of_clients)

    def attack_success(self) -> Spread | None:
        """Return the spread of the success of an attacker's trigger; None if nobody attacks."""
        of_clients = [result.attack_success for result in self.summaries[0].honest]
        return self._spread([summary.attack_success for summary in self.summaries], of_clients)

    def _spread(self, of_runs: Sequence[float | None], of_clients: Sequence[float | None]) -> Spread | None:
        """Aggregate the values of the runs, or, of a single run, its own mean and the values of its clients."""
        spread = Spread.of(of_runs)
        if spread is None or self.over_seeds:
            return spread
        over_clients = Spread.of(of_clients)
        return spread._replace(deviation=over_clients.deviation if over_clients else None)

    @property
    def seconds(self) -> float:
        """Seconds of training, the mean over seeds."""
        return statistics.fmean(summary.seconds.train for summary in self.summaries)

    def mean_bytes(self, name: str) -> float:
        """Return one of the numbers of `Communication`, the mean over seeds; a whole number if it is one."""
        sizes: list[int] = [getattr(summary.communication, name) for summary in self.summaries]
        return statistics.mean(sizes)

    def client_accuracy(self, measure: Measure) -> dict[int, float | None]:
        """Return the accuracy of each client by its number, the mean over seeds."""
        values: dict[int, list[float | None]] = {}
        for summary in self.summaries:
            for result in summary.per_client:
                values.setdefault(result.client, []).append(result.of(measure))
        spreads = {client: Spread.of(accuracies) for client, accuracies in values.items()}
        return {client: spread.mean if spread else None for client, spread in spreads.items()}

    @property
    def claim(self) -> Claim:
        """The strongest statement of privacy that holds for every run."""
        spent = [summary.privacy for summary in self.summaries]
        epsilons = [run.epsilon for run in spent if run.epsilon is not None]
        return Claim(
            private=all(run.private for run in spent),
            simulated=any(run.simulated for run in spent),
            bounded=all(run.private or (run.simulated and run.epsilon is not None) for run in spent),
            epsilon=max(epsilons) if len(epsilons) == len(spent) else None,
            delta=max((run.delta for run in spent if run.delta is not None), default=None),
            units=tuple(dict.fromkeys(run.unit for run in spent if run.unit)),
        )
