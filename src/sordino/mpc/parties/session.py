"""The owners' ends: a model owner gives two servers shares of a tower; a data owner asks them for features.

    provide(identity, servers, tower, calibration)                       # once, by the model owner

    with connect(identity, servers) as session:                          # the data owner
        features = session.forward(groups)                               # a `sentences.Forward`
    session.costs.table()

What the data owner sends is a share to each server; the other share exists nowhere else. Features are opened here, and
nowhere else.
"""

from __future__ import annotations

import secrets
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
from sordino.mpc.parties.server import weights_to
from sordino.mpc.parties.transport import Dialled, Header, Line
from sordino.mpc.protocols.party import Shared, reconstruct
from sordino.mpc.tower.calibration import Calibration, Range
from sordino.mpc.tower.encoder import shared_weights
from sordino.mpc.tower.fixed_point_plan import FixedPointPlan
from sordino.mpc.tower.sentences import Sentences
from sordino.mpc.tower.tower import PrivateTower

SECONDS = "online", "offline"
T = TypeVar("T")


@dataclass(frozen=True)
class _Form:
    """What servers say of their model: its name, and what embeddings and features of it are like.

    Attributes:
        name: drawn by its owner.
        fraction: bits of embeddings.
        width: E.
        largest: size of features.
        first, rest: variances of embeddings, of first tokens and of others.
    """

    name: str
    fraction: int
    width: int
    largest: float
    first: Range
    rest: Range

    @classmethod
    def of(cls, header: Header) -> _Form:
        """As a server sends it."""
        ranges = header["ranges"]
        (low, high), (lower, higher) = ranges["entering"]
        form = str(header["model"]), int(header["fraction"]), int(header["width"]), 2.0 ** int(ranges["largest"])
        return cls(*form, (float(low), float(high)), (float(lower), float(higher)))

    def check(self, group: Sentences) -> None:
        """See `Session.forward`."""
        width = group.embeddings.shape[-1]
        if width != self.width:
            raise MpcError(
                f"embeddings are {width} wide where the servers' model takes {self.width}: set model.embeddings to "
                "the folder that its owner gave"
            )
        variances, there = group.embeddings.var(-1, correction=0), group.mask > 0
        for found, (low, high) in ((variances[:, 0], self.first), (variances[:, 1:][there[:, 1:]], self.rest)):
            outside = found[(found < low) | (found > high)]
            if len(outside):
                raise OutOfRange(
                    f"embeddings of a variance of {float(outside[0]):.3g} where the servers' model was calibrated for "
                    f"{low:.3g} to {high:.3g}: set search.keep_norms = true, or lower search.scale"
                )


