"""Conversion of DICOM files to pictures, as a viewer shows them (DICOM PS3.3, C.7.6.3, C.11.1 and C.11.2).

Stored values are rescaled or go through the modality LUT. Then they go through the VOI LUT or the
first window. Without either, the range is from the least to the largest value that the stored bits
can hold. MONOCHROME1 is inverted. A file of several frames is refused, as it does not say which one
is meant.

Only the part of the header that pixels need is read. Elements that name a patient are skipped. No
message shows a value of the header, apart from sizes and the names of standard terms.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sordino.errors import DataError
from sordino.pictures.brightness import range_hint, scaled, uses_upper_half

Values = NDArray[Any]

MARK_AT, MARK = 128, b"DICM"
SYNTAX = b"\x02\x00\x10\x00UI"  # the start of the element with the encoding of pixels
DEFLATED = "1.2.840.10008.1.2.1.99"
GRAY, COLOR = (
    ("MONOCHROME1", "MONOCHROME2"),
    ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
)
PALETTE = tuple(f"{color}PaletteColorLookupTable" for color in ("Red", "Green", "Blue"))
NEEDED = (  # all elements that are read of a header
    *(
        "Rows",
        "Columns",
        "NumberOfFrames",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "PlanarConfiguration",
    ),
    *(
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "PixelData",
        "FloatPixelData",
    ),
    *(
        "DoubleFloatPixelData",
        "RescaleSlope",
        "RescaleIntercept",
        "ModalityLUTSequence",
        "VOILUTSequence",
    ),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "SharedFunctionalGroupsSequence"),
    "PerFrameFunctionalGroupsSequence",
    *(f"{color}{part}" for color in PALETTE for part in ("Descriptor", "Data")),
)
DECOMPRESS = "decompress it, for example with dcmdjpeg or gdcmconv --raw"


def is_dicom(content: bytes) -> bool:
    """Return true if content is a DICOM file, by its mark behind a preamble."""
    return content[MARK_AT : MARK_AT + 4] == MARK


def draw_dicom(
    content: bytes,
    gray_range: tuple[float, float] | None,
    max_pixels: int,
) -> Image.Image:
    """Draw the picture of a single-frame file, 8 bits a channel, mode 'L' or 'RGB'.

    Args:
        content: the file's content.
        gray_range: rescaled values that are black and white, instead of the file's window.
        max_pixels: the largest number of pixels; more are refused before they are unpacked.

    Raises:
        DataError: it cannot be read, or its brightness is not known; the message is the reason
            alone.
    """
    if find_spec("pydicom") is None:
        raise DataError(
            "a DICOM file, which this installation cannot read: pip install 'sordino[medical]'",
        )
    syntax = _transfer_syntax(content)
    if syntax == DEFLATED:  # may unpack to any size
        raise DataError("a deflated DICOM file, which is not read; save it without compression")
    try:
        header = _header(content)
        _check(header, max_pixels)
        values, meaning = _decoded(header, syntax)
        return _picture(header, values, meaning, gray_range)
    except DataError:
        raise
    except Exception as error:
        # The message may show values of the header, so none of it is passed on.
        raise DataError(f"damaged or unusual DICOM file ({type(error).__name__})") from None


def _header(content: bytes) -> Any:
    import pydicom

    # pydicom logs values that break the standard, and warns of them.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom.dcmread(io.BytesIO(content), specific_tags=list(NEEDED))


def _transfer_syntax(content: bytes) -> str:
    start = content.find(SYNTAX, MARK_AT, MARK_AT + 4096)
    if start < 0:
        raise DataError("a DICOM file that does not say how its pixels are encoded")
    (length,) = struct.unpack_from("<H", content, start + len(SYNTAX))
    first = start + len(SYNTAX) + 2
    return content[first : first + length].decode("ascii", "replace").strip("\0 ")


def _check(header: Any, max_pixels: int) -> None:
    if not any(part in header for part in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError("a DICOM file without a picture, such as a report or a directory")
    if header.get("PhotometricInterpretation") not in (*GRAY, *COLOR, "PALETTE COLOR"):
        raise DataError("a DICOM file of a photometric interpretation that is not read; export it as RGB")
    frames, rows, columns = (
        int(header.get("NumberOfFrames") or 1),
        int(header.Rows),
        int(header.Columns),
    )
    if frames > 1:
        raise DataError(f"a DICOM file of {frames} frames; export the one to be read as a file of its own")
    if rows * columns == 0:
        raise DataError("the picture has no pixels")
    if rows * columns > max_pixels:
        raise DataError(f"{columns} x {rows} pixels, more than the {max_pixels:,} that are read")


def _decoded(header: Any, syntax: str) -> tuple[Values, str]:
    """Decode stored values [H, W] or [H, W, 3], and return them with their photometric interpretation."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    # A number that pydicom does not know is its own name; it may be any text of the file.
    name = UID(syntax).name if UID(syntax).name != syntax else "an unknown encoding"
    try:
        decoder = get_decoder(UID(syntax))
    except NotImplementedError:
        decoder = None
    if decoder is None or not decoder.is_available:
        raise DataError(
            f"a DICOM file compressed as {name}, for which no decoder is installed; {DECOMPRESS}",
        )
    try:
        values, properties = decoder.as_array(header, index=0)
    except Exception as error:
        raise DataError(
            f"a DICOM file ({name}) whose pixels cannot be decoded here ({type(error).__name__}); {DECOMPRESS}"
        ) from None
    return values, str(properties["photometric_interpretation"])


