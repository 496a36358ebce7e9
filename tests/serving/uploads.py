"""Uploads that no honest client sends, for hypothesis."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib

from hypothesis import strategies as st
from PIL import Image

MAGIC = {"JPEG": b"\xff\xd8\xff\xe0", "PNG": b"\x89PNG\r\n\x1a\n", "WEBP": b"RIFF\xff\xff\x00\x00WEBPVP8 "}


def real(kind: str) -> bytes:
    """A small picture."""
    out = io.BytesIO()
    Image.effect_noise((24, 18), 90).convert("RGB").save(out, kind)
    return out.getvalue()


def huge_png(width: int, height: int, body: bytes) -> bytes:
    """A PNG whose header promises any size."""
    parts = [MAGIC["PNG"]]
    for name, content in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", body)):
        parts.append(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))
    return b"".join(parts)


def archive(content: bytes) -> bytes:
    """A ZIP file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("picture.png", content)
    return out.getvalue()


PICTURES = {kind: real(kind) for kind in MAGIC}
OTHERS = [real(kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO")]
OTHERS += [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0", b"%PDF-1.7", b"\x7fELF", b""]


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A real picture that is cut, or has some bytes changed, taken out or doubled."""
    content = bytearray(PICTURES[draw(st.sampled_from(sorted(PICTURES)))])
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(content) - 1))
        content[at] = draw(st.integers(0, 255))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    how = draw(st.sampled_from(["whole", "cut", "out", "twice"]))
    pieces = {
        "whole": content,
        "cut": content[:stop],
        "out": content[:start] + content[stop:],
        "twice": content[:stop] + content[start:],
    }
    return bytes(pieces[how])


sizes = st.one_of(st.integers(0, 70000), st.sampled_from([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
noise = st.binary(max_size=300)
uploads = st.one_of(
    changed(),
    noise,
    st.builds(lambda kind, body: MAGIC[kind] + body, st.sampled_from(sorted(MAGIC)), noise),
    st.builds(huge_png, sizes, sizes, st.one_of(noise, st.just(zlib.compress(bytes(100_000))))),
    st.sampled_from(OTHERS),
    st.builds(archive, noise),
    st.builds(gzip.compress, st.sampled_from(list(PICTURES.values()))),
)
