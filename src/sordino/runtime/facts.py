"""Facts that both ends of a federation know before the first round: method, participants, message schemas."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sordino.algorithms.base import (
    Algorithm,
    Broadcast,
    ClientData,
    ClippedBroadcast,
    ClippedUpload,
    CompressedUpload,
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
from sordino.privacy.forward.losses import without_a_model
from sordino.privacy.gradients import Batch, Gradient, Parameters, PromptOf
from sordino.privacy.ledger import Disclosure, Ledger, joint_digest
from sordino.privacy.mechanism import WEIGHT, Mechanism, MechanismInputs
from sordino.privacy.settings import PrivacySettings
from sordino.privacy.statistics.estimates import ClassStatistics
from sordino.progress import log
from sordino.randomness import Randomness, Streams, SystemRandomness, generator
from sordino.runtime.settings import RuntimeSettings, participant_count

# The randomness of a round's noise, by the round's number and the clients' numbers.
RandomnessOf = Callable[[int, Sequence[int]], Randomness]


@dataclass(frozen=True)
class Schemas:
    """One client's messages, with a method's names, types and shapes; their values mean nothing.

    Attributes:
        broadcast: the method's broadcast; each tensor of a personal one is [1, ...].
        upload: the method's upload, each tensor [1, ...].
    """

    broadcast: Broadcast
    upload: Upload


@dataclass(frozen=True)
class Federation:
    """The agreement of all parties before the first round.

    Attributes:
        algorithm, settings: the method.
        model: the method's model, frozen.
        clients: K, the number of clients.
        rounds: the number of rounds of the whole run.
        runtime: the `[runtime]` settings.
        seed: the seed of the draws that all parties share, and of each client's batches.
        mechanism: the privacy mechanism, with its noise matched to the budget.
        schemas: the schemas of the method's messages.
        device: the device that computes with tensors.
        assumptions: facts that no party can see by itself, beside those of the mechanism, in words.
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
    assumptions: tuple[str, ...] = ()

    def empty_ledger(self) -> Ledger:
        """Return the ledger before any release."""
        empty = self.mechanism.empty_ledger()
        return replace(empty, assumptions=(*empty.assumptions, *self.assumptions))

    def init_context(self, clients: Sequence[int]) -> InitContext:
        """Return the inputs of a method's first state, for a stack of clients."""
        return init_context(self.model, Streams(self.seed, 0, clients, self.device))

    def round_context(self, number: int, clients: Sequence[int]) -> RoundContext:
        """Return a round's number and randomness for a stack of clients; an empty stack draws as client 0."""
        streams = Streams(self.seed, number, list(clients) or [0], self.device)
        count = participant_count(self.clients, self.runtime.participation)
        return RoundContext(number, self.rounds, streams, 0 if self.mechanism.samples_clients else count)

    def randomness(self, given: RandomnessOf | None) -> RandomnessOf:
        """Return the source of noise and samples: the one given, or else the operating system.

        Raises:
            ConfigError: the run is a simulation, and no source is given. Noise that can be drawn again protects nobody
                from the other parties, so only a runtime that plays all of them gives it.
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
        """Return the message of a broadcast and, if the clip adapts, of the round's clip."""
        return broadcast if clip is None else ClippedBroadcast(named_tensors(broadcast), clip)

    def upload_message(self, upload: Upload, below_clip: Tensor | None, keys: Tensor | None = None) -> Upload:
        """Return the message of an upload, without the parts that leave a client in shares or masked.

        Args:
            upload: the method's upload, protected.
            below_clip: [K], the bits of an adaptive clip; None if the clip does not adapt.
            keys: [K, bytes], of the dithers by which the upload was quantized; None for no such upload.
        """
        if self.mechanism.compresses:
            assert keys is not None
            tensors = named_tensors(upload)
            public = {name: tensor for name, tensor in tensors.items() if name == WEIGHT}
            codes = {name: tensor.to(torch.int32) for name, tensor in tensors.items() if name != WEIGHT}
            return CompressedUpload(codes, public, keys)
        if hasattr(self.algorithm, "client_exchange"):
            return Upload()  # the protocol's messages carry it, in shares
        if self.mechanism.sums_securely:  # the secure sum's messages carry it, masked; weights are public
            weights = [tensor for name, tensor in named_tensors(upload).items() if name == WEIGHT]
            return StatedWeight(weights[0]) if weights else Upload()
        return upload if below_clip is None else ClippedUpload(named_tensors(upload), below_clip)


