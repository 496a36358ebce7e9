"""A computing server as a process: holds shares of a model, and runs its forward pass on shares of sentences.

The model owner installs shares of a tower; they stay in memory. A data owner's session has a line to each server. The
servers fetch their keys of that session from the dealer, and server 1 dials server 0; then they open the weights
under masks, and answer batches of sentences until the data owner is done. One line's failure ends the session at all.
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
from sordino.mpc.parties.network import Network, Throttled
from sordino.mpc.parties.transport import Dialled, Header, Line, listen
from sordino.mpc.protocols.party import Channel, Party, Shared
from sordino.mpc.tower.encoder import Encoder, encode_sentences
from sordino.mpc.tower.fixed_point_plan import FixedPointPlan

HELD = 2**27  # bytes of dealt randomness that are held ahead of their use: few, so that dealing and computing overlap
LINGER = 1.0  # seconds for the last message of a session to leave
FRACTION = 14  # fraction bits of embeddings, which are small numbers


@dataclass(frozen=True, eq=False)
class Model:
    """A server's part of a tower.

    Attributes:
        name: drawn by the model owner, the same at both servers.
        plan: how it is computed.
        weights: shares, by name.
    """

    name: str
    plan: FixedPointPlan
    weights: dict[str, Shared]


@dataclass(frozen=True, eq=False)
class _PeerLine:
    """Server 1's line at server 0, and whether the session that it is for has begun and ended."""

    line: Line
    taken: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class LineChannel:
    """`Channel` to the other server on a line."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def exchange(self, content: Octets) -> Octets:
        """See `Channel`."""
        self._line.send(content)
        reply = self._line.receive()[1]
        if len(reply) != len(content):  # both servers run the same program
            raise PartyLost(f"{self._line.party} sent garbage: {len(reply)} bytes where {len(content)} were due")
        return reply


class ServerService:
    """One of the two servers.

    Args:
        own: its identity, which says which of them it is.
        dealer: address of the dealer.
        peer: address of server 0, for server 1.
        timeout: seconds of silence after which a party counts as lost.
        network: to be imitated between the servers, if any.
    """

    def __init__(
        self, own: Identity, dealer: str, peer: str | None, timeout: float, network: Network | None = None
    ) -> None:
        self.number = SERVERS.index(own.role)
        self._own, self._dealer, self._peer, self._timeout = own, dealer, peer, timeout
        self._network = network
        self._model: Model | None = None
        self._dialled_by_peer: dict[str, queue.SimpleQueue[_PeerLine]] = defaultdict(queue.SimpleQueue)

    def install(self, line: Line) -> None:
        """The model owner's line: a plan and shares of weights, in place of those before.

        Raises:
            PartyLost: they are damaged.
        """
        header, payload = line.receive()
        try:
            plan = FixedPointPlan.from_json(header["plan"])
            model = Model(str(header["name"]), plan, weights_from(header, payload))
        except Exception as error:  # whatever it is that reading another's message fails of
            raise PartyLost(f"{line.party} sent garbage: no model ({type(error).__name__}: {error})") from None
        self._model = model
        line.send(name=model.name)
        _say(f"model {model.name[:8]} installed: {len(model.plan.layers)} layers")

    def peer(self, line: Line) -> None:
        """Server 1's line, for the session that it names.

        Raises:
            PartyLost: no data owner begins that session here.
        """
        header, _ = line.receive()
        session, own = str(header.get("session")), _PeerLine(line)
        self._dialled_by_peer[session].put(own)
        if not own.taken.wait(self._timeout):
            self._dialled_by_peer.pop(session, None)
            raise PartyLost(f"the data owner did not begin the session at {self._own.role} in {self._timeout:g} s")
        own.done.wait()

    def session(self, line: Line) -> None:
        """A data owner's line, from its beginning to its end.

        Raises:
            MpcError: there is no model.
            PartyLost: a party is lost.
        """
        header, _ = line.receive()
        session = str(header.get("session"))
        model = self._model
        if model is None:
            raise MpcError(f"{self._own.role} holds no model yet; the model owner runs 'sordino mpc provide'")
        _say(f"session {session[:8]} begins")
        try:
            self._computed(line, session, model)
        except Exception as error:
            _say(f"session {session[:8]} broke: {error if isinstance(error, MpcError) else type(error).__name__}")
            raise
        _say(f"session {session[:8]} ends")

    def _computed(self, line: Line, session: str, model: Model) -> None:
        """All that a session asks for."""
        with _Session(self, session) as party:
            encoder = Encoder.mask_and_open(party, model.weights, model.plan)
            width, largest = model.weights["norm.weight"].shape[0], model.plan.layers[-1].norm2.largest
            ranges = {"largest": largest, "entering": model.plan.entering}
            line.send(model=model.name, fraction=FRACTION, width=width, ranges=ranges, **_news(party.costs))
            traces: dict[tuple[Shape, ...], RequestTrace] = {}
            while True:
                header, payload = line.receive()
                if header.get("end"):
                    break
                self._answer(line, party, encoder, traces, header, payload)

    def _answer(
        self,
        line: Line,
        party: Party,
        encoder: Encoder,
        traces: dict[tuple[Shape, ...], RequestTrace],
        header: Header,
        payload: Octets,
    ) -> None:
        """Run the batches of one message; of each, send shares of its features, and costs and seconds since the last.

        Each is answered when it is done, so that its owner sees that this server gets on. What batches of the same
        shapes asked the dealer for, the first time, is asked for ahead from then on.
        """
        began, before = time.perf_counter(), party.randomness.seconds
        batches = batches_of(line, header)
        shapes = tuple(batch["shape"] for batch in batches)
        if shapes in traces:
            party.randomness.prepare(traces[shapes], HELD)
            recording: AbstractContextManager[Any] = nullcontext()
        else:
            recording = party.randomness.recording()
        shares = unpack_each(payload, shapes, [WORD] * len(shapes))
        with recording as trace:
            for batch, share in zip(batches, shares, strict=True):
                found = encode_sentences(party, encoder, Shared(share, FRACTION), batch["lengths"])
                now, offline = time.perf_counter(), party.randomness.seconds - before
                form = {"fraction": found.fraction, "bits": found.bits}
                seconds = {"offline": offline, "online": now - began - offline}
                line.send(pack(found.share, WORD), **form, seconds=seconds, **_news(party.costs))
                began, before = now, party.randomness.seconds
        if trace is not None:
            traces[shapes] = trace

    def line_to_peer(self, session: str) -> tuple[Line, Any]:
        """For server 1 a new line to server 0; for server 0 the one that it gets. And what ends it."""
        if self.number == 1:
            if self._peer is None:
                raise MpcError("server-1 was not told where server-0 is; start it with --peer HOST:PORT")
            dialled = Dialled(self._own, SERVERS[0], self._peer, self._timeout)
            line = dialled.line("Peer")
            line.send(session=session)
            return line, dialled.close
        try:
            own = self._dialled_by_peer[session].get(timeout=self._timeout)
        except queue.Empty:
            raise PartyLost(f"server-1 did not begin the session within {self._timeout:g} s") from None
        finally:
            self._dialled_by_peer.pop(session, None)
        own.taken.set()
        return own.line, own.done.set

    def channel(self, line: Line) -> Channel:
        """To the other server, as slow as the network that is imitated."""
        plain = LineChannel(line)
        return Throttled(plain, self._network) if self._network else plain

    def dealer(self, session: str) -> RemoteDealer:
        """A line to the dealer."""
        return RemoteDealer(self._own, self._dealer, session, self._timeout)


class _Session:
    """A party for one session; what fails within is told to the other server before the line to it ends."""

    def __init__(self, service: ServerService, session: str) -> None:
        self._service, self._session = service, session

    def __enter__(self) -> Party:
        service = self._service
        self._dealer: RemoteDealer | None = None
        self._line, self._end = service.line_to_peer(self._session)
        try:
            self._dealer = service.dealer(self._session)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        costs = Costs()
        randomness = CorrelatedRandomness(Prg(self._dealer.key), costs, self._dealer if service.number else None)
        return Party(service.number, service.channel(self._line), randomness, costs)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._dealer:
            with suppress(PartyLost):
                self._dealer.close()
        if error is not None:
            self._line.fail(str(error) if isinstance(error, MpcError) else f"failed with {type(error).__name__}")
        self._line.close()
        threading.Timer(LINGER, self._end).start()


def start_server(
    own: Identity,
    address: str,
    dealer: str,
    peer: str | None = None,
    timeout: float = 60.0,
    network: Network | None = None,
) -> tuple[grpc.Server, str]:
    """Compute for data owners; see `ServerService`.

    Returns:
        The server, and its address with its port.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    service = ServerService(own, dealer, peer, timeout, network)
    methods = {"Install": {MODEL_OWNER: service.install}, "Session": {DATA_OWNER: service.session}}
    if service.number == 0:
        methods["Peer"] = {SERVERS[1]: service.peer}
    return listen(own, address, timeout, methods)


