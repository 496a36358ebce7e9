"""The dealer as a process. It deals for any number of sessions, and sees the shapes of computations, but no data.

A session's name is a random number from its data owner. Each server gets its key of a session once. Server 1 then
orders correlations, any number of them ahead of use, and gets them in that order. The dealer forgets the session when
server 1 is done.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import grpc
from pydantic import TypeAdapter, ValidationError

from sordino.mpc.arithmetic.packing import Octets, packed_size
from sordino.mpc.arithmetic.prg import KEY
from sordino.mpc.dealing.correlations import CORRELATIONS, Correlation
from sordino.mpc.dealing.dealer import Dealer
from sordino.mpc.errors import MaskReused, PartyLost
from sordino.mpc.parties.certificates import DEALER, SERVERS, Identity
from sordino.mpc.parties.transport import ClientConnection, Stream, listen
from sordino.randomness import system_bytes

KINDS: dict[str, TypeAdapter[Correlation]] = {kind.__name__: TypeAdapter(kind) for kind in CORRELATIONS}


@dataclass
class _Dealing:
    """The state of a session: the servers' keys, the servers that have theirs, and the dealer."""

    keys: tuple[bytes, bytes] = field(default_factory=lambda: (system_bytes(KEY), system_bytes(KEY)), repr=False)
    given: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.dealer = Dealer(self.keys)


class DealerService:
    """The dealer's handler of streams; see `start_dealer`."""

    def __init__(self) -> None:
        self._dealings: dict[str, _Dealing | None] = {}  # None for finished sessions
        self._lock = threading.Lock()

    def serve(self, number: int, stream: Stream) -> None:
        """Serve a server's stream: send its key, then the correlations that it orders.

        Raises:
            MaskReused: the server has this session's key already, or the session is over.
            PartyLost: an order is malformed.
        """
        header, _ = stream.receive()
        session = str(header.get("session"))
        with self._lock:
            dealing = self._dealings.setdefault(session, _Dealing())
            if dealing is None or number in dealing.given:
                raise MaskReused(f"{SERVERS[number]} had the key of this session before; begin another session")
            dealing.given.add(number)
        try:
            stream.send(dealing.keys[number])
            while True:
                header, _ = stream.receive()
                if header.get("end"):
                    return
                if number == 0:
                    raise PartyLost(f"{stream.party} asks for shares that it draws from its own key")
                stream.send(dealing.dealer.deal(int(header["number"]), correlation_from(header["correlation"])))
        except (KeyError, TypeError, ValueError) as error:
            raise PartyLost(f"{stream.party} sent garbage: no correlation ({type(error).__name__})") from None
        finally:
            if number == 1:  # the session is over: its keys are forgotten, and never sent again
                self._dealings[session] = None


class RemoteDealer:
    """A server's stream to the dealer, for one session.

    Args:
        identity: the server's.
        address: the dealer's.
        session: its name.
        timeout: seconds of silence after which the dealer counts as lost.

    Attributes:
        key: this server's key for the session.
    """

    def __init__(self, identity: Identity, address: str, session: str, timeout: float) -> None:
        self._connection = ClientConnection(identity, DEALER, address, timeout)
        self._stream, self._due = self._connection.stream("Deal"), deque[int]()
        self._stream.send(session=session)
        self.key = bytes(self._stream.receive()[1])

    def ask(self, number: int, correlation: Correlation) -> None:
        """Order a correlation, without waiting for it."""
        self._due.append(packed_size(math.prod(correlation.shape), correlation.bits))
        self._stream.send(number=number, correlation=correlation_to(correlation))

    def dealt(self) -> Octets:
        """Return the oldest order that has not been returned yet, packed.

        Raises:
            PartyLost: the dealer is lost, or the reply has another length.
        """
        content, due = self._stream.receive()[1], self._due.popleft()
        if len(content) != due:
            raise PartyLost(f"{self._stream.party} sent garbage: {len(content)} bytes where {due} were due")
        return content

    def deal(self, number: int, correlation: Correlation) -> Octets:
        """Return party 1's share of a correlation, packed. Orders under way must be taken first."""
        self.ask(number, correlation)
        return self.dealt()

    def close(self) -> None:
        """End the session at the dealer."""
        self._stream.send(end=True)
        self._stream.close()
        self._connection.close()


def start_dealer(identity: Identity, address: str, timeout: float) -> tuple[grpc.Server, str]:
    """Start a dealer for servers that connect.

    Returns:
        The server, and its address with its port.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    service = DealerService()
    by_role = {role: partial(service.serve, number) for number, role in enumerate(SERVERS)}
    return listen(identity, address, timeout, {"Deal": by_role})


def correlation_to(correlation: Correlation) -> dict[str, Any]:
    """Convert a correlation to a JSON object."""
    return {"kind": type(correlation).__name__, **asdict(correlation)}  # type: ignore[call-overload]


def correlation_from(content: dict[str, Any]) -> Correlation:
    """Invert `correlation_to`.

    Raises:
        ValueError: the content is malformed.
    """
    rest = dict(content)
    kind = KINDS.get(str(rest.pop("kind", None)))
    if kind is None:
        raise ValueError("no such correlation")
    try:
        return kind.validate_python(rest)
    except ValidationError as error:
        raise ValueError(str(error)) from None