def _picture(
    header: Any,
    values: Values,
    meaning: str,
    gray_range: tuple[float, float] | None,
) -> Image.Image:
    if meaning in GRAY and values.ndim == 2:
        low, high, shown = _shown(header, values, gray_range)
        return scaled(shown, high, low) if meaning == "MONOCHROME1" else scaled(shown, low, high)
    if meaning == "PALETTE COLOR" and values.ndim == 2:
        return _palette(header, values)
    if values.ndim != 3 or values.shape[2] != 3:
        raise DataError("a DICOM file with another number of channels than its photometric interpretation has")
    if values.dtype != np.uint8:
        raise DataError("a DICOM file with colors of more than 8 bits; export it with 8")
    if meaning not in ("RGB", "YBR_ICT", "YBR_RCT"):  # the decoder turns the others into RGB
        raise DataError("a DICOM file whose colors could not be converted; export it as RGB")
    return Image.fromarray(values)


def _shown(
    header: Any,
    stored: Values,
    given: tuple[float, float] | None,
) -> tuple[float, float, Values]:
    """Return the values that stand for black and for white, and the values that are shown between them."""
    ends = _stored_ends(header, stored)
    table = _first_item(header, "ModalityLUTSequence")
    if table is not None:
        values, bits = _through_table(stored, table)
        ends = np.array([0, (1 << bits) - 1])
    else:
        slope = float(_find(header, "RescaleSlope", "PixelValueTransformationSequence", 1))
        intercept = float(_find(header, "RescaleIntercept", "PixelValueTransformationSequence", 0))
        values = stored.astype(np.float64) * slope + intercept
        ends = None if ends is None else np.sort(ends * slope + intercept)
    if not np.isfinite(values).all():
        raise DataError("a DICOM file with pixels that are not finite")
    if given is not None:
        return *given, values
    table = _first_item(header, "VOILUTSequence")
    if table is not None:
        shown, bits = _through_table(values, table)
        return 0, (1 << bits) - 1, shown
    window = _window(header, values)
    return window if window is not None else _unwindowed(header, stored, values, ends)


def _stored_ends(header: Any, stored: Values) -> Values | None:
    """Return the least and the largest value that the stored bits can hold; None for floating point."""
    if stored.dtype.kind == "f":
        return None
    bits = int(header.BitsStored)
    signed = int(header.get("PixelRepresentation") or 0) == 1
    if signed:
        return np.array([-(1 << bits - 1), (1 << bits - 1) - 1])
    return np.array([0, (1 << bits) - 1])


