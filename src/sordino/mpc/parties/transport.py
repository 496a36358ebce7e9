"""Messages between parties: gRPC streams under mutual TLS. A failure's error names the party at fault.

A message is a small JSON header and bytes. A `Stream` is one end of a gRPC stream. Both ends send a sign of life four
times in a timeout. So silence means that a process was stopped or a network broke, and not that a party is computing.
A closed connection is noticed at once. An end that fails tells the other its reason before it closes. The first
message of each end carries its versions, see `versions`.
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
from cryptography import x509

from sordino.errors import ConfigError, shortened
from sordino.mpc.arithmetic.packing import Octets
from sordino.mpc.errors import PartyLost
from sordino.mpc.parties.certificates import Identity, warn_of_expiry
from sordino.mpc.parties.shown import check_shown
from sordino.mpc.parties.versions import VERSIONS, other_version, own_versions

SERVICE = "sordino.mpc"
PATIENCE = 10  # timeouts after which a party that is alive, but sends no message, counts as lost
PIECE = 2**20  # bytes sent at a time, so that the pieces of a long message are signs of life
LARGEST = 2**33  # most bytes of a message: far more than any of ours
LONGEST_ERROR = 2000  # characters of another party's error that are repeated
ALIVE, ERROR, PART = "alive", "error", "part"  # headers
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
Header = dict[str, Any]


def packed(payload: Octets = b"", **header: Any) -> bytes:
    """Serialize a message: the header's length in four bytes, the header as JSON, and the payload."""
    head = json.dumps(header).encode()
    return b"".join([struct.pack(">I", len(head)), head, payload])


def unpacked(message: bytes) -> tuple[Header, Octets]:
    """Parse a message to its header and payload.

    Raises:
        ValueError: the message is malformed.
    """
    if len(message) < 4:
        raise ValueError("shorter than a message can be")
    (length,) = struct.unpack(">I", message[:4])
    if len(message) < 4 + length:
        raise ValueError("its header is cut off")
    try:
        header = json.loads(message[4 : 4 + length])
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, memoryview(message)[4 + length :]


