"""The result of an attack that scores candidates: its ROC curve, and the epsilon that it contradicts.

A bound on epsilon needs coins that the attacker does not know. Here a coin is tossed for every pair of candidates of
one client and class: which of the two was trained on, and which one tests. If the training and test images of a class
were split at random, all these coins are fair and independent. Two data sets that differ in one coin differ in one
example that is replaced. So Steinke, Nasr, Jagielski (NeurIPS 2023), Theorem 5.2, holds for pairs in place of canaries:
see `pair_epsilon`.

Where whole persons train or test, one toss decides over all pictures of a person. These coins are not independent. An
honest release of many pictures of a person tells that the person is in it, and so each coin, far better than epsilon
allows for one. Then nothing is bounded, and intervals count persons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sordino.audit.statistics import (
    Roc,
    auc_interval,
    independent_number,
    numbers_of_guesses,
    one_run_epsilon,
    roc,
)
from sordino.audit.subject import Subject
from sordino.privacy import accounting
from sordino.privacy.ledger import OBSERVERS, Ledger
from sordino.randomness import derive_key, generator

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]

CONFIDENCE = 0.95  # of all bounds of one audit's attack together
# Claim and bound are stated at this delta, or at the run's if that is smaller. Pairs give delta away as canaries do.
DELTA = 1e-5
FALSE_POSITIVE_RATES = (0.001, 0.01)
CURVE_POINTS = 200


@dataclass(frozen=True)
class Point:
    """The share of members found at a false positive rate, with the 95% Clopper-Pearson interval."""

    false_positive_rate: float
    true_positive_rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Attack:
    """The result of an attack.

    Attributes:
        auc: area under the ROC curve; a half is guessing.
        auc_interval: its 95% interval, for candidates, or persons if these are known, that are independent given the
            prompts.
        found: shares of members found at the false positive rates of 0.1% and 1%. With fewer non-members than the
            rate's reciprocal, these are the members that outscore every non-member.
        curve: (false positive rate, true positive rate), at most 200 points of the ROC curve, ends included.
        epsilon: lower bound on an example's epsilon, 0 if nothing is shown; None if its premise does not hold.
        refuted: true if the bound is above the run's claim.
        no_bound: why there is no bound; None if there is one.
    """

    auc: float
    auc_interval: tuple[float, float]
    found: tuple[Point, ...]
    curve: tuple[tuple[float, float], ...]
    epsilon: float | None = None
    refuted: bool = False
    no_bound: str | None = None

    @classmethod
    def of(cls, scores: Floats, member: Flags, persons: Indices | None = None) -> Attack:
        """Return the result of scores, without a bound.

        Args:
            scores: [n], higher if the attack says "member".
            member: [n], the truth.
            persons: [n], whose each candidate is; None if unknown.
        """
        curve = roc(scores, member)
        worth = None if persons is None else independent_number(persons[member])
        points = tuple(
            Point(rate, curve.at(rate), *curve.interval_at(rate, independent=worth)) for rate in FALSE_POSITIVE_RATES
        )
        return cls(curve.auc, auc_interval(scores, member, groups=persons), points, _thinned(curve))


@dataclass(frozen=True)
class Claim:
    """A run's promise to an example, and if pairs of candidates can contradict it.

    Attributes:
        epsilon: the claim against the observer who attacks; None if it is infinite, or if the observer is trusted.
        delta: at which the claim is made, no more than the run's.
        not_exchangeable: why pairs can contradict nothing; None if they can. See `Subject`.
    """

    epsilon: float | None
    delta: float
    not_exchangeable: str | None = None

    @classmethod
    def of(cls, subject: Subject, ledger: Ledger, observer_is_server: bool = False) -> Claim:
        """Return the claim of a ledger, for the server's own observations or for those of the prompts."""
        covered = not (observer_is_server and "server" in ledger.trusted)
        delta = DELTA if ledger.delta is None else min(ledger.delta, DELTA)
        return cls(claimed(ledger, delta) if covered else None, delta, subject.not_exchangeable)

    def judge_all(
        self, scores: Mapping[str, Floats], member: Flags, seed: int, persons: Indices | None = None
    ) -> dict[str, Attack]:
        """Return the attacks of some scores by name, with bounds that hold together; see `judge`."""
        return {
            name: self.judge(Attack.of(values, member, persons), values, seed, len(scores))
            for name, values in scores.items()
        }

    def judge(self, attack: Attack, scores: Floats, seed: int, attacks: int = 1) -> Attack:
        """Return the attack with its bound on epsilon, and if that refutes the claim; or with the reason for no bound.

        Args:
            attack: the result of the scores.
            scores: [2 m], of m members and then of their m partners, as `Candidates` has them. They must not depend on
                which is the member of any pair.
            seed: orders ties.
            attacks: the number of attacks whose best bound is looked at.
        """
        if self.not_exchangeable is not None:
            return replace(attack, no_bound=self.not_exchangeable)
        if len(scores) < 4:
            return replace(attack, no_bound="there is only one pair")
        members, others = np.split(scores, 2)
        epsilon = pair_epsilon(members - others, self.delta, 1 - (1 - CONFIDENCE) / attacks, seed)
        return replace(attack, epsilon=epsilon, refuted=self.epsilon is not None and epsilon > self.epsilon)


