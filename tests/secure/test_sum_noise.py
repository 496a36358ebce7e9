"""Discrete noise: its distribution is exact, and what a sum is charged is what its noise is worth."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sordino.errors import DataError
from sordino.secure import SecureError
from sordino.secure.sums.charge import (
    DEVIATIONS,
    MOST_DIVERGENCE,
    charge,
    client_sensitivity,
    example_sensitivity,
    rounding_divergence,
    sum_divergence,
)
from sordino.secure.sums.discrete_gaussian import ALL_ONES, Bits, below, bernoulli_exp, discrete_gaussian
from sordino.secure.sums.local import local_sum
from sordino.secure.sums.plan import GROWTH, plan_sum
from sordino.secure.sums.setup import SumSetup, squared_norm

SESSION = "5e" * 16
FALSE_ALARM = 1e-6


def seeded(seed: int) -> Bits:
    """A source of words that always gives the same: so tests of frequencies always come out the same."""
    generator = np.random.default_rng(seed)
    return lambda count: generator.integers(0, 2**64, count, np.uint64)


def pmf(deviation: float, most: int) -> NDArray[np.float64]:
    """The discrete Gaussian's probabilities from -most to most, by its definition."""
    weights = [mpmath.exp(-mpmath.mpf(x * x) / (2 * mpmath.mpf(deviation) ** 2)) for x in range(-most, most + 1)]
    total = mpmath.fsum(weights)
    return np.array([float(weight / total) for weight in weights])


# Samples


@pytest.mark.parametrize("deviation", [1, 2, 3, 17, 60])
def test_samples_have_the_probabilities_of_the_definition(deviation: int) -> None:
    count, most = 200_000, 6 * deviation
    samples = discrete_gaussian(deviation, count, seeded(deviation))
    expected = count * pmf(deviation, 20 * deviation)[14 * deviation : -14 * deviation]
    observed = np.bincount(samples.clip(-most, most) + most, minlength=2 * most + 1)
    enough = expected >= 5
    rest = count - observed[enough].sum(), count - expected[enough].sum()
    chi = ((observed[enough] - expected[enough]) ** 2 / expected[enough]).sum()
    chi += (rest[0] - rest[1]) ** 2 / max(rest[1], 1)
    assert stats.chi2.sf(chi, enough.sum()) > FALSE_ALARM


def slow_sample(deviation: int, generator: random.Random) -> int:
    """Algorithms 1 to 3 of Canonne, Kamath and Steinke as they are printed, in fractions."""

    def coin(gamma: Fraction) -> bool:
        return generator.randrange(gamma.denominator) < gamma.numerator

    def exp_coin(gamma: Fraction) -> bool:
        while gamma > 1:
            if not exp_coin(Fraction(1)):
                return False
            gamma -= 1
        k = 1
        while coin(gamma / k):
            k += 1
        return k % 2 == 1

    t = deviation + 1  # as printed; the package takes t = s
    while True:
        u = generator.randrange(t)
        if not exp_coin(Fraction(u, t)):
            continue
        v = 0
        while exp_coin(Fraction(1)):
            v += 1
        size, negative = u + t * v, generator.randrange(2)
        if negative and not size:
            continue
        variance = Fraction(deviation) ** 2
        if exp_coin((size - variance / t) ** 2 / (2 * variance)):
            return -size if negative else size


@pytest.mark.parametrize("deviation", [1, 4])
def test_samples_are_those_of_a_slow_oracle_in_fractions(deviation: int) -> None:
    generator = random.Random(7)
    slow = Counter(slow_sample(deviation, generator) for _ in range(20_000))
    fast = Counter(discrete_gaussian(deviation, 20_000, seeded(8)).tolist())
    values = [value for value in slow.keys() | fast.keys() if slow[value] + fast[value] >= 20]
    table = np.array([[slow[value] for value in values], [fast[value] for value in values]])
    assert stats.chi2_contingency(table).pvalue > FALSE_ALARM


