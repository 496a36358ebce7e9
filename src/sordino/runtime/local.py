"""The federation in one process: all clients are one stack."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from sordino.algorithms.base import (
    Algorithm,
    AnyUpload,
    Broadcast,
    ClientData,
    ClientState,
    ClippedBroadcast,
    ClippedUpload,
    Clock,
    PersonalBroadcast,
    Server,
    Start,
    Upload,
    map_tensors,
    model_class,
    named_tensors,
    put,
    take,
)
from sordino.encoders.prompt_model import Prompt, PromptModel
from sordino.errors import RunError
from sordino.privacy.choice import mechanism_for
from sordino.privacy.client_level import WEIGHT
from sordino.privacy.gradients import Batch, Gradient, Gradients, Parameters, PromptOf
from sordino.privacy.ledger import Disclosure, Ledger, Release
from sordino.privacy.mechanism import Facts, Round
from sordino.privacy.noise import Randomness, SystemRandomness
from sordino.privacy.settings import PrivacySettings
from sordino.randomness import Streams, derive_seed
from sordino.runtime import aggregation, wire
from sordino.runtime.aggregation import aggregated
from sordino.runtime.records import RoundRecord, protocol_record
from sordino.runtime.settings import RuntimeSettings


@dataclass(frozen=True)
class Training:
    """Where a run stands after a round; all that a checkpoint must hold.

    Attributes:
        round: counted from 1; 0 before the first.
        server, clients: the method's state.
        mechanism: the privacy mechanism's state.
        ledger: what was released so far.
    """

    round: int
    server: Server
    clients: ClientState
    mechanism: dict[str, Tensor] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)


class LocalRuntime:
    """Runs the rounds of a method over K simulated clients.

    Args:
        algorithm, settings: the method.
        model: the method's model.
        features, labels: [N, ...] and [N], the table that clients' rows refer to, on the encoder's device.
        rows: K sequences of row numbers, what each client holds.
        rounds: how many rounds a whole run has.
        runtime: the `[runtime]` settings.
        seed: of the run.
        privacy: the `[privacy]` settings.
        boosts: client to the factor on what it sends, of attackers that send more than they learned.

    Raises:
        ConfigError: the privacy mechanism or the aggregation does not fit the method.
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
    ) -> None:
        self.algorithm, self.settings, self.model = algorithm, settings, model
        self.rounds = rounds if algorithm.ABOUT.trains else 0
        self.runtime, self.seed = runtime, seed
        if algorithm.ABOUT.pools_data:
            rows = [[row for client in rows for row in client]]
        self.data = client_data(features, labels, rows, runtime.weighting)
        self.privacy = privacy or PrivacySettings()
        facts = facts_of(algorithm, settings, [len(each) for each in rows], self.rounds, runtime, seed)
        self.mechanism = mechanism_for(self.privacy, facts, model)
        if check := getattr(algorithm, "check", None):
            check(settings, model, participant_count(len(rows), runtime.participation))
        aggregation.check(runtime, self.privacy, algorithm.ABOUT, participant_count(len(rows), runtime.participation))
        self.boosts = dict(boosts or {})

    def start(self) -> Training:
        """The state before the first round."""
        encoder = self.model.encoder
        streams = self._streams(0, range(len(self.data)))
        start = Start(
            encoder.embed,
            encoder.context_width,
            self.model.classes.names,
            streams,
            encoder.image_width,
            encoder.image_layers,
        )
        return Training(
            0,
            self.algorithm.server_init(self.settings, start),
            self.algorithm.client_init(self.settings, start, self.data),
            self.mechanism.initial_state(),
            self.mechanism.empty_ledger(),
        )

    def round(self, training: Training) -> tuple[Training, RoundRecord]:
        """The next round.

        Raises:
            RunError: training diverged.
        """
        number = training.round + 1
        chosen = self._participants(number)
        # Coins may choose nobody. Then one client's round is computed for the messages' shapes, and counts for nothing.
        stack = chosen if len(chosen) else torch.zeros(1, dtype=torch.int64, device=chosen.device)
        clock = Clock(number, self.rounds, self._streams(number, stack.tolist()))
        randomness = self._randomness(clock.streams)
        at_work = self.mechanism.open(randomness, chosen.tolist(), training.mechanism)
        gradients = _Recorded(at_work.gradients)
        broadcast = self.algorithm.broadcast(training.server)
        if isinstance(broadcast, PersonalBroadcast):
            broadcast = take(broadcast, stack)
        upload, states = self.algorithm.client_round(
            self.settings,
            broadcast,
            take(training.clients, stack),
            _take_data(self.data, stack, randomness if self.mechanism.samples_examples else None),
            gradients,
            clock,
        )
        upload, message = _protected(self._boosted(upload, stack), at_work)
        there = torch.arange(len(chosen), device=stack.device)
        began = time.monotonic()
        if exchange := getattr(self.algorithm, "exchange", None):
            uploads = exchange(self.settings, self.model, training.server, take(upload, there), chosen.tolist(), clock)
        else:
            uploads = aggregated(self.runtime, take(upload, there), at_work.average)
        server = self.algorithm.server_round(self.settings, training.server, uploads, clock)
        protocol = protocol_record(uploads, time.monotonic() - began)
        clients = put(training.clients, chosen, take(states, there))
        after = Training(number, server, clients, at_work.finish(), training.ledger.add(at_work.releases))
        loss = gradients.mean_loss()
        if not (math.isfinite(loss) and _finite(after)):
            attacked = ", or poisoning.boost, or have another runtime.aggregation" if self.boosts else ""
            raise RunError(f"training diverged in round {number} (loss {loss}); lower the learning rate{attacked}")
        first = torch.zeros(1, dtype=torch.int64, device=stack.device)
        told = take(broadcast, first) if isinstance(broadcast, PersonalBroadcast) else broadcast
        down = len(wire.encode(_with_clip(told, at_work)))
        # Where there is a protocol, its messages carry the upload.
        up = protocol.sent if protocol else len(wire.encode(take(message, first)))
        down += protocol.received if protocol else 0
        labels = getattr(server, "labels", None)
        clusters = None if labels is None else labels.long().tolist()
        return after, RoundRecord(number, loss, len(chosen), up, down, clusters, protocol)

    def within_budget(self, training: Training) -> bool:
        """Whether the next round may be run: whether what it releases, on top of the ledger, stays in the budget."""
        return self.mechanism.affords(training.ledger, self._round_releases(training.round + 1))

    def pays_for_all(self, training: Training) -> bool:
        """Whether all remaining rounds stay in the budget, so that nobody need ask again."""
        remaining = range(training.round + 1, self.rounds + 1)
        releases = [each for number in remaining for each in self._round_releases(number)]
        return self.mechanism.affords(training.ledger, releases)

    def prompts(self, training: Training) -> Prompt:
        """The K clients' prompts, or the one that they share."""
        return self.algorithm.prompt(self.algorithm.broadcast(training.server), training.clients)

    def _boosted(self, upload: AnyUpload, clients: Tensor) -> AnyUpload:
        """The upload with what attackers send enlarged, before anything that the protocol does to it.

        Model replacement: Bagdasaryan et al., How To Backdoor Federated Learning, AISTATS 2020.
        """
        factors = [self.boosts.get(client, 1.0) for client in clients.tolist()]
        if all(factor == 1 for factor in factors):
            return upload

        def enlarge(name: str, tensor: Tensor) -> Tensor:
            if name == WEIGHT:
                return tensor
            return tensor * torch.tensor(factors, dtype=torch.float64).to(tensor).view(-1, *[1] * (tensor.ndim - 1))

        return map_tensors(upload, enlarge)

    def _round_releases(self, number: int) -> list[Release]:
        # Where coins choose the clients, what is released does not depend on whom they choose.
        by_coins = self.mechanism.samples_clients
        return self.mechanism.round_releases(range(len(self.data)) if by_coins else self._participants(number).tolist())

    def _randomness(self, streams: Streams) -> Randomness:
        if self.privacy.secure:
            return SystemRandomness(len(streams.clients), self.data.features.device)
        return streams

    def _streams(self, number: int, clients: Sequence[int]) -> Streams:
        return Streams(self.seed, number, clients, self.data.features.device)

    def _participants(self, number: int) -> Tensor:
        """Who takes part in a round, in the order of their numbers; nobody, if coins say so."""
        clients, device = len(self.data), self.data.features.device
        if not self.mechanism.samples_clients:
            return participants(self.seed, number, clients, self.runtime.participation).to(device)
        tossed = self._randomness(self._streams(number, [0])).uniform("participants", [clients])[0]
        return (tossed < self.runtime.participation).nonzero().flatten().to(device)


