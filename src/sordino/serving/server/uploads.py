"""Pictures from strangers: their type by content, their size before a pixel is unpacked."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from sordino.errors import DataError
from sordino.pictures.decoding import decode
from sordino.pictures.depths import GrayRange
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.settings import ACCEPTED, ServerSettings

FORMATS = ("JPEG", "PNG", "WEBP")


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
        return decode(content, gray_range)
    except DataError:
        raise Refusal(422, "the picture is damaged") from None


def _too_many(settings: ServerSettings) -> Refusal:
    return Refusal(413, f"the picture has more than {settings.most_pixels:,} pixels")


def _accepted(content: bytes) -> bool:
    jpeg, png = content.startswith(b"\xff\xd8\xff"), content.startswith(b"\x89PNG\r\n\x1a\n")
    return jpeg or png or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")
