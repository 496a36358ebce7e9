"""One ramp from black to white as files of every format and depth, written by Pillow or byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))  # [4, 256], what every file should look like


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def wide(bits: int) -> np.ndarray:
    """The ramp over all of so many bits."""
    return np.rint(RAMP.astype(np.float64) * ((1 << bits) - 1) / 255).astype(np.uint64)


def tiff(
    values: np.ndarray,
    bits: int,
    form: int = 1,
    photometric: int = 1,
    order: str = "<",
    ends: tuple[float, float] | None = None,
    statistics: tuple[int, int] | None = None,
    extra: int | None = None,
) -> bytes:
    """An uncompressed TIFF of one strip.

    `ends` are SMinSampleValue and SMaxSampleValue, `statistics` MinSampleValue and MaxSampleValue;
    `extra` is ExtraSamples.
    """
    height, width = values.shape[:2]
    samples = 1 if values.ndim == 2 else values.shape[2]
    data = values.tobytes()
    tags: list[tuple[int, int, Any]] = [
        *((256, 4, width), (257, 4, height), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, samples)),
        *((278, 4, height), (279, 4, len(data))),
    ]
    late = b""
    place = 8 + len(data)
    for tag, value in ((258, bits), (339, form)):
        if samples == 1:
            tags.append((tag, 3, value))
        elif samples == 2:  # they fit into the entry itself
            tags.append((tag, 0, (2, value | value << 16)))
        else:
            tags.append((tag, 0, (samples, place + len(late))))
            late += struct.pack(f"{order}{samples}H", *[value] * samples) + b"\0" * (samples % 2 * 2)
    for tag, end in zip((340, 341), ends or (), strict=False):
        tags.append((tag, 11 if form == 3 else 9, end))
    for tag, end in zip((280, 281), statistics or (), strict=False):
        tags.append((tag, 3, end))
    if extra is not None:
        tags.append((338, 3, extra))
    start = b"II*\0" if order == "<" else b"MM\0*"
    content = start + struct.pack(order + "I", place + len(late)) + data + late + struct.pack(order + "H", len(tags))
    for tag, kind, value in sorted(tags):
        packed = {3: "HH", 4: "I", 9: "i", 11: "f"}.get(kind, "I")
        count, value = value if kind == 0 else (1, value)
        content += struct.pack(order + "HHI", tag, kind or 3, count)
        content += struct.pack(order + packed, *((value, 0) if kind == 3 else (value,)))
    return content + struct.pack(order + "I", 0)


def twelve_bit_tiff() -> bytes:
    """Two samples in three bytes."""
    values = wide(12).astype(np.uint16)
    left, right = values[:, ::2], values[:, 1::2]
    packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], -1).astype(np.uint8)
    content = bytearray(tiff(packed.reshape(4, -1), 12))
    place = content.rindex(struct.pack("<HHI", 256, 4, 1))  # the width counts samples, not bytes
    content[place + 8 : place + 12] = struct.pack("<I", 256)
    return bytes(content)


def pgm(maximum: int, plain: bool = False, channels: int = 1) -> bytes:
    values = np.rint(RAMP.astype(np.float64) * maximum / 255).astype(">u2" if maximum > 255 else "u1")
    values = np.repeat(values[..., None], channels, -1)
    magic = {(True, 1): "P2", (False, 1): "P5", (True, 3): "P3", (False, 3): "P6"}[plain, channels]
    body = " ".join(map(str, values.ravel())).encode() if plain else values.tobytes()
    return f"{magic}\n256 4\n{maximum}\n".encode() + body


def png16(values: np.ndarray, significant: int | None = None, clear: int | None = None) -> bytes:
    """A 16-bit PNG of gray [H, W] or colors [H, W, C], with an sBIT chunk, and a transparent value, if asked for."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = values.astype(">u2").reshape(values.shape[0], -1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0))]
    if significant is not None:
        chunks.append((b"sBIT", bytes([significant] * channels)))
    if clear is not None:
        chunks.append((b"tRNS", struct.pack(">H", clear)))
    chunks += [(b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


def lab() -> tuple[bytes, np.ndarray]:
    """A gray ramp of lightness as TIFF, and its sRGB values by CIE 1976 and IEC 61966-2-1."""
    middle = Image.new("L", (256, 4), 128)
    content = saved(Image.merge("LAB", [Image.fromarray(RAMP), middle, middle]), "TIFF")
    lightness = RAMP.astype(np.float64) * 100 / 255
    linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    encoded = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return content, 255 * encoded


def dicom(values: np.ndarray, syntax: str = "1.2.840.10008.1.2.1", **header: Any) -> bytes:
    """A DICOM file of stored values [H, W] or [H, W, 3], with a patient's name."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    file = FileDataset(
        None, {}, file_meta=meta, preamble=b"\0" * 128, is_little_endian=meta.TransferSyntaxUID.is_little_endian
    )
    file.PatientName, file.PatientID, file.SOPInstanceUID = "Doe^Jane", "SECRET-4711", "1.2.3.4"
    file.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.Rows, file.Columns = values.shape[:2]
    file.SamplesPerPixel = 1 if values.ndim == 2 else 3
    file.PhotometricInterpretation = "MONOCHROME2" if values.ndim == 2 else "RGB"
    if values.ndim == 3:
        file.PlanarConfiguration = 0
    bits = 8 * values.dtype.itemsize
    file.BitsAllocated = file.BitsStored = bits
    file.HighBit = bits - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    if meta.TransferSyntaxUID.is_encapsulated:
        file.PixelData = pydicom.encaps.encapsulate([header.pop("compressed")])
    else:
        file.PixelData = values.tobytes()
    file["PixelData"].VR = "OW" if bits > 8 else "OB"
    for key, value in header.items():
        setattr(file, key, value)
    if "BitsStored" in header:
        file.HighBit = header["BitsStored"] - 1
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
