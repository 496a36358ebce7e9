"""Conversion of file content to pictures: the formats that count as pictures, and the way each is read.

Content may come from anyone. So only raster formats that Pillow decodes by itself are opened; it
hands PostScript, for one, to an external program. A picture's size is checked before its pixels are
unpacked. HEIC needs the package `pillow-heif`, DICOM the package `pydicom`.
"""

from __future__ import annotations

import io
from functools import cache
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from sordino.errors import DataError
from sordino.pictures.brightness import eight_bits
from sordino.pictures.depths import GrayRange, depth_of, in_eight_bits
from sordino.pictures.dicom import draw_dicom, is_dicom

FORMATS = (
    *("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO"),
    *("PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),
)
# Pillow's own bound for a suspected decompression bomb: 256 MB of 24-bit pixels.
MAX_PIXELS = 89_478_485
# The largest file: as many pixels of three 16-bit colors, not compressed.
MAX_BYTES = 6 * MAX_PIXELS + (1 << 20)

# Endings of formats that need another package: that package, and the extra of this one that
# installs it.
OPTIONAL = {
    **dict.fromkeys((".dcm", ".dicom"), ("pydicom", "medical")),
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), ("pillow_heif", "heif")),
}
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@cache
def suffixes() -> frozenset[str]:
    """Return the lower-case file name endings ('.jpg', ...) of the formats that can be read here."""
    formats = _formats()
    endings = Image.registered_extensions().items()
    pillow = {suffix for suffix, name in endings if name in formats}
    dicom = {suffix for suffix in (".dcm", ".dicom") if remedy(suffix) is None}
    return frozenset(pillow | dicom)


def remedy(suffix: str) -> str | None:
    """Return the command that makes files of a lower-case ending readable; None if nothing helps or is missing."""
    package, extra = OPTIONAL.get(suffix, (None, None))
    if package is None or find_spec(package) is not None:
        return None
    return f"pip install 'sordino[{extra}]'"


def decode(content: bytes, gray_range: GrayRange | None = None, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Decode a file's content to a loaded picture: upright, opaque, 8 bits a channel, mode 'RGB' or 'L'.

    Transparent parts become white. Of an animation, the first frame is used.

    Args:
        content: the file's content.
        gray_range: the values that are black and white in gray pictures of more than 8 bits; None
            takes the file's.
        formats: those of `FORMATS` that are read; None: all, and DICOM. One file may be of two
            formats at once, so whoever admits some only must say so here.

    Raises:
        DataError: the content is not a whole picture, or its brightness is unknown. The message is
            the reason alone ("truncated", ...).
    """
    if not content:
        raise DataError("the file is empty")
    if formats is None and is_dicom(content):
        return draw_dicom(content, gray_range, MAX_PIXELS)
    try:
        with Image.open(io.BytesIO(content), formats=_formats() if formats is None else formats) as picture:
            width, height = picture.size
            if width * height == 0:
                raise DataError("the picture has no pixels")
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{width} x {height} pixels, more than the {MAX_PIXELS:,} that are read",
                )
            return _drawn(picture, content, gray_range)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(_unidentified(content)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"more than the {MAX_PIXELS:,} pixels that are read") from None
    except Exception as error:  # Pillow's readers raise errors of any type on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"damaged picture: {reason}") from error


def _drawn(
    picture: ImageFile.ImageFile,
    content: bytes,
    gray_range: GrayRange | None,
) -> Image.Image:
    """Load the pixels of an opened picture."""
    depth = depth_of(picture, content)
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    clear = upright.info.get("transparency") if upright.mode.startswith("I;16") else None
    plain = upright if depth is None else in_eight_bits(upright, depth, gray_range)
    if clear is not None:  # a 16-bit PNG names one value that is transparent
        white = np.where(np.asarray(upright) == clear, np.uint8(255), np.asarray(plain))
        return Image.fromarray(white)
    if plain.has_transparency_data:
        layer = (plain.convert("LA") if plain.mode == "La" else plain).convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return eight_bits(plain)


def _unidentified(content: bytes) -> str:
    """Return the reason why content that Pillow does not know cannot be read."""
    is_heif = content[4:8] == b"ftyp" and content[8:12] in HEIF_BRANDS
    if is_heif and (missing := remedy(".heic")):
        return f"a HEIC picture, which this installation cannot read: {missing}"
    return "not a picture in a known format"


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    if find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)
