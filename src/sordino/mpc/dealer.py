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
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sordino.mpc.costs import Cost, Costs
from sordino.mpc.errors import MaskReused, MpcError
from sordino.mpc.prg import Prg
from sordino.mpc.ring import (
    CHUNK,
    FORMS,
    WORD,
    Shape,
    encode,
    lowest,
    narrow,
    pack,
    packed_size,
    shape_of,
    unpack,
    worth_a_table,
)


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
    """cos(k t) for every frequency k, then sin(k t), in fixed point, where t = 2 pi a / 2^period: [..., 2, K].

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
        return (*self.mask.shape, 2, len(self.frequencies))

    def values(self, *masks: Tensor) -> Tensor:
        turns = lowest(masks[0], self.period).reshape(-1)
        if not worth_a_table(len(turns), self.period):
            return _harmonics(turns, self.period, self.frequencies, self.fraction).reshape(self.shape)
        table = _whole_period(self.period, self.frequencies, self.fraction)
        values = torch.empty(len(turns), table.shape[1], dtype=torch.int64)
        for start in range(0, len(turns), CHUNK):
            piece = slice(start, start + CHUNK)
            values[piece] = table.index_select(0, turns[piece])
        return values.view(self.shape)


@lru_cache(maxsize=32)
def _whole_period(period: int, frequencies: tuple[int, ...], fraction: int) -> Tensor:
    """`Harmonics` of all angles of a period, [2^period, 2 K]: one look-up finds all of an angle."""
    return narrow(_harmonics(torch.arange(2**period), period, frequencies, fraction).flatten(1))


def _harmonics(turns: Tensor, period: int, frequencies: tuple[int, ...], fraction: int) -> Tensor:
    """Of angles as integers, [N]: [N, 2, K]."""
    parts = turns.to(torch.float64)[:, None] / 2.0**period
    angles = 2 * torch.pi * (parts * torch.tensor(frequencies) % 1.0)
    return encode(torch.stack([angles.cos(), angles.sin()], 1), fraction)


CORRELATIONS = (Product, TripleProduct, Powers, Lift, Harmonics)


@dataclass(frozen=True)
class Numbered:
    """A correlation, and its stream."""

    number: int
    correlation: Correlation


@dataclass(frozen=True)
class Fixed:
    """Work of a party's own: its share of a mask times what is known of a fixed factor."""

    mask: Mask
    known: Tensor = field(compare=False)
    form: str


Wanted = Mask | Numbered | Fixed


@dataclass(frozen=True)
class Tape:
    """What a computation asked its supply for, in order, from the number `start` on; see `Supply.recording`.

    A computation of the same shapes asks for the same again, of masks that are as far behind its own start; masks from
    before, those of weights, stay the same.
    """

    start: int
    wanted: list[Wanted] = field(default_factory=list)

    def moved(self, start: int) -> list[Wanted]:
        """The same for another start."""
        return [_moved(each, self.start, start - self.start) for each in self.wanted]


def _moved(wanted: Any, start: int, by: int) -> Any:
    if isinstance(wanted, Mask) and wanted.number >= start:
        return replace(wanted, number=wanted.number + by)
    if isinstance(wanted, Numbered):
        return Numbered(wanted.number + by, _moved(wanted.correlation, start, by))
    if isinstance(wanted, tuple):
        return tuple(_moved(each, start, by) for each in wanted)
    if isinstance(wanted, (*CORRELATIONS, Fixed)):
        return replace(wanted, **{each.name: _moved(getattr(wanted, each.name), start, by) for each in fields(wanted)})
    return wanted


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
        return pack(torch.sub(values, other, out=other), correlation.bits)

    def _mask(self, mask: Mask) -> Tensor:
        shares = (generator.integers(mask.number, mask.shape, mask.bits) for generator in self.generators)
        return lowest(sum(shares, torch.zeros((), dtype=torch.int64)), mask.bits)


class Assistant(Protocol):
    """How party 1 asks: `Dealer`, or what speaks with one over a network."""

    def deal(self, number: int, correlation: Correlation) -> bytes:
        """Party 1's share of a correlation, packed."""
        ...


@runtime_checkable
class Remote(Assistant, Protocol):
    """An assistant that takes orders ahead, and deals in their order while the servers compute."""

    def ask(self, number: int, correlation: Correlation) -> None:
        """Order a correlation; does not wait."""
        ...

    def dealt(self) -> bytes:
        """What was ordered first, of what has not come yet."""
        ...