def weights_to(weights: dict[str, Shared]) -> tuple[Header, bytes]:
    """Shares as a message."""
    forms = {name: {"shape": list(part.shape), "fraction": part.fraction} for name, part in weights.items()}
    return {"weights": forms}, b"".join(pack(part.share, WORD) for part in weights.values())


def weights_from(header: Header, payload: Octets) -> dict[str, Shared]:
    """The inverse of `weights_to`.

    Raises:
        KeyError, TypeError, ValueError, PartyLost: it is none.
    """
    forms = header["weights"]
    shapes = [tuple(int(side) for side in form["shape"]) for form in forms.values()]
    shares = unpack_each(payload, shapes, [WORD] * len(shapes))
    return {
        str(name): Shared(share, int(form["fraction"]))
        for (name, form), share in zip(forms.items(), shares, strict=True)
    }


def batches_of(line: Line, header: Header) -> list[dict[str, Any]]:
    """Forms of the batches of a message: shapes [B, T, E] and lengths [B].

    Raises:
        PartyLost: they are none.
    """
    try:
        found = []
        for batch in header["batches"]:
            shape, lengths = tuple(int(side) for side in batch["shape"]), torch.tensor(batch["lengths"])
            if len(shape) != 3 or lengths.shape != shape[:1] or not 2 <= int(lengths.max()) <= shape[1]:
                raise ValueError(f"shape {shape} with {len(lengths)} lengths")
            found.append({"shape": shape, "lengths": lengths})
        return found
    except Exception as error:  # whatever it is that reading another's message fails of
        raise PartyLost(f"{line.party} sent garbage: no sentences ({type(error).__name__}: {error})") from None


def _news(costs: Costs) -> Header:
    """What was spent since the last message."""
    return {"costs": costs.taken()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
