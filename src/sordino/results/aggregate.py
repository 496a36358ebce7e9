"""Aggregates of runs that differ in their seed: means, deviations, and one claim of privacy."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sordino.results.interval import Interval, crossed, paired, points
from sordino.results.summary import MEASURES, Accuracy, Measure, Summary


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
class Best:
    """The best evaluated rounds of runs, chosen on the test pictures, so that their accuracy is too high.

    Attributes:
        accuracy: in these rounds, the mean over runs.
        rounds: their numbers, in order of the seeds.
    """

    accuracy: float
    rounds: tuple[int, ...]

    def __str__(self) -> str:
        first, last = min(self.rounds), max(self.rounds)
        return f"{points(self.accuracy)} ({first if first == last else f'{first}-{last}'})"


@dataclass(frozen=True)
class Claim:
    """The strongest statement of privacy that holds for every one of several runs.

    Attributes:
        private: every run is private, with an epsilon of at most `MOST_PRIVATE_EPSILON`.
        simulated: the noise of some run can be drawn again.
        bounded: every run is private so, or simulates noise of such an epsilon.
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

    @property
    def leading(self) -> Measure:
        """The measure by which runs are compared: the first one that applies, as in the columns of every table."""
        return next((measure for measure in MEASURES if self.accuracy(measure)), MEASURES[0])

    def before(self, measure: Measure) -> float | None:
        """Return the accuracy before training, the mean over runs; None if it is not known of all."""
        return _mean_of([summary.before for summary in self.summaries], measure)

    def hand_written(self, measure: Measure) -> float | None:
        """Return the accuracy of the hand-written prompt, the mean over runs; None if it is not known of all."""
        known = (run.hand_written for run in self.summaries)
        return _mean_of([prompt.accuracy if prompt else None for prompt in known], measure)

    @property
    def hand_written_prompt(self) -> str | None:
        """The words of the hand-written prompt before the class name; None if they are not known."""
        return next((run.hand_written.prompt for run in self.summaries if run.hand_written), None)

    def gain(self, measure: Measure) -> Interval | None:
        """Return the difference of the accuracy to that of the hand-written prompt, with its interval of 95%.

        Of several runs the interval is over seeds, paired; of one run it is over clients and test pictures. None if
        one of the two is not known, or if the runs learn nothing.
        """
        differences = []
        for summary in self.summaries:
            learned, known = summary.accuracy.of(measure), summary.hand_written
            given = known.accuracy.of(measure) if known else None
            if known is None or known.itself or learned is None or given is None:
                return None
            differences.append(learned - given)
        return paired(differences) if self.over_seeds else _gain_of_one(self.summaries[0], measure, differences[0])

    def difference(self, first: Results, measure: Measure) -> Interval | None:
        """Return the difference of the accuracy to that of other runs, paired by seed, with its interval of 95%.

        Args:
            first: the runs to compare with.
            measure: of accuracy.

        Returns:
            None if no seed is common to both, if they are not of the same data, or if `first` are these runs.
        """
        others = {summary.seed: summary for summary in first.summaries}
        differences = []
        for summary in self.summaries:
            other = others.get(summary.seed)
            if other is None or _compared(summary) != _compared(other):
                continue
            one, two = summary.accuracy.of(measure), other.accuracy.of(measure)
            if one is not None and two is not None:
                differences.append(one - two)
        return paired(differences) if differences and first is not self else None

    @property
    def best(self) -> Best | None:
        """The best rounds by the leading measure; None if they are not offered for all runs."""
        chosen = [run.best for run in self.summaries if run.best and run.best.measure == self.leading]
        values = [best.accuracy.of(self.leading) for best in chosen]
        known = [value for value in values if value is not None]
        if len(known) < len(self.summaries):
            return None
        by_seed = sorted(zip((run.seed for run in self.summaries), chosen, strict=True), key=lambda pair: pair[0])
        return Best(statistics.fmean(known), tuple(best.round for _, best in by_seed))

    @property
    def best_withheld(self) -> bool:
        """True if some run has rounds, and its best one is not offered because of a privacy mechanism."""
        return any(run.before is not None and run.best is None for run in self.summaries)

    @property
    def steps_a_round(self) -> int | None:
        """Gradient steps of a client in a round; None if it is not known, or not the same in all runs."""
        numbers = {run.effort.steps_a_round if run.effort else None for run in self.summaries}
        return numbers.pop() if len(numbers) == 1 else None

    @property
    def gradient_steps(self) -> float | None:
        """Gradient steps of a client in a run, the mean over clients and runs."""
        return self._mean_effort("gradient_steps")

    @property
    def examples_seen(self) -> float | None:
        """Training images in the gradient steps of a client in a run, the mean over clients and runs."""
        return self._mean_effort("examples_seen")

    def _mean_effort(self, name: str) -> float | None:
        efforts = [run.effort for run in self.summaries if run.effort]
        known = len(efforts) == len(self.summaries)
        return statistics.fmean(getattr(effort, name) for effort in efforts) if known else None

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
            private=all(run.private and run.bounded for run in spent),
            simulated=any(run.simulated for run in spent),
            bounded=all((run.private or run.simulated) and run.bounded for run in spent),
            epsilon=max(epsilons) if len(epsilons) == len(spent) else None,
            delta=max((run.delta for run in spent if run.delta is not None), default=None),
            units=tuple(dict.fromkeys(run.unit for run in spent if run.unit)),
        )


def _mean_of(accuracies: Sequence[Accuracy | None], measure: Measure) -> float | None:
    values = [accuracy.of(measure) if accuracy else None for accuracy in accuracies]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _compared(summary: Summary) -> tuple[object, ...]:
    """Return what must be the same in two runs of one seed, so that their accuracies are of the same pictures."""
    return summary.dataset, summary.encoder, summary.clients


def _gain_of_one(run: Summary, measure: Measure, mean: float) -> Interval:
    """Return the gain of a single run, with its interval over the honest clients and the test pictures."""
    assert run.hand_written is not None
    given = {
        result.client: accuracy.of(measure)
        for result, accuracy in zip(run.per_client, run.hand_written.per_client, strict=False)
    }
    pairs = [(result.of(measure), given.get(result.client)) for result in run.honest]
    differences = [one - two for one, two in pairs if one is not None and two is not None]
    variance = run.hand_written.variance.get(measure)
    if variance is None or not differences:
        return Interval(mean)
    return crossed(mean, differences, variance.pictures, variance.over_pictures, variance.over_pairs)
