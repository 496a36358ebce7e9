"""The interface of frozen encoders: images to features, and prompts with class names to features.

A prompt is a *context*: M learned vectors of the token-embedding width E that stand before the
class name. Features of both sides have width D and unit norm, so their product is a cosine.
`logit_scale` is the inverse temperature. An encoder without a joint space has likelihoods of class names instead, see
`sordino.encoders.generative`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from sordino.encoders.cache import Kind
from sordino.encoders.capabilities import CAPABILITIES, Capability, with_capability
from sordino.encoders.frozen.replay import Replays
from sordino.encoders.visual_prompts import ImageTower
from sordino.errors import EncoderError

__all__ = ["CAPABILITIES", "Capability", "ClassTokens", "DualEncoder"]


@dataclass(frozen=True)
class ByLength:
    """The real tokens of C classes from the shortest name to the longest; classes of one length are adjacent.

    Attributes:
        groups: (number of classes, their length).
        order: [C], the classes in this order.
        rank: [C], the place of each class in it.
        rows: [R], where in the padded tokens [C L] the real tokens of all classes are, class after class.
        ends: [C], the last row of each class, in this order.
    """

    groups: tuple[tuple[int, int], ...]
    order: Tensor
    rank: Tensor
    rows: Tensor
    ends: Tensor

    @classmethod
    @torch.inference_mode(False)  # it is kept, and a later pass may want gradients
    def of(cls, lengths: Sequence[int], longest: int, device: torch.device) -> ByLength:
        """Sort classes of some lengths, padded to the longest, on the host; the result is on a device."""
        sizes = torch.tensor(lengths)
        order = sizes.argsort(stable=True)
        real = torch.arange(longest) < sizes[order, None]
        rows = (order[:, None] * longest + torch.arange(longest))[real]
        groups = tuple((lengths.count(length), length) for length in sorted(set(lengths)))
        on_device = (part.to(device) for part in (order, order.argsort(), rows, sizes[order].cumsum(0) - 1))
        return cls(groups, *on_device)


@dataclass(frozen=True)
class ClassTokens:
    """The tokens that follow the context in each class's sentence: the name and the closing ones, padded on the right.

    Attributes:
        names: the C class names as given.
        embeddings: [C, L, E], token embeddings without positions; L is the longest name's length.
        mask: [C, L], true where a token is real.
    """

    names: tuple[str, ...]
    embeddings: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Return the number of real tokens of each class. The host reads them once, wherever the mask lies."""
        return tuple(self.mask.sum(1).tolist())

    @cached_property
    def by_length(self) -> ByLength:
        """Return the classes' tokens in the order of the names' lengths."""
        return ByLength.of(self.lengths, self.mask.shape[1], self.mask.device)

    def part(self, start: int, stop: int) -> ClassTokens:
        """Return classes `start` to `stop` - 1, padded to the longest of them only; the same object each time."""
        if (start, stop) not in self._parts:
            length = max(self.lengths[start:stop])
            self._parts[start, stop] = ClassTokens(
                self.names[start:stop],
                self.embeddings[start:stop, :length],
                self.mask[start:stop, :length],
            )
        return self._parts[start, stop]

    @cached_property
    def _parts(self) -> dict[tuple[int, int], ClassTokens]:
        return {}


