"""The interface of a method: four types that separate what stays from what leaves, and pure functions.

A method is one module. It defines

    ABOUT: MethodInfo                                  its paper, what is personal, what is shared
    Settings                                           a frozen dataclass of its hyper-parameters, with defaults
    Server, Broadcast, ClientState, Upload             frozen dataclasses of tensors
    schedule(settings) -> Schedule                     gradients a round and examples a batch, for accounting
    server_init(settings, init) -> Server
    client_init(settings, init, data) -> ClientState   K clients at once
    broadcast(server) -> Broadcast
    client_round(settings, broadcast, state, data, gradients, round_context) -> (Upload, ClientState)
    server_round(settings, server, uploads, round_context) -> Server
    prompt(broadcast, state) -> Prompt                 contexts [K, M, E], or named tensors [K, ...]; 1 for K if shared

If prompts and images meet in another way than in CoOp, a method also has a `Model`: a subclass of PromptModel with a
class method `of(settings, encoder, classes)`. A method may also have

    PARENT                                             the name of the method whose settings table applies to it too
    check(settings, model, clients)                    refuses a federation that it cannot serve
    unused(settings, rounds, poisson) -> [str, ...]    the parts of it that do nothing in such a run, for warnings
    discloses(settings, rounds) -> (Disclosure, ...)   what it discloses in such a run, if less than in its ABOUT
    server_exchange(settings, model, server, upload, clients, round_context, carrier)
                                                       the server's end of a protocol; server_round gets its result
                                                       in place of `Uploads`
    client_exchange(settings, model, broadcast, upload, places, round_context) -> [Party, ...]
                                                       the K clients' ends of a protocol; the upload then never leaves

`server_exchange` asks the clients' ends through `carrier`, by their places among the round's participants. A Server
whose clients are in clusters holds their numbers as `labels` [K], which the runtime records.

Every tensor of a ClientState and of an Upload has the K clients as its leading axis. So a process with one client and
one with a thousand run the same lines. The functions do no I/O, read no clock, and draw randomness only from
`round_context.streams`. A runtime moves Broadcast and Upload, and can move nothing else.

Gradients come only from `gradients`, batches only from `data`, means over clients only from `uploads`: that is where
privacy enters. A method with `forward_only=True` in its ABOUT gets losses of candidate prompts in the place of
`gradients`, and no derivative. Each batch is differentiated, or measured, once. The draws of a round are checked
against `schedule`. An upload that is averaged has a field `weight`, known to all. It is a change or a gradient: a
vector around zero, so that it can be clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from sordino.algorithms.client_data import ClientData
from sordino.algorithms.settings import STRICT
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.capabilities import CAPABILITIES, Capability, with_features
from sordino.encoders.generative.model import GenerativeModel
from sordino.encoders.prompt_model import Prompt, PromptModel
from sordino.errors import EncoderError
from sordino.privacy.ledger import Disclosure
from sordino.privacy.mechanism import ServerUses
from sordino.randomness import Streams

__all__ = [
    "STRICT",
    "Algorithm",
    "Broadcast",
    "ClientData",
    "ClientState",
    "ClippedBroadcast",
    "ClippedUpload",
    "CompressedUpload",
    "InitContext",
    "MethodInfo",
    "PersonalBroadcast",
    "RoundContext",
    "Schedule",
    "Server",
    "State",
    "StatedWeight",
    "Upload",
    "Uploads",
    "map_tensors",
    "model_class",
    "model_kind",
    "model_of",
    "named_tensors",
    "put",
    "take",
]


@dataclass(frozen=True)
class State:
    """A bundle of named tensors; a field is a Tensor or a mapping from names to Tensors."""


@dataclass(frozen=True)
class Server(State):
    """The server's state between rounds."""


@dataclass(frozen=True)
class ClientState(State):
    """The clients' state between rounds, which they never send; each tensor [K, ...]."""


@dataclass(frozen=True)
class Broadcast(State):
    """Everything that the server tells a client."""