def init_context(model: PromptModel, streams: Streams) -> InitContext:
    """Return the inputs of a method's first state."""
    encoder = model.encoder
    return InitContext(
        encoder.embed,
        encoder.context_width,
        model.classes.names,
        streams,
        encoder.image_width,
        encoder.image_layers,
        encoder.feature_width,
        encoder.text_layers,
    )


def schemas_of(
    algorithm: Algorithm, settings: Any, model: PromptModel, clients: int, rounds: int, example: Tensor
) -> Schemas:
    """Return the schemas of a method's messages, from a round of one client in which no model is run.

    Args:
        algorithm, settings, model: the method.
        clients: K, the number of clients.
        rounds: the number of rounds of the whole run.
        example: [...], the model's input for one picture.
    """
    device = example.device
    server = algorithm.server_init(settings, init_context(model, Streams(0, 0, range(clients), device)))
    broadcast = algorithm.broadcast(server)
    if isinstance(broadcast, PersonalBroadcast):
        broadcast = take(broadcast, torch.zeros(1, dtype=torch.int64, device=device))
    one = torch.ones(1, dtype=torch.int64, device=device)
    data = ClientData(torch.ones_like(example)[None], 0 * one, 0 * one[None], one, one.float())
    if algorithm.ABOUT.statistics:
        data = replace(data, statistics=_no_statistics(model, 1))
    state = algorithm.client_init(settings, init_context(model, Streams(0, 0, [0], device)), data)
    round_context = RoundContext(1, max(1, rounds), Streams(0, 1, [0], device))
    nothing = without_a_model if algorithm.ABOUT.forward_only else _no_gradients
    upload, _ = algorithm.client_round(settings, broadcast, state, data, nothing, round_context)
    return Schemas(broadcast, map_tensors(upload, lambda _, tensor: torch.zeros_like(tensor)))


def stand_in(federation: Federation, clients: int) -> ClientData:
    """Return data of a stack of clients who have one example of zeros each, and statistics of nothing."""
    model, device = federation.model, federation.device
    ones = torch.ones(clients, dtype=torch.int64, device=device)
    features = torch.zeros(1, model.encoder.feature_width, device=device)
    statistics = _no_statistics(model, clients)
    return ClientData(features, 0 * ones[:1], 0 * ones[:, None], ones, ones.float(), statistics=statistics)


def _no_statistics(model: PromptModel, clients: int) -> ClassStatistics:
    device = model.classes.mask.device
    none = torch.zeros(clients, len(model.classes), device=device)
    means = torch.zeros(*none.shape, model.encoder.feature_width, device=device)
    return ClassStatistics(none, none[:, 0], none, means, none, none[:, 0], means[0], shared_counts=none[0])


def _no_gradients(prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
    """Return zeros of the shapes that `Gradients` return."""
    values = {name: torch.zeros_like(value) for name, value in parameters.items()}
    return Gradient(values, torch.zeros(len(batch.labels), device=batch.labels.device))


def participants(seed: int, number: int, clients: int, participation: float) -> Tensor:
    """Return the clients that take part in round `number`, ascending; their count is the same every round."""
    order = torch.from_numpy(generator(seed, number, "participants").permutation(clients))
    return order[: participant_count(clients, participation)].sort().values


@dataclass(frozen=True)
class Units:
    """The holdings of the training parties, in units of privacy.

    Attributes:
        sizes: for each party its number of examples, or of persons if these are protected.
        whole_persons: whether it is known whose each example is, and no person has examples at two parties.
        noun: the unit in the plural, for messages.
    """

    sizes: tuple[int, ...]
    whole_persons: bool
    noun: str

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], persons: Sequence[int] | None, privacy: PrivacySettings) -> Units:
        """Count the units of parties that hold these rows of a table.

        Args:
            rows: for each party the numbers of its rows.
            persons: whose each row of the table is; None if unknown.
            privacy: the `[privacy]` settings.

        Raises:
            ConfigError: persons are protected, and one of them has examples at two parties.
        """
        held = None if persons is None else [{int(persons[row]) for row in party_rows} for party_rows in rows]
        first: dict[int, int] = {}
        divided = None
        for party, numbers in enumerate(held or []):
            divided = divided or next(((person, first[person], party) for person in numbers if person in first), None)
            first |= dict.fromkeys(numbers, party)
        if divided and privacy.by_person:
            raise ConfigError(
                "privacy.unit",
                "person",
                f"person {divided[0]} has images at clients {divided[1]} and {divided[2]}, each of which would protect "
                "a part of them; give all images of a person to one client",
            )
        if held is not None and privacy.by_person:
            return cls(tuple(map(len, held)), True, "persons")
        return cls(tuple(map(len, rows)), held is not None and not divided, "examples")


