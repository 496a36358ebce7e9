"""What a method is made of: four types that say what stays and what leaves, and pure functions.

A method is one module. It defines

    ABOUT: MethodInfo                                       its paper, what is personal, what is shared
    Settings                                           a frozen dataclass of its hyper-parameters, with defaults
    Server, Broadcast, ClientState, Upload             frozen dataclasses of tensors
    schedule(settings) -> Schedule                     gradients a round and examples a batch: what accounting assumes
    server_init(settings, init) -> Server
    client_init(settings, init, data) -> ClientState  K clients at once
    broadcast(server) -> Broadcast
    client_round(settings, broadcast, state, data, gradients, round_context) -> (Upload, ClientState)
    server_round(settings, server, uploads, round_context) -> Server
    prompt(broadcast, state) -> Prompt                 contexts [K, M, E], or named tensors [K, ...]; 1 for K if shared

and, where prompts and images meet otherwise than CoOp's do, a `Model`: a subclass of PromptModel with a class method
`of(settings, encoder, classes)`. A method may also have

    check(settings, model, clients)                    refuses a federation that it cannot serve
    server_exchange(settings, model, server, upload, clients, round_context, carrier)
                                                       what server_round is given for uploads, in place of `Uploads`
    client_exchange(settings, model, broadcast, upload, places, round_context) -> [Party, ...]
                                                       the K clients' ends of a protocol; the upload then never leaves

where `server_exchange` asks the clients' ends through `carrier`, by their places among the round's participants. A
Server whose clients are in clusters holds their numbers as `labels` [K], which the runtime records.

Every tensor of a ClientState and of an Upload has the K clients as its leading axis, so that a process that holds one
client and one that holds a thousand run the same lines. The functions do no I/O, read no clock, and draw no randomness
but from `round_context.streams`. A runtime moves Broadcast and Upload, and can move nothing else.

Gradients come from `gradients`, batches from `data`, means over clients from `uploads`, and from nowhere else: that is
where privacy enters. Each batch is differentiated once, and what was drawn in a round is held against `schedule`. An
upload that is averaged has a field `weight`, known to all, and is a change or a gradient: a vector around zero, so that
it can be clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from sordino.encoders.prompt_model import Prompt, PromptModel
from sordino.privacy.gradients import Batch, Gradients
from sordino.privacy.ledger import Disclosure
from sordino.privacy.mechanism import ServerUses
from sordino.privacy.sampling import PoissonSampler
from sordino.randomness import Streams

STRICT = ConfigDict(extra="forbid", strict=True)  # of every Settings: no unknown key, no silent conversion


@dataclass(frozen=True)
class State:
    """A bundle of named tensors; a field is a Tensor or a mapping from names to Tensors."""


@dataclass(frozen=True)
class Server(State):
    """What the server holds between rounds."""


@dataclass(frozen=True)
class ClientState(State):
    """What clients hold between rounds and never send; each tensor [K, ...]."""


@dataclass(frozen=True)
class Broadcast(State):
    """All that the server tells a client."""


@dataclass(frozen=True)
class PersonalBroadcast(Broadcast):
    """What the server tells each of K clients alone; each tensor [K, ...]. A client is sent its own slice only."""


@dataclass(frozen=True)
class Upload(State):
    """All that leaves a client; each tensor [K, ...]."""


@dataclass(frozen=True)
class StatedWeight(Upload):
    """What a client sends beside a secure sum.

    Attributes:
        weight: [K], what the average weighs its vector with.
    """

    weight: Tensor


@dataclass(frozen=True)
class ClippedUpload(Upload):
    """An upload under an adaptive clip.

    Attributes:
        upload: the method's own tensors, clipped.
        below_clip: [K], 1/2 where they were below the clip, -1/2 where not, noised.
    """

    upload: Mapping[str, Tensor]
    below_clip: Tensor


@dataclass(frozen=True)
class ClippedBroadcast(Broadcast):
    """A broadcast under an adaptive clip.

    Attributes:
        broadcast: the method's own tensors.
        clip: a scalar, the norm to which clients clip what they send.
    """

    broadcast: Mapping[str, Tensor]
    clip: Tensor


AnyState = TypeVar("AnyState", bound=State)
AnyUpload = TypeVar("AnyUpload", bound=Upload)


@dataclass(frozen=True)
class Uploads(Generic[AnyUpload]):
    """What the participants of a round sent.

    Attributes:
        each: the K uploads; a method that looks at them says so in its ABOUT.
        average: (field, values [K, ...], weights [K]) to their mean, with noise where the server adds it.
    """

    each: AnyUpload
    average: Callable[[str, Tensor, Tensor], Tensor]

    def mean(self, name: str) -> Tensor:
        """The weighted mean of a field over the participants; does not depend on their order beyond rounding."""
        tensors = named_tensors(self.each)
        return self.average(name, tensors[name], tensors["weight"])


def named_tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a state, by dotted name."""
    named: dict[str, Tensor] = {}
    for each in fields(state):
        value = getattr(state, each.name)
        if isinstance(value, Mapping):
            named.update({f"{each.name}.{key}": tensor for key, tensor in value.items()})
        else:
            named[each.name] = value
    return named


