"""A frozen encoder and a list of classes: contexts in, logits out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sordino.encoders.base import ClassTokens, DualEncoder

# The largest piece of work that is kept for a backward pass at once, in forward matrix-product FLOPs. Large enough that
# the products run at full rate, small enough that activations stay well below a gigabyte on a CPU.
FLOPS_AT_ONCE = {"cpu": 1e11}
FLOPS_AT_ONCE_ACCELERATED = 2e12


@dataclass(frozen=True)
class PromptModel:
    """The frozen model that every party holds.

    Attributes:
        encoder: the dual encoder.
        classes: the C candidate classes.
    """

    encoder: DualEncoder
    classes: ClassTokens

    def text_features(self, context: Tensor) -> Tensor:
        """Contexts [..., M, E] to unit-norm class features [..., C, D].

        So many classes that one context's sentences are too much to keep for a backward pass are taken a part at a
        time, and each part is computed once more when its gradient is wanted.
        """
        budget = FLOPS_AT_ONCE.get(self.encoder.device.type, FLOPS_AT_ONCE_ACCELERATED)
        parts = math.ceil(self.encoder.text_flops(1, context.shape[-2], self.classes) / budget)
        if parts == 1:
            return self.encoder.text_features(context, self.classes)
        per_part = math.ceil(len(self.classes) / parts)
        starts = range(0, len(self.classes), per_part)
        pieces = [self.classes.part(start, start + per_part) for start in starts]
        features = [checkpoint(self.encoder.text_features, context, piece, use_reentrant=False) for piece in pieces]
        return torch.cat(features, dim=-2)

    def logits(self, text: Tensor, images: Tensor) -> Tensor:
        """Class features [K, C, D] and image features [K, B, D] (or [B, D], shared by all) to logits [K, B, C]."""
        return self.encoder.logit_scale * images @ text.mT

    def contexts_at_once(self, length: int) -> int:
        """How many contexts of `length` tokens are worth one pass; depends on sizes only, so that results reproduce."""
        budget = FLOPS_AT_ONCE.get(self.encoder.device.type, FLOPS_AT_ONCE_ACCELERATED)
        return max(1, math.floor(budget / self.encoder.text_flops(1, length, self.classes)))

    @torch.no_grad()
    def text_features_in_chunks(self, context: Tensor) -> Tensor:
        """`text_features` of contexts [K, M, E] without gradients, a bounded number at a time: [K, C, D]."""
        chunks = context.split(self.contexts_at_once(context.shape[-2]))
        return torch.cat([self.text_features(chunk) for chunk in chunks])
