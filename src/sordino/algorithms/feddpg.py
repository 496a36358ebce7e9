"""FedDPG: a generator makes the prompt from the input; clients train it, and the server averages it.

FedDPG: An Adaptive Yet Efficient Prompt-tuning Approach in Federated Learning Settings, 2025 (arXiv 2507.19534). A
generator of two layers, with 10 hidden units between, maps the mean embedding of a text's words to the n vectors that
stand before it. It is trained by gradients and averaged as in federated averaging.

What differs. The input is an image, and its feature stands for the mean embedding. So every image has a prompt of its
own, and the names of all classes pass the text tower behind it: a step costs as many passes as there are examples in
the batch. The paper also trains a head; here the class features are one. The last layer's weights start at zero and its
bias at CoOp's context, so the first prompt is the same for all images: with no more than this bias the method is
PromptFL. The paper starts both layers at torch's random numbers, which suit embeddings of width and size of RoBERTa's.
The defaults are its code's: AdamW, and three epochs, which are three steps where a batch of 256 has all of a client's
examples. Its rate falls to zero in each round; here the schedule is over rounds.

The generator's gradient has noise like any other: `dp-sgd` clips each example's by all parameters together. `cotangent`
does not apply, as class features depend on the image.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.descent import local_steps
from sordino.algorithms.settings.feddpg import Settings
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.privacy.gradients import Gradients
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import initial_context

ABOUT = MethodInfo(
    paper="FedDPG, 2025 (arXiv 2507.19534)",
    personal="nothing",
    shared="a generator that makes a prompt of each image",
    privacy="images stay; no guarantee on what the generator tells about them",
    needs="text tower, image features",
    discloses=(
        Disclosure("each client's change of the generator, to the server every round", "upload"),
        Disclosure("the averaged generator, to all", "mean"),
    ),
    server_uses="mean",
)

LENGTH = 16  # of a context, by which work is divided into pieces


@dataclass(frozen=True)
class Model(PromptModel):
    """Each image meets the class features of its own context.

    A prompt is a generator: "input" [P, D, h], "input_bias" [P, h], "output" [P, h, n, E], "output_bias" [P, n, E].
    """

    linear: ClassVar[bool] = False
    conditions_on_images: ClassVar[bool] = True

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return [P, 0]: no class feature is the same for all images."""
        bias = named_parts(prompt)["output_bias"]
        return bias.new_zeros(len(bias), 0)

    def contexts(self, prompt: Prompt, images: Tensor) -> Tensor:
        """Return the contexts [P, B, n, E] of images [P, B, D]."""
        parts = named_parts(prompt)
        hidden = (images.to(parts["input"]) @ parts["input"] + parts["input_bias"][:, None]).relu()  # [P, B, h]
        generated: Tensor = torch.einsum("pbh,phne->pbne", hidden, parts["output"])
        return parts["output_bias"][:, None] + generated

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        contexts = self.contexts(prompt, images)

        def logits(context: Tensor, image: Tensor) -> Tensor:  # [P, b, n, E], [P, b, D]
            text = self.text_features(context)  # [P, b, C, D]
            return (self.encoder.logit_scale * image[..., None, :] @ text.mT)[..., 0, :]

        pieces = zip(
            contexts.split(self.images_at_once(len(contexts)), dim=1),
            images.split(self.images_at_once(len(contexts)), dim=1),
            strict=True,
        )
        # Backward computes each piece again, so that a whole batch's passes are never in memory together.
        return torch.cat([checkpoint(logits, *piece, use_reentrant=False) for piece in pieces], dim=1)

    def images_at_once(self, prompts: int) -> int:
        # A context's length is not known here; a longer one only has larger pieces.
        return max(1, math.floor(self._budget / (prompts * self.encoder.text_flops(1, LENGTH, self.classes))))

    def flops(self, prompt: Prompt, images: int) -> float:
        return images * self.encoder.text_flops(1, named_parts(prompt)["output_bias"].shape[-2], self.classes)


@dataclass(frozen=True)
class Server(base.Server):
    generator: dict[str, Tensor]  # input [D, h], input_bias [h], output [h, n, E], output_bias [n, E]


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    generator: dict[str, Tensor]  # likewise


@dataclass(frozen=True)
class ClientState(base.ClientState):
    """A client keeps no state."""


@dataclass(frozen=True)
class Upload(base.Upload):
    generator: dict[str, Tensor]  # its change by the local steps, each [K, ...]
    weight: Tensor  # [K], its weight in the average


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    draw, hidden, length = init.streams.common_normal, settings.hidden_width, settings.context_length

    def linear(name: str, *shape: int) -> Tensor:
        """Return uniform numbers of the size that torch's linear layers start with."""
        return torch.erf(draw(name, *shape) / math.sqrt(2)) / math.sqrt(init.feature_width)

    context = initial_context(settings.initial_context, init.embed, draw("context", length, init.context_width))
    generator = {
        "input": linear("input layer", init.feature_width, hidden),
        "input_bias": linear("input bias", hidden),
        "output": context.new_zeros(hidden, length, init.context_width),
        "output_bias": context,
    }
    return Server(generator)


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    return ClientState()


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.generator)


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    start: Mapping[str, Tensor] = {
        name: value.expand(len(data), *value.shape) for name, value in broadcast.generator.items()
    }
    trained = local_steps(settings, dict, start, {}, data, gradients, round_context)
    return Upload({name: trained[name] - start[name] for name in start}, data.weights), state


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return Server({name: value + uploads.mean(f"generator.{name}") for name, value in server.generator.items()})


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {name: value[None] for name, value in broadcast.generator.items()}
