"""The dealer as a process: deals for any number of sessions, and sees the shapes of what is computed, and no data.

A session is a number that its data owner drew. Each server gets its key of a session once; server 1 then asks for
correlations, in any number ahead of their use, and gets them in that order. All is forgotten when server 1 is done.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
from pydantic import TypeAdapter, ValidationError

from sordino.mpc.arithmetic.packing import Octets, packed_size
from sordino.mpc.arithmetic.prg import KEY
from sordino.mpc.dealing.correlations import CORRELATIONS, Correlation
from sordino.mpc.dealing.dealer import Dealer
from sordino.mpc.errors import MaskReused, PartyLost
from sordino.mpc.parties.certificates import DEALER, SERVERS, Identity
from sordino.mpc.parties.transport import Dialled, Line, listen

KINDS: dict[str, TypeAdapter[Correlation]] = {kind.__name__: TypeAdapter(kind) for kind in CORRELATIONS}


@dataclass
class _Dealing:
    """A session: the servers' keys, who has one already, and the dealer."""

    keys: tuple[bytes, bytes] = field(default_factory=lambda: (os.urandom(KEY), os.urandom(KEY)), repr=False)
    given: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.dealer = Dealer(self.keys)


class DealerService:
    """Deals; see `start_dealer`."""

    def __init__(self) -> None:
        self._dealings: dict[str, _Dealing | None] = {}  # None for sessions that are over
        self._lock = threading.Lock()

    def serve(self, number: int, line: Line) -> None:
        """A server's line: its key, and whatever it asks for.

        Raises:
            MaskReused: the server has that session's key already, or the session is over.
            PartyLost: it asks for what is no correlation.
        """
        header, _ = line.receive()
        session = str(header.get("session"))
        with self._lock:
            dealing = self._dealings.setdefault(session, _Dealing())
            if dealing is None or number in dealing.given:
                raise MaskReused(f"{SERVERS[number]} had the key of this session before; begin another session")
            dealing.given.add(number)
        try:
            line.send(dealing.keys[number])
            while True:
                header, _ = line.receive()
                if header.get("end"):
                    return
                if number == 0:
                    raise PartyLost(f"{line.party} asks for shares that it draws from its own key")
                line.send(dealing.dealer.deal(int(header["number"]), correlation_from(header["correlation"])))
        except (KeyError, TypeError, ValueError) as error:
            raise PartyLost(f"{line.party} sent garbage: no correlation ({type(error).__name__})") from None
        finally:
            if number == 1:  # the key of a session that is over is of no use to anybody
                self._dealings[session] = None


class RemoteDealer:
    """A server's line to the dealer, for one session.

    Args:
        own: the server's identity.
        address: the dealer's.
        session: its number.
        timeout: seconds of silence.

    Attributes:
        key: this server's.
    """

    def __init__(self, own: Identity, address: str, session: str, timeout: float) -> None:
        self._dialled = Dialled(own, DEALER, address, timeout)
        self._line, self._due = self._dialled.line("Deal"), deque[int]()
        self._line.send(session=session)
        self.key = bytes(self._line.receive()[1])

    def ask(self, number: int, correlation: Correlation) -> None:
        """Order a correlation; never waits."""
        self._due.append(packed_size(math.prod(correlation.shape), correlation.bits))
        self._line.send(number=number, correlation=correlation_to(correlation))

    def dealt(self) -> Octets:
        """What was ordered first, of what has not come yet.

        Raises:
            PartyLost: the dealer is lost, or sends something else.
        """
        content, due = self._line.receive()[1], self._due.popleft()
        if len(content) != due:
            raise PartyLost(f"{self._line.party} sent garbage: {len(content)} bytes where {due} were due")
        return content

    def deal(self, number: int, correlation: Correlation) -> Octets:
        """Party 1's share of a correlation, packed; orders that are under way must be taken first."""
        self.ask(number, correlation)
        return self.dealt()

    def close(self) -> None:
        """No more is needed."""
        self._line.send(end=True)
        self._line.close()
        self._dialled.close()


def start_dealer(own: Identity, address: str, timeout: float) -> tuple[grpc.Server, str]:
    """Deal for the servers that ask.

    Returns:
        The server, and its address with its port.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    service = DealerService()
    by_role = {role: lambda line, number=number: service.serve(number, line) for number, role in enumerate(SERVERS)}
    return listen(own, address, timeout, {"Deal": by_role})


def correlation_to(correlation: Correlation) -> dict[str, Any]:
    """As JSON has it."""
    return {"kind": type(correlation).__name__, **asdict(correlation)}  # type: ignore[call-overload]


def correlation_from(content: dict[str, Any]) -> Correlation:
    """The inverse of `correlation_to`.

    Raises:
        ValueError: it is none.
    """
    rest = dict(content)
    kind = KINDS.get(str(rest.pop("kind", None)))
    if kind is None:
        raise ValueError("no such correlation")
    try:
        return kind.validate_python(rest)
    except ValidationError as error:
        raise ValueError(str(error)) from None
