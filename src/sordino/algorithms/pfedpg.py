"""pFedPG: the server generates each client's visual prompt, and learns the generator from the clients' changes of it.

Yang, Wang, Wang, Efficient Model Personalization in Federated Learning via Client-Specific Prompt Generation, ICCV 2023
(arXiv 2308.15367), section 3.2 and algorithm 1. The server holds prompts P_base that know no client, a descriptor d_n
of each client n, and a generator by cross-attention, in which the descriptor queries P_base:

    P_n = P_base + softmax((d_n W_Q)(P_base W_K)^T / sqrt(l)) (P_base W_V) W_O

A client is sent P_n alone and sets it as tokens behind the class token at the first layer (VPT-shallow). It trains P_n
on its images, keeps it, and sends the change. The server uses minus the change as the loss's gradient by P_n. It
updates P_base, the W and the participants' descriptors by the vector-Jacobian product with it, summed over clients.

As published: 10 prompts, SGD of rate 0.25 and weight decay 0.001 on batches of 64 at the clients, rate 0.001 at the
server. A client's head, in the paper a personal linear layer, is here the frozen class features of a hand-written
prompt. There is no official code, and of three others' two add P_base, as here. The paper takes plus the change for the
gradient; with that sign the server would climb.

Choices where the paper is silent. A descriptor is one vector, so that attention adds the same to all of P_base; it may
be one for each prompt (`descriptor_length`). There is one head of width 64. The server's optimizer is Adam, as SGD
would hardly move at that rate, and descriptors of absent clients rest. Prompts and descriptors start at random numbers
of deviation 1 / sqrt(W), VPT's in a ViT-B/16, and the W as those of linear layers. A client is evaluated with the
prompt that it trained last, or with its first generated one. The server sees each client's change by itself: no average
hides it.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import (
    ClientData,
    InitContext,
    MethodInfo,
    PersonalBroadcast,
    RoundContext,
    Schedule,
    Uploads,
)
from sordino.algorithms.descent import local_steps
from sordino.algorithms.settings.pfedpg import Settings
from sordino.encoders.base import Capability, ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, named_parts
from sordino.privacy.gradients import Gradients, Parameters
from sordino.privacy.ledger import Disclosure
from sordino.prompts.visual import HandWrittenHeadModel, token_deviation

ABOUT = MethodInfo(
    paper="Yang et al., pFedPG, ICCV 2023 (arXiv 2308.15367)",
    personal="visual prompt tokens, which the server generates for it alone",
    shared="through the server's generator, what makes a good prompt",
    privacy="images stay; the server sees every client's change of its own prompt",
    needs="a vision transformer",
    discloses=(
        Disclosure("each client's change of its own prompt, to the server every round", "upload"),
        Disclosure("to each client a prompt that was learned from all clients' changes", "mean"),
        Disclosure("each client's prompt, where it is published", "prompt"),
    ),
    server_uses="each",
)


@dataclass(frozen=True)
class Model(HandWrittenHeadModel):
    """Prompt tokens [P, n, W] at the first layer; the head is the hand-written prompt's."""

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        encoder.require(Capability.VISUAL_PROMPTS, "pfedpg")
        return cls(encoder, classes, settings.hand_written)

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        tower, tokens = self.encoder.image_tower, named_parts(prompt)["tokens"]
        outputs = tower.forward(images, 0, self.encoder.image_layers, {0: tokens})
        return self.logits(features, tower.features(outputs))

    def flops(self, prompt: Prompt, images: int) -> float:
        return self.encoder.image_tower.flops(images, 0, named_parts(prompt)["tokens"].shape[-2])


@dataclass(frozen=True)
class Server(base.Server):
    """The generator, of prompts of n tokens of width W for N clients."""

    shared: dict[str, Tensor]  # base [n, W]; query, key, value [W, l]; output [l, W]
    descriptors: Tensor  # [N, d, W]
    optimizer: dict[str, Tensor]  # of `shared`, "name/state", each [1, ...]
    descriptor_optimizer: dict[str, Tensor]  # each [N, ...]


