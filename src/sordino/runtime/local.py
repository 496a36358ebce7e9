"""The federation in one process: all clients are one stack."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import sordino
from sordino.algorithms.base import (
    Algorithm,
    AnyUpload,
    Broadcast,
    ClientData,
    ClientState,
    ClippedBroadcast,
    ClippedUpload,
    InitContext,
    PersonalBroadcast,
    RoundContext,
    Server,
    State,
    StatedWeight,
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
from sordino.privacy.ledger import Disclosure, Ledger, Release, joint_digest
from sordino.privacy.mechanism import Average, MechanismInputs, Round
from sordino.privacy.noise import Randomness, SystemRandomness, new_nonce, simulated
from sordino.privacy.sampling import PoissonSampler
from sordino.privacy.settings import PrivacySettings
from sordino.randomness import Streams, generator
from sordino.runtime import aggregation, messages
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


class Diverged(RunError):
    """Training came to numbers that are not finite.

    Attributes:
        ledger: with what the round released before that was seen.
    """

    def __init__(self, message: str, ledger: Ledger) -> None:
        super().__init__(message)
        self.ledger = ledger


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
        digests: of each client's data, in hex; by default of its rows of `features` and `labels`.

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
        digests: Sequence[str] | None = None,
    ) -> None:
        self.algorithm, self.settings, self.model = algorithm, settings, model
        self.rounds = rounds if algorithm.ABOUT.trains else 0
        self.runtime, self.seed = runtime, seed
        digests = [data_digest(features, labels, each) for each in rows] if digests is None else digests
        if algorithm.ABOUT.pools_data:
            rows, digests = [[row for client in rows for row in client]], [joint_digest(digests)]
        self.digests = list(digests)
        self.data = client_data(features, labels, rows, runtime.weighting)
        self.privacy = privacy or PrivacySettings()
        inputs = mechanism_inputs(algorithm, settings, [len(each) for each in rows], self.rounds, runtime, seed)
        self.mechanism = mechanism_for(self.privacy, inputs, model)
        if check := getattr(algorithm, "check", None):
            check(settings, model, participant_count(len(rows), runtime.participation))
        aggregation.check(runtime, self.privacy, algorithm.ABOUT, participant_count(len(rows), runtime.participation))
        self.boosts = dict(boosts or {})
        self.nonce = self.privacy.nonce or new_nonce()

    @cached_property
    def identity(self) -> str:
        """A digest of all that the run is made of but its nonce, in hex: two runs of one identity are the same run."""
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
        )
        return hashlib.sha256("\n".join(made_of).encode()).hexdigest()

    def start(self) -> Training:
        """The state before the first round."""
        encoder = self.model.encoder
        streams = self._streams(0, range(len(self.data)))
        ledger = replace(self.mechanism.empty_ledger(), run=self._run_name(), data=self._party_digests())
        start = InitContext(
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
            ledger,
        )

    def round(self, training: Training) -> tuple[Training, RoundRecord]:
        """The next round.

        Raises:
            Diverged: what was released is not finite; without a mechanism, nor may be the loss or a client's state.
            RunError: the method does not keep to its schedule, and nothing was released.
        """
        number = training.round + 1
        chosen = self._participants(number)
        # Coins may choose nobody. Then one client's round is computed for the messages' shapes, and counts for nothing.
        stack = chosen if len(chosen) else torch.zeros(1, dtype=torch.int64, device=chosen.device)
        round_context = RoundContext(number, self.rounds, self._streams(number, stack.tolist()))
        randomness = self._randomness(number, stack.tolist())
        at_work = self.mechanism.open(randomness, chosen.tolist(), training.mechanism)
        gradients = _Recorded(at_work.gradients)
        broadcast = self.algorithm.broadcast(training.server)
        if isinstance(broadcast, PersonalBroadcast):
            broadcast = take(broadcast, stack)
        upload, states = self.algorithm.client_round(
            self.settings,
            broadcast,
            take(training.clients, stack),
            _take_data(self.data, stack, PoissonSampler(randomness) if self.mechanism.samples_examples else None),
            gradients,
            round_context,
        )
        upload, message = _protected(self._boosted(upload, stack), at_work)
        self.mechanism.check(at_work.releases, chosen.tolist())
        there = torch.arange(len(chosen), device=stack.device)
        began = time.monotonic()
        if exchange := getattr(self.algorithm, "exchange", None):
            uploads = exchange(
                self.settings, self.model, training.server, take(upload, there), chosen.tolist(), round_context
            )
        else:
            uploads = aggregated(self.runtime, *_as_the_server_sees_it(take(upload, there), at_work))
        server = self.algorithm.server_round(self.settings, training.server, uploads, round_context)
        protocol = protocol_record(uploads, time.monotonic() - began)
        clients = put(training.clients, chosen, take(states, there))
        after = Training(number, server, clients, at_work.finish(), training.ledger.add(at_work.releases))
        loss = gradients.mean_loss()
        if not self._sound(after, loss):
            attacked = ", or poisoning.boost, or have another runtime.aggregation" if self.boosts else ""
            raise Diverged(
                f"training diverged in round {number} (loss {loss}); lower the learning rate{attacked}", after.ledger
            )
        first = torch.zeros(1, dtype=torch.int64, device=stack.device)
        told = take(broadcast, first) if isinstance(broadcast, PersonalBroadcast) else broadcast
        down = len(messages.encode(_with_clip(told, at_work)))
        # Where there is a protocol, its messages carry the upload.
        up = protocol.sent if protocol else len(messages.encode(take(_message(message, at_work), first)))
        down += protocol.received if protocol else 0
        if at_work.sums is not None:
            up, down = up + at_work.sums.sent, down + at_work.sums.received
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

    def _sound(self, training: Training, loss: float) -> bool:
        """Whether training may go on.

        With a mechanism on, only the server's state is looked at, which is made of what was released: that a run ends
        must not tell anything else of anybody's data.
        """
        if self.privacy.on:
            return _finite(training.server)
        return math.isfinite(loss) and _finite(training.server) and _finite(training.clients)

    def _randomness(self, number: int, clients: Sequence[int]) -> Randomness:
        device = self.data.features.device
        if self.privacy.simulation:
            return simulated(self.nonce, self.identity, number, clients, device)
        return SystemRandomness(len(clients), device)

    def _run_name(self) -> str:
        """A name that no other run has; a simulation that is the very same run again has the same."""
        if self.privacy.simulation:
            return hashlib.sha256(f"{self.nonce} {self.identity}".encode()).hexdigest()[:32]
        return new_nonce()

    def _party_digests(self) -> dict[str, str]:
        return {f"client {client}": digest for client, digest in enumerate(self.digests)}

    def _streams(self, number: int, clients: Sequence[int]) -> Streams:
        return Streams(self.seed, number, clients, self.data.features.device)

    def _participants(self, number: int) -> Tensor:
        """Who takes part in a round, in the order of their numbers; nobody, if coins say so."""
        clients, device = len(self.data), self.data.features.device
        if not self.mechanism.samples_clients:
            return participants(self.seed, number, clients, self.runtime.participation).to(device)
        tossed = self._randomness(number, [0]).uniform("participants", [clients])[0]
        return (tossed < self.runtime.participation).nonzero().flatten().to(device)


def participants(seed: int, number: int, clients: int, participation: float) -> Tensor:
    """Which clients take part in round `number`: as many every round, ascending."""
    order = torch.from_numpy(generator(seed, number, "participants").permutation(clients))
    return order[: participant_count(clients, participation)].sort().values


def participant_count(clients: int, participation: float) -> int:
    """How many clients take part in a round."""
    return max(1, round(participation * clients))


def mechanism_inputs(
    algorithm: Algorithm, settings: Any, sizes: Sequence[int], rounds: int, runtime: RuntimeSettings, seed: int
) -> MechanismInputs:
    """What a privacy mechanism must know of a method and its federation.

    Args:
        algorithm, settings: the method.
        sizes: how many examples each party that trains holds.
        rounds: of the whole run.
        runtime: the `[runtime]` settings.
        seed: of the run.
    """
    about, schedule = algorithm.ABOUT, algorithm.schedule(settings)
    tells_sizes = runtime.weighting == "examples" and "weight" in {each.name for each in fields(algorithm.Upload)}
    told = Disclosure("how many examples each client holds, to the server every round", "sizes")
    taken = [0] * len(sizes)
    for number in range(1, rounds + 1):
        for client in participants(seed, number, len(sizes), runtime.participation).tolist():
            taken[client] += 1
    return MechanismInputs(
        trains=about.trains,
        pools_data=about.pools_data,
        sizes=tuple(sizes),
        weights=tuple(map(float, sizes)) if runtime.weighting == "examples" else (1.0,) * len(sizes),
        uniform=runtime.weighting == "uniform",
        batch_size=schedule.batch_size,
        steps=schedule.steps,
        linear=model_class(algorithm).linear,
        rounds_participated=tuple(taken),
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


def _as_the_server_sees_it(upload: AnyUpload, at_work: Round) -> tuple[AnyUpload, Average]:
    """Uploads, and their means; under a secure sum the server is shown weights and means, and no upload."""
    if at_work.sums is None:
        return upload, at_work.average
    hidden = named_tensors(upload)

    def average(name: str, values: Tensor, weights: Tensor) -> Tensor:
        return at_work.average(name, hidden[name], weights)

    return map_tensors(upload, lambda name, each: each if name == WEIGHT else torch.full_like(each, math.nan)), average


def _message(upload: Upload, at_work: Round) -> Upload:
    """What a client sends in one piece; under a secure sum its weight alone, as all else is in the sum's messages."""
    if at_work.sums is None:
        return upload
    weight = [tensor for name, tensor in named_tensors(upload).items() if name.rpartition(".")[-1] == WEIGHT]
    return StatedWeight(weight[0]) if weight else Upload()


