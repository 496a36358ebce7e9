"""Cosines and sines of what both servers know, by integers alone, so that two machines never differ.

Tables are of integers whose entries are never so close to a half that two machines could round them differently.
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
    """Integers divided by 2^shift and rounded, halves upwards; multiplied where the shift is negative."""
    return (integers + (1 << (shift - 1))) >> shift if shift > 0 else integers << -shift


def public_cosine_and_sine(opened: Tensor, bits: int, frequency: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi k u / 2^bits with 26 fraction bits, by integers alone; u [N] is rounded to 26 bits.

    The upper 18 bits of the angle and the lower 8 have a table each, and the two meet by the addition theorem.
    """
    turns = lowest(turns_of(opened, bits) * frequency, COARSE + FINE)
    cosine, sine = torch.empty_like(turns), torch.empty_like(turns)
    kernels.cosines_and_sines(turns.numpy(), *tables(), cosine.numpy(), sine.numpy())
    return cosine, sine


def turns_of(opened: Tensor, bits: int) -> Tensor:
    """Angles modulo 2^bits as angles of 26 bits, rounded where they have more."""
    more = bits - COARSE - FINE
    return lowest(rounded(opened, more), COARSE + FINE).contiguous()


@lru_cache(maxsize=1)
def tables() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """cos and sin of the upper and of the lower bits of an angle, with 26 fraction bits: [2, 2^18] and [2, 2^8]."""
    both = []
    for resolution, bits in ((COARSE, COARSE), (COARSE + FINE, FINE)):
        angles = 2 * np.pi * np.arange(2**bits) / 2.0**resolution
        both.append(np.rint(np.stack([np.cos(angles), np.sin(angles)]) * 2.0**TABLE).astype(np.int64))
    return both[0], both[1]


def tabulated_rotations(opened: Tensor, bits: int, precision: int) -> tuple[Tensor, Tensor]:
    """cos u and sin u of u [N], as a table and rows of it: of a whole period, or of these angles alone."""
    if worth_a_table(len(opened), bits):
        return _all_rotations(bits, precision), opened
    return rotations(opened, bits, precision), torch.arange(len(opened))


@lru_cache(maxsize=8)
def _all_rotations(bits: int, precision: int) -> Tensor:
    return narrow(rotations(torch.arange(2**bits), bits, precision))


def rotations(opened: Tensor, bits: int, precision: int) -> Tensor:
    """cos u and sin u of u [N] modulo 2^bits with `precision` fraction bits: [N, 2]."""
    return torch.stack([rounded(part, TABLE - precision) for part in public_cosine_and_sine(opened, bits, 1)], -1)