def mechanism_inputs(
    algorithm: Algorithm,
    settings: Any,
    units: Units,
    rounds: int,
    runtime: RuntimeSettings,
    seed: int,
    classes: int = 0,
    model: type[PromptModel] | None = None,
) -> MechanismInputs:
    """Return the properties of a method and its federation that determine its privacy analysis.

    Args:
        algorithm, settings: the method.
        units: what each training party holds.
        rounds: the number of rounds of the whole run.
        runtime: the `[runtime]` settings.
        seed: the run's seed.
        classes: C; 0 if it does not matter.
        model: the kind of the method's model; None: the one that it has in an encoder of features.
    """
    kind = model or model_class(algorithm)
    about, schedule = algorithm.ABOUT, algorithm.schedule(settings)
    has_weight = "weight" in {part.name for part in fields(algorithm.Upload)}
    tells_sizes = runtime.weighting == "examples" and has_weight
    sizes = units.sizes
    sizes_disclosure = Disclosure(f"how many {units.noun} each client holds, to the server every round", "sizes")
    of_run = getattr(algorithm, "discloses", None)
    disclosures = of_run(settings, rounds) if of_run else about.discloses
    participated = [0] * len(sizes)
    for number in range(1, rounds + 1):
        for client in participants(seed, number, len(sizes), runtime.participation).tolist():
            participated[client] += 1
    return MechanismInputs(
        trains=about.trains,
        pools_data=about.pools_data,
        sizes=sizes,
        weights=tuple(map(float, sizes)) if runtime.weighting == "examples" else (1.0,) * len(sizes),
        uniform=runtime.weighting == "uniform",
        batch_size=schedule.batch_size,
        steps=schedule.steps,
        linear=kind.linear,
        rounds_participated=tuple(participated),
        rounds=rounds,
        participation=runtime.participation,
        shared=about.averages,
        personal=about.personal != "nothing",
        server_uses=about.server_uses,
        discloses=(*disclosures, *([sizes_disclosure] if tells_sizes else [])),
        classes=classes,
        statistics=about.statistics,
        counts_only=about.counts_only,
        one_feature=kind.reads is PromptModel.reads,
        whole_persons=units.whole_persons,
        forward_only=about.forward_only,
    )


def warn_of_unused(algorithm: Algorithm, settings: Any, mechanism: Mechanism) -> None:
    """Log a warning for each part of a method that does nothing in a run, with the key and the remedy."""
    of_run = getattr(algorithm, "unused", None)
    for line in of_run(settings, mechanism.inputs.rounds, mechanism.samples_examples) if of_run else ():
        log.warning("%s", line)


def client_data(
    features: Tensor,
    labels: Tensor,
    rows: Sequence[Sequence[int]],
    weighting: str,
    persons: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> ClientData:
    """Return the clients' rows of a feature table, padded to the largest client.

    Args:
        features, labels: [N, ...] and [N].
        rows: K sequences of row numbers.
        weighting: "examples" weights a client by its size, "uniform" weights all clients alike.
        persons: [N] whose each row of the table is; None if unknown.
        sizes: K numbers of units of privacy; by default of rows.
    """
    counts = torch.tensor([len(client_rows) for client_rows in rows], device=features.device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(part) for part in rows], batch_first=True)
    told = counts if sizes is None else torch.tensor(list(sizes), device=features.device)
    weights = told.float() if weighting == "examples" else torch.ones_like(counts, dtype=torch.float32)
    owners = None if persons is None else torch.as_tensor(persons, dtype=torch.int64, device=features.device)
    return ClientData(features, labels, padded.to(features.device), counts, weights, persons=owners)


def data_digest(features: Tensor, labels: Tensor, rows: Sequence[int]) -> str:
    """Return a digest in hex of a client's examples, features and labels; their order does not matter."""
    chosen = torch.as_tensor(list(rows), dtype=torch.int64)
    client_features = features[chosen.to(features.device)].cpu().contiguous()
    client_labels = labels[chosen.to(labels.device)].tolist()
    pairs = zip(client_features.reshape(len(client_labels), -1).numpy(), client_labels, strict=True)
    return joint_digest(hashlib.sha256(row.tobytes() + str(label).encode()).hexdigest() for row, label in pairs)


def stacked(parts: Sequence[Mapping[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of n clients, each [1, ...], as one stack [n, ...] on the devices of `like`.

    `like` also gives the shapes if n is 0.
    """
    if not parts:
        return {name: tensor[:0] for name, tensor in like.items()}
    return {name: torch.cat([part[name] for part in parts]).to(tensor.device) for name, tensor in like.items()}
