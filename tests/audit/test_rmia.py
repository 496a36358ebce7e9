from __future__ import annotations

import numpy as np
import pytest

from sordino.audit.rmia import CORRECTIONS, best_correction, offline, online, rmia
from sordino.audit.statistics import roc

RNG = np.random.default_rng(1)
TARGET = np.log(RNG.uniform(0.05, 0.95, 30))
SHADOWS = np.log(RNG.uniform(0.05, 0.95, (10, 30)))
INCLUDED = RNG.permuted(np.arange(10)[:, None] % 2 == np.zeros(30), axis=0)
ONE_PROMPT = np.zeros(30, dtype=np.int64)


def means() -> tuple[np.ndarray, np.ndarray]:
    """Means of the shadows' probabilities with and without each candidate, one candidate after the other."""
    columns = [(np.exp(SHADOWS[:, x]), INCLUDED[:, x]) for x in range(30)]
    return np.array([p[chosen].mean() for p, chosen in columns]), np.array([p[~chosen].mean() for p, chosen in columns])


def test_ratios_are_those_of_the_paper() -> None:
    inside, outside = means()
    assert np.exp(online(TARGET, SHADOWS, INCLUDED)) == pytest.approx(np.exp(TARGET) / ((inside + outside) / 2))
    for a in (0.0, 0.3, 1.0):
        expected = np.exp(TARGET) / (((1 + a) * outside + 1 - a) / 2)
        assert np.exp(offline(TARGET, SHADOWS, INCLUDED, a)) == pytest.approx(expected)


def test_the_offline_attack_needs_no_shadow_with_the_candidate() -> None:
    other = np.where(INCLUDED, RNG.normal(size=SHADOWS.shape), SHADOWS)
    assert offline(TARGET, other, INCLUDED, 0.3) == pytest.approx(offline(TARGET, SHADOWS, INCLUDED, 0.3))
    assert online(TARGET, other, INCLUDED) != pytest.approx(online(TARGET, SHADOWS, INCLUDED))


def test_a_score_is_the_share_of_the_others_that_are_beaten() -> None:
    """LR(x, z) >= 1 for pairs of one prompt; the order of candidates of one prompt is that of their ratios."""
    ratios = online(TARGET, SHADOWS, INCLUDED)
    group = np.arange(30) % 3
    scores = rmia(ratios, group)
    for x in range(30):
        others = [z for z in range(30) if z != x and group[z] == group[x]]
        share = np.mean([np.exp(ratios[x] - ratios[z]) >= 1 for z in others])
        assert abs(scores[x] - share) < 0.5 / len(others)
    for prompt in range(3):
        assert (np.argsort(scores[group == prompt]) == np.argsort(ratios[group == prompt])).all()


def test_what_no_model_learned_wins_nothing() -> None:
    same = np.broadcast_to(TARGET, SHADOWS.shape)
    scores = rmia(online(TARGET, same, INCLUDED), ONE_PROMPT)
    assert len(np.unique(scores)) == 1


def test_probabilities_near_zero_and_one_keep_their_digits() -> None:
    target, shadows = np.array([-900.0, -1e-13]), np.array([[-901.0, -2e-13], [-902.0, -3e-13]])
    included = np.array([[True, True], [False, False]])
    found = online(target, shadows, included)
    assert found[0] == pytest.approx(-np.log((np.exp(-1) + np.exp(-2)) / 2))
    assert found[1] == pytest.approx(1.5e-13, rel=1e-2)
    assert np.isfinite(offline(target, shadows, included, 0.3)).all()


def test_the_correction_is_one_that_serves() -> None:
    """Members gain more where the probability without them is low: the correction changes the order, and is chosen."""
    rng = np.random.default_rng(2)
    included = rng.permuted(np.arange(12)[:, None] % 2 == np.zeros(300), axis=0)
    outside = rng.uniform(0.05, 0.95, 300)
    raised = 0.6 * outside + 0.4
    shadows = np.log(np.where(included, raised, outside) * rng.uniform(0.9, 1.0, included.shape))
    chosen = best_correction(shadows, included)
    assert chosen in CORRECTIONS

    def auc(correction: float) -> float:
        others = np.arange(12) != 11
        return roc(offline(shadows[11], shadows[others], included[others], correction), included[11]).auc

    assert auc(chosen) > 0.9
    assert auc(chosen) >= max(auc(0.0), auc(1.0)) - 0.01
