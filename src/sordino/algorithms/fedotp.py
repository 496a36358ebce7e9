"""FedOTP: a shared and a personal context; optimal transport matches them with patches of the image.

Li, Huang, Wang, Shi, Global and Local Prompts Cooperation via Optimal Transport for Federated Learning, CVPR 2024
(arXiv 2403.00041), sections 3.2 to 3.4. An image is its V patch features; a class is the two features that the shared
and the personal context give its name. A transport plan T [2, V] for each image and class gives each context the mass
gamma / 2 and takes at most 1 / V from a patch. The logit is sum T cos / tau. The plan is a constant when the loss is
differentiated, which the envelope theorem allows. Both contexts are trained at once; the shared one is averaged, the
personal one stays.

As in the authors' code, both contexts start anywhere (two different random vectors), all clients at the same two. Its
few-shot scripts set gamma to 0.8, the entropy's weight to 0.01, at most 100 iterations. Choices where the paper is
silent. Clients' optimizers start afresh each round. Iterations of a pair of image and class end when none of its
potentials moves by more than the tolerance. The code watches the mean change of the scaling over a whole batch. Under
differential privacy that must not be: an image would influence the convergence of other images' plans.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.descent import local_steps
from sordino.algorithms.settings.fedotp import Settings
from sordino.encoders.base import Capability, ClassTokens, DualEncoder
from sordino.encoders.cache import Kind
from sordino.encoders.prompt_model import NUMBERS_AT_ONCE, Prompt, PromptModel, named_parts
from sordino.privacy.gradients import Gradients
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import initial_context
from sordino.prompts.optimal_transport import transport_plan

ABOUT = MethodInfo(
    paper="Li et al., FedOTP, CVPR 2024 (arXiv 2403.00041)",
    personal="a context",
    shared="a context",
    privacy="images stay; no guarantee on what the shared context tells about them",
    needs="text tower, patch features",
    discloses=(
        Disclosure("each client's change of the shared context, to the server every round", "upload"),
        Disclosure("the shared context, to all", "mean"),
        Disclosure("each client's personal context, where it is published", "prompt"),
    ),
    server_uses="mean",
)


@dataclass(frozen=True)
class Model(PromptModel):
    """Contexts [P, N, M, E], N for each client, meet images as V patches.

    Attributes: mass, regularization, iterations, tolerance: as in `Settings`.
    """

    mass: float = 1.0
    regularization: float = 0.1
    iterations: int = 100
    tolerance: float = 0.001
    linear: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        encoder.require(Capability.PATCHES, "fedotp")
        return cls(encoder, classes, settings.mass, settings.regularization, settings.iterations, settings.tolerance)

    @property
    def reads(self) -> Kind:
        return "patch"

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return unit-norm features [P, N, C, D] of every class under each of a client's contexts."""
        return self.text_features(side_by_side(prompt))

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        """Return logits [P, B, C]: the similarity of patches [P, B, V, D] and class features under the best plan."""
        prompts, contexts, classes, width = features.shape
        flat = features.reshape(prompts, 1, contexts * classes, width)
        cosines = (flat @ images.mT).unflatten(2, (contexts, classes)).transpose(2, 3)  # [P, B, C, N, V]
        with torch.no_grad():
            plan = transport_plan(1 - cosines, self.mass, self.regularization, self.iterations, self.tolerance)
        carried: Tensor = (plan * cosines).sum((-2, -1))
        return self.encoder.logit_scale * carried

    def flops(self, prompt: Prompt, images: int) -> float:
        contexts = side_by_side(prompt)
        return contexts.shape[1] * self.encoder.text_flops(1, contexts.shape[2], self.classes)

    def images_at_once(self, prompts: int) -> int:
        # 1200: patches of the images here, times two contexts, times about six tensors of this size in the transport.
        return max(1, NUMBERS_AT_ONCE // (prompts * len(self.classes) * 1200))


def side_by_side(prompt: Prompt) -> Tensor:
    """Return all contexts of each client side by side, [P, N, M, E]."""
    return torch.stack(list(named_parts(prompt).values()), dim=1)


@dataclass(frozen=True)
class Server(base.Server):
    context: Tensor  # [M, E], the shared context


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    context: Tensor  # [M, E]


@dataclass(frozen=True)
class ClientState(base.ClientState):
    context: Tensor  # [K, M, E], the personal contexts


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, M, E], of the shared context by the local steps
    weight: Tensor  # [K], its weight in the average


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    noise = init.streams.common_normal("context", settings.context_length, init.context_width)
    return Server(initial_context(settings.initial_context, init.embed, noise))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    noise = init.streams.common_normal("personal context", settings.context_length, init.context_width)
    context = initial_context(settings.initial_context, init.embed, noise)
    return ClientState(context.expand(len(init.streams.clients), -1, -1).clone())


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
    contexts = {"shared": broadcast.context.expand(len(data), -1, -1), "personal": state.context}
    trained = local_steps(settings, dict, contexts, {}, data, gradients, round_context)
    return Upload(trained["shared"] - broadcast.context, data.weights), ClientState(trained["personal"])


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return Server(server.context + uploads.mean("change"))


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {"shared": broadcast.context.expand_as(state.context), "personal": state.context}
