import logging
import math
import warnings
from dataclasses import replace
from itertools import product
from typing import Any

import dp_accounting
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant

from sordino.errors import ConfigError
from sordino.privacy import accountants
from sordino.privacy.accounting import (
    check_delta,
    compose,
    default_delta,
    epsilon,
    event,
    formula_epsilon,
    noise_multiplier,
    spent,
)
from sordino.privacy.ledger import ALL_CLIENTS, OBSERVERS, Disclosure, Ledger, Release

DELTA = 1e-5


def release(z: float | tuple[float, ...], rate: float = 1.0, steps: int = 1, **changed: Any) -> Release:
    multipliers = z if isinstance(z, tuple) else (z,)
    kind = Release("gradients", "client 0", "example", multipliers, rate, steps, "client", ("server",))
    return replace(kind, **changed)


def direct(accountant: PLDAccountant | RdpAccountant, *kinds: tuple[float, float, int]) -> float:
    """dp-accounting used as its documentation says, one release after the other."""
    for z, rate, steps in kinds:
        accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(z)), steps))
    return float(accountant.get_epsilon(DELTA))


SCHEDULES = [
    [(3.5, 0.25, 80)],
    [(1.0, 0.01, 1000)],
    [(5.0, 1.0, 80)],
    [(8.0, 1.0, 20), (4.0, 1.0, 3)],
    [(4.0, 0.25, 40), (10.0, 1.0, 20), (2.0, 0.1, 30)],
    [(0.6, 0.25, 20)],
    [(50.0, 0.5, 10), (500.0, 0.01, 10)],
    [(1.0, 1e-6, 10**5)],
]