class DualEncoder(ABC):
    """A frozen image tower and a frozen text tower with a joint feature space.

    Attributes:
        name: the short name under which the encoder is listed.
        fingerprint: hex digest of the weights and of the image transform. Features of two encoders
            with the same fingerprint are interchangeable. It keys the feature cache and is written
            beside every saved prompt.
        capabilities: the encoder's abilities beyond text prompts.
        context_width: E, the width of a context vector.
        feature_width: D, the width of a feature.
        image_width, image_layers: of the image tower, where it takes visual prompts; 0 where it
            does not.
        text_layers: of the text tower, where it takes deep prompts; 0 where it does not.
        logit_scale: the inverse temperature that multiplies cosines into logits.
        device, dtype: device and precision of the towers. Features and contexts are float32 outside
            of them.
    """

    name: str
    fingerprint: str
    capabilities: frozenset[Capability]
    context_width: int
    feature_width: int
    image_width: int = 0
    image_layers: int = 0
    text_layers: int = 0
    logit_scale: float
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def transform(self, image: Image.Image) -> Tensor:
        """Apply the model's own preprocessing: any PIL image to float32 pixels [3, H, W] on the CPU."""

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """Return unit-norm features [B, D], float32 on the encoder's device, of pixels [B, 3, H, W]."""

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Return unit-norm features [B, P, D] of P patches in the joint space, of pixels [B, 3, H, W].

        Raises:
            EncoderError: the encoder has no patches.
        """
        self.require(Capability.PATCHES, "patch_features")
        raise AssertionError(f"{self.name} declares patches but does not compute them")

    @cached_property
    def replays(self) -> Replays:
        """Return the recorded passes through the text tower; there are some on CUDA devices only."""
        return Replays()

    @property
    def image_tower(self) -> ImageTower:
        """Return the image tower, for prompts inside of it.

        Raises:
            EncoderError: the image tower is no transformer.
        """
        self.require(Capability.VISUAL_PROMPTS, "image_tower")
        raise AssertionError(f"{self.name} declares visual prompts but has no tower for them")

    @abstractmethod
    def class_tokens(self, names: Sequence[str], compete: bool = True) -> ClassTokens:
        """Tokenize class names as they stand after a context, with the closing full stop and end token.

        Args:
            names: of C classes.
            compete: whether they are candidates for one image, so that each must read differently.

        Raises:
            EncoderError: two names that compete have the same tokens, or one has none.

            Warns:
            SordinoWarning: a name has words that the tokenizer does not know.
        """

    @abstractmethod
    def embed(self, text: str) -> Tensor:
        """Return the token embeddings [M, E] of a hand-written context.

        They are float32, without positions, start or end token.
        """

    @abstractmethod
    def text_features(self, context: Tensor, classes: ClassTokens) -> Tensor:
        """Compute the features of C sentences 'context, class name' for every context in a batch.

        Args:
            context: [..., M, E] float32; any leading axes (clients, prompts, candidates).
                Differentiable.
            classes: C classes.

        Returns:
            [..., C, D] unit-norm float32.
        """

    def image_state(self, pixels: Tensor, kind: Kind | None = None) -> Tensor:
        """Return what a generative model keeps of pixels [B, 3, H, W]: [B, S, W], one row a token.

        Raises:
            EncoderError: the encoder has a joint space and no likelihoods.
        """
        self.require(Capability.LIKELIHOODS, "image_state")
        raise AssertionError(f"{self.name} declares likelihoods but does not compute them")

    def deep_text_features(self, contexts: Tensor, classes: ClassTokens, unit: bool = True) -> Tensor:
        """Compute the features of C sentences whose context is another in each of the first layers.

        Args:
            contexts: [..., J, M, E] float32: the vectors that stand in the context's M places when layer j begins, for
                the first J layers, in place of what the layer before made of them. Differentiable.
            classes: C classes.
            unit: false leaves the features at the length that the tower gives them.

        Returns:
            [..., C, D] float32, of unit norm if asked for. One layer's are `text_features`.

        Raises:
            EncoderError: the encoder takes no deep prompts.
        """
        self.require(Capability.DEEP_TEXT_PROMPTS, "deep_text_features")
        raise AssertionError(f"{self.name} declares deep text prompts but does not compute them")

    def zero_shot_context(self) -> Tensor:
        """Return the token embeddings [M, E] of the hand-written context 'a photo of a'."""
        return self.embed("a photo of a")

    @abstractmethod
    def text_flops(self, contexts: int, context_length: int, classes: ClassTokens) -> float:
        """Count the floating-point operations of one forward `text_features` call on `contexts` contexts.

        Only matrix products that are really computed count. A multiply-add counts 2.
        """

    def classifier_rows(self) -> Tensor | None:
        """Return the rows [n, D] of the image tower's own classifier in the joint space, at unit norm.

        They stand for images of n public classes, without an image: they are part of the frozen
        weights. None if the tower has no classifier.
        """
        return None

    def require(self, capability: Capability, method: str) -> None:
        """Raise an EncoderError that names encoder, method and alternatives if `capability` is missing."""
        if capability not in self.capabilities:
            able = ", ".join(with_capability(capability)) or "none of the encoders here"
            raise EncoderError(
                f"encoder {self.name!r} has no {capability.value}, which {method} needs; encoders that do: {able}"
            )
