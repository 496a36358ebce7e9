"""The range of a file's samples, as the file states it, for samples of more than 8 bits or with a sign.

A range is *stated* in one of these ways:

- by a TIFF's SMinSampleValue and SMaxSampleValue (TIFF 6.0, section 19). MinSampleValue and
  MaxSampleValue are statistics that must not change how a picture looks (section 8);
- by a depth that is not the container's (12-bit TIFF and JPEG 2000);
- by a PGM's maximum other than 65,535;
- by a PNG's sBIT chunk.

Otherwise the range is the container's: 0 to 65,535 for 16 bits without a sign, 0 to 1 for floating
point, none for 32 bits and for signed samples. A container's range is accepted only if a value lies
in its upper half. 12 bits in a 16-bit file would be nearly black, and no rule that looks at one
picture alone can tell them from a dark picture of 16 bits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from sordino.errors import DataError
from sordino.pictures.brightness import is_deep, range_hint, scaled, uses_upper_half

GrayRange = tuple[float, float]  # black, white

BITS, PHOTOMETRIC, SAMPLE_FORMAT, S_MIN, S_MAX = 258, 262, 339, 340, 341  # tags of a TIFF
UNSIGNED, SIGNED, FLOATING = 1, 2, 3  # values of SampleFormat
WHITE_IS_ZERO = 0  # a value of PhotometricInterpretation
PNG_START = 8  # length of a PNG's signature
CODESTREAM = b"\xff\x4f\xff\x51"  # the start of a JPEG 2000 codestream
REMEDY = "set gray_range to the values of black and white"


class UnknownRange(DataError):
    """A whole picture of more than 8 bits, of which nobody says what values are black and white."""


@dataclass(frozen=True)
class Depth:
    """The interpretation of samples.

    Attributes:
        bits: bits of a sample in the file.
        low, high: the range of Pillow's values; None if the file does not give one.
        stated: whether the file itself states the range, rather than its container.
        unit: Pillow's value over the sample in the file.
        inverted: whether `low` is white.
        dtype: the type of the samples' bytes, if Pillow takes them for another.
        significant: the significant ones of a PNG's 16 bits, from its sBIT chunk; None without one.
    """

    bits: int
    low: float | None = None
    high: float | None = None
    stated: bool = False
    unit: float = 1.0
    inverted: bool = False
    dtype: type[np.generic] | None = None
    significant: int | None = None


def depth_of(picture: ImageFile.ImageFile, content: bytes) -> Depth | None:
    """Return the depth of an opened picture that is not loaded yet; None for at most 8 bits without a sign."""
    if picture.format == "TIFF":
        return _tiff(picture)
    if picture.format == "PPM":
        return _pnm(picture)
    if picture.format == "PNG":
        return _png(content)
    if picture.format == "JPEG2000":
        return _jpeg2000(content)
    return Depth(16, 0, 65535) if is_deep(picture) else None  # an ICO holds a PNG


def in_eight_bits(picture: Image.Image, depth: Depth, given: GrayRange | None) -> Image.Image:
    """Convert a loaded picture of such a depth to 8 bits.

    Args:
        picture: the picture as Pillow decodes it.
        depth: its depth; see `depth_of`.
        given: the user's samples that are black and white; they override the file's.

    Raises:
        DataError: the range is not known; the message gives the remedy.
    """
    if picture.mode[:1] not in ("I", "F") and depth.dtype is None:
        return _color(picture, depth, given)
    values = np.asarray(picture)
    if depth.dtype is not None:
        values = values.view(depth.dtype)
    if not np.isfinite(values).all():
        raise DataError("some of its pixels are not finite; replace them")
    if given is not None:
        low, high = (depth.unit * value for value in given)
    elif depth.stated and depth.low is not None and depth.high is not None:
        low, high = depth.low, depth.high
    else:
        low, high = _container(values, depth)
    return scaled(values, high, low) if depth.inverted else scaled(values, low, high)


def _container(values: NDArray[np.generic], depth: Depth) -> GrayRange:
    """Return the container's range if it is plausible, or that of a PNG's significant bits.

    Raises:
        DataError: the range is not known, or no value lies in its upper half.
    """
    if depth.significant is not None and not _is_shifted(values, depth.significant):
        return 0, (1 << depth.significant) - 1
    kind = {"f": "floating-point", "u": "unsigned", "i": "signed"}[values.dtype.kind]
    finding = f"{depth.bits}-bit {kind} gray from {values.min():g} to {values.max():g} that states no range of its own"
    if depth.low is None or depth.high is None or values.min() < depth.low or values.max() > depth.high:
        raise UnknownRange(f"{finding}: {REMEDY}, e.g. {range_hint(values)}")
    if not uses_upper_half(values, depth.low, depth.high):
        raise UnknownRange(
            f"{finding}, with nothing in the upper half of {depth.low:g} to {depth.high:g}: {REMEDY}, "
            f"e.g. {range_hint(values)}"
        )
    return depth.low, depth.high


def _is_shifted(values: NDArray[np.generic], bits: int) -> bool:
    """Return true if values of `bits` significant bits were scaled up to 16, as the PNG standard asks (section 12.4).

    Many writers leave them as they are. Then some values cannot be the result of scaling up.
    """
    whole = values.astype(np.uint32)
    if whole.max() >= 1 << bits:
        return True
    upper = whole >> (16 - bits)
    filled = upper << (16 - bits)
    return bool(((whole == filled) | (whole == filled | upper >> (2 * bits - 16))).all())


def _color(picture: Image.Image, depth: Depth, given: GrayRange | None) -> Image.Image:
    """Accept colors of more than 8 bits, of which Pillow keeps the upper 8.

    If all of these are below 128, the range is not known: the lower bits may be the ones that
    count.

    Raises:
        DataError: the range is not known.
    """
    colors = np.asarray(picture)[..., :3]
    whole = given is not None and given[0] == 0 and given[1] * depth.unit == (1 << depth.bits) - 1
    if not (depth.stated or whole or colors.max() > 127):
        raise UnknownRange(
            f"{depth.bits}-bit colors with nothing in the upper half of 0 to {(1 << depth.bits) - 1}: convert it to "
            f"8 bits a color, or, if it is as dark as that, set gray_range to [0, {(1 << depth.bits) - 1}]"
        )
    return picture


def _tiff(picture: ImageFile.ImageFile) -> Depth | None:
    tags = picture.tag_v2  # type: ignore[attr-defined]
    bits, form = _first(tags.get(BITS), 1), _first(tags.get(SAMPLE_FORMAT), UNSIGNED)
    if not is_deep(picture):
        if form == SIGNED:
            return _stated(Depth(8, dtype=np.int8), tags)
        return Depth(bits) if bits > 8 and picture.mode != "CMYK" else None
    depth = Depth(bits, inverted=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    if form == FLOATING:
        depth = replace(depth, low=0, high=1)
    elif form == UNSIGNED and bits <= 16:
        depth = replace(depth, low=0, high=(1 << bits) - 1, stated=bits < 16)
    elif form == UNSIGNED:
        depth = replace(depth, dtype=np.uint32)
    return _stated(depth, tags)


def _stated(depth: Depth, tags: object) -> Depth:
    """Set SMinSampleValue and SMaxSampleValue, if a TIFF has both and they form a range."""
    low, high = (_first(tags.get(tag), None) for tag in (S_MIN, S_MAX))  # type: ignore[attr-defined]
    if low is None or high is None or not float(low) < float(high) < float("inf"):
        return depth
    return replace(depth, low=float(low), high=float(high), stated=True)


def _first(value: object, default: object) -> int:
    """Return a tag's value, or the first of one a sample."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    return default if value is None else value  # type: ignore[return-value]


