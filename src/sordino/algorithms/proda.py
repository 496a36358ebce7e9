"""ProDA: a distribution over class features, given by a set of contexts; training bounds the loss under it.

Lu, Liu, Zhang, Liu, Tian, Prompt Distribution Learning, CVPR 2022 (arXiv 2205.03340), section 3, here with federated
averaging. N contexts give each class N unit-norm features. Over them the classes' features are jointly normal with mean
mu_c and covariance Sigma_cc' between classes, diagonal in the D dimensions of a feature. The expected cross-entropy of
an image x of class y has an upper bound (Jensen's inequality, proposition 1), which is minimized:

    -log( exp(x . mu_y / tau) / sum over c of exp(x . mu_c / tau + x^T A_cy x / (2 tau^2)) ),
    A_cy = Sigma_cc + Sigma_yy - 2 Sigma_cy,

plus lambda times the mean absolute cosine between the features of the contexts alone, without a class name, so that
they do not become alike. Predictions use the mean features mu_c, which are not given unit norm again.

Authors' defaults: N = 32, batches of 4 contexts a step, M = 16, lambda = 0.1. Mean and covariance in training are those
of the step's contexts. The code of the method, as others carry it on, divides the covariance by one more than their
number, as here. Each client goes through the contexts in a random order of its own, anew after each pass. A pass goes
on over rounds: step t of round r is step (r - 1) local_steps + t of the run, also for a client that was absent before.
The rest of the contexts rest in a step but for an optimizer's momentum, and mechanisms noise the step's contexts only.
A context that a client did not train in a round enters the average as no change: where each client trains 4 of 8 a
round, a context moves by about half of the mean change of those who trained it. Choice: all contexts stand before the
class name; the paper has half of them around it or behind it.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sordino.algorithms.averaged import (
    Broadcast,
    ClientState,
    Server,
    Upload,
    at_clients,
    broadcast,
    changes,
    client_init,
    context_set,
    disclosures,
    prompt,
    schedule,
    server_round,
)
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext
from sordino.algorithms.settings.proda import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel, cross_entropies, named_parts
from sordino.privacy.gradients import Gradients
from sordino.randomness import Streams

__all__ = [
    "Broadcast",
    "ClientState",
    "Server",
    "Upload",
    "broadcast",
    "client_init",
    "prompt",
    "schedule",
    "server_round",
]

ABOUT = MethodInfo(
    paper="Lu et al., ProDA, CVPR 2022 (arXiv 2205.03340)",
    personal="nothing",
    shared="a set of contexts, over which class features are normal",
    privacy="images stay; no guarantee on what the contexts tell about them",
    needs="text tower",
    discloses=disclosures("the contexts"),
    server_uses="mean",
)


@dataclass(frozen=True)
class Model(PromptModel):
    """Contexts [P, N, M, E], N for each client, with the mean of their class features for predictions.

    Attributes: orthogonality: lambda, as in `Settings`.
    """

    orthogonality: float = 0.1
    linear: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.orthogonality)

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return unit-norm features [P, N, C + 1, D] under each context; the last are of no class name at all."""
        contexts = named_parts(prompt)["contexts"]
        nameless = self.encoder.text_features(contexts, self._nameless)
        return torch.cat([self.text_features(contexts), nameless], dim=-2)

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        return self.logits(features[:, :, :-1].mean(1), images)

    def losses(self, features: Tensor, prompt: Prompt, images: Tensor, labels: Tensor) -> Tensor:
        spread = self.encoder.logit_scale**2 * variances(features[:, :, :-1], images, labels) / 2
        return cross_entropies(self.scores(features, prompt, images) + spread, labels)

    def penalty(self, features: Tensor) -> Tensor | None:
        number = features.shape[1]
        if number == 1 or not self.orthogonality:
            return None
        nameless = features[:, :, -1]  # [P, N, D]
        others = ~torch.eye(number, dtype=torch.bool, device=features.device)
        cosines: Tensor = (nameless @ nameless.mT)[:, others]
        return self.orthogonality * cosines.abs().mean(-1)

    def flops(self, prompt: Prompt, images: int) -> float:
        contexts = named_parts(prompt)["contexts"]
        return contexts.shape[1] * self.encoder.text_flops(1, contexts.shape[2], self.classes)

    @cached_property
    def _nameless(self) -> ClassTokens:
        """Return the tokens that end a sentence without a class name."""
        return self.encoder.class_tokens([""], compete=False)


def variances(features: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Return x^T A_cy x, the variance of the difference between an image's products with two classes' features.

    Args:
        features: [P, N, C, D], of N contexts.
        images: [P, B, D].
        labels: [P, B], the y of each image.

    Returns:
        [P, B, C], zero for an image's own class.
    """
    deviations = features - features.mean(1, keepdim=True)  # [P, N, C, D]
    own = deviations.gather(2, labels[:, None, :, None].expand(-1, features.shape[1], -1, features.shape[3]))
    squares = images.square()  # [P, B, D]
    # A_cy is diagonal: the mean over contexts of (deviation of c - deviation of y)^2.
    of_all = torch.einsum("pbd,pncd->pbc", squares, deviations.square())
    of_own = torch.einsum("pbd,pnbd->pb", squares, own.square())
    between = torch.einsum("pbd,pnbd,pncd->pbc", squares, own, deviations)
    return (of_all + of_own[..., None] - 2 * between) / (features.shape[1] + 1)


def server_init(settings: Settings, init: InitContext) -> Server:
    return context_set(settings, init)


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    optimizer, rate = settings.optimizer, settings.optimizer.rate(round_context)
    contexts = at_clients(broadcast.shared, len(data))["contexts"]  # [K, N, M, E]
    kept = optimizer.initial_state(contexts)
    taken = (round_context.round - 1) * settings.local_steps
    chosen = context_batches(settings.contexts, settings.contexts_at_once, taken, round_context.streams)
    for batch in data.batches(settings.local_steps, settings.batch_size or None, round_context.streams):
        places = next(chosen)[:, :, None, None].expand(-1, -1, *contexts.shape[2:])
        part = gradients(dict, {"contexts": contexts.gather(1, places)}, {}, batch).values["contexts"]
        gradient = torch.zeros_like(contexts).scatter(1, places, part)
        contexts, kept = optimizer.step(contexts, gradient, kept, rate)
    return changes({"contexts": contexts}, broadcast, data), state


def context_batches(number: int, at_once: int, taken: int, streams: Streams) -> Iterator[Tensor]:
    """Yield for every step the numbers [K, n] of the contexts that each client trains; all come once in a pass.

    Args:
        number: of contexts.
        at_once: how many of them a step trains; the last step of a pass may train fewer.
        taken: steps of the run before this round, with which a pass may have begun.
        streams: the K clients' randomness.
    """
    whole = replace(streams, round=0)  # an order is that of a pass, in whichever round a step of it is
    done, begun = divmod(taken, math.ceil(number / at_once))
    for number_of_pass in itertools.count(done):
        generators = whole.generators(f"contexts in pass {number_of_pass}")
        orders = torch.stack([torch.from_numpy(generator.permutation(number)) for generator in generators])
        yield from orders.to(streams.device).split(at_once, dim=1)[begun:]
        begun = 0