@pytest.mark.parametrize("kinds", SCHEDULES, ids=str)
def test_epsilon_is_that_of_dp_accounting(kinds: list[tuple[float, float, int]]) -> None:
    releases = [release(*each) for each in kinds]
    assert epsilon(releases, DELTA) == pytest.approx(direct(PLDAccountant(), *kinds), rel=1e-6, abs=1e-6)
    assert epsilon(releases, DELTA, "rdp") == pytest.approx(direct(RdpAccountant(), *kinds), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kinds", SCHEDULES[:5], ids=str)
def test_the_event_is_the_composition(kinds: list[tuple[float, float, int]]) -> None:
    composition = event(release(*each) for each in kinds)
    assert len(composition.events) == len(kinds)
    assert PLDAccountant().compose(composition).get_epsilon(DELTA) == pytest.approx(direct(PLDAccountant(), *kinds))
    assert PLDAccountant().compose(event([release(0.0, steps=0)])).get_epsilon(DELTA) == 0


# PRV is asked for epsilon within 0.01, which is below 2% of every epsilon here.
@pytest.mark.parametrize(("z", "rate", "steps"), list(product((1.2, 3.0), (0.05, 0.25), (100,))))
def test_epsilon_is_that_of_opacus(z: float, rate: float, steps: int) -> None:
    numerical, renyi = PRVAccountant(), RDPAccountant()
    numerical.history, renyi.history = [(z, rate, steps)], [(z, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert epsilon([release(z, rate, steps)], DELTA) == pytest.approx(
            numerical.get_epsilon(DELTA, eps_error=0.01), rel=0.02
        )
        assert epsilon([release(z, rate, steps)], DELTA, "rdp") == pytest.approx(renyi.get_epsilon(DELTA), rel=0.02)


def test_two_vectors_of_everybody_are_two_releases() -> None:
    apart = epsilon([release(3.0, steps=5), release(4.0, steps=5)], DELTA)
    assert epsilon([release((3.0, 4.0), steps=5)], DELTA) == pytest.approx(apart, rel=1e-9)
    assert epsilon([release((3.0, 4.0))], DELTA) == pytest.approx(epsilon([release(2.4)], DELTA), rel=1e-9)


@pytest.mark.parametrize("rate", [0.05, 0.25])
def test_two_vectors_of_one_sample_tell_more_than_of_two_samples(rate: float) -> None:
    """The coin is common: the chi-squared divergence is q^2 (e^2x - 1), above 2 q^2 (e^x - 1) of two coins."""
    together = epsilon([release((2.0, 2.0), rate, 20)], DELTA)
    apart = epsilon([release(2.0, rate, 20), release(2.0, rate, 20)], DELTA)
    assert apart * 1.01 < together < epsilon([release(2.0, 1.0, 20), release(2.0, 1.0, 20)], DELTA)


@settings(max_examples=8)
@given(st.floats(3.0, 50.0), st.floats(1e-3, 1.0), st.integers(1, 300), st.floats(1e-8, 1e-3))
def test_epsilon_grows_with_exposure(z: float, rate: float, steps: int, delta: float) -> None:
    # The grid rounds by about steps * 1e-8; allowed for, as some of the compared are exact and some on the grid.
    at = epsilon([release(z, rate, steps)], delta) + 1e-5
    assert epsilon([release(z, rate, steps // 2)], delta) <= at
    assert epsilon([release(z, rate / 2, steps)], delta) <= at
    assert epsilon([release(z * 1.5, rate, steps)], delta) <= at
    assert epsilon([release(z, rate, steps)], delta * 2) <= at
    assert at <= epsilon([release(z, 1.0, steps)], delta) + 1e-3


@given(st.permutations([release(3.0, 0.1, 10), release(5.0, 1.0, 4), release(7.0, 1.0, 1), release(3.0, 0.1, 2)]))
def test_order_and_grouping_do_not_matter(releases: list[Release]) -> None:
    assert epsilon(releases, DELTA) == epsilon([release(3.0, 0.1, 12), release(5.0, 1.0, 4), release(7.0)], DELTA)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_nothing_and_no_noise(accountant: Any) -> None:
    noise, silent = release(2.0, 0.1, 5), [release(0.0, 0.0, 3), release(0.0, 0.5, 0)]
    assert epsilon([], DELTA, accountant) == epsilon(silent, DELTA, accountant) == 0.0
    assert epsilon([noise, *silent], DELTA, accountant) == epsilon([noise], DELTA, accountant)
    for rate in (0.5, 1.0):
        assert epsilon([noise, release(0.0, rate)], DELTA, accountant) == math.inf
    assert epsilon([noise], 0.0, accountant) == math.inf


# What a grid of 1e-4 would take gigabytes, minutes, or an OverflowError for.
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ((0.01, 1.0, 1000), 5.0e6, 5.1e6),  # mu^2 / 2 with mu = sqrt(1000) / 0.01, plus a few mu
        ((0.01, 0.25, 1000), 1.25e6, 5.1e6),  # at least the mean loss q / (2 z^2) of each step
        ((1e-5, 0.25, 10), 1.25e10, 5.1e10),
        ((0.01, 1e-6, 1), 0.0, 1e-6),  # delta covers the chance of having been sampled
        ((0.5, 1e-6, 10**5), 0.0, 40.0),
        ((1e6, 0.5, 10), 0.0, 1e-4),
    ],
)
def test_extremes_end(kind: tuple[float, float, int], low: float, high: float) -> None:
    assert low <= epsilon([release(*kind)], DELTA) <= high
    assert epsilon([release(*kind)], DELTA, "rdp") >= low


def test_a_coarse_grid_bounds_the_fine_one() -> None:
    kinds = ((0.5, 0.01, 300),)
    fine, coarse = accountants.pld_epsilon(kinds, DELTA), accountants.pld_epsilon(kinds, DELTA, 30)
    assert fine < coarse < fine * 1.01


def test_no_warnings_leave(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        epsilon([release(1.01, 0.251, 80)], DELTA)
        epsilon([release(1.01, 0.251, 80)], DELTA, "rdp")
    assert not caplog.records


def ledger(*releases: Release, **changed: Any) -> Ledger:
    return Ledger(releases, delta=DELTA, **changed)


def test_the_worst_of_disjoint_parties_counts() -> None:
    mild, bad = release(4.0, 0.1, 10), release(4.0, 0.2, 10, party="client 1")
    told = spent(ledger(mild, bad), "server", "example")
    assert (told.party, told.epsilon) == ("client 1", epsilon([bad], DELTA))
    assert told.epsilon_rdp == epsilon([bad], DELTA, "rdp") > told.epsilon
    assert spent(ledger(*(replace(mild, party=f"client {i}") for i in (2, 1))), "server", "example").party == "client 2"
    crossed = [release(2.0, 0.1, 10), release(4.0, 0.2, 10, party="client 1")]  # neither releases more in both
    assert spent(ledger(*crossed), "server", "example").epsilon == max(epsilon([each], DELTA) for each in crossed)


def test_a_release_of_all_clients_adds_to_each() -> None:
    shared = release(8.0, 1.0, 5, party=ALL_CLIENTS)
    mild, bad = release(4.0, 0.1, 10), release(4.0, 0.2, 10, party="client 1")
    assert spent(ledger(shared, mild, bad), "server", "example").epsilon == epsilon([shared, bad], DELTA)
    alone = spent(ledger(shared), "server", "example")
    assert (alone.party, alone.epsilon) == (ALL_CLIENTS, epsilon([shared], DELTA))


def test_a_hundred_like_parties_cost_one() -> None:
    """Those that release less in every kind are not accounted at all."""
    parties = [release(3.0, 0.2 - 1e-3 * i, 20, party=f"client {i}") for i in range(100)]
    before = accountants.kinds_epsilon.cache_info().misses
    assert spent(ledger(*parties), "server", "example").party == "client 0"
    assert accountants.kinds_epsilon.cache_info().misses - before <= 2  # by each accountant once


def test_units() -> None:
    example, client = release(4.0, 0.1, 10), release(9.0, 1.0, 3, unit="client", party=ALL_CLIENTS)
    replaced = release(4.5, 1.0, 3)  # one example more changes its client's contribution, by twice the clip at most
    assert spent(ledger(example, client), "server", "example").epsilon == epsilon([example, replaced], DELTA)
    assert spent(ledger(example, client), "server", "client").epsilon == math.inf
    assert spent(ledger(client), "server", "client").epsilon == epsilon([client], DELTA)
    unseen = replace(example, observers=("public",))
    assert spent(ledger(unseen, client), "server", "client").epsilon == epsilon([client], DELTA)


@pytest.mark.parametrize(("rate", "tight"), [(1.0, True), (0.3, False)])
def test_what_client_level_noise_means_for_an_example_is_a_bound_for_replacing_a_client(
    rate: float, tight: bool
) -> None:
    client = release(4.0, rate, 5, unit="client", party=ALL_CLIENTS)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(event([client]))
    found, exact = spent(ledger(client), "server", "example").epsilon, accountant.get_epsilon(DELTA)
    assert found >= exact * (1 - 1e-4)
    if tight:
        assert found == pytest.approx(exact, rel=1e-3)


def test_observers() -> None:
    upload, mean = release(2.0, 0.1, 10), release(5.0, 0.1, 10, party=ALL_CLIENTS, observers=OBSERVERS)
    both = ledger(upload, mean)
    assert spent(both, "server", "example").epsilon == epsilon([upload, mean], DELTA)
    assert spent(both, "public", "example").epsilon == epsilon([mean], DELTA)
    nothing = spent(ledger(upload), "clients", "example")
    assert (nothing.party, nothing.epsilon, nothing.epsilon_rdp) == (None, 0.0, 0.0)


@pytest.mark.parametrize("channel", ["upload", "mean", "prompt", "images", "sizes"])
@pytest.mark.parametrize("unit", ["example", "client"])
def test_what_is_disclosed_without_noise_is_unbounded_for_who_sees_it(channel: Any, unit: Any) -> None:
    disclosure = Disclosure("something", channel)
    for observer in OBSERVERS:
        told = spent(ledger(disclosures=(disclosure,)), observer, unit)
        assert told.epsilon == told.epsilon_rdp == (math.inf if observer in disclosure.observers else 0.0)
        assert (told.party is None) == (observer not in disclosure.observers)


def test_delta_is_the_ledgers_unless_said() -> None:
    one = release(4.0, 0.1, 10)
    assert spent(ledger(one), "server", "example").delta == DELTA
    assert spent(ledger(one), "server", "example", 1e-7).epsilon == epsilon([one], 1e-7) > epsilon([one], DELTA)
    assert spent(Ledger(), "server", "client").delta == 0.0


def test_a_ledger_read_back_tells_the_same() -> None:
    written = ledger(release((5.0, 7.0), 1 / 3, 10), release(9.1, 0.7, 3, party="client 1"))
    again = Ledger.from_json(written.to_json())
    assert spent(again, "server", "example") == spent(written, "server", "example")


def test_runs_on_the_same_data_add_up() -> None:
    a, b = release(4.0, 0.1, 10), release(6.0, 1.0, 2, party="client 1")
    first = ledger(a, trusted=("server",), assumptions=("sizes",))
    second = ledger(a, b, disclosures=(Disclosure("x", "prompt"),), assumptions=("sizes",), randomness="simulation")
    second = replace(second, delta=1e-6)
    both = compose([first, second, Ledger()])
    assert both.releases == (replace(a, steps=20), b)
    assert (both.delta, both.randomness, both.trusted, both.assumptions) == (
        1e-6,
        "simulation",
        (),  # only the first trusts it
        ("sizes",),
    )
    assert both.disclosures == second.disclosures
    assert spent(both, "server", "example").epsilon == math.inf
    assert compose([first, first]).randomness == "system"
    assert spent(compose([first, first]), "server", "example").epsilon == epsilon([a, a], DELTA)
    assert compose([]) == Ledger()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(2.0, 0.25, 80), (8.0, 0.25, 80), (0.1, 0.25, 80), (2.0, 1.0, 80), (1.0, 0.01, 10**5), (20.0, 0.5, 10)],
)
def test_calibrated_noise_meets_its_target(target: float, rate: float, steps: int) -> None:
    z = noise_multiplier(target, DELTA, [(rate, steps)])
    halves = (z * math.sqrt(2), z * math.sqrt(2))
    assert target * 0.9998 < epsilon([release(z, rate, steps)], DELTA) <= target
    assert epsilon([release(halves, rate, steps)], DELTA) <= target
    assert epsilon([release(z * 0.999, rate, steps)], DELTA) > target


def test_calibrated_noise_serves_the_worst_schedule() -> None:
    schedules = [(0.1, 80), (0.25, 80), (0.25, 20), (1.0, 3)]
    each = [noise_multiplier(2.0, DELTA, [schedule]) for schedule in schedules]
    assert noise_multiplier(2.0, DELTA, schedules) == noise_multiplier(2.0, DELTA, schedules[::-1]) == max(each)
    assert len(set(each)) == 4


def test_targets_without_noise_and_without_sense() -> None:
    assert noise_multiplier(math.inf, DELTA, [(0.25, 80)]) == 0.0
    assert noise_multiplier(1.0, DELTA, []) == noise_multiplier(1.0, DELTA, [(0.0, 5), (0.5, 0)]) == 0.0
    for target, delta in [(0.0, DELTA), (-1.0, DELTA), (math.nan, DELTA), (1.0, 0.0), (1.0, 1.0)]:
        with pytest.raises(ConfigError):
            noise_multiplier(target, delta, [(0.25, 80)])


@given(st.integers(2, 10**12))
def test_default_delta_is_allowed(units: int) -> None:
    delta = default_delta(units)
    check_delta(delta, units)
    exact = min(1e-3, units**-1.1)
    assert exact * 0.909 < delta <= exact
    assert float(f"{delta:.1e}") == delta


def test_deltas() -> None:
    assert (default_delta(1), default_delta(2), default_delta(1000)) == (1e-3, 1e-3, 5.0e-4)
    for delta in (0.0, -1e-5, math.nan):
        with pytest.raises(ConfigError, match="above 0"):
            check_delta(delta, 100)


@given(st.integers(2, 10**9))
def test_the_largest_delta_that_a_message_names_is_allowed(units: int) -> None:
    with pytest.raises(ConfigError, match="publishes one") as error:
        check_delta(1 / units, units)
    named = float(error.value.allowed.split("at most ")[1].split(":")[0])
    check_delta(named, units)
    assert named > 0.9 / units


def test_the_formula_of_public_implementations_claims_too_little() -> None:
    z = math.sqrt(100 * math.log(1 / DELTA)) / 1.0
    assert formula_epsilon(z, 100, DELTA) == pytest.approx(1.0)
    assert epsilon([release(z, 1.0, 100)], DELTA) > 1.1  # one full-sample release a round, which is its best case
    assert formula_epsilon(0.0, 100, DELTA) == math.inf
