"""Epsilon of a composition of sampled Gaussian releases, by numerical accountants.

Samples are Poisson: every unit is in a sample independently of all others. Privacy loss distributions: Doroshenko,
Ghazi, Kamath, Kumar and Manurangsi, "Connect the Dots" (PoPETs 2022). Renyi: Mironov, Talwar and Zhang (2019). Both are
computed by Google's dp-accounting, which takes a second to import: functions that need it import it. If every unit was
always in the sample, the composition is one Gaussian release, and epsilon is exact by Balle and Wang (2018, Theorem 8).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from sordino.privacy.loss_distributions import composition

if TYPE_CHECKING:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

Accountant = Literal["pld", "rdp"]
Kind = tuple[float, float, int]  # noise multiplier, sampling rate, steps
Kinds = tuple[Kind, ...]  # in ascending order, no two of one multiplier and rate

LEAST_NOISE, MOST_NOISE = 1e-30, 1e12  # a multiplier below counts as 0, one above as MOST_NOISE
FINEST_INTERVAL = 1e-4  # dp-accounting's own step of the grid of privacy losses
LARGEST_LOSS = 1000  # range of losses up to which the finest grid takes seconds


@lru_cache(maxsize=4096)
def kinds_epsilon(kinds: Kinds, delta: float, accountant: Accountant, coarseness: float = 1.0) -> float:
    """Compute epsilon of all releases together.

    Args:
        kinds: the releases, as `merged` returns them.
        delta: the probability at which epsilon holds.
        accountant: "pld" or "rdp".
        coarseness: of "pld"; see `pld_epsilon`.

    Returns:
        0.0 for no releases; math.inf if one has no noise, or if delta is 0 or below.
    """
    if not kinds:
        return 0.0
    if delta <= 0 or kinds[0][0] == 0:
        return math.inf
    if accountant == "pld":
        return pld_epsilon(kinds, delta, coarseness)
    with quiet():
        return float(_rdp(kinds).get_epsilon(delta))


@lru_cache(maxsize=256)
def _rdp(kinds: Kinds) -> RdpAccountant:
    """Return the composition of releases by Renyi divergences, which gives epsilon for any delta at once."""
    from dp_accounting.rdp import RdpAccountant

    return RdpAccountant().compose(composed(kinds))


def quick_epsilon(kinds: Kinds, delta: float) -> float:
    """Compute an upper bound on epsilon that costs little for many deltas, and holds down to the smallest ones.

    It is the smaller one of the exact epsilon without sampling and of that by Renyi divergences. Privacy loss
    distributions take seconds for each delta, and cut tails of 1e-15 off.
    """
    if not kinds or delta <= 0 or kinds[0][0] == 0:
        return kinds_epsilon(kinds, delta, "rdp")
    unsampled = merged((multiplier, 1.0, steps) for multiplier, _, steps in kinds)
    return min(kinds_epsilon(unsampled, delta, "pld"), kinds_epsilon(kinds, delta, "rdp"))


def pld_epsilon(kinds: Kinds, delta: float, coarseness: float = 1.0) -> float:
    """Compute epsilon by privacy loss distributions; an upper bound at any coarseness.

    Args:
        kinds: releases with noise, at least one.
        delta: the probability at which epsilon holds.
        coarseness: factor on the step of the grid of privacy losses.
    """
    import dp_accounting

    unsampled = merged((multiplier, 1.0, steps) for multiplier, _, steps in kinds)[0][0]
    with quiet():
        unsampled_epsilon = float(dp_accounting.get_epsilon_gaussian(unsampled, delta))
        if all(rate == 1 for _, rate, _ in kinds):
            return unsampled_epsilon
        try:
            sampled = composition(kinds, _interval(kinds) * coarseness)
            sampled_epsilon = float(sampled.get_epsilon_for_delta(delta))
        except OverflowError:  # losses beyond 1e7: no float holds their exponential
            return unsampled_epsilon
        return min(unsampled_epsilon, sampled_epsilon)  # sampling can only lower epsilon


def composed(kinds: Iterable[Kind]) -> dp_accounting.DpEvent:
    """Return the composition of releases as an event of dp-accounting."""
    import dp_accounting

    def repeated(multiplier: float, rate: float, steps: int) -> dp_accounting.DpEvent:
        if steps == 0 or rate == 0:
            return dp_accounting.NoOpDpEvent()
        once = dp_accounting.GaussianDpEvent(multiplier)
        once = once if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, once)
        return dp_accounting.SelfComposedDpEvent(once, steps)

    return dp_accounting.ComposedDpEvent([repeated(*kind) for kind in kinds])


def merged(kinds: Iterable[Kind]) -> Kinds:
    """Return the kinds that release anything, each multiplier and sampling rate once.

    The steps of equal kinds are added. Kinds with sampling rate 1 become one Gaussian release.
    """
    steps: dict[tuple[float, float], int] = {}
    for given, rate, count in kinds:
        # Squares of floats hold no more. Both limits are on the safe side: no noise, or less of it.
        multiplier = 0.0 if given < LEAST_NOISE else min(given, MOST_NOISE)
        if count > 0 and rate > 0:
            steps[multiplier, rate] = steps.get((multiplier, rate), 0) + count
    always = [(multiplier, count) for (multiplier, rate), count in steps.items() if rate == 1]
    sampled = [(multiplier, rate, count) for (multiplier, rate), count in steps.items() if rate < 1]
    if any(multiplier == 0 for multiplier, _ in always):
        sampled.append((0.0, 1.0, 1))
    elif always:
        precision = math.fsum(count / multiplier / multiplier for multiplier, count in always)
        sampled.append((precision**-0.5, 1.0, 1))
    return tuple(sorted(sampled))


def largest(parties: Collection[Kinds]) -> list[Kinds]:
    """Return the parties that can be worst off: no other one releases as much or more in every kind."""

    def covers(a: Kinds, b: Kinds) -> bool:
        pairs = zip(a, b, strict=False)
        return len(a) >= len(b) and all(
            x[0] <= y[0] and x[1] >= y[1] and x[2] >= y[2]  # less noise, sampled more often, more steps
            for x, y in pairs
        )

    kept: list[Kinds] = []
    for one in parties:
        if not any(covers(other, one) for other in kept):
            kept = [other for other in kept if not covers(one, other)] + [one]
    return kept


def _interval(kinds: Kinds) -> float:
    """Return the step of the grid of privacy losses: dp-accounting's own, 1e-4, unless that takes too many points.

    The limit is some five million points, which take seconds. The range of losses is estimated, about twice too large,
    from the mean and the variance of one release's loss. Both are at most q times the whole Gaussian's, and at most
    q^2 (exp(z^-2) - 1), its chi-squared divergence.
    """
    spread = 0.0
    for multiplier, rate, steps in kinds:
        square = multiplier**-2
        divergence = rate**2 * math.expm1(min(square, 700))
        mean = min(rate * square / 2, divergence)
        variance = min(rate * (square**2 / 4 + square), divergence)
        spread += steps * mean + 16 * math.sqrt(steps * variance) + 10 * (square / 2 + 10 / multiplier)
    return FINEST_INTERVAL if spread <= LARGEST_LOSS else FINEST_INTERVAL * spread / 250


@contextmanager
def quiet() -> Iterator[None]:
    """Silence dp-accounting's warnings of tails that underflow and of Renyi orders that it leaves out."""

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = logging.getLogger("absl")
    logger.addFilter(below_error)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        logger.removeFilter(below_error)
