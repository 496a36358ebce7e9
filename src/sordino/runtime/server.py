"""The server's end of a federation: its state between rounds, and its part of a round.

Only bytes leave the server, and only bytes reach it. It asks clients through a link that a runtime provides: a call
into the same process, a pipe, or a network.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sordino.algorithms.base import (
    Broadcast,
    PersonalBroadcast,
    Server,
    Upload,
    named_tensors,
    take,
)
from sordino.errors import RunError
from sordino.privacy.ledger import ALL_CLIENTS, Ledger, Release
from sordino.privacy.mechanism import WEIGHT, ServerRoundMechanism
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.privacy.uploads.secure_mean import ServerSums
from sordino.randomness import system_bytes
from sordino.runtime import messages
from sordino.runtime.aggregation import aggregated
from sordino.runtime.facts import Federation, RandomnessOf, participants
from sordino.runtime.messages import MessageError, RoundHeader
from sordino.runtime.records import ProtocolRecord, protocol_record
from sordino.runtime.release import RELEASE_ROUND, Keep, collect, drawn_anew
from sordino.runtime.uploads import Diverged, RoundError, Uploads, error_of, means_alone, read_uploads, stacked_upload
from sordino.secure import Carrier, Refusal, SecureError

Result = TypeVar("Result")
Link = Carrier  # carries messages to clients, by their numbers in the federation
Observe = Callable[[int, Sequence[int], Server, Upload], None]  # a round, who answered, the state before it, uploads
SESSION_BYTES = 16


@dataclass(frozen=True)
class ServerTraining:
    """The server's state after a round; its checkpoint holds all of it.

    Attributes:
        round: counted from 1; 0 before the first.
        state: the method's state.
        mechanism: the privacy mechanism's state.
        ledger: all releases so far.
        release: what all clients' class statistics tell together, by name; empty if nothing does.
        released: whether class statistics were released.
    """

    round: int
    state: Server
    mechanism: dict[str, Tensor] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    release: Mapping[str, Tensor] = field(default_factory=dict)
    released: bool = False


@dataclass(frozen=True)
class ServerRecord:
    """The server's record of a round.

    Attributes:
        participants: the numbers of the clients that took part.
        upload_bytes, broadcast_bytes: bytes of the first participant's messages as sent; 0 if nobody took part.
        protocol: statistics of the protocol on shares, or None if there was none.
        lost: those who were asked and whose upload is not in the result, with the reason of each.
        void: why the round changed nothing; empty if it did not fail.
    """

    participants: tuple[int, ...]
    upload_bytes: int
    broadcast_bytes: int
    protocol: ProtocolRecord | None
    lost: Mapping[int, str] = field(default_factory=dict)
    void: str = ""


class ServerEnd:
    """The server of a federation, between rounds.

    Args:
        federation: what all parties agreed on.
        randomness: the source of noise and of the choice of clients; by default the operating system. Only a
            simulation, which plays all parties, gives another.
        observe: for attacks on a run, is given what the server receives in each round.

    Raises:
        ConfigError: the run is a simulation, and no randomness is given.
    """

    def __init__(
        self, federation: Federation, randomness: RandomnessOf | None = None, observe: Observe | None = None
    ) -> None:
        self.federation, self.randomness, self._observe = federation, federation.randomness(randomness), observe

    def start(self, run: str = "", data: Mapping[str, str] | None = None) -> ServerTraining:
        """Return the state before the first round.

        Args:
            run: the run's name, which no other run has.
            data: party to a digest of its data.
        """
        federation = self.federation
        ledger = replace(federation.empty_ledger(), run=run, data=dict(data or {}))
        init = federation.init_context(range(federation.clients))
        state = federation.algorithm.server_init(federation.settings, init)
        return ServerTraining(0, state, federation.mechanism.initial_state(), ledger)

    def release(self, training: ServerTraining, link: Link, keep: Keep = drawn_anew) -> ServerTraining:
        """Have the clients release their class statistics; it comes before the first round, where there is one.

        Args:
            training: the state before it.
            link: brings messages to clients, and returns their replies.
            keep: keeps what the server noised before it is told; see `collect`.

        Raises:
            RoundError: a client did not answer as was agreed, or the secure sum failed.
        """
        mechanism = self.federation.mechanism
        assert isinstance(mechanism, StatisticsMechanism)
        assert not training.released, "statistics are released once"
        randomness = self.randomness(RELEASE_ROUND, [0])
        try:
            release = collect(mechanism, link, randomness, training.ledger.run, self.federation.device, keep)
        except (MessageError, SecureError) as error:
            ledger = training.ledger.add(mechanism.released(training.ledger.run))  # some may have left
            raise RoundError(f"before the first round: {error}", ledger) from None
        ledger = training.ledger.add(release.releases)
        return replace(training, ledger=ledger, release=release.statistics.tensors, released=True)

    def round(
        self, training: ServerTraining, link: Link, quorum: Callable[[int], int] | None = None
    ) -> tuple[ServerTraining, ServerRecord]:
        """Run the next round.

        1. Choose the participants, and send each its broadcast.
        2. Read the uploads, and enter their releases.
        3. Average, with noise if the server adds it; run the protocol on shares, if there is one.
        4. Compute the next state from the result.

        With a quorum the round goes on without those who are lost: who do not answer, or not as was agreed. If fewer
        than the quorum are left, or a secure sum fails, the round is void. It then changes nothing but the ledger, in
        which the releases of all who were asked stay, because they may have left.

        Args:
            training: the state before it.
            link: brings messages to clients, and returns the replies that came.
            quorum: from the number of participants to how many are enough; None needs all of them, and raises an error
                otherwise. Poisson sampling draws the participants here, once: a round that was judged by another draw
                would be released for samples of some sizes only, and epsilon of a Poisson sample would not hold.

        Raises:
            Diverged: an upload, or the next state, is not finite.
            RoundError: without a quorum, an upload is not what was agreed, a client did not answer, or a secure sum
                failed.
            RunError: the link raised it; nothing was released.
        """
        federation, number = self.federation, training.round + 1
        chosen = self.participants(number)
        session = system_bytes(SESSION_BYTES).hex() if federation.mechanism.sums_securely else ""
        contents = self._broadcasts(training, chosen, session)
        uploads = read_uploads(federation, number, chosen, dict(link(contents)) if contents else {})
        if quorum is None and uploads.lost:
            (client, error), *_ = uploads.lost.items()
            # Each client's end keeps to the plan before it sends.
            raise error_of(number, client, error, training.ledger.add(federation.mechanism.round_releases(chosen)))
        unused = self._releases_of(uploads.lost, chosen)
        needed = quorum(len(chosen)) if quorum is not None and chosen else 0
        if len(uploads.clients) < needed:
            reason = f"{len(uploads.clients)} of {len(chosen)} answered as was agreed, and {needed} are needed"
            # A server that died may have opened a secure sum, and forgotten it. A void round of sampled clients tells
            # the size of the sample, and rounds that are not void are no Poisson samples by themselves.
            mechanism = federation.mechanism
            opened = [ALL_CLIENTS] if mechanism.sums_securely or mechanism.samples_clients else []
            releases = self._releases_of(chosen, chosen, opened)
            return self._void(training, uploads, training.ledger.add(releases), reason)
        came = uploads.clients
        carrier = _by_place(link, chosen, came)
        sums = self._sums(session, chosen, came, carrier)
        randomness = self.randomness(number, came or [0])
        mechanism_round = federation.mechanism.server_end(randomness, came, training.mechanism, sums)
        mechanism_round.releases.extend(federation.mechanism.entered(came, uploads.rates))
        try:
            federation.mechanism.check(mechanism_round.releases, came)
        except RunError as error:  # a client's end broke the plan without reporting it
            raise RoundError(str(error), training.ledger.add([*mechanism_round.releases, *unused])) from None
        upload, below_clip = stacked_upload(federation, uploads.parts)
        if self._observe:
            self._observe(number, came, training.state, upload)
        try:
            state, protocol = self._next_state(training, upload, chosen, came, mechanism_round, carrier)
            finished = mechanism_round.finish(below_clip)
        except SecureError as error:  # a sum of this round may have been opened before
            ledger = training.ledger.add([*mechanism_round.releases, *unused])
            if quorum is None:
                raise RoundError(f"round {number}: {error}", ledger) from None
            return self._void(training, uploads, ledger, str(error))
        entered = training.ledger.add([*mechanism_round.releases, *unused])
        after = replace(training, round=number, state=state, mechanism=finished, ledger=entered)
        if not finite(state):
            raise Diverged(f"the server's state is not finite after round {number}", after.ledger)
        up, down = (uploads.sent, len(contents[came[0]])) if came else (0, 0)
        if protocol:  # the protocol's messages carry the upload
            up, down = protocol.sent, down + protocol.received
        if sums:
            up, down = up + sums.sent, down + sums.received
        return after, ServerRecord(tuple(came), up, down, protocol, uploads.reasons)

    def last_broadcasts(self, training: ServerTraining, clients: Sequence[int]) -> dict[int, bytes]:
        """Return what clients would be sent next, by client: with its own state it makes the client's prompt."""
        return self._broadcasts(training, clients, "")

    def _void(
        self, training: ServerTraining, uploads: Uploads, ledger: Ledger, reason: str
    ) -> tuple[ServerTraining, ServerRecord]:
        """Return the state after a round that failed: clients have noised it, so it is not run again."""
        after = replace(training, round=training.round + 1, ledger=ledger)
        return after, ServerRecord((), 0, 0, None, uploads.reasons, reason)

    def _releases_of(self, some: Iterable[int], chosen: Sequence[int], others: Iterable[str] = ()) -> list[Release]:
        """Return what some of the clients of a round, and others, may have released in it, as planned."""
        parties = {*(f"client {client}" for client in some), *others}
        return [release for release in self.federation.mechanism.round_releases(chosen) if release.party in parties]

    def _next_state(
        self,
        training: ServerTraining,
        upload: Upload,
        chosen: Sequence[int],
        came: Sequence[int],
        mechanism_round: ServerRoundMechanism,
        carrier: Carrier,
    ) -> tuple[Server, ProtocolRecord | None]:
        """Return the method's next state, and the record of a protocol on shares, if there was one."""
        federation = self.federation
        server_exchange = getattr(federation.algorithm, "server_exchange", None)
        mechanism = federation.mechanism
        # Participants of a protocol have their places, even if they are lost; of a sample nothing is known.
        there = range(federation.clients) if mechanism.samples_clients else chosen if server_exchange else came
        round_context = federation.round_context(training.round + 1, there)
        began = time.monotonic()
        if server_exchange:
            method = (federation.settings, federation.model, training.state)
            uploads: Any = server_exchange(*method, upload, chosen, round_context, carrier)
        elif mechanism.noised_by_server:
            uploads = means_alone(federation, upload, mechanism_round.average)
        else:
            uploads = aggregated(federation.runtime, upload, mechanism_round.average)
        state: Server = federation.algorithm.server_round(federation.settings, training.state, uploads, round_context)
        return state, protocol_record(uploads, time.monotonic() - began)

    def within_budget(self, training: ServerTraining) -> bool:
        """Return whether the next round's releases, added to the ledger, stay within the budget."""
        releases = self._round_releases(training.round + 1)
        return self.federation.mechanism.affords(training.ledger, releases)

    def pays_for_all(self, training: ServerTraining) -> bool:
        """Return whether all remaining rounds stay within the budget; then no later check is needed."""
        remaining = range(training.round + 1, self.federation.rounds + 1)
        releases = [release for number in remaining for release in self._round_releases(number)]
        return self.federation.mechanism.affords(training.ledger, releases)

    def participants(self, number: int) -> list[int]:
        """Return the clients that take part in a round, ascending; Poisson sampling may choose none."""
        federation = self.federation
        participation = federation.runtime.participation
        if not federation.mechanism.samples_clients:
            chosen = participants(federation.seed, number, federation.clients, participation)
            return [int(client) for client in chosen]
        drawn = self.randomness(number, [0]).uniform("participants", [federation.clients])[0]
        return [int(client) for client in (drawn < participation).nonzero().flatten()]

    def _round_releases(self, number: int) -> list[Release]:
        # If Poisson sampling chooses the clients, the releases do not depend on which it chooses.
        sampled = self.federation.mechanism.samples_clients
        clients = range(self.federation.clients) if sampled else self.participants(number)
        return self.federation.mechanism.round_releases(clients)

    def _sums(self, session: str, chosen: Sequence[int], came: Sequence[int], carrier: Carrier) -> ServerSums | None:
        if not session:
            return None
        learned = named_tensors(self.federation.schemas.upload)
        fields = {name: tensor for name, tensor in learned.items() if name != WEIGHT}
        there = set(came)
        present = [place for place, client in enumerate(chosen) if client in there]
        return ServerSums(self.federation.mechanism.settings, session, len(chosen), carrier, fields, present)

    def _broadcasts(self, training: ServerTraining, chosen: Sequence[int], session: str) -> dict[int, bytes]:
        """Return each participant's broadcast as bytes, by client."""
        federation = self.federation
        broadcast = messages.on_host(federation.algorithm.broadcast(training.state))
        clip = federation.mechanism.broadcast_clip(training.mechanism)
        contents: dict[int, bytes] = {}
        for place, client in enumerate(chosen):
            client_broadcast: Broadcast = broadcast
            if isinstance(broadcast, PersonalBroadcast):
                client_broadcast = take(broadcast, torch.tensor([client]))
            # Who else is in a sample of clients is what its rate keeps from them, so they are told nothing of it.
            seat = (client, federation.clients) if federation.mechanism.samples_clients else (place, len(chosen))
            header = RoundHeader(training.round + 1, *seat, session)
            message = federation.broadcast_message(client_broadcast, clip)
            contents[client] = messages.encode(message, header)
        return contents


