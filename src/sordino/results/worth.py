"""One line that says whether training was worth it, and one that says whether a comparison is fair."""

from __future__ import annotations

from collections.abc import Mapping

from sordino.results.aggregate import Results
from sordino.results.interval import Interval, points
from sordino.results.summary import MEASURES, Measure
from sordino.results.wording import listed

# Fractions below this are shown as 0.0 percent.
_SHOWN = 0.0005

BEST_NOT_OFFERED = (
    "No best round is offered for runs with a privacy mechanism: choosing it by the accuracy of test pictures would be "
    "a release of its own, which no epsilon covers."
)
BEST_TOO_HIGH = (
    "The best round was chosen on the test pictures, so its accuracy is too high; the prompts that were kept are those "
    "of the last round."
)


def verdict(results: Results) -> str | None:
    """Return whether training gained anything over the hand-written prompt, in one line.

    It goes by the leading measure. A gain counts if its interval of 95% lies above zero. Where it does, other measures
    that fell are told too; where it does not, others that surely rose.

    Returns:
        None if nothing was learned, or if the hand-written prompt's accuracy is not known.
    """
    measure = results.leading
    gain = results.gain(measure)
    if gain is None:
        return None
    words = f"{measure} accuracy {gain_words(gain, _pair(results, measure))}"
    others = [(other, change) for other in MEASURES if other != measure and (change := results.gain(other))]
    if gain.above:
        told = [other for other, change in others if change.mean <= -_SHOWN]
        return words + "".join(f"; but {other} fell: {_with_interval(results, other)}" for other in told)
    told = [other for other, change in others if change.above]
    return words + "".join(f"; {other} is better: {_with_interval(results, other)}" for other in told)


def gain_words(gain: Interval, pair: str) -> str:
    """Return a gain over the hand-written prompt in words: `no better than the hand-written prompt: 61.4 to 60.2, ...`.

    Args:
        gain: with its interval.
        pair: the two accuracies in words.
    """
    claim = "better than" if gain.above else "worse than" if gain.below else "no better than"
    ends = f"interval of the difference {gain.percent()}" if gain.low is not None else "too few values for an interval"
    return f"{claim} the hand-written prompt: {pair}, {ends}"


def _pair(results: Results, measure: Measure) -> str:
    """Return the accuracy after training, and that of the hand-written prompt."""
    learned, given = results.accuracy(measure), results.hand_written(measure)
    assert learned is not None
    assert given is not None
    return f"{points(learned.mean)} to {points(given)}"


def _with_interval(results: Results, measure: Measure) -> str:
    gain = results.gain(measure)
    assert gain is not None
    return f"{_pair(results, measure)}, {gain.percent()}"


def unequal_steps(steps: Mapping[str, tuple[int, float]]) -> str | None:
    """Return in one line that methods differ in gradient steps; None if they do not.

    Args:
        steps: for each listed line of a comparison its gradient steps a round, and those of a client in a run. Methods
            that take none are not compared.
    """
    taken = {name: numbers for name, numbers in steps.items() if numbers[1] > 0}
    if len({whole for _, whole in taken.values()}) < 2:
        return None
    if len({a_round for a_round, _ in taken.values()}) > 1:
        words = _grouped({name: f"{a_round:,}" for name, (a_round, _) in taken.items()}, "local step", "a round")
    else:
        words = _grouped({name: f"{whole:,.0f}" for name, (_, whole) in taken.items()}, "gradient step", "a client")
    return f"{words}; compare --equal-steps gives all the same number"


def _grouped(values: Mapping[str, str], noun: str, each: str) -> str:
    """Return names with their values in words, names of one value together: `a takes 4 NOUNs EACH, b and c 1`."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    (first, those), *rest = names.items()
    verb = "takes" if len(those) == 1 else "take"
    unit = noun if first == "1" else f"{noun}s"
    return ", ".join(
        [f"{listed(those)} {verb} {first} {unit} {each}", *(f"{listed(some)} {value}" for value, some in rest)]
    )
