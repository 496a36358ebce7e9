"""The assistant: deals randomness that is correlated, before the computation and without seeing any data.

*Masks* are uniform: each party draws its share from a key that only it and the dealer hold, and nothing is sent. All
else that is dealt is a function of masks, a `Correlation`: their products, truncations, cosines. Party 0 draws its
share of that from its key as well; party 1 is sent the difference, which is uniform as long as it does not know party
0's key. What is asked for is public: numbers of masks, shapes and constants.

Every mask and every correlation has a number of its own, counted upwards by both parties alike, which is the stream of
the generator that it is drawn from. A number that does not rise is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sordino.mpc.costs import Cost, Costs
from sordino.mpc.errors import MaskReused
from sordino.mpc.prg import Prg
from sordino.mpc.ring import FORMS, WORD, Shape, encode, lowest, pack, packed_size, shape_of, unpack


@dataclass(frozen=True)
class Mask:
    """Names a mask: integers of a shape, uniform from 0 to 2^bits - 1.

    Attributes:
        number: its stream.
        shape: its axes.
        bits: of each integer.
    """

    number: int
    shape: Shape
    bits: int


class Correlation(Protocol):
    """A function of masks. Attributes: `masks`, which; `shape` of the values; `bits`, modulo what they are shared."""

    @property
    def masks(self) -> tuple[Mask, ...]: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def bits(self) -> int: ...
    def values(self, *masks: Tensor) -> Tensor:
        """The values, from the masks themselves."""
        ...


@dataclass(frozen=True)
class Product:
    """A bilinear map of two masks, by its name in `ring.FORMS`."""

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
        return FORMS[self.form](left, right)


@dataclass(frozen=True)
class TripleProduct:
    """The products a b, a c, b c and a b c of three masks, entry by entry and broadcast: [4, ...]."""

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
    """Of masks y and a of one shape: y^2 .. y^degree, then a y .. a y^degree: [2 degree - 1, ...]."""

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
    """What turns an opened x - a, modulo 2^n, into a share of x >> shift in a larger ring; see `linear.lifted`.

    With r = -a modulo 2^n: the upper bits of r without its highest bit, (r mod 2^(n-1)) >> shift, and its highest bit:
    [2, ...].
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
    """cos(k t) for every frequency k, then sin(k t), in fixed point, where t = 2 pi a / 2^period: [2, K, ...].

    Attributes:
        mask: a.
        period: log2 of the period in the ring; at most the mask's bits.
        frequencies: K of them.
        fraction: bits of the fraction.
        bits: modulo what they are shared.
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
        return (2, len(self.frequencies), *self.mask.shape)

    def values(self, *masks: Tensor) -> Tensor:
        (mask,) = masks
        turns = lowest(mask, self.period).to(torch.float64) / 2.0**self.period
        angles = torch.stack([2 * torch.pi * (k * turns % 1.0) for k in self.frequencies])
        return encode(torch.stack([angles.cos(), angles.sin()]), self.fraction)


class Dealer:
    """The assistant itself.

    Args:
        keys: those of parties 0 and 1, 32 bytes each; fresh from the operating system if none are given. Keys that were
            used for one computation must not serve another.
    """

    def __init__(self, keys: tuple[bytes, bytes] | None = None) -> None:
        given = keys or (None, None)
        self.generators = Prg(given[0]), Prg(given[1])
        self._last = -1

    def deal(self, number: int, correlation: Correlation) -> bytes:
        """Party 1's share of a correlation, packed.

        Raises:
            MaskReused: the number is not above all before it.
        """
        if number <= self._last:
            raise MaskReused(f"randomness {number} was dealt before; start a computation with new keys")
        self._last = number
        values = correlation.values(*(self._mask(mask) for mask in correlation.masks))
        other = self.generators[0].integers(number, correlation.shape, correlation.bits)
        return pack(lowest(values - other, correlation.bits), correlation.bits)

    def _mask(self, mask: Mask) -> Tensor:
        shares = (generator.integers(mask.number, mask.shape, mask.bits) for generator in self.generators)
        return lowest(sum(shares, torch.zeros((), dtype=torch.int64)), mask.bits)


class Assistant(Protocol):
    """How party 1 asks: `Dealer`, or what speaks with one over a network."""

    def deal(self, number: int, correlation: Correlation) -> bytes:
        """Party 1's share of a correlation, packed."""
        ...


class Supply:
    """A party's shares of what the dealer deals, each of them once.

    Args:
        generator: that of the party's key.
        costs: where bytes are entered.
        assistant: whom to ask, for party 1; None for party 0, which draws everything.
    """

    def __init__(self, generator: Prg, costs: Costs, assistant: Assistant | None = None) -> None:
        self._generator, self._costs, self._assistant = generator, costs, assistant
        self._next = 0

    def mask(self, shape: Shape, bits: int) -> tuple[Mask, Tensor]:
        """A new mask, and this party's share of it; costs nothing."""
        mask = Mask(self._number(), shape, bits)
        return mask, self._generator.integers(mask.number, shape, bits)

    def correlated(self, correlation: Correlation) -> Tensor:
        """This party's share of a function of masks; its bytes are entered offline."""
        number, shape, bits = self._number(), correlation.shape, correlation.bits
        self._costs.add(Cost(offline=packed_size(math.prod(shape), bits)))
        if self._assistant is None:
            return self._generator.integers(number, shape, bits)
        return unpack(self._assistant.deal(number, correlation), shape, bits)

    def _number(self) -> int:
        self._next += 1
        return self._next - 1
