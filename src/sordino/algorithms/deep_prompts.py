"""The common part of methods with prompts in the first layers of both towers: MaPLe and PromptSRC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sordino.algorithms.base import InitContext
from sordino.encoders.base import Capability, DualEncoder
from sordino.encoders.cache import Kind, layer_kind
from sordino.encoders.prompt_model import Prompt, named_parts
from sordino.prompts.contexts import RANDOM_STANDARD_DEVIATION, initial_context
from sordino.prompts.visual import ImageSideModel


def require_both_towers(encoder: DualEncoder, method: str) -> None:
    """Refuse an encoder that takes no prompts in one of its towers.

    Raises:
        EncoderError: it does not.
    """
    encoder.require(Capability.VISUAL_PROMPTS, method)
    encoder.require(Capability.DEEP_TEXT_PROMPTS, method)


def prompted_layers(settings: Any, init: InitContext) -> int:
    """Return J, the number of first layers with prompts: as set, or as many as both towers have."""
    layers: int = settings.layers
    return min(layers, init.image_layers, init.text_layers)


def initial_contexts(settings: Any, init: InitContext) -> Tensor:
    """Return text tokens [J, M, E] that start at random, those of the first layer with words at their end."""
    shape = (prompted_layers(settings, init), settings.context_length, init.context_width)
    contexts = RANDOM_STANDARD_DEVIATION * init.streams.common_normal("contexts", *shape)
    first = initial_context(settings.initial_context, init.embed, contexts[0] / RANDOM_STANDARD_DEVIATION)
    return torch.cat([first[None], contexts[1:]])


@dataclass(frozen=True)
class DeepPromptModel(ImageSideModel):
    """A model whose prompts have "contexts" [P, J, M, E] in the text tower, and tokens in the image tower.

    Images are represented by the input of the image tower's first layer.
    """

    linear: ClassVar[bool] = False

    @property
    def reads(self) -> Kind:
        return layer_kind(0)

    def class_features(self, prompt: Prompt) -> Tensor:
        return self.deep_text_features(named_parts(prompt)["contexts"])

    def image_features(self, prompt: Prompt, images: Tensor) -> Tensor:
        """Return unit-norm features [P, B, D] of images [P, B, T, W] with the prompt's tokens in the first layers.

        As in the authors' code of both methods, tokens of the first layer pass the norm of CLIP's embeddings.
        """
        tower = self.encoder.image_tower
        tokens = dict(enumerate(self.tokens(prompt).unbind(1)))
        tokens[0] = tower.embedding_norm(tokens[0])
        return tower.features(tower.forward(images, 0, self.encoder.image_layers, tokens))

    def tokens(self, prompt: Prompt) -> Tensor:
        """Return the tokens of the image tower, [P, J, n, W]; here they are a part of the prompt."""
        return named_parts(prompt)["tokens"]

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        return self.logits(features, self.image_features(prompt, images))

    def flops(self, prompt: Prompt, images: int) -> float:
        length = named_parts(prompt)["contexts"].shape[-2]
        text = self.encoder.text_flops(1, length, self.classes)
        return text + self.encoder.image_tower.flops(images, 0, length)
