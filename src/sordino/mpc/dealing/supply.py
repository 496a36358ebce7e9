"""A party's shares of dealt randomness, drawn on request or ahead of time.

A computation that was recorded once can be prepared from then on: dealing then overlaps with computing.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
    """A correlation with the number of its stream."""

    number: int
    correlation: Correlation


@dataclass(frozen=True)
class Fixed:
    """A local product: this party's share of a mask times the opened part of a fixed factor."""

    mask: Mask
    known: Tensor = field(compare=False)
    form: str


Request = Mask | Numbered | Fixed


@dataclass(frozen=True)
class RequestTrace:
    """A computation's requests for randomness, in order, from the number `start` on.

    `CorrelatedRandomness.recording` makes one. A later computation of the same shapes repeats these requests. Masks of
    its own are as far behind its start. Masks from before the start, such as those of weights, stay the same.
    """

    start: int
    requests: list[Request] = field(default_factory=list)

    def moved(self, start: int) -> list[Request]:
        """Return the requests of the same computation for another start."""
        return [_moved(request, self.start, start - self.start) for request in self.requests]


def _moved(request: Any, start: int, shift: int) -> Any:
    if isinstance(request, Mask) and request.number >= start:
        return replace(request, number=request.number + shift)
    if isinstance(request, Numbered):
        return Numbered(request.number + shift, _moved(request.correlation, start, shift))
    if isinstance(request, tuple):
        return tuple(_moved(part, start, shift) for part in request)
    if isinstance(request, (*CORRELATIONS, Fixed)):
        return replace(
            request, **{part.name: _moved(getattr(request, part.name), start, shift) for part in fields(request)}
        )
    return request


class DealerLink(Protocol):
    """Party 1's way to the dealer: `Dealer` itself, or a connection to one."""

    def deal(self, number: int, correlation: Correlation) -> Octets:
        """Party 1's share of a correlation, packed."""
        ...


@runtime_checkable
class PrefetchingDealerLink(DealerLink, Protocol):
    """A link that takes orders ahead. The dealer answers them in order while the servers compute."""

    def ask(self, number: int, correlation: Correlation) -> None:
        """Order a correlation, without waiting for it."""
        ...

    def dealt(self) -> Octets:
        """Return the oldest order that has not been returned yet, packed."""
        ...


