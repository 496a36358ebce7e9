"""Fixed-point numbers in a prime field, with overflow refused before anything is shared.

A number x is rounded to the integer round(2^f x), and negative ones go to the upper half of the
field. Let Q be the largest such integer. All results of the protocol on N clients' vectors of d
entries stay below p, so none ever wraps:

- a distance with the cluster's size s cleared, || s x_i - sum of s vectors ||^2 <= N^2 d (2Q)^2. In
  every entry, s <= N vectors of at most Q are subtracted from s times another;
- the sum of these over the members of the same cluster, s^2 (sum |x_i|^2 - |sum x_i|^2 / s) <= N^3
  d Q^2;
- a sum of vectors, at most N Q in size. It is signed and so must stay below p / 2.

A factor of b bits on the distances (`reveal = "ratios"`) takes b of the field's bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sordino.errors import DataError
from sordino.secure.errors import SecureError
from sordino.secure.field import Elements, PrimeField

MOST_BITS = 40  # of the fraction; float64 has 53 bits, and shared values come from float32


@dataclass(frozen=True)
class FixedPoint:
    """Numbers of at most a stated size, in multiples of 2^-bits.

    Attributes:
        largest: the largest absolute value of a number.
        bits: bits of the fraction; may be negative.
        field: the field of the quantized numbers.
    """

    largest: float
    bits: int
    field: PrimeField

    @property
    def largest_integer(self) -> int:
        """Return Q, the largest quantized number."""
        return math.ceil(self.largest * 2.0**self.bits)

    def integers(self, values: ArrayLike, clip: bool = False) -> NDArray[np.int64]:
        """Compute round(2^bits values), ties to even, in the same shape.

        Args:
            values: numbers of any shape.
            clip: clip values to `largest` instead of refusing them.

        Raises:
            DataError: a value is not finite, or above `largest`.
        """
        numbers = np.asarray(values, dtype=np.float64)
        if not np.isfinite(numbers).all():
            raise DataError(
                "a vector that is to be shared has entries that are not finite; look for a diverged training"
            )
        top = float(np.abs(numbers).max(initial=0.0))
        if top > self.largest:
            if not clip:
                raise DataError(
                    f"a vector that is to be shared has an entry of size {top:.6g}, above the largest of "
                    f"{self.largest:.6g} that was agreed; agree on a larger one, or clip"
                )
            numbers = numbers.clip(-self.largest, self.largest)
        return np.rint(numbers * 2.0**self.bits).astype(np.int64)

    def encode(self, values: ArrayLike, clip: bool = False) -> Elements:
        """Convert values to field elements; see `integers`."""
        return self.field.elements(self.integers(values, clip))

    def decode(self, elements: Elements) -> NDArray[np.float64]:
        """Convert field elements, or sums of them, to numbers."""
        return self.field.signed(elements).astype(np.float64) * 2.0**-self.bits


def distances_bound(clients: int, width: int, largest_integer: int, factor_bits: int = 0) -> int:
    """Return an upper bound on a distance with the cluster's size cleared, times a factor."""
    return clients**2 * width * (2 * largest_integer) ** 2 << factor_bits


def spreads_bound(clients: int, width: int, largest_integer: int) -> int:
    """Return an upper bound on the sum of the distances of a cluster's members to its center."""
    return clients**3 * width * largest_integer**2


def check_distances(numbers: FixedPoint, clients: int, width: int, factor_bits: int = 0) -> None:
    """Refuse distances that could wrap.

    Args:
        numbers: the quantization of the vectors.
        clients: N.
        width: d, the vectors' length.
        factor_bits: bits of the factors on rows of distances; 0 without factors.

    Raises:
        SecureError: a distance, or with factors a sum of distances, may reach p.
    """
    largest = numbers.largest_integer
    bound = distances_bound(clients, width, largest, factor_bits)
    if factor_bits:
        bound = max(bound, spreads_bound(clients, width, largest))
    _refuse(
        bound,
        numbers,
        f"distances of {clients} clients' vectors of {width} entries",
        factor_bits,
    )


def check_sums(numbers: FixedPoint, clients: int) -> None:
    """Refuse sums of N vectors that could wrap.

    Raises:
        SecureError: a sum may reach p / 2.
    """
    _refuse(
        2 * clients * numbers.largest_integer,
        numbers,
        f"sums of {clients} clients' vectors",
        0,
    )


def bits_for_distances(
    field: PrimeField,
    largest: float,
    clients: int,
    width: int,
    factor_bits: int = 0,
    most: int = MOST_BITS,
) -> int:
    """Return the most bits of the fraction with which distances fit the field; see `check_distances`.

    Raises:
        SecureError: not even the integers 0 and 1 fit.
    """

    def fits(bits: int) -> None:
        check_distances(FixedPoint(largest, bits, field), clients, width, factor_bits)

    return _most_bits(fits, largest, most)


def bits_for_sums(field: PrimeField, largest: float, clients: int, most: int = MOST_BITS) -> int:
    """Return the most bits of the fraction with which sums fit the field; see `check_sums`.

    Raises:
        SecureError: not even the integers 0 and 1 fit.
    """
    return _most_bits(
        lambda bits: check_sums(FixedPoint(largest, bits, field), clients),
        largest,
        most,
    )


def _most_bits(check: Callable[[int], None], largest: float, most: int) -> int:
    fewest = -math.floor(math.log2(largest))  # at which the largest value is 1
    for bits in range(max(most, fewest), fewest, -1):
        try:
            check(bits)
        except SecureError:
            continue
        return bits
    check(fewest)
    return fewest


def _refuse(bound: int, numbers: FixedPoint, what: str, factor_bits: int) -> None:
    modulus = numbers.field.modulus
    if bound >= modulus:
        factor = f", times factors of {factor_bits} bits," if factor_bits else ""
        raise SecureError(
            f"{what} of at most {numbers.largest:.6g} with {numbers.bits} bits of fraction{factor} may reach "
            f"{bound:.3g}, which the field of {modulus} elements does not hold; use fewer bits, a smaller largest "
            "value (clip)" + (", or fewer bits of the factors" if factor_bits else "")
        )
