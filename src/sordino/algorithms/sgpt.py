"""SGPT: prompts shared by all images, and group prompts that learned keys pick for each image; trained in turn.

Deng, Thrampoulidis, Li, Unlocking the Potential of Prompt-Tuning in Bridging Generalized and Personalized Federated
Learning, CVPR 2024 (arXiv 2310.18285), section 4. There is one model for all. Shared tokens join in the lower layers of
the image tower. Above them, each image gets the tokens of the group whose key k_g has the largest cosine with the
image's query q. Local training is block coordinate descent. First come the shared prompts, without any group. Then come
the group prompts and keys, with the shared ones fixed, on cross-entropy plus 1 - cos(q, k_g) for the chosen g, which
moves keys to the images that they attract. Everything is averaged, group prompts and keys with a momentum at the
server.

As in the authors' code: one token a layer, shared in layers 0 to 4 and grouped in 5 and 6, which stay beside each
other; shared prompts start at zero, group prompts at VPT's deviation, keys orthonormal; 20 groups; queries pass a ReLU
and carry no gradient; SGD of rate 0.01, momentum 0.9 and weight decay 1e-5 on batches of 40, afresh in each part; both
server momenta 0.5; equal shares of a round's steps.

Differences. The code's head is a trained linear layer on the mean of class token and group prompts. Here it is the
frozen class features of a hand-written prompt, so the class token alone is read. The query is the class token (of
SigLIP, the patches' mean) that enters the first grouped layer, behind the shared prompts, in the same pass. The code's
is the last class token of an unprompted tower. For Office and DomainNet it is the one that leaves block 5, with the
shared prompts as an option, and a training batch uses the group that most of its images chose. In training the code
also counts, over all clients, the choices of each group, makes frequent ones less likely, and weighs the average of
keys with the counts. Such counts leave a client outside of every gradient, so no mechanism would cover them: here there
are none. The logged loss of the second part contains the keys' term.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.descent import descend, first_steps, untrained
from sordino.algorithms.settings.sgpt import Settings
from sordino.encoders.base import Capability, ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, named_parts
from sordino.errors import ConfigError
from sordino.privacy.gradients import Gradients
from sordino.privacy.ledger import Disclosure
from sordino.prompts.visual import HandWrittenHeadModel, token_deviation

ABOUT = MethodInfo(
    paper="Deng et al., SGPT, CVPR 2024 (arXiv 2310.18285)",
    personal="nothing",
    shared="visual prompts for all images; group prompts, which each image picks by their keys",
    privacy="images stay; no guarantee on what prompts and keys tell about them",
    needs="a vision transformer",
    discloses=(
        Disclosure("each client's change of prompts and keys, to the server every round", "upload"),
        Disclosure("the averaged prompts and keys, to all", "mean"),
    ),
    server_uses="mean",
)
SMALLEST = 1e-6  # value of a key's term; below it, its gradient is lost in rounding


@dataclass(frozen=True)
class Model(HandWrittenHeadModel):
    """Prompts with "shared" tokens [P, S, n, W], and with or without "group" [P, G, L, n, W] and "keys" [P, G, W].

    Attributes: shared_layers, group_layers: S and L, the first layers and those that follow.
    """

    shared_layers: int = 1
    group_layers: int = 1

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        encoder.require(Capability.VISUAL_PROMPTS, "sgpt")
        shared, grouped = settings.layers(encoder.image_layers)
        return cls(encoder, classes, settings.hand_written, 0, shared, grouped)

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        """Return logits [P, B, C]; if the prompt has an "attraction" [P], see `with_term`."""
        parts, tower, depth = named_parts(prompt), self.encoder.image_tower, self.encoder.image_layers
        shared = dict(enumerate(parts["shared"].unbind(1)))
        if "group" not in parts:
            outputs = tower.forward(images, 0, depth, shared, replace=False)
            return self.logits(features, tower.features(outputs))
        x = tower.forward(images, 0, self.shared_layers, shared, replace=False)
        query = F.normalize(tower.summary(x).detach().relu(), dim=-1)
        cosines = query @ F.normalize(parts["keys"].to(x), dim=-1).mT  # [P, B, G]
        best, chosen = cosines.max(dim=-1)
        client = torch.arange(len(chosen), device=chosen.device)[:, None]
        picked = parts["group"][client, chosen]  # [P, B, L, n, W]
        group_tokens = dict(enumerate(picked.unbind(2), start=self.shared_layers))
        outputs = tower.forward(x, self.shared_layers, depth, group_tokens, replace=False)
        logits = self.logits(features, tower.features(outputs))
        if "attraction" not in parts:
            return logits
        return with_term(logits, parts["attraction"][:, None] * (1 - best))

    def flops(self, prompt: Prompt, images: int) -> float:
        tokens = named_parts(prompt)["shared"].shape[-2] * (self.shared_layers + self.group_layers)
        return self.encoder.image_tower.flops(images, 0, tokens)


def with_term(logits: Tensor, term: Tensor) -> Tensor:
    """Return logits [P, B, C + 1] whose cross-entropy is that of `logits` plus a term [P, B] that is not negative.

    The further class, which is nobody's label, has the logit log(sum exp logits) + log(exp(term) - 1). It adds `term`
    to the logarithm of the softmax's denominator. So each example's loss has it, and so has each example's gradient.
    """
    term = term.to(logits).clamp(min=SMALLEST)
    # log(exp(term) - 1), written so that a large term does not overflow.
    further = logits.logsumexp(-1) + term + (-torch.expm1(-term)).log()
    return torch.cat([logits, further[..., None]], dim=-1)


@dataclass(frozen=True)
class Server(base.Server):
    shared: Tensor  # [S, n, W], the prompts of all images
    group: Tensor  # [G, L, n, W], the groups' prompts
    keys: Tensor  # [G, W]


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    shared: Tensor  # [S, n, W]
    group: Tensor  # [G, L, n, W]
    keys: Tensor  # [G, W]


@dataclass(frozen=True)
class ClientState(base.ClientState):
    """A client keeps no state."""


@dataclass(frozen=True)
class Upload(base.Upload):
    """Changes by the local steps."""

    shared: Tensor  # [K, S, n, W]
    group: Tensor  # [K, G, L, n, W]
    keys: Tensor  # [K, G, W]
    weight: Tensor  # [K], their weight in the averages


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def unused(settings: Settings, rounds: int, poisson: bool) -> list[str]:
    """Return in words that the shared prompts are never trained, if they are not."""
    part = "the shared prompts are"
    return untrained(settings.local_steps, settings.shared_share, "settings.sgpt", "shared_share", part)


def server_init(settings: Settings, init: InitContext) -> Server:
    draw, width, n = init.streams.common_normal, init.image_width, settings.prompt_length
    if settings.groups > width:
        raise ConfigError("settings.sgpt.groups", settings.groups, f"at most {width} keys of that width are orthogonal")
    shared, grouped = settings.layers(init.image_layers)
    group = token_deviation(width) * draw("group prompts", settings.groups, grouped, n, width)
    keys = torch.linalg.qr(draw("keys", width, settings.groups).cpu()).Q.T.contiguous()
    return Server(group.new_zeros(shared, n, width), group, keys.to(group))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    return ClientState()


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.shared, server.group, server.keys)


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    start = {name: tensor.expand(len(data), *tensor.shape) for name, tensor in vars(broadcast).items()}
    batches = data.batches(settings.local_steps, settings.batch_size or None, round_context.streams)
    first_part = islice(batches, first_steps(settings.local_steps, settings.shared_share))
    parameters = {"shared": start["shared"]}
    shared, _ = descend(settings.optimizer, None, dict, parameters, {}, first_part, gradients, round_context)
    parameters = {"group": start["group"], "keys": start["keys"]}
    fixed = shared | {"attraction": torch.full_like(data.weights, settings.attraction)}
    trained, _ = descend(settings.optimizer, None, dict, parameters, fixed, batches, gradients, round_context)
    changes = {name: tensor - start[name] for name, tensor in (shared | trained).items()}
    return Upload(**changes, weight=data.weights), state


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return Server(
        server.shared + uploads.mean("shared"),
        server.group + (1 - settings.group_momentum) * uploads.mean("group"),
        server.keys + (1 - settings.key_momentum) * uploads.mean("keys"),
    )


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {name: tensor[None] for name, tensor in vars(broadcast).items()}
