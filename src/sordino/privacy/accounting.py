"""What a ledger comes to: epsilon by numerical accountants, and the noise or the rounds that a target leaves.

All epsilons are for data sets that differ in one unit added or removed (an example, or a client with all it holds). A
sample is taken by independent coins (Poisson). Privacy loss distributions: Doroshenko, Ghazi, Kamath, Kumar and
Manurangsi, "Connect the Dots" (PoPETs 2022); Renyi: Mironov, Talwar and Zhang (2019); both as computed by Google's
dp-accounting. Where every unit was always in the sample, the composition is one Gaussian, and epsilon is exact by Balle
and Wang (2018, Theorem 8).
"""

from __future__ import annotations

import decimal
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from sordino.errors import ConfigError, RunError
from sordino.privacy.ledger import ALL_CLIENTS, Ledger, Observer, Release, Unit
from sordino.privacy.settings import EPSILONS, LEAST_EPSILON, MOST_EPSILON

Accountant = Literal["pld", "rdp"]
Kind = tuple[float, float, int]  # noise multiplier, sampling rate, steps
Kinds = tuple[Kind, ...]  # in ascending order, no two of one multiplier and rate

LEAST_NOISE, MOST_NOISE = 1e-30, 1e12  # multipliers outside are counted as none, and as the second
LEAST_MULTIPLIER = 0.01  # `noise_multiplier` looks no lower


@dataclass(frozen=True)
class Spent:
    """What one observer learned about one unit: (epsilon, delta)-differential privacy towards this observer.

    Attributes:
        observer: who learned it.
        unit: what neighboring data sets differ in.
        party: whose unit it learned most about; None where it saw nothing.
        epsilon: of that party, by privacy loss distributions; math.inf where nothing is promised.
        epsilon_rdp: the largest of any party, by Renyi divergences.
        delta: at which both hold; 0 where the ledger has none.
    """

    observer: Observer
    unit: Unit
    party: str | None
    epsilon: float
    epsilon_rdp: float
    delta: float


def event(releases: Iterable[Release]) -> dp_accounting.DpEvent:
    """The releases as an event of dp-accounting; print it to see the whole composition."""
    return _composed((each.noise_multiplier, each.sampling_rate, each.steps) for each in releases)


def epsilon(releases: Iterable[Release], delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon of all releases together, as if all were made of the same party's data.

    Args:
        releases: in any order.
        delta: at which it holds; at 0 or below no epsilon of Gaussian noise does.
        accountant: "pld" is tight: where losses would not fit a grid of 1e-4, that of dp-accounting, the grid is
            coarser and the result a bound from above. Where all sampling rates are 1 it is exact, below the grid's
            figure by some 1e-6 under noise multipliers of thousands. "rdp" is what most papers report, a tenth larger.

    Returns:
        0.0 where nothing was released; math.inf where something was without noise.
    """
    return _epsilon(_kinds(releases), delta, accountant)


def spent(ledger: Ledger, observer: Observer, unit: Unit, delta: float | None = None) -> Spent:
    """What an observer learned about one unit, of the party about whose units it learned most.

    Parties hold disjoint data, so a unit is exposed by its own party's releases and by those of ALL_CLIENTS (parallel
    composition). A client-level release protects examples too. One example more or less may change its client's
    contribution into any other of the same norm, which is twice as far as adding it; so it counts with half its noise
    multiplier, and without the sampling of clients (by joint convexity, coins that fall alike for both data sets can
    only help). An example-level release bounds nothing about a client, which has many: epsilon is math.inf for unit
    "client" where the observer saw one, as it is for both where it saw anything without noise.

    Of several runs (`compose`), a unit may be with another party in each. Where all runs hold a party's very data (by
    its digest), its releases in all of them add up. All other parties may share units with any party of another run,
    so the worst of each run add up.

    Args:
        ledger: of one run, or of several by `compose`.
        observer: who looks.
        unit: what neighboring data sets differ in.
        delta: in place of the ledger's.
    """
    delta = (ledger.delta if delta is None else delta) or 0.0
    largest = _largest_named(_exposed(ledger, observer, unit))
    by_party = [(_epsilon(kinds, delta, "pld"), party) for kinds, party in largest.items()]
    worst, party = max(by_party, key=lambda each: each[0], default=(0.0, None))
    worst_rdp = max((_epsilon(kinds, delta, "rdp") for kinds in largest), default=0.0)
    return Spent(observer, unit, party, worst, worst_rdp, delta)


def _exposed(ledger: Ledger, observer: Observer, unit: Unit) -> dict[str, Kinds]:
    """Return what an observer saw of each party's units, or of each choice of parties that may hold one unit."""
    if ledger.parts:
        return _over_data([(part, _exposed(part, observer, unit)) for part in ledger.parts])
    seen = [
        _for_unit(each, unit)
        for each in ledger.releases
        if observer in each.observers and each.steps > 0 and each.sampling_rate > 0
    ]
    seen += [
        Release(each.content, ALL_CLIENTS, unit, (0.0,), 1.0, 1, "nobody", each.observers)
        for each in ledger.disclosures
        if observer in each.observers
    ]
    return {name: _kinds(each) for name, each in _by_party(seen).items()}


