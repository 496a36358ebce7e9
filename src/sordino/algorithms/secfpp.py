"""SecFPP: a domain-level context, shared within clusters that are found on secret shares, and a class-level one.

Hou, Li, Buyukates, Privacy-preserving Prompt Personalization in Federated Learning for Multimodal Large Language
Models, 2025 (arXiv 2505.22447). Client i uses p_D + p_i. The class-level part p_i stays. The domain-level part is
averaged among the clients of a cluster, which k-means finds. The distances that k-means needs and the means are
computed on Lagrange shares (`sordino.secure`). So the server sees distances and means of clusters, and nobody sees a
client's prompt.

Choices where the paper is silent. Clients learn alone until the first clustering, when there is something to cluster.
They then train the domain-level part only, from batches in which every class of a client counts alike, so that clusters
are of domains and not of class mixtures. From then on both parts take the same steps, on batches as they come; what the
averages take from the one, the other keeps. A client is clustered by its whole context, reduced as `secfpp_points`
says. The search opens the distances between all clients (`Pairs`) or only those that k-means needs (`Adaptive`). A
cluster below the minimum size is not opened, and its clients keep their own domain-level parts. The reason is that its
mean goes to its members: T of a cluster of T + 1 would compute the last one's part from it. If too few clients answer,
the last clusters stay. A client that takes no part in a round keeps the mean that it had, until its cluster has a new
one. Cluster means are not weighed by sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sordino import secure
from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule
from sordino.algorithms.descent import descend
from sordino.algorithms.secfpp_points import point_width, points
from sordino.algorithms.settings.secfpp import Settings
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy.gradients import Gradients, Parameters
from sordino.privacy.ledger import Disclosure
from sordino.progress import log
from sordino.prompts.contexts import initial_context

COLUMNS = 96  # distances to centers that a client answers a round, beside those to other clients

ABOUT = MethodInfo(
    paper="Hou et al., SecFPP, 2025 (arXiv 2505.22447)",
    personal="a class-level context",
    shared="a domain-level context, by cluster",
    privacy="secret shares: no prompt is seen by the server or another client; distances and clusters' means are",
    needs="text tower",
    discloses=(
        Disclosure("squared distances between clients' reduced prompts, so their clusters, to the server", "shares"),
        Disclosure("which clients are in a cluster with which, to all of them", "clusters"),
        Disclosure("the mean domain-level context of each cluster, to its clients and the server", "mean"),
        Disclosure("each client's prompt, where it is published", "prompt"),
    ),
    server_uses="shares",
    class_features=True,
)


@dataclass(frozen=True)
class Server(base.Server):
    start: Tensor  # [M, E], where every domain-level part began
    contexts: Tensor  # [K, M, E], the mean domain-level part of each client's cluster
    opened: Tensor  # [K], 1 where there is one, else 0
    labels: Tensor  # [K], the number of each client's cluster, NOBODY before it has one


@dataclass(frozen=True)
class Broadcast(base.PersonalBroadcast):
    start: Tensor  # [K, M, E], where every domain-level part began, the same for all
    context: Tensor  # [K, M, E], the cluster's mean
    opened: Tensor  # [K], 1 where there is one, else 0


@dataclass(frozen=True)
class ClientState(base.ClientState):
    domain: Tensor  # [K, M, E], its own p_D
    personal: Tensor  # [K, M, E], p_i
    domain_optimizer: dict[str, Tensor]
    personal_optimizer: dict[str, Tensor]


@dataclass(frozen=True)
class Upload(base.Upload):
    """The inputs of the protocol; both leave their client in shares only.

    Attributes:
        context: [K, M, E], the whole context, by which a client is clustered.
        domain: [K, M, E], the domain-level part, which is averaged.
    """

    context: Tensor
    domain: Tensor


class Exchanged(Protocol):
    """The server's view of a round's participants.

    Attributes:
        clients: their numbers, ascending; the methods refer to a client by its place among them.
    """

    @property
    def clients(self) -> tuple[int, ...]: ...

    def cluster(self, start: secure.Start) -> secure.Clusters:
        """Cluster the clients.

        Raises:
            SecureError: too few answered.
        """
        ...

    def average(self, sets: Sequence[frozenset[int]]) -> secure.Averages:
        """Return the mean domain-level part's change since the start, flattened, in each of disjoint sets.

        Raises:
            SecureError: too few answered.
        """
        ...


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    noise = init.streams.common_normal("context", settings.context_length, init.context_width)
    context = initial_context(settings.initial_context, init.embed, noise)
    clients = len(init.streams.clients)
    means = torch.zeros_like(context).repeat(clients, 1, 1)
    opened = torch.zeros(clients, device=context.device)
    return Server(context, means, opened, torch.full_like(opened, secure.NOBODY))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    domain = server_init(settings, init).start.repeat(len(init.streams.clients), 1, 1)
    states = (settings.optimizer.initial_state(domain) for _ in range(2))
    return ClientState(domain, torch.zeros_like(domain), *states)


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.start.expand_as(server.contexts), server.contexts, server.opened)


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    parts = {"domain": _domain(broadcast, state), "personal": state.personal}
    kept = {"domain": state.domain_optimizer, "personal": state.personal_optimizer}
    fixed: dict[str, Tensor] = {}
    if round_context.round <= settings.cluster_every:  # alone
        fixed = {"personal": parts.pop("personal")}
        data = data.balanced() if settings.balanced and data.poisson is None else data
    batches = data.batches(settings.local_steps, settings.batch_size or None, round_context.streams)
    trained, optimizers = descend(settings.optimizer, kept, _sum, parts, fixed, batches, gradients, round_context)
    whole, optimizers = trained | fixed, kept | optimizers
    after = ClientState(whole["domain"], whole["personal"], optimizers["domain"], optimizers["personal"])
    return Upload(_sum(whole), after.domain), after


def _sum(p: Parameters) -> Tensor:
    """Return p_D + p_i, [K, M, E]."""
    return p["domain"] + p["personal"]


def _domain(broadcast: Broadcast, state: ClientState) -> Tensor:
    """Return the domain-level part [K, M, E]: the cluster's, or the client's own if that is not opened."""
    return torch.where(broadcast.opened.view(-1, 1, 1) > 0, broadcast.context, state.domain)


def check(settings: Settings, model: PromptModel, clients: int) -> None:
    """Refuse a federation that the protocol cannot serve.

    Raises:
        ConfigError: there are too few clients.
    """
    if settings.smallest_cluster > clients:
        raise ConfigError(
            "settings.secfpp.smallest_cluster",
            settings.smallest_cluster,
            f"no cluster of {clients} clients a round could be opened; have it smaller, or more clients",
        )
    try:
        agreed(settings, model, clients, 1, 1)
    except secure.SecureError as error:
        raise ConfigError("settings.secfpp", f"{clients} clients a round", f"no protocol for them: {error}") from None


def unused(settings: Settings, rounds: int, poisson: bool) -> list[str]:
    """Return in words that there is no clustering, or that batches are not balanced; nothing if all is used."""
    lines = []
    if rounds < settings.cluster_every:
        lines.append(
            f"settings.secfpp.cluster_every = {settings.cluster_every}: in {rounds} rounds there is no clustering, so "
            f"every client learns alone; set it to {rounds} or less, or take more rounds"
        )
    if settings.balanced and poisson:
        lines.append(
            "settings.secfpp.balanced = true: ignored under Poisson sampling, so clusters may be of class mixtures; "
            "set it to false"
        )
    return lines


def discloses(settings: Settings, rounds: int) -> tuple[Disclosure, ...]:
    return disclosed(ABOUT, settings, rounds)


def disclosed(about: MethodInfo, settings: Settings, rounds: int) -> tuple[Disclosure, ...]:
    """Return the disclosures of a run: with no clustering there are no clusters, so neither distances nor means."""
    clustered = rounds >= settings.cluster_every
    return tuple(part for part in about.discloses if clustered or part.channel not in ("shares", "clusters", "mean"))


def client_exchange(
    settings: Settings,
    model: PromptModel,
    broadcast: Broadcast,
    upload: Upload,
    places: Sequence[int],
    round_context: RoundContext,
) -> list[secure.Client]:
    """Return the clients' ends of the protocol; see `base` for its arguments."""
    points, changes = reduced(settings, model, broadcast.start[0], upload, round_context)
    setup = agreed(settings, model, round_context.participants, broadcast.start[0].numel(), round_context.round)
    return [
        secure.Client(
            place,
            point,
            change,
            cipher=secure.EncryptingCipher(),
            clip=True,
            minimum=settings.minimum,
            privacy=settings.colluders,
            agreed=setup,
        )
        for place, point, change in zip(places, points, changes, strict=True)
    ]


