"""Pictures from strangers: their type by content, their size before a pixel is unpacked."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

from PIL import Image

from sordino.errors import DataError
from sordino.pictures.decoding import decode
from sordino.pictures.depths import GrayRange, UnknownRange
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.settings import ACCEPTED, ServerSettings

FORMATS = ("JPEG", "PNG", "WEBP")
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
MOST_PARTS = 10_000  # chunks or segments: Pillow handles each in Python, under the interpreter's lock
MOST_SCANS = 100  # of a JPEG: each passes over all pixels, and may have 40 bytes; progressive ones have some 10
SCAN = b"\xff\xda"  # never inside of a scan's own data


def read_picture(content: bytes, settings: ServerSettings, gray_range: GrayRange | None) -> Image.Image:
    """Decode an uploaded file, whatever its name or declared type: a picture, upright and opaque.

    Args:
        content: of the file.
        settings: limits.
        gray_range: of the prompt, see `decode`.

    Raises:
        Refusal: it is of no accepted type, too large, too long, or damaged.
    """
    if not _accepted(content):
        raise Refusal(415, f"the content is no {', '.join(ACCEPTED[:-1])} or {ACCEPTED[-1]} picture")
    if _in_too_many_parts(content):
        raise Refusal(422, "the picture is in too many parts; save it anew")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                width, height = picture.size
    except Image.DecompressionBombError:
        raise _too_many(settings) from None
    except Exception:  # Pillow's readers raise errors of any type on broken files
        raise Refusal(422, "the picture is damaged") from None
    if min(width, height) < 1:
        raise Refusal(422, "the picture has no pixels")
    if width * height > settings.most_pixels:
        raise _too_many(settings)
    if max(width, height) > settings.most_aspect * min(width, height):
        raise Refusal(422, f"one side of the picture is more than {settings.most_aspect:g} times the other")
    try:
        return decode(content, gray_range, FORMATS)
    except UnknownRange:
        told = "the picture has more than 8 bits a pixel, and is too dark to tell its black and white"
        raise Refusal(422, f"{told}; save it with 8 bits") from None
    except DataError:
        raise Refusal(422, "the picture is damaged") from None


def _too_many(settings: ServerSettings) -> Refusal:
    return Refusal(413, f"the picture has more than {settings.most_pixels:,} pixels")


def _accepted(content: bytes) -> bool:
    return content.startswith((JPEG, PNG)) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def _in_too_many_parts(content: bytes) -> bool:
    """Tell whether a small file of few pixels would take its reader minutes, for what it is made of."""
    if content.startswith(PNG):
        return _ends_late(content, len(PNG), _after_chunk)
    if content.startswith(JPEG):
        return content.count(SCAN) > MOST_SCANS or _ends_late(content, 2, _after_segment)
    return False


def _ends_late(content: bytes, at: int, after: Callable[[bytes, int], int]) -> bool:
    """Step over the parts of a file from a place on; true if these are more than `MOST_PARTS`."""
    for _ in range(MOST_PARTS):
        if at + 8 > len(content):
            return False
        at = after(content, at)
    return True


def _after_chunk(content: bytes, at: int) -> int:
    """Return the place behind a PNG's chunk: its length, its name, as many bytes, and a checksum."""
    return at + 12 + int.from_bytes(content[at : at + 4])


def _after_segment(content: bytes, at: int) -> int:
    """Return the place behind a JPEG's segment, or behind a byte that fills; behind the last one, the end of all."""
    if content[at] != 0xFF or content[at + 1] == 0xFF:
        return at + 1
    kind = content[at + 1]
    if kind == SCAN[1]:
        return len(content)
    alone = kind <= 0x01 or 0xD0 <= kind <= 0xD9
    return at + 2 if alone else at + 2 + max(2, int.from_bytes(content[at + 2 : at + 4]))
