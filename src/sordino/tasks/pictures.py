"""File content to picture: which files count as pictures, and how each is read.

Content may come from anyone, so only raster formats that Pillow decodes by itself are opened (it hands PostScript to
an external program, for one), and a picture's size is checked before its pixels are unpacked.
"""

from __future__ import annotations

import io
from functools import cache

from PIL import Image, ImageOps, UnidentifiedImageError

from sordino.errors import DataError

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # Pillow's own bound for a suspected decompression bomb: 256 MB of 24-bit pixels


@cache
def suffixes() -> frozenset[str]:
    """The lower-case file name endings ('.jpg', ...) of the formats that this Pillow opens."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


def decode(content: bytes) -> Image.Image:
    """A picture from a file's content, its pixels loaded: upright, opaque, 8 bits a channel, mode 'RGB' or 'L'.

    Transparent parts become white. Of an animation, the first frame.

    Raises:
        DataError: the content is not a whole picture; the message is the reason alone ("truncated", ...).
    """
    if not content:
        raise DataError("the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as picture:
            width, height = picture.size
            if width * height == 0:
                raise DataError("the picture has no pixels")
            if width * height > MAX_PIXELS:
                raise DataError(f"{width} x {height} pixels, more than the {MAX_PIXELS:,} that are read")
            picture.load()
            return _plain(ImageOps.exif_transpose(picture))
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("not a picture in a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"more than the {MAX_PIXELS:,} pixels that are read") from None
    except Exception as error:  # Pillow's readers of broken files raise whatever their parsing stumbled over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"damaged picture: {reason}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _plain(picture: Image.Image) -> Image.Image:
    """The picture in mode 'RGB' or 'L'."""
    if picture.mode in ("RGB", "L"):
        return picture
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255 rather than scale
        return picture.convert("I").point(lambda value: value / 256).convert("L")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return picture.convert("L" if picture.mode in ("1", "LA", "I", "F") else "RGB")
