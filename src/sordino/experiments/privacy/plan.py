"""The privacy cost of a run before it is trained: who learns what, who adds the noise, epsilon by round."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import model_kind
from sordino.experiments.config import Experiment
from sordino.experiments.release_file import with_release
from sordino.experiments.unread_keys import warn_of_unread
from sordino.privacy.accounting import Spent, formula_epsilon
from sordino.privacy.choice import mechanism_for
from sordino.privacy.ledger import Ledger, Observer
from sordino.privacy.mechanism import Mechanism
from sordino.privacy.statement import NOISE_BY, WHO, seen_by, statement, views
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.progress import log
from sordino.results.wording import rounded_up
from sordino.runtime import aggregation
from sordino.runtime.facts import Units, mechanism_inputs
from sordino.runtime.settings import participant_count
from sordino.tasks.overview import doubts, overview, tell_passed_over
from sordino.tasks.poisoning import poisoned
from sordino.tasks.sources import load_images
from sordino.tasks.splits import build_task

POINTS = 12  # of the curve of epsilon by round


@dataclass(frozen=True)
class Plan:
    """A run's privacy, before it.

    Attributes:
        config: the run.
        data: its classes and clients with their sizes, in words.
        mechanism: with its noise matched to the budget.
        views: what each observer will have learned at the end.
        by_round: (round, epsilon of each observer, in the order of `views`), ascending.
    """

    config: Experiment
    data: str
    mechanism: Mechanism
    views: tuple[Spent, ...]
    by_round: tuple[tuple[int, tuple[float, ...]], ...]

    @property
    def ledger(self) -> Ledger:
        """As the whole run will leave it."""
        return self.mechanism.total

    def seen_by(self, observer: Observer) -> list[str]:
        """Return what an observer sees, a line a kind: noised, and by whom, or not."""
        return seen_by(self.ledger, observer)

    def formula(self) -> float | None:
        """The epsilon that public implementations of DP-FPL would claim for this noise; it does not hold."""
        if not self.ledger.releases or self.mechanism.delta is None or self.mechanism.noise_multiplier == 0:
            return None
        return formula_epsilon(self.mechanism.noise_multiplier, self.mechanism.inputs.rounds, self.mechanism.delta)

    def __str__(self) -> str:
        return as_text(self)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; what does not apply, or is infinite, is null."""
        inputs = self.mechanism.inputs
        return {
            "algorithm": self.config.algorithm,
            "data": self.data,
            "mechanism": self.config.privacy.mechanism,
            "unit": self.config.privacy.unit,
            "rounds": inputs.rounds,
            "delta": self.mechanism.delta,
            "noise_multiplier": self.mechanism.noise_multiplier if self.ledger.releases else None,
            "noise_by": self.config.privacy.noise_by if self.ledger.releases else None,
            "statement": statement(self.ledger, self.config.privacy.unit),
            "observers": [
                {
                    "observer": view.observer,
                    "trusted": view.observer in self.ledger.trusted,
                    "sees": self.seen_by(view.observer),
                    "epsilon": _finite(view.epsilon),
                    "epsilon_rdp": _finite(view.epsilon_rdp),
                }
                for view in self.views
            ],
            "epsilon_by_round": [
                {"round": number, "epsilon": dict(zip(WHO, map(_finite, epsilons), strict=True))}
                for number, epsilons in self.by_round
            ],
            "formula_epsilon": self.formula(),
        }


def planned_mechanism(config: Experiment) -> Mechanism:
    """The mechanism that a configuration will be run with; lists its images, encodes none, trains nothing.

    Raises:
        SordinoError: the configuration cannot be run.
    """
    return _planned(config)[0]


