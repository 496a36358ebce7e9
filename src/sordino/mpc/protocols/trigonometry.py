"""Cosines and sines of public angles, by integers alone, so that two machines never differ.

Tables hold rounded integers. No entry is so close to a half that two machines could round it differently.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sordino.mpc.arithmetic import kernels
from sordino.mpc.arithmetic.ring import lowest, narrow, worth_a_table

TABLE = 26  # fraction bits of public cosines
COARSE, FINE = 18, 8  # bits of an angle that the two tables resolve


def rounded(integers: Tensor, shift: int) -> Tensor:
    """Divide integers by 2^shift and round, halves upwards. A negative shift multiplies."""
    return (integers + (1 << (shift - 1))) >> shift if shift > 0 else integers << -shift


def public_cosine_and_sine(opened: Tensor, bits: int, frequency: int) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of 2 pi k u / 2^bits with 26 fraction bits. u [N] is rounded to 26 bits.

    The upper 18 bits of an angle and its lower 8 have a table each. The addition theorem joins the two.
    """
    turns = lowest(turns_of(opened, bits) * frequency, COARSE + FINE)
    cosine, sine = torch.empty_like(turns), torch.empty_like(turns)
    kernels.cosines_and_sines(turns.numpy(), *tables(), cosine.numpy(), sine.numpy())
    return cosine, sine


def turns_of(opened: Tensor, bits: int) -> Tensor:
    """Convert angles modulo 2^bits to angles of 26 bits, rounded if they have more."""
    more = bits - COARSE - FINE
    return lowest(rounded(opened, more), COARSE + FINE).contiguous()


@lru_cache(maxsize=1)
def tables() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tabulate cos and sin of an angle's upper and lower bits, with 26 fraction bits: [2, 2^18] and [2, 2^8]."""
    both = []
    for resolution, bits in ((COARSE, COARSE), (COARSE + FINE, FINE)):
        angles = 2 * np.pi * np.arange(2**bits) / 2.0**resolution
        exact = np.stack([np.cos(angles), np.sin(angles)]) * 2.0**TABLE
        both.append(np.rint(exact).astype(np.int64))
    return both[0], both[1]


def tabulated_rotations(opened: Tensor, bits: int, precision: int) -> tuple[Tensor, Tensor]:
    """Return cos u and sin u of u [N] as a table and rows of it: of a whole period, or of these angles alone."""
    if worth_a_table(len(opened), bits):
        return _all_rotations(bits, precision), opened
    return rotations(opened, bits, precision), torch.arange(len(opened))


@lru_cache(maxsize=8)
def _all_rotations(bits: int, precision: int) -> Tensor:
    return narrow(rotations(torch.arange(2**bits), bits, precision))


def rotations(opened: Tensor, bits: int, precision: int) -> Tensor:
    """Compute cos u and sin u of u [N] modulo 2^bits, with `precision` fraction bits, [N, 2]."""
    pair = public_cosine_and_sine(opened, bits, 1)
    return torch.stack([rounded(part, TABLE - precision) for part in pair], -1)
