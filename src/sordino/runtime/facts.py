"""What both ends of a federation know before the first round: the method, who takes part, what messages look like."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sordino.algorithms.base import (
    Algorithm,
    Broadcast,
    ClientData,
    ClippedBroadcast,
    ClippedUpload,
    InitContext,
    PersonalBroadcast,
    RoundContext,
    StatedWeight,
    Upload,
    map_tensors,
    model_class,
    named_tensors,
    take,
)
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy.gradients import Batch, Gradient, Parameters, PromptOf
from sordino.privacy.ledger import Disclosure, joint_digest
from sordino.privacy.mechanism import WEIGHT, Mechanism, MechanismInputs
from sordino.privacy.noise import Randomness, SystemRandomness
from sordino.randomness import Streams, generator
from sordino.runtime.settings import RuntimeSettings

RandomnessOf = Callable[[int, Sequence[int]], Randomness]  # of a round's noise, by the round and the clients' numbers


@dataclass(frozen=True)
class Schemas:
    """One client's messages with the names, types and shapes that a method's have; their numbers mean nothing.

    Attributes:
        broadcast: the method's own; each tensor of a personal one is [1, ...].
        upload: the method's own, each tensor [1, ...].
    """

    broadcast: Broadcast
    upload: Upload


@dataclass(frozen=True)
class Federation:
    """What every party agrees on before the first round.

    Attributes:
        algorithm, settings: the method.
        model: the method's model, frozen.
        clients: K, how many there are.
        rounds: of the whole run.
        runtime: the `[runtime]` settings.
        seed: of what all parties draw alike, and of each client's batches.
        mechanism: the privacy mechanism, with its noise matched to the budget.
        schemas: of the method's messages.
        device: where tensors are computed with.
    """

    algorithm: Algorithm
    settings: Any
    model: PromptModel
    clients: int
    rounds: int
    runtime: RuntimeSettings
    seed: int
    mechanism: Mechanism
    schemas: Schemas
    device: torch.device

    def init_context(self, clients: Sequence[int]) -> InitContext:
        """Return what a method makes its first state of, for a stack of clients."""
        return init_context(self.model, Streams(self.seed, 0, clients, self.device))

    def round_context(self, number: int, clients: Sequence[int]) -> RoundContext:
        """Return a round's number and randomness, for a stack of clients; a stack of none draws as client 0 would."""
        return RoundContext(number, self.rounds, Streams(self.seed, number, list(clients) or [0], self.device))

    def randomness(self, given: RandomnessOf | None) -> RandomnessOf:
        """Return where noise and samples come from: what is given, or the operating system.

        Raises:
            ConfigError: the run is a simulation. Noise that can be drawn again protects nobody from the other parties,
                so only a runtime that plays all of them gives it.
        """
        if given is not None:
            return given
        if self.mechanism.settings.on and self.mechanism.settings.simulation:
            raise ConfigError(
                "privacy.simulation",
                True,
                "only the local runtime simulates noise: across processes it would protect nobody; set it to false",
            )
        return lambda number, clients: SystemRandomness(len(clients), self.device)

    def broadcast_message(self, broadcast: Broadcast, clip: Tensor | None) -> Broadcast:
        """Return the message that tells clients a broadcast and, where that adapts, the clip of the round."""
        return broadcast if clip is None else ClippedBroadcast(named_tensors(broadcast), clip)

    def upload_message(self, upload: Upload, below_clip: Tensor | None) -> Upload:
        """Return the message that carries an upload, as far as it leaves a client in one piece.

        Args:
            upload: the method's own, protected.
            below_clip: [K], of an adaptive clip.
        """
        if hasattr(self.algorithm, "client_exchange"):
            return Upload()  # the protocol's messages carry it, in shares
        if self.mechanism.sums_securely:  # masked, in the secure sum's messages; but weights are known to all
            weights = [tensor for name, tensor in named_tensors(upload).items() if name == WEIGHT]
            return StatedWeight(weights[0]) if weights else Upload()
        return upload if below_clip is None else ClippedUpload(named_tensors(upload), below_clip)


def init_context(model: PromptModel, streams: Streams) -> InitContext:
    """Return what a method makes its first state of."""
    encoder = model.encoder
    return InitContext(
        encoder.embed,
        encoder.context_width,
        model.classes.names,
        streams,
        encoder.image_width,
        encoder.image_layers,
    )


