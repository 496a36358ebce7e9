"""Models that methods on the image side share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from sordino.encoders.cache import Kind, layer_kind
from sordino.encoders.prompt_model import Prompt, PromptModel, prompt_count

# Images in one pass through an image tower. A vision transformer of usual size keeps some 10 to 100
# MB of activations an image for a backward pass, and a few MB without one.
IMAGES_AT_ONCE = {"backward": 32, "forward": 128}


def token_deviation(width: int) -> float:
    """Return the standard deviation of initial prompt tokens.

    It is that of VPT's uniform numbers in a ViT-B/16 of its width.
    """
    return 1 / math.sqrt(width)


@dataclass(frozen=True)
class ImageSideModel(PromptModel):
    """A model whose prompt enters the image tower, so every client's images need their own passes."""

    linear: ClassVar[bool] = False
    prompts_images: ClassVar[bool] = True

    def prompts_at_once(self, prompt: Prompt, images: int) -> int:
        fit = max(1, IMAGES_AT_ONCE["backward"] // max(1, images))
        return min(fit, super().prompts_at_once(prompt, images))

    def images_at_once(self, prompts: int) -> int:
        return max(1, IMAGES_AT_ONCE["forward"] // prompts)


@dataclass(frozen=True)
class HandWrittenHeadModel(ImageSideModel):
    """A model with prompts in the image tower only. Class features are those of a hand-written prompt, computed once.

    Attributes:
        hand_written: the words before the class name.
        first_layer: the first layer with prompts; images are represented by its input.
    """

    hand_written: str = "a photo of a"
    first_layer: int = 0

    @property
    def reads(self) -> Kind:
        return layer_kind(self.first_layer)

    def class_features(self, prompt: Prompt) -> Tensor:
        return self._head.expand(prompt_count(prompt), -1, -1)

    @cached_property
    def _head(self) -> Tensor:
        """Compute the class features [C, D] of the hand-written prompt."""
        with torch.inference_mode(False), torch.no_grad():  # it is kept, and a later pass may want gradients
            return self.text_features(self.encoder.embed(self.hand_written)[None])[0]
