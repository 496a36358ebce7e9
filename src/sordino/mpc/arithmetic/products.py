"""Bilinear maps for products on shares, modulo 2^bits.

torch multiplies matrices of int64 modulo 2^64, exactly, at about 9 10^9 multiplications a second on a core of 2.6 GHz
with AVX-512. Processors for neural networks multiply bytes a hundred times as fast. So large products with a weight are
computed from the integers' digits of eight bits. Integers of n bits have d = ceil(n / 8) digits, and d (d + 1) / 2
products of digits matter modulo 2^n. This is exact, too. A trial at the first product decides if it is faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sordino.mpc.arithmetic import kernels
from sordino.mpc.arithmetic.ring import WORD, Shape, low_bits

DIGIT = 8  # bits
ROWS = 256  # rows multiplied at a time, so that their digits' products stay in the cache
LEAST = 16  # least size of each axis for digits; torch's product of bytes is wrong for a single column
MOST = 2**14  # bound on the terms of a sum: 8 times as many products of two digits still fit int32


def multiply(left: Tensor, right: Tensor, bits: int) -> Tensor:
    """[...], [...] -> [...], broadcast."""
    return left * right


def dot(left: Tensor, right: Tensor, bits: int) -> Tensor:
    """[..., I], [..., I] -> [...]."""
    return (left * right).sum(-1)


def matmul(left: Tensor, right: Tensor, bits: int) -> Tensor:
    """[..., I, J], [..., J, K] -> [..., I, K]."""
    return left @ right


def matmul_tn(left: Tensor, right: Tensor, bits: int) -> Tensor:
    """[..., J, I], [..., J, K] -> [..., I, K]."""
    return left.mT @ right


def matmul_nt(left: Tensor, right: Tensor, bits: int) -> Tensor:
    """[..., I, J], [..., K, J] -> [..., I, K]. By digits if these are faster and `right` is a single matrix."""
    if right.ndim == 2 and left.ndim >= 2:
        rows = left.reshape(-1, left.shape[-1])
        if min(*rows.shape, len(right)) >= LEAST and rows.shape[1] < MOST and digits_are_faster():
            return by_digits(rows, right, bits).view(*left.shape[:-1], len(right))
    return left @ right.mT


FORMS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    form.__name__: form for form in (multiply, dot, matmul, matmul_nt, matmul_tn)
}  # leading axes broadcast; results are right modulo 2^bits, higher bits are arbitrary


def shape_of(form: str, left: Shape, right: Shape) -> Shape:
    """Return the shape of the result of a bilinear map in `FORMS`."""
    if form in ("multiply", "dot"):
        shape = np.broadcast_shapes(left, right)
        return shape if form == "multiply" else shape[:-1]
    rows = left[-1 if form == "matmul_tn" else -2]
    columns = right[-2 if form == "matmul_nt" else -1]
    return (*np.broadcast_shapes(left[:-2], right[:-2]), rows, columns)


def by_digits(left: Tensor, right: Tensor, bits: int = WORD) -> Tensor:
    """Compute left [I, J] times right [K, J] transposed from digits, correct modulo 2^bits; int64 [I, K].

    An integer is a_0 + a_1 2^8 + .., with digits from -128 to 127. The digits [a_0 .. a_s] of one factor meet
    [b_s .. b_0] of the other, so one product of bytes sums all a_i b_j with i + j = s. J is below 2^14.
    """
    count, (rows, inner), columns = math.ceil(bits / DIGIT), left.shape, len(right)
    right_digits = torch.empty(columns, count, inner, dtype=torch.int8)
    kernels.digits(right.contiguous().numpy(), right_digits.numpy()[:, ::-1])
    left_digits = torch.empty(min(ROWS, rows), count, inner, dtype=torch.int8)
    sums = torch.empty(count, min(ROWS, rows), columns, dtype=torch.int32)
    result = torch.empty(rows, columns, dtype=torch.int64)
    for rows_of_left, rows_of_result in zip(left.contiguous().split(ROWS), result.split(ROWS), strict=True):
        kernels.digits(rows_of_left.numpy(), left_digits.numpy()[: len(rows_of_left)])
        for place in range(count):
            width = (place + 1) * inner  # digits [a_0 .. a_place], against the last ones [b_place .. b_0]
            last = right_digits.view(columns, -1)[:, -width:]
            torch._int_mm(
                left_digits.view(len(left_digits), -1)[: len(rows_of_left), :width],
                last.T,
                out=sums[place, : len(rows_of_left)],
            )
        kernels.carry(sums.numpy()[:, : len(rows_of_left)], rows_of_result.numpy())
    return result


@lru_cache(maxsize=1)
def digits_are_exact() -> bool:
    """Return true if this machine multiplies matrices of bytes exactly.

    A processor without VNNI adds pairs of products in 16 bits and is not exact. The largest digits show it.
    """
    left, right = _trial()
    difference = by_digits(left, right, 48) - left @ right.mT
    return bool((difference & low_bits(48) == 0).all())


@lru_cache(maxsize=1)
def digits_are_faster() -> bool:
    """Return true if `by_digits` is exact and faster than int64 on this machine, for 48 bits.

    The trial runs once and takes about 0.05 s.
    """
    if not hasattr(torch, "_int_mm") or not digits_are_exact():
        return False
    left, right = _trial()

    def seconds(work: Callable[[], Tensor]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    digits = plain = math.inf
    for _ in range(3):  # in turns, and the least of each, so that other work on the machine matters little
        digits = min(digits, seconds(lambda: by_digits(left, right, 48)))
        plain = min(plain, seconds(lambda: left @ right.mT))
    return digits < plain


def _trial() -> tuple[Tensor, Tensor]:
    """Return two matrices of 48 bits. Their first rows have the least and the largest digits."""
    source = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-(2**47), 2**47, (ROWS, 384), generator=source) for _ in range(2))
    for row, digit in enumerate((-128, 127)):
        left[row] = right[row] = sum(digit << DIGIT * place for place in range(6))
    return left, right