@dataclass(frozen=True)
class PersonalBroadcast(Broadcast):
    """A broadcast with a part for each of K clients; each tensor [K, ...]. A client is sent its own slice only."""


@dataclass(frozen=True)
class Upload(State):
    """Everything that leaves a client; each tensor [K, ...]."""


@dataclass(frozen=True)
class StatedWeight(Upload):
    """The upload of a client beside a secure sum.

    Attributes:
        weight: [K], the weight of its vector in the average.
    """

    weight: Tensor


@dataclass(frozen=True)
class ClippedUpload(Upload):
    """An upload under an adaptive clip.

    Attributes:
        upload: the method's own tensors, clipped.
        below_clip: [K], 1/2 if they were below the clip, -1/2 if not, noised.
    """

    upload: Mapping[str, Tensor]
    below_clip: Tensor


@dataclass(frozen=True)
class CompressedUpload(Upload):
    """An upload that is quantized by a dither (`sordino.privacy.uploads.dithered`).

    Attributes:
        codes: the method's own tensors, as integers.
        public: those that are known to all.
        key: [K, bytes], of the dither.
    """

    codes: Mapping[str, Tensor]
    public: Mapping[str, Tensor]
    key: Tensor


@dataclass(frozen=True)
class ClippedBroadcast(Broadcast):
    """A broadcast under an adaptive clip.

    Attributes:
        broadcast: the method's own tensors.
        clip: a scalar, the norm to which clients clip their uploads.
    """

    broadcast: Mapping[str, Tensor]
    clip: Tensor


AnyState = TypeVar("AnyState", bound=State)
AnyUpload = TypeVar("AnyUpload", bound=Upload)


@dataclass(frozen=True)
class Uploads(Generic[AnyUpload]):
    """The uploads of a round's participants.

    Attributes:
        each: the K uploads; a method that looks at them says so in its ABOUT.
        average: (field, values [K, ...], weights [K]) to their mean, with noise if the server adds it.
    """

    each: AnyUpload
    average: Callable[[str, Tensor, Tensor], Tensor]

    def mean(self, name: str) -> Tensor:
        """Return the weighted mean of a field over the participants, in any order up to rounding."""
        tensors = named_tensors(self.each)
        return self.average(name, tensors[name], tensors["weight"])


def named_tensors(state: State) -> dict[str, Tensor]:
    """Return the tensors of a state, by dotted name."""
    named: dict[str, Tensor] = {}
    for entry in fields(state):
        value = getattr(state, entry.name)
        if isinstance(value, Mapping):
            named.update({f"{entry.name}.{key}": tensor for key, tensor in value.items()})
        else:
            named[entry.name] = value
    return named


def map_tensors(state: AnyState, change: Callable[[str, Tensor], Tensor]) -> AnyState:
    """Return the same state with every tensor replaced by `change(dotted name, tensor)`."""
    changed: dict[str, Any] = {}
    for entry in fields(state):
        name, value = entry.name, getattr(state, entry.name)
        if isinstance(value, Mapping):
            changed[name] = {key: change(f"{name}.{key}", tensor) for key, tensor in value.items()}
        else:
            changed[name] = change(name, value)
    return replace(state, **changed)


def take(state: AnyState, clients: Tensor) -> AnyState:
    """Return the slices of some clients, in the given order."""
    # torch keeps some of an optimizer's tensors on the CPU always, so devices differ within a state.
    return map_tensors(state, lambda _, tensor: tensor[clients.to(tensor.device)])


def put(state: AnyState, clients: Tensor, part: AnyState) -> AnyState:
    """Return the state with some clients' slices replaced by those of `part`."""
    new = named_tensors(part)

    def updated(name: str, tensor: Tensor) -> Tensor:
        return tensor.index_copy(0, clients.to(tensor.device), new[name])

    return map_tensors(state, updated)


