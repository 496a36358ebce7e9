"""PromptFL: one context, learned by all, averaged by the server.

Guo et al., PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead of Models, IEEE Transactions on
Mobile Computing 2023 (arXiv 2208.11625), section 4: federated averaging (McMahan et al., 2017) of CoOp's context.
The server may treat the mean change as a gradient of its own optimizer (Reddi et al., Adaptive Federated Optimization,
ICLR 2021). The default, SGD with rate 1, is plain averaging, as published. The paper does not say if a client keeps its
optimizer's state. Here the state starts afresh each round, because the context that it belongs to is replaced. Clients
send the change of the context, not the context: the server knows the rest.
"""

from dataclasses import dataclass

from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.descent import local_steps
from sordino.algorithms.settings.promptfl import Settings
from sordino.privacy.gradients import Gradients, Parameters
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import initial_context

ABOUT = MethodInfo(
    paper="Guo et al., PromptFL, IEEE TMC 2023 (arXiv 2208.11625)",
    personal="nothing",
    shared="the context",
    privacy="images stay; no guarantee on what the context tells about them",
    needs="text tower",
    discloses=(
        Disclosure("each client's change of the context, to the server every round", "upload"),
        Disclosure("the averaged context, to all", "mean"),
    ),
    server_uses="mean",
)


@dataclass(frozen=True)
class Server(base.Server):
    context: Tensor  # [M, E], the shared prompt
    optimizer: dict[str, Tensor]  # each [1, ...]


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    context: Tensor  # [M, E]


@dataclass(frozen=True)
class ClientState(base.ClientState):
    """A client keeps no state."""


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, M, E], of the context by the local steps
    weight: Tensor  # [K], its weight in the average


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    noise = init.streams.common_normal("context", settings.context_length, init.context_width)
    context = initial_context(settings.initial_context, init.embed, noise)
    return Server(context, settings.server_optimizer.initial_state(context[None]))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    return ClientState()


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
    contexts = {"context": broadcast.context.expand(len(data), -1, -1)}  # [K, M, E]
    trained = local_steps(settings, _context, contexts, {}, data, gradients, round_context)
    return Upload(trained["context"] - broadcast.context, data.weights), state


def _context(parameters: Parameters) -> Tensor:
    """Return the prompt [K, M, E]."""
    return parameters["context"]


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    descent = -uploads.mean("change")
    context, optimizer = settings.server_optimizer.step(
        server.context[None], descent[None], server.optimizer, settings.server_optimizer.rate(round_context)
    )
    return Server(context[0], optimizer)


def prompt(broadcast: Broadcast, state: ClientState) -> Tensor:
    return broadcast.context[None]
