"""Arithmetic modulo a prime on numpy arrays: vectorized, and exact.

Elements are uint64 arrays with values in [0, p). The default prime is 2^61 - 1. It is large enough
for the squared distances of a thousand clients, and reducing modulo a Mersenne prime takes a shift
and an addition. Any prime below 2^32 is supported too, as a product then fits one word; tests use
small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sordino.randomness import system_bytes

Elements = NDArray[np.uint64]
Entropy = Callable[[int], bytes]  # returns as many random bytes as it is asked for

MERSENNE_61 = 2**61 - 1
LIMB = 21  # bits of a limb in `matmul`


@dataclass(frozen=True)
class PrimeField:
    """The integers modulo a prime.

    Attributes:
        modulus: p: 2^61 - 1, or a prime below 2^32.

    Raises:
        ValueError: `modulus` is neither.
    """

    modulus: int = MERSENNE_61

    def __post_init__(self) -> None:
        if self.modulus != MERSENNE_61 and not (self.modulus < 2**32 and _is_prime(self.modulus)):
            raise ValueError(f"modulus = {self.modulus}: must be 2^61 - 1 or a prime below 2^32")

    @cached_property
    def _p(self) -> np.uint64:
        return np.uint64(self.modulus)

    def elements(self, integers: ArrayLike) -> Elements:
        """Convert integers of any sign, smaller than 2^63, to elements of the same shape."""
        return (np.asarray(integers, dtype=np.int64) % np.int64(self.modulus)).astype(np.uint64)

    def signed(self, elements: Elements) -> NDArray[np.int64]:
        """Convert elements to integers from -(p-1)/2 to (p-1)/2."""
        values = elements.astype(np.int64)
        return np.where(values > self.modulus // 2, values - np.int64(self.modulus), values)

    def reduce(self, values: Elements) -> Elements:
        """Reduce any uint64 numbers modulo p."""
        if self.modulus != MERSENNE_61:
            return values % self._p
        folded = (values & self._p) + (values >> np.uint64(61))  # 2^61 = 1, so at most p + 7
        return self._less_p(folded)

    def add(self, left: Elements, right: Elements | np.uint64) -> Elements:
        """Return left + right, broadcast."""
        return self._less_p(left + right)

    def sub(self, left: Elements, right: Elements) -> Elements:
        """Return left - right, broadcast."""
        # A negative difference wraps to above 2^63, and adding p wraps it back.
        wrapped = np.subtract(left, right)
        return np.minimum(wrapped, np.add(wrapped, self._p))

    def neg(self, elements: Elements) -> Elements:
        """Return -elements."""
        return self.sub(np.zeros_like(elements), elements)

    def mul(self, left: Elements, right: Elements | np.uint64) -> Elements:
        """Return left * right, broadcast.

        For p = 2^61 - 1 the factors are cut at 31 bits. With a = a1 2^31 + a0 and the same for b,
        the product is a1 b1 2^62 + (a1 b0 + a0 b1) 2^31 + a0 b0, where 2^62 = 2. The middle term,
        below 2^62, is cut once more at 30 bits, so that its upper part is a multiple of 2^61 = 1.
        The four parts are below 2^61, 2^32, 2^61 and 2^62, so their sum fits one word.
        """
        if self.modulus != MERSENNE_61:
            return (left * right) % self._p
        low31, low30 = np.uint64(2**31 - 1), np.uint64(2**30 - 1)
        left_high, left_low = left >> np.uint64(31), left & low31
        right_high, right_low = right >> np.uint64(31), right & low31
        middle = left_high * right_low + left_low * right_high
        total = (left_high * right_high << np.uint64(1)) + (middle >> np.uint64(30))
        total = total + ((middle & low30) << np.uint64(31)) + left_low * right_low
        return self.reduce(total)

    def power(self, elements: Elements, exponent: int) -> Elements:
        """Return elements ** exponent, for an exponent of 0 or more.

        Raises:
            ValueError: the exponent is negative.
        """
        if exponent < 0:
            raise ValueError(f"exponent = {exponent}: must not be negative; take the inverse first")
        result, square = np.ones_like(elements), elements
        while exponent:
            if exponent & 1:
                result = self.mul(result, square)
            exponent >>= 1
            if exponent:
                square = self.mul(square, square)
        return result

    def inverse(self, elements: Elements) -> Elements:
        """Return 1 / elements, by one inversion and three products an element, in a tree.

        Raises:
            ZeroDivisionError: one of them is zero.
        """
        if not elements.all():
            raise ZeroDivisionError("zero has no inverse")
        return self._inverse(elements.reshape(-1)).reshape(elements.shape)

    def sum(self, elements: Elements, axis: int = -1) -> Elements:
        """Sum up to 2^31 elements along an axis."""
        low = (elements & np.uint64(2**32 - 1)).sum(axis, dtype=np.uint64)
        high = self.reduce((elements >> np.uint64(32)).sum(axis, dtype=np.uint64))
        return self.add(self.reduce(low), self.mul(high, np.uint64(2**32 % self.modulus)))

    def product(self, elements: Elements, axis: int = -1) -> Elements:
        """Multiply elements along an axis, in a tree."""
        rest = np.moveaxis(elements, axis, 0)
        while len(rest) > 1:
            half = len(rest) // 2
            rest = np.concatenate([self.mul(rest[:half], rest[half : 2 * half]), rest[2 * half :]])
        return rest[0] if len(rest) else np.ones(rest.shape[1:], np.uint64)

    def matmul(self, left: Elements, right: Elements) -> Elements:
        """Return left [..., I, J] @ right [..., J, K], by floating-point matrix products that are exact.

        Elements are cut into limbs of 21 bits, three for p = 2^61 - 1. A product of two limbs is
        below 2^42, so a sum of 2^11 of them is below 2^53. So is every partial sum, in any order in
        which the matrix product computes it. All are integers that float64 holds exactly. Longer
        sums are computed 2^11 terms at a time. At most three products of limbs belong to one power
        of 2^21, below 2^55 together. Limbs that are zero everywhere, such as those of a matrix of
        zeros and ones, cost nothing.
        """
        batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        total = np.zeros((*batch, left.shape[-2], right.shape[-1]), "u8")
        for start in range(0, left.shape[-1], 2**11):
            rows = _limbs(left[..., start : start + 2**11])
            columns = _limbs(right[..., start : start + 2**11, :])
            parts: dict[int, Elements] = {}
            for i, row in rows.items():
                for j, column in columns.items():
                    part = (row @ column).astype(np.uint64)
                    parts[i + j] = parts[i + j] + part if i + j in parts else part
            for place, part in parts.items():
                weight = np.uint64(pow(2, LIMB * place, self.modulus))
                total = self.add(total, self.mul(self.reduce(part), weight))
        return total

    def random(self, shape: int | tuple[int, ...], entropy: Entropy = system_bytes) -> Elements:
        """Draw independent, exactly uniform elements.

        Each random word gives as many bits as p has. Words of p or more are discarded and drawn
        again: a remainder of a random word would make small elements a little likelier than large
        ones.
        """
        size, bits = int(np.prod(shape)), self.modulus.bit_length()
        drawn = np.empty(0, np.uint64)
        while len(drawn) < size:
            octets = entropy(8 * (size - len(drawn)))
            words = np.frombuffer(octets, dtype="<u8") >> np.uint64(64 - bits)
            drawn = np.concatenate([drawn, words[words < self._p]])
        return drawn.reshape(shape)

    def _less_p(self, values: Elements) -> Elements:
        """Reduce values below 2p modulo p. For values below p, the difference wraps to a huge number."""
        return np.minimum(values, np.subtract(values, self._p))

    def _inverse(self, flat: Elements) -> Elements:
        if len(flat) == 0:
            return flat
        if len(flat) == 1:
            return np.array([pow(int(flat[0]), -1, self.modulus)], np.uint64)
        even, odd = flat[0 : len(flat) // 2 * 2 : 2], flat[1::2]
        pairs = self._inverse(np.concatenate([self.mul(even, odd), flat[2 * len(odd) :]]))
        result = np.empty_like(flat)
        result[0 : 2 * len(odd) : 2] = self.mul(pairs[: len(odd)], odd)
        result[1::2] = self.mul(pairs[: len(odd)], even)
        result[2 * len(odd) :] = pairs[len(odd) :]
        return result


def _limbs(elements: Elements) -> dict[int, NDArray[np.float64]]:
    """Return the limbs of 21 bits that are not zero everywhere, by place."""
    top = int(elements.max(initial=np.uint64(0))).bit_length()
    mask = np.uint64(2**LIMB - 1)
    places = range(-(-top // LIMB))
    return {i: (elements >> np.uint64(LIMB * i) & mask).astype(np.float64) for i in places}


def _is_prime(number: int) -> bool:
    """Test a number by Miller and Rabin; with these bases it is certain below 3.4 10^14 (Jaeschke, 1993)."""
    bases = (2, 3, 5, 7, 11, 13, 17)
    if number < 2 or any(number % base == 0 for base in bases):
        return number in bases
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(
        pow(base, odd, number) in (1, number - 1)
        or any(pow(base, odd << k, number) == number - 1 for k in range(1, twos))
        for base in bases
    )