def participants(seed: int, number: int, clients: int, participation: float) -> Tensor:
    """Which clients take part in round `number`: as many every round, ascending."""
    generator = torch.Generator().manual_seed(derive_seed(seed, number, "participants"))
    return torch.randperm(clients, generator=generator)[: participant_count(clients, participation)].sort().values


def participant_count(clients: int, participation: float) -> int:
    """How many clients take part in a round."""
    return max(1, round(participation * clients))


def facts_of(
    algorithm: Algorithm, settings: Any, sizes: Sequence[int], rounds: int, runtime: RuntimeSettings, seed: int
) -> Facts:
    """What a privacy mechanism must know of a method and its federation.

    Args:
        algorithm, settings: the method.
        sizes: how many examples each party that trains holds.
        rounds: of the whole run.
        runtime: the `[runtime]` settings.
        seed: of the run.
    """
    about = algorithm.ABOUT
    tells_sizes = runtime.weighting == "examples" and "weight" in {each.name for each in fields(algorithm.Upload)}
    told = Disclosure("how many examples each client holds, to the server every round", "sizes")
    taken = [0] * len(sizes)
    for number in range(1, rounds + 1):
        for client in participants(seed, number, len(sizes), runtime.participation).tolist():
            taken[client] += 1
    return Facts(
        trains=about.trains,
        pools_data=about.pools_data,
        sizes=tuple(sizes),
        weights=tuple(map(float, sizes)) if runtime.weighting == "examples" else (1.0,) * len(sizes),
        uniform=runtime.weighting == "uniform",
        batch_size=getattr(settings, "batch_size", None) or None,
        steps=getattr(settings, "local_steps", 1),
        linear=model_class(algorithm).linear,
        taken=tuple(taken),
        rounds=rounds,
        participation=runtime.participation,
        shared=about.averages,
        personal=about.personal != "nothing",
        server_uses=about.server_uses,
        discloses=(*about.discloses, *([told] if tells_sizes else [])),
    )