def schemas_of(
    algorithm: Algorithm, settings: Any, model: PromptModel, clients: int, rounds: int, example: Tensor
) -> Schemas:
    """Return what a method's messages look like, by a round of one client in which nothing is computed.

    Args:
        algorithm, settings, model: the method.
        clients: K, how many there are.
        rounds: of the whole run.
        example: [...], what the model reads of one picture.
    """
    device = example.device
    server = algorithm.server_init(settings, init_context(model, Streams(0, 0, range(clients), device)))
    broadcast = algorithm.broadcast(server)
    if isinstance(broadcast, PersonalBroadcast):
        broadcast = take(broadcast, torch.zeros(1, dtype=torch.int64, device=device))
    one = torch.ones(1, dtype=torch.int64, device=device)
    data = ClientData(torch.ones_like(example)[None], 0 * one, 0 * one[None], one, one.float())
    state = algorithm.client_init(settings, init_context(model, Streams(0, 0, [0], device)), data)
    round_context = RoundContext(1, max(1, rounds), Streams(0, 1, [0], device))
    upload, _ = algorithm.client_round(settings, broadcast, state, data, _no_gradients, round_context)
    return Schemas(broadcast, map_tensors(upload, lambda _, tensor: torch.zeros_like(tensor)))


def _no_gradients(prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
    """Answer as `Gradients` do, without computing anything."""
    values = {name: torch.zeros_like(value) for name, value in parameters.items()}
    return Gradient(values, torch.zeros(len(batch.labels), device=batch.labels.device))


def participants(seed: int, number: int, clients: int, participation: float) -> Tensor:
    """Return which clients take part in round `number`: as many every round, ascending."""
    order = torch.from_numpy(generator(seed, number, "participants").permutation(clients))
    return order[: participant_count(clients, participation)].sort().values


def participant_count(clients: int, participation: float) -> int:
    """Return how many clients take part in a round."""
    return max(1, round(participation * clients))


def mechanism_inputs(
    algorithm: Algorithm, settings: Any, sizes: Sequence[int], rounds: int, runtime: RuntimeSettings, seed: int
) -> MechanismInputs:
    """Return the properties of a method and its federation that determine its privacy analysis.

    Args:
        algorithm, settings: the method.
        sizes: how many examples each party that trains holds.
        rounds: of the whole run.
        runtime: the `[runtime]` settings.
        seed: of the run.
    """
    about, schedule = algorithm.ABOUT, algorithm.schedule(settings)
    tells_sizes = runtime.weighting == "examples" and "weight" in {part.name for part in fields(algorithm.Upload)}
    told = Disclosure("how many examples each client holds, to the server every round", "sizes")
    participated = [0] * len(sizes)
    for number in range(1, rounds + 1):
        for client in participants(seed, number, len(sizes), runtime.participation).tolist():
            participated[client] += 1
    return MechanismInputs(
        trains=about.trains,
        pools_data=about.pools_data,
        sizes=tuple(sizes),
        weights=tuple(map(float, sizes)) if runtime.weighting == "examples" else (1.0,) * len(sizes),
        uniform=runtime.weighting == "uniform",
        batch_size=schedule.batch_size,
        steps=schedule.steps,
        linear=model_class(algorithm).linear,
        rounds_participated=tuple(participated),
        rounds=rounds,
        participation=runtime.participation,
        shared=about.averages,
        personal=about.personal != "nothing",
        server_uses=about.server_uses,
        discloses=(*about.discloses, *([told] if tells_sizes else [])),
    )


def client_data(features: Tensor, labels: Tensor, rows: Sequence[Sequence[int]], weighting: str) -> ClientData:
    """Return the clients' rows of a feature table, padded to the largest client.

    Args:
        features, labels: [N, ...] and [N].
        rows: K sequences of row numbers.
        weighting: "examples" has a client weigh as many as it holds, "uniform" has all weigh alike.
    """
    counts = torch.tensor([len(client_rows) for client_rows in rows], device=features.device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(part) for part in rows], batch_first=True)
    weights = counts.float() if weighting == "examples" else torch.ones_like(counts, dtype=torch.float32)
    return ClientData(features, labels, padded.to(features.device), counts, weights)


def data_digest(features: Tensor, labels: Tensor, rows: Sequence[int]) -> str:
    """Return a digest of a client's examples in hex, whatever their order: of what is read of them, and of labels."""
    chosen = torch.as_tensor(list(rows), dtype=torch.int64)
    read, classes = features[chosen.to(features.device)].cpu().contiguous(), labels[chosen.to(labels.device)].tolist()
    pairs = zip(read.reshape(len(classes), -1).numpy(), classes, strict=True)
    return joint_digest(hashlib.sha256(row.tobytes() + str(label).encode()).hexdigest() for row, label in pairs)


def stacked(parts: Sequence[Mapping[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of n clients, each [1, ...], as one stack [n, ...]; of none, [0, ...] as `like` has them."""
    if not parts:
        return {name: tensor[:0] for name, tensor in like.items()}
    return {name: torch.cat([part[name] for part in parts]) for name in like}
