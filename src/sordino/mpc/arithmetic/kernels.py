"""Single passes over many integers, compiled by numba at first use. torch would make several passes of each.

On shares the sums are short and the tensors long, so memory bandwidth decides the time. All arrays are one-dimensional
or rows, without gaps. Results are written into arrays of the caller. Integers are modulo 2^64, in int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.int8]
Narrow = npt.NDArray[np.int64] | npt.NDArray[np.int32]  # a table
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

ONE, SIX, ROOM = np.uint64(1), np.uint64(6), np.uint64(64)


def compiled(kernel: Kernel) -> Kernel:
    """Compile a kernel that runs without the interpreter's lock.

    The compiled code is cached beside this file or in the user's cache, if one of the two can be written.
    """
    try:
        return cast(Kernel, numba.njit(nogil=True, cache=True)(kernel))
    except RuntimeError:  # numba has no folder to write to
        return cast(Kernel, numba.njit(nogil=True)(kernel))


@compiled
def pack(
    shares: Integers, masks: Integers | None, times: int, shift: int, more: int, bits: int, words: Words
) -> None:  # fmt: skip
    """Pack the lowest bits of (shares times + more >> shift) - masks, 64 integers into `bits` words.

    Without masks, pack shares alone. No array is passed to a function in the loop, which would count its references.
    """
    width, low = np.uint64(bits), ~np.uint64(0) >> (ROOM - np.uint64(bits))
    changed = times != 1 or shift != 0 or more != 0
    place, word, filled = 0, np.uint64(0), np.uint64(0)
    for i in range(len(shares)):
        value = shares[i]
        if changed:
            value = value * times + more >> shift
        if masks is not None:
            value -= masks[i]
        integer = np.uint64(value) & low
        word |= integer << filled
        filled += width
        if filled >= ROOM:
            words[place] = word
            place += 1
            filled -= ROOM
            word = integer >> (width - filled) if filled else np.uint64(0)
    if filled:
        words[place] = word


@compiled
def unpack(
    shares: Integers | None, masks: Integers | None, times: int, shift: int, more: int, bits: int, words: Words,
    integers: Integers,
) -> None:  # fmt: skip
    """Unpack what `pack` packed, from 0 to 2^bits - 1. If shares and masks are given, add their difference, too."""
    width, low = np.uint64(bits), ~np.uint64(0) >> (ROOM - np.uint64(bits))
    for i in range(len(integers)):
        start = np.uint64(i) * width
        place, offset = start >> SIX, start & (ROOM - ONE)
        integer = words[place] >> offset
        if offset + width > ROOM:
            integer |= words[place + ONE] << (ROOM - offset)
        if shares is not None and masks is not None:
            integer += np.uint64((shares[i] * times + more >> shift) - masks[i])
        integers[i] = np.int64(integer & low)


@compiled
def digits(integers: Integers, places: Bytes) -> None:
    """Write the D lowest digits of eight bits, from -128 to 127, of integers [I, J] to places [I, D, J]."""
    for i in range(integers.shape[0]):
        for j in range(integers.shape[1]):
            rest = integers[i, j]
            for place in range(places.shape[1]):
                digit = np.int8(rest)
                places[i, place, j] = digit
                rest = (rest - digit) >> 8


@compiled
def carry(sums: npt.NDArray[np.int32], integers: Integers) -> None:
    """Invert `digits` for sums [D, I, K], which may be larger than digits, to integers [I, K]."""
    for i in range(integers.shape[0]):
        for k in range(integers.shape[1]):
            total = np.int64(0)
            for place in range(sums.shape[0]):
                total += np.int64(sums[place, i, k]) << (8 * place)
            integers[i, k] = total


@compiled
def add_products(
    table: Narrow, rows: Integers, factors: Integers, constant: int, shift: int, low: int, totals: Integers
) -> None:
    """Add (table[rows[i]] factors[i], entry by entry and summed, + constant) 2^shift to totals[i]; keep bits of low."""
    for i in range(len(rows)):
        row, total = rows[i], np.int64(constant)
        for j in range(table.shape[1]):
            total += np.int64(table[row, j]) * factors[i, j]
        totals[i] = (totals[i] + (total << shift)) & low


@compiled
def cosine_and_sine(turn: int, coarse: Integers, fine: Integers) -> tuple[int, int]:
    """Compute cos and sin of an angle with 26 fraction bits by the addition theorems, rounded, halves upwards.

    `coarse` [2, 2^18] has cosines and sines of the angle's upper 18 bits, `fine` [2, 2^8] of its lower 8.
    """
    cosine, sine = coarse[0, turn >> 8], coarse[1, turn >> 8]
    low = turn & 255
    if low == 0:
        return cosine, sine
    c, s, half = fine[0, low], fine[1, low], np.int64(1) << 25
    return (cosine * c - sine * s + half) >> 26, (sine * c + cosine * s + half) >> 26


@compiled
def cosines_and_sines(turns: Integers, coarse: Integers, fine: Integers, cosines: Integers, sines: Integers) -> None:
    """Compute `cosine_and_sine` of each angle of 26 bits."""
    for i in range(len(turns)):
        cosines[i], sines[i] = cosine_and_sine(turns[i], coarse, fine)


@compiled
def harmonics(
    turns: Integers, frequencies: Integers, coefficients: Integers, coarse: Integers, fine: Integers, cut: int,
    factors: Integers,
) -> None:  # fmt: skip
    """Compute public factors of a Fourier series, divided by 2^cut and rounded, [N, 2 K].

    See `fourier.public_factors`. Angles [N] have 26 bits. Coefficients [2, K] are a_k, then b_k.
    """
    count, whole, half = len(frequencies), (np.int64(1) << 26) - 1, np.int64(1) << (cut - 1)
    for i in range(len(turns)):
        for k in range(count):
            cosine, sine = cosine_and_sine(turns[i] * frequencies[k] & whole, coarse, fine)
            a, b = coefficients[0, k], coefficients[1, k]
            factors[i, k] = (a * cosine + b * sine + half) >> cut
            factors[i, count + k] = (b * cosine - a * sine + half) >> cut


@compiled
def rotate(table: Narrow, rows: Integers, dealt: Integers, cosines: Integers, sines: Integers) -> None:
    """Apply the addition theorems. table[rows[i]] and dealt[i] hold a cosine and a sine each; results are the sum's."""
    for i in range(len(rows)):
        cosine, sine = np.int64(table[rows[i], 0]), np.int64(table[rows[i], 1])
        cosines[i] = cosine * dealt[i, 0] - sine * dealt[i, 1]
        sines[i] = sine * dealt[i, 0] + cosine * dealt[i, 1]


