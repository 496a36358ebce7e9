"""The pictures that an attacker shows to a served prompt: its own, and variations of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageStat
from torch import Tensor

from sordino.encoders.base import DualEncoder
from sordino.encoders.cache import Kind
from sordino.encoders.encode import encode, tell_skipped
from sordino.errors import DataError
from sordino.progress import Progress
from sordino.randomness import derive_key, generator
from sordino.tasks.images import ImageSet

STAGE = "audit: encode an attacker's pictures"
LONGEST = 512  # pixels of a side, of a picture that is made
SHIFT = 0.05  # of a side
ANGLES = (-10, -5, 5, 10)  # degrees

# What Choquette-Choo et al. (ICML 2021) ask with: shifts along both axes, and rotations; and the picture as it is.
VARIANTS: tuple[tuple[float, float, float], ...] = (
    (0, 0, 0),
    *((angle, 0, 0) for angle in ANGLES),
    *((0, x, y) for x, y in ((-SHIFT, 0), (SHIFT, 0), (0, -SHIFT), (0, SHIFT))),
)


@dataclass(frozen=True)
class Made:
    """Pictures that are made when they are asked for, as `encode` asks for them. Each is one of its own."""

    make: Callable[[int], Image.Image]
    count: int

    @property
    def names(self) -> Sequence[str]:
        """Name them by their numbers."""
        return [f"an attacker's picture {index}" for index in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def raw(self, index: int, /) -> bytes:
        """Return what identifies a picture."""
        return index.to_bytes(8)

    def image(self, index: int, /) -> Image.Image:
        """Make a picture."""
        return self.make(index)


def encoded(pictures: Made, encoder: DualEncoder, kinds: Sequence[Kind], progress: Progress) -> dict[Kind, Tensor]:
    """Return the features [n, ...] of pictures, by kind, on the encoder's device. Nothing is kept on the disk.

    Raises:
        DataError: one of them cannot be read.
    """
    found: dict[Kind, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        result = encode(pictures, encoder, None, kind=kind, progress=lambda done, total: progress(STAGE, done, total))
        if result.skipped:
            tell_skipped(result.skipped)
            raise DataError(f"{result.skipped[0].name}: {result.skipped[0].reason}; leave this attack out")
        found[kind] = result.features.to(encoder.device)
    return found


def own_and_blended(images: ImageSet, rows: Sequence[int], count: int, seed: int) -> Made:
    """Return `count` pictures to ask with: an attacker's own in random order, and then blends of two of them.

    A blend is a part of one picture, with another laid over it. Blends cost an attacker nothing, and they lie between
    classes, where answers tell most.

    Args:
        images: the data set.
        rows: of the attacker's own pictures.
        count: of pictures.
        seed: of the attacker's randomness.
    """
    order = generator(seed, "own pictures").permutation(np.asarray(rows)).tolist()

    def make(index: int) -> Image.Image:
        if index < len(order):
            return images.image(order[index])
        rng = generator(derive_key(seed, "blend", index), "blend")
        one, other = (images.image(order[int(place)]).convert("RGB") for place in rng.integers(len(order), size=2))
        one.thumbnail((LONGEST, LONGEST))
        share = float(rng.uniform(0.7, 1.0))
        width, height = (max(1, round(side * share)) for side in one.size)
        left, top = (int(rng.integers(room + 1)) for room in (one.width - width, one.height - height))
        one = one.crop((left, top, left + width, top + height))
        return Image.blend(one, other.resize(one.size), float(rng.uniform(0.1, 0.6)))

    return Made(make, count)


def varied(images: ImageSet, rows: Sequence[int]) -> Made:
    """Return every picture in all variants, one picture after the other: row i is variant i % V of picture i // V."""

    def make(index: int) -> Image.Image:
        image = images.image(rows[index // len(VARIANTS)])
        angle, right, down = VARIANTS[index % len(VARIANTS)]
        if not (angle or right or down):
            return image
        image = image.convert("RGB")
        image.thumbnail((LONGEST, LONGEST))
        moved = (round(right * image.width), round(down * image.height))
        return image.rotate(angle, Image.Resampling.BILINEAR, translate=moved, fillcolor=_border(image))

    return Made(make, len(rows) * len(VARIANTS))


def _border(image: Image.Image) -> tuple[int, ...]:
    """Return the median color of a picture's upper edge, which what is moved in gets."""
    return tuple(int(value) for value in ImageStat.Stat(image.crop((0, 0, image.width, 1))).median)


def by_variant(features: Tensor) -> Tensor:
    """Return features [n V, ...] of `varied` as [V, n, ...]."""
    apart: Tensor = features.unflatten(0, (-1, len(VARIANTS)))
    return apart.transpose(0, 1)


def halves(rows: Sequence[int] | np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Divide places [T] of the test pictures at random: the attacker's own half, and the half that judges it."""
    order = torch.from_numpy(generator(seed, "halves of the test pictures").permutation(len(rows)))
    return order[: len(rows) // 2].sort().values, order[len(rows) // 2 :].sort().values
