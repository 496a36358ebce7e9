"""Local: every client learns a context of its own and sends nothing.

It is the lower bound of every comparison in the field, e.g. Guo et al., PromptFL, 2023 (arXiv 2208.11625), section 5.
The prompt is CoOp's: Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022.
"""

from dataclasses import dataclass

from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.settings.local import Settings
from sordino.privacy.gradients import Gradients, Parameters
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import initial_context

ABOUT = MethodInfo(
    paper="Zhou et al., CoOp, IJCV 2022, on each client alone",
    personal="the whole context",
    shared="nothing",
    privacy="nothing is sent; a published prompt is not protected",
    needs="text tower",
    discloses=(Disclosure("each client's prompt, where it is published", "prompt"),),
    server_uses="nothing",
)


@dataclass(frozen=True)
class Server(base.Server):
    """The server keeps no state."""


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    """The server sends nothing."""


@dataclass(frozen=True)
class ClientState(base.ClientState):
    context: Tensor  # [K, M, E]
    optimizer: dict[str, Tensor]  # each [K, ...]


@dataclass(frozen=True)
class Upload(base.Upload):
    """Nothing leaves a client."""


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    return Server()


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    noise = init.streams.normal("context", settings.context_length, init.context_width)
    context = initial_context(settings.initial_context, init.embed, noise)
    return ClientState(context, settings.optimizer.initial_state(context))


def broadcast(server: Server) -> Broadcast:
    return Broadcast()


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    context, optimizer = state.context, state.optimizer
    for batch in data.batches(settings.local_steps, settings.batch_size or None, round_context.streams):
        gradient = gradients(_context, {"context": context}, {}, batch).values["context"]
        rate = settings.optimizer.rate(round_context)
        context, optimizer = settings.optimizer.step(context, gradient, optimizer, rate)
    return Upload(), ClientState(context, optimizer)


def _context(parameters: Parameters) -> Tensor:
    """Return the prompt [K, M, E]."""
    return parameters["context"]


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return server


def prompt(broadcast: Broadcast, state: ClientState) -> Tensor:
    return state.context
