"""PromptFolio: class features are a fixed mixture of those of a shared and of a personal context.

Pan, Huang, Shi, Federated Learning from Vision-Language Foundation Models: Theoretical Analysis and Method, NeurIPS
2024 (arXiv 2409.19610), section 5. With the features f_G of the shared and f_L of the personal context, both of unit
norm, a class has the feature

    (1 - theta) f_G + theta f_L,

which is not given unit norm again. Both contexts are trained at once; the shared one is averaged, the personal one
stays. With theta = 0 the method is PromptFL, and with theta = 1 every client learns alone.

The default theta is 0.2, and was not checked against the paper. In the authors' code it is 0.4 (`--frac_p`), which is
`personal = 0.4` here. As in FedOTP, both contexts start anywhere, all clients at the same two, and clients' optimizers
start afresh each round.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from sordino.algorithms import fedotp
from sordino.algorithms.base import MethodInfo
from sordino.algorithms.fedotp import (
    Broadcast,
    ClientState,
    Server,
    Upload,
    broadcast,
    client_init,
    client_round,
    prompt,
    schedule,
    server_init,
    server_round,
    side_by_side,
)
from sordino.algorithms.settings.promptfolio import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts

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
    "server_init",
    "server_round",
]

ABOUT: MethodInfo = replace(
    fedotp.ABOUT, paper="Pan et al., PromptFolio, NeurIPS 2024 (arXiv 2409.19610)", needs="text tower"
)


@dataclass(frozen=True)
class Model(PromptModel):
    """CoOp's model with the mixed class features of two contexts.

    Attributes: personal: theta, as in `Settings`.
    """

    personal: float = 0.2

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.personal)

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return the mixed features [P, C, D], shorter than 1 where the two contexts disagree."""
        parts = named_parts(prompt)  # by name: a file has them in any order
        shared, personal = self.text_features(torch.stack([parts["shared"], parts["personal"]], 1)).unbind(1)
        return (1 - self.personal) * shared + self.personal * personal

    def flops(self, prompt: Prompt, images: int) -> float:
        contexts = side_by_side(prompt)
        return contexts.shape[1] * self.encoder.text_flops(1, contexts.shape[2], self.classes)
