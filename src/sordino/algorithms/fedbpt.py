"""FedBPT: clients search a prompt by CMA-ES, without gradients; the server takes a CMA-ES step over their means.

Sun, Xu, Yin, Yang, Xu, Chen, Roth, FedBPT: Efficient Federated Black-box Prompt Tuning for Large Language Models, ICML
2024 (arXiv 2310.01467). The prompt is p_0 + A z, with words p_0, a fixed random A and a short z (Sun et al., Black-Box
Tuning for Language-Model-as-a-Service, ICML 2022). A client starts CMA-ES at the server's mean, step size and
covariance, without its paths, and takes some generations on its data. It sends its mean, the mean's fitness, and the
sum of its squared step sizes. The server takes the means for the candidates of a generation of its own CMA-ES, with
all of them as parents, and sends the distribution that results. Fitness is the loss over the loss under masked inputs:
a prompt that only knows which class is frequent has a low loss on both, and so no advantage.

Settings and doubts follow the authors' code (NVIDIA FLARE, `research/fed-bpt`). For its step the server uses the step
size sqrt(sum of all squared local step sizes / (clients times a client's parents)), where a client's parents are the
better half of its population. Then the local step size is multiplied by the growth of that one. The code raises a
local step size below 0.5 to 0.5, and undoes it in the next line; so here there is no floor. Means that are further
from the server's than sqrt(N) + 2 N / (N + 2) in Mahalanobis distance are brought there, as the package `cma` does
with candidates that it did not draw. That package refuses generations of fewer than three; here one client, whose mean
then is the server's, and two are fine. For so small a population the package adapts steps by another rule today; here
it is the path length, its former default.

What differs. Masked words are masked entries of an image's feature: a share of them, drawn anew for each client and
round, is replaced by entries of a random unit vector. p_0 are frequent words. Everything that a client sends comes of
losses, so with noised losses (`sordino.privacy.forward`) it is private. Noise hurts a quotient more than a
difference: then `masked_share = 0` is better, which leaves each example's losses relative to their mean. The paper has
no noise.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.cma_es import Rates, Roots, Search, ask, tell
from sordino.algorithms.settings.fedbpt import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.privacy.forward.losses import Losses, Question, View
from sordino.privacy.gradients import Batch
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import FREQUENT_WORDS, vocabulary_context
from sordino.randomness import Streams, generator

ABOUT = MethodInfo(
    paper="Sun et al., FedBPT, ICML 2024 (arXiv 2310.01467)",
    personal="nothing",
    shared="the distribution that prompts are drawn from",
    privacy="images stay, and no gradient is taken; no guarantee on what means and losses tell about them",
    needs="text tower, forward only",
    discloses=(
        Disclosure("each client's mean prompt, its loss and step sizes, to the server every round", "upload"),
        Disclosure("the distribution that the server makes of them, to all", "mean"),
    ),
    server_uses="each",
    forward_only=True,
)

LEAST_LOSS = 0.01  # a loss under masked inputs that noise made smaller counts as this


@dataclass(frozen=True)
class Model(PromptModel):
    """CoOp's model, of prompts p_0 + A z.

    Attributes:
        start: p_0, [M, E].
        projection: A, [N, M, E].
    """

    start: Tensor
    projection: Tensor

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        length, width = settings.context_length, settings.search_width
        start = vocabulary_context(settings.initial_context, length, encoder.embed, lambda count: torch.arange(count))
        deviation = settings.embedding_scale * encoder.embed(FREQUENT_WORDS).std().item()
        drawn = generator("fedbpt projection", settings.projection_seed).standard_normal(
            (width, length, encoder.context_width), dtype="float32"
        )
        factor = deviation / (math.sqrt(width) * settings.initial_step)
        return cls(encoder, classes, start, factor * torch.from_numpy(drawn).to(start))

    def context(self, prompt: Prompt) -> Tensor:
        """Return the contexts [P, M, E] of prompts "z" [P, N]."""
        z = named_parts(prompt)["z"]
        moved: Tensor = torch.tensordot(z.to(self.start), self.projection, dims=1)
        return self.start + moved

    def class_features(self, prompt: Prompt) -> Tensor:
        return self.text_features(self.context(prompt))

    def flops(self, prompt: Prompt, images: int) -> float:
        return self.encoder.text_flops(1, len(self.start), self.classes)


@dataclass(frozen=True)
class Server(base.Server):
    mean: Tensor  # [N], of z
    step: Tensor  # a scalar, the step size of clients
    covariance: Tensor  # [N, N], over the squared step size
    path: Tensor  # [N], of the server's own search
    step_path: Tensor  # [N], likewise
    generation: Tensor  # a scalar, int64, the number of the server's steps


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    mean: Tensor  # [N]
    step: Tensor  # a scalar
    covariance: Tensor  # [N, N]


@dataclass(frozen=True)
class ClientState(base.ClientState):
    """A client keeps no state."""


@dataclass(frozen=True)
class Upload(base.Upload):
    mean: Tensor  # [K, N], where its search ended
    fitness: Tensor  # [K], of this mean
    squared_steps: Tensor  # [K], the sum of its squared step sizes


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps + 1, settings.batch_size or None)  # the last measures the mean


def server_init(settings: Settings, init: InitContext) -> Server:
    zeros = torch.zeros(settings.search_width, device=init.streams.device)
    step = torch.tensor(settings.initial_step, dtype=zeros.dtype, device=zeros.device)
    covariance = torch.eye(settings.search_width, device=zeros.device)
    return Server(zeros, step, covariance, zeros, zeros, torch.zeros((), dtype=torch.int64, device=zeros.device))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    return ClientState()


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.mean, server.step, server.covariance)


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    losses: Losses,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    clients, streams = len(data), round_context.streams
    rates = Rates.of(settings.search_width, settings.population)
    mean, step = broadcast.mean.expand(clients, -1), broadcast.step.expand(clients)
    search = Search.at(mean, step, broadcast.covariance[None])
    roots = Roots.of(search.covariance[:1]).expand(clients)
    view = masked(settings.masked_share, data.features.shape[-1], streams) if settings.masked_share else None
    batches = iter(data.batches(settings.local_steps + 1, settings.batch_size or None, streams))
    squared_steps = torch.zeros_like(search.step)
    for number in range(settings.local_steps):
        normal = streams.normal(f"candidates {number}", settings.population, settings.search_width)
        candidates = ask(search, roots, normal)
        squared_steps += search.step.square()
        measured = fitness(losses, candidates, next(batches), view, relative=view is None)
        search = tell(search, roots, rates, candidates, measured, adapts=settings.local_steps > rates.gap)
        if search.generation % rates.gap == 0 and number + 1 < settings.local_steps:
            roots = Roots.of(search.covariance)
    of_mean = fitness(losses, search.mean[:, None], next(batches), view, relative=False)[:, 0]
    like = broadcast.mean
    return Upload(search.mean.to(like), of_mean.to(like), squared_steps.to(like)), state


def fitness(losses: Losses, candidates: Tensor, batch: Batch, view: View | None, relative: bool) -> Tensor:
    """Return the fitness [K, P] of candidates z [K, P, N]; lower is better.

    Args:
        losses: the black box.
        candidates: float64.
        batch: the examples.
        view: the look at masked inputs; None for the loss alone.
        relative: return losses up to a constant of each client, where there is no second look.
    """
    found: Tensor = losses(Question(dict, relative=relative, view=view), {"z": candidates}, {}, batch).losses
    fit: Tensor = found[:, 0] if view is None else found[:, 0] / found[:, 1].clamp(min=LEAST_LOSS)
    return fit


def masked(share: float, width: int, streams: Streams) -> View:
    """Return a look at features [K, B, D] in which each client's share of the entries is random, at equal norms."""
    hidden = streams.normal("masked entries", width)
    cut = math.floor(share * width)
    replaced = hidden.argsort(dim=1).argsort(dim=1) < cut  # [K, D]
    random = torch.nn.functional.normalize(streams.normal("entries in their place", width), dim=1)

    def view(features: Tensor) -> Tensor:
        norms = features.norm(dim=-1, keepdim=True)
        mixed = torch.where(replaced[:, None], random[:, None].to(features) * norms, features)
        looked_at: Tensor = torch.nn.functional.normalize(mixed, dim=-1) * norms
        return looked_at

    return view


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    each, width, like = uploads.each, settings.search_width, server.mean
    clients = len(each.mean)
    parents = Rates.of(width, settings.population).parents
    step = (each.squared_steps.double().sum() / (clients * parents)).sqrt()
    before = replace(
        Search.at(server.mean[None], step[None], server.covariance[None]),
        path=server.path.double()[None],
        step_path=server.step_path.double()[None],
        generation=int(server.generation),
    )
    roots = Roots.of(before.covariance)
    candidates = within_reach(before, roots, each.mean.double()[None])
    after = tell(before, roots, Rates.of(width, clients, all_parents=True), candidates, each.fitness[None])
    return Server(
        after.mean[0].to(like),
        (after.step[0] / step * server.step.double()).to(like),
        after.covariance[0].to(like),
        after.path[0].to(like),
        after.step_path[0].to(like),
        server.generation + 1,
    )


def within_reach(search: Search, roots: Roots, candidates: Tensor) -> Tensor:
    """Return candidates [K, P, N] that a search did not draw, none further from its mean than a drawn one may be."""
    width = search.mean.shape[1]
    moved = candidates - search.mean[:, None]
    lengths = (moved @ roots.inverse).norm(dim=-1, keepdim=True) / search.step[:, None, None]
    most = math.sqrt(width) + 2 * width / (width + 2)
    shortened: Tensor = moved * (most / lengths.clamp(min=most))
    return search.mean[:, None] + shortened


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {"z": broadcast.mean[None]}
