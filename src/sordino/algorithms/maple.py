"""MaPLe: tokens in the first layers of both towers, those of the image tower made of those of the text tower.

Khattak, Rasheed, Maaz, Khan, Khan, MaPLe: Multi-modal Prompt Learning, CVPR 2023 (arXiv 2210.03117), section 3.2, here
with federated averaging of all of it. In each of the first J layers M learned vectors P_j [M, E] stand in the context's
places of the text tower, and their images under a linear map,

    V_j = P_j W_j^T + b_j,    W_j [W, E],

stand as prompt tokens in the same layer of the image tower. A layer's tokens replace those of the layer before. Images
meet the prompt inside the image tower, so every image passes it in every step.

Authors' defaults: M = 2, J = 9 (or as many as the shorter tower has), SGD of rate 0.0035. Choices. The optimizer has
no momentum, no weight decay and a constant rate; in the authors' code it has 0.9, 0.0005 (both of Dassl) and a cosine
schedule after one of five epochs of warm-up. The first text tokens start at random, as those of all methods here, and
not at "a photo of a" (`initial_context` starts them at words). Initial maps are normal with the variance of torch's
own. The authors' batches of four are here 32.
"""

from typing import Any, Self

import torch
from torch import Tensor

from sordino.algorithms.averaged import (
    Broadcast,
    ClientState,
    Server,
    Upload,
    broadcast,
    client_init,
    client_round,
    disclosures,
    prompt,
    schedule,
    server_round,
)
from sordino.algorithms.base import InitContext, MethodInfo
from sordino.algorithms.deep_prompts import DeepPromptModel, initial_contexts, require_both_towers
from sordino.algorithms.layers import linear_weight
from sordino.algorithms.settings.maple import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, named_parts

__all__ = [
    "Broadcast",
    "ClientState",
    "Server",
    "Upload",
    "broadcast",
    "client_init",
    "client_round",
    "prompt",
    "schedule",
    "server_round",
]

ABOUT = MethodInfo(
    paper="Khattak et al., MaPLe, CVPR 2023 (arXiv 2210.03117)",
    personal="nothing",
    shared="tokens in the text tower, and maps that make those of the image tower of them",
    privacy="images stay; no guarantee on what tokens and maps tell about them",
    needs="a vision transformer, deep text prompts",
    discloses=disclosures("the tokens and the maps"),
    server_uses="mean",
)


class Model(DeepPromptModel):
    """Prompts with "contexts" [P, J, M, E], and maps "coupling" [P, J, W, E] with "coupling_bias" [P, J, W]."""

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        require_both_towers(encoder, "maple")
        return cls(encoder, classes)

    def tokens(self, prompt: Prompt) -> Tensor:
        parts = named_parts(prompt)
        return parts["contexts"] @ parts["coupling"].mT + parts["coupling_bias"][:, :, None]


def server_init(settings: Settings, init: InitContext) -> Server:
    contexts = initial_contexts(settings, init)
    numbers = range(len(contexts))
    maps = [linear_weight(init, f"coupling {layer}", init.image_width, init.context_width) for layer in numbers]
    coupling = torch.stack(maps).to(contexts)
    return Server({"contexts": contexts, "coupling": coupling, "coupling_bias": torch.zeros_like(coupling[..., 0])})
