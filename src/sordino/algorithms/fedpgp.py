"""FedPGP: a shared context plus a personal one of low rank, with a loss that draws the shared one to general knowledge.

Cui, Li, Wang, Shi, Harmonizing Generalization and Personalization in Federated Prompt Learning, ICML 2024 (arXiv
2405.09771), section 4. Client i uses p_G + U_i V_i with U_i [M, b] and V_i [b, E]. For every class, let z_G be the
feature of the shared context, z_C that of the hand-written prompt, and z_i that of the client's own context. A
contrastive loss draws z_G to z_C and away from z_i: minus the logarithm of exp(cos(z_G, z_C) / t) over itself plus
exp(cos(z_G, z_i) / t), averaged over classes and weighed with mu. All three parts are trained at once; p_G is averaged,
U_i and V_i stay.

Defaults are the authors' code's: M = 16, b = 4, t = 0.5, mu = 1, SGD of rate 0.001, all parts random with deviation
0.02, U and V alike for all clients at first. Its optimizer has momentum 0.9 and weight decay 0.0005 (of Dassl) beside
that rate; here it has neither. Choices where the paper is silent, or the code differs from it. The hand-written prompt
is "a photo of a", as in the paper (the code takes a sentence of placeholders). Clients' optimizers start afresh each
round. The contrastive term depends on no image, so mechanisms add no noise to it.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.descent import local_steps
from sordino.algorithms.general_knowledge import GeneralKnowledgeModel
from sordino.algorithms.settings.fedpgp import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt
from sordino.privacy.gradients import Gradients, Parameters
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import RANDOM_STANDARD_DEVIATION, initial_context

ABOUT = MethodInfo(
    paper="Cui et al., FedPGP, ICML 2024 (arXiv 2405.09771)",
    personal="the low-rank factors of a change of the context",
    shared="a context",
    privacy="images stay; no guarantee on what the shared context tells about them",
    needs="text tower",
    discloses=(
        Disclosure("each client's change of the shared context, to the server every round", "upload"),
        Disclosure("the shared context, to all", "mean"),
        Disclosure("each client's prompt, where it is published", "prompt"),
    ),
    server_uses="mean",
)


@dataclass(frozen=True)
class Model(GeneralKnowledgeModel):
    """CoOp's model; a prompt that has the shared context beside its own also has the contrastive loss.

    Attributes: contrast, temperature: as in `Settings`.
    """

    contrast: float = 1.0
    temperature: float = 0.5

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.hand_written, settings.contrast, settings.temperature)

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return features [P, 1, C, D], or with the shared context [P, 2, C, D], its features second."""
        return self.text_features(_contexts(prompt))

    def linear_part(self, features: Tensor) -> Tensor:
        return features[:, 0]

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        return self.logits(self.linear_part(features), images)

    def penalty(self, features: Tensor) -> Tensor | None:
        if features.shape[1] == 1:
            return None
        personal, shared = features.unbind(1)  # [P, C, D]
        near = (shared * self._general.to(shared)).sum(-1) / self.temperature
        away = (shared * personal).sum(-1) / self.temperature
        return self.contrast * F.softplus(away - near).mean(-1)

    def flops(self, prompt: Prompt, images: int) -> float:
        contexts = _contexts(prompt)
        return contexts.shape[1] * self.encoder.text_flops(1, contexts.shape[2], self.classes)


def _contexts(prompt: Prompt) -> Tensor:
    """Return contexts [P, 1, M, E], or [P, 2, M, E] with the shared one."""
    if isinstance(prompt, Tensor):
        return prompt[:, None]
    return torch.stack([prompt["context"], prompt["shared"]], dim=1)


@dataclass(frozen=True)
class Server(base.Server):
    context: Tensor  # [M, E], p_G


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    context: Tensor  # [M, E], p_G


@dataclass(frozen=True)
class ClientState(base.ClientState):
    u: Tensor  # [K, M, b]
    v: Tensor  # [K, b, E]


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, M, E], of p_G by the local steps
    weight: Tensor  # [K], its weight in the average


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    noise = init.streams.common_normal("context", settings.context_length, init.context_width)
    return Server(initial_context(settings.initial_context, init.embed, noise))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    clients, rank = len(init.streams.clients), settings.rank
    u = init.streams.common_normal("personal u", settings.context_length, rank)
    v = init.streams.common_normal("personal v", rank, init.context_width)
    stacks = ((RANDOM_STANDARD_DEVIATION * part).expand(clients, -1, -1).clone() for part in (u, v))
    return ClientState(*stacks)


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
    def prompt_of(p: Parameters) -> Prompt:
        context = p["shared"] + p["u"] @ p["v"]
        return {"context": context, "shared": p["shared"]} if settings.contrast else context

    parts = {"shared": broadcast.context.expand(len(data), -1, -1), "u": state.u, "v": state.v}
    trained = local_steps(settings, prompt_of, parts, {}, data, gradients, round_context)
    return Upload(trained["shared"] - broadcast.context, data.weights), ClientState(trained["u"], trained["v"])


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return Server(server.context + uploads.mean("change"))


def prompt(broadcast: Broadcast, state: ClientState) -> Tensor:
    return broadcast.context + state.u @ state.v