def _over_data(runs: Sequence[tuple[Ledger, dict[str, Kinds]]]) -> dict[str, Kinds]:
    """Join what was seen in several runs of parties that may hold the same units."""
    held = [_by_digest(ledger, exposed) for ledger, exposed in runs]
    common = set(held[0]).intersection(*held[1:])
    joined: dict[str, Kinds] = {}
    for digest in sorted(common):
        seen = [exposed[parties[digest]] for parties, (_, exposed) in zip(held, runs, strict=True)]
        joined[held[0][digest]] = _merged(kind for kinds in seen for kind in kinds)
    others: dict[str, Kinds] = {"": ()}
    for number, (parties, (_, exposed)) in enumerate(zip(held, runs, strict=True), 1):
        matched = {parties[digest] for digest in common}
        rest = _largest_named({party: kinds for party, kinds in exposed.items() if party not in matched})
        choices = {
            f"{before}{', ' if before else ''}{party} of run {number}": _merged((*so_far, *kinds))
            for before, so_far in others.items()
            for kinds, party in rest.items()
        }
        others = {name: kinds for kinds, name in _largest_named(choices or others).items()}
    return joined | {name: kinds for name, kinds in others.items() if kinds}


def _by_digest(ledger: Ledger, parties: Collection[str]) -> dict[str, str]:
    """Return the parties by the digest of their data, without those whose digest is not known, or not theirs alone."""
    digests = {party: ledger.digest_of(party) for party in parties}
    known = list(digests.values())
    return {digest: party for party, digest in digests.items() if digest and known.count(digest) == 1}


def compose(ledgers: Sequence[Ledger]) -> Ledger:
    """Several runs, on the same data or on others, as one.

    Delta is the smallest of theirs; randomness is "system" only if it was in all of them.

    Raises:
        RunError: one run is given twice.
    """
    runs = [each.run for each in ledgers if each.run]
    twice = next((run for run in runs if runs.count(run) > 1), None)
    if twice is not None:
        raise RunError(f"run {twice} is given {runs.count(twice)} times; give each run once: it was released once")
    total = Ledger()
    for each in ledgers:
        total = total.add(each.releases)
    deltas = [each.delta for each in ledgers if each.delta is not None]
    simulated = any(each.simulated for each in ledgers)
    return replace(
        total,
        disclosures=tuple(dict.fromkeys(entry for each in ledgers for entry in each.disclosures)),
        trusted=tuple(dict.fromkeys(entry for each in ledgers for entry in each.trusted)),
        assumptions=tuple(dict.fromkeys(entry for each in ledgers for entry in each.assumptions)),
        delta=min(deltas, default=None),
        randomness="simulation" if simulated else "system",
        parts=tuple(ledgers),
    )