class Stream:
    """One end of a stream of messages.

    Args:
        party: name of the other end, for errors.
        timeout: seconds of silence after which the other end counts as lost.
        own: name of this end, for errors.
    """

    def __init__(self, party: str, timeout: float, own: str = "this party") -> None:
        self.party, self._timeout, self._own = party, timeout, own
        self._versions = own_versions()  # until they are sent
        self._sending = threading.Lock()
        self._inbox, self._outbox = SimpleQueue[bytes | PartyLost](), SimpleQueue[bytes | None]()
        self._lost: PartyLost | None = None
        self._closed = threading.Event()

    def send(self, payload: Octets = b"", **header: Any) -> None:
        """Queue a message, without waiting."""
        rest = memoryview(payload)
        with self._sending:
            while len(rest) > PIECE:
                self._outbox.put(packed(rest[:PIECE], part=True, **self._greeting()))
                rest = rest[PIECE:]
            self._outbox.put(packed(rest, **header, **self._greeting()))

    def _greeting(self) -> Header:
        """Return what an end's first message carries; nothing for later ones."""
        versions, self._versions = self._versions, {}
        return {VERSIONS: versions} if versions else {}

    def receive(self) -> tuple[Header, Octets]:
        """Wait for the next message, and return its header and payload.

        Raises:
            PartyLost: the other end closed, failed, fell silent, or sent a malformed message.
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
        """Send the other end the reason of a failure, and close."""
        self.send(error=reason)
        self.close()

    def abandon(self, reason: str) -> None:
        """Call `fail`, and wake a thread that waits in `receive`."""
        self.fail(reason)
        self._inbox.put(PartyLost(reason))

    def drain(self) -> None:
        """Wait until the other end closes, too, but not longer than a timeout."""
        try:
            while True:
                self.receive()
        except PartyLost:
            return

    def close(self) -> None:
        """Close this end; nothing more is sent."""
        if not self._closed.is_set():
            self._closed.set()
            self._outbox.put(None)

    def outgoing(self) -> Iterator[bytes]:
        """Yield messages and signs of life for gRPC to send, until this end is closed."""
        while True:
            try:
                message = self._outbox.get(timeout=self._timeout / 4)
            except Empty:
                message = packed(alive=True)
            if message is None:
                return
            yield message

    def pump(self, incoming: Iterator[bytes]) -> None:
        """Start a thread that takes the messages that gRPC receives."""
        threading.Thread(target=self._pump, args=(incoming,), daemon=True).start()

    def _pump(self, incoming: Iterator[bytes]) -> None:
        end, greeted = PartyLost(f"{self.party} ended"), False
        try:
            for message in incoming:
                greeted = greeted or self._greeted(message)
                self._inbox.put(message)
        except PartyLost as error:
            end = error
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call):  # only the end that connected gets details
                end = PartyLost(f"{self.party} {_complaint(error)}")
        finally:  # whatever happens, nobody waits for a thread that is gone
            self._inbox.put(end)

    def _greeted(self, message: bytes) -> bool:
        """Compare the versions in the other end's first message with this end's; false for a sign of life before it.

        Raises:
            PartyLost: they differ.
        """
        try:
            header, _ = unpacked(message)
        except ValueError:  # `receive` says so
            return True
        if ALIVE in header:
            return False
        problem = other_version(header, self.party, self._own)
        if problem:
            raise PartyLost(problem)
        return True

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
            raise PartyLost(f"{self.party}: {_one_line(header[ERROR])}")
        return header, payload


class ClientConnection:
    """A connection to a party, which carries streams.

    Args:
        identity: of the caller.
        role: that the other party's certificate must show.
        address: host:port.
        timeout: of the streams.
    """

    def __init__(self, identity: Identity, role: str, address: str, timeout: float) -> None:
        self._identity, self._role, self._address = identity, role, address
        options = [*OPTIONS, ("grpc.ssl_target_name_override", role)]
        self._channel = grpc.secure_channel(address, identity.channel_credentials(), options)
        self._party, self._timeout = f"{role} ({address})", timeout

    def stream(self, method: str) -> Stream:
        """Open a stream to one of the party's methods.

        Raises:
            PartyLost: the address shows another certificate than the party's, see `check_shown`.
        """
        try:
            check_shown(self._identity, self._role, self._address, self._timeout)
        except PartyLost:
            self.close()
            raise
        stream = Stream(self._party, self._timeout, self._identity.role)
        stream.pump(self._channel.stream_stream(f"/{SERVICE}/{method}")(stream.outgoing()))
        return stream

    def close(self) -> None:
        """Close the connection and all its streams."""
        self._channel.close()


Serve = Callable[[Stream], None]  # handles a stream to its end, in a thread of its own


def listen(
    identity: Identity, address: str, timeout: float, methods: Mapping[str, Mapping[str, Serve]]
) -> tuple[grpc.Server, str]:
    """Start a server of streams.

    Args:
        identity: of the party that listens.
        address: host:port; port 0 for any free port.
        timeout: of the streams.
        methods: for each method's name, handlers by the caller's role. Other roles are refused.

    Returns:
        The started server, and its address with the actual port.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    server = grpc.server(ThreadPoolExecutor(64), options=OPTIONS)
    handlers = {
        name: grpc.stream_stream_rpc_method_handler(_handler(name, by_role, timeout, identity))
        for name, by_role in methods.items()
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    host = address.rpartition(":")[0]
    try:
        port = server.add_secure_port(address, identity.server_credentials())
    except RuntimeError:
        port = 0
    if not host or not port:
        raise ConfigError("--listen", address, "cannot be listened at; give HOST:PORT of this machine that is free")
    server.start()
    return server, f"{host}:{port}"


def _handler(
    name: str, by_role: Mapping[str, Serve], timeout: float, identity: Identity
) -> Callable[..., Iterator[bytes]]:
    def handle(incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        shown = context.auth_context()
        role = shown.get("x509_common_name", [b"nobody"])[0].decode()
        if role not in by_role:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{role} may not ask for {name}")
        warn_of_expiry(identity.chain, f"the certificate of {identity.role}")
        for certificate in shown.get("x509_pem_cert", []):
            warn_of_expiry([x509.load_pem_x509_certificate(certificate)], f"the certificate of {role}")
        stream = Stream(f"{role} ({context.peer()})", timeout, identity.role)
        context.add_callback(stream.close)
        stream.pump(incoming)
        threading.Thread(target=_served, args=(by_role[role], stream), daemon=True).start()
        return stream.outgoing()

    return handle


def _served(serve: Serve, stream: Stream) -> None:
    """Run a handler. Send its error to the other end, but only the type of an error that is not the package's own."""
    try:
        serve(stream)
    except PartyLost as error:
        stream.fail(str(error))
    except Exception as error:
        from sordino.errors import SordinoError

        known = isinstance(error, SordinoError)
        if not known:  # with the place, but without values, which may be shares
            place = error.__traceback__
            while place and place.tb_next:
                place = place.tb_next
            where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "?"
            print(f"{type(error).__name__} at {where}", file=sys.stderr)
        stream.fail(str(error) if known else f"failed with {type(error).__name__}")
    finally:
        stream.close()


def _one_line(told: Any) -> str:
    """Return another party's words as they are if they are one line of text; else quoted and cut, for a terminal."""
    text = " ".join(str(told).splitlines())
    return text if text.isprintable() and len(text) <= LONGEST_ERROR else shortened(text)


def _complaint(error: grpc.Call) -> str:
    """Describe a party's failure from gRPC's status."""
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return f"refused: {details}"
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return "is no such party, or runs another version of sordino; check its address and version"
    if "certificate" in details.lower() or "handshake" in details.lower() or "SSL" in details:
        return f"is not whom its certificate should show, or does not believe ours ({details})"
    return f"is gone or cannot be reached ({code.name.lower()}: {details})"
