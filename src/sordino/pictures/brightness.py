"""Pictures of any mode and depth as 8-bit ones of the right brightness.

Pillow converts integers of more than 8 bits, and floating point, as if they lay between 0 and 255.
They become white or black. Here they are scaled between two values that stand for black and for
white.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sordino.errors import DataError

PIXELS_AT_ONCE = 1 << 20  # pixels that are scaled at once, in double precision


def is_deep(picture: Image.Image) -> bool:
    """Return true if a picture is gray with more than 8 bits a pixel (modes 'I;16' and its like, 'I', 'F')."""
    return picture.mode[:1] in ("I", "F")


def scaled(values: NDArray[np.generic], black: float, white: float) -> Image.Image:
    """Convert gray values [H, W] to an 8-bit picture: linear between black (0) and white (255), clipped beyond both.

    Args:
        values: integers of any size, or finite floating point.
        black, white: two different values; black may be the larger.
    """
    result = np.empty(values.shape, dtype=np.uint8)
    for rows in _chunks(values):
        share = (values[rows].astype(np.float64) - black) / (white - black)
        result[rows] = np.rint(255 * share.clip(0, 1))
    return Image.fromarray(result)


def uses_upper_half(values: NDArray[np.generic], low: float, high: float) -> bool:
    """Return true if any value lies above the middle of a range, or all values are `low`, which is black.

    If it is false, the range is probably that of the container alone, such as 12 bits in a file of
    16.
    """
    most = float(values.max())
    return most > (low + high) / 2 or (most == low and float(values.min()) == low)


def range_hint(values: NDArray[np.generic]) -> str:
    """Return a likely range for a message's remedy: the least whole number of bits that holds the values."""
    most = float(values.max())
    if values.dtype.kind == "f" and 0 < most <= 1:
        return "[0.0, 1.0]"
    return f"[0, {(1 << max(8, int(max(most, 0)).bit_length())) - 1}]"


def eight_bits(picture: Image.Image) -> Image.Image:
    """Convert a picture without transparency to mode 'L' or 'RGB', from any mode but deep gray.

    Raises:
        ValueError: Pillow knows no conversion.
    """
    if picture.mode in ("RGB", "L"):
        return picture
    if picture.mode in ("1", "LA", "La"):
        layer = picture.convert("LA") if picture.mode == "La" else picture
        return layer.convert("L")
    if picture.mode == "P" and "transparency" in picture.info:
        # Two steps, as Pillow warns if a palette's transparency is lost in one.
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture in memory to RGB; transparency is dropped.

    Only the mode tells the range of deep gray. 'I;16' ends at 65,535, and so does 'I', as Pillow
    reads 16-bit files as it. 'F' ends at 255, as Pillow converts to it. For files,
    `sordino.pictures.decoding` knows more.

    Raises:
        DataError: deep gray has values beyond this range, or none in its upper half.
    """
    if not is_deep(picture):
        return eight_bits(picture).convert("RGB")
    values = np.asarray(picture)
    high = 255.0 if picture.mode == "F" else 65535.0
    in_range = np.isfinite(values).all() and values.min() >= 0 and values.max() <= high
    if not in_range or not uses_upper_half(values, 0, high):
        raise DataError(
            f"a picture of mode {picture.mode!r} must have finite values from 0 to {high:.0f}, some of them in the "
            "upper half; scale it, and convert it to mode 'L'"
        )
    return scaled(values, 0, high).convert("RGB")


def _chunks(values: NDArray[np.generic]) -> Iterator[slice]:
    """Yield slices of rows, so that copies in double precision stay small."""
    step = max(1, PIXELS_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        yield slice(start, start + step)