def noise_multiplier(epsilon: float, delta: float, schedules: Collection[tuple[float, int]]) -> float:
    """The smallest joint noise multiplier with which every party's releases stay within a target.

    Args:
        epsilon: the target, by privacy loss distributions; math.inf asks for no noise.
        delta: at which it is to hold.
        schedules: each party's sampling rate and number of steps.

    Returns:
        A multiplier with which no party exceeds epsilon, and the worst-off is within 1e-4 of it, relatively; at least
        0.01, and 0.0 where no noise is needed: epsilon is infinite, or nothing is released.

    Raises:
        ConfigError: epsilon is not above 0, or delta not in (0, 1).
    """
    if not epsilon > 0:
        raise ConfigError("privacy.epsilon", epsilon, "must be above 0 (inf: no noise)")
    if not 0 < delta < 1:
        raise ConfigError("privacy.delta", delta, "must be above 0 and below 1")
    if math.isinf(epsilon):
        return 0.0
    if not LEAST_EPSILON <= epsilon <= MOST_EPSILON:
        raise ConfigError("privacy.epsilon", epsilon, f"must be {EPSILONS}")
    counting = {((0.0, rate, steps),) for rate, steps in schedules if rate > 0 and steps > 0}
    multiplier = 0.0
    for ((_, rate, steps),) in sorted(_largest(counting), key=lambda each: -each[0][1] * each[0][2] ** 0.5):
        if multiplier == 0 or _epsilon(_merged([(multiplier, rate, steps)]), delta, "pld") > epsilon:
            multiplier = max(multiplier, _calibrated(rate, steps, epsilon, delta))
    return multiplier


def default_delta(units: int) -> float:
    """min(1e-3, units^-1.1), rounded down to two digits: below 1/units, by more the more units there are."""
    return _two_digits_down(min(1e-3, units**-1.1))


def check_delta(delta: float, units: int) -> None:
    """See that delta promises something about each of so many examples or clients.

    Raises:
        ConfigError: it is not above 0 and below 1/units.
    """
    if not delta > 0:
        raise ConfigError("privacy.delta", delta, f"must be above 0 and below 1/{units}")
    if delta >= 1 / units:
        largest = _two_digits_down(math.nextafter(1 / units, 0))
        promise = f"a mechanism that publishes one of {units} in the clear would satisfy it"
        raise ConfigError("privacy.delta", delta, f"must be below 1/{units}, at most {largest:g}: {promise}")


def formula_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """What public implementations of DP-FPL take epsilon to be: sqrt(rounds log(1/delta)) / noise_multiplier.

    It does not hold: a constant and the term rounds / (2 noise_multiplier^2) are missing, and it counts rounds, however
    many releases there are in one. It is here to be compared with `epsilon`, for nothing else.
    """
    return math.sqrt(rounds * -math.log(delta)) / noise_multiplier if noise_multiplier > 0 else math.inf


def _for_unit(release: Release, unit: Unit) -> Release:
    """A release as it protects another unit than its own."""
    if release.unit == unit:
        return release
    if unit == "client":
        return replace(release, noise_multipliers=(0.0,))
    return replace(release, noise_multipliers=(release.noise_multiplier / 2,), sampling_rate=1.0)


def _of(party: str, releases: Iterable[Release]) -> list[Release]:
    return [each for each in releases if each.party in (party, ALL_CLIENTS)]


def _by_party(releases: Sequence[Release]) -> dict[str, list[Release]]:
    """The releases that expose each party's units; of ALL_CLIENTS only where no party has releases of its own."""
    names = dict.fromkeys(each.party for each in releases if each.party != ALL_CLIENTS)
    return {name: _of(name, releases) for name in names or dict.fromkeys(each.party for each in releases)}