class Questions(Generic[Result]):
    """A function that asks through a link, turned round: its questions come out, and replies go in.

    The function runs in a thread of its own, which only ever runs while the caller waits for its next question.

    Attributes:
        pending: the question; None: the function has returned.
        first: it is the function's first.
    """

    def __init__(self, function: Callable[[Link], Result]) -> None:
        self._asked: queue.Queue[Mapping[int, bytes] | None] = queue.Queue()
        self._replies: queue.Queue[list[tuple[int, bytes | Refusal]] | None] = queue.Queue()
        self._outcome: list[Result] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=[function], daemon=True)
        self._thread.start()
        self.pending, self.first = self._asked.get(), True

    def reply(self, replies: Sequence[tuple[int, bytes | Refusal]]) -> None:
        """Give the replies to the pending question; then the next one is pending, or None."""
        self._replies.put(list(replies))
        self.pending, self.first = self._asked.get(), False

    def result(self) -> Result:
        """Return what the function returned, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def drop(self) -> None:
        """Give up: the function sees an error where it asks."""
        if self.pending is not None:
            self._replies.put(None)
            self._thread.join()

    def _run(self, function: Callable[[Link], Result]) -> None:
        try:
            self._outcome.append(function(self._link))
        except BaseException as error:
            self._error = error
        finally:
            self._asked.put(None)

    def _link(self, contents: Mapping[int, bytes]) -> list[tuple[int, bytes | Refusal]]:
        self._asked.put(contents)
        replies = self._replies.get()
        if replies is None:
            raise MessageError("the round was given up")
        return replies


def finite(state: Any) -> bool:
    """Return whether all numbers of a state are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in named_tensors(state).values())


def _by_place(link: Link, chosen: Sequence[int], came: Sequence[int]) -> Carrier:
    """Return a carrier that addresses clients by their place among those chosen; it asks only those who came."""
    places, there = {client: place for place, client in enumerate(chosen)}, set(came)

    def carry(contents: Mapping[int, bytes]) -> list[tuple[int, bytes | Refusal]]:
        asked = {chosen[place]: content for place, content in contents.items()}
        replies = link({client: content for client, content in asked.items() if client in there})
        return [(places[client], reply) for client, reply in replies if client in places]

    return carry
