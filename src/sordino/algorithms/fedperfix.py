"""FedPerfix: personal prefixes in the self-attention of the image tower; the other trained parameters are aggregated.

Sun, Mendieta, Luo, Wu, Chen, FedPerfix: Towards Partial Model Personalization of Vision Transformers in Federated
Learning, ICCV 2023 (arXiv 2308.09160), sections 3.4 and 3.5. Self-attention is the part of a vision transformer that
differs most between clients. Prefixes to its keys and values adapt it. For stability, a parallel adapter computes them
from the layer's own input: P_K, P_V = tanh(x down) up, scaled by s. Adapters never leave their client; the rest is
aggregated. In the paper the rest is the whole transformer but for its head, which is personal. Here both towers are
frozen, the head is the class features of the text context, and that context is aggregated, as in PromptFL.

Equation 5 appends s P_K and s P_V to the layer's keys and values. The authors' code adds them, and has biases in the
adapter. The code's way is the default here; `join = "append"` is the equation. As in that code's preset for the method:
s = 1.5, bottleneck 256 (its command line's defaults, 0.8 and 512, are not used), adapters in the last 12 layers (all of
a ViT-S or B), SGD of rate 0.01 on batches of 64, everything trained together, clients starting alike. Up- and
down-projections start there as linear layers do, here with normal numbers of that deviation. The preset also keeps the
last block personal on CIFAR-100; a frozen block is the same for all. The paper's transformers train around random
prefixes, some from random weights. A frozen one cannot, so here the up-projections start at zero, and the tower as it
was pretrained; `initial_up = "random"` is the code's. Choices where the paper is silent: the adapters' optimizer starts
afresh each round, like the context's.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.descent import local_steps
from sordino.algorithms.settings.fedperfix import Settings
from sordino.encoders.base import Capability, ClassTokens, DualEncoder
from sordino.encoders.cache import Kind, layer_kind
from sordino.encoders.prompt_model import Prompt, named_parts
from sordino.encoders.visual_prompts import Adapter
from sordino.privacy.gradients import Gradients
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import initial_context
from sordino.prompts.visual import ImageSideModel

ABOUT = MethodInfo(
    paper="Sun et al., FedPerfix, ICCV 2023 (arXiv 2308.09160)",
    personal="adapters of keys and values in the image tower",
    shared="a context",
    privacy="images and adapters stay; no guarantee on what the context tells about them",
    needs="text tower, a vision transformer",
    discloses=(
        Disclosure("each client's change of the context, to the server every round", "upload"),
        Disclosure("the averaged context, to all", "mean"),
        Disclosure("each client's adapters, where its prompt is published", "prompt"),
    ),
    server_uses="mean",
)
PARTS = ("down", "down_bias", "up", "up_bias")  # of an adapter


@dataclass(frozen=True)
class Model(ImageSideModel):
    """CoOp's model on an image tower with adapters.

    Attributes: scale, adapted_layers, appended: as in `Settings`.
    """

    scale: float = 1.5
    adapted_layers: int = 12
    appended: bool = False

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        encoder.require(Capability.VISUAL_PROMPTS, "fedperfix")
        layers = min(settings.adapted_layers, encoder.image_layers)
        return cls(encoder, classes, settings.scale, layers, settings.join == "append")

    @property
    def first_layer(self) -> int:
        return self.encoder.image_layers - self.adapted_layers

    @property
    def reads(self) -> Kind:
        return layer_kind(self.first_layer)

    def class_features(self, prompt: Prompt) -> Tensor:
        return self.text_features(named_parts(prompt)["context"])

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        tower, parts = self.encoder.image_tower, named_parts(prompt)
        layers = zip(*(parts[part].unbind(1) for part in PARTS), strict=True)
        adapters = {
            self.first_layer + number: Adapter(down, down_bias, up, up_bias, self.scale, self.appended)
            for number, (down, down_bias, up, up_bias) in enumerate(layers)
        }
        outputs = tower.forward(images, self.first_layer, self.encoder.image_layers, adapters=adapters)
        return self.logits(features, tower.features(outputs))

    def flops(self, prompt: Prompt, images: int) -> float:
        length = named_parts(prompt)["context"].shape[-2]
        text = self.encoder.text_flops(1, length, self.classes)
        return text + self.encoder.image_tower.flops(images, self.first_layer)


@dataclass(frozen=True)
class Server(base.Server):
    context: Tensor  # [M, E]


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    context: Tensor  # [M, E]


@dataclass(frozen=True)
class ClientState(base.ClientState):
    """Adapters of L layers of width W.

    Attributes:
        adapters: "down" [K, L, W, R], "down_bias" [K, L, R], "up" [K, L, R, 2 W], "up_bias" [K, L, 2 W].
    """

    adapters: dict[str, Tensor]


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, M, E], of the context by the local steps
    weight: Tensor  # [K], its weight in the average


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    noise = init.streams.common_normal("context", settings.context_length, init.context_width)
    return Server(initial_context(settings.initial_context, init.embed, noise))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    layers, width = min(settings.adapted_layers, init.image_layers), init.image_width
    inner, outer, clients = settings.bottleneck, 2 * init.image_width, len(init.streams.clients)
    shapes = {"down": (width, inner), "down_bias": (inner,), "up": (inner, outer), "up_bias": (outer,)}
    fan_in = {"down": width, "down_bias": width, "up": inner, "up_bias": inner}
    adapters = {}
    for part in PARTS:
        noise = init.streams.common_normal(f"adapter {part}", layers, *shapes[part])
        noise = torch.zeros_like(noise) if part.startswith("up") and settings.initial_up == "zero" else noise
        adapters[part] = (noise / math.sqrt(3 * fan_in[part])).expand(clients, *noise.shape).clone()
    return ClientState(adapters)


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.context)


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    parts = {"context": broadcast.context.expand(len(data), -1, -1), **state.adapters}
    trained = local_steps(settings, dict, parts, {}, data, gradients, round_context)
    change = trained.pop("context") - broadcast.context
    return Upload(change, data.weights), ClientState(trained)


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return Server(server.context + uploads.mean("change"))


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    context = broadcast.context.expand(len(state.adapters["down"]), -1, -1)
    return {"context": context, **state.adapters}
