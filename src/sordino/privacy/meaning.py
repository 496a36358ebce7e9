"""The meaning of (epsilon, delta): how often an attacker can be right, and what holds for several units together."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from sordino.privacy import accounting
from sordino.privacy.ledger import OBSERVERS, Ledger, Unit

LEAST_DELTA = 1e-300  # of what a group's epsilon is searched over


def right_at_most(epsilon: float, delta: float) -> float:
    """Return how often at most an attacker is right who must tell apart two equally likely neighboring data sets.

    Of (epsilon, delta)-DP, Kairouz, Oh, Viswanath (ICML 2015), Theorem 2.1: false positives a and false negatives b of
    any test have a + e^epsilon b >= 1 - delta and b + e^epsilon a >= 1 - delta. So a + b >= 2 (1 - delta) / (1 +
    e^epsilon), and the attacker is right at most (e^epsilon + delta) / (1 + e^epsilon) of the time.

    Args:
        epsilon: at least 0, or math.inf.
        delta: at most 1.
    """
    wrong = (1 - min(delta, 1.0)) * math.exp(-epsilon) / (1 + math.exp(-epsilon))
    return 1 - wrong


def percent_up(share: float) -> str:
    """Return a share in percent with at most two digits behind the point, never less than it is: `99.97%`."""
    hundredths = (Decimal(share) * 10000).to_integral_value(ROUND_CEILING)
    return f"{float(hundredths) / 100:g}%"


def rounded_down(value: float) -> str:
    """Return three digits, never more than the value: what protects must not look larger than it is."""
    if not math.isfinite(value):
        return str(value)
    return f"{float(Context(prec=3, rounding=ROUND_FLOOR).create_decimal(repr(value))):g}"


def group_epsilon(ledger: Ledger, unit: Unit, size: int) -> float:
    """Compute a bound on the privacy loss of several units together, wherever they are, at the ledger's delta.

    A mechanism that is (e, d)-DP for one unit is (n e, d (1 + e^e + ... + e^((n - 1) e)))-DP for n of them (Dwork and
    Roth, 2014, Theorem 2.2, with its terms kept apart). The mechanism has one e for every d. So the search finds a d so
    small that the second term is at most the ledger's delta, and the result is n times the epsilon at that d. It is
    more than n times the epsilon at the ledger's delta, as delta grows with n too.

    Args:
        ledger: of a run.
        unit: of which there are several.
        size: n, their number.

    Returns:
        Against the worst untrusted observer; math.inf if no such d above `LEAST_DELTA` is found.
    """
    untrusted = [observer for observer in OBSERVERS if observer not in ledger.trusted]
    delta = ledger.delta or 0.0
    if size == 1 or delta <= 0:
        return max(accounting.spent(ledger, observer, unit).epsilon for observer in untrusted)
    low, high = math.log(LEAST_DELTA), math.log(delta)
    best = math.inf
    # Only values that were checked are returned, so the bound holds even where the search is not monotone.
    for _ in range(_STEPS):
        middle = (low + high) / 2
        epsilon = max(accounting.quick_bound(ledger, observer, unit, math.exp(middle)) for observer in untrusted)
        if middle + _log_sum(epsilon, size) <= math.log(delta):
            low, best = middle, min(best, size * epsilon)
        else:
            high = middle
    return best


_STEPS = 30


def _log_sum(epsilon: float, size: int) -> float:
    """Return the logarithm of 1 + e^epsilon + ... + e^((size - 1) epsilon)."""
    if not math.isfinite(epsilon):
        return math.inf
    if epsilon < 1e-9:
        return math.log(size) + (size - 1) * epsilon  # an upper bound
    largest = (size - 1) * epsilon
    return largest + math.log(-math.expm1(-size * epsilon)) - math.log(-math.expm1(-epsilon))
