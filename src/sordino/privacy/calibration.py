"""Noise for a budget: the noise multiplier that a target epsilon needs, and the delta that suits a number of units."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Collection
from functools import lru_cache

from sordino.errors import ConfigError
from sordino.privacy.accountants import kinds_epsilon, largest, merged, pld_epsilon, quiet
from sordino.privacy.settings import EPSILONS, LEAST_EPSILON, MOST_EPSILON

LEAST_MULTIPLIER = 0.01  # `noise_multiplier` looks no lower


def noise_multiplier(epsilon: float, delta: float, schedules: Collection[tuple[float, int]]) -> float:
    """Compute the smallest joint noise multiplier that keeps every party's releases within a target.

    Args:
        epsilon: the target, by privacy loss distributions; math.inf asks for no noise.
        delta: the probability at which the target is to hold.
        schedules: each party's sampling rate and number of steps.

    Returns:
        A multiplier with which no party exceeds epsilon, and the worst-off is within 1e-4 of it, relatively. It is at
        least 0.01. It is 0.0 if no noise is needed: epsilon is infinite, or nothing is released.

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
    # The likely worst-off come first, so that most of the others need no calibration of their own.
    for ((_, rate, steps),) in sorted(largest(counting), key=lambda kinds: -kinds[0][1] * kinds[0][2] ** 0.5):
        if multiplier == 0 or kinds_epsilon(merged([(multiplier, rate, steps)]), delta, "pld") > epsilon:
            multiplier = max(multiplier, _calibrated(rate, steps, epsilon, delta))
    return multiplier


def default_delta(units: int) -> float:
    """Return min(1e-3, units^-1.1), rounded down to two digits: below 1/units, by more the more units there are."""
    return _two_digits_down(min(1e-3, units**-1.1))


def check_delta(delta: float, units: int, key: str = "privacy.delta") -> None:
    """Check that delta promises something about each of so many examples or clients.

    Args:
        delta: of the promise.
        units: how many examples, persons or clients there are.
        key: of the delta, for the error.

    Raises:
        ConfigError: delta is not above 0 and below 1/units.
    """
    if not delta > 0:
        raise ConfigError(key, delta, f"must be above 0 and below 1/{units}")
    if delta >= 1 / units:
        most = _two_digits_down(math.nextafter(1 / units, 0))
        promise = f"a mechanism that publishes one of {units} in the clear would satisfy it"
        raise ConfigError(key, delta, f"must be below 1/{units}, at most {most:g}: {promise}")


@lru_cache(maxsize=1024)
def _calibrated(rate: float, steps: int, epsilon: float, delta: float) -> float:
    """Return the `noise_multiplier` of one schedule.

    The equation is solved on a coarse grid of privacy losses, which is fast. The coarse grid's excess over the fine
    one is then taken off, and the equation is solved again.
    """
    import dp_accounting  # slow to import

    with quiet():
        sigma = float(dp_accounting.get_sigma_gaussian(epsilon, delta))
    # Many sampled releases come near a Gaussian one (Bu, Dong, Long and Su 2020); with q = 1 they are one.
    square = 1 / (sigma * sigma * steps)
    guess = 1 / math.sqrt(square if rate == 1 else math.log1p(square / rate / rate))
    multiplier = max(guess * (1 + 1e-9), LEAST_MULTIPLIER)
    coarseness = min(max(10 * epsilon, 1.0), 10.0)
    aim = epsilon * (1 - 5e-5)
    excess = 0.0

    def over(multiplier: float) -> float:
        return (pld_epsilon(((multiplier, rate, steps),), delta, coarseness) - excess) / aim - 1

    for _ in range(0 if rate == 1 else 6):
        multiplier = _crossing(over, multiplier)
        fine = kinds_epsilon(((multiplier, rate, steps),), delta, "pld")
        if epsilon * (1 - 1e-4) <= fine < epsilon * (1 - 1e-12):
            return multiplier
        if multiplier == LEAST_MULTIPLIER and fine < epsilon:
            return multiplier
        excess += aim - fine
    while kinds_epsilon(merged([(multiplier, rate, steps)]), delta, "pld") >= epsilon:
        multiplier *= 1 + 1e-5
    return multiplier


def _crossing(falling: Callable[[float], float], guess: float) -> float:
    """Return the multiplier at which a falling function is 0, to 1e-5.

    The method is regula falsi, Illinois variant, in the logarithm of the multiplier.
    """
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
        at_middle = falling(math.exp(middle))
        if abs(at_middle) < 1e-5:
            return math.exp(middle)
        if at_middle > 0:
            low, at_low, at_high, side = middle, at_middle, at_high / (2 if side > 0 else 1), 1
        else:
            high, at_high, at_low, side = middle, at_middle, at_low / (2 if side < 0 else 1), -1
    return math.exp(high)


def _two_digits_down(value: float) -> float:
    exact = decimal.Decimal(value)
    return float(exact.quantize(decimal.Decimal((0, (1,), exact.adjusted() - 1)), decimal.ROUND_DOWN))