@dataclass(frozen=True)
class Broadcast(PersonalBroadcast):
    tokens: Tensor  # [K, n, W], each client's generated prompt


@dataclass(frozen=True)
class ClientState(base.ClientState):
    tokens: Tensor  # [K, n, W], each client's prompt as it last trained it


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, n, W], of each client's prompt by its local steps


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    draw, width, inner = init.streams.common_normal, init.image_width, settings.attention_width
    shared = {"base": token_deviation(width) * draw("base prompts", settings.prompt_length, width)}
    for name in ("query", "key", "value"):
        shared[name] = draw(f"generator {name}", width, inner) / math.sqrt(3 * width)
    shared["output"] = draw("generator output", inner, width) / math.sqrt(3 * inner)
    descriptors = token_deviation(width) * init.streams.normal("descriptors", settings.descriptor_length, width)
    fresh = settings.server_optimizer.initial_state
    optimizer = {f"{name}/{key}": value for name in shared for key, value in fresh(shared[name][None]).items()}
    return Server(shared, descriptors, optimizer, fresh(descriptors))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    return ClientState(broadcast(server_init(settings, init)).tokens)


def generate(shared: Parameters, descriptors: Tensor) -> Tensor:
    """Return the prompts [N, n, W] of clients with these descriptors [N, d, W]."""
    base_prompts = shared["base"]  # [n, W]
    query = descriptors @ shared["query"]
    key, value = base_prompts @ shared["key"], base_prompts @ shared["value"]
    attention = (query @ key.mT / math.sqrt(key.shape[-1])).softmax(dim=-1)  # [N, d, n]
    return base_prompts + attention @ value @ shared["output"]


def broadcast(server: Server) -> Broadcast:
    return Broadcast(generate(server.shared, server.descriptors))


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    parameters = {"tokens": broadcast.tokens}
    trained = local_steps(settings, dict, parameters, {}, data, gradients, round_context)["tokens"]
    return Upload(trained - broadcast.tokens), ClientState(trained)


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    clients = torch.as_tensor(round_context.streams.clients, device=server.descriptors.device)
    participants = server.descriptors[clients]
    gradients = generator_gradients(server.shared, participants, uploads.each.change)
    optimizer, rate = settings.server_optimizer, settings.server_optimizer.rate(round_context)
    shared, states = {}, {}
    for name, value in server.shared.items():
        prefix = f"{name}/"
        old = {key.removeprefix(prefix): s for key, s in server.optimizer.items() if key.startswith(prefix)}
        stepped, new = optimizer.step(value[None], gradients[name][None], old, rate)
        shared[name] = stepped[0]
        states.update({f"{name}/{key}": s for key, s in new.items()})
    # The participants' descriptors step; those of absent clients and their optimizers' states rest.
    old = {key: s[clients.to(s.device)] for key, s in server.descriptor_optimizer.items()}
    stepped, new = optimizer.step(participants, gradients["descriptors"], old, rate)
    descriptors = server.descriptors.index_copy(0, clients, stepped)
    descriptor_states = {
        key: s.index_copy(0, clients.to(s.device), new[key].to(s)) for key, s in server.descriptor_optimizer.items()
    }
    return Server(shared, descriptors, states, descriptor_states)


def generator_gradients(shared: Parameters, descriptors: Tensor, change: Tensor) -> dict[str, Tensor]:
    """Return the product of minus K prompts' changes [K, n, W] with their Jacobian by all inputs of the generator.

    Args:
        shared: the generator and the base prompts.
        descriptors: [K, d, W], of the clients whose changes these are.

    Returns:
        One gradient for each of `shared`, and for "descriptors".
    """
    inputs = {**shared, "descriptors": descriptors}
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    with torch.enable_grad():
        prompts = generate(leaves, leaves["descriptors"])
    gradients = torch.autograd.grad(prompts, list(leaves.values()), -change)
    return dict(zip(leaves, gradients, strict=True))


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {"tokens": state.tokens}
