"""Pictures before an encoder's own preprocessing: of any mode, and never so long that scaling them fills memory.

Preprocessing scales a picture's shorter side to some 250 pixels, and cuts out the middle afterwards. A picture of
20,000 x 1 pixels, 138 bytes as a file, would be 5,120,000 x 256 in between, which takes gigabytes.
"""

from __future__ import annotations

from PIL import Image

from sordino.pictures.brightness import rgb

__all__ = ["bounded", "rgb", "shrunk"]

MAX_RATIO = 8  # of the longer side to the shorter: what lies further out is cut off by preprocessing anyway
MAX_SQUEEZED = 64  # likewise where the whole picture is squeezed into a square: here it changes what is seen, a little
DETAIL = 4  # times a side's target: pixels that are left of a side before it is scaled down


def bounded(image: Image.Image) -> Image.Image:
    """The middle of a picture of more than `MAX_RATIO`, for preprocessing that cuts out a square; others as they are.

    The middle stays where it is, as an even number of pixels is cut off: where the rest is scaled alike, what is cut
    out of it later is the same.
    """
    longer, shorter = max(image.size), min(image.size)
    kept = MAX_RATIO * shorter + (longer - MAX_RATIO * shorter) % 2
    if longer <= kept:
        return image
    first = (longer - kept) // 2
    if image.width > image.height:
        return image.crop((first, 0, first + kept, image.height))
    return image.crop((0, first, image.width, first + kept))


def shrunk(image: Image.Image, target: int) -> Image.Image:
    """A picture of more than `MAX_SQUEEZED` with its longer side shrunk, for preprocessing that squeezes all of it.

    Args:
        image: any picture; others are returned as they are.
        target: the square's side. `DETAIL` times as many pixels are left, if there were more.
    """
    longer, left = max(image.size), DETAIL * target
    if longer <= max(left, MAX_SQUEEZED * min(image.size)):
        return image
    size = (left, image.height) if image.width > image.height else (image.width, left)
    return rgb(image).resize(size, Image.Resampling.BOX)