@pytest.mark.parametrize(
    ("numerator", "denominator"), [(0, 7), (1, 1), (1, 3), (5, 2), (9, 3), (2**53 - 1, 2**53), (3 * 2**51, 2**52)]
)
def test_coins_fall_with_the_probability_of_the_exponential(numerator: int, denominator: int) -> None:
    count = 200_000
    coins = bernoulli_exp(np.full(count, numerator, np.uint64), np.full(count, denominator, np.uint64), seeded(1))
    probability = math.exp(-numerator / denominator)
    assert stats.binomtest(int(coins.sum()), count, probability).pvalue > FALSE_ALARM


def test_words_that_would_favor_small_integers_are_drawn_again() -> None:
    """2^64 mod 3 = 1, so the last word is one too many; modulo 2^63 + 1 nearly half of all words are."""
    words = iter([[2**64 - 1, 2**64 - 2, 2**63 + 1], [2**64 - 1, 2**63 + 2], [5, 2**63]])
    limits = np.array([3, 3, 2**63 + 1], np.uint64)
    drawn = below(limits, lambda count: np.array(next(words), np.uint64)[:count])
    assert drawn.tolist() == [5 % 3, (2**64 - 2) % 3, 2**63]
    assert int(ALL_ONES) == 2**64 - 1


@pytest.mark.parametrize("deviation", [1, 1000, 2**26])
def test_moments_at_small_and_largest_deviations(deviation: int) -> None:
    """Within six standard errors; the variance of the discrete Gaussian with s = 1 is 1 within 10^-6."""
    count = 100_000
    samples = discrete_gaussian(deviation, count, seeded(3)) / deviation
    assert abs(samples.mean()) < 6 / math.sqrt(count)
    assert abs(samples.var() - 1) < 6 * math.sqrt(2 / count)
    assert abs((samples**4).mean() - 3) < 6 * math.sqrt(96 / count)


def test_equal_words_give_equal_samples_and_the_system_gives_others() -> None:
    one, same, other = (discrete_gaussian(50, 1000, seeded(seed)) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    assert (discrete_gaussian(50, 1000) != discrete_gaussian(50, 1000)).any()
    assert not discrete_gaussian(0, 10).any()


@pytest.mark.parametrize("deviation", [-1, 2**26 + 1])
def test_deviations_out_of_range_are_refused(deviation: int) -> None:
    with pytest.raises(SecureError, match=f"deviation of {deviation} steps"):
        discrete_gaussian(deviation, 1)


# What is charged


@pytest.mark.parametrize("shares", [[1, 1], [2, 2], [1, 1, 1, 1], [2, 1, 2], [2, 2, 2]])
def test_the_bound_on_a_sum_of_discrete_gaussians_holds(shares: list[int]) -> None:
    """Against the convolution of their probabilities; and of two it is not ten times too large."""
    mpmath.mp.dps = 50
    sums = {0: mpmath.mpf(1)}
    for share in shares:
        reach = range(-16 * share, 16 * share + 1)
        weights = {x: mpmath.exp(-mpmath.mpf(x * x) / (2 * share**2)) for x in reach}
        total = mpmath.fsum(weights.values())
        convolved: dict[int, mpmath.mpf] = {}
        for at, probability in sums.items():
            for x, weight in weights.items():
                convolved[at + x] = convolved.get(at + x, mpmath.mpf(0)) + probability * weight / total
        sums = convolved
    parameter = sum(share**2 for share in shares)
    one = {x: mpmath.exp(-mpmath.mpf(x * x) / (2 * parameter)) for x in range(-200, 201)}
    total = mpmath.fsum(one.values())
    reach = range(-4 * math.isqrt(parameter), 4 * math.isqrt(parameter) + 1)
    worst = max(abs(float(mpmath.log(sums[x] / (one[x] / total)))) for x in reach)
    assert worst <= sum_divergence(shares)
    if len(shares) == 2:  # a third one evens out how the sum of the first two differs
        assert sum_divergence(shares) <= 10 * worst


def test_equal_shares_have_the_bound_of_the_paper() -> None:
    s, m = 1.5, 7
    tau = 10 * sum(math.exp(-2 * math.pi**2 * s**2 * k / (k + 1)) for k in range(1, m))
    assert sum_divergence([s] * m) == pytest.approx(tau, rel=1e-9)
    assert sum_divergence([5]) == 0
    assert sum_divergence([4] * 1000) < 1e-60


@pytest.mark.parametrize("deviation", [15, 16, 40, 150])
def test_the_bound_on_a_rounded_gaussian_holds(deviation: int) -> None:
    """The discrete Gaussian against round(N(0, s^2 - 1/12)), at every integer within 14 deviations."""
    mpmath.mp.dps = 60
    spread = mpmath.sqrt(mpmath.mpf(deviation) ** 2 - mpmath.mpf(1) / 12)
    total = mpmath.fsum(
        mpmath.exp(-mpmath.mpf(x * x) / (2 * deviation**2)) for x in range(-20 * deviation, 20 * deviation + 1)
    )
    worst = mpmath.mpf(0)
    for k in range(0, DEVIATIONS * deviation + 1, 1 + deviation // 30):
        low, high = ((k + half) / (spread * mpmath.sqrt(2)) for half in (mpmath.mpf(-1) / 2, mpmath.mpf(1) / 2))
        rounded = (mpmath.erfc(low) - mpmath.erfc(high)) / 2
        discrete = mpmath.exp(-mpmath.mpf(k * k) / (2 * deviation**2)) / total
        worst = max(worst, abs(mpmath.log(discrete / rounded)))
    assert float(worst) <= rounding_divergence(deviation) <= 20 * float(worst)


def gaussian_delta(epsilon: float, z: float) -> float:
    """Of the Gaussian mechanism (Balle and Wang, 2018)."""
    above, shifted = stats.norm.cdf(np.array([1, -1]) / (2 * z) - epsilon * z)
    return float(above - math.exp(epsilon) * shifted)


@pytest.mark.parametrize("sensitivity", [100, 700, 3000])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 3.0])
def test_a_release_is_as_private_as_it_is_charged(sensitivity: int, epsilon: float) -> None:
    """Delta of the discrete mechanism in one entry, summed up, is at most that of the charge with its excess."""
    share, m = 400, 5
    cost = charge([share] * (m + 1), 1, sensitivity, 1)
    x = np.arange(-40 * share, 40 * share + 1, dtype=np.float64)
    parameter = m * share**2
    here, there = (np.exp(-((x - shift) ** 2) / (2 * parameter)) for shift in (0, sensitivity))
    normal = math.fsum(np.exp(-(np.arange(-60 * share, 60 * share + 1.0) ** 2) / (2 * parameter)))
    delta = math.fsum(np.maximum(here - math.exp(epsilon) * there, 0)) / normal
    h, f = cost.divergence, cost.failure
    bound = math.exp(h) * gaussian_delta(epsilon - 2 * h, cost.noise_multiplier) + (1 + math.exp(epsilon + h)) * f
    assert delta <= bound + 1e-13
    assert delta == pytest.approx(bound, rel=1e-3, abs=1e-13)