def map_tensors(state: AnyState, change: Callable[[str, Tensor], Tensor]) -> AnyState:
    """The same state with every tensor replaced by `change(dotted name, tensor)`."""
    changed: dict[str, Any] = {}
    for each in fields(state):
        value = getattr(state, each.name)
        if isinstance(value, Mapping):
            changed[each.name] = {key: change(f"{each.name}.{key}", tensor) for key, tensor in value.items()}
        else:
            changed[each.name] = change(each.name, value)
    return replace(state, **changed)


def take(state: AnyState, clients: Tensor) -> AnyState:
    """The slices of some clients, in the given order; torch keeps some of an optimizer's tensors on the CPU always."""
    return map_tensors(state, lambda _, tensor: tensor[clients.to(tensor.device)])


def put(state: AnyState, clients: Tensor, part: AnyState) -> AnyState:
    """The state with some clients' slices replaced by those of `part`."""
    new = named_tensors(part)
    return map_tensors(state, lambda name, tensor: tensor.index_copy(0, clients.to(tensor.device), new[name]))


@dataclass(frozen=True)
class InitContext:
    """What a method is given to make its first state.

    Attributes:
        embed: hand-written text to its token embeddings [W, E].
        context_width: E.
        class_names: the C candidate classes.
        streams: initial randomness, and the K clients' numbers.
        image_width, image_layers: of an image tower that takes visual prompts; 0 where there is none.
    """

    embed: Callable[[str], Tensor]
    context_width: int
    class_names: tuple[str, ...]
    streams: Streams
    image_width: int = 0
    image_layers: int = 0


@dataclass(frozen=True)
class Schedule:
    """All that accounting may assume of a client's round.

    Attributes:
        steps: gradients that a client takes in a round, each on a batch of its own.
        batch_size: examples a batch, the expected number under Poisson sampling; None takes all.
    """

    steps: int
    batch_size: int | None


@dataclass(frozen=True)
class RoundContext:
    """When it is: round `round` of `rounds`, counted from 1, with that round's randomness."""

    round: int
    rounds: int
    streams: Streams