def _protected(upload: AnyUpload, at_work: Round) -> tuple[AnyUpload, Upload]:
    """An upload as it leaves its clients, and the message that carries it."""
    tensors = at_work.protect(named_tensors(upload))
    protected = map_tensors(upload, lambda name, _: tensors[name])
    if at_work.below_clip is None:
        return protected, protected
    return protected, ClippedUpload(tensors, at_work.below_clip.float())


def _with_clip(broadcast: Broadcast, at_work: Round) -> Broadcast:
    """The message that tells a client its broadcast and, where that adapts, the clip of the round."""
    if at_work.told_clip is None:
        return broadcast
    return ClippedBroadcast(named_tensors(broadcast), at_work.told_clip.float())


def client_data(features: Tensor, labels: Tensor, rows: Sequence[Sequence[int]], weighting: str) -> ClientData:
    """The clients' rows of a feature table, padded to the largest client."""
    counts = torch.tensor([len(each) for each in rows], device=features.device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(each) for each in rows], batch_first=True)
    weights = counts.float() if weighting == "examples" else torch.ones_like(counts, dtype=torch.float32)
    return ClientData(features, labels, padded.to(features.device), counts, weights)


def _take_data(data: ClientData, chosen: Tensor, coins: Randomness | None) -> ClientData:
    rows, counts, weights = data.rows[chosen], data.counts[chosen], data.weights[chosen]
    return replace(data, rows=rows, counts=counts, weights=weights, coins=coins)


def _finite(training: Training) -> bool:
    tensors = [*named_tensors(training.server).values(), *named_tensors(training.clients).values()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


class _Recorded:
    """Gradients whose losses are kept for the log."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients, self._losses = gradients, list[Tensor]()

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        gradient = self._gradients(prompt_of, parameters, fixed, batch)
        self._losses.append(gradient.loss.mean())
        return gradient

    def mean_loss(self) -> float:
        return float(torch.stack(self._losses).mean())
