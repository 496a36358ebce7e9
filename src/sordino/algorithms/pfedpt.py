"""pFedPT: a personal frame of learned pixels on every image; the other trained parameters are shared.

Li, Wu, Sun, Shen, Yang, Wu, Visual Prompt Based Personalized Federated Learning, TMLR 2024 (arXiv 2303.08678), section
3. A client adds its frame, which never leaves it, to the border of its images. A round has two parts: first the frame
is trained with the shared model fixed, then the shared model with the frame fixed. The shared model is averaged. In the
paper it is a whole network. Here both towers are frozen and the text context is shared, as in PromptFL.

As in the authors' code, the frame is added (not pasted) to normalized pixels. It starts at standard normal numbers that
are the same for all clients, and is 2 of 32 pixels wide (1/16 of a side). It trains by SGD of momentum 0.5, whose state
a client keeps, for as many steps as the shared part. The rate of 1 is its script's (its command line's default is 20).
(Pixels are normalized there by a deviation of 0.5, CLIP's by about half of it, the bundled encoder's by 0.5.)

Choices where the paper is silent, as its model has no text. The context's optimizer is PromptFL's, afresh each round. A
round's `local_steps` are divided between the parts, so that a method with two parts does not take more gradients. With
a single step only the context trains, and a run says so.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.descent import descend, first_steps, untrained
from sordino.algorithms.settings.pfedpt import Settings
from sordino.encoders.base import Capability, ClassTokens, DualEncoder
from sordino.encoders.cache import Kind
from sordino.encoders.prompt_model import Prompt, named_parts
from sordino.privacy.gradients import Gradients
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import initial_context
from sordino.prompts.visual import ImageSideModel

ABOUT = MethodInfo(
    paper="Li et al., pFedPT, TMLR 2024 (arXiv 2303.08678)",
    personal="a frame of pixels, added to every image",
    shared="a context",
    privacy="images and frames stay; no guarantee on what the context tells about them",
    needs="text tower, pixel gradients",
    discloses=(
        Disclosure("each client's change of the context, to the server every round", "upload"),
        Disclosure("the averaged context, to all", "mean"),
        Disclosure("each client's frame, where its prompt is published", "prompt"),
    ),
    server_uses="mean",
)


@dataclass(frozen=True)
class Model(ImageSideModel):
    """CoOp's model on images with a frame.

    Attributes: frame_width: as in `Settings`.
    """

    frame_width: float = 1 / 16

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        encoder.require(Capability.PIXEL_GRADIENTS, "pfedpt")
        return cls(encoder, classes, settings.frame_width)

    @property
    def reads(self) -> Kind:
        return "pixels"

    def class_features(self, prompt: Prompt) -> Tensor:
        return self.text_features(named_parts(prompt)["context"])

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        frame = named_parts(prompt)["frame"].to(images)  # [P, 3, n]
        places = frame_places(images.shape[-2:], self.frame_width).to(images.device)
        blank = images.new_zeros(len(frame), 3, images.shape[-2] * images.shape[-1])
        border = blank.index_copy(2, places, frame)
        framed = images + border.view(-1, 1, *images.shape[2:])  # [P, B, 3, H, W]
        image_features = self.encoder.image_features(framed.flatten(0, 1)).view(*images.shape[:2], -1)
        return self.logits(features, image_features)

    def flops(self, prompt: Prompt, images: int) -> float:
        return self.encoder.text_flops(1, named_parts(prompt)["context"].shape[-2], self.classes)


def frame_places(size: tuple[int, ...], width: float) -> Tensor:
    """Return the numbers [n] of the frame's pixels in an image of H x W, row after row.

    The frame has at least one row of pixels at each edge.
    """
    height, breadth = size
    edge = max(1, round(width * min(size)))
    inside = torch.zeros(height, breadth, dtype=torch.bool)
    inside[edge : height - edge, edge : breadth - edge] = True
    return (~inside).flatten().nonzero().flatten()


@dataclass(frozen=True)
class Server(base.Server):
    context: Tensor  # [M, E]


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    context: Tensor  # [M, E]


@dataclass(frozen=True)
class ClientState(base.ClientState):
    frame: Tensor  # [K, 3, n], the numbers added to the border pixels
    optimizer: dict[str, Tensor]  # of the frame, each [K, ...]


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, M, E], of the context by the local steps
    weight: Tensor  # [K], its weight in the average


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def unused(settings: Settings, rounds: int, poisson: bool) -> list[str]:
    """Return in words that the frame is never trained, if it is not."""
    return untrained(settings.local_steps, settings.frame_share, "settings.pfedpt", "frame_share", "the frame is")


def server_init(settings: Settings, init: InitContext) -> Server:
    noise = init.streams.common_normal("context", settings.context_length, init.context_width)
    return Server(initial_context(settings.initial_context, init.embed, noise))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    places = frame_places(data.features.shape[-2:], settings.frame_width)
    noise = settings.frame_deviation * init.streams.common_normal("frame", 3, len(places))
    frame = noise.expand(len(init.streams.clients), -1, -1).clone()
    return ClientState(frame, settings.frame_optimizer.initial_state(frame))


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
    context = {"context": broadcast.context.expand(len(data), -1, -1)}
    batches = data.batches(settings.local_steps, settings.batch_size or None, round_context.streams)
    first_part = islice(batches, first_steps(settings.local_steps, settings.frame_share))
    frame, kept = descend(
        settings.frame_optimizer,
        {"frame": state.optimizer},
        dict,
        {"frame": state.frame},
        context,
        first_part,
        gradients,
        round_context,
    )
    trained, _ = descend(settings.optimizer, None, dict, context, frame, batches, gradients, round_context)
    change = trained["context"] - broadcast.context
    return Upload(change, data.weights), ClientState(frame["frame"], kept["frame"])


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return Server(server.context + uploads.mean("change"))


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {"context": broadcast.context.expand(len(state.frame), -1, -1), "frame": state.frame}
