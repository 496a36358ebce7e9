"""CoCoOp: a context that every image shifts by a token, which a small network makes of the image's feature.

Zhou, Yang, Loy, Liu, Conditional Prompt Learning for Vision-Language Models, CVPR 2022 (arXiv 2203.05557), section
3.2, here with federated averaging of all of it. For an image with feature x the context is that of CoOp plus

    W_2 relu(W_1 x + b_1) + b_2

in each of its M vectors; W_1 has D / 16 outputs. So class features are another for each image, and every image of a
batch passes all C sentences through the text tower. With a network of zeros the method is PromptFL.

The cotangent mechanism needs class features that do not depend on the image, and is refused. Under DP-SGD an example's
contribution is its own loss's gradient, as everywhere. The mechanism on statistics draws image features, which is all
that the network reads.

Authors' defaults: M = 4, a sixteenth. Choices for federated training: batches of 32, as in PromptFL, while the authors
take single images to save memory; the context starts at random, as that of all methods here, and not at "a photo of a"
(`initial_context` starts it there); initial weights are normal with the variance of torch's own.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sordino.algorithms.averaged import (
    Broadcast,
    ClientState,
    Server,
    Upload,
    broadcast,
    client_init,
    client_round,
    disclosures,
    prompt,
    schedule,
    server_round,
)
from sordino.algorithms.base import InitContext, MethodInfo
from sordino.algorithms.layers import linear, linear_weight
from sordino.algorithms.settings.cocoop import Settings
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.prompts.contexts import initial_context

__all__ = [
    "Broadcast",
    "ClientState",
    "Server",
    "Upload",
    "broadcast",
    "client_init",
    "client_round",
    "prompt",
    "schedule",
    "server_round",
]

ABOUT = MethodInfo(
    paper="Zhou et al., CoCoOp, CVPR 2022 (arXiv 2203.05557)",
    personal="nothing",
    shared="a context, and a network that makes a token of an image's feature",
    privacy="images stay; no guarantee on what context and network tell about them",
    needs="text tower, image features",
    discloses=disclosures("the context and the network"),
    server_uses="mean",
)


@dataclass(frozen=True)
class Model(PromptModel):
    """Prompts with "context" [P, M, E], and a network from D to R to E: "down" [P, R, D], "up" [P, E, R], biases."""

    linear: ClassVar[bool] = False
    conditions_on_images: ClassVar[bool] = True

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return the contexts [P, M, E]: without an image there is no class feature yet."""
        return named_parts(prompt)["context"]

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        parts = named_parts(prompt)
        inner = linear(images.to(features), parts, "down").relu()  # [P, B, R]
        token = linear(inner, parts, "up")  # [P, B, E]
        contexts = features[:, None] + token[:, :, None]  # [P, B, M, E]
        flat = contexts.flatten(0, 1)
        at_once = max(1, math.floor(self._budget / self.flops(prompt, 1)))
        if len(flat) <= at_once:
            classes = self.text_features(flat)
        else:  # a backward pass computes each part again, so that only one part is kept at a time
            pieces = [checkpoint(self.text_features, piece, use_reentrant=False) for piece in flat.split(at_once)]
            classes = torch.cat(pieces)
        classes = classes.unflatten(0, contexts.shape[:2])  # [P, B, C, D]
        cosines: Tensor = (classes @ images[..., None].to(classes)).squeeze(-1)
        return self.encoder.logit_scale * cosines

    def flops(self, prompt: Prompt, images: int) -> float:
        one = self.encoder.text_flops(1, named_parts(prompt)["context"].shape[-2], self.classes)
        return max(1, images) * one

    def images_at_once(self, prompts: int) -> int:
        longest = self.classes.mask.shape[1]
        one = self.encoder.text_flops(1, longest, self.classes)  # of about this length
        return max(1, math.floor(self._budget / (one * prompts)))


def server_init(settings: Settings, init: InitContext) -> Server:
    width, features = init.context_width, init.feature_width
    inner = max(1, features // settings.reduction)
    noise = init.streams.common_normal("context", settings.context_length, width)
    context = initial_context(settings.initial_context, init.embed, noise)
    return Server(
        {
            "context": context,
            "down": linear_weight(init, "down", inner, features).to(context),
            "down_bias": torch.zeros(inner).to(context),
            "up": linear_weight(init, "up", width, inner).to(context),
            "up_bias": torch.zeros(width).to(context),
        }
    )