@dataclass(frozen=True)
class InitContext:
    """The inputs of a method's first state.

    Attributes:
        embed: hand-written text to its token embeddings [W, E].
        context_width: E.
        class_names: the C candidate classes.
        streams: initial randomness, and the K clients' numbers.
        image_width, image_layers: of an image tower that takes visual prompts; 0 without one.
        feature_width: D, of the features of images and classes.
        text_layers: of a text tower that takes deep prompts; 0 without one.
    """

    embed: Callable[[str], Tensor]
    context_width: int
    class_names: tuple[str, ...]
    streams: Streams
    image_width: int = 0
    image_layers: int = 0
    feature_width: int = 0
    text_layers: int = 0


@dataclass(frozen=True)
class Schedule:
    """Everything that accounting may assume of a client's round.

    Attributes:
        steps: gradients that a client computes in a round, each on a batch of its own.
        batch_size: examples a batch, the expected number under Poisson sampling; None uses all.
    """

    steps: int
    batch_size: int | None


@dataclass(frozen=True)
class RoundContext:
    """Round `round` of `rounds`, counted from 1, with that round's randomness.

    Attributes:
        participants: the number of clients that take part in it, as everybody computes it; 0 where nobody may know.
    """

    round: int
    rounds: int
    streams: Streams
    participants: int = 0


@dataclass(frozen=True)
class MethodInfo:
    """The properties of a method, for the tables that list methods and for the privacy analysis.

    Attributes:
        paper: authors, title, venue, year.
        personal: the part that each client keeps for itself.
        shared: the part that is sent and averaged.
        privacy: the guarantee that the method claims in its paper.
        needs: the encoder's capabilities that it requires.
        discloses: everything learned from images that leaves a client or is published, if nothing is noised.
        server_uses: the server's use of uploads: their "mean" alone, "each" by itself, results computed on their
            "shares", or "nothing".
        averages: parameters whose gradient is uploaded as it is and only averaged, with the upload's field.
        trains: false for a method with no rounds.
        pools_data: true for a method that sees all clients' images in one place.
        statistics: true for a method that works on class statistics (`ClientData.statistics`), which a runtime then
            makes for it under any mechanism that allows it.
        counts_only: true for such a method that uses their counts and nothing else.
        class_features: true for a method without a model of its own that uses the class features of prompts beside
            their scores.
        forward_only: true for a method that treats the model as a black box. Its `client_round` is given `Losses` of
            candidate prompts in the place of `gradients`.
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
    statistics: bool = False
    counts_only: bool = False
    class_features: bool = False
    forward_only: bool = False


class Algorithm(Protocol):
    """The module of a method, as runtimes use it."""

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
        gradients: Any,
        round_context: RoundContext,
    ) -> tuple[Any, Any]: ...
    def server_round(self, settings: Any, server: Any, uploads: Uploads[Any], round_context: RoundContext) -> Any: ...
    def prompt(self, broadcast: Any, state: Any) -> Prompt: ...


def model_class(method: Algorithm) -> type[PromptModel]:
    """Return the model by which prompts and images meet in a method."""
    return getattr(method, "Model", PromptModel)


def model_kind(method: Algorithm, name: str, encoder: str) -> type[PromptModel]:
    """Return the model by which prompts and images meet in a method, in the encoder of a name.

    Args:
        method: the method.
        name: of the method, for the error.
        encoder: the name of the encoder.

    Raises:
        EncoderError: the encoder has likelihoods and no features, and the method needs more than a context.
    """
    if Capability.LIKELIHOODS not in CAPABILITIES.get(encoder, ()):
        return model_class(method)
    if method.ABOUT.class_features or model_class(method) is not PromptModel:
        able = ", ".join(with_features())
        raise EncoderError(
            f"encoder {encoder!r} has no features of images and class names, which {name} needs; encoders that do: "
            f"{able}; or take a method that learns a context alone, such as 'promptfl' or 'dp-fpl'"
        )
    return GenerativeModel


def model_of(method: Algorithm, name: str, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> PromptModel:
    """Return the model by which a method's prompts and images meet in an encoder.

    Raises:
        EncoderError: the encoder lacks what the method needs.
    """
    return model_kind(method, name, encoder.name).of(settings, encoder, classes)
