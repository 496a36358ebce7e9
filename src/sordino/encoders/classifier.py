"""One learned prompt in its frozen encoder: pictures in, classes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sordino.encoders.base import DualEncoder
from sordino.encoders.cache import STATES, Kind, layer_of
from sordino.encoders.encode import Skipped, encode, forward
from sordino.encoders.prompt_model import Prompt, PromptModel, map_prompt, prompt_count
from sordino.errors import DataError, SordinoError
from sordino.files import read_regular
from sordino.pictures.decoding import MAX_BYTES, decode
from sordino.pictures.depths import GrayRange

PICTURES_AT_ONCE = 64  # in one pass of the encoder

Picture = Path | str | Image.Image


@dataclass(frozen=True)
class Prediction:
    """The classes of one picture.

    Attributes:
        name: of the picture, as it was given.
        probabilities: class name to probability, the most probable class first; all C of them.
    """

    name: str
    probabilities: dict[str, float]

    @property
    def best(self) -> str:
        """The most probable class."""
        return next(iter(self.probabilities))


@dataclass(frozen=True)
class Classifier:
    """A prompt, and the model of the method that learned it.

    Attributes:
        model: how the prompt and an image make logits; holds the encoder and the C candidate classes.
        prompt: a stack of one prompt, tensors [1, ...].
        gray_range: the values that are black and white in gray files of more than 8 bits; None: as each file says.
    """

    model: PromptModel
    prompt: Prompt
    gray_range: GrayRange | None = None

    def __post_init__(self) -> None:
        if prompt_count(self.prompt) != 1:
            raise ValueError(f"a classifier takes one prompt, not {prompt_count(self.prompt)}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C candidate classes, in the order of logits."""
        return self.model.classes.names

    @property
    def encoder(self) -> DualEncoder:
        """The frozen encoder."""
        return self.model.encoder

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return logits [..., C] of pixels [..., 3, H, W], as the encoder's `transform` makes them."""
        logits = self.logits(self.features(pixels.reshape(-1, *pixels.shape[-3:])))
        return logits.view(*pixels.shape[:-3], logits.shape[-1])

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Return what the model reads of pixels [B, 3, H, W]: [B, ...], for most methods features [B, D]."""
        return forward(self.encoder, self.model.reads, pixels.to(self.encoder.device)).float()

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [..., C] of what the model reads, [..., D] or as `features` returns it."""
        rank = _rank(self.model.reads)
        flat = features.reshape(-1, *features.shape[features.ndim - rank :])
        prompt = map_prompt(self.prompt, lambda part: part.to(self.encoder.device))
        logits = self.model.predict(prompt, flat.to(self.encoder.device))[0]
        return logits.view(*features.shape[: features.ndim - rank], logits.shape[-1])

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the softmax of `logits`, [..., C]."""
        return self.logits(features).softmax(-1)

    def classify(self, pictures: Picture | Iterable[Picture]) -> list[Prediction]:
        """Rank the classes of pictures, in their order.

        Args:
            pictures: one or more. Files in any format that training reads, or pictures of Pillow. Those are taken as
                they are, so they must be upright and opaque, with 8 bits a channel.

        Raises:
            DataError: a picture cannot be read; the message names it. `ranked` leaves such pictures out. Or something
                is no picture, such as an array.
            EncoderError: see `ranked`.
        """
        predictions, skipped = self.ranked(pictures)
        if skipped:
            raise DataError(f"{skipped[0].name}: {skipped[0].reason}; leave it out, or give a picture that can be read")
        return predictions

    def ranked(self, pictures: Picture | Iterable[Picture]) -> tuple[list[Prediction], list[Skipped]]:
        """Rank the classes of the pictures that can be read, and name those that cannot, each in their order.

        Nothing of the pictures is kept on disk. See `classify` for what is taken.

        Raises:
            DataError: something is neither a file nor a picture of Pillow.
            EncoderError: the encoder lacks what the method reads, or gives features that are not finite.
        """
        images = _Pictures(_listed(pictures), self.gray_range)
        # A pass is filled up to its size, so few pictures need a small one.
        size = min(PICTURES_AT_ONCE, max(1, len(images)))
        encoded = encode(images, self.encoder, None, size, self.model.reads)
        readable = torch.from_numpy(np.flatnonzero(encoded.readable))
        if not len(readable):
            return [], list(encoded.skipped)
        probabilities = self.probabilities(encoded.features[readable]).cpu().double().numpy()
        names = [images.names[row] for row in readable.tolist()]
        predictions = [self._prediction(name, row) for name, row in zip(names, probabilities, strict=True)]
        return predictions, list(encoded.skipped)

    def check(self) -> None:
        """Classify a plain picture, to see that prompt, model and encoder fit together.

        Raises:
            EncoderError: the encoder lacks what the method needs.
            ValueError: the prompt lacks a tensor of the method, or one has another shape, or its numbers are too large.
        """
        plain = self.encoder.transform(Image.new("RGB", (32, 32), (128, 128, 128)))
        try:
            logits = self(plain)
        except SordinoError:
            raise
        except (RuntimeError, LookupError, ValueError, AssertionError) as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
        if logits.shape != (len(self.class_names),):
            raise ValueError(f"it gives logits of shape {tuple(logits.shape)} for {len(self.class_names)} classes")
        if not logits.isfinite().all():
            raise ValueError("it gives logits that are not finite")

    def _prediction(self, name: str, probabilities: NDArray[Any]) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")
        return Prediction(name, {self.class_names[index]: float(probabilities[index]) for index in order})


def told(probabilities: Tensor, top: int, digits: int) -> list[tuple[int, float]]:
    """Return what a service tells of one picture: the most probable classes, with rounded probabilities.

    All of it depends on the rounded values alone: the order of exact ones would tell what rounding hides.

    Args:
        probabilities: [C].
        top: how many classes. Of those that rounding makes equal, the first ones in the prompt's order.
        digits: decimals of a probability.
    """
    rounded = [round(value, digits) for value in probabilities.tolist()]
    order = sorted(range(len(rounded)), key=lambda index: -rounded[index])  # stable
    return [(index, rounded[index]) for index in order[:top]]


def _listed(pictures: Picture | Iterable[Picture]) -> list[Picture]:
    """Return one picture, or several, as a list.

    Raises:
        DataError: something is neither a file nor a picture of Pillow.
    """
    given: list[Any]
    if isinstance(pictures, Path | str | Image.Image) or hasattr(pictures, "__array__"):
        given = [pictures]
    else:
        given = list(pictures) if isinstance(pictures, Iterable) else [pictures]
    for at, item in enumerate(given):
        if not isinstance(item, Picture):
            kind = type(item).__name__
            raise DataError(
                f"picture {at} is of type {kind}; give a file's path or a picture of Pillow, such as "
                "Image.fromarray(array), or call the classifier with pixels [B, 3, H, W]"
            )
    return given


def _rank(kind: Kind) -> int:
    """Return how many trailing axes one image has in a kind of feature."""
    return 2 if kind in STATES or layer_of(kind) is not None else {"image": 1, "patch": 2, "pixels": 3}[kind]


@dataclass(frozen=True)
class _Pictures:
    """Files and pictures in memory, as `encode` asks for them."""

    given: Sequence[Picture]
    gray_range: GrayRange | None

    @property
    def names(self) -> Sequence[str]:
        return [f"picture {at}" if isinstance(item, Image.Image) else str(item) for at, item in enumerate(self.given)]

    def __len__(self) -> int:
        return len(self.given)

    def raw(self, index: int, /) -> bytes:
        picture = self.given[index]
        if isinstance(picture, Image.Image):
            return f"picture {index}".encode()  # in memory each is a picture of its own
        try:
            return read_regular(Path(picture), MAX_BYTES)
        except OSError as error:
            raise DataError((error.strerror or str(error)).lower()) from None

    def image(self, index: int, /) -> Image.Image:
        picture = self.given[index]
        return picture if isinstance(picture, Image.Image) else decode(self.raw(index), self.gray_range)
