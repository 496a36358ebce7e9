"""PromptSRC: prompts in both towers that are held near the frozen towers' features, and averaged over rounds.

Khattak, Wasim, Naseer, Khan, Yang, Khan, Self-regulating Prompts: Foundational Model Adaptation without Forgetting,
ICCV 2023 (arXiv 2307.06948), section 3.2, here with federated averaging. M learned vectors stand in each of the first J
layers of the text tower, and other M in those of the image tower, each layer's in place of those of the layer before.
Beside the cross-entropy, the loss of an image with prompted feature x and logits l has

    lambda_t mean |w - w'|    of the prompted class features w and the frozen towers' w', over classes and dimensions,
    lambda_x mean |x - x'|    of the image feature, over dimensions,
    lambda_l KL(softmax l' | softmax l) / C    of the logits,

where w' is the mean of the class features over many hand-written sentences, and x' and l' are those without prompts.
The first term depends on no image, so mechanisms add no noise to it. Prompts that are used, and published, are a mean
of those of all rounds so far, with the weights of a normal density around a round near the end; training goes on from
the last ones. That mean is made of averages that everybody has seen, so it discloses nothing more.

Authors' defaults: M = 4, J = 9, weights 25, 10 and 1, 60 sentences, SGD of rate 0.0025; of 20 epochs the density's mean
is the 15th and its deviation one, which are here shares of the rounds. Choices. The optimizer has no momentum, no
weight decay and a constant rate; in the authors' code it has 0.9, 0.0005 (both of Dassl) and a cosine schedule after an
epoch of warm-up. The sentences are the first 60 of CLIP's that end with the class name, as a context stands before it
here. As in the code, their class features have unit norm after the mean, not before it. Prompts start at random.
Batches of four are here 32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.algorithms import averaged
from sordino.algorithms.averaged import ClientState, Upload, client_init, client_round, disclosures, schedule
from sordino.algorithms.base import InitContext, MethodInfo, RoundContext, Uploads
from sordino.algorithms.deep_prompts import DeepPromptModel, initial_contexts, require_both_towers
from sordino.algorithms.settings.promptsrc import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, cross_entropies
from sordino.prompts.sentences import SENTENCES
from sordino.prompts.visual import token_deviation

__all__ = ["ClientState", "Upload", "client_init", "client_round", "schedule"]

ABOUT = MethodInfo(
    paper="Khattak et al., PromptSRC, ICCV 2023 (arXiv 2307.06948)",
    personal="nothing",
    shared="tokens in the text tower and in the image tower",
    privacy="images stay; no guarantee on what the tokens tell about them",
    needs="a vision transformer, deep text prompts",
    discloses=disclosures("the tokens"),
    server_uses="mean",
)


@dataclass(frozen=True)
class Model(DeepPromptModel):
    """Prompts with "contexts" [P, J, M, E] and "tokens" [P, J, M, W].

    Attributes: text_guidance, image_guidance, logit_guidance, sentences: as in `Settings`.
    """

    text_guidance: float = 25.0
    image_guidance: float = 10.0
    logit_guidance: float = 1.0
    sentences: int = 60

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        require_both_towers(encoder, "promptsrc")
        weights = (settings.text_guidance, settings.image_guidance, settings.logit_guidance)
        return cls(encoder, classes, *weights, settings.sentences)

    def losses(self, features: Tensor, prompt: Prompt, images: Tensor, labels: Tensor) -> Tensor:
        prompted, tower = self.image_features(prompt, images), self.encoder.image_tower
        logits = self.logits(features, prompted)
        with torch.no_grad():
            frozen = tower.features(tower.forward(images, 0, self.encoder.image_layers))
            zero_shot = self.logits(self._frozen_classes.to(frozen), frozen).log_softmax(-1)
        apart = (prompted - frozen).abs().mean(-1)
        divergence = F.kl_div(logits.log_softmax(-1), zero_shot, reduction="none", log_target=True).mean(-1)
        return cross_entropies(logits, labels) + self.image_guidance * apart + self.logit_guidance * divergence

    def penalty(self, features: Tensor) -> Tensor | None:
        if not self.text_guidance:
            return None
        return self.text_guidance * (features - self._frozen_classes.to(features)).abs().mean((-2, -1))

    @cached_property
    def _frozen_classes(self) -> Tensor:
        """Return w' [C, D]."""
        contexts = [self.encoder.embed(sentence) for sentence in SENTENCES[: self.sentences]]
        with torch.no_grad():
            each = [self.encoder.deep_text_features(context[None], self.classes, unit=False) for context in contexts]
        return F.normalize(torch.stack(each).sum(0), dim=-1)


@dataclass(frozen=True)
class Server(averaged.Server):
    mean: Mapping[str, Tensor]  # of the rounds so far, shaped as `shared`
    log_weight: Tensor  # [], the logarithm of the sum of their weights


@dataclass(frozen=True)
class Broadcast(averaged.Broadcast):
    mean: Mapping[str, Tensor]  # the prompts to use


def server_init(settings: Settings, init: InitContext) -> Server:
    contexts = initial_contexts(settings, init)
    noise = init.streams.common_normal("tokens", len(contexts), settings.context_length, init.image_width)
    start = {"contexts": contexts, "tokens": token_deviation(init.image_width) * noise.to(contexts)}
    copies = {name: part.clone() for name, part in start.items()}  # a message does not take one tensor twice
    return Server(start, copies, torch.full_like(contexts[0, 0, 0], -torch.inf))


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.shared, server.mean)


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    shared = averaged.server_round(settings, server, uploads, round_context).shared
    logarithm = log_density(settings, round_context.round, round_context.rounds)
    total = torch.logaddexp(server.log_weight, torch.full_like(server.log_weight, logarithm))
    share = (logarithm - total).exp()  # of this round in the mean; 1 in the first
    mean = {name: old + share * (shared[name] - old) for name, old in server.mean.items()}
    return Server(shared, mean, total)


def log_density(settings: Settings, number: int, rounds: int) -> float:
    """Return the logarithm of a round's weight, up to a constant."""
    deviations = (number / rounds - settings.peak) / settings.spread
    return -(deviations**2) / 2


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {name: value[None] for name, value in broadcast.mean.items()}
