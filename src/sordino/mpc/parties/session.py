"""The owners' ends. A model owner gives two servers shares of a tower, and a data owner gets features from them.

    provide(identity, servers, tower, calibration)                       # once, by the model owner

    with connect(identity, servers) as session:                          # the data owner
        features = session.forward(groups)                               # a `sentences.Forward`
    session.costs.table()

The data owner sends each server one share of its sentences, and nobody else gets a share. Features are opened only
here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from sordino.mpc.arithmetic.packing import Octets, pack, unpack_each
from sordino.mpc.arithmetic.ring import WORD, encode, share
from sordino.mpc.dealing.costs import Costs
from sordino.mpc.errors import MpcError, OutOfRange, PartyLost
from sordino.mpc.parties.certificates import SERVERS, Identity
from sordino.mpc.parties.model_share import Model
from sordino.mpc.parties.shown import check_shown
from sordino.mpc.parties.transport import ClientConnection, Header, Stream
from sordino.mpc.protocols.party import Shared, reconstruct
from sordino.mpc.tower.calibration import Calibration, Range
from sordino.mpc.tower.encoder import shared_weights
from sordino.mpc.tower.fixed_point_plan import FixedPointPlan
from sordino.mpc.tower.sentences import Sentences
from sordino.mpc.tower.tower import PrivateTower
from sordino.randomness import system_bytes

SECONDS = "online", "offline"
T = TypeVar("T")


@dataclass(frozen=True)
class _Form:
    """The servers' description of their model.

    Attributes:
        name: drawn by the model's owner.
        sharing: drawn anew whenever the owner shares its weights. Shares of two sharings do not add up to weights.
        fraction: fraction bits of embeddings.
        width: E.
        largest: bound on the size of features.
        first, rest: allowed variances of embeddings, of first tokens and of others.
    """

    name: str
    sharing: str
    fraction: int
    width: int
    largest: float
    first: Range
    rest: Range

    @classmethod
    def of(cls, header: Header) -> _Form:
        """Parse the header that a server sends."""
        ranges = header["ranges"]
        (low, high), (lower, higher) = ranges["entering"]
        return cls(
            name=str(header["model"]),
            sharing=str(header["sharing"]),
            fraction=int(header["fraction"]),
            width=int(header["width"]),
            largest=2.0 ** int(ranges["largest"]),
            first=(float(low), float(high)),
            rest=(float(lower), float(higher)),
        )

    def check(self, group: Sentences) -> None:
        """Check sentences against the model; see `Session.forward` for errors."""
        width = group.embeddings.shape[-1]
        if width != self.width:
            raise MpcError(
                f"embeddings are {width} wide where the servers' model takes {self.width}: set model.embeddings to "
                "the folder that its owner gave"
            )
        variances, is_token = group.embeddings.var(-1, correction=0), group.mask > 0
        rest = variances[:, 1:][is_token[:, 1:]]
        for checked, (low, high) in ((variances[:, 0], self.first), (rest, self.rest)):
            outside = checked[(checked < low) | (checked > high)]
            if len(outside):
                raise OutOfRange(
                    f"embeddings of a variance of {float(outside[0]):.3g} where the servers' model was calibrated for "
                    f"{low:.3g} to {high:.3g}: set search.keep_norms = true, or lower search.scale"
                )


class Session:
    """A data owner's session; see `connect`.

    Attributes:
        costs: of the servers so far: set-up, and each forward pass.
        seconds: spent waiting for the servers.
        model: name of the servers' model, which stays the same if its owner provides it again.
        online, offline: seconds that the slower server computed, and that it waited for dealt randomness.
        sent, received: bytes between this owner and both servers together.
    """

    def __init__(self, streams: tuple[Stream, Stream]) -> None:
        self._streams = streams
        self.costs, self.seconds, self.sent, self.received = Costs(), 0.0, 0, 0
        self.online, self.offline = 0.0, 0.0
        name = system_bytes(16).hex()
        began = time.monotonic()
        for stream in streams:
            stream.send(session=name)
        answers = self._answers()
        self.seconds += time.monotonic() - began
        forms = self._read(answers, lambda header, _: _Form.of(header))
        if forms[0] != forms[1]:
            what = "different models" if forms[0].name != forms[1].name else "one model that do not belong together"
            raise MpcError(f"the servers hold shares of {what}; the model owner must provide one again")
        self._form, self.model = forms[0], forms[0].name
        self._enter(answers)

    def forward(self, groups: Sequence[Sentences]) -> list[Tensor]:
        """Compute mean-pooled last hidden states of each batch of sentences, [B, E], float32; see `sentences.Forward`.

        Raises:
            MpcError: embeddings have another width than the servers' model.
            OutOfRange: embeddings are outside the ranges that the model was calibrated for.
            PartyLost: a party is lost. The error names it.
        """
        began = time.monotonic()
        for group in groups:
            self._form.check(group)
        halves = [share(encode(group.embeddings, self._form.fraction)) for group in groups]
        forms = [{"shape": list(group.embeddings.shape), "lengths": group.lengths.tolist()} for group in groups]
        for number, stream in enumerate(self._streams):
            payload = b"".join(pack(half[number], WORD) for half in halves)
            self.sent += len(payload)
            stream.send(payload, batches=forms)
        features = [self._features(group) for group in groups]
        self.seconds += time.monotonic() - began
        return features

    def close(self) -> None:
        """End the session at both servers."""
        for stream in self._streams:
            stream.send(end=True)
            stream.close()

    def _features(self, group: Sentences) -> Tensor:
        """Open the features of the batch that the servers answer next, [B, E]."""
        answers = self._answers()
        self.received += sum(len(payload) for _, payload in answers)
        first, second = self._read(answers, lambda header, payload: _share_of(header, payload, group))
        seconds = self._read(answers, lambda header, _: {name: float(header["seconds"][name]) for name in SECONDS})
        if (first.fraction, first.bits) != (second.fraction, second.bits):
            raise PartyLost(f"{self._streams[0].party} or {self._streams[1].party} sent garbage: their forms differ")
        features = reconstruct((first, second))
        if float(features.abs().max()) > 2 * self._form.largest:
            servers = f"{self._streams[0].party} or {self._streams[1].party}"
            raise PartyLost(
                f"features came that no sentence has: {servers} is astray, or sentences are unlike those of the "
                "calibration; compare with --clear"
            )
        self._enter(answers)
        self.online += max(server_seconds["online"] for server_seconds in seconds)
        self.offline += max(server_seconds["offline"] for server_seconds in seconds)
        return features.float()

    def _answers(self) -> list[tuple[Header, Octets]]:
        """Wait for both servers' answers. Raise the error of the first server that is lost at once."""
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(stream.receive) for stream in self._streams]
            done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
            errors = [error for answer in done if (error := answer.exception())]
            if errors:
                for stream in self._streams:
                    stream.abandon(str(errors[0]))
                raise errors[0]
        return [answer.result() for answer in waiting]

    def _read(self, answers: Sequence[tuple[Header, Octets]], read: Callable[[Header, Octets], T]) -> list[T]:
        """Parse both servers' answers with `read`."""
        contents = []
        for stream, answer in zip(self._streams, answers, strict=True):
            try:
                contents.append(read(*answer))
            except Exception as error:  # a malformed message can fail in any way
                raise PartyLost(f"{stream.party} sent garbage ({type(error).__name__}: {error})") from None
        return contents

    def _enter(self, answers: Sequence[tuple[Header, Octets]]) -> None:
        """Enter the answers' costs, which both servers count alike."""

        def costs_of(header: Header, _: Octets) -> Costs:
            costs = Costs()
            costs.add_taken(header["costs"])
            return costs

        first, _ = self._read(answers, costs_of)
        self.costs.add_taken(first.taken())


