"""A party's shares of what is dealt: as it is asked for, or ahead of that where a computation is known beforehand."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sordino.mpc.arithmetic.packing import Octets, packed_size, unpack
from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.arithmetic.products import FORMS
from sordino.mpc.arithmetic.ring import Shape
from sordino.mpc.dealing.correlations import CORRELATIONS, Correlation, Mask
from sordino.mpc.dealing.costs import Cost, Costs
from sordino.mpc.errors import MaskReused, MpcError


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


class Assistant(Protocol):
    """How party 1 asks: `Dealer`, or what speaks with one over a network."""

    def deal(self, number: int, correlation: Correlation) -> Octets:
        """Party 1's share of a correlation, packed."""
        ...


@runtime_checkable
class Remote(Assistant, Protocol):
    """An assistant that takes orders ahead, and deals in their order while the servers compute."""

    def ask(self, number: int, correlation: Correlation) -> None:
        """Order a correlation; does not wait."""
        ...

    def dealt(self) -> Octets:
        """What was ordered first, of what has not come yet."""
        ...


class Supply:
    """A party's shares of what the dealer deals, each of them once: a number that does not rise is refused.

    Args:
        generator: that of the party's key.
        costs: where bytes are entered.
        assistant: whom to ask, for party 1; None for party 0, which draws everything.

    Attributes:
        seconds: spent on what was prepared.
    """

    def __init__(self, generator: Prg, costs: Costs, assistant: Assistant | None = None) -> None:
        self._generator, self._costs, self._assistant = generator, costs, assistant
        self._next, self._last = 0, -1  # the number that is next, and that which was drawn last
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
            return FORMS[wanted.form](share, wanted.known, wanted.mask.bits)
        if wanted.number <= self._last:
            raise MaskReused(f"randomness {wanted.number} was drawn before; begin a new session")
        self._last = wanted.number
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