@dataclass(frozen=True)
class ClientData:
    """The training examples of K clients, as rows of one table of images, or of what frozen layers make of them.

    Attributes:
        features: [N, ...] the table, of what the method's model reads.
        labels: [N] class indices.
        rows: [K, n] row numbers, padded on the right to the largest client.
        counts: [K] how many of them are real.
        weights: [K] the weight that each client tells the server for averaging; ones where sizes stay untold.
        poisson: where set, it decides which examples are in a batch, each by a coin of its own.
        hidden: [N], true for rows of the table that no batch shows. They are masked after a batch was drawn, so that
            they keep their place in sizes, rates and coins. An audit hides canaries so; None hides nothing.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor
    counts: Tensor
    weights: Tensor
    poisson: PoissonSampler | None = None
    hidden: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, steps: int, size: int | None, streams: Streams) -> Iterator[Batch]:
        """`steps` minibatches of every client, each pass over a client's examples in a new random order.

        Args:
            steps: how many.
            size: examples a batch, at most; None gives every example each time. A pass's last batch may be smaller.
                Under Poisson sampling, the expected size.
            streams: decides the order.
        """
        if self.poisson is not None:
            yield from (self._sampled(size, self.poisson) for _ in range(steps))
            return
        columns = torch.arange(self.rows.shape[1], device=self.rows.device)
        if size is None or size >= self.rows.shape[1]:
            batch = self._batch(self.rows, columns < self.counts[:, None])
            yield from (batch for _ in range(steps))
            return
        plans = [
            _batch_plan(int(count), steps, size, generator)
            for count, generator in zip(self.counts, streams.generators("batches"), strict=True)
        ]
        for step in range(steps):
            chosen = torch.stack([plan[step] for plan in plans]).to(self.rows.device)  # [K, B], -1 for none
            yield self._batch(self.rows.gather(1, chosen.clamp(min=0)), chosen >= 0)

    def balanced(self) -> ClientData:
        """The same examples, those of a client's rarer classes repeated so that all its classes count alike.

        Hidden examples are left out, unless a client has no others.

        Raises:
            ValueError: examples are sampled by coins. A repeated example would be in a batch more than once, as often
                as others say, and no mechanism bounds that.
        """
        if self.poisson is not None:
            raise ValueError("classes cannot be balanced where examples are sampled by coins; take batches as they are")
        repeated = []
        for row, count in zip(self.rows, self.counts, strict=True):
            own = row[:count]
            shown = own[self.shown(own)]
            own = shown if len(shown) else own
            labels = self.labels[own]
            most = int(labels.bincount().max())
            classes = [own[labels == label] for label in labels.unique()]
            repeated.append(torch.cat([each.repeat(-(-most // len(each)))[:most] for each in classes]))
        counts = torch.tensor([len(each) for each in repeated], device=self.counts.device)
        return replace(self, rows=torch.nn.utils.rnn.pad_sequence(repeated, batch_first=True), counts=counts)

    def _sampled(self, size: int | None, poisson: PoissonSampler) -> Batch:
        """Return a batch that each example is in by its own coin, whoever else is; it may be empty."""
        drawn, sampling = poisson.draw(self.counts.tolist(), size)
        chosen = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-1)
        chosen = chosen if chosen.shape[1] else chosen.new_full((len(drawn), 1), -1)
        chosen = chosen.to(self.rows.device)
        batch = self._batch(self.rows.gather(1, chosen.clamp(min=0)), chosen >= 0)
        return replace(batch, sampling=sampling)

    def shown(self, rows: Tensor) -> Tensor:
        """Which rows of the table, of any shape, are not hidden."""
        return torch.ones_like(rows, dtype=torch.bool) if self.hidden is None else ~self.hidden[rows]

    def _batch(self, rows: Tensor, mask: Tensor) -> Batch:
        shown = self.shown(rows)
        # A hidden example is not even read: another stands in for it, so that its numbers, which may not be finite,
        # enter no sum, not even multiplied by zero.
        stand_in = 0 if self.hidden is None else int((~self.hidden).to(torch.int8).argmax())
        rows = torch.where(shown, rows, stand_in)
        return Batch(self.features[rows], self.labels[rows], mask & shown, rows=rows)


def _batch_plan(count: int, steps: int, size: int, generator: np.random.Generator) -> Tensor:
    """Which of a client's `count` examples each step takes: [steps, size], padded with -1."""
    plan = torch.full((steps, size), -1)
    order, used = torch.empty(0, dtype=torch.int64), 0
    for step in range(steps):
        if used >= len(order):
            order, used = torch.from_numpy(generator.permutation(count)), 0
        taken = order[used : used + size]
        plan[step, : len(taken)] = taken
        used += size
    return plan


@dataclass(frozen=True)
class MethodInfo:
    """What a method is, for the tables that list methods.

    Attributes:
        paper: authors, title, venue, year.
        personal: what each client keeps for itself.
        shared: what is sent and averaged.
        privacy: the guarantee that the method claims in its paper.
        needs: what it needs of the encoder.
        discloses: what leaves a client or is published, if nothing is noised; empty if nothing that was learned.
        server_uses: what the server makes of uploads: their "mean" alone, "each" by itself, what their "shares" let it
            compute, or "nothing".
        averages: parameters whose gradient is uploaded as it is and only averaged, with the upload's field.
        trains: false for a method with no rounds.
        pools_data: true for a method that sees all clients' images in one place.
    """

    paper: str
    personal: str
    shared: str
    privacy: str
    needs: str
    discloses: tuple[Disclosure, ...]
    server_uses: ServerUses
    averages: Mapping[str, str] = field(default_factory=dict)
    trains: bool = True
    pools_data: bool = False


class Algorithm(Protocol):
    """The module of a method, as runtimes see it."""

    ABOUT: MethodInfo
    Settings: Any
    Upload: Any

    def schedule(self, settings: Any) -> Schedule: ...
    def server_init(self, settings: Any, init: InitContext) -> Any: ...
    def client_init(self, settings: Any, init: InitContext, data: ClientData) -> Any: ...
    def broadcast(self, server: Any) -> Any: ...
    def client_round(
        self,
        settings: Any,
        broadcast: Any,
        state: Any,
        data: ClientData,
        gradients: Gradients,
        round_context: RoundContext,
    ) -> tuple[Any, Any]: ...
    def server_round(self, settings: Any, server: Any, uploads: Uploads[Any], round_context: RoundContext) -> Any: ...
    def prompt(self, broadcast: Any, state: Any) -> Prompt: ...


def model_class(method: Algorithm) -> type[PromptModel]:
    """How prompts and images meet in a method."""
    return getattr(method, "Model", PromptModel)
