"""pFedMoAP: a client downloads other clients' prompts as experts, and a gate of its own mixes their class features.

Luo, Chen, Zhou, Hu, Li, Mixture of Experts Made Personalized: Federated Prompt Learning for Vision-Language Models,
ICLR 2025 (arXiv 2410.10114), section 3. All clients start at one context, and each sends what its training made of it.
The server keeps every client's last context, and the mean of the last round's, weighted by size. A participant trains
from the mean. It is given the S contexts nearest to its own last one (Euclidean distance) of those that were trained.
Per class, let f_0 be the feature of the context that the client trains and f_1 to f_S those of these experts, which
stay as they are. A gate of multi-head attention, in which the image's feature queries the S + 1 class features, makes a
class feature g(x) for this image, and the logit is

    lambda x . f_0 / tau + p(x) . g(x) / tau,

where p takes every (D / w)-th number of a feature, and the gate works on w of them. Context and gate are trained at
once. In a client's first round there are no experts: it trains the context alone, and its gate rests. The gate never
leaves the client. A client is evaluated with the context that it trained last, or with the mean if it never trained,
and with gate and experts once it has trained the gate. Without experts the mean is PromptFL's context.

Disclosure. The mean hides a client among others, but each client's context as it is reaches the server *and other
clients*. Under DP-SGD a client's noise protects both, and the mean too, which is made of them. Who looks at each upload
cannot be protected as a client of many, so `dp-fedavg` is refused, and so is every robust aggregation. The cotangent
mechanism is refused too, as class features depend on the image.

The rounds are those of the authors' code (github.com/ljaiverson/pFedMoAP, commit a481de3, federated_main.py). Defaults
are its own: 10 experts with the own one, 8 heads on w = 128 numbers, attention scaled by 10, lambda = 0.5, M = 16, and
rate 0.01 of the gate's optimizer (OPTIMGATING in configs/trainers/PFEDMOAP/rn50.yaml and vit_b16.yaml).

What differs from that code. Its experts are the first S trained clients in an order drawn once: the option "nearest" is
never passed to `sparse_selection`, whose default is "random". Here they are the nearest, as in the paper and in the
code's own option; with at most S + 1 clients both take all others. Its clients train one after another in one model. So
experts may be of the same round, and a gate's first round, or a newcomer's experts, are those that the client before
left there. Here experts are of the rounds before, newcomers have none, and every gate starts at the same numbers. It
evaluates participants with the experts that they trained with; here all have those of the round's end. There is no bias
of the keys, because it cancels in the softmax. Features narrower than w are taken whole. The change of a context is
sent, not the context: the server knows the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

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
from sordino.algorithms.layers import linear, linear_weight
from sordino.algorithms.settings.pfedmoap import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.errors import ConfigError
from sordino.privacy.gradients import Gradients
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import initial_context

ABOUT = MethodInfo(
    paper="Luo et al., pFedMoAP, ICLR 2025 (arXiv 2410.10114)",
    personal="its context as it trained it last, and a gate that mixes class features by image",
    shared="a mean context with all; each client's, as it is, with the server and the clients nearest to it",
    privacy="images stay; the server and other clients see each client's context by itself",
    needs="text tower, image features",
    discloses=(
        Disclosure("each client's change of the mean context, to the server every round", "upload"),
        Disclosure("the mean of the participants' contexts, to all", "mean"),
        Disclosure("each client's context, to the clients that have it as an expert", "prompt"),
        Disclosure("each client's context and gate, with its experts, where its prompt is published", "prompt"),
    ),
    server_uses="each",
)


@dataclass(frozen=True)
class Model(PromptModel):
    """Prompts with "context" [P, M, E], "experts" [P, S, M, E], "known" [P, S] (1 or 0), and a gate's tensors.

    Attributes: local_weight, heads, scaling, gate_width: as in `Settings`.
    """

    local_weight: float = 0.5
    heads: int = 8
    scaling: float = 10.0
    gate_width: int = 128
    linear: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.local_weight, settings.heads, settings.scaling, settings.gate_width)

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return features [P, 1 + S, C, D] of the own context and of the experts; these are constants."""
        parts = named_parts(prompt)
        own = self.text_features(parts["context"])[:, None]
        if not parts["experts"].shape[1]:
            return own
        with torch.no_grad():
            experts = self.text_features(parts["experts"])
        return torch.cat([own, experts], dim=1)

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        parts, own = named_parts(prompt), self.logits(features[:, 0], images)
        known = parts["known"] > 0  # [P, S]
        if not known.shape[1]:
            return own
        # [P, B, w], [P, 1 + S, C, w]
        image, classes = (self._pooled(each).to(parts["query"]) for each in (images, features))
        query = self._divided(linear(image, parts, "query"))  # [P, B, h, w / h]
        key, value = (self._divided(linear(classes, parts, name)) for name in ("key", "value"))  # [P, 1 + S, C, h, ..]
        closeness = self.scaling * torch.einsum("pbhd,pschd->pbhcs", query, key)
        absent = torch.cat([torch.zeros_like(known[:, :1]), ~known], dim=1)  # the own context is there always
        weights = closeness.masked_fill(absent[:, None, None, None], -torch.inf).softmax(-1)
        mixed = torch.einsum("pbhcs,pschd->pbchd", weights, value).flatten(3)
        gated = linear(mixed, parts, "output")  # [P, B, C, w]
        experts = self.encoder.logit_scale * torch.einsum("pbw,pbcw->pbc", image, gated)
        helped: Tensor = self.local_weight * own + experts
        return torch.where(known.any(1)[:, None, None], helped, own)

    def flops(self, prompt: Prompt, images: int) -> float:
        parts = named_parts(prompt)
        contexts, length = 1 + parts["experts"].shape[1], parts["context"].shape[1]
        return contexts * self.encoder.text_flops(1, length, self.classes)

    def images_at_once(self, prompts: int) -> int:
        return max(1, super().images_at_once(prompts) // self.gate_width)

    def _pooled(self, features: Tensor) -> Tensor:
        every = max(1, features.shape[-1] // self.gate_width)
        pooled: Tensor = features[..., ::every][..., : self.gate_width]
        return pooled

    def _divided(self, x: Tensor) -> Tensor:
        divided: Tensor = x.unflatten(-1, (self.heads, -1))
        return divided


def check(settings: Settings, model: PromptModel, clients: int) -> None:
    """Refuse heads that do not share the gate's width.

    Raises:
        ConfigError: they do not.
    """
    width = min(settings.gate_width, model.encoder.feature_width)
    if width % settings.heads:
        raise ConfigError(
            "settings.pfedmoap.heads", settings.heads, f"must divide the gate's width, {width} with this encoder"
        )


@dataclass(frozen=True)
class Server(base.Server):
    """The mean, all N clients' contexts, and who is whose expert."""

    context: Tensor  # [M, E], the mean of the last round's participants, from which the next ones train
    contexts: Tensor  # [N, M, E], as each client sent it last, or as all start
    trained: Tensor  # [N], 1 if the client has sent its context
    nearest: Tensor  # [N, S], the numbers of a client's experts, the nearest first


@dataclass(frozen=True)
class Broadcast(PersonalBroadcast):
    context: Tensor  # [K, M, E], the mean, the same for all
    experts: Tensor  # [K, S, M, E], zeros where there is none
    known: Tensor  # [K, S], 1 where there is one; none for a client that never sent its context


@dataclass(frozen=True)
class ClientState(base.ClientState):
    context: Tensor  # [K, M, E], as the client trained it last
    trained: Tensor  # [K], 1 if it has trained it
    gate: Mapping[str, Tensor]  # each [K, ...]
    gated: Tensor  # [K], 1 if it has trained its gate


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, M, E], of the mean context by the client's local steps
    weight: Tensor  # [K], the client's weight in the mean


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    context = _start(settings, init)
    clients = len(init.streams.clients)
    experts = min(settings.experts, clients) - 1
    nobody = torch.zeros(clients, experts, dtype=torch.int64, device=context.device)
    return Server(context, context.repeat(clients, 1, 1), context.new_zeros(clients), nobody)


def _start(settings: Settings, init: InitContext) -> Tensor:
    """Return the context [M, E] that everyone starts from."""
    noise = init.streams.common_normal("context", settings.context_length, init.context_width)
    return initial_context(settings.initial_context, init.embed, noise)


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    clients, width = len(init.streams.clients), min(settings.gate_width, init.feature_width)
    gate = {}
    for name in ("query", "key", "value", "output"):
        gate[name] = linear_weight(init, f"gate {name}", width, width).expand(clients, -1, -1).clone()
        if name != "key":
            gate[f"{name}_bias"] = torch.zeros_like(gate[name][:, 0])
    contexts = _start(settings, init).repeat(clients, 1, 1)
    never = contexts.new_zeros(clients)
    return ClientState(contexts, never, gate, never.clone())


def broadcast(server: Server) -> Broadcast:
    known = server.trained[server.nearest] * server.trained[:, None]  # [N, S]; newcomers have no experts
    own = torch.arange(len(known), device=known.device)[:, None]
    known = torch.where(server.nearest == own, 0.0, known)  # who has too few others to choose from is listed itself
    experts = server.contexts[server.nearest] * known[..., None, None]
    return Broadcast(server.context.expand_as(server.contexts), experts, known)


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    gate = dict(state.gate) if broadcast.experts.shape[1] else {}  # a gate over nobody is not trained
    trained = {"context": broadcast.context, **gate}
    optimizers = {name: settings.optimizer if name == "context" else settings.gate_optimizer for name in trained}
    kept = {name: optimizers[name].initial_state(value) for name, value in trained.items()}
    fixed = {"experts": broadcast.experts, "known": broadcast.known}
    for batch in data.batches(settings.local_steps, settings.batch_size or None, round_context.streams):
        for name, gradient in gradients(dict, trained, fixed, batch).values.items():
            rate = optimizers[name].rate(round_context)
            trained[name], kept[name] = optimizers[name].step(trained[name], gradient, kept[name], rate)
    context = trained.pop("context")
    mixes = (broadcast.known > 0).any(1)  # [K]
    after = ClientState(
        context,
        torch.ones_like(state.trained),
        # Noise, or an optimizer's decay, would move a gate that has no gradient.
        {name: _where(mixes, trained.get(name, old), old) for name, old in state.gate.items()},
        torch.where(mixes, 1.0, state.gated),
    )
    return Upload(context - broadcast.context, data.weights), after


def _where(clients: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return one tensor [K, ...] for those of K clients for whom a condition [K] holds, the other for the rest."""
    return torch.where(clients.view(-1, *[1] * (one.ndim - 1)), one, other)


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    clients = torch.as_tensor(round_context.streams.clients, device=server.contexts.device)
    contexts = server.contexts.index_copy(0, clients, server.context + uploads.each.change)
    trained = server.trained.index_fill(0, clients, 1.0)
    experts = nearest(contexts, trained, server.nearest.shape[1])
    return Server(server.context + uploads.mean("change"), contexts, trained, experts)


def nearest(contexts: Tensor, trained: Tensor, count: int) -> Tensor:
    """Return the numbers [N, S] of the `count` trained contexts nearest to each of N, without itself.

    Where there are fewer, the client's own number fills the rest.
    """
    flat = contexts.flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    own = torch.arange(len(flat), device=flat.device)
    absent = (trained == 0)[None, :] | (own[:, None] == own)
    found, order = distances.masked_fill(absent, torch.inf).sort(dim=1, stable=True)
    return torch.where(found.isinf(), own[:, None], order)[:, :count]


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    context = _where(state.trained > 0, state.context, broadcast.context)
    known = broadcast.known * (state.gated > 0)[:, None]
    experts = broadcast.experts * known[..., None, None]  # no prompt shows an expert that it does not use
    return {"context": context, "experts": experts, "known": known, **state.gate}