def test_the_charge_is_of_what_colluders_do_not_know() -> None:
    """They take off their own shares: of T survivors, those with the most."""
    cost = charge([3000, 1000, 2000, 5000], 2, 700.0, 8)
    assert cost.variance == 1000**2 + 2000**2 - 1 / 12
    assert cost.noise_multiplier == pytest.approx(math.sqrt(cost.variance) / 700, rel=1e-14)
    more = charge([3000, 1000, 2000, 5000, 1000], 2, 700.0, 8)
    assert more.noise_multiplier > cost.noise_multiplier


@pytest.mark.parametrize(
    ("deviations", "colluders", "sensitivity", "match"),
    [
        ([1000, 1000], 2, 10.0, "no noise is left"),
        ([1000, 0], 0, 10.0, "must be positive"),
        ([1000, 1000], 0, 0.0, "must be positive"),
        ([30, 30], 0, 10.0, "use a smaller step"),
        ([2, 2], 0, 10.0, "use a smaller step"),
    ],
)
def test_what_cannot_be_charged_is_refused(
    deviations: list[int], colluders: int, sensitivity: float, match: str
) -> None:
    with pytest.raises(SecureError, match=match):
        charge(deviations, colluders, sensitivity, 4)


@pytest.mark.parametrize("colluders", [0, 1, 2])
@pytest.mark.parametrize("stage", ["share", "mask", "unmask"])
def test_the_noise_that_colluders_do_not_know_has_the_variance_that_is_charged(colluders: int, stage: str) -> None:
    """In a sum that clients dropped out of, less the colluders' noise, within six standard errors."""
    n, d, gone = 9, 20_000, [2, 7]
    setup = plan_sum(
        session=SESSION, clients=n, dimension=d, clip=1.0, noise_multiplier=1.5, colluders=colluders, threshold=7
    )
    found, _ = local_sum(setup, np.zeros((n, d)), dropped={stage: gone}, bits=[seeded(client) for client in range(n)])
    assert len(found.survivors) == (n if stage == "unmask" else n - len(gone))
    known = [discrete_gaussian(int(setup.deviations[c]), d, seeded(c)) for c in found.survivors[:colluders]]
    unknown = found.total - sum(known)
    charged = setup.charge(found.survivors)
    assert abs(unknown.var() / charged.variance - 1) < 6 * math.sqrt(2 / d)
    assert charged.noise_multiplier >= 1.5 * math.sqrt((len(found.survivors) - colluders) / (7 - colluders)) * (
        1 - 1e-9
    )


