"""Packing of integers of few bits into bytes, the form in which parties send them.

64 integers of n bits take n words of 64 bits, one after the other, little-endian and without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sordino.mpc.arithmetic import kernels
from sordino.mpc.arithmetic.ring import WORD, Shape
from sordino.mpc.errors import PartyLost

Octets = bytes | bytearray | memoryview


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that `pack` makes of `count` integers."""
    return math.ceil(count * bits / 8)


def pack(integers: Tensor, bits: int) -> Octets:
    """Pack integers modulo 2^bits into `packed_size` bytes."""
    flat = _flat(integers)
    if bits == WORD:
        return flat.tobytes()
    words = np.empty(math.ceil(flat.size * bits / WORD), np.uint64)
    kernels.pack(flat, None, 1, 0, 0, bits, words)
    return _octets(words, flat.size, bits)


def unpack(content: Octets, shape: Shape, bits: int) -> Tensor:
    """Unpack what `pack` made, as representatives from 0 to 2^bits - 1, int64 of `shape`.

    Raises:
        PartyLost: the bytes are too few or too many.
    """
    words = _words(content, math.prod(shape), bits)
    if bits == WORD:
        return torch.from_numpy(words.view(np.int64).copy()).view(shape)
    integers = torch.empty(shape, dtype=torch.int64)
    kernels.unpack(None, None, 1, 0, 0, bits, words, _flat(integers))
    return integers


def unpack_each(content: Octets, shapes: Sequence[Shape], bits: Sequence[int]) -> list[Tensor]:
    """Unpack tensors that were packed one after the other.

    Raises:
        PartyLost: the bytes are too few or too many.
    """
    sizes = [packed_size(math.prod(shape), width) for shape, width in zip(shapes, bits, strict=True)]
    parts = cut(content, sizes)
    return [unpack(part, shape, width) for part, shape, width in zip(parts, shapes, bits, strict=True)]


def cut(content: Octets, sizes: Sequence[int]) -> list[memoryview]:
    """Cut bytes into pieces of the given sizes.

    Raises:
        PartyLost: the bytes are too few or too many.
    """
    if len(content) != sum(sizes):
        raise PartyLost(f"{len(content)} bytes came where {sum(sizes)} were due; the other party is astray")
    return [memoryview(content)[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]


@dataclass(frozen=True, eq=False)
class MaskedShare:
    """A party's share less its share of a mask, modulo 2^bits: round(share times / 2^shift) - mask.

    One party rounds down and the other up. The sum is then off by less than one, is exact if no set bit is dropped, and
    is right in the mean over uniform shares.

    Attributes:
        share, mask: int64, of one shape.
        bits: of the mask; at most those that the share is right for, less the shift.
        times: factor of the share.
        shift: bits that are dropped.
        up: this party rounds up.
    """

    share: Tensor
    mask: Tensor
    bits: int
    times: int = 1
    shift: int = 0
    up: bool = False

    @property
    def more(self) -> int:
        """The integer that is added before the shift."""
        return (1 << self.shift) - 1 if self.up else 0

    def packed(self) -> Octets:
        """Pack for the other party."""
        shares, masks = _flat(self.share), _flat(self.mask)
        words = np.empty(math.ceil(shares.size * self.bits / WORD), np.uint64)
        kernels.pack(shares, masks, self.times, self.shift, self.more, self.bits, words)
        return _octets(words, shares.size, self.bits)

    def opened(self, content: Octets) -> Tensor:
        """Add the other party's packed masked share, from 0 to 2^bits - 1; all of Z_2^64 for 64 bits.

        Raises:
            PartyLost: the bytes are too few or too many.
        """
        shares, masks = _flat(self.share), _flat(self.mask)
        words = _words(content, shares.size, self.bits)
        opened = torch.empty(self.share.shape, dtype=torch.int64)
        kernels.unpack(shares, masks, self.times, self.shift, self.more, self.bits, words, _flat(opened))
        return opened


def _flat(integers: Tensor) -> NDArray[np.int64]:
    return integers.contiguous().numpy().reshape(-1)


def _octets(words: NDArray[np.uint64], count: int, bits: int) -> Octets:
    return words.view(np.uint8)[: packed_size(count, bits)].data


def _words(content: Octets, count: int, bits: int) -> NDArray[np.uint64]:
    due = packed_size(count, bits)
    if len(content) != due:
        raise PartyLost(f"{len(content)} bytes came where {due} were due; the other party is astray")
    octets = np.frombuffer(content, np.uint8)
    if (
        due % 8 == 0 and octets.flags.writeable and octets.ctypes.data % 8 == 0
    ):  # kernels are compiled for aligned arrays
        return octets.view(np.uint64)
    words = np.empty(math.ceil(count * bits / WORD), np.uint64)
    words.view(np.uint8)[:due] = octets
    return words