def _kinds(releases: Iterable[Release]) -> Kinds:
    return _merged((each.noise_multiplier, each.sampling_rate, each.steps) for each in releases)


def _merged(kinds: Iterable[Kind]) -> Kinds:
    """What counts, equal ones added up, and those with everybody in the sample as one Gaussian release."""
    steps: dict[tuple[float, float], int] = {}
    for given, rate, count in kinds:
        # Beyond what squares of floats can hold, towards the safe side: no noise, or less of it.
        multiplier = 0.0 if given < LEAST_NOISE else min(given, MOST_NOISE)
        if count > 0 and rate > 0:
            steps[multiplier, rate] = steps.get((multiplier, rate), 0) + count
    always = [(multiplier, count) for (multiplier, rate), count in steps.items() if rate == 1]
    sampled = [(multiplier, rate, count) for (multiplier, rate), count in steps.items() if rate < 1]
    if any(multiplier == 0 for multiplier, _ in always):
        sampled.append((0.0, 1.0, 1))
    elif always:
        sampled.append((math.fsum(count / multiplier / multiplier for multiplier, count in always) ** -0.5, 1.0, 1))
    return tuple(sorted(sampled))


def _largest_named(parties: Mapping[str, Kinds]) -> dict[Kinds, str]:
    """Return those of which no other releases as much or more, with their party; of equals, the first."""
    names = {kinds: name for name, kinds in reversed(list(parties.items()))}
    return {kinds: names[kinds] for kinds in _largest(names)}


def _largest(parties: Collection[Kinds]) -> list[Kinds]:
    """Those of which no other one releases as much or more in every kind; the rest cannot be worse off."""

    def covers(a: Kinds, b: Kinds) -> bool:
        pairs = zip(a, b, strict=False)
        return len(a) >= len(b) and all(x[0] <= y[0] and x[1] >= y[1] and x[2] >= y[2] for x, y in pairs)

    kept: list[Kinds] = []
    for one in parties:
        if not any(covers(other, one) for other in kept):
            kept = [other for other in kept if not covers(one, other)] + [one]
    return kept


def _composed(kinds: Iterable[Kind]) -> dp_accounting.DpEvent:
    def repeated(multiplier: float, rate: float, steps: int) -> dp_accounting.DpEvent:
        if steps == 0 or rate == 0:
            return dp_accounting.NoOpDpEvent()
        once = dp_accounting.GaussianDpEvent(multiplier)
        once = once if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, once)
        return dp_accounting.SelfComposedDpEvent(once, steps)

    return dp_accounting.ComposedDpEvent([repeated(*each) for each in kinds])


@lru_cache(maxsize=4096)
def _epsilon(kinds: Kinds, delta: float, accountant: Accountant) -> float:
    if not kinds:
        return 0.0
    if delta <= 0 or kinds[0][0] == 0:
        return math.inf
    if accountant == "pld":
        return _pld_epsilon(kinds, delta)
    with _quiet():
        return float(RdpAccountant().compose(_composed(kinds)).get_epsilon(delta))


def _pld_epsilon(kinds: Kinds, delta: float, coarseness: float = 1.0) -> float:
    """By a grid of privacy losses `coarseness` times as wide as need be; a bound from above with any."""
    everybody = _merged((multiplier, 1.0, steps) for multiplier, _, steps in kinds)[0][0]
    with _quiet():
        whole = float(dp_accounting.get_epsilon_gaussian(everybody, delta))  # sampling can only lower it
        if all(rate == 1 for _, rate, _ in kinds):
            return whole
        accountant = PLDAccountant(value_discretization_interval=_interval(kinds) * coarseness)
        try:
            return min(whole, float(accountant.compose(_composed(kinds)).get_epsilon(delta)))
        except OverflowError:  # losses beyond 1e7, that no float holds the exponential of
            return whole