# Sensitivity


def a_setup(unit: str, dimension: int, clip: float, step: float = 2.0**-6, largest: float | None = None) -> SumSetup:
    found = SumSetup(
        1, SESSION, 4, 3, 0, dimension, step, clip if largest is None else largest, unit, clip, 64, np.full(4, 50)
    )
    found.check()
    return found


numbers = st.floats(-1e3, 1e3, width=32)
vectors = st.lists(numbers, min_size=1, max_size=12).map(np.array)


@given(vectors, st.floats(0.05, 100), st.integers(-12, 2))
@settings(max_examples=300, deadline=None)
def test_a_clients_quantized_vector_is_no_longer_than_is_charged(v: np.ndarray, clip: float, power: int) -> None:
    step = min(2.0**power, 2.0 ** math.floor(math.log2(clip)))
    setup = a_setup("client", len(v), clip, step)
    quantized = setup.quantize(v)
    assert math.sqrt(squared_norm(quantized)) <= client_sensitivity(clip, step, len(v))
    assert np.abs(quantized).max() <= setup.largest_integer
    norm = float(np.linalg.norm(v))
    clipped = v if norm <= clip else v * (clip / norm)
    assert np.abs(quantized * step - clipped).max() <= step * (0.5 + 1e-9)


@given(vectors, st.integers(0, 2**32), st.floats(0.05, 100), st.floats(0.5, 2000))
@settings(max_examples=300, deadline=None)
@example(np.full(12, 0.5 * 2.0**-6), 0, 0.05, 100.0)
def test_one_example_changes_a_quantized_vector_by_no_more_than_is_charged(
    a: np.ndarray, seed: int, clip: float, largest: float
) -> None:
    setup = a_setup("example", len(a), clip, 2.0**-6, max(largest, 2.0**-6))
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=len(a))
    b = a + direction / np.linalg.norm(direction) * clip * generator.choice([0.001, 0.5, 1.0]) * (1 - 1e-9)
    change = setup.quantize(a) - setup.quantize(b)
    assert math.sqrt(squared_norm(change)) <= example_sensitivity(clip, setup.step, len(a))


def test_the_sensitivities_are_nearly_reached() -> None:
    """So neither is larger than need be: rounding alone moves a vector by half a step an entry, two by a whole one."""
    d, step = 400, 2.0**-6
    just_above = np.full(d, 0.5 * step * (1 + 1e-9))
    clip = float(np.linalg.norm(just_above))
    of_client = a_setup("client", d, clip * (1 + 1e-6), step)
    reached = math.sqrt(squared_norm(of_client.quantize(just_above))) / of_client.sensitivity
    assert 0.999 < reached <= 1
    of_example = a_setup("example", d, 1e-6, step, 1.0)
    change = of_example.quantize(just_above) - of_example.quantize(just_above * (1 - 1e-8))
    assert 0.999 < math.sqrt(squared_norm(change)) / of_example.sensitivity <= 1


def test_what_is_not_finite() -> None:
    """A client's vector counts as zero; where the example is the unit, one odd example must not zero the others."""
    odd = np.array([1.0, np.nan, 0.5])
    assert not a_setup("client", 3, 1.0).quantize(odd).any()
    assert not a_setup("client", 3, 1.0).quantize(np.array([1.0, np.inf, 0.5])).any()
    with pytest.raises(DataError, match="leave such examples out"):
        a_setup("example", 3, 1.0).quantize(odd)