def _pnm(picture: ImageFile.ImageFile) -> Depth | None:
    """Return the depth of PGM and PPM, which Pillow scales to 65,535 (gray) or 255 (colors), and of PFM."""
    if picture.mode == "F":
        # A factor on the file's values, but no standard defines the unit of the result.
        scale = float(picture.info.get("scale", 1))
        return Depth(32, 0, 1) if scale == 1 else Depth(32)
    args, codec = picture.tile[0].args, picture.tile[0].codec_name
    stated = args[1] if isinstance(args, tuple) and codec in ("ppm", "ppm_plain") else None
    assumed = 65535 if is_deep(picture) else 255
    maximum = assumed if stated is None else int(stated)
    if maximum <= 255:
        return None
    return Depth(maximum.bit_length(), 0, 65535, stated=maximum != 65535, unit=65535 / maximum)


def _png(content: bytes) -> Depth | None:
    """Return a PNG's depth, from its header and the sBIT chunk, which comes before the pixels."""
    if content[24] != 16:
        return None
    place = PNG_START
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"IDAT":
            break
        if kind == b"sBIT" and length and 8 < content[place + 8] < 16:
            return Depth(16, 0, 65535, significant=content[place + 8])
        place += length + 12
    return Depth(16, 0, 65535)


def _jpeg2000(content: bytes) -> Depth | None:
    """Return a JPEG 2000's depth, from the first component's precision in the SIZ segment.

    Pillow shifts gray up to 16 bits and colors to 8.
    """
    start = content.find(CODESTREAM)
    if start < 0 or start + 42 >= len(content):
        return None
    bits = (content[start + 42] & 0x7F) + 1
    if bits <= 8:
        return None
    unit = 2.0 ** (16 - bits)
    return Depth(bits, 0, ((1 << bits) - 1) * unit, stated=bits != 16, unit=unit)