def _interval(kinds: Kinds) -> float:
    """The step of the grid of privacy losses: dp-accounting's own, 1e-4, up to some five million points (seconds).

    The range of losses is estimated, about twice too large, from the mean and the variance of one release's loss:
    both at most q times the whole Gaussian's, and at most q^2 (exp(z^-2) - 1), its chi-squared divergence.
    """
    spread = 0.0
    for multiplier, rate, steps in kinds:
        square = multiplier**-2
        divergence = rate**2 * math.expm1(min(square, 700))
        mean, variance = min(rate * square / 2, divergence), min(rate * (square**2 / 4 + square), divergence)
        spread += steps * mean + 16 * math.sqrt(steps * variance) + 10 * (square / 2 + 10 / multiplier)
    return 1e-4 if spread <= 1000 else 1e-4 * spread / 250


@lru_cache(maxsize=1024)
def _calibrated(rate: float, steps: int, epsilon: float, delta: float) -> float:
    """`noise_multiplier` of one schedule: solved on a coarse grid, whose excess over the fine one is then taken off."""
    with _quiet():
        sigma = float(dp_accounting.get_sigma_gaussian(epsilon, delta))
    # Many sampled releases come near a Gaussian one (Bu, Dong, Long and Su 2020); with q = 1 they are one.
    square = 1 / (sigma * sigma * steps)
    guess = 1 / math.sqrt(square if rate == 1 else math.log1p(square / rate / rate))
    multiplier = max(guess * (1 + 1e-9), LEAST_MULTIPLIER)
    coarseness, aim, excess = min(max(10 * epsilon, 1.0), 10.0), epsilon * (1 - 5e-5), 0.0

    def over(multiplier: float) -> float:
        return (_pld_epsilon(((multiplier, rate, steps),), delta, coarseness) - excess) / aim - 1

    for _ in range(0 if rate == 1 else 6):
        multiplier = _crossing(over, multiplier)
        fine = _epsilon(((multiplier, rate, steps),), delta, "pld")
        if epsilon * (1 - 1e-4) <= fine < epsilon * (1 - 1e-12):
            return multiplier
        if multiplier == LEAST_MULTIPLIER and fine < epsilon:
            return multiplier
        excess += aim - fine
    while _epsilon(_merged([(multiplier, rate, steps)]), delta, "pld") >= epsilon:
        multiplier *= 1 + 1e-5
    return multiplier


def _crossing(falling: Callable[[float], float], guess: float) -> float:
    """Where a falling function of the multiplier is 0, to 1e-5: regula falsi, Illinois variant, in the logarithm."""
    low = high = math.log(guess)
    at_low = at_high = falling(guess)
    step, floor = 0.05, math.log(LEAST_MULTIPLIER)
    while at_high > 0:
        low, at_low, high, step = high, at_high, high + step, 2 * step
        at_high = falling(math.exp(high))
    while at_low <= 0:
        if low <= floor:
            return LEAST_MULTIPLIER
        high, at_high, low, step = low, at_low, max(low - step, floor), 2 * step
        at_low = falling(math.exp(low))
    side = 0
    while high - low > 1e-5:
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        at = falling(math.exp(middle))
        if abs(at) < 1e-5:
            return math.exp(middle)
        if at > 0:
            low, at_low, at_high, side = middle, at, at_high / (2 if side > 0 else 1), 1
        else:
            high, at_high, at_low, side = middle, at, at_low / (2 if side < 0 else 1), -1
    return math.exp(high)


def _two_digits_down(value: float) -> float:
    exact = decimal.Decimal(value)
    return float(exact.quantize(decimal.Decimal((0, (1,), exact.adjusted() - 1)), decimal.ROUND_DOWN))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of dp-accounting over tails that underflow, and over Renyi orders that it leaves out."""

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = logging.getLogger("absl")
    logger.addFilter(below_error)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        logger.removeFilter(below_error)
