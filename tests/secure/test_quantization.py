"""Fixed-point numbers in the field, and overflow that is refused before anything is shared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sordino.errors import DataError
from sordino.secure.errors import SecureError
from sordino.secure.field import PrimeField
from sordino.secure.quantization import (
    FixedPoint,
    bits_for_distances,
    bits_for_sums,
    check_distances,
    check_sums,
    distances_bound,
    spreads_bound,
)

FIELD = PrimeField()


@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=20), st.integers(-1, 40))
def test_numbers_come_back_within_half_a_step(values: list[float], bits: int) -> None:
    numbers = FixedPoint(3.0, bits, FIELD)
    back = numbers.decode(numbers.encode(values))
    assert np.abs(back - values).max() <= 2.0 ** -(bits + 1)
    assert np.abs(numbers.integers(values)).max() <= numbers.largest_integer


def test_sums_of_elements_are_sums_of_numbers() -> None:
    numbers = FixedPoint(1.0, 20, FIELD)
    values = np.random.default_rng(0).uniform(-1, 1, (50, 7))
    total = FIELD.sum(numbers.encode(values), axis=0)
    np.testing.assert_allclose(numbers.decode(total), values.sum(0), rtol=0, atol=50 * 2.0**-21)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [False, True])
def test_what_is_not_finite_is_refused(value: float, clip: bool) -> None:
    with pytest.raises(DataError, match="not finite"):
        FixedPoint(1.0, 10, FIELD).encode([0.5, value], clip)


def test_what_is_too_large_is_refused_or_clipped() -> None:
    numbers = FixedPoint(1.0, 10, FIELD)
    with pytest.raises(DataError, match="size 1.5, above the largest of 1"):
        numbers.encode([0.5, -1.5])
    assert numbers.decode(numbers.encode([0.5, -1.5], clip=True)).tolist() == [0.5, -1.0]


@given(st.integers(2, 30), st.integers(1, 8), st.integers(1, 1000), st.integers(0, 2**32 - 1))
def test_nothing_that_is_computed_exceeds_its_bound(clients: int, width: int, largest: int, seed: int) -> None:
    """Of points at the corners, where distances are largest, and any cluster."""
    generator = np.random.default_rng(seed)
    points = generator.choice([-largest, largest], (clients, width)).astype(object)
    members = np.flatnonzero(generator.random(clients) < generator.random())
    members = members if len(members) else np.array([0])
    distances = ((len(members) * points - points[members].sum(0)) ** 2).sum(1)
    assert distances.max() <= distances_bound(clients, width, largest)
    assert distances[members].sum() <= spreads_bound(clients, width, largest)


def test_the_worst_case_comes_near_the_bound() -> None:
    """One client opposite to all others: (N - 1)^2 d (2Q)^2, so the bound is not generous beyond its one client."""
    clients, width, largest = 20, 3, 7
    points = np.full((clients, width), largest)
    points[0] = -largest
    distance = (((clients - 1) * points[0] - points[1:].sum(0)) ** 2).sum()
    assert distance * clients**2 == distances_bound(clients, width, largest) * (clients - 1) ** 2


@given(
    st.floats(1e-6, 1e6),
    st.integers(2, 1000),
    st.integers(1, 512),
    st.sampled_from([0, 8, 20]),
)
def test_the_most_bits_fit_and_one_more_does_not(largest: float, clients: int, width: int, factor_bits: int) -> None:
    try:
        bits = bits_for_distances(FIELD, largest, clients, width, factor_bits, most=200)
    except SecureError:
        bits = -int(np.floor(np.log2(largest))) - 1
    else:
        check_distances(FixedPoint(largest, bits, FIELD), clients, width, factor_bits)
    with pytest.raises(SecureError):
        check_distances(FixedPoint(largest, bits + 1, FIELD), clients, width, factor_bits)
    bits = bits_for_sums(FIELD, largest, clients, most=200)
    check_sums(FixedPoint(largest, bits, FIELD), clients)
    with pytest.raises(SecureError):
        check_sums(FixedPoint(largest, bits + 1, FIELD), clients)


def test_an_overflow_is_refused_with_the_sizes_and_the_remedy() -> None:
    with pytest.raises(SecureError, match=r"1000 clients' vectors of 64 entries of at most 2 with 20 bits.*fewer bits"):
        check_distances(FixedPoint(2.0, 20, FIELD), 1000, 64)
    with pytest.raises(SecureError, match="fewer bits of the factors"):
        check_distances(FixedPoint(2.0, 10, FIELD), 1000, 64, factor_bits=30)
    with pytest.raises(SecureError, match="sums of 10 clients"):
        check_sums(FixedPoint(2.0**20, 40, FIELD), 10)
    with pytest.raises(SecureError, match="field of 11 elements"):
        bits_for_distances(PrimeField(11), 1.0, 3, 1)