class Session:
    """A data owner's session; see `connect`.

    Attributes:
        costs: of the servers, of all that was done so far: set-up, and each forward pass.
        seconds: waited for them.
        online, offline: seconds that the slower server took for forward passes; what was dealt ahead is offline.
        sent, received: bytes between this owner and both servers together.
    """

    def __init__(self, lines: tuple[Line, Line]) -> None:
        self._lines = lines
        self.costs, self.seconds, self.sent, self.received = Costs(), 0.0, 0, 0
        self.online, self.offline = 0.0, 0.0
        name = secrets.token_hex(16)
        began = time.monotonic()
        for line in lines:
            line.send(session=name)
        answers = self._answers()
        self.seconds += time.monotonic() - began
        forms = self._read(answers, lambda header, _: _Form.of(header))
        if forms[0] != forms[1]:
            raise MpcError("the servers hold shares of different models; the model owner must provide one again")
        self._form = forms[0]
        self._enter(answers)

    def forward(self, groups: Sequence[Sentences]) -> list[Tensor]:
        """Mean-pooled last hidden states of each batch of sentences, [B, E], float32; see `sentences.Forward`.

        Raises:
            MpcError: embeddings are not those of the servers' model.
            OutOfRange: they are not such as the model was calibrated for.
            PartyLost: a party is lost; the error names it.
        """
        began = time.monotonic()
        for group in groups:
            self._form.check(group)
        halves = [share(encode(group.embeddings, self._form.fraction)) for group in groups]
        forms = [{"shape": list(group.embeddings.shape), "lengths": group.lengths.tolist()} for group in groups]
        for number, line in enumerate(self._lines):
            payload = b"".join(pack(half[number], WORD) for half in halves)
            self.sent += len(payload)
            line.send(payload, batches=forms)
        features = [self._features(group) for group in groups]
        self.seconds += time.monotonic() - began
        return features

    def close(self) -> None:
        """The servers are not needed any more."""
        for line in self._lines:
            line.send(end=True)
            line.close()

    def _features(self, group: Sentences) -> Tensor:
        """Of the batch that the servers answer next, [B, E]."""
        answers = self._answers()
        self.received += sum(len(payload) for _, payload in answers)
        first, second = self._read(answers, lambda header, payload: _share_of(header, payload, group))
        took = self._read(answers, lambda header, _: {name: float(header["seconds"][name]) for name in SECONDS})
        if (first.fraction, first.bits) != (second.fraction, second.bits):
            raise PartyLost(f"{self._lines[0].party} or {self._lines[1].party} sent garbage: their forms differ")
        features = reconstruct((first, second))
        if float(features.abs().max()) > 2 * self._form.largest:
            raise PartyLost(
                f"features came that no sentence has: {self._lines[0].party} or {self._lines[1].party} is astray, or "
                "sentences are unlike those of the calibration; compare with --clear"
            )
        self._enter(answers)
        self.online += max(one["online"] for one in took)
        self.offline += max(one["offline"] for one in took)
        return features.float()

    def _answers(self) -> list[tuple[Header, Octets]]:
        """What both servers say; as soon as one is lost, who is at fault."""
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(line.receive) for line in self._lines]
            done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
            errors = [error for each in done if (error := each.exception())]
            if errors:
                for line in self._lines:
                    line.abandon(str(errors[0]))
                raise errors[0]
        return [each.result() for each in waiting]

    def _read(self, answers: Sequence[tuple[Header, Octets]], read: Callable[[Header, Octets], T]) -> list[T]:
        """What is in both servers' answers."""
        found = []
        for line, answer in zip(self._lines, answers, strict=True):
            try:
                found.append(read(*answer))
            except Exception as error:  # whatever it is that reading another's message fails of
                raise PartyLost(f"{line.party} sent garbage ({type(error).__name__}: {error})") from None
        return found

    def _enter(self, answers: Sequence[tuple[Header, Octets]]) -> None:
        """Costs, which both servers count alike."""

        def costs_of(header: Header, _: Octets) -> Costs:
            costs = Costs()
            costs.add_taken(header["costs"])
            return costs

        first, _ = self._read(answers, costs_of)
        self.costs.add_taken(first.taken())


@contextmanager
def connect(own: Identity, servers: Sequence[str], timeout: float = 60.0) -> Iterator[Session]:
    """A session with two servers, set up: the weights are opened under masks.

    Args:
        own: the data owner's identity.
        servers: addresses of server 0 and server 1.
        timeout: seconds of silence after which a party counts as lost.

    Raises:
        PartyLost: a party is lost; the error names it.
        MpcError: the servers hold no model, or not the same.
    """
    dialled = [Dialled(own, role, address, timeout) for role, address in zip(SERVERS, servers, strict=True)]
    try:
        first, second = (each.line("Session") for each in dialled)
        session = Session((first, second))
        yield session
        session.close()
        for line in (first, second):  # until the servers have ended, too
            line.drain()
    finally:
        for each in dialled:
            each.close()


def provide(
    own: Identity, servers: Sequence[str], tower: PrivateTower, calibration: Calibration, timeout: float = 60.0
) -> str:
    """Give the servers shares of a tower, each what it may hold, and the plan to both.

    Args:
        own: the model owner's identity.
        servers: addresses of server 0 and server 1.
        tower: in the clear.
        calibration: its ranges.
        timeout: seconds of silence after which a server counts as lost.

    Returns:
        The name that was drawn for the model.

    Raises:
        PartyLost: a server is lost.
        OutOfRange: a range is too wide.
    """
    plan, halves, name = (
        FixedPointPlan.of(tower, calibration).to_json(),
        shared_weights(tower, calibration),
        secrets.token_hex(8),
    )
    dialled = [Dialled(own, role, address, timeout) for role, address in zip(SERVERS, servers, strict=True)]
    try:
        lines = [each.line("Install") for each in dialled]
        for line, weights in zip(lines, halves, strict=True):
            header, payload = weights_to(weights)
            line.send(payload, name=name, plan=plan, **header)
        for line in lines:
            line.receive()
            line.close()
    finally:
        for each in dialled:
            each.close()
    return name


def _share_of(header: Header, payload: Octets, group: Sentences) -> Shared:
    """Of a batch's features, [B, E].

    Raises:
        KeyError, TypeError, ValueError, PartyLost: it is none.
    """
    (share,) = unpack_each(payload, [(len(group.lengths), group.embeddings.shape[-1])], [WORD])
    fraction, bits = int(header["fraction"]), int(header["bits"])
    if not 0 <= fraction < bits <= WORD:
        raise ValueError(f"{fraction} fraction bits of {bits}")
    return Shared(share, fraction, bits)