def _window(header: Any, values: Values) -> tuple[float, float, Values] | None:
    """Apply the first window (C.11.2.1.2 and C.11.2.1.3); return None without one."""
    keys = ("WindowCenter", "WindowWidth")
    center, width = (_find(header, key, "FrameVOILUTSequence", None) for key in keys)
    if center is None or width is None:
        return None
    center, width = (float(np.ravel(part)[0]) for part in (center, width))
    function = str(_find(header, "VOILUTFunction", "FrameVOILUTSequence", "LINEAR"))
    if function == "SIGMOID" and width > 0:
        return 0, 1, 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR_EXACT" and width > 0:
        return center - width / 2, center + width / 2, values
    if function == "LINEAR" and width > 1:
        return center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2, values
    if function == "LINEAR" and width == 1:  # a threshold
        return 0, 1, values > center - 0.5
    raise DataError(
        "a DICOM file whose window has no width, or an unknown function; set gray_range",
    )


def _unwindowed(
    header: Any,
    stored: Values,
    values: Values,
    ends: Values | None,
) -> tuple[float, float, Values]:
    """Return the range of the stored bits, and the values.

    If the stored bits fill 16 or more, the range needs a value in its upper half, as in
    `sordino.pictures.depths`.

    Raises:
        DataError: the range is not known.
    """
    finding = f"a DICOM file without a window, with values from {values.min():g} to {values.max():g}"
    remedy = f"set gray_range to the values of black and white, e.g. {range_hint(values)}"
    if ends is None:
        raise DataError(f"{finding}: {remedy}")
    low, high = (float(end) for end in ends)
    whole_container = int(header.BitsStored) == stored.dtype.itemsize * 8 > 8
    full = (1 << int(header.BitsStored)) - 1
    doubtful = stored.dtype.kind == "i" or not uses_upper_half(stored, 0, full)
    if whole_container and doubtful:
        raise DataError(f"{finding}, which may be few of its {header.BitsStored} bits: {remedy}")
    return low, high, values


def _through_table(values: Values, table: Any) -> tuple[Values, int]:
    """Look up values in a table (C.11.1.1); return them and the number of bits of its entries."""
    entries, first, bits = (int(part) for part in table.LUTDescriptor)
    if first >= 1 << 15 and values.min() < 0:  # written without a sign although values have one
        first -= 1 << 16
    data = table.LUTData
    is_raw = isinstance(data, bytes)
    numbers = np.frombuffer(data, "<u2") if is_raw else np.asarray(data).astype(np.int64)
    numbers = numbers[: entries or 1 << 16]
    place = np.clip(np.rint(values).astype(np.int64) - first, 0, len(numbers) - 1)
    return numbers[place], bits


def _palette(header: Any, stored: Values) -> Image.Image:
    """Look up colors in three tables (C.7.6.3.1.5), of 8 bits an entry or of 16."""
    bands = []
    for color in PALETTE:
        if f"{color}Data" not in header:
            raise DataError(
                "a DICOM file with a segmented palette, which is not read; export it as RGB",
            )
        entries, first, _ = (int(part) for part in header[f"{color}Descriptor"].value)
        data, entries = header[f"{color}Data"].value, entries or 1 << 16
        wide = len(data) >= 2 * entries
        numbers = np.frombuffer(data, "<u2" if wide else np.uint8)[:entries]
        place = np.clip(stored.astype(np.int64) - first, 0, entries - 1)
        bands.append(np.asarray(scaled(numbers[place], 0, 65535 if wide else 255)))
    return Image.fromarray(np.stack(bands, -1))


def _find(header: Any, key: str, group: str, default: Any) -> Any:
    """Return a value of the header, or of the functional groups of an enhanced file."""
    for place in (header, *_groups(header, group)):
        value = place.get(key)
        if value is not None and value != "":
            return value
    return default


def _groups(header: Any, group: str) -> Iterator[Any]:
    for shared in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        outer = _first_item(header, shared)
        inner = None if outer is None else _first_item(outer, group)
        if inner is not None:
            yield inner


def _first_item(holder: Any, key: str) -> Any:
    """Return the first item of a sequence; None if there is none."""
    items = holder.get(key)
    return items[0] if items else None