def server_exchange(
    settings: Settings,
    model: PromptModel,
    server: Server,
    upload: Upload,
    clients: Sequence[int],
    round_context: RoundContext,
    carrier: secure.Carrier,
) -> secure.SharedExchange:
    """Return the server's end of the protocol; see `base` for its arguments."""
    setup = agreed(settings, model, len(clients), server.start.numel(), round_context.round)
    return secure.SharedExchange(setup, clients, carrier)


def agreed(settings: Settings, model: PromptModel, clients: int, length: int, number: int) -> secure.Setup:
    """Return the setup that the parties agree on for round `number`.

    Raises:
        SecureError: there is no protocol for so many clients.
    """
    to_centers = settings.search == "centers" or settings.reveal != "distances"
    columns = (0 if settings.search == "centers" else clients) + (COLUMNS if to_centers else 0)
    return secure.plan(
        clients=clients,
        width=point_width(model, settings.width),
        largest=1.0,
        round=number,
        privacy=settings.colluders,
        tolerance=settings.dropouts,
        reveal=settings.reveal,
        columns=columns,
        minimum=settings.minimum,
        length=length,
        vector_largest=settings.largest,
    )


@torch.no_grad()
def reduced(
    settings: Settings, model: PromptModel, start: Tensor, upload: Upload, round_context: RoundContext
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the inputs of each client to the exchange.

    Returns:
        Points [K, d], by which clients are clustered, zero in rounds without clustering; and changes [K, M E] of the
        domain-level part, which are averaged.
    """
    changes = (upload.domain - start).flatten(1).double().cpu().numpy()
    if not due(settings, round_context):
        return np.zeros((len(changes), point_width(model, settings.width))), changes
    pieces = upload.context.split(model.prompts_at_once(upload.context, 1))
    reduced_contexts = torch.cat([points(model, piece, start, settings.width) for piece in pieces])
    return reduced_contexts.double().cpu().numpy(), changes


def due(settings: Settings, round_context: RoundContext) -> bool:
    """Return true in a round that clusters clients."""
    return round_context.round % settings.cluster_every == 0


def server_round(settings: Settings, server: Server, uploads: Exchanged, round_context: RoundContext) -> Server:
    labels = server.labels.long().cpu().numpy()
    participants = np.asarray(uploads.clients)
    if due(settings, round_context):
        try:
            clusters = uploads.cluster(searching(settings))
            labels = secure.renamed(labels, participants[list(clusters.clients)], clusters.labels)
        except secure.SecureError as error:
            log.warning("round %d keeps the last clusters: %s", round_context.round, error)
    # An absent client keeps its mean. A participant trained from it, so its own part is newer.
    contexts, opened = server.contexts.clone(), server.opened.clone()
    trained = torch.from_numpy(participants).to(contexts.device)
    contexts[trained], opened[trained] = 0, 0
    numbers = sorted({*labels[participants].tolist()} - {secure.NOBODY})
    if numbers:
        sets = [frozenset(np.flatnonzero(labels[participants] == number).tolist()) for number in numbers]
        try:
            means = uploads.average(sets).means
        except secure.SecureError as error:
            log.warning("round %d averages nothing: %s", round_context.round, error)
            means = (None,) * len(sets)
        for number, mean in zip(numbers, means, strict=True):
            if mean is not None:
                members = torch.from_numpy(labels == number).to(contexts.device)
                contexts[members] = server.start + torch.from_numpy(mean).to(contexts).view_as(server.start)
                opened[members] = 1
    return Server(server.start, contexts, opened, torch.from_numpy(labels).to(server.labels))


def searching(settings: Settings) -> secure.Start:
    """Return the search for the number of clusters and their first centers."""
    if settings.search == "pairs":
        return secure.Pairs(settings.minimum, settings.significance, settings.clusters or None)
    return settings.clusters or secure.Adaptive(smallest=settings.minimum)


def prompt(broadcast: Broadcast, state: ClientState) -> Tensor:
    return _domain(broadcast, state) + state.personal