def _with_clip(broadcast: Broadcast, at_work: Round) -> Broadcast:
    """The message that tells a client its broadcast and, where that adapts, the clip of the round."""
    if at_work.broadcast_clip is None:
        return broadcast
    return ClippedBroadcast(named_tensors(broadcast), at_work.broadcast_clip.float())


def client_data(features: Tensor, labels: Tensor, rows: Sequence[Sequence[int]], weighting: str) -> ClientData:
    """The clients' rows of a feature table, padded to the largest client."""
    counts = torch.tensor([len(each) for each in rows], device=features.device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(each) for each in rows], batch_first=True)
    weights = counts.float() if weighting == "examples" else torch.ones_like(counts, dtype=torch.float32)
    return ClientData(features, labels, padded.to(features.device), counts, weights)


def data_digest(features: Tensor, labels: Tensor, rows: Sequence[int]) -> str:
    """Return a digest of a client's examples in hex, whatever their order: of what is read of them, and of labels."""
    chosen = torch.as_tensor(list(rows), dtype=torch.int64)
    read, told = features[chosen.to(features.device)].cpu().contiguous(), labels[chosen.to(labels.device)].tolist()
    pairs = zip(read.reshape(len(told), -1).numpy(), told, strict=True)
    return joint_digest(hashlib.sha256(row.tobytes() + str(label).encode()).hexdigest() for row, label in pairs)


def _take_data(data: ClientData, chosen: Tensor, poisson: PoissonSampler | None) -> ClientData:
    rows, counts, weights = data.rows[chosen], data.counts[chosen], data.weights[chosen]
    return replace(data, rows=rows, counts=counts, weights=weights, poisson=poisson)


def _finite(state: State) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in named_tensors(state).values())


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
