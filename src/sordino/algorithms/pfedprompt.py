"""pFedPrompt: a shared context, and for each client a memory of its own images that it attends to.

Guo, Guo, Wang, pFedPrompt: Learning Personalized Prompt for Vision-Language Models in Federated Learning, WWW 2023.
*Global user consensus*: one context learned by federated averaging, as in PromptFL. *Local feature attention*: a
client's few-shot image features F are keys and their labels L values, without any parameter to learn. An image x
attends to them, and the result is added to the logits with weight alpha:

    cos(x, f) / tau + alpha exp(-beta (1 - x F^T)) L

There is no public code. The form of the attention is that of Tip-Adapter (Zhang et al., ECCV 2022), with its alpha and
beta. Choices where the paper is silent. The attention is used for prediction only: a training image would find itself
in the memory and leave nothing to learn for the context. A memory of more than `shots` images of a class keeps the
first that the client holds. The memory contains bare image features: no mechanism covers it, and everybody who is given
the prompt is given the memory too.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from sordino.algorithms import base, promptfl
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, Schedule
from sordino.algorithms.promptfl import Broadcast, Server, Upload, broadcast, client_round, server_init, server_round
from sordino.algorithms.settings.pfedprompt import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.privacy.ledger import Disclosure
from sordino.prompts.by_class import class_numbers

__all__ = ["Broadcast", "Server", "Upload", "broadcast", "client_round", "server_init", "server_round"]

ABOUT: MethodInfo = replace(
    promptfl.ABOUT,
    paper="Guo et al., pFedPrompt, WWW 2023",
    personal="the features of its own images, which predictions attend to",
    needs="text tower, image features",
    discloses=(
        *promptfl.ABOUT.discloses,
        Disclosure("each client's memory of image features, where its prompt is published", "memory"),
    ),
)


@dataclass(frozen=True)
class Model(PromptModel):
    """CoOp's model; a prompt that comes with a memory attends to it.

    Attributes: attention, sharpness: as in `Settings`.
    """

    attention: float = 1.0
    sharpness: float = 5.5

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.attention, settings.sharpness)

    def class_features(self, prompt: Prompt) -> Tensor:
        return self.text_features(named_parts(prompt)["context"])

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        logits = self.logits(features, images)
        parts = named_parts(prompt)
        if "keys" not in parts:
            return logits
        near = torch.exp(self.sharpness * (images @ parts["keys"].mT - 1))  # [P, B, n]
        # By name, so that a memory adds nothing to candidates without an image in it.
        candidates = class_numbers(self.classes.names, near.device)
        values = parts["labels"][..., None] == candidates  # [P, n, C], L
        return logits + self.attention * near @ values.to(near)

    def flops(self, prompt: Prompt, images: int) -> float:
        return self.encoder.text_flops(1, named_parts(prompt)["context"].shape[-2], self.classes)


@dataclass(frozen=True)
class ClientState(base.ClientState):
    keys: Tensor  # [K, n, D], features of the client's images
    labels: Tensor  # [K, n], their `class_number`; 0 for padding


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    held = torch.arange(data.rows.shape[1], device=data.rows.device) < data.counts[:, None]
    finite = data.features.isfinite().all(-1)  # a key that is not finite would spoil every prediction
    usable = held & finite[data.rows] & data.shown(data.rows)
    labels = torch.where(usable, data.labels[data.rows], -1)
    same_class = labels[:, :, None] == labels[:, None, :]
    earlier = same_class.tril(diagonal=-1).sum(-1)  # [K, n], number of the class's images that come before
    kept = (labels >= 0) & (earlier < settings.shots)
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
    rows, real = data.rows.gather(1, order), kept.gather(1, order)
    numbers = class_numbers(init.class_names, labels.device)
    keys = torch.where(real[..., None], data.features[rows], 0.0)
    return ClientState(keys, torch.where(real, numbers[data.labels[rows]], 0))


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    context = broadcast.context.expand(len(state.keys), -1, -1)
    return {"context": context, "keys": state.keys, "labels": state.labels}
