"""The common part of methods all of whose parameters are averaged: several tensors by name, in place of one context.

Each round a client takes local steps on all of them, from the server's, with an optimizer that starts afresh, and sends
the change (McMahan et al., Communication-Efficient Learning of Deep Networks, AISTATS 2017). Such a method has its
`Model`, its `ABOUT` and a `server_init`, and takes the rest from here. It keeps nothing at a client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, RoundContext, Schedule, Uploads
from sordino.algorithms.descent import local_steps
from sordino.encoders.prompt_model import Prompt
from sordino.privacy.gradients import Gradients, Parameters
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import initial_context


def disclosures(learned: str) -> tuple[Disclosure, ...]:
    """Return what such a method discloses, with the name of its parameters, such as "the generator"."""
    return (
        Disclosure(f"each client's change of {learned}, to the server every round", "upload"),
        Disclosure(f"the average of {learned}, to all", "mean"),
    )


@dataclass(frozen=True)
class Server(base.Server):
    shared: Mapping[str, Tensor]  # each [...], without a leading axis


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    shared: Mapping[str, Tensor]  # each [...]


@dataclass(frozen=True)
class ClientState(base.ClientState):
    """A client keeps no state."""


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Mapping[str, Tensor]  # each [K, ...], by the local steps
    weight: Tensor  # [K], the client's weight in the average


def schedule(settings: Any) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def client_init(settings: Any, init: InitContext, data: ClientData) -> ClientState:
    return ClientState()


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.shared)


def at_clients(shared: Mapping[str, Tensor], clients: int) -> dict[str, Tensor]:
    """Return the server's tensors for each of K clients, [K, ...]."""
    return {name: value.expand(clients, *value.shape) for name, value in shared.items()}


def changes(trained: Parameters, broadcast: Broadcast, data: ClientData) -> Upload:
    """Return the upload of clients who trained the server's tensors to these."""
    return Upload({name: value - broadcast.shared[name] for name, value in trained.items()}, data.weights)


def client_round(
    settings: Any,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    start = at_clients(broadcast.shared, len(data))
    trained = local_steps(settings, dict, start, {}, data, gradients, round_context)
    return changes(trained, broadcast, data), state


def server_round(settings: Any, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return Server({name: value + uploads.mean(f"change.{name}") for name, value in server.shared.items()})


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {name: value[None] for name, value in broadcast.shared.items()}


def context_set(settings: Any, init: InitContext) -> Server:
    """Return a server with N contexts [N, M, E] that start anywhere, or from words."""
    shape = (settings.contexts, settings.context_length, init.context_width)
    noise = init.streams.common_normal("contexts", *shape)
    return Server({"contexts": initial_context(settings.initial_context, init.embed, noise)})
