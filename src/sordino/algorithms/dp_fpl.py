"""DP-FPL: a shared prompt plus a personal one that is learned through low-rank factors and a residual.

Tran, Sun, Patterson, Milanova, Privacy-Preserving Personalized Federated Prompt Learning for Multimodal Large Language
Models, ICLR 2025 (arXiv 2501.13904), section 4 and algorithm 1. Every step splits the personal prompt at rank k,
p_L = U V + R, takes gradients at the prompt p_G + U V + R with respect to p_G, U and V, and sets
p_L <- (U - lr gU)(V - lr gV) + R. Clients send the gradient of p_G; the server averages it and steps.

Ablations, as in the paper's section 5: `dplora` drops the residual, `full` learns p_L without factors.

Choices where the paper is silent. Every client's p_L starts at the same random context, as in the authors' code. (If
clients started at contexts of their own, the shared prompt would learn to recognize them by these, and fit no other
client's classes.) The power iteration is orthonormalized by QR. V has the lengths of the prompt along U, as in the
paper; in the authors' code its rows have unit length, and the residual the rest. A client that takes several steps a
round holds p_G fixed and sends the mean gradient. The server's optimizer is a setting, SGD by default. The factors take
plain gradient steps: they are drawn anew each step, so an optimizer's memory would not apply to them. Clients weigh by
their numbers of examples by default. In the authors' code they weigh alike, as with `runtime.weighting = "uniform"`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.settings.dp_fpl import Settings
from sordino.privacy.gradients import Gradients, Parameters
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import initial_context
from sordino.prompts.lowrank import factorize

ABOUT = MethodInfo(
    paper="Tran et al., DP-FPL, ICLR 2025 (arXiv 2501.13904)",
    personal="a context, learned through factors of rank k",
    shared="a context, through its gradient",
    privacy="local noise on the factors' gradients, global noise on the averaged gradient",
    needs="text tower",
    discloses=(
        Disclosure("each client's gradient of the shared context, to the server every round", "upload"),
        Disclosure("the shared context, to all", "mean"),
        Disclosure("each client's prompt, where it is published", "prompt"),
    ),
    server_uses="mean",
    averages={"shared": "gradient"},
)


@dataclass(frozen=True)
class Server(base.Server):
    context: Tensor  # [M, E], p_G
    optimizer: dict[str, Tensor]  # each [1, ...]


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    context: Tensor  # [M, E], p_G


@dataclass(frozen=True)
class ClientState(base.ClientState):
    context: Tensor  # [K, M, E], p_L


@dataclass(frozen=True)
class Upload(base.Upload):
    gradient: Tensor  # [K, M, E], of p_G
    weight: Tensor  # [K], its weight in the average


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    noise = init.streams.common_normal("context", settings.context_length, init.context_width)
    context = initial_context(settings.initial_context, init.embed, noise)
    return Server(context, settings.optimizer.initial_state(context[None]))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    noise = init.streams.common_normal("personal context", settings.context_length, init.context_width)
    context = initial_context("", init.embed, noise)
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
    shared = broadcast.context.expand(len(data), -1, -1)  # [K, M, E]
    optimizer = replace(settings.optimizer, learning_rate=settings.local_learning_rate)
    rate = optimizer.rate(round_context)
    personal, shared_gradients = state.context, []
    streams = round_context.streams
    batches = data.batches(settings.local_steps, settings.batch_size or None, streams)
    purposes = [f"projection {number}" for number in range(settings.local_steps)]
    projections = streams.normals(purposes, shared.shape[-1], settings.rank).to(personal)  # [steps, K, E, k]
    for batch, projection in zip(batches, projections, strict=True):
        if settings.parameterization == "full":
            parameters = {"shared": shared, "personal": personal}
            gradient = gradients(_full_context, parameters, {}, batch).values
            personal = personal - rate * optimizer.bounded(gradient["personal"])
        else:
            factors = factorize(personal, projection)
            residual = factors.residual
            if settings.parameterization == "lora":
                residual = torch.zeros_like(personal)
            parameters = {"shared": shared, "u": factors.u, "v": factors.v}
            gradient = gradients(_factored_context, parameters, {"residual": residual}, batch).values
            u = factors.u - rate * optimizer.bounded(gradient["u"])
            v = factors.v - rate * optimizer.bounded(gradient["v"])
            personal = u @ v + residual
        shared_gradients.append(gradient["shared"])
    return Upload(torch.stack(shared_gradients).mean(0), data.weights), ClientState(personal)


def _full_context(p: Parameters) -> Tensor:
    """Return p_G + p_L, [K, M, E]."""
    return p["shared"] + p["personal"]


def _factored_context(p: Parameters) -> Tensor:
    """Return p_G + U V + R, [K, M, E]."""
    return p["shared"] + p["u"] @ p["v"] + p["residual"]


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    gradient = uploads.mean("gradient")[None]
    context, optimizer = settings.optimizer.step(
        server.context[None], gradient, server.optimizer, settings.optimizer.rate(round_context)
    )
    return Server(context[0], optimizer)


def prompt(broadcast: Broadcast, state: ClientState) -> Tensor:
    return broadcast.context + state.context
