"""A frozen encoder and a list of classes: prompts in, logits out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.cache import Kind
from sordino.encoders.frozen.blocks import as_now

# The largest piece of work that is kept for a backward pass at once, in forward matrix-product
# FLOPs. Large enough that the products run at full rate, small enough that activations stay well
# below a gigabyte on a CPU.
FLOPS_AT_ONCE = {"cpu": 1e11}
# On an accelerator a pass may keep a quarter of its memory: a tower of width E keeps up to KEPT / E numbers for each
# (1.4 to 2.5 were seen). Where the memory is not told, 16 GiB are taken for it.
KEPT, KEPT_SHARE, UNTOLD_MEMORY = 2.5, 0.25, 2**34
# Numbers of a score that compares every image with every class in more than one product.
NUMBERS_AT_ONCE = 1 << 26

# P prompts as one stack: contexts [P, M, E], or named tensors [P, ...] if a prompt is more than a
# context.
Prompt = Tensor | Mapping[str, Tensor]


def named_parts(prompt: Prompt) -> dict[str, Tensor]:
    """Return the tensors of a prompt by name; a context alone is named "context"."""
    return {"context": prompt} if isinstance(prompt, Tensor) else dict(prompt)


def map_prompt(prompt: Prompt, change: Callable[[Tensor], Tensor]) -> Prompt:
    """Return the same prompt with `change` applied to each tensor."""
    if isinstance(prompt, Tensor):
        return change(prompt)
    return {name: change(part) for name, part in prompt.items()}


def prompt_count(prompt: Prompt) -> int:
    """Return P, the number of prompts in a stack."""
    return len(next(iter(named_parts(prompt).values())))


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy [K, B] of logits [K, B, C] with labels [K, B]."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


@dataclass(frozen=True)
class PromptModel:
    """The frozen model that every party holds, which makes logits of a prompt and an image.

    This one is CoOp's, which most methods share. Class features come from the context, and logits
    from their cosines with the image's feature. A method that scores otherwise has a subclass. A
    subclass changes the image's representation, the class features, the scores, or a penalty on
    prompts.

    Attributes:
        encoder: the dual encoder.
        classes: the C candidate classes.
        linear: whether logits are `logit_scale` times the image feature's products with the class
            features, plus a term that depends on neither, and the loss is their cross-entropy. The
            cotangent mechanism applies under this condition.
        prompts_images: whether the prompt enters the image tower, so that every example needs its
            own pass.
        conditions_on_images: whether class features depend on the image, so that every example
            needs its own pass through the text tower.
    """

    encoder: DualEncoder
    classes: ClassTokens
    linear: ClassVar[bool] = True
    prompts_images: ClassVar[bool] = False
    conditions_on_images: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        """Return the model of a method with these settings.

        Raises:
            EncoderError: the encoder lacks a capability that the method needs.
        """
        return cls(encoder, classes)

    @property
    def reads(self) -> Kind:
        """Return the kind of feature by which an image is represented; by default the image feature."""
        return "image"

    def class_features(self, prompt: Prompt) -> Tensor:
        """Compute unit-norm class features [P, C, D] of P prompts: all that does not depend on an image."""
        assert isinstance(prompt, Tensor)
        return self.text_features(prompt)

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        """Return logits [P, B, C] of images [P, B, ...], given the prompts and their class features.

        An image's logits depend on that image and its prompt alone, whatever else is in the stack.
        Mechanisms bound one example's own contribution; they cannot bound its effect on other
        examples' contributions.
        """
        return self.logits(features, images)

    def losses(self, features: Tensor, prompt: Prompt, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss [P, B] of each image [P, B, ...] with its label [P, B]; here the cross-entropy of its logits.

        A subclass with another loss has `linear = False`. As for `scores`, an image's loss depends on that image, its
        label and its prompt alone.
        """
        return cross_entropies(self.scores(features, prompt, images), labels)

    def linear_part(self, features: Tensor) -> Tensor:
        """Return the class features [P, C, D] that enter a linear model's logits."""
        return features

    def penalty(self, features: Tensor) -> Tensor | None:
        """Return the term [P] of a client's loss that depends on its prompt alone and on no image, or None."""
        return None

    def text(self, prompt: Prompt) -> list[str]:
        """Return the P prompts as text where they are words; an empty list where they are vectors."""
        return []

    def flops(self, prompt: Prompt, images: int) -> float:
        """Count the forward matrix-product FLOPs of one prompt with `images` images."""
        assert isinstance(prompt, Tensor)
        return self.encoder.text_flops(1, prompt.shape[-2], self.classes)

    def images_at_once(self, prompts: int) -> int:
        """Return the number of images for one pass with `prompts` prompts when no gradient is needed."""
        return max(1, NUMBERS_AT_ONCE // (prompts * len(self.classes)))

    def text_features(self, context: Tensor) -> Tensor:
        """Return unit-norm class features [..., C, D] of contexts [..., M, E].

        With many classes, one context's sentences may be too much to keep for a backward pass.
        Classes are then processed in parts, and backward recomputes each part.
        """
        return self._by_classes(self.encoder.text_features, context)

    def deep_text_features(self, contexts: Tensor) -> Tensor:
        """Return unit-norm class features [..., C, D] of contexts [..., J, M, E] for J layers, as `text_features`."""
        return self._by_classes(self.encoder.deep_text_features, contexts)

    def _by_classes(self, encode: Callable[[Tensor, ClassTokens], Tensor], context: Tensor) -> Tensor:
        flops = self.encoder.text_flops(1, context.shape[-2], self.classes)
        parts = math.ceil(flops / self._budget)
        if parts == 1:
            contexts = math.prod(context.shape[:-2])
            return self.encoder.replays(encode, context, self.classes, contexts * flops / self._budget)
        per_part = math.ceil(len(self.classes) / parts)
        starts = range(0, len(self.classes), per_part)
        pieces = [self.classes.part(start, start + per_part) for start in starts]
        encode = as_now(encode)  # backward recomputes in a thread of its own
        features = [checkpoint(encode, context, piece, use_reentrant=False) for piece in pieces]
        return torch.cat(features, dim=-2)

    def logits(self, text: Tensor, images: Tensor) -> Tensor:
        """Return logits [K, B, C] of class features [K, C, D] and image features [K, B, D], or [B, D] shared by all."""
        return self.encoder.logit_scale * images @ text.mT

    def prompts_at_once(self, prompt: Prompt, images: int) -> int:
        """Return the number of such prompts for one pass with `images` images each.

        It depends on sizes only, so that results reproduce.
        """
        return max(1, math.floor(self._budget / self.flops(prompt, images)))

    @torch.no_grad()
    def predict(self, prompt: Prompt, images: Tensor) -> Tensor:
        """Return logits [P, T, C] of P prompts on the same images [T, ...], with a bounded amount of work at a time."""
        count, at_once = prompt_count(prompt), self.prompts_at_once(prompt, 1)
        rows = []
        for prompts in torch.arange(count).split(at_once):
            chunk = map_prompt(prompt, lambda part, chosen=prompts: part[chosen.to(part.device)])  # type: ignore[misc]
            features = self.class_features(chunk)
            pieces = images.split(self.images_at_once(len(prompts)))
            shared = [piece.expand(len(prompts), *piece.shape) for piece in pieces]
            rows.append(torch.cat([self.scores(features, chunk, piece) for piece in shared], dim=1))
        return torch.cat(rows)

    @property
    def _budget(self) -> float:
        encoder = self.encoder
        if encoder.device.type in FLOPS_AT_ONCE:
            return FLOPS_AT_ONCE[encoder.device.type]
        numbers = KEPT_SHARE * (device_memory(encoder.device) or UNTOLD_MEMORY) / encoder.dtype.itemsize
        return numbers * encoder.context_width / KEPT


@cache
def device_memory(device: torch.device) -> int:
    """Return the bytes of an accelerator's memory; 0 where that is not told."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