def claimed(ledger: Ledger, delta: float | None = None) -> float | None:
    """Return the largest epsilon of an example against an untrusted observer; None if it is infinite.

    Args:
        ledger: of the run.
        delta: replaces the ledger's.
    """
    untrusted = [observer for observer in OBSERVERS if observer not in ledger.trusted]
    largest = max(accounting.spent(ledger, observer, "example", delta).epsilon for observer in untrusted)
    return largest if np.isfinite(largest) else None


def pair_epsilon(differences: Floats, delta: float, confidence: float, seed: int) -> float:
    """Compute a lower bound on epsilon from pairs of which one, by a fair coin, was trained on.

    Of a pair, the image with the higher score is guessed to be the member. Pairs with the largest differences are
    guessed first. Numbers of guesses are those of `best_guesses`, and so is the Bonferroni correction.

    A mechanism that is (eps, delta)-DP for an example added or removed is (2 eps, (1 + e^eps) delta)-DP for one that is
    replaced. With B(d) the bound of `one_run_epsilon` at delta d, the best over numbers of guesses, the pairs
    contradict every eps for which B((1 + e^eps) delta) > 2 eps. B falls as d grows. So e_0 = B(delta) / 2 is at least
    the largest such eps, and e_1 = B((1 + e^e_0) delta) / 2 is at most that one. The function returns e_1. It exceeds
    an epsilon that holds with probability at most 1 - confidence.

    Args:
        differences: [m], the member's score minus that of the other image of its pair.
        delta: of the claim that is tested.
        confidence: of the bound.
        seed: orders ties.
    """
    pairs = len(differences)
    ties = generator(derive_key(seed, "pairs"), "ties")
    right = np.where(differences == 0, ties.random(pairs) < 0.5, differences > 0)
    shuffled = ties.permutation(pairs)
    surest = shuffled[np.argsort(-np.abs(differences[shuffled]), kind="stable")]
    numbers = numbers_of_guesses(pairs)
    corrected = 1 - (1 - confidence) / len(numbers)
    correct = {guesses: int(right[surest[:guesses]].sum()) for guesses in numbers}

    def bound(at: float) -> float:
        """Return the best bound on epsilon of an added or removed example, at a delta of a replaced one."""
        bounds = [one_run_epsilon(correct[guesses], guesses, pairs, min(at, 1.0), corrected) for guesses in numbers]
        return max(bounds) / 2

    return bound(delta * (1 + math.exp(bound(delta))))


def _thinned(curve: Roc) -> tuple[tuple[float, float], ...]:
    """Return at most `CURVE_POINTS` of a curve, its ends among them, logarithmic in the false positive rate."""
    x, y = curve.false_positive_rate, curve.true_positive_rate
    kept = np.arange(len(x))
    if len(x) > CURVE_POINTS:
        rates = np.geomspace(1 / curve.non_members, 1, CURVE_POINTS - 2)
        highest = np.searchsorted(x, [0.0, *rates], side="right") - 1  # the best threshold at each rate
        kept = np.unique([0, *highest, len(x) - 1])
    return tuple((float(x[index]), float(y[index])) for index in kept)
