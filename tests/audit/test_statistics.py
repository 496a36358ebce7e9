from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, mannwhitneyu, norm

from sordino.audit.statistics import (
    auc_interval,
    best_guesses,
    clopper_pearson,
    independent_number,
    numbers_of_guesses,
    one_run_epsilon,
    roc,
)

SCORED = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: len({member for _, member in pairs}) == 2
)  # few distinct scores, so that ties abound
COUNTS = st.integers(1, 120).flatmap(lambda r: st.tuples(st.integers(0, r), st.just(r), st.integers(r, 300)))
DELTAS = st.sampled_from([0.0, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0])


def split(pairs: list[tuple[int, bool]]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores, members = zip(*pairs, strict=True)
    return np.array(scores, dtype=np.float64), np.array(members)


def most_failures(trials: int, probability: float = 0.05) -> int:
    """What failures of at most the given probability exceed in one run of a thousand."""
    return int(binom.ppf(0.999, trials, probability))


# --- ROC


@given(SCORED)
def test_auc_is_the_mann_whitney_statistic(pairs: list[tuple[int, bool]]) -> None:
    scores, members = split(pairs)
    wins = mannwhitneyu(scores[members], scores[~members]).statistic
    assert roc(scores, members).auc == pytest.approx(wins / (members.sum() * (~members).sum()), abs=1e-12)


@given(SCORED)
def test_auc_and_its_interval_mirror_labels_and_scores(pairs: list[tuple[int, bool]]) -> None:
    scores, members = split(pairs)
    auc, (low, high) = roc(scores, members).auc, auc_interval(scores, members)
    assert 0 <= low <= auc <= high <= 1
    for mirrored in ((scores, ~members), (-scores, members)):
        assert roc(*mirrored).auc == pytest.approx(1 - auc, abs=1e-12)
        assert auc_interval(*mirrored) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    assert roc(np.exp(scores), members).auc == pytest.approx(auc, abs=1e-12)  # only the order counts


@given(SCORED, st.floats(0, 1))
def test_at_is_the_best_threshold_within_the_false_positive_rate(pairs: list[tuple[int, bool]], rate: float) -> None:
    scores, members = split(pairs)
    thresholds = [*scores, math.inf]
    rates = [(np.mean(scores[~members] >= t), np.mean(scores[members] >= t)) for t in thresholds]
    curve = roc(scores, members)
    for asked in (rate, 0.0, 1.0, *(false for false, _ in rates)):  # the curve's own steps belong to it
        assert curve.at(asked) == max(true for false, true in rates if false <= asked)


def test_identical_scores_give_a_half_and_separated_ones_give_one() -> None:
    generator = np.random.default_rng(0)
    members = np.arange(4000) < 2000
    standard_error = math.sqrt(4001 / (12 * 2000 * 2000))  # of the Mann-Whitney statistic under the null hypothesis
    assert abs(roc(generator.normal(size=4000), members).auc - 0.5) < 4 * standard_error
    separated = roc(members + generator.uniform(0, 0.9, size=4000), members)
    assert (separated.auc, separated.at(0.0)) == (1.0, 1.0)
    assert roc(np.zeros(4000), members).auc == 0.5


@pytest.mark.parametrize(
    ("scores", "members", "complaint"),
    [
        ([0.1, math.nan], [True, False], r"scores\[1\] = nan"),
        ([-math.inf, 1.0], [True, False], r"scores\[0\] = -inf"),
        ([0.1, 0.2], [True, True], "2 of 2 are members"),
        ([0.1, 0.2], [0, 0], "0 of 2 are members"),
        ([], [], "0 of 0 are members"),
        ([0.1, 0.2], [True], "one length"),
        ([0.1, 0.2], [-1, 1], "true or false"),
    ],
)
def test_scores_that_make_no_curve_are_refused(scores: list[float], members: list[int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        roc(scores, members)


# --- intervals


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (1, 5000), (4999, 5000)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_clopper_pearson_is_scipys_exact_interval(successes: int, trials: int, confidence: float) -> None:
    expected = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert clopper_pearson(successes, trials, confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_interval_at_a_rate_counts_members_only() -> None:
    scores = np.r_[np.arange(100), 90.5 + np.zeros(20)]
    members = np.r_[np.zeros(100, dtype=bool), np.arange(20) < 7]
    curve = roc(scores, members)
    assert curve.at(0.1) == 0.0  # the score 90.5 belongs to 13 non-members too
    assert curve.interval_at(0.1) == clopper_pearson(0, 7)
    assert curve.interval_at(0.2) == clopper_pearson(7, 7)


@pytest.mark.parametrize(
    ("distance", "share"),  # of the members' scores; the rest are as non-members'
    [(0.0, 1.0), (1.0, 1.0), (2.5, 1.0), (8.0, 0.1)],
)
def test_the_auc_interval_covers(distance: float, share: float) -> None:
    generator, trials = np.random.default_rng(3), 400
    members = np.arange(110) < 50
    truth = share * norm.cdf(distance / math.sqrt(2)) + (1 - share) / 2
    missed = 0
    for _ in range(trials):
        moved = members & (generator.random(110) < share)
        low, high = auc_interval(generator.normal(size=110) + distance * moved, members)
        missed += not low <= truth <= high
    assert missed <= most_failures(trials)


@pytest.mark.parametrize("likeness", [0.3, 1.0])
def test_the_auc_interval_of_groups_covers(likeness: float) -> None:
    """Groups have 1 to 12 scores, which share a part of their variance."""
    generator, trials, groups = np.random.default_rng(4), 400, np.repeat(np.arange(60), np.arange(60) % 12 + 1)
    members = groups < 30
    truth, missed, naively = norm.cdf(1 / math.sqrt(2)), 0, 0
    for _ in range(trials):
        common, own = generator.normal(size=60)[groups], generator.normal(size=len(groups))
        scores = math.sqrt(likeness) * common + math.sqrt(1 - likeness) * own + members
        low, high = auc_interval(scores, members, groups=groups)
        missed += not low <= truth <= high
        low, high = auc_interval(scores, members)
        naively += not low <= truth <= high
    assert missed <= most_failures(trials) < naively


def test_groups_are_worth_their_number_if_they_are_of_one_size() -> None:
    assert independent_number([4, 4, 7, 7, 1, 1]) == 3
    assert independent_number(range(9)) == 9
    assert independent_number([0] * 8 + [1] * 2) == pytest.approx(100 / 68)


def test_the_auc_interval_of_a_perfect_attack_shrinks_with_the_sample_but_has_a_length() -> None:
    lows = [auc_interval(np.arange(n), np.arange(n) >= n // 2)[0] for n in (10, 100, 1000)]
    assert lows == sorted(lows)
    assert lows[0] < 0.9 < 0.99 < lows[2] < 1
    assert auc_interval(np.arange(10), np.arange(10) >= 5)[1] == 1.0


# --- the bound from one run


def right_side(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 as it is printed, with all its sums."""
    probability = binom.pmf(np.arange(guesses + 1), guesses, 1 / (1 + math.exp(-epsilon)))
    below = probability[:correct][::-1].cumsum() / np.arange(1, correct + 1)
    return float(probability[correct:].sum() + 2 * canaries * delta * below.max(initial=0.0))


@given(COUNTS, DELTAS, st.sampled_from([0.6, 0.95, 0.999]))
def test_the_bound_is_where_the_theorem_meets_the_significance(
    counts: tuple[int, int, int], delta: float, confidence: float
) -> None:
    epsilon = one_run_epsilon(*counts, delta, confidence)
    assert epsilon >= 0
    if epsilon > 0:
        assert right_side(*counts, epsilon - 1e-9, delta) <= 1 - confidence + 1e-9
    assert right_side(*counts, epsilon + 1e-9, delta) >= 1 - confidence - 1e-9


@given(COUNTS, st.sampled_from([0.6, 0.95, 0.999]))
def test_without_delta_the_bound_is_a_binomial_limit(counts: tuple[int, int, int], confidence: float) -> None:
    correct, guesses, _ = counts
    epsilon = one_run_epsilon(*counts, 0.0, confidence)
    accuracy = binomtest(correct, guesses, alternative="greater").proportion_ci(confidence, method="exact").low
    assert epsilon == pytest.approx(max(0.0, math.log(accuracy / (1 - accuracy)) if accuracy > 0 else 0.0), abs=1e-7)
    assert one_run_epsilon(*counts, 1e-15, confidence) == pytest.approx(epsilon, abs=1e-6)  # and its limit


@given(COUNTS, DELTAS, DELTAS)
def test_the_bound_grows_with_what_was_right_and_shrinks_with_delta_and_canaries(
    counts: tuple[int, int, int], one: float, other: float
) -> None:
    correct, guesses, canaries = counts
    assume(correct < guesses)
    small, large = sorted((one, other))
    epsilon = one_run_epsilon(*counts, small)
    assert one_run_epsilon(correct + 1, guesses, canaries, small) >= epsilon
    assert one_run_epsilon(*counts, large) <= epsilon + 1e-9
    assert one_run_epsilon(correct, guesses, canaries + 50, small) <= epsilon + 1e-9
    assert one_run_epsilon(*counts, small, 0.99) <= epsilon + 1e-9


def test_known_values() -> None:
    accuracy = 0.05 ** (1 / 100)
    assert one_run_epsilon(100, 100, 100, 0.0) == pytest.approx(math.log(accuracy / (1 - accuracy)), rel=1e-12)
    # Audits published with the paper's code (codedp-cpt-models, audit_results.json): 500 canaries, delta = 1e-5.
    assert one_run_epsilon(100, 100, 500, 1e-5) == pytest.approx(3.4791953936219215, abs=1e-8)
    assert one_run_epsilon(100, 100, 500, 1e-5, 0.99) == pytest.approx(3.023197554051876, abs=1e-8)
    assert one_run_epsilon(23, 35, 500, 1e-5) == pytest.approx(0.014548719860613346, abs=1e-8)
    assert one_run_epsilon(60, 100, 500, 1e-5) == pytest.approx(0.05073561053723097, abs=1e-8)


@pytest.mark.parametrize(
    ("correct", "guesses", "delta"),
    [(0, 0, 0.0), (0, 9, 0.0), (50, 100, 0.0), (58, 100, 0.0), (4, 4, 0.0), (100, 100, 1.0)],
)
def test_nothing_shown_is_zero(correct: int, guesses: int, delta: float) -> None:
    """Fair coins do as well with probability above 0.05: 58 of 100 with 0.067, 4 of 4 with 0.0625."""
    assert one_run_epsilon(correct, guesses, 100, delta) == 0.0


def test_a_billion_guesses_keep_their_digits() -> None:
    many = 10**9
    # All correct: the accuracy's limit is 0.05^(1/r), whose distance from 1 is -log(0.05) / r to first order.
    assert one_run_epsilon(many, many, many, 0.0) == pytest.approx(math.log(many / -math.log(0.05)), abs=1e-8)
    assert 19 < one_run_epsilon(many, many, many, 1e-12) < one_run_epsilon(many, many, many, 0.0)
    # Where P[W = v - i] underflows for small i, the largest term of the theorem is far away, and still the largest.
    assert one_run_epsilon(8 * 10**5, 10**6, 10**6, 0.5) == 0.0
    # 60 % correct: the accuracy's limit is normal, 1.645 standard deviations of sqrt(0.24 / r) below.
    limit = 0.6 - norm.isf(0.05) * math.sqrt(0.24 / many)
    assert one_run_epsilon(6 * 10**8, many, many, 1e-14) == pytest.approx(math.log(limit / (1 - limit)), abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"correct": 11},
        {"correct": -1},
        {"canaries": 9},
        {"delta": -0.1},
        {"delta": 1.1},
        {"delta": math.nan},
        {"confidence": 1.0},
        {"confidence": 0.4},
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    fine = {"correct": 5, "guesses": 10, "canaries": 20, "delta": 0.0, "confidence": 0.95}
    with pytest.raises(ValueError, match="confidence|delta|canaries"):
        one_run_epsilon(**(fine | wrong))  # type: ignore[arg-type]


def fewest_correct_above(epsilon: float, guesses: int, delta: float) -> int:
    """The least number of correct guesses whose bound is above epsilon."""
    return bisect_left(range(guesses + 1), True, key=lambda v: one_run_epsilon(v, guesses, guesses, delta) > epsilon)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 5.0])
def test_randomized_response_is_covered_exactly(epsilon: float) -> None:
    """Each answer of randomized response is right with probability e^eps / (1 + e^eps), independently."""
    response, fewest = 1 / (1 + math.exp(-epsilon)), fewest_correct_above(epsilon, 1000, 0.0)
    assert binom.sf(fewest - 1, 1000, response) <= 0.05 + 1e-12
    assert binom.sf(fewest - 2, 1000, response) > 0.05  # no smaller count would do: the bound wastes nothing


@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_randomized_response_is_covered_in_simulation(epsilon: float) -> None:
    generator, trials = np.random.default_rng(6), 2000
    correct = generator.binomial(300, 1 / (1 + math.exp(-epsilon)), size=trials)
    above = sum(one_run_epsilon(int(v), 300, 300, 0.0) > epsilon for v in correct)
    assert above <= most_failures(trials)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.03), (1.0, 1e-3), (2.0, 1e-4)])
def test_mechanisms_that_fail_with_probability_delta_are_covered(epsilon: float, delta: float) -> None:
    """Two (eps, delta)-DP mechanisms: each bit laid bare with probability delta, or all bits at once."""
    guesses, response = 2000, 1 / (1 + math.exp(-epsilon))
    each = delta + (1 - delta) * response
    fewest = fewest_correct_above(epsilon, guesses, delta)
    assert binom.sf(fewest - 1, guesses, each) <= 0.05
    assert (1 - delta) * binom.sf(fewest - 1, guesses, response) + delta * (fewest <= guesses) <= 0.05


def test_the_term_in_delta_is_needed() -> None:
    """Bits laid bare with probability delta: the bound without delta is above epsilon far more often than it may be."""
    each = 0.03 + 0.97 / (1 + math.exp(-0.5))
    assert binom.sf(fewest_correct_above(0.5, 2000, 0.0) - 1, 2000, each) > 0.2


# --- the best number of guesses


def randomized_response(
    generator: np.random.Generator, canaries: int, epsilon: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    included = generator.random(canaries) < 0.5
    truthful = generator.random(canaries) < 1 / (1 + math.exp(-epsilon))
    return np.where(truthful, included, ~included).astype(np.float64), included


def test_the_numbers_of_guesses_depend_on_the_canaries_alone_and_halve() -> None:
    assert numbers_of_guesses(1024) == [1024, 512, 256, 128, 64, 32, 16, 8]
    assert numbers_of_guesses(101) == [100, 50, 24, 12]
    assert numbers_of_guesses(3) == [2]
    assert len(numbers_of_guesses(10**6)) == 8


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_the_best_of_several_bounds_is_covered_only_with_the_correction(epsilon: float) -> None:
    generator, trials, numbers = np.random.default_rng(7), 1000, 8
    corrected = uncorrected = 0
    for _ in range(trials):
        scores, included = randomized_response(generator, 1024, epsilon)
        corrected += best_guesses(scores, included, 0.0, 0.95, generator).epsilon > epsilon
        # A confidence of 1 - 8 x 0.05 gives each of the eight numbers 0.95: the same choice without the correction.
        uncorrected += best_guesses(scores, included, 0.0, 1 - numbers * 0.05, generator).epsilon > epsilon
    assert corrected <= most_failures(trials)
    assert uncorrected > 2 * most_failures(trials)


@pytest.mark.slow
def test_the_best_of_several_bounds_is_covered_with_delta() -> None:
    generator, trials, delta, epsilon = np.random.default_rng(8), 100, 1e-3, 1.0
    response = delta + (1 - delta) / (1 + math.exp(-epsilon))
    above = 0
    for _ in range(trials):
        included = generator.random(256) < 0.5
        scores = np.where(generator.random(256) < response, included, ~included).astype(np.float64)
        above += best_guesses(scores, included, delta, 0.95, generator).epsilon > epsilon
    assert above <= most_failures(trials)


def test_an_attack_that_is_sure_of_a_few_abstains_on_the_rest() -> None:
    """A quarter of the scores tell all, the others nothing: guessing the quarter shows the most."""
    generator = np.random.default_rng(9)
    included = generator.permutation(np.arange(1024) % 2 == 0)
    scores = generator.uniform(-1, 1, size=1024)
    scores[:256] = np.where(included[:256], 2.0, -2.0)
    sure = min(included[:256].sum(), (~included[:256]).sum())  # in and out are not quite even among the 256
    run = best_guesses(scores, included, 1e-6, 0.95, generator)
    assert run.canaries == 1024
    assert run.guesses in (128, 256)
    assert run.correct >= 2 * min(sure, run.guesses // 2)
    assert run.epsilon == one_run_epsilon(run.correct, run.guesses, 1024, 1e-6, 1 - 0.05 / 8)
    assert run.epsilon > 3 > one_run_epsilon(768, 1024, 1024, 1e-6)


@settings(max_examples=30)
@given(SCORED, st.integers(0, 2**32 - 1))
def test_guesses_count_what_is_right_at_both_ends(pairs: list[tuple[int, bool]], seed: int) -> None:
    scores, included = split(pairs)
    distinct = scores + np.arange(len(scores)) / 100  # no ties
    run = best_guesses(distinct, included, 0.0, 0.95, np.random.default_rng(seed))
    order = sorted(range(len(distinct)), key=lambda i: distinct[i])
    half = run.guesses // 2
    outs, ins = order[:half], order[len(order) - half :]
    assert run.correct == sum(not included[i] for i in outs) + sum(bool(included[i]) for i in ins)
    mirrored = best_guesses(-distinct, ~included, 0.0, 0.95, np.random.default_rng(seed))
    assert mirrored == run


def test_ties_are_ordered_by_chance_and_not_by_place() -> None:
    """Equal scores tell nothing, however the canaries are ordered; a sort by place would call them all right."""
    generator, trials = np.random.default_rng(10), 300
    included = np.arange(100) >= 50
    runs = [best_guesses(np.zeros(100), included, 0.0, 0.95, generator) for _ in range(trials)]
    assert sum(run.epsilon > 0 for run in runs) <= most_failures(trials)
    full = [run.correct for run in runs if run.guesses == 100]
    # The right calls of 100 are twice a hypergeometric count: mean 50, variance 4 x 50 x 0.25 x 50 / 99.
    assert len(full) > trials // 2
    assert abs(np.mean(full) - 50) < 4 * math.sqrt(50 * 50 / 99 / len(full)) + 0.5
    again = [best_guesses(np.zeros(100), included, 0.0, 0.95, np.random.default_rng(5)) for _ in range(2)]
    assert again[0] == again[1]


def test_too_few_canaries_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        best_guesses([0.3], [True], 0.0, 0.95, np.random.default_rng(0))
    assert best_guesses([0.3, 0.1], [True, False], 0.0, 0.95, np.random.default_rng(0)).correct == 2
