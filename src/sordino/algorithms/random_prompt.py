"""Random prompt: every client has the context that `local` starts from, and nothing is learned or sent.

It is the control of every learned prompt, and of a noised one first of all: noise that drowns the gradients leaves a
context that is as random as this one. A method that is not above it did not learn. The numbers are drawn as in CoOp
(Zhou et al., IJCV 2022, section 3.1), by the streams that `local` uses, so this is `local` before its first round.
`deviation` draws wider ones, as of a prompt that took many steps along noise.
"""

from dataclasses import dataclass

from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.settings.random_prompt import Settings
from sordino.privacy.gradients import Gradients
from sordino.prompts.contexts import RANDOM_STANDARD_DEVIATION, initial_context

ABOUT = MethodInfo(
    paper="none; the control of learned prompts, drawn as in Zhou et al., CoOp, IJCV 2022",
    personal="a random context",
    shared="nothing",
    privacy="nothing is learned from any image",
    needs="text tower",
    discloses=(),
    server_uses="nothing",
    trains=False,
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


@dataclass(frozen=True)
class Upload(base.Upload):
    """Nothing leaves a client."""


def schedule(settings: Settings) -> Schedule:
    return Schedule(0, None)


def server_init(settings: Settings, init: InitContext) -> Server:
    return Server()


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    noise = init.streams.normal("context", settings.context_length, init.context_width)
    wider = settings.deviation / RANDOM_STANDARD_DEVIATION  # 1 by default, which keeps the bits of `local`
    return ClientState(initial_context(settings.initial_context, init.embed, wider * noise))


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
    return Upload(), state


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return server


def prompt(broadcast: Broadcast, state: ClientState) -> Tensor:
    return state.context