def _planned(config: Experiment, alone: bool = False) -> tuple[Mechanism, str]:
    """The mechanism, and what was read of the data, in words; warns where classes look like people.

    `alone`: nothing else reads the data, so that files and splits that are not used are told here.
    """
    config, earlier = with_release(config)
    method, settings = algorithm(config.algorithm), settings_for(config.algorithm, config.settings)
    images = load_images(config.data)
    if alone:
        tell_passed_over(images)
    task = build_task(images, config.data, config.partition, config.seed)
    said = overview(images, task)
    if doubt := doubts(images):
        log.warning("%s", doubt)
    if config.poisoning is not None:
        task = poisoned(task, config.poisoning, len(images), config.seed)
    # A picture with a trigger stands behind all others, and is of the same person.
    parties = [(rows % len(images)).tolist() for rows in task.train]
    parties = [[row for rows in parties for row in rows]] if method.ABOUT.pools_data else parties
    persons = None if images.persons is None else images.persons.tolist()
    units = Units.of(parties, persons, config.privacy)
    rounds = config.rounds if method.ABOUT.trains else 0
    kind, classes = model_kind(method, config.algorithm, config.encoder.name), len(task.class_names)
    inputs = mechanism_inputs(method, settings, units, rounds, config.runtime, config.seed, classes, kind)
    count = participant_count(len(parties), config.runtime.participation)
    aggregation.check(config.runtime, config.privacy, method.ABOUT, count)
    mechanism = mechanism_for(config.privacy, inputs, None)
    if earlier is not None and isinstance(mechanism, StatisticsMechanism):
        mechanism = replace(mechanism, earlier=earlier.noise)
    return mechanism, said


def plan(config: Experiment) -> Plan:
    """The plan of a configuration.

    Raises:
        SordinoError: the configuration cannot be run.
    """
    config, _ = with_release(config)
    (chosen, said), unit = _planned(config, alone=True), config.privacy.unit
    warn_of_unread(config)
    rounds = chosen.inputs.rounds
    numbers = sorted({max(1, round(rounds * step / POINTS)) for step in range(1, POINTS + 1)}) if rounds else []
    by_round = [
        (number, tuple(view.epsilon for view in views(chosen.empty_ledger().add(chosen.planned(number)), unit)))
        for number in numbers
    ]
    return Plan(config, said, chosen, tuple(views(chosen.total, unit)), tuple(by_round))


def as_text(chosen: Plan) -> str:
    """A plan for a terminal."""
    inputs, settings, ledger = chosen.mechanism.inputs, chosen.config.privacy, chosen.ledger
    low, high = min(inputs.sizes), max(inputs.sizes)
    held = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    noun = "persons" if settings.by_person else "examples"
    lines = [
        f"{chosen.config.algorithm} on {chosen.config.data.source}: {len(inputs.sizes):,} "
        f"{'party' if len(inputs.sizes) == 1 else 'clients'} with {held} {noun} each, "
        f"{inputs.rounds:,} rounds.",
        f"Data: {chosen.data}.",
    ]
    if ledger.releases:
        rates = sorted({release.sampling_rate for release in ledger.releases})
        between = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}"
        delta = rounded_up(chosen.mechanism.delta or 0.0, 2)
        lines.append(
            f"Mechanism: {settings.mechanism}, noise multiplier {chosen.mechanism.noise_multiplier:.4g}, added by "
            f"{NOISE_BY[settings.noise_by]}; sampling rate {between}; delta {delta}."
        )
    lines += ["", "Who learns what:"]
    for view in chosen.views:
        trusted = " (trusted)" if view.observer in ledger.trusted else ""
        lines.append(
            f"  {WHO[view.observer]}{trusted}: epsilon {_words(view.epsilon)} (by RDP {_words(view.epsilon_rdp)})"
        )
        lines += [f"    {line}" for line in chosen.seen_by(view.observer)]
    worst = [(number, _worst(chosen, epsilons)) for number, epsilons in chosen.by_round]
    if ledger.releases and all(math.isfinite(epsilon) for _, epsilon in worst):
        most = max(epsilon for _, epsilon in worst)
        lines += ["", "Epsilon by round, for whoever is not trusted:"]
        lines += [
            f"  {number:>6,}  {rounded_up(epsilon, 4):>8}  {'#' * max(1, round(40 * epsilon / (most or 1)))}"
            for number, epsilon in worst
        ]
    lines += ["", statement(ledger, settings.unit)]
    formula = chosen.formula()
    if formula is not None:
        lines.append(
            f"Public implementations' formula would claim epsilon = {formula:.4g} for this noise; it does not hold."
        )
    return "\n".join(lines)


def _worst(chosen: Plan, epsilons: tuple[float, ...]) -> float:
    pairs = zip(chosen.views, epsilons, strict=True)
    return max((epsilon for view, epsilon in pairs if view.observer not in chosen.ledger.trusted), default=0.0)


def _words(epsilon: float) -> str:
    return rounded_up(epsilon, 4) if math.isfinite(epsilon) else "unbounded"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
