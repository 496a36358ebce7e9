from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sordino.audit.scores import Attack, Claim, pair_epsilon
from sordino.audit.statistics import numbers_of_guesses, one_run_epsilon

CERTAIN = np.linspace(1, 2, 100)
NUMBERS = len(numbers_of_guesses(100))


def test_pairs_that_are_all_told_apart_bound_half_of_what_coins_would() -> None:
    """An example that is replaced is one removed and one added."""
    found = pair_epsilon(CERTAIN, 0.0, 0.95, 1)
    by_hand = one_run_epsilon(100, 100, 100, 0.0, 1 - 0.05 / NUMBERS) / 2
    assert found == pytest.approx(by_hand, rel=1e-6)
    assert pair_epsilon(CERTAIN[:20], 0.0, 0.95, 1) < found
    assert pair_epsilon(-CERTAIN, 0.0, 0.95, 1) == 0.0


def test_delta_is_that_of_an_example_that_is_replaced() -> None:
    """The bound is one that pairs contradict at delta (1 + e^epsilon), and no larger one."""
    delta = 1e-5
    found = pair_epsilon(CERTAIN, delta, 0.95, 1)
    assert 0 < found < pair_epsilon(CERTAIN, 0.0, 0.95, 1)
    confidence = 1 - 0.05 / NUMBERS
    at = one_run_epsilon(100, 100, 100, delta * (1 + math.exp(found)), confidence) / 2
    assert at >= found - 1e-6
    assert at == pytest.approx(found, rel=0.05)


@pytest.mark.slow
def test_an_epsilon_that_holds_is_rarely_contradicted() -> None:
    """Guesses as right as (2 epsilon)-DP for a replaced example allows; at 90% confidence, one in ten may exceed it."""
    epsilon, rng = 0.5, np.random.default_rng(1)
    right = math.exp(2 * epsilon) / (1 + math.exp(2 * epsilon))
    above = 0
    for seed in range(60):
        differences = np.where(rng.random(200) < right, 1.0, -1.0) * rng.uniform(1, 1.001, 200)
        above += pair_epsilon(differences, 0.0, 0.9, seed) > epsilon
    assert above <= 13  # of 60, whose upper 0.1% at 1 in 10


@pytest.mark.parametrize(("claim", "refuted"), [(None, False), (0.1, True), (5.0, False)])
def test_a_claim_below_the_bound_is_refuted(claim: float | None, refuted: bool) -> None:
    scores = np.concatenate([CERTAIN, np.zeros(100)])
    attack = Attack.of(scores, np.arange(200) < 100)
    judged = Claim(claim, 1e-5).judge(attack, scores, 1)
    assert judged.epsilon is not None
    assert judged.epsilon > 0.5
    assert judged.refuted == refuted
    several = Claim(claim, 1e-5).judge(attack, scores, 1, attacks=4)
    assert several.epsilon is not None
    assert several.epsilon < judged.epsilon  # whoever looks at four bounds pays for it


def test_without_a_random_split_nothing_is_bounded() -> None:
    scores = np.concatenate([CERTAIN, np.zeros(100)])
    attack = Attack.of(scores, np.arange(200) < 100)
    judged = Claim(0.1, 1e-5, "nobody drew").judge(attack, scores, 1)
    assert judged == replace(attack, no_bound="nobody drew")
    assert judged.epsilon is None
    assert not judged.refuted


def test_intervals_of_persons_are_those_of_one_picture_each() -> None:
    """As many pictures of each person, all scored alike, tell nothing more than one."""
    rng = np.random.default_rng(0)
    scores, member = rng.normal(size=60) + (np.arange(60) < 30), np.arange(60) < 30
    once = Attack.of(scores, member)
    again = Attack.of(np.repeat(scores, 9), np.repeat(member, 9), np.repeat(np.arange(60), 9))
    assert again.auc_interval == pytest.approx(once.auc_interval)
    assert [(point.low, point.high) for point in again.found] == [
        pytest.approx((point.low, point.high)) for point in once.found
    ]
    unknown = Attack.of(np.repeat(scores, 9), np.repeat(member, 9))
    assert unknown.auc_interval[0] > once.auc_interval[0]
    alone = Attack.of(scores, member, np.arange(60))
    assert alone.auc_interval == once.auc_interval
