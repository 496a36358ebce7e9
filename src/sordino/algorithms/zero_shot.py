"""Zero-shot: the hand-written prompt, with nothing learned and nothing sent.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, section 3.1.
"""

from dataclasses import dataclass

from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.settings.zero_shot import Settings
from sordino.privacy.gradients import Gradients

ABOUT = MethodInfo(
    paper="Radford et al., CLIP, ICML 2021",
    personal="nothing",
    shared="nothing; every client uses the hand-written prompt",
    privacy="nothing is learned from any image",
    needs="text tower",
    discloses=(),
    server_uses="nothing",
    trains=False,
)


@dataclass(frozen=True)
class Server(base.Server):
    context: Tensor  # [M, E], the words' embeddings


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    context: Tensor  # [M, E]


@dataclass(frozen=True)
class ClientState(base.ClientState):
    """A client keeps no state."""


@dataclass(frozen=True)
class Upload(base.Upload):
    """Nothing leaves a client."""


def schedule(settings: Settings) -> Schedule:
    return Schedule(0, None)


def server_init(settings: Settings, init: InitContext) -> Server:
    return Server(init.embed(settings.prompt_text))


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
    return Upload(), state


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return server


def prompt(broadcast: Broadcast, state: ClientState) -> Tensor:
    return broadcast.context[None]