class Supply:
    """A party's shares of what the dealer deals, each of them once.

    Args:
        generator: that of the party's key.
        costs: where bytes are entered.
        assistant: whom to ask, for party 1; None for party 0, which draws everything.

    Attributes:
        seconds: spent on what was prepared.
    """

    def __init__(self, generator: Prg, costs: Costs, assistant: Assistant | None = None) -> None:
        self._generator, self._costs, self._assistant = generator, costs, assistant
        self._next = 0
        self._tape: Tape | None = None
        self._due: deque[Wanted] = deque()  # prepared for, and not drawn yet
        self._orders: deque[Numbered] = deque()  # of these, what is to be ordered still
        self._ordered: deque[int] = deque()  # bytes of what was ordered, and has not come
        self._drawn: deque[tuple[Wanted, Tensor]] = deque()
        self._limit = 0
        self.seconds = 0.0

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """A `Tape` of all that is asked for meanwhile."""
        self._tape = tape = Tape(self._next)
        try:
            yield tape
        finally:
            self._tape = None

    def prepare(self, tape: Tape, limit: int = 2**31) -> None:
        """Draw, fetch and compute ahead what a computation like that of the tape will ask for.

        About `limit` bytes are held at most, and as many are drawn again whenever none are left, so that a long
        computation goes by turns; as many again are under way from a `Remote` assistant, which deals them while this
        party computes. Every number is still used once.

        Args:
            tape: of the computation that comes next.
            limit: bytes.

        Raises:
            MpcError: what was prepared before is not used up.
        """
        if self._due or self._drawn:
            raise MpcError("randomness was prepared for a computation that did not come; begin a new session")
        self._due.extend(tape.moved(self._next))
        self._next += sum(not isinstance(each, Fixed) for each in self._due)
        self._limit = limit
        if isinstance(self._assistant, Remote):
            self._orders.extend(each for each in self._due if isinstance(each, Numbered))
            self._order(self._assistant)
        self._fill()

    def mask(self, shape: Shape, bits: int) -> tuple[Mask, Tensor]:
        """A new mask, and this party's share of it; costs nothing."""
        mask = Mask(self._following(), shape, bits)
        return mask, self._given(mask)

    def correlated(self, correlation: Correlation) -> Tensor:
        """This party's share of a function of masks; its bytes are entered offline."""
        self._costs.add(Cost(offline=packed_size(math.prod(correlation.shape), correlation.bits)))
        return self._given(Numbered(self._following(), correlation))

    def with_fixed(self, mask: Mask, known: Tensor, form: str) -> Tensor:
        """This party's share of a mask, times what both know of a fixed factor: work that needs no data."""
        return self._given(Fixed(mask, known, form))

    def _following(self) -> int:
        """The number that is next: of what was prepared, or a new one."""
        if not self._drawn and self._due:
            self._fill()
        if self._drawn:
            wanted = self._drawn[0][0]
            return -1 if isinstance(wanted, Fixed) else wanted.number
        self._next += 1
        return self._next - 1

    def _given(self, wanted: Wanted) -> Tensor:
        if self._tape is not None:
            self._tape.wanted.append(wanted)
        if not self._drawn and self._due:
            self._fill()
        if not self._drawn:
            return self._draw(wanted)
        prepared, share = self._drawn.popleft()
        if prepared != wanted:
            raise MpcError("randomness was prepared for another computation than this; begin a new session")
        return share

    def _fill(self) -> None:
        began, held = time.perf_counter(), 0
        while self._due and held < self._limit:
            wanted = self._due.popleft()
            share = self._draw(wanted)
            self._drawn.append((wanted, share))
            held += share.nbytes
        self.seconds += time.perf_counter() - began

    def _draw(self, wanted: Wanted) -> Tensor:
        if isinstance(wanted, Fixed):
            share = self._generator.integers(wanted.mask.number, wanted.mask.shape, wanted.mask.bits)
            return FORMS[wanted.form](share, wanted.known)
        if isinstance(wanted, Mask):
            return self._generator.integers(wanted.number, wanted.shape, wanted.bits)
        shape, bits = wanted.correlation.shape, wanted.correlation.bits
        if self._assistant is None:
            return self._generator.integers(wanted.number, shape, bits)
        if self._ordered and isinstance(self._assistant, Remote):
            content = self._assistant.dealt()
            self._ordered.popleft()
            self._order(self._assistant)
            return unpack(content, shape, bits)
        return unpack(self._assistant.deal(wanted.number, wanted.correlation), shape, bits)

    def _order(self, assistant: Remote) -> None:
        """Order what comes next, as long as less than the limit is under way."""
        while self._orders and (not self._ordered or sum(self._ordered) < self._limit):
            following = self._orders.popleft()
            assistant.ask(following.number, following.correlation)
            size = math.prod(following.correlation.shape)
            self._ordered.append(packed_size(size, following.correlation.bits))
