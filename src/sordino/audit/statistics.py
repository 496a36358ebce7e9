"""Statistics of a membership attack's scores: ROC curves, their intervals, and a lower bound on epsilon.

`one_run_epsilon` is the bound of Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023
(arXiv 2305.08846), Theorem 5.2 and Appendix D. Its premise is the caller's duty. Each of the m canaries was included
with probability 1/2, independently of all others. The scores were computed from releases, without access to the
inclusions.

scipy.stats and sklearn are imported by the functions that use them: both take half a second, and most commands that
import this module attack nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, expit, logit

MOST_CANARIES = 10**8  # in the search for how many an audit needs


@dataclass(frozen=True, eq=False)
class Roc:
    """An attack's receiver operating characteristic.

    Attributes:
        false_positive_rate: [P], ascending from 0 to 1; the share of non-members that are called members.
        true_positive_rate: [P], ascending from 0 to 1; the share of members that are found.
        auc: area under the curve, the probability that a member outscores a non-member, ties counted half.
        members: number of members that were scored.
        non_members: number of non-members that were scored.
    """

    false_positive_rate: NDArray[np.float64]
    true_positive_rate: NDArray[np.float64]
    auc: float
    members: int
    non_members: int

    def at(self, false_positive_rate: float) -> float:
        """Return the largest true positive rate of a threshold whose false positive rate is at most the given one.

        This is a step function: nothing is interpolated, since between two thresholds there is no attack.

        Raises:
            ValueError: the rate is outside [0, 1].
        """
        _require(0 <= false_positive_rate <= 1, f"false_positive_rate = {false_positive_rate}: it lies in [0, 1]")
        last = np.searchsorted(self.false_positive_rate, false_positive_rate, side="right") - 1
        return float(self.true_positive_rate[last])

    def interval_at(
        self, false_positive_rate: float, confidence: float = 0.95, independent: float | None = None
    ) -> tuple[float, float]:
        """Return the Clopper-Pearson interval of `at`, for the threshold that the scored non-members set.

        It holds for that threshold's true positive rate. It does not include the uncertainty of the threshold's own
        false positive rate: the non-members are a sample too.

        Args:
            false_positive_rate: as in `at`.
            confidence: of the interval.
            independent: the number of independent values that the members are worth; absent: their number.
        """
        found = round(self.at(false_positive_rate) * self.members)
        if independent is None:
            return clopper_pearson(found, self.members, confidence)
        return clopper_pearson(independent * (found / self.members), independent, confidence)


def roc(scores: ArrayLike, members: ArrayLike) -> Roc:
    """Return the ROC curve of scores [N] against membership [N] (true or 1: a member); a higher score says "member".

    Raises:
        ValueError: the shapes differ, a score is not finite, or members or non-members are missing.
    """
    from sklearn.metrics import auc, roc_curve

    scores, members = _checked(scores, members)
    count = int(members.sum())
    _require(0 < count < len(members), f"{count} of {len(members)} are members: a ROC curve needs both kinds")
    false_positive_rate, true_positive_rate, _ = roc_curve(members, scores, drop_intermediate=False)
    area = float(auc(false_positive_rate, true_positive_rate))
    return Roc(false_positive_rate, true_positive_rate, area, count, len(members) - count)


def auc_interval(
    scores: ArrayLike, members: ArrayLike, confidence: float = 0.95, groups: ArrayLike | None = None
) -> tuple[float, float]:
    """Compute the two-sided confidence interval of the area under the ROC curve.

    The variance is that of Hanley & McNeil, Radiology 143 (1982), with both sample sizes replaced by their mean. It is
    computed at the interval's limit, not at the estimate: Newcombe, Statistics in Medicine 25 (2006) 559-573, method 5.
    So an attack that separates the sample perfectly gets an interval too, where DeLong's has length zero.

    Scores of one group, such as a person's, may go together. Then members and non-members count as the numbers of
    independent values that they are worth at least (`independent_number`).

    Args:
        scores, members: as in `roc`.
        confidence: of the interval.
        groups: [N], the group of each score; absent: all scores are independent.

    Raises:
        ValueError: as `roc`, or the confidence is outside (0, 1).
    """
    _require(0 < confidence < 1, f"confidence = {confidence}: it lies strictly between 0 and 1")
    curve = roc(scores, members)
    from scipy.stats import norm

    z = float(norm.isf((1 - confidence) / 2))
    sizes: tuple[float, float] = curve.members, curve.non_members
    if groups is not None:
        inside, group_of = np.asarray(members).astype(np.bool_), np.asarray(groups)
        sizes = independent_number(group_of[inside]), independent_number(group_of[~inside])
    return _lower_limit(curve.auc, *sizes, z), 1 - _lower_limit(1 - curve.auc, *sizes, z)


def independent_number(groups: ArrayLike) -> float:
    """Return the number of independent values that values in groups are worth at least: (sum k)^2 / sum k^2.

    The groups have k values each. The number is exact for a mean of values that are equal within each group, and too
    small otherwise: Kish, Survey Sampling, 1965. Of single values it is their number; of groups of one size, theirs.

    Args:
        groups: [n], the group of each value.
    """
    sizes = np.unique(np.asarray(groups), return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def clopper_pearson(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the exact two-sided interval of a binomial probability: Clopper & Pearson, Biometrika 26 (1934).

    Numbers of trials that are worth fewer independent ones need not be whole: Korn & Graubard, Survey Methodology 24
    (1998) 193-201.

    Raises:
        ValueError: not 0 <= successes <= trials, no trial, or the confidence is outside (0, 1).
    """
    _require(0 <= successes <= trials > 0, f"{successes} successes of {trials} trials: give 0 <= successes <= trials")
    _require(0 < confidence < 1, f"confidence = {confidence}: it lies strictly between 0 and 1")
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes > 0 else 0.0
    high = float(beta.isf(tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def one_run_epsilon(correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """Compute a lower bound on epsilon, given delta, from guesses of the canaries' inclusions in one training run.

    With v correct of r guesses among m canaries, let W ~ Binomial(r, e^eps / (1 + e^eps)) and f(v) = P[W >= v]. Theorem
    5.2 of Steinke, Nasr, Jagielski (NeurIPS 2023) says of a mechanism that is (eps, delta)-DP with respect to each
    canary

        P[at least v correct] <= f(v) + 2 m delta max_{1 <= i <= v} (f(v - i) - f(v)) / i .

    The bound is the largest eps at which the right side is at most 1 - confidence. So an (eps, delta)-DP mechanism gets
    a bound above eps with probability at most 1 - confidence. At delta = 0 it is the logit of the one-sided
    Clopper-Pearson limit of the accuracy.

    Args:
        correct: v, the number of right guesses.
        guesses: r, the number of guesses; fixed before looking at which are right.
        canaries: m, the number of canaries that were included with probability 1/2, those not guessed among them.
        delta: the delta of the (epsilon, delta) that is tested.
        confidence: at least a half.

    Returns:
        The bound in nats; 0 if the guesses show nothing.

    Raises:
        ValueError: not 0 <= correct <= guesses <= canaries, or delta or confidence out of range.
    """
    _require(
        0 <= correct <= guesses <= canaries,
        f"{correct} correct of {guesses} guesses among {canaries} canaries: give correct <= guesses <= canaries",
    )
    _require(0 <= delta <= 1, f"delta = {delta}: it lies in [0, 1]")
    _require(0.5 <= confidence < 1, f"confidence = {confidence}: it lies in [0.5, 1)")
    if correct == 0:
        return 0.0
    # Everything is in terms of wrong guesses: their rate e^-eps / (1 + e^-eps) keeps its digits when the accuracy
    # rounds to 1.
    wrong, significance = guesses - correct, 1 - confidence
    pure = -float(logit(betaincinv(wrong + 1, correct, confidence)))  # the bound at delta = 0; delta only lowers it
    if delta == 0 or pure <= 0:
        return max(pure, 0.0)
    if _p_value(wrong, guesses, canaries, 0.0, delta) > significance:
        return 0.0
    low, high = 0.0, pure
    for _ in range(40):
        middle = (low + high) / 2
        refuted = _p_value(wrong, guesses, canaries, middle, delta) <= significance
        low, high = (middle, high) if refuted else (low, middle)
    return low


@dataclass(frozen=True)
class OneRun:
    """An audit by one training run.

    Attributes:
        epsilon: lower bound in nats, 0 if nothing is shown.
        correct: number of right guesses.
        guesses: number of canaries that were guessed; for the others the adversary abstained.
        canaries: number of canaries that were included with probability 1/2.
    """

    epsilon: float
    correct: int
    guesses: int
    canaries: int


def best_guesses(
    scores: ArrayLike,
    included: ArrayLike,
    delta: float,
    confidence: float,
    generator: np.random.Generator,
) -> OneRun:
    """Compute the best lower bound on epsilon over several numbers of guesses, with a Bonferroni correction.

    1. Sort canaries by score; ties in the generator's order, which is independent of inclusion.
    2. Take numbers of guesses from a list that depends on m alone (`numbers_of_guesses`). For each, the adversary says
       "in" of the half with the highest scores, "out" of the half with the lowest, and abstains on the rest.
    3. Compute `one_run_epsilon` for each, at confidence 1 - (1 - confidence) / n, n the length of the list. Return the
       largest, the first on a draw.

    Theorem 5.2 holds for a number of guesses that was fixed in advance. The best of n bounds, chosen after looking, is
    too high as soon as any of the n is, up to n times as often as one. At the corrected confidence, all n hold together
    with the confidence that was asked for.

    Args:
        scores: [m], higher if the adversary believes that the canary was included.
        included: [m], true or 1 if it was.
        delta: as in `one_run_epsilon`.
        confidence: of the returned bound.
        generator: orders ties.

    Raises:
        ValueError: the shapes differ, a score is not finite, fewer than two canaries, or delta or confidence out of
            range.
    """
    scores, included = _checked(scores, included)
    canaries = len(scores)
    _require(canaries >= 2, f"{canaries} canaries: at least two are needed, one to call in and one to call out")
    _require(0 < confidence < 1, f"confidence = {confidence}: it lies strictly between 0 and 1")
    order = generator.permutation(canaries)
    ascending = included[order[np.argsort(scores[order], kind="stable")]]
    numbers = numbers_of_guesses(canaries)
    corrected = 1 - (1 - confidence) / len(numbers)
    runs = []
    for guesses in numbers:
        half = guesses // 2
        correct = int(ascending[-half:].sum() + (~ascending[:half]).sum())
        epsilon = one_run_epsilon(correct, guesses, canaries, delta, corrected)
        runs.append(OneRun(epsilon, correct, guesses, canaries))
    return max(runs, key=lambda run: run.epsilon)


def numbers_of_guesses(canaries: int) -> list[int]:
    """Return the numbers that `best_guesses` tries.

    They are all canaries, a half, a quarter, ... 1/128, each even, none but the first below 8.
    """
    numbers = [2 * (canaries // 2 ** (halving + 1)) for halving in range(8)]
    return numbers[:1] + [number for number in numbers[1:] if number >= 8]


def most_shown(canaries: int, delta: float, confidence: float) -> float:
    """Return the largest bound that `best_guesses` can give: the one of an attack that is right about every canary."""
    numbers = numbers_of_guesses(canaries)
    corrected = 1 - (1 - confidence) / len(numbers)
    return max(one_run_epsilon(guesses, guesses, canaries, delta, corrected) for guesses in numbers)


@lru_cache(maxsize=256)
def canaries_to_contradict(epsilon: float, delta: float, confidence: float) -> int | None:
    """Return how many canaries an audit needs to show more than a claimed epsilon, if every guess is right.

    Without delta the number is known: the tail of no wrong guess among m must reach the significance. With delta more
    are needed, as Theorem 5.2 gives 2 m delta away, and beyond some m no number helps. So the search goes up from there
    in steps of a tenth, and then back to the first even number of the last step.

    Args:
        epsilon: the claim.
        delta: at which it is made.
        confidence: of the bound that `best_guesses` returns.

    Returns:
        An even number; None if no number up to `MOST_CANARIES` suffices.
    """

    def suffices(canaries: int) -> bool:
        numbers = numbers_of_guesses(canaries)
        significance = (1 - confidence) / len(numbers)
        return any(_p_value(0, guesses, canaries, epsilon, delta) < significance for guesses in numbers)

    wrong = float(expit(-epsilon))
    if wrong == 0:
        return None
    least = math.log(1 - confidence) / math.log1p(-wrong)  # at least, as a correction only adds to it
    if least > MOST_CANARIES:
        return None
    low = high = max(2, 2 * math.floor(least / 2))
    # Where one more number of guesses is tried, the correction jumps: the last even number before that is looked at.
    jumps = {2**power - 2 for power in range(4, 11)}
    while not suffices(high):
        step = 2 * math.ceil(0.55 * high + 0.5)
        low, high = high, min([jump for jump in jumps if high < jump < step] or [step])
        if high > MOST_CANARIES:
            return None
    between = range(low, high + 2, 2)
    return between[bisect_left(between, True, key=suffices)]


def _p_value(wrong: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return the right side of Theorem 5.2, uncapped, in terms of wrong guesses.

    With E = r - W ~ Binomial(r, e^-eps / (1 + e^-eps)), (f(v - i) - f(v)) / i is P[w < E <= w + i] / i: the mean of E's
    probabilities over the i values above w. These rise to the mode and fall after it. So the mean rises until it meets
    the next probability, and falls after it. The best i is therefore found by bisection, not by a sum over all i.
    """
    from scipy.stats import binom

    rate = float(expit(-epsilon))
    tail = float(binom.cdf(wrong, guesses, rate))

    def mean(i: int) -> float:
        return (float(binom.cdf(wrong + i, guesses, rate)) - tail) / i

    first = max(1, math.floor((guesses + 1) * rate) - wrong)  # up to the mode the mean rises
    beyond = range(first, guesses - wrong)
    best = first + bisect_left(beyond, True, key=lambda i: binom.pmf(wrong + i + 1, guesses, rate) <= mean(i))
    return tail + 2 * canaries * delta * mean(best)


def _lower_limit(auc: float, members: float, non_members: float, z: float) -> float:
    """Return the area below `auc` that lies z of its own standard errors from it."""
    weight = (members + non_members) / 2 - 1

    def gap(area: float) -> float:
        shape = 1 + weight * ((1 - area) / (2 - area) + area / (1 + area))
        return auc - area - z * math.sqrt(area * (1 - area) * shape / (members * non_members))

    # At an area of exactly 1 the standard error is 0 too; the limit is the other root.
    return float(brentq(gap, 0.0, min(auc, 1 - 1e-12))) if auc > 0 else 0.0


def _checked(scores: ArrayLike, members: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores, flags = np.asarray(scores, dtype=np.float64), np.asarray(members)
    _require(
        scores.ndim == 1 and scores.shape == flags.shape,
        f"scores {list(scores.shape)} and members {list(flags.shape)}: give two vectors of one length",
    )
    for index in np.flatnonzero(~np.isfinite(scores))[:1]:
        raise ValueError(f"scores[{index}] = {scores[index]}: every score must be finite")
    _require(bool(np.isin(flags, (0, 1)).all()), "membership is true or false, 1 or 0")
    return scores, flags.astype(np.bool_)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