def test_vectors_of_extreme_size_are_clipped_without_overflow() -> None:
    setup = a_setup("client", 3, 1.0)
    for v in ([1e308, -1e308, 1e308], [1e-320, 0.0, 0.0], [1e200, 1.0, 0.0]):
        assert squared_norm(setup.quantize(np.array(v))) <= setup.sensitivity**2
    assert setup.quantize(np.array([1e308, 0.0, 0.0])).tolist() == [64, 0, 0]


# Plans


@given(
    st.integers(3, 200),
    st.integers(1, 10**6),
    st.floats(1e-3, 1e3),
    st.floats(0.1, 30),
    st.sampled_from(["client", "example"]),
)
@settings(max_examples=100, deadline=None)
def test_a_planned_sum_is_charged_what_was_asked_for(n: int, d: int, clip: float, z: float, unit: str) -> None:
    """By the fewest survivors, colluders' noise taken off; rounding costs a thousandth at most, as does rounding up."""
    largest = 20 * clip if unit == "example" else None
    setup = plan_sum(
        session=SESSION, clients=n, dimension=d, clip=clip, unit=unit, largest=largest, noise_multiplier=z, colluders=1
    )
    fewest = setup.charge(range(setup.threshold))
    assert z <= fewest.noise_multiplier <= z * 1.002
    assert fewest.divergence <= MOST_DIVERGENCE
    assert clip <= setup.sensitivity * setup.step <= clip * (1 + GROWTH)
    assert setup.largest_sum < 2 ** (setup.ring_bits - 1)


def test_deviations_may_differ_by_client() -> None:
    setup = plan_sum(session=SESSION, clients=3, dimension=4, clip=1.0, deviations=[0.5, 0.25, 1.0], threshold=3)
    assert (setup.deviations * setup.step == np.array([0.5, 0.25, 1.0])).all()
    assert setup.charge(range(3)).variance * setup.step**2 == pytest.approx(0.5**2 + 0.25**2, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"clip": 0.0}, "clip = 0"),
        ({"clip": math.nan}, "clip = nan"),
        ({"noise_multiplier": -1.0}, "noise_multiplier = -1"),
        ({"noise_multiplier": 1e12}, "steps"),
        ({"dimension": 0}, "dimension = 0"),
        ({"session": "run 7"}, "session = 'run 7'"),
        ({"unit": "image"}, "unit = 'image'"),
        ({"unit": "example"}, "largest must be given"),
        ({"threshold": 5, "colluders": 0}, "6 or more"),
        ({"threshold": 6, "colluders": 2}, "7 or more"),
        ({"threshold": 11}, "threshold = 11"),
        ({"colluders": 10}, "colluders = 10"),
        ({"clients": 1}, "clients = 1"),
        ({"deviations": [1.0, 2.0]}, "shape"),
        ({"deviations": math.nan}, "steps"),
    ],
)
def test_plans_that_cannot_be_are_refused_by_name(changes: dict[str, object], match: str) -> None:
    numbers = {"session": SESSION, "clients": 10, "dimension": 5, "clip": 1.0, "noise_multiplier": 1.0} | changes
    with pytest.raises(SecureError, match=match):
        plan_sum(**numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"step": 0.3}, "power of two"),
        ({"step": math.inf}, "power of two"),
        ({"largest": 0.0}, "largest"),
        ({"largest": 1e300}, "largest"),
        ({"clip": 0.0}, "clip"),
        ({"ring_bits": 16}, "ring_bits = 16"),
        ({"deviations": np.full(9, 1000)}, "deviations have shape"),
        ({"deviations": np.array([0] + [1000] * 9)}, "client 0 adds no noise"),
        ({"deviations": np.full(10, -1)}, "deviations are from -1"),
        ({"deviations": np.full(10, 2**27)}, "use a larger step"),
    ],
)
def test_setups_that_do_not_fit_together_are_refused_by_name(changes: dict[str, object], match: str) -> None:
    good = plan_sum(session=SESSION, clients=10, dimension=5, clip=1.0, noise_multiplier=1.0)
    with pytest.raises(SecureError, match=match):
        replace(good, **changes).check()  # type: ignore[arg-type]