@contextmanager
def connect(identity: Identity, servers: Sequence[str], timeout: float = 60.0) -> Iterator[Session]:
    """Open a session with two servers, which open the weights under masks.

    Args:
        identity: the data owner's.
        servers: addresses of server 0 and server 1.
        timeout: seconds of silence after which a party counts as lost.

    Raises:
        PartyLost: a party is lost. The error names it.
        MpcError: the servers hold no model, or not the same one.
    """
    connections = [
        ClientConnection(identity, role, address, timeout) for role, address in zip(SERVERS, servers, strict=True)
    ]
    try:
        first, second = (connection.stream("Session") for connection in connections)
        session = Session((first, second))
        yield session
        session.close()
        for stream in (first, second):  # wait until the servers have ended, too
            stream.drain()
    finally:
        for connection in connections:
            connection.close()


def check_servers(identity: Identity, servers: Sequence[str], timeout: float = 60.0) -> None:
    """Check whose certificates the servers' addresses show, before work that takes long.

    Raises:
        PartyLost: see `check_shown`.
    """
    for role, address in zip(SERVERS, servers, strict=True):
        check_shown(identity, role, address, timeout)


def provide(
    identity: Identity,
    servers: Sequence[str],
    tower: PrivateTower,
    calibration: Calibration,
    timeout: float = 60.0,
    name: str | None = None,
    plan: FixedPointPlan | None = None,
) -> str:
    """Give each server its share of a tower, and both the plan.

    Args:
        identity: the model owner's.
        servers: addresses of server 0 and server 1.
        tower: in the clear.
        calibration: the tower's ranges.
        timeout: seconds of silence after which a server counts as lost.
        name: of the model, if it was provided before; by default a new one is drawn.
        plan: of the tower and its ranges, if it was made before.

    Returns:
        The random name of the model.

    Raises:
        PartyLost: a server is lost.
        OutOfRange: a range is too wide.
    """
    plan = plan or FixedPointPlan.of(tower, calibration)
    name, sharing = name or system_bytes(8).hex(), system_bytes(8).hex()
    halves = shared_weights(tower, calibration)
    connections = [
        ClientConnection(identity, role, address, timeout) for role, address in zip(SERVERS, servers, strict=True)
    ]
    try:
        streams = [connection.stream("Install") for connection in connections]
        for stream, weights in zip(streams, halves, strict=True):
            header, payload = Model(name, sharing, plan, weights).to_message()
            stream.send(payload, **header)
        for stream in streams:
            stream.receive()
            stream.close()
    finally:
        for connection in connections:
            connection.close()
    return name


def _share_of(header: Header, payload: Octets, group: Sentences) -> Shared:
    """Parse a server's share of a batch's features, [B, E].

    Raises:
        KeyError, TypeError, ValueError, PartyLost: the message is malformed.
    """
    (share,) = unpack_each(payload, [(len(group.lengths), group.embeddings.shape[-1])], [WORD])
    fraction, bits = int(header["fraction"]), int(header["bits"])
    if not 0 <= fraction < bits <= WORD:
        raise ValueError(f"{fraction} fraction bits of {bits}")
    return Shared(share, fraction, bits)
