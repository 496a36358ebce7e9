"""ProGrad: the gradient loses its component against general knowledge, where the two disagree.

Zhu, Niu, Han, Wu, Zhang, Prompt-aligned Gradient for Prompt Tuning, ICCV 2023 (arXiv 2205.14865), section 3.2, here
with federated averaging as in PromptFL. A step has two gradients by the context: g_d of the cross-entropy, and g_g of
the Kullback-Leibler divergence from the predictions of the hand-written prompt to those of the learned one, at
temperature T. Where their product is negative, the step goes along

    g_d - lambda (g_d . g_g / |g_g|^2) g_g,

which for lambda = 1 is orthogonal to g_g; elsewhere along g_d, as PromptFL. The length of g_g does not matter.

Privacy. g_g reads the images and their zero-shot predictions, so it must be as private as g_d. Both are of one batch,
as published, and are asked for as one gradient by two copies of the context. A mechanism then clips an example's pair
(g_d, g_g) as one vector and noises it once: one release, which the accounting counts as it counts PromptFL's. The
projection afterwards is post-processing. The cotangent mechanism releases the derivative of one cross-entropy, and is
refused.

Authors' defaults: lambda = 1, T = 1. The projection is each client's, before averaging. Choice where the code has one
hand-written prompt for each data set: here is one for all. The logged loss is the cross-entropy.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sordino.algorithms import promptfl
from sordino.algorithms.base import ClientData, MethodInfo, RoundContext
from sordino.algorithms.general_knowledge import GeneralKnowledgeModel
from sordino.algorithms.promptfl import (
    Broadcast,
    ClientState,
    Server,
    Upload,
    broadcast,
    client_init,
    prompt,
    schedule,
    server_init,
    server_round,
)
from sordino.algorithms.settings.prograd import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, cross_entropies, named_parts
from sordino.privacy.gradients import Gradients

__all__ = [
    "Broadcast",
    "ClientState",
    "Server",
    "Upload",
    "broadcast",
    "client_init",
    "prompt",
    "schedule",
    "server_init",
    "server_round",
]

ABOUT: MethodInfo = replace(promptfl.ABOUT, paper="Zhu et al., ProGrad, ICCV 2023 (arXiv 2205.14865)")


@dataclass(frozen=True)
class Model(GeneralKnowledgeModel):
    """CoOp's model; a prompt with a second context also has the divergence from the hand-written prompt as its loss.

    Attributes: temperature: as in `Settings`.
    """

    temperature: float = 1.0
    linear: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.hand_written, settings.temperature)

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return features [P, 1, C, D], or with the second context [P, 2, C, D], its features second."""
        parts = named_parts(prompt)
        return self.text_features(torch.stack([parts[name] for name in ("context", "general") if name in parts], dim=1))

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        return self.logits(features[:, 0], images)

    def losses(self, features: Tensor, prompt: Prompt, images: Tensor, labels: Tensor) -> Tensor:
        entropies = cross_entropies(self.scores(features, prompt, images), labels)
        if features.shape[1] == 1:
            return entropies
        general = (self.logits(self._general.to(images), images) / self.temperature).softmax(-1)
        learned = (self.logits(features[:, 1], images) / self.temperature).log_softmax(-1)
        divergence = -(self.temperature**2) * (general * learned).sum(-1)  # up to the entropy of `general`, a constant
        return entropies + divergence - divergence.detach()  # its gradient is wanted, its value is not

    def flops(self, prompt: Prompt, images: int) -> float:
        parts = named_parts(prompt)
        return len(parts) * self.encoder.text_flops(1, parts["context"].shape[-2], self.classes)


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    optimizer, rate = settings.optimizer, settings.optimizer.rate(round_context)
    context = broadcast.context.expand(len(data), -1, -1)  # [K, M, E]
    kept = optimizer.initial_state(context)
    for batch in data.batches(settings.local_steps, settings.batch_size or None, round_context.streams):
        both = gradients(dict, {"context": context, "general": context}, {}, batch).values
        direction = aligned(both["context"], both["general"], settings.alignment)
        context, kept = optimizer.step(context, direction, kept, rate)
    return Upload(context - broadcast.context, data.weights), state


def aligned(gradient: Tensor, general: Tensor, strength: float) -> Tensor:
    """Return gradients [K, ...] without `strength` times their component along `general`, where that is negative."""
    own, other = gradient.flatten(1), general.flatten(1)
    squared = other.square().sum(1).clamp(min=torch.finfo(other.dtype).tiny)
    along = ((own * other).sum(1) / squared).clamp(max=0)
    return gradient - strength * along.view(-1, *[1] * (gradient.ndim - 1)) * general