@compiled
def add_up(sums: Integers, first: Integers, second: Integers, row: Integers | None, low: int) -> None:
    """Add first and second [I, J] to sums, and a row [J] if given. Keep the bits of `low`."""
    for i in range(sums.shape[0]):
        for j in range(sums.shape[1]):
            total = sums[i, j] + first[i, j] + second[i, j]
            if row is not None:
                total += row[j]
            sums[i, j] = total & low


@compiled
def triple(
    opened: tuple[Integers, ...], masks: tuple[Integers, ...], dealt: Integers,
    known: bool, low: int, shares: Integers,
) -> None:  # fmt: skip
    """Compute the local part of `linear.triple_product`.

    dealt [4, I, J] has shares of ab, ac, bc and abc. All other arrays are [I, J]. `known`: this party adds the public
    term.
    """
    for i in range(shares.shape[0]):
        for j in range(shares.shape[1]):
            u, v, w = opened[0][i, j], opened[1][i, j], opened[2][i, j]
            a, b, c = masks[0][i, j], masks[1][i, j], masks[2][i, j]
            share = v * (w * a + u * c + dealt[1, i, j]) + u * (w * b + dealt[2, i, j])
            share += w * dealt[0, i, j] + dealt[3, i, j]
            if known:
                share += u * v * w
            shares[i, j] = share & low


@compiled
def look_up(table: Narrow, rows: Integers, values: Integers) -> None:
    """Copy rows of a table as int64."""
    for i in range(len(rows)):
        row = rows[i]
        for j in range(table.shape[1]):
            values[i, j] = table[row, j]


@compiled
def lift(opened: Integers, dealt: Integers, top: int, shift: int, known: bool, shares: Integers) -> None:
    """Compute the local part of `linear.truncate_masked`, for a mask of top + 1 bits.

    dealt [2, N] has shares of r' >> shift, then of m. `known`: this party adds the public term.
    """
    half, rest = np.int64(1) << (top - 1), (np.int64(1) << top) - 1
    borrowed = np.int64(1) << (top - 1 - shift)
    for i in range(len(opened)):
        moved = opened[i] + half
        carry = (moved >> top) & 1
        share = ((1 - 2 * carry) * dealt[1, i] << (top - shift)) - dealt[0, i]
        if known:
            share += ((moved & rest) >> shift) + (carry << (top - shift)) - borrowed
        shares[i] = share
