"""Whether a tuned prompt is better than the hand-written one, over all test examples and by class.

Both prompts classify the same examples, so the interval is of a paired difference: the adjusted Wald interval of Bonett
and Price (Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data, Journal of
Educational and Behavioral Statistics 37, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

QUANTILE = 1.959964  # of the normal distribution, for 95%
LISTED = 6  # most classes in a text


def accuracy_of(hits: Tensor) -> float:
    """Return the share of test examples that are classified right, of [T]."""
    return float(hits.double().mean())


def gain(before: Tensor, after: Tensor) -> dict[str, float]:
    """Compare two prompts on the same test examples.

    Args:
        before, after: [T], true for examples that the hand-written and the tuned prompt classify right.

    Returns:
        The difference of accuracies, tuned minus hand-written, with the ends `low` and `high` of its 95% interval.
    """
    won, lost, count = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    gained, missed = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    center = gained - missed
    half = QUANTILE * math.sqrt((gained + missed - center**2) / (count + 2))
    return {"difference": (won - lost) / count, "low": max(-1.0, center - half), "high": min(1.0, center + half)}


def by_class(names: Sequence[str], labels: Tensor, before: Tensor, after: Tensor) -> dict[str, dict[str, float]]:
    """Return both accuracies, and the number of test examples, by class; classes without examples are left out."""
    found = {}
    for number, name in enumerate(names):
        own = labels == number
        if own.any():
            found[name] = {
                "zero_shot": accuracy_of(before[own]),
                "tuned": accuracy_of(after[own]),
                "test_examples": int(own.sum()),
            }
    return found


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """Say in a line or two whether tuning was worth it, and where the hand-written prompt is better.

    Args:
        summary: of a run. One of an older version has no `gain`, and nothing is said.
    """
    difference = summary.get("gain")
    if difference is None:
        return []
    accuracy = summary["accuracy"]
    low, high = difference["low"], difference["high"]
    word, advice = "no better than", "; keep the hand-written one, or tune with more examples or generations"
    if low > 0:
        word, advice = "better than", ""
    elif high < 0:
        word = "worse than"
    lines = [
        f"the tuned prompt is {word} the hand-written one: {100 * accuracy['tuned']:.1f} to "
        f"{100 * accuracy['zero_shot']:.1f} percent, 95% interval of the difference {100 * low:.1f} to "
        f"{100 * high:.1f}{advice}"
    ]
    worse = worse_classes(summary)
    if worse:
        named = [
            f"{name} ({100 * part['zero_shot']:.1f} to {100 * part['tuned']:.1f})" for name, part in worse[:LISTED]
        ]
        more = f", and {len(worse) - LISTED} more" if len(worse) > LISTED else ""
        lines.append(f"the hand-written prompt is better on {', '.join(named)}{more}")
    return lines


def worse_classes(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Return the classes for which the hand-written prompt is better, the largest difference first."""
    losses = [(part["zero_shot"] - part["tuned"], name) for name, part in summary.get("by_class", {}).items()]
    return [(name, summary["by_class"][name]) for loss, name in sorted(losses, key=lambda pair: -pair[0]) if loss > 0]
