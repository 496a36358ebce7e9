"""Masks and functions of masks that a dealer deals. Their shapes and constants are public."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sordino.mpc.arithmetic import kernels
from sordino.mpc.arithmetic.products import FORMS, shape_of
from sordino.mpc.arithmetic.ring import WORD, Shape, encode, lowest, narrow, worth_a_table


@dataclass(frozen=True)
class Mask:
    """The name of a mask: integers of one shape, uniform from 0 to 2^bits - 1.

    Attributes:
        number: its stream of the parties' generators.
        shape: of the integers.
        bits: of each integer.
    """

    number: int
    shape: Shape
    bits: int


class Correlation(Protocol):
    """A function of masks.

    Attributes:
        masks: its arguments.
        shape: of the values.
        bits: values are shared modulo 2^bits.
    """

    @property
    def masks(self) -> tuple[Mask, ...]: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def bits(self) -> int: ...
    def values(self, *masks: Tensor) -> Tensor:
        """Compute the values from the masks themselves, int64 of `shape`."""
        ...


@dataclass(frozen=True)
class Product:
    """A bilinear map of two masks, named by `form` as in `products.FORMS`."""

    left: Mask
    right: Mask
    form: str
    bits: int = WORD

    @property
    def masks(self) -> tuple[Mask, ...]:
        return self.left, self.right

    @property
    def shape(self) -> Shape:
        return shape_of(self.form, self.left.shape, self.right.shape)

    def values(self, *masks: Tensor) -> Tensor:
        left, right = masks
        return FORMS[self.form](left, right, self.bits)


@dataclass(frozen=True)
class TripleProduct:
    """The products a b, a c, b c and a b c of three masks, [4, ...], entry by entry and broadcast."""

    masks: tuple[Mask, Mask, Mask]
    bits: int = WORD

    @property
    def shape(self) -> Shape:
        return (4, *np.broadcast_shapes(*(mask.shape for mask in self.masks)))

    def values(self, *masks: Tensor) -> Tensor:
        a, b, c = torch.broadcast_tensors(*masks)
        return torch.stack([a * b, a * c, b * c, a * b * c])


@dataclass(frozen=True)
class Powers:
    """Powers of two masks y and a of one shape: y^2 .. y^degree, then a y .. a y^degree, [2 degree - 1, ...]."""

    base: Mask
    factor: Mask
    degree: int
    bits: int = WORD

    @property
    def masks(self) -> tuple[Mask, ...]:
        return self.base, self.factor

    @property
    def shape(self) -> Shape:
        return (2 * self.degree - 1, *self.base.shape)

    def values(self, *masks: Tensor) -> Tensor:
        base, factor = masks
        powers = [base]
        while len(powers) < self.degree:
            powers.append(powers[-1] * base)
        return torch.stack([*powers[1:], *(power * factor for power in powers)])


@dataclass(frozen=True)
class Lift:
    """Two parts of a mask that turn an opened x - a, modulo 2^n, into a share of x >> shift in a larger ring.

    With r = -a modulo 2^n, they are (r mod 2^(n-1)) >> shift and the highest bit of r, [2, ...]. See
    `linear.truncate_masked`.
    """

    mask: Mask
    shift: int
    bits: int = WORD

    @property
    def masks(self) -> tuple[Mask, ...]:
        return (self.mask,)

    @property
    def shape(self) -> Shape:
        return (2, *self.mask.shape)

    def values(self, *masks: Tensor) -> Tensor:
        (mask,) = masks
        negated, top = -mask, self.mask.bits - 1
        return torch.stack([lowest(negated, top) >> self.shift, lowest(negated >> top, 1)])


@dataclass(frozen=True)
class Harmonics:
    """cos(k t) for every frequency k, then sin(k t), in fixed point, [..., 2, K], where t = 2 pi a / 2^period.

    Attributes:
        mask: a.
        period: log2 of the period in the ring; at most the mask's bits.
        frequencies: k, of which there are K.
        fraction: fraction bits.
        bits: values are shared modulo 2^bits.
    """

    mask: Mask
    period: int
    frequencies: tuple[int, ...]
    fraction: int
    bits: int = WORD

    @property
    def masks(self) -> tuple[Mask, ...]:
        return (self.mask,)

    @property
    def shape(self) -> Shape:
        return (*self.mask.shape, 2, len(self.frequencies))

    def values(self, *masks: Tensor) -> Tensor:
        turns = lowest(masks[0], self.period).reshape(-1)
        if not worth_a_table(len(turns), self.period):
            return _harmonics(turns, self.period, self.frequencies, self.fraction).reshape(self.shape)
        table = _whole_period(self.period, self.frequencies, self.fraction)
        values = torch.empty(len(turns), table.shape[1], dtype=torch.int64)
        kernels.look_up(table.numpy(), turns.numpy(), values.numpy())
        return values.view(self.shape)


@lru_cache(maxsize=32)
def _whole_period(period: int, frequencies: tuple[int, ...], fraction: int) -> Tensor:
    """Tabulate `Harmonics` for all angles of a period, [2^period, 2 K]. One row holds everything for an angle."""
    return narrow(_harmonics(torch.arange(2**period), period, frequencies, fraction).flatten(1))


def _harmonics(turns: Tensor, period: int, frequencies: tuple[int, ...], fraction: int) -> Tensor:
    """Compute `Harmonics` of angles that are integers, [N] to [N, 2, K]."""
    parts = turns.to(torch.float64)[:, None] / 2.0**period
    angles = 2 * torch.pi * (parts * torch.tensor(frequencies) % 1.0)
    return encode(torch.stack([angles.cos(), angles.sin()], 1), fraction)


CORRELATIONS = (Product, TripleProduct, Powers, Lift, Harmonics)
