"""Pictures before an encoder's own preprocessing: of any mode, and never so long that scaling them fills memory.

Preprocessing scales a picture's shorter side to some 250 pixels, and cuts out the middle
afterwards. A picture of 20,000 x 1 pixels, 138 bytes as a file, would be 5,120,000 x 256 in
between. That takes gigabytes.
"""

from __future__ import annotations

from PIL import Image

from sordino.pictures.brightness import rgb

__all__ = ["bounded", "rgb", "shrunk"]

# Largest ratio of the longer side to the shorter; preprocessing cuts off the rest anyway.
MAX_RATIO = 8
# The same for preprocessing that squeezes the whole picture into a square; here the result changes
# a little.
MAX_SQUEEZED = 64
# Pixels of a side, over its target, that are left before it is scaled down.
DETAIL = 4


def bounded(image: Image.Image) -> Image.Image:
    """Return the middle of a picture of more than `MAX_RATIO`, and other pictures unchanged.

    This is for preprocessing that cuts out a square. An even number of pixels is cut off, so the
    middle keeps its place. If the rest is scaled alike, the square that is cut out later is the
    same.
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
    """Return a picture of more than `MAX_SQUEEZED` with its longer side shrunk, and other pictures unchanged.

    This is for preprocessing that squeezes the whole picture into a square.

    Args:
        image: any picture.
        target: the square's side. At least `DETAIL` times as many pixels are left, if there were
            more.
    """
    longer, left = max(image.size), DETAIL * target
    if longer <= max(left, MAX_SQUEEZED * min(image.size)):
        return image
    size = (left, image.height) if image.width > image.height else (image.width, left)
    return rgb(image).resize(size, Image.Resampling.BOX)
