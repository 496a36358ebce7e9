"""Messages between parties: gRPC streams under mutual TLS, which end with an error that names who is at fault.

A message is a small JSON header and bytes. A `Line` is one stream seen from one end. Both ends say that they are alive
four times in a timeout, so that silence means a process that was stopped or a network that broke, and not one that
computes; a connection that is closed is noticed at once. What an end fails of, it tells the other before it closes.
"""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

import grpc

from sordino.errors import ConfigError
from sordino.mpc.arithmetic.packing import Octets
from sordino.mpc.errors import PartyLost
from sordino.mpc.parties.certificates import Identity

SERVICE = "sordino.mpc"
PATIENCE = 10  # timeouts, after which a party that lives but says nothing is given up
PIECE = 2**20  # bytes of a message that go at a time, so that a long one is a sign of life all along
LARGEST = 2**33  # bytes that a message may have: far more than any of ours
ALIVE, ERROR, PART = "alive", "error", "part"  # headers
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
Header = dict[str, Any]


def packed(payload: Octets = b"", **header: Any) -> bytes:
    """A message: the header's length in four bytes, the header as JSON, and the payload."""
    head = json.dumps(header).encode()
    return b"".join([struct.pack(">I", len(head)), head, payload])


def unpacked(message: bytes) -> tuple[Header, Octets]:
    """Header and payload of a message.

    Raises:
        ValueError: it is none.
    """
    if len(message) < 4:
        raise ValueError("shorter than a message can be")
    (length,) = struct.unpack(">I", message[:4])
    if len(message) < 4 + length:
        raise ValueError("its header is cut off")
    header = json.loads(message[4 : 4 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, memoryview(message)[4 + length :]


class Line:
    """One end of a stream of messages.

    Args:
        party: who is at the other end, for errors.
        timeout: seconds of silence after which the other end counts as lost.
    """

    def __init__(self, party: str, timeout: float) -> None:
        self.party, self._timeout = party, timeout
        self._inbox, self._outbox = SimpleQueue[bytes | PartyLost](), SimpleQueue[bytes | None]()
        self._lost: PartyLost | None = None
        self._closed = threading.Event()

    def send(self, payload: Octets = b"", **header: Any) -> None:
        """Queue a message; never waits."""
        rest = memoryview(payload)
        while len(rest) > PIECE:
            self._outbox.put(packed(rest[:PIECE], part=True))
            rest = rest[PIECE:]
        self._outbox.put(packed(rest, **header))

    def receive(self) -> tuple[Header, Octets]:
        """The next message.

        Raises:
            PartyLost: the other end closed, failed, fell silent, or sent what is no message.
        """
        if self._lost:
            raise self._lost
        began, parts = time.monotonic(), list[Octets]()
        try:
            while True:
                header, payload = self._next()
                if PART in header:
                    if len(payload) != PIECE or len(parts) * PIECE > LARGEST:
                        raise PartyLost(f"{self.party} sent garbage: a message without an end")
                    parts.append(payload)
                elif ALIVE not in header:
                    return header, bytearray().join([*parts, payload])
                elif time.monotonic() - began > PATIENCE * self._timeout:
                    raise PartyLost(
                        f"{self.party} lives, but sent nothing for {PATIENCE * self._timeout:g} s, {PATIENCE} times "
                        "the timeout; where machines or networks are slow, raise that (session.timeout, --timeout)"
                    )
        except PartyLost as error:
            self._lost = error
            raise

    def fail(self, reason: str) -> None:
        """Tell the other end why this one closes, and close."""
        self.send(error=reason)
        self.close()

    def abandon(self, reason: str) -> None:
        """`fail`, and wake whoever waits to `receive`."""
        self.fail(reason)
        self._inbox.put(PartyLost(reason))

    def drain(self) -> None:
        """Wait until the other end closes, too, but no longer than a timeout."""
        try:
            while True:
                self.receive()
        except PartyLost:
            return

    def close(self) -> None:
        """No more will be sent."""
        if not self._closed.is_set():
            self._closed.set()
            self._outbox.put(None)

    def outgoing(self) -> Iterator[bytes]:
        """What gRPC shall send, with signs of life, until this end is closed."""
        while True:
            try:
                message = self._outbox.get(timeout=self._timeout / 4)
            except Empty:
                message = packed(alive=True)
            if message is None:
                return
            yield message

    def pump(self, incoming: Iterator[bytes]) -> None:
        """Take what gRPC receives, in a thread of its own."""
        threading.Thread(target=self._pump, args=(incoming,), daemon=True).start()

    def _pump(self, incoming: Iterator[bytes]) -> None:
        end = PartyLost(f"{self.party} ended")
        try:
            for message in incoming:
                self._inbox.put(message)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call):  # where this end dialled; where it listens, there is nothing more to know
                end = PartyLost(f"{self.party} {_complaint(error)}")
        self._inbox.put(end)

    def _next(self) -> tuple[Header, Octets]:
        try:
            message = self._inbox.get(timeout=self._timeout)
        except Empty:
            raise PartyLost(f"{self.party} sent nothing for {self._timeout:g} s") from None
        if isinstance(message, PartyLost):
            raise message
        try:
            header, payload = unpacked(message)
        except ValueError as error:
            raise PartyLost(f"{self.party} sent garbage: {error}") from None
        if ERROR in header:
            raise PartyLost(f"{self.party}: {header[ERROR]}")
        return header, payload


class Dialled:
    """A connection to a party, and lines on it.

    Args:
        own: who dials.
        role: that the other's certificate must show.
        address: host:port.
        timeout: of its lines.
    """

    def __init__(self, own: Identity, role: str, address: str, timeout: float) -> None:
        options = [*OPTIONS, ("grpc.ssl_target_name_override", role)]
        self._channel = grpc.secure_channel(address, own.channel_credentials(), options)
        self._party, self._timeout = f"{role} ({address})", timeout

    def line(self, method: str) -> Line:
        """A new stream to one of its methods."""
        line = Line(self._party, self._timeout)
        line.pump(self._channel.stream_stream(f"/{SERVICE}/{method}")(line.outgoing()))
        return line

    def close(self) -> None:
        """End all lines."""
        self._channel.close()


Serve = Callable[[Line], None]  # handles a line to its end, in a thread of its own


def listen(
    own: Identity, address: str, timeout: float, methods: Mapping[str, Mapping[str, Serve]]
) -> tuple[grpc.Server, str]:
    """Serve lines.

    Args:
        own: who listens.
        address: host:port; port 0 for any that is free.
        timeout: of the lines.
        methods: by name, what is done for which caller's role; others are refused.

    Returns:
        The server, started, and its address with the port that it has.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    server = grpc.server(ThreadPoolExecutor(64), options=OPTIONS)
    handlers = {
        name: grpc.stream_stream_rpc_method_handler(_handler(name, by_role, timeout))
        for name, by_role in methods.items()
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    host = address.rpartition(":")[0]
    try:
        port = server.add_secure_port(address, own.server_credentials())
    except RuntimeError:
        port = 0
    if not host or not port:
        raise ConfigError("--listen", address, "cannot be listened at; give HOST:PORT of this machine that is free")
    server.start()
    return server, f"{host}:{port}"


def _handler(name: str, by_role: Mapping[str, Serve], timeout: float) -> Callable[..., Iterator[bytes]]:
    def handle(incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        names = context.auth_context().get("x509_common_name", [b"nobody"])
        role = names[0].decode()
        if role not in by_role:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{role} may not ask for {name}")
        line = Line(f"{role} ({context.peer()})", timeout)
        context.add_callback(line.close)
        line.pump(incoming)
        threading.Thread(target=_served, args=(by_role[role], line), daemon=True).start()
        return line.outgoing()

    return handle


def _served(serve: Serve, line: Line) -> None:
    """Run a handler; what it fails of goes to the other end, by its kind only where it is no error of our own."""
    try:
        serve(line)
    except PartyLost as error:
        line.fail(str(error))
    except Exception as error:
        from sordino.errors import SordinoError

        known = isinstance(error, SordinoError)
        if not known:  # with the place, but without values, which may be shares
            place = error.__traceback__
            while place and place.tb_next:
                place = place.tb_next
            where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "?"
            print(f"{type(error).__name__} at {where}", file=sys.stderr)
        line.fail(str(error) if known else f"failed with {type(error).__name__}")
    finally:
        line.close()


def _complaint(error: grpc.Call) -> str:
    """What became of a party, from gRPC's status."""
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return f"refused: {details}"
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return "is no such party; check its address"
    if "certificate" in details.lower() or "handshake" in details.lower() or "SSL" in details:
        return f"is not whom its certificate should show, or does not believe ours ({details})"
    return f"is gone or cannot be reached ({code.name.lower()}: {details})"