class CorrelatedRandomness:
    """A party's shares of masks and correlations. Each is drawn once: a number that does not rise is refused.

    Args:
        generator: of the party's key.
        costs: the party's, where offline bytes are entered.
        dealer: party 1's link to the dealer. None for party 0, which draws every share from its key.

    Attributes:
        seconds: spent on preparing, or on waiting for what is prepared in a thread of its own.
    """

    def __init__(self, generator: Prg, costs: Costs, dealer: DealerLink | None = None) -> None:
        self._generator, self._costs, self._dealer = generator, costs, dealer
        self._next, self._last = 0, -1  # the next number, and the last one that was drawn
        self._trace: RequestTrace | None = None
        self._due: deque[Request] = deque()  # prepared, not drawn yet
        self._orders: deque[Numbered] = deque()  # prepared, not ordered yet
        self._ordered: deque[int] = deque()  # bytes of each order that is under way
        self._drawn: deque[tuple[Request, Tensor]] = deque()
        self._coming: Future[list[tuple[Request, Tensor]]] | None = None  # the next turn, drawn in another thread
        self._limit, self._ahead = 0, False
        self.seconds = 0.0

    @contextmanager
    def recording(self) -> Iterator[RequestTrace]:
        """Record every request made within the context in a `RequestTrace`."""
        self._trace = trace = RequestTrace(self._next)
        try:
            yield trace
        finally:
            self._trace = None

    def prepare(self, trace: RequestTrace, limit: int = 2**31, ahead: bool = False) -> None:
        """Prefetch the correlated randomness for a computation with the same trace.

        At most about `limit` bytes are held. When they are used up, as many are drawn again, so a long computation
        goes by turns. A `PrefetchingDealerLink` has as many bytes again under way, dealt while this party computes.
        Every number is still used once.

        Args:
            trace: of a computation of the same shapes.
            limit: bytes.
            ahead: draw the next turn in a thread of its own while the computation uses this one, or waits for the
                other party. Then two turns are held.

        Raises:
            MpcError: randomness that was prepared before is not used up.
        """
        if self._due or self._drawn or self._coming:
            raise MpcError("randomness was prepared for a computation that did not come; begin a new session")
        self._due.extend(trace.moved(self._next))
        self._next += sum(not isinstance(request, Fixed) for request in self._due)
        self._limit, self._ahead = limit, ahead
        if isinstance(self._dealer, PrefetchingDealerLink):
            self._orders.extend(request for request in self._due if isinstance(request, Numbered))
            self._order(self._dealer)
        self._fill()

    def mask(self, shape: Shape, bits: int) -> tuple[Mask, Tensor]:
        """Return a new mask and this party's share of it, int64 of `shape`. Costs nothing."""
        mask = Mask(self._following(), shape, bits)
        return mask, self._given(mask)

    def correlated(self, correlation: Correlation) -> Tensor:
        """Return this party's share of a function of masks, int64. Its bytes are entered as offline."""
        self._costs.add(Cost(offline=packed_size(math.prod(correlation.shape), correlation.bits)))
        return self._given(Numbered(self._following(), correlation))

    def with_fixed(self, mask: Mask, known: Tensor, form: str) -> Tensor:
        """Return this party's share of a mask times a fixed factor's opened part. This work needs no data."""
        return self._given(Fixed(mask, known, form))

    def _following(self) -> int:
        """Return the next number: the next prepared request's, or a new one."""
        self._refill()
        if self._drawn:
            request = self._drawn[0][0]
            return -1 if isinstance(request, Fixed) else request.number
        self._next += 1
        return self._next - 1

    def _given(self, request: Request) -> Tensor:
        if self._trace is not None:
            self._trace.requests.append(request)
        self._refill()
        if not self._drawn:
            return self._draw(request)
        prepared, share = self._drawn.popleft()
        if prepared != request:
            raise MpcError("randomness was prepared for another computation than this; begin a new session")
        return share

    def _refill(self) -> None:
        """Take the next turn of what is prepared, if this one is used up."""
        if not self._drawn and (self._coming or self._due):
            self._fill()

    def _fill(self) -> None:
        began = time.perf_counter()
        coming, self._coming = self._coming, None
        self._drawn.extend(coming.result() if coming else self._turn())
        if self._ahead and self._due:
            # Until its result is taken, only that thread draws: nothing else does while a turn is held or coming.
            self._coming = in_background(self._turn)
        self.seconds += time.perf_counter() - began

    def _turn(self) -> list[tuple[Request, Tensor]]:
        """Draw the next requests, up to the limit."""
        turn, held = [], 0
        while self._due and held < self._limit:
            request = self._due.popleft()
            share = self._draw(request)
            turn.append((request, share))
            held += share.nbytes
        return turn

    def _draw(self, request: Request) -> Tensor:
        if isinstance(request, Fixed):
            share = self._generator.integers(request.mask.number, request.mask.shape, request.mask.bits)
            return FORMS[request.form](share, request.known, request.mask.bits)
        if request.number <= self._last:
            raise MaskReused(f"randomness {request.number} was drawn before; begin a new session")
        self._last = request.number
        if isinstance(request, Mask):
            return self._generator.integers(request.number, request.shape, request.bits)
        shape, bits = request.correlation.shape, request.correlation.bits
        if self._dealer is None:
            return self._generator.integers(request.number, shape, bits)
        if self._ordered and isinstance(self._dealer, PrefetchingDealerLink):
            content = self._dealer.dealt()
            self._ordered.popleft()
            self._order(self._dealer)
            return unpack(content, shape, bits)
        return unpack(self._dealer.deal(request.number, request.correlation), shape, bits)

    def _order(self, dealer: PrefetchingDealerLink) -> None:
        """Order the next requests while fewer bytes than the limit are under way."""
        while self._orders and (not self._ordered or sum(self._ordered) < self._limit):
            following = self._orders.popleft()
            dealer.ask(following.number, following.correlation)
            size = math.prod(following.correlation.shape)
            self._ordered.append(packed_size(size, following.correlation.bits))


def in_background(work: Callable[[], Any]) -> Future[Any]:
    """Start some work in a thread that does not keep the process alive, and return its result to come."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # raised again where the result is taken
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result
