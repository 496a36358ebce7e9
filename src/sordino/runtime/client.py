"""The clients' end of a federation: a stack of clients that share a process, and their part of a round.

Only bytes reach the clients, and only bytes leave them. A process that holds one client and a process that simulates
a thousand run the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sordino.algorithms.base import (
    AnyUpload,
    Broadcast,
    ClientData,
    ClientState,
    ClippedBroadcast,
    PersonalBroadcast,
    map_tensors,
    named_tensors,
    put,
    take,
)
from sordino.errors import ConfigError, RunError
from sordino.privacy.gradients import Batch, Parameters
from sordino.privacy.mechanism import WEIGHT, ClientRoundMechanism
from sordino.privacy.sampling import PoissonSampler
from sordino.privacy.statistics.estimates import Released, drawn
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.privacy.uploads.secure_mean import sum_parties
from sordino.runtime import messages
from sordino.runtime.facts import Federation, RandomnessOf, client_data, participants, stacked, stand_in
from sordino.runtime.messages import MessageError, RoundHeader, UploadHeader
from sordino.runtime.release import RELEASE_ROUND, ClientsRelease
from sordino.secure import Party, Refusal, answered


@dataclass(frozen=True)
class ClientTraining:
    """The state of a stack of clients between rounds; their checkpoint holds all of it.

    Attributes:
        round: the last round that one of them took part in; 0 before the first.
        state: the method's state, each tensor [K, ...].
        release: the clients' class statistics as they were released, by name; empty if there are none, or not yet.
    """

    round: int
    state: ClientState
    release: Mapping[str, Tensor] = field(default_factory=dict)


class ClientEnd:
    """A stack of clients, between rounds.

    Args:
        federation: what all parties agreed on.
        data: the examples of the K clients of this stack.
        numbers: [K], their numbers in the federation, ascending.
        randomness: the source of noise and samples; by default the operating system. Only a simulation, which plays
            all parties, gives another.
        boosts: client to the factor on its upload, for attackers that send more than they learned.

    Raises:
        ConfigError: the run is a simulation, and no randomness is given; or persons are protected, and the data do not
            say whose they are, or have other weights than the noise was computed for.
    """

    def __init__(
        self,
        federation: Federation,
        data: ClientData,
        numbers: Sequence[int],
        randomness: RandomnessOf | None = None,
        boosts: Mapping[int, float] | None = None,
    ) -> None:
        self.federation, self.data, self.numbers = federation, data, list(numbers)
        self.randomness = federation.randomness(randomness)
        self.boosts = dict(boosts or {})
        self._drawn: tuple[Mapping[str, Tensor], ClientData] | None = None
        self._releasing: tuple[ClientTraining, ClientReleaseRound] | None = None
        mechanism = federation.mechanism
        planned = [mechanism.inputs.weights[client] for client in self.numbers]
        if mechanism.settings.by_person and (data.persons is None or data.weights.tolist() != planned):
            raise ConfigError(
                "privacy.unit",
                "person",
                f"clients {self.numbers} must say whose their images are, and have weights of {planned}, which count "
                "persons; make their data by client_data with `persons` and with `sizes` of `Units.of`",
            )

    def start(self) -> ClientTraining:
        """Return the state before the first round."""
        init = self.federation.init_context(self.numbers)
        data = self.data
        if isinstance(self.federation.mechanism, StatisticsMechanism):  # the real start follows the release
            data = stand_in(self.federation, len(self.numbers))
        state = self.federation.algorithm.client_init(self.federation.settings, init, data)
        return ClientTraining(0, state)

    def round(self, training: ClientTraining) -> ClientRound | ClientReleaseRound:
        """Return the next round, which waits for the server's messages; the release of statistics comes first.

        For one state there is one release, however often it is asked for: its noise is drawn once.

        Raises:
            RunError: the clients have been through rounds, and what they released before is not in their state.
        """
        if not self.federation.mechanism.releases_statistics or training.release:
            return ClientRound(self, training)
        if training.round:  # another release would be one that nobody counted
            raise RunError(
                f"clients {self.numbers} are after round {training.round} without the statistics that they released; "
                "load their state from a checkpoint that holds them"
            )
        if self._releasing is None or self._releasing[0] is not training:
            self._releasing = training, ClientReleaseRound(self, training)
        return self._releasing[1]

    def read_broadcast(self, contents: Sequence[bytes]) -> tuple[Broadcast, Tensor | None]:
        """Return the method's broadcast and, if the clip adapts, the clip of the round.

        Args:
            contents: of some of these clients, as they were sent, ascending by client.

        Raises:
            MessageError: one is not what was agreed.
        """
        federation = self.federation
        adapts = federation.mechanism.broadcasts_clip
        clip = torch.zeros((), dtype=torch.float64) if adapts else None
        like = federation.broadcast_message(federation.schemas.broadcast, clip)
        parts = [messages.decode(content, like) for content in contents]
        schema = federation.schemas.broadcast
        if isinstance(parts[0], ClippedBroadcast):
            clip = parts[0].clip
            clipped = [part for part in parts if isinstance(part, ClippedBroadcast)]
            received = [dict(part.broadcast) for part in clipped]
        else:
            received = [named_tensors(part) for part in parts]
        if not isinstance(schema, PersonalBroadcast):  # all clients received the same one
            return map_tensors(schema, lambda name, old: received[0][name].to(old.device)), clip
        stack = stacked(received, named_tensors(schema))
        return map_tensors(schema, lambda name, _: stack[name]), clip

    def released(self, training: ClientTraining, release: Mapping[str, Tensor]) -> ClientTraining:
        """Return the state before the first round, after a release of class statistics.

        Args:
            training: before it.
            release: name to tensor, as `ClientTraining.release`.
        """
        after = replace(training, release=dict(release))
        init = self.federation.init_context(self.numbers)
        state = self.federation.algorithm.client_init(self.federation.settings, init, self.training_data(after))
        return replace(after, state=state)

    def training_data(self, training: ClientTraining) -> ClientData:
        """Return the examples that clients train on: their images, or what was drawn from the released statistics."""
        mechanism = self.federation.mechanism
        if not isinstance(mechanism, StatisticsMechanism):
            return self.data
        if self._drawn is None or self._drawn[0] is not training.release:
            self._drawn = training.release, self._data_of(mechanism, training.release)
        return self._drawn[1]

    def _data_of(self, mechanism: StatisticsMechanism, release: Mapping[str, Tensor]) -> ClientData:
        statistics = mechanism.estimator.statistics(Released.of(release), self.numbers)
        if not mechanism.replaces_images:
            return replace(self.data, statistics=statistics)
        streams = self.federation.init_context(self.numbers).streams
        features, labels, sizes = drawn(statistics, streams, 1 - mechanism.settings.held_error)
        ends = list(accumulate(sizes))
        rows = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        table = client_data(features.to(self.data.features.dtype), labels, rows, "uniform")
        return replace(table, weights=self.data.weights, statistics=statistics)


class ClientReleaseRound:
    """The release of a stack of clients' class statistics.

    Attributes:
        training: the clients' state; it includes the release once the server has told all of it.
        losses: none.
    """

    def __init__(self, end: ClientEnd, training: ClientTraining) -> None:
        mechanism, data = end.federation.mechanism, end.data
        assert isinstance(mechanism, StatisticsMechanism)
        rows = [row[:count] for row, count in zip(data.rows, data.counts, strict=True)]
        rows = [row[data.shown(row)] for row in rows]
        randomness = end.randomness(RELEASE_ROUND, end.numbers)
        table = (data.features, data.labels, rows)
        self._release = ClientsRelease(mechanism, *table, end.numbers, randomness, data.persons)
        self._end, self.training = end, training
        self.losses: list[Tensor] = []

    def handle(self, contents: Mapping[int, bytes]) -> list[tuple[int, bytes | Refusal]]:
        """Return the clients' replies to the server's messages; see `ClientsRelease.handle`."""
        replies = self._release.handle(contents)
        if self._release.released is not None:
            self.training = self._end.released(self.training, self._release.released.tensors)
        return replies

    def leave_sums(self) -> None:
        """Take no part in a secure sum that was asked for so far; see `ClientsRelease.leave_sums`."""
        self._release.leave_sums()


class ClientRound:
    """A round of a stack of clients.

    Attributes:
        training: the clients' state; it includes this round once they have uploaded.
        losses: a scalar for every gradient, or answer, that was taken. It is for a simulation's log, and never sent.
    """

    def __init__(self, end: ClientEnd, training: ClientTraining) -> None:
        self._end, self.training = end, training
        self.losses: list[Tensor] = []
        self._parties: dict[int, Party] = {}

    def handle(self, contents: Mapping[int, bytes]) -> list[tuple[int, bytes | Refusal]]:
        """Return the clients' replies to the server's messages, by client.

        The first message of a round is the broadcast, and its reply is the upload. If the method or the mechanism has
        a protocol on shares, all later messages belong to that protocol.

        Raises:
            MessageError: a broadcast is not what was agreed, or names others than take part.
            RunError: the method does not keep to its schedule; nothing left the clients.
        """
        if all(messages.opens_round(content) for content in contents.values()):
            return list(self._train(contents).items())
        return [(client, self._answer(client, content)) for client, content in contents.items()]

    def _answer(self, client: int, content: bytes) -> bytes | Refusal:
        party = self._parties.get(client)
        return Refusal(f"client {client} is in no protocol") if party is None else answered(party, content)

    def _train(self, contents: Mapping[int, bytes]) -> dict[int, bytes]:
        """Take part in a round.

        1. Read the broadcasts.
        2. Run the method's round under the clients' end of the mechanism.
        3. Compare the batches that were drawn with the accountant's plan, before anything leaves.
        4. Prepare the protocol on shares, if there is one, and return the uploads.
        """
        end, federation = self._end, self._end.federation
        clients = sorted(contents)
        headers = [messages.round_header(contents[client]) for client in clients]
        number = self._number(headers)
        self._check_places(number, clients, headers)
        broadcast, clip = end.read_broadcast([contents[client] for client in clients])
        stacked = {client: at for at, client in enumerate(end.numbers)}
        stack = torch.tensor([stacked[client] for client in clients], device=federation.device)
        randomness = end.randomness(number, clients)
        round_context = federation.round_context(number, clients)
        mechanism_round = federation.mechanism.client_end(randomness, clients, clip)
        poisson = federation.mechanism.sampler(randomness)
        upload, states = federation.algorithm.client_round(
            federation.settings,
            broadcast,
            take(self.training.state, stack),
            _taken_data(end.training_data(self.training), stack, poisson),
            self._recorded(mechanism_round.gradients),
            round_context,
        )
        tensors = mechanism_round.protect(named_tensors(self._boosted(upload, clients)))
        upload = map_tensors(upload, lambda name, _: tensors[name])
        rates = [rate.tolist() for rate in mechanism_round.rates]
        federation.mechanism.check(federation.mechanism.entered(clients, rates), clients)
        places, count, session = [header.place for header in headers], headers[0].clients, headers[0].session
        if client_exchange := getattr(federation.algorithm, "client_exchange", None):
            method = (federation.settings, federation.model)
            parties = client_exchange(*method, broadcast, upload, places, round_context)
            self._parties = dict(zip(clients, parties, strict=True))
        elif federation.mechanism.sums_securely:
            vectors, privacy = mechanism_round.summed, federation.mechanism.settings
            sums = sum_parties(privacy, vectors, randomness, session, places, count)
            self._parties = dict(zip(clients, sums, strict=True))
        self.training = replace(self.training, round=number, state=put(self.training.state, stack, states))
        return self._sent(upload, mechanism_round, clients, number)

    def _number(self, headers: Sequence[RoundHeader]) -> int:
        """Return the number of the round that all headers name.

        Raises:
            MessageError: they name several rounds, or one that these clients have already taken part in.
        """
        numbers = {header.round for header in headers}
        if len(numbers) != 1:
            raise MessageError(f"broadcasts of several rounds at once: {sorted(numbers)}")
        (number,) = numbers
        if number <= self.training.round:  # a second upload of one round would be a second release
            raise MessageError(f"a broadcast of round {number} after round {self.training.round}")
        return number

    def _check_places(self, number: int, clients: Sequence[int], headers: Sequence[RoundHeader]) -> None:
        """Refuse a round that is not in the plan, whose epsilon counts rounds and who takes part in each.

        A protocol on shares is among those who take part and nobody else: among more clients than there are, shares of
        noise would be too small, and whoever played the others would hold too many shares of everybody's numbers.
        Under Poisson sampling of clients the server draws who takes part, and nobody can check it.
        """
        federation = self._end.federation
        if absent := sorted(set(clients) - set(self._end.numbers)):
            raise MessageError(f"a broadcast for client {absent[0]}, who is not one of these")
        if federation.rounds and number > federation.rounds:  # rounds of a method that does not train tell nothing
            raise MessageError(f"a broadcast of round {number}, and {federation.rounds} were agreed")
        if federation.mechanism.samples_clients:
            return
        chosen = participants(federation.seed, number, federation.clients, federation.runtime.participation)
        if strangers := sorted(set(clients) - set(chosen.tolist())):
            raise MessageError(f"a broadcast of round {number} for client {strangers[0]}, who takes no part in it")
        if not (federation.mechanism.sums_securely or hasattr(federation.algorithm, "client_exchange")):
            return
        places = {client: place for place, client in enumerate(chosen.tolist())}
        for client, header in zip(clients, headers, strict=True):
            if (header.place, header.clients) != (places[client], len(places)):
                raise MessageError(
                    f"a protocol on shares with client {client} at place {header.place} of {header.clients}, where it "
                    f"has place {places[client]} of the {len(places)} that take part"
                )

    def _sent(
        self, upload: AnyUpload, mechanism_round: ClientRoundMechanism, clients: Sequence[int], number: int
    ) -> dict[int, bytes]:
        """Return each client's upload as bytes, by client."""
        message = messages.on_host(
            self._end.federation.upload_message(upload, mechanism_round.below_clip, mechanism_round.keys)
        )
        sent: dict[int, bytes] = {}
        for place, client in enumerate(clients):
            rates = tuple(float(rate[place]) for rate in mechanism_round.rates)
            client_message = take(message, torch.tensor([place]))
            sent[client] = messages.encode(client_message, UploadHeader(number, rates))
            if self._end.federation.mechanism.compresses:
                sent[client] = messages.deflated(sent[client])
        return sent

    def _boosted(self, upload: AnyUpload, clients: Sequence[int]) -> AnyUpload:
        """Multiply attackers' uploads by their boost, before any protection of the upload.

        Source of this model replacement: Bagdasaryan et al., How To Backdoor Federated Learning, AISTATS 2020.
        """
        factors = [self._end.boosts.get(client, 1.0) for client in clients]
        if all(factor == 1 for factor in factors):
            return upload

        def enlarge(name: str, tensor: Tensor) -> Tensor:
            if name == WEIGHT:
                return tensor
            factor = torch.tensor(factors, dtype=torch.float64).to(tensor)
            return tensor * factor.view(-1, *[1] * (tensor.ndim - 1))

        return map_tensors(upload, enlarge)

    def _recorded(self, gradients: Any) -> Any:
        """Return the same gradients, or losses of candidates, which also keep the loss of each call for the log."""

        def record(asked: Any, parameters: Parameters, fixed: Parameters, batch: Batch) -> Any:
            answer = gradients(asked, parameters, fixed, batch)
            self.losses.append(answer.loss.mean())
            return answer

        return record


def _taken_data(data: ClientData, chosen: Tensor, poisson: PoissonSampler | None) -> ClientData:
    rows, counts, weights = data.rows[chosen], data.counts[chosen], data.weights[chosen]
    return replace(data, rows=rows, counts=counts, weights=weights, poisson=poisson)
