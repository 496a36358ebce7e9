"""A computing server as a process. It holds shares of a model, and runs the model on shares of sentences.

The model owner installs shares of a tower, which stay in memory, and encrypted in a file if asked. A data owner's
session has a stream to each server. The servers get their keys of the session from the dealer, and server 1 connects to
server 0. Then they open the weights under masks, and answer batches of sentences until the data owner is done. If a
stream fails, the session ends at all parties.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from sordino.mpc.arithmetic.packing import Octets, pack, unpack_each
from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.arithmetic.ring import WORD, Shape
from sordino.mpc.dealing.costs import Costs
from sordino.mpc.dealing.supply import CorrelatedRandomness, RequestTrace
from sordino.mpc.errors import MpcError, PartyLost
from sordino.mpc.parties.certificates import DATA_OWNER, MODEL_OWNER, SERVERS, Identity
from sordino.mpc.parties.dealer_service import RemoteDealer
from sordino.mpc.parties.kept_share import KeptShare
from sordino.mpc.parties.model_share import Model
from sordino.mpc.parties.network import Network, Throttled
from sordino.mpc.parties.transport import ClientConnection, Header, Stream, listen
from sordino.mpc.protocols.party import Channel, Party, Shared
from sordino.mpc.tower.encoder import Encoder, encode_sentences

HELD = 2**27  # bytes of randomness that are prepared at a time: few, so that dealing and computing overlap
LINGER = 1.0  # seconds for the last message of a session to leave
FRACTION = 14  # fraction bits of embeddings, which are small numbers


@dataclass(frozen=True, eq=False)
class _PeerStream:
    """Server 1's stream at server 0, with events for the begin and the end of its session."""

    stream: Stream
    taken: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class StreamChannel:
    """A `Channel` to the other server, carried by a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def exchange(self, content: Octets) -> Octets:
        """See `Channel`."""
        self._stream.send(content)
        reply = self._stream.receive()[1]
        if len(reply) != len(content):  # both servers run the same program, so lengths agree
            raise PartyLost(f"{self._stream.party} sent garbage: {len(reply)} bytes where {len(content)} were due")
        return reply


class ServerService:
    """The handlers of one of the two servers.

    Args:
        identity: the server's. Its role says which of the two it is.
        dealer: address of the dealer.
        peer: address of server 0, for server 1.
        timeout: seconds of silence after which a party counts as lost.
        network: to imitate between the servers, if any.
        keep: where the server's share is kept over restarts, if anywhere.

    Raises:
        ConfigError: the kept share cannot be opened.
    """

    def __init__(
        self,
        identity: Identity,
        dealer: str,
        peer: str | None,
        timeout: float,
        network: Network | None = None,
        keep: KeptShare | None = None,
    ) -> None:
        self.number = SERVERS.index(identity.role)
        self._identity, self._dealer, self._peer, self._timeout = identity, dealer, peer, timeout
        self._network, self._keep = network, keep
        self._model: Model | None = keep.load(identity.role) if keep else None
        if self._model is not None:
            _say(f"model {self._model.name[:8]} opened: {len(self._model.plan.layers)} layers")
        self._streams_of_peer: dict[str, queue.SimpleQueue[_PeerStream]] = defaultdict(queue.SimpleQueue)

    def install(self, stream: Stream) -> None:
        """Install a plan and shares of weights from the model owner's stream, in place of earlier ones.

        Raises:
            PartyLost: the message is malformed.
            RunError: the share is to be kept, and cannot be written. The earlier model stays.
        """
        header, payload = stream.receive()
        try:
            model = Model.of_message(header, payload)
        except Exception as error:  # a malformed message can fail in any way
            raise PartyLost(f"{stream.party} sent garbage: no model ({type(error).__name__}: {error})") from None
        if self._keep:
            self._keep.save(model, self._identity.role)
        self._model = model
        stream.send(name=model.name)
        _say(f"model {model.name[:8]} installed: {len(model.plan.layers)} layers")

    def peer(self, stream: Stream) -> None:
        """Hold server 1's stream for the session that it names, until the session ends.

        Raises:
            PartyLost: no data owner begins that session here.
        """
        header, _ = stream.receive()
        session, peer_stream = str(header.get("session")), _PeerStream(stream)
        self._streams_of_peer[session].put(peer_stream)
        if not peer_stream.taken.wait(self._timeout):
            self._streams_of_peer.pop(session, None)
            raise PartyLost(f"the data owner did not begin the session at {self._identity.role} in {self._timeout:g} s")
        peer_stream.done.wait()

    def session(self, stream: Stream) -> None:
        """Serve a data owner's stream from beginning to end.

        Raises:
            MpcError: no model is installed.
            PartyLost: a party is lost.
        """
        header, _ = stream.receive()
        session = str(header.get("session"))
        model = self._model
        if model is None:
            raise MpcError(f"{self._identity.role} holds no model yet; the model owner runs 'sordino mpc provide'")
        _say(f"session {session[:8]} begins")
        try:
            self._computed(stream, session, model)
        except Exception as error:
            _say(f"session {session[:8]} broke: {error if isinstance(error, MpcError) else type(error).__name__}")
            raise
        _say(f"session {session[:8]} ends")

    def _computed(self, stream: Stream, session: str, model: Model) -> None:
        """Open the model's weights, and answer a session's messages until it ends."""
        with _Session(self, session) as party:
            encoder = Encoder.mask_and_open(party, model.weights, model.plan)
            width = model.weights["norm.weight"].shape[0]
            largest = model.plan.layers[-1].norm2.largest
            ranges = {"largest": largest, "entering": model.plan.entering}
            form = {"fraction": FRACTION, "width": width, "ranges": ranges}
            stream.send(b"", model=model.name, sharing=model.sharing, **form, **_news(party.costs))
            traces: dict[tuple[Shape, ...], RequestTrace] = {}
            while True:
                header, payload = stream.receive()
                if header.get("end"):
                    break
                self._answer(stream, party, encoder, traces, header, payload)

    def _answer(
        self,
        stream: Stream,
        party: Party,
        encoder: Encoder,
        traces: dict[tuple[Shape, ...], RequestTrace],
        header: Header,
        payload: Octets,
    ) -> None:
        """Run the batches of one message. For each, send shares of its features, and its costs and seconds.

        Each batch is answered as soon as it is done, so that the data owner sees progress. Requests for randomness are
        recorded for the first message of the same shapes, and prefetched from then on: while a batch is computed, or
        waits for the other server, a thread prepares the next.
        """
        began, before = time.perf_counter(), party.randomness.seconds
        batches = batches_of(stream, header)
        shapes = tuple(batch["shape"] for batch in batches)
        if shapes in traces:
            party.randomness.prepare(traces[shapes], HELD, ahead=True)
            recording: AbstractContextManager[Any] = nullcontext()
        else:
            recording = party.randomness.recording()
        shares = unpack_each(payload, shapes, [WORD] * len(shapes))
        with recording as trace:
            for batch, share in zip(batches, shares, strict=True):
                features = encode_sentences(party, encoder, Shared(share, FRACTION), batch["lengths"])
                now, offline = time.perf_counter(), party.randomness.seconds - before
                form = {"fraction": features.fraction, "bits": features.bits}
                seconds = {"offline": offline, "online": now - began - offline}
                stream.send(pack(features.share, WORD), **form, seconds=seconds, **_news(party.costs))
                began, before = now, party.randomness.seconds
        if trace is not None:
            traces[shapes] = trace

    def stream_to_peer(self, session: str) -> tuple[Stream, Any]:
        """Return a session's stream between the servers, and a function that ends it.

        Server 1 opens the stream. Server 0 waits for it.

        Raises:
            MpcError: server 1 has no address of server 0.
            PartyLost: server 1 did not connect in time.
        """
        if self.number == 1:
            if self._peer is None:
                raise MpcError("server-1 was not told where server-0 is; start it with --peer HOST:PORT")
            connection = ClientConnection(self._identity, SERVERS[0], self._peer, self._timeout)
            stream = connection.stream("Peer")
            stream.send(session=session)
            return stream, connection.close
        try:
            peer_stream = self._streams_of_peer[session].get(timeout=self._timeout)
        except queue.Empty:
            raise PartyLost(f"server-1 did not begin the session within {self._timeout:g} s") from None
        finally:
            self._streams_of_peer.pop(session, None)
        peer_stream.taken.set()
        return peer_stream.stream, peer_stream.done.set

    def channel(self, stream: Stream) -> Channel:
        """Return a channel to the other server, as slow as the imitated network."""
        plain = StreamChannel(stream)
        return Throttled(plain, self._network) if self._network else plain

    def dealer(self, session: str) -> RemoteDealer:
        """Open a stream to the dealer."""
        return RemoteDealer(self._identity, self._dealer, session, self._timeout)


class _Session:
    """A context with the party of one session.

    An error within the context is sent to the other server before the stream to it ends.
    """

    def __init__(self, service: ServerService, session: str) -> None:
        self._service, self._session = service, session

    def __enter__(self) -> Party:
        service = self._service
        self._dealer: RemoteDealer | None = None
        self._stream, self._end = service.stream_to_peer(self._session)
        try:
            self._dealer = service.dealer(self._session)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        costs = Costs()
        link = self._dealer if service.number else None  # server 0 draws everything from its key
        randomness = CorrelatedRandomness(Prg(self._dealer.key), costs, link)
        return Party(service.number, service.channel(self._stream), randomness, costs)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._dealer:
            with suppress(PartyLost):
                self._dealer.close()
        if error is not None:
            self._stream.fail(str(error) if isinstance(error, MpcError) else f"failed with {type(error).__name__}")
        self._stream.close()
        threading.Timer(LINGER, self._end).start()


def start_server(
    identity: Identity,
    address: str,
    dealer: str,
    peer: str | None = None,
    timeout: float = 60.0,
    network: Network | None = None,
    keep: KeptShare | None = None,
) -> tuple[grpc.Server, str]:
    """Start a server that computes for data owners; see `ServerService` for the arguments.

    Returns:
        The server, and its address with its port.

    Raises:
        ConfigError: the address cannot be listened at, or the kept share cannot be opened.
    """
    service = ServerService(identity, dealer, peer, timeout, network, keep)
    methods = {"Install": {MODEL_OWNER: service.install}, "Session": {DATA_OWNER: service.session}}
    if service.number == 0:
        methods["Peer"] = {SERVERS[1]: service.peer}
    return listen(identity, address, timeout, methods)


def batches_of(stream: Stream, header: Header) -> list[dict[str, Any]]:
    """Parse the shapes [B, T, E] and lengths [B] of a message's batches.

    Raises:
        PartyLost: they are malformed.
    """
    try:
        batches = []
        for batch in header["batches"]:
            shape = tuple(int(side) for side in batch["shape"])
            lengths = torch.tensor(batch["lengths"])
            if len(shape) != 3 or lengths.shape != shape[:1] or not 2 <= int(lengths.max()) <= shape[1]:
                raise ValueError(f"shape {shape} with {len(lengths)} lengths")
            batches.append({"shape": shape, "lengths": lengths})
        return batches
    except Exception as error:  # a malformed message can fail in any way
        raise PartyLost(f"{stream.party} sent garbage: no sentences ({type(error).__name__}: {error})") from None


def _news(costs: Costs) -> Header:
    """Return the costs since the last message, as a header."""
    return {"costs": costs.taken()}


def _say(text: str) -> None:
    """Print a line. Names in it come from other parties."""
    print(text if text.isprintable() else ascii(text), file=sys.stderr, flush=True)
