"""Arithmetic modulo 2^64 on torch's int64, fixed point, and additive shares.

torch adds, subtracts and multiplies int64 modulo 2^64, exactly. See `products` for matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sordino.mpc.errors import OutOfRange
from sordino.randomness import system_bytes

Shape = tuple[int, ...]
WORD = 64  # bits of the ring
CHUNK = 2048  # rows of a table looked up at a time, so that they stay in the cache


def encode(values: Tensor | float, fraction: int) -> Tensor:
    """Convert numbers to fixed point: round(value 2^fraction), int64 of the same shape.

    The error is at most 2^-(fraction + 1).

    Raises:
        OutOfRange: a number is not finite, or 2^(62 - fraction) or more in size.
    """
    scaled = torch.as_tensor(values, dtype=torch.float64) * 2.0**fraction
    limit = 2.0**62
    if not bool((scaled.abs() < limit).all()):
        worst = torch.as_tensor(values, dtype=torch.float64).abs().max().item()
        raise OutOfRange(
            f"{worst:g} does not fit {fraction} fraction bits: numbers must be below {limit / 2.0**fraction:g}; "
            "scale them, or take fewer fraction bits"
        )
    return scaled.round().to(torch.int64)


def decode(integers: Tensor, fraction: int, bits: int = WORD) -> Tensor:
    """Convert integers modulo 2^bits to numbers, float64. The inverse of `encode`."""
    return centered(integers, bits).to(torch.float64) / 2.0**fraction


def centered(integers: Tensor, bits: int) -> Tensor:
    """Return the representatives of integers modulo 2^bits from -2^(bits-1) to 2^(bits-1) - 1."""
    return (integers << (WORD - bits)) >> (WORD - bits)


def low_bits(bits: int) -> int:
    """Return the integer, as an int64, whose lowest `bits` bits are set."""
    return -1 if bits == WORD else (1 << bits) - 1


def lowest(integers: Tensor, bits: int) -> Tensor:
    """Return the representatives of integers modulo 2^bits from 0 to 2^bits - 1; integers themselves for 64 bits."""
    return integers if bits == WORD else integers & low_bits(bits)


def lowest_(integers: Tensor, bits: int) -> Tensor:
    """Apply `lowest` in place."""
    return integers if bits == WORD else integers.bitwise_and_(low_bits(bits))


def narrow(integers: Tensor) -> Tensor:
    """Convert to int32 if all integers fit, which keeps tables small."""
    low, high = integers.aminmax()
    return integers.int() if int(low) >= -(2**31) and int(high) < 2**31 else integers


def for_each(given: int | Sequence[int], count: int) -> Sequence[int]:
    """Return `count` integers, from one for all or from a sequence."""
    return [given] * count if isinstance(given, int) else given


def worth_a_table(count: int, bits: int) -> bool:
    """Return true if a function of `count` integers of `bits` bits should be tabulated. Tables are kept for reuse."""
    return 1 << bits <= 16 * count


def share(integers: Tensor) -> tuple[Tensor, Tensor]:
    """Split integers into two shares. Each alone is uniform, drawn from the operating system's randomness."""
    octets = bytearray(system_bytes(8 * integers.numel()))
    first = torch.frombuffer(octets, dtype=torch.int64).reshape(integers.shape)
    return first, integers - first
