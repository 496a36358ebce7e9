"""PLOT: several shared contexts; optimal transport matches them with patches of the image.

Chen, Yao, Song, Li, Rao, Zhang, PLOT: Prompt Learning with Optimal Transport for Vision-Language Models, ICLR 2023
(arXiv 2210.01253), section 3, here with federated averaging. An image is its V patch features, a class the N features
that N contexts give its name. A plan T [N, V] of balanced transport carries 1 / N from each context and 1 / V to each
patch at the least cost 1 - cos, with an entropy term; the logit is sum T cos / tau. The plan is a constant when the
loss is differentiated. With one context each patch counts alike, and with one patch too the logit is CoOp's.

It is the model of FedOTP, which has two contexts, one of them personal, and carries only part of the patches' mass.
Authors' defaults: N = 4, M = 16, entropy weight 0.1, at most 100 iterations, tolerance 0.01. As in FedOTP, and unlike
their code, the iterations of each image and class end by themselves, so that no image decides on others' plans.
"""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from sordino.algorithms import fedotp
from sordino.algorithms.averaged import (
    Broadcast,
    ClientState,
    Server,
    Upload,
    broadcast,
    client_init,
    client_round,
    context_set,
    disclosures,
    prompt,
    schedule,
    server_round,
)
from sordino.algorithms.base import InitContext, MethodInfo
from sordino.algorithms.settings.plot import Settings
from sordino.encoders.base import Capability, ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, named_parts

__all__ = [
    "Broadcast",
    "ClientState",
    "Server",
    "Settings",
    "Upload",
    "broadcast",
    "client_init",
    "client_round",
    "prompt",
    "schedule",
    "server_round",
]

ABOUT = MethodInfo(
    paper="Chen et al., PLOT, ICLR 2023 (arXiv 2210.01253)",
    personal="nothing",
    shared="several contexts",
    privacy="images stay; no guarantee on what the contexts tell about them",
    needs="text tower, patch features",
    discloses=disclosures("the contexts"),
    server_uses="mean",
)


@dataclass(frozen=True)
class Model(fedotp.Model):
    """FedOTP's model of balanced transport, with contexts [P, N, M, E] that are one tensor."""

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        encoder.require(Capability.PATCHES, "plot")
        return cls(encoder, classes, 1.0, settings.regularization, settings.iterations, settings.tolerance)

    def class_features(self, prompt: Prompt) -> Tensor:
        return self.text_features(named_parts(prompt)["contexts"])

    def flops(self, prompt: Prompt, images: int) -> float:
        contexts = named_parts(prompt)["contexts"]
        return contexts.shape[1] * self.encoder.text_flops(1, contexts.shape[2], self.classes)


def server_init(settings: Settings, init: InitContext) -> Server:
    return context_set(settings, init)
