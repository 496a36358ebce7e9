"""The federation in one process: one server, and one stack of all clients, that exchange bytes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import sordino
from sordino.algorithms.base import Algorithm, ClientState, RoundContext, Server
from sordino.encoders.prompt_model import Prompt, PromptModel
from sordino.errors import ConfigError
from sordino.privacy.choice import mechanism_for
from sordino.privacy.ledger import Ledger, Release, joint_digest
from sordino.privacy.settings import PrivacySettings
from sordino.privacy.statistics.estimates import Noise, Released
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.randomness import Randomness, SystemRandomness, new_nonce, simulated
from sordino.runtime import aggregation
from sordino.runtime.client import ClientEnd, ClientRound, ClientTraining
from sordino.runtime.facts import (
    Federation,
    Schemas,
    Units,
    client_data,
    data_digest,
    mechanism_inputs,
    schemas_of,
)
from sordino.runtime.records import RoundRecord
from sordino.runtime.server import Observe, ServerEnd, ServerTraining, finite
from sordino.runtime.settings import RuntimeSettings, participant_count
from sordino.runtime.uploads import Diverged, RoundError
from sordino.secure import Refusal

__all__ = ["Diverged", "LocalRuntime", "RoundError", "Training"]


@dataclass(frozen=True)
class Training:
    """The state of a run after a round; a checkpoint holds each of the two parts in a file.

    Attributes:
        at_server: the server's part.
        at_clients: the clients' part.
    """

    at_server: ServerTraining
    at_clients: ClientTraining

    @property
    def round(self) -> int:
        """Return the last round, counted from 1; 0 before the first."""
        return self.at_server.round

    @property
    def server(self) -> Server:
        """Return the method's state at the server."""
        return self.at_server.state

    @property
    def clients(self) -> ClientState:
        """Return the method's state at the clients, each tensor [K, ...]."""
        return self.at_clients.state

    @property
    def mechanism(self) -> dict[str, Tensor]:
        """Return the privacy mechanism's state."""
        return self.at_server.mechanism

    @property
    def ledger(self) -> Ledger:
        """Return the ledger of all releases so far."""
        return self.at_server.ledger

    def with_ledger(self, ledger: Ledger) -> Training:
        """Return the same state with another ledger."""
        return replace(self, at_server=replace(self.at_server, ledger=ledger))


