"""The field against `galois` and against Python's integers."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import galois
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sordino.secure.field import MERSENNE_61, PrimeField

PRIMES = [2, 11, 97, 257, 65537, 2**31 - 1, 4294967291, MERSENNE_61]


def numbers(modulus: int) -> st.SearchStrategy[int]:
    """Elements, extremes often."""
    return st.sampled_from([0, 1, modulus - 1, modulus // 2]) | st.integers(0, modulus - 1)


@st.composite
def vectors(draw: st.DrawFn) -> tuple[PrimeField, np.ndarray, np.ndarray]:
    field = PrimeField(draw(st.sampled_from(PRIMES)))
    size = draw(st.integers(1, 9))
    lists = st.lists(numbers(field.modulus), min_size=size, max_size=size)
    return field, np.array(draw(lists), np.uint64), np.array(draw(lists), np.uint64)


@given(vectors())
def test_arithmetic_is_that_of_integers_modulo_p(case: tuple[PrimeField, np.ndarray, np.ndarray]) -> None:
    field, left, right = case
    p = field.modulus
    pairs = list(zip(left.tolist(), right.tolist(), strict=True))
    assert field.add(left, right).tolist() == [(a + b) % p for a, b in pairs]
    assert field.sub(left, right).tolist() == [(a - b) % p for a, b in pairs]
    assert field.mul(left, right).tolist() == [a * b % p for a, b in pairs]
    assert field.neg(left).tolist() == [-a % p for a in left.tolist()]
    assert int(field.sum(left)) == sum(left.tolist()) % p
    assert int(field.product(left)) == int(np.prod(left.astype(object))) % p
    for exponent in (0, 1, 5, p - 2):
        assert field.power(left, exponent).tolist() == [pow(a, exponent, p) for a in left.tolist()]


@given(vectors())
def test_inverses_multiply_to_one(case: tuple[PrimeField, np.ndarray, np.ndarray]) -> None:
    field, left, _ = case
    left = np.maximum(left, np.uint64(1))
    assert (field.mul(left, field.inverse(left)) == 1).all()
    assert field.inverse(left[None]).shape == (1, len(left))
    with pytest.raises(ZeroDivisionError):
        field.inverse(np.append(left, np.uint64(0)))


@pytest.mark.parametrize("modulus", [11, 97, 257, MERSENNE_61])
def test_agrees_with_galois(modulus: int) -> None:
    field, oracle = PrimeField(modulus), galois.GF(modulus)
    left, right = field.random((5, 7)), field.random((5, 7))
    left[0, :2], right[0, 1:3] = modulus - 1, modulus - 1
    left[1, 0] = 0
    other = oracle(left.tolist()), oracle(right.tolist())
    assert field.add(left, right).tolist() == (other[0] + other[1]).tolist()
    assert field.sub(left, right).tolist() == (other[0] - other[1]).tolist()
    assert field.mul(left, right).tolist() == (other[0] * other[1]).tolist()
    assert field.neg(left).tolist() == (-other[0]).tolist()
    assert field.matmul(left, right.T).tolist() == (other[0] @ other[1].T).tolist()
    units = np.maximum(left, np.uint64(1))
    assert field.inverse(units).tolist() == (oracle(units.tolist()) ** -1).tolist()


@given(st.sampled_from(PRIMES), st.integers(1, 4), st.integers(1, 40), st.integers(1, 4), st.data())
def test_matrix_products_are_exact(modulus: int, rows: int, inner: int, columns: int, data: st.DataObject) -> None:
    field = PrimeField(modulus)
    fill = numbers(modulus)
    left = data.draw(st.lists(st.lists(fill, min_size=inner, max_size=inner), min_size=rows, max_size=rows))
    right = data.draw(st.lists(st.lists(fill, min_size=columns, max_size=columns), min_size=inner, max_size=inner))
    exact = np.array(left, object) @ np.array(right, object) % modulus
    assert field.matmul(np.array(left, np.uint64), np.array(right, np.uint64)).tolist() == exact.tolist()


@pytest.mark.parametrize("modulus", PRIMES)
@pytest.mark.parametrize("inner", [2047, 2048, 2049, 6000])
def test_long_sums_of_the_largest_elements_are_exact(modulus: int, inner: int) -> None:
    """Where a partial sum beyond 2^53 would show; limbs are at their largest for p - 1 and for 2^21 - 1 alike."""
    field = PrimeField(modulus)
    for value in (modulus - 1, min(modulus - 1, 2**42 - 1)):
        ones = np.full((1, inner), value, np.uint64)
        assert int(field.matmul(ones, ones.T)[0, 0]) == inner * value**2 % modulus
    left, right = field.random((2, inner)), field.random((inner, 2))
    exact = left.astype(object) @ right.astype(object) % modulus
    assert field.matmul(left, right).tolist() == exact.tolist()


def test_batches_of_matrices_broadcast() -> None:
    field = PrimeField(97)
    left, right = field.random((3, 1, 2, 4)), field.random((5, 4, 2))
    product = field.matmul(left, right)
    assert product.shape == (3, 5, 2, 2)
    assert product[2, 4].tolist() == field.matmul(left[2, 0], right[4]).tolist()


def test_any_word_is_reduced() -> None:
    words = np.array([0, MERSENNE_61 - 1, MERSENNE_61, MERSENNE_61 + 1, 2 * MERSENNE_61, 2**64 - 1], np.uint64)
    for modulus in PRIMES:
        assert PrimeField(modulus).reduce(words).tolist() == [word % modulus for word in words.tolist()]


@pytest.mark.parametrize("modulus", [11, 97, MERSENNE_61])
def test_signed_integers_go_and_come(modulus: int) -> None:
    field, half = PrimeField(modulus), modulus // 2
    values = np.array([-half, -1, 0, 1, half])
    assert field.signed(field.elements(values)).tolist() == values.tolist()
    assert field.elements(values).tolist() == [value % modulus for value in values.tolist()]


@pytest.mark.parametrize("modulus", [0, 1, 4, 91, 561, 3215031751, 2**61 + 1, 2**89 - 1])
def test_what_is_no_prime_or_too_large_is_refused(modulus: int) -> None:
    with pytest.raises(ValueError, match=f"modulus = {modulus}"):
        PrimeField(modulus)


# Random elements


def words(*values: int) -> Iterator[bytes]:
    for value in values:
        yield struct.pack("<Q", value)


def test_words_outside_the_field_are_drawn_again_and_not_folded() -> None:
    """Of four bits, 11 to 15 are thrown away; as remainders they would have made 0 to 4 likelier."""
    shift = 60
    source = words(*(value << shift for value in (12, 15, 11, 10, 0, 13, 7)))
    drawn = PrimeField(11).random(3, lambda count: b"".join(next(source) for _ in range(count // 8)))
    assert drawn.tolist() == [10, 0, 7]
    rejected = words(2**64 - 1, 5 << 3)  # the first is p itself, the only word of 61 bits outside the field
    assert PrimeField().random(1, lambda count: next(rejected)).tolist() == [5]


@pytest.mark.parametrize("modulus", [11, 97])
def test_random_elements_are_uniform(modulus: int) -> None:
    drawn = PrimeField(modulus).random((100, 200))
    counts = np.bincount(drawn.ravel().astype(int), minlength=modulus)
    assert len(counts) == modulus
    assert stats.chisquare(counts).pvalue > 1e-9


def test_random_elements_fill_the_large_field() -> None:
    drawn = PrimeField().random(20_000)
    assert drawn.max() < MERSENNE_61
    assert len(np.unique(drawn)) == 20_000
    assert stats.kstest(drawn.astype(float) / MERSENNE_61, "uniform").pvalue > 1e-9
