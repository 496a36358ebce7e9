"""What epsilon means: an attacker's success, groups of examples, and rounding that never flatters."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import norm

from sordino.privacy.accounting import spent
from sordino.privacy.ledger import OBSERVERS, Disclosure, Ledger, Release
from sordino.privacy.meaning import group_epsilon, percent_up, right_at_most, rounded_down

EPSILONS = st.floats(0, 30)
DELTAS = st.floats(0, 1)


def ledger(*kinds: tuple[float, float, int], delta: float = 1e-3) -> Ledger:
    releases = [
        Release("a sum", f"client {number}", "example", (z,), rate, steps, "client", OBSERVERS)
        for number, (z, rate, steps) in enumerate(kinds)
    ]
    return Ledger(tuple(releases), delta=delta, run="ab")


@given(EPSILONS, DELTAS)
def test_an_attacker_is_right_as_often_as_the_definition_allows(epsilon: float, delta: float) -> None:
    """The oracle is a linear program over the attacker's two rates, with the four inequalities of the definition."""
    grown = math.exp(-epsilon)
    # a: says "was used" where it was; b: says so where it was not. Each inequality is divided by e^epsilon.
    bounds = [[grown, -1], [-1, grown], [1, -grown], [-grown, 1]]
    limits = [delta * grown, delta * grown, 1 - grown + delta * grown, 1 - grown + delta * grown]
    solved = linprog([-0.5, 0.5], bounds, limits, bounds=[(0, 1), (0, 1)])
    assert right_at_most(epsilon, delta) == pytest.approx(0.5 - solved.fun, abs=1e-6)


@pytest.mark.parametrize("noise", [0.4, 1.0, 3.0])
def test_the_best_attack_on_gaussian_noise_stays_below(noise: float) -> None:
    """Neyman and Pearson's test of N(0, z^2) against N(1, z^2) is right with probability Phi(1 / 2z)."""
    best = norm.cdf(0.5 / noise)
    for delta in (1e-6, 1e-3, 0.1):
        epsilon = dp_accounting.get_epsilon_gaussian(noise, delta)
        assert best <= right_at_most(epsilon, delta)


def test_the_limits_of_an_attacker() -> None:
    assert right_at_most(0.0, 0.0) == 0.5
    assert right_at_most(math.inf, 0.0) == 1.0
    assert right_at_most(0.0, 1.0) == 1.0
    assert right_at_most(math.log(3), 0.0) == pytest.approx(0.75)


@given(st.floats(0, 1))
def test_a_share_in_percent_is_not_smaller_than_it_is(share: float) -> None:
    shown = float(percent_up(share).removesuffix("%")) / 100
    assert share * (1 - 1e-12) <= shown <= share + 1.01e-4


@given(st.floats(1e-9, 1e9))
def test_noise_is_not_shown_larger_than_it_is(value: float) -> None:
    assert value * 0.99 <= float(rounded_down(value)) <= value


@pytest.mark.parametrize("size", [2, 3, 10])
def test_a_group_in_one_release_is_covered(size: int) -> None:
    """n examples of one client move a sum n times as far: exactly the Gaussian mechanism with z / n."""
    stated = group_epsilon(ledger((4.0, 1.0, 1)), "example", size)
    assert dp_accounting.get_epsilon_gaussian(4.0 / size, 1e-3) <= stated < math.inf
    assert stated >= size * dp_accounting.get_epsilon_gaussian(4.0, 1e-3)


def test_a_group_over_clients_is_covered() -> None:
    """One example at each of two clients: two independent releases, each moved by one clip."""
    stated = group_epsilon(ledger((3.0, 1.0, 2), (2.0, 1.0, 1)), "example", 2)
    together = dp_accounting.get_epsilon_gaussian((2 / 9 + 1 / 4) ** -0.5, 1e-3)
    assert together <= stated


def test_a_group_under_sampling_is_bounded_by_the_definition() -> None:
    """At the small delta that was found, one example's own figures give the group's; a second accountant checks it."""
    drawn = ledger((1.5, 0.25, 6))
    stated = group_epsilon(drawn, "example", 2)
    epsilon = stated / 2
    accountant = dp_accounting.pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(1.5))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, 6))
    assert accountant.get_delta(epsilon) * (1 + math.exp(epsilon)) <= 1e-3


def test_a_group_of_one_is_the_unit_and_bare_data_have_no_bound() -> None:
    drawn = ledger((2.0, 1.0, 3))
    assert group_epsilon(drawn, "example", 1) == spent(drawn, "server", "example").epsilon
    bare = Ledger(drawn.releases, (Disclosure("a prompt", "prompt"),), delta=1e-3, run="ab")
    assert group_epsilon(bare, "example", 2) == math.inf
    assert group_epsilon(drawn, "person", 2) == math.inf