class LocalRuntime:
    """Runs the rounds of a method over K simulated clients.

    Args:
        algorithm, settings: the method.
        model: the method's model.
        features, labels: [N, ...] and [N], the table that clients' rows refer to, on the encoder's device.
        rows: K sequences of row numbers, one for each client.
        rounds: the number of rounds of a whole run.
        runtime: the `[runtime]` settings.
        seed: the run's seed.
        privacy: the `[privacy]` settings.
        boosts: client to the factor on its upload, for attackers that send more than they learned.
        digests: a digest of each client's data, in hex; by default of its rows of `features` and `labels`.
        persons: [N] whose each row of the table is, by number; None if unknown.
        earlier: the noise of a release of statistics that will be used again; None if the run makes its own.
        public: [n, D], features of public images, for a mechanism that uses them.

    Raises:
        ConfigError: the privacy mechanism or the aggregation does not fit the method, or persons are protected and
            unknown or at two clients.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        settings: Any,
        model: PromptModel,
        features: Tensor,
        labels: Tensor,
        rows: Sequence[Sequence[int]],
        rounds: int,
        runtime: RuntimeSettings,
        seed: int,
        privacy: PrivacySettings | None = None,
        boosts: Mapping[int, float] | None = None,
        digests: Sequence[str] | None = None,
        persons: Sequence[int] | None = None,
        earlier: Noise | None = None,
        public: Tensor | None = None,
    ) -> None:
        self.algorithm, self.settings, self.model = algorithm, settings, model
        self.observe: Observe | None = None  # what the server receives, for attacks on a run
        self.rounds = rounds if algorithm.ABOUT.trains else 0
        self.runtime, self.seed = runtime, seed
        if digests is None:
            digests = [data_digest(features, labels, client_rows) for client_rows in rows]
        if algorithm.ABOUT.pools_data:
            rows = [[row for client_rows in rows for row in client_rows]]
            digests = [joint_digest(digests)]
        self.digests = list(digests)
        self.privacy = privacy or PrivacySettings()
        units = Units.of(rows, persons, self.privacy)
        self.data = client_data(features, labels, rows, runtime.weighting, persons, units.sizes)
        inputs = mechanism_inputs(
            algorithm, settings, units, self.rounds, runtime, seed, len(model.classes), type(model)
        )
        self.mechanism = mechanism_for(self.privacy, inputs, model, public)
        if earlier is not None and isinstance(self.mechanism, StatisticsMechanism):
            self.mechanism = replace(self.mechanism, earlier=earlier)
        participants = participant_count(len(rows), runtime.participation)
        if check := getattr(algorithm, "check", None):
            check(settings, model, participants)
        aggregation.check(runtime, self.privacy, algorithm.ABOUT, participants)
        self.boosts = dict(boosts or {})
        _check_boosts(self.boosts, self.privacy)
        self.nonce = self.privacy.nonce or new_nonce()

    @cached_property
    def identity(self) -> str:
        """Return a digest in hex of all inputs of the run but its nonce; equal digests mean the same run."""
        encoder, method = self.model.encoder, self.algorithm
        made_of = (
            sordino.__version__,
            getattr(method, "__name__", type(method).__name__),
            repr(self.settings),
            repr(self.runtime),
            repr(self.privacy.model_copy(update={"nonce": None})),
            repr((self.mechanism.noise_multiplier, self.mechanism.delta, self.rounds, self.seed, self.boosts)),
            f"{encoder.name} {encoder.fingerprint} {encoder.dtype}",
            repr(self.model.classes.names),
            *self.digests,
            *([self.persons_digest] if self.privacy.by_person else []),
            *([] if self.mechanism.public is None else [self.public_digest]),
        )
        return hashlib.sha256("\n".join(made_of).encode()).hexdigest()

    @cached_property
    def schemas(self) -> Schemas:
        """Return the schemas of the method's messages."""
        example = self.data.features.new_zeros(self.data.features.shape[1:])
        return schemas_of(self.algorithm, self.settings, self.model, len(self.data), self.rounds, example)

    @property
    def federation(self) -> Federation:
        """Return the agreement of all parties."""
        return Federation(
            self.algorithm,
            self.settings,
            self.model,
            len(self.data),
            self.rounds,
            self.runtime,
            self.seed,
            self.mechanism,
            self.schemas,
            self.data.features.device,
        )

    @property
    def server(self) -> ServerEnd:
        """Return the server."""
        return ServerEnd(self.federation, self.randomness, self.observe)

    @cached_property
    def clients(self) -> ClientEnd:
        """Return all clients, as one stack."""
        return ClientEnd(self.federation, self.data, range(len(self.data)), self.randomness, self.boosts)

    def start(self) -> Training:
        """Return the state before the first round."""
        data = {f"client {client}": digest for client, digest in enumerate(self.digests)}
        return Training(self.server.start(self._run_name(), data), self.clients.start())

    @property
    def releases_statistics(self) -> bool:
        """Tell whether class statistics are released before the first round."""
        return self.mechanism.releases_statistics

    def begun(self) -> Training:
        """Return the state from which the first round starts: after the release of statistics, if there is one.

        Raises:
            RoundError: the release failed.
        """
        training = self.start()
        return self.release(training)[0] if self.releases_statistics else training

    def release(self, training: Training) -> tuple[Training, RoundRecord]:
        """Release the clients' class statistics; every method that works on them needs it before its first round.

        Returns:
            The state after it, and a record of round 0 with the bytes that the first client sent and was sent.

        Raises:
            RoundError: a client did not answer as was agreed, or a secure sum failed.
        """
        clients = self.clients.round(training.at_clients)
        up = down = 0

        def link(contents: Mapping[int, bytes]) -> list[tuple[int, bytes | Refusal]]:
            nonlocal up, down
            replies = clients.handle(contents)
            up += sum(len(reply) for client, reply in replies if client == 0 and isinstance(reply, bytes))
            down += len(contents.get(0, b""))
            return replies

        at_server = self.server.release(training.at_server, link)
        return Training(at_server, clients.training), RoundRecord(0, 0.0, len(self.data), up, down)

    def with_release(self, training: Training, release: Mapping[str, Tensor], releases: Sequence[Release]) -> Training:
        """Return the state after a release that happened before.

        Args:
            training: before it.
            release: what the clients keep of it, by name.
            releases: its entries in the ledger.
        """
        device = self.data.features.device
        known = Released.of({name: tensor.to(device) for name, tensor in release.items()})
        mechanism = self.mechanism
        assert isinstance(mechanism, StatisticsMechanism)
        if mechanism.joins and known.pooled is None:  # what was released by each may be joined later
            known = replace(known, pooled=mechanism.pooled(known, None))
        of_all = replace(known, own=None, own_center=None).tensors
        ledger = training.ledger.add(releases)
        at_server = replace(training.at_server, ledger=ledger, release=of_all, released=True)
        return Training(at_server, self.clients.released(training.at_clients, known.tensors))

    def round(self, training: Training) -> tuple[Training, RoundRecord]:
        """Run the next round.

        Raises:
            Diverged: an upload or the server's state is not finite; without a mechanism, also the loss or a client's
                state.
            RunError: the method does not keep to its schedule, and nothing was released.
        """
        clients = self.clients.round(training.at_clients)
        assert isinstance(clients, ClientRound), "release statistics first"
        number = training.round + 1
        try:
            at_server, seen = self.server.round(training.at_server, clients.handle)
        except Diverged as error:
            raise self._diverged(number, _mean(clients.losses), error.ledger) from None
        loss = _mean(clients.losses)
        after = Training(at_server, replace(clients.training, round=number))
        # With a mechanism on, only the server decides whether training continues, from the releases alone.
        # Otherwise the end of a run would reveal more about the data than was accounted for.
        if not self.privacy.on and not (math.isfinite(loss) and finite(after.clients)):
            raise self._diverged(number, loss, after.ledger)
        sends = bool(vars(self.schemas.upload) or vars(self.schemas.broadcast))
        # A method without messages counts no bytes, although a simulation sends empty ones to keep time.
        up, down = (seen.upload_bytes, seen.broadcast_bytes) if sends else (0, 0)
        labels = getattr(after.server, "labels", None)
        clusters = None if labels is None else labels.long().tolist()
        return after, RoundRecord(number, loss, len(seen.participants), up, down, clusters, seen.protocol)

    def pays_for_release(self, training: Training) -> bool:
        """Return whether a release of class statistics, added to the ledger, stays within the budget."""
        assert isinstance(self.mechanism, StatisticsMechanism)
        return self.mechanism.affords(training.ledger, self.mechanism.released(training.ledger.run))

    def within_budget(self, training: Training) -> bool:
        """Return whether the next round's releases, added to the ledger, stay within the budget."""
        return self.server.within_budget(training.at_server)

    def pays_for_all(self, training: Training) -> bool:
        """Return whether all remaining rounds stay within the budget; then no later check is needed."""
        return self.server.pays_for_all(training.at_server)

    def prompts(self, training: Training) -> Prompt:
        """Return the K clients' prompts, or the one prompt that they share."""
        return self.algorithm.prompt(self.algorithm.broadcast(training.server), training.clients)

    def round_context(self, number: int) -> RoundContext:
        """Return a round's number and randomness, for all clients."""
        return self.federation.round_context(number, range(len(self.data)))

    def randomness(self, number: int, clients: Sequence[int]) -> Randomness:
        """Return the source of a round's noise and samples."""
        device = self.data.features.device
        if self.privacy.simulation:
            return simulated(self.nonce, self.identity, number, clients, device)
        return SystemRandomness(len(clients), device)

    @property
    def persons_digest(self) -> str:
        """Return a digest of whose the clients' examples are, in their order; "" if persons are not protected."""
        if not self.privacy.by_person:
            return ""
        assert self.data.persons is not None
        pairs = zip(self.data.rows, self.data.counts, strict=True)
        owners = [self.data.persons[rows[: int(count)]].tolist() for rows, count in pairs]
        return hashlib.sha256(repr(owners).encode()).hexdigest()

    @property
    def public_digest(self) -> str:
        """Return a digest of the public images' features; "" if there are none."""
        return "" if self.mechanism.public is None else _digest(self.mechanism.public)

    def _diverged(self, number: int, loss: float, ledger: Ledger) -> Diverged:
        attacked = ", or poisoning.boost, or have another runtime.aggregation" if self.boosts else ""
        message = f"training diverged in round {number} (loss {loss}); lower the learning rate{attacked}"
        return Diverged(message, ledger)

    def _run_name(self) -> str:
        """Return a name that no other run has; a repetition of the same simulation has the same name.

        Without noise nothing is drawn that seed and data do not decide. Such a run is named after its inputs, so that
        equal runs write equal files.
        """
        if not self.privacy.on:
            return self.identity[:32]
        if self.privacy.simulation:
            return hashlib.sha256(f"{self.nonce} {self.identity}".encode()).hexdigest()[:32]
        return new_nonce()


def _check_boosts(boosts: Mapping[int, float], privacy: PrivacySettings) -> None:
    """Refuse boosts of gradients that are clipped by example, but noised as a sum: they would undo the clip."""
    clipped_before = privacy.on and privacy.unit != "client" and privacy.mechanism != "statistics"
    if clipped_before and privacy.noise_by != "client" and any(boost != 1 for boost in boosts.values()):
        raise ConfigError(
            "poisoning.boost",
            max(boosts.values()),
            f"with privacy.noise_by = {privacy.noise_by!r} it would multiply what the noise is to hide; set it to 1, "
            "or privacy.noise_by to 'client'",
        )


def _mean(losses: Sequence[Tensor]) -> float:
    return float(torch.stack(list(losses)).mean()) if losses else math.nan


def _digest(tensor: Tensor) -> str:
    """Return a digest in hex of a tensor's numbers."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
