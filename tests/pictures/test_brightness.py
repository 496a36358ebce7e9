"""Brightness: one ramp in every format and depth is the same ramp, or is refused by name; never another picture."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pictures.pictures_of_a_ramp import (
    RAMP,
    dicom,
    lab,
    pgm,
    png16,
    saved,
    tiff,
    twelve_bit_tiff,
    wide,
)
from sordino.errors import DataError
from sordino.pictures.brightness import rgb
from sordino.pictures.decoding import decode, suffixes

GRAY = Image.fromarray(RAMP)
COLORS = np.stack([RAMP] * 3, -1)


def luminance(content: bytes, gray_range: tuple[float, float] | None = None) -> np.ndarray:
    return np.asarray(decode(content, gray_range).convert("L")).astype(np.float64)


# What each file should give is RAMP, with at most so many steps of rounding. A lossless format has none; one of fewer
# bits is cut to them before it is compared.
EXACT: dict[str, Callable[[], bytes]] = {
    "L PNG": lambda: saved(GRAY, "PNG"),
    "LA PNG": lambda: saved(GRAY.convert("LA"), "PNG"),
    "P PNG": lambda: saved(GRAY.convert("P"), "PNG"),
    "RGB PNG": lambda: saved(GRAY.convert("RGB"), "PNG"),
    "RGBA PNG": lambda: saved(GRAY.convert("RGBA"), "PNG"),
    "I;16 PNG": lambda: png16(wide(16)),
    "I;16 PNG by Pillow": lambda: saved(Image.fromarray(wide(16).astype(np.uint16)), "PNG"),
    "LA;16 PNG": lambda: png16(np.stack([wide(16), np.full_like(wide(16), 65535)], -1)),
    "RGB;16 PNG": lambda: png16(np.stack([wide(16)] * 3, -1)),
    "RGBA;16 PNG": lambda: png16(np.stack([wide(16)] * 3 + [np.full_like(wide(16), 65535)], -1)),
    "12 bits in PNG, sBIT, as they are": lambda: png16(wide(12), 12),
    "12 bits in PNG, sBIT, scaled up": lambda: png16(wide(12) << 4 | wide(12) >> 8, 12),
    "10 bits in PNG, sBIT, as they are": lambda: png16(wide(10), 10),
    "L TIFF": lambda: saved(GRAY, "TIFF"),
    "LA TIFF": lambda: saved(GRAY.convert("LA"), "TIFF"),
    "P TIFF": lambda: saved(GRAY.convert("P"), "TIFF"),
    "PA TIFF": lambda: saved(GRAY.convert("P").convert("PA"), "TIFF"),
    "RGBX TIFF": lambda: saved(GRAY.convert("RGB").convert("RGBX"), "TIFF"),
    "CMYK TIFF": lambda: saved(GRAY.convert("RGB").convert("CMYK"), "TIFF"),
    "YCbCr TIFF": lambda: saved(GRAY.convert("RGB").convert("YCbCr"), "TIFF"),
    "white is zero, 8 bits": lambda: tiff(255 - RAMP, 8, photometric=0),
    "I;16 TIFF": lambda: tiff(wide(16).astype("<u2"), 16),
    "I;16 TIFF, compressed": lambda: saved(Image.fromarray(wide(16).astype(np.uint16)), "TIFF", compression="tiff_lzw"),
    "I;16B TIFF": lambda: tiff(wide(16).astype(">u2"), 16, order=">"),
    "white is zero, 16 bits": lambda: tiff((65535 - wide(16)).astype("<u2"), 16, photometric=0),
    "12-bit TIFF": twelve_bit_tiff,
    "12 bits stated in 16": lambda: tiff(wide(12).astype("<u2"), 16, ends=(0, 4095)),
    "signed 8-bit, stated": lambda: tiff((RAMP.astype(int) - 128).astype("i1"), 8, form=2, ends=(-128, 127)),
    "signed 16-bit, stated": lambda: tiff(
        (wide(16).astype(int) - 32768).astype("<i2"), 16, form=2, ends=(-32768, 32767)
    ),
    "signed 16-bit big-endian, stated": lambda: tiff(
        (wide(12).astype(int) - 1024).astype(">i2"), 16, form=2, order=">", ends=(-1024, 3071)
    ),
    "signed 32-bit, stated": lambda: tiff((wide(20).astype(int) - 5).astype("<i4"), 32, form=2, ends=(-5, 1048570)),
    "unsigned 32-bit, stated": lambda: tiff(wide(31).astype("<u4"), 32, ends=(0, 2147483647)),
    "float TIFF, 0 to 1": lambda: tiff((RAMP / 255).astype("<f4"), 32, form=3),
    "float TIFF big-endian": lambda: tiff((RAMP / 255).astype(">f4"), 32, form=3, order=">"),
    "float TIFF, stated": lambda: tiff((RAMP * 8.0 - 1000).astype("<f4"), 32, form=3, ends=(-1000, 1040)),
    "float TIFF, white is zero": lambda: tiff((1 - RAMP / 255).astype("<f4"), 32, form=3, photometric=0),
    "RGB;16 TIFF": lambda: tiff(np.stack([wide(16)] * 3, -1).astype("<u2"), 16, photometric=2),
    "L PGM": lambda: pgm(255),
    "16-bit PGM": lambda: pgm(65535),
    "12-bit PGM": lambda: pgm(4095),
    "12-bit plain PGM": lambda: pgm(4095, plain=True),
    "10-bit PGM": lambda: pgm(1023),
    "16-bit PPM": lambda: pgm(65535, channels=3),
    "12-bit PPM": lambda: pgm(4095, channels=3),
    "PFM": lambda: b"Pf\n256 4\n-1.0\n" + (RAMP / 255).astype("<f4").tobytes(),
    "L JPEG 2000": lambda: saved(GRAY, "JPEG2000"),
    "I;16 JPEG 2000": lambda: saved(Image.fromarray(wide(16).astype(np.uint16)), "JPEG2000"),
    "I;16 ICO": lambda: saved(Image.fromarray(wide(16).astype(np.uint16)), "ICO", sizes=[(256, 4)]),
    "L BMP": lambda: saved(GRAY, "BMP"),
    "L GIF": lambda: saved(GRAY, "GIF"),
    "L PCX": lambda: saved(GRAY, "PCX"),
    "L TGA": lambda: saved(GRAY, "TGA"),
    "LA TGA": lambda: saved(GRAY.convert("LA"), "TGA"),
    "RGB QOI": lambda: saved(GRAY.convert("RGB"), "QOI"),
    "RGB WebP": lambda: saved(GRAY.convert("RGB"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_ramp_is_the_same_ramp_in_every_format_and_depth(name: str) -> None:
    # 16-bit colors lose their lower byte in Pillow, and YCbCr rounds twice; gray rounds to the nearest step.
    tolerance = 1 if "RGB" in name or "YCbCr" in name or ("LA;16" in name) else 0
    np.testing.assert_allclose(luminance(EXACT[name]()), RAMP, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", ["JPEG", "AVIF", "WEBP", "HEIF"])
def test_a_ramp_survives_lossy_formats(form: str) -> None:
    """Mean brightness within two steps of 255: their quantization is finer at high quality."""
    if form == "HEIF":
        pytest.importorskip("pillow_heif")
        suffixes()  # registers the format
    made = luminance(saved(GRAY.convert("RGB"), form, quality=95))
    assert np.abs(made - RAMP).mean() < 2


def test_cmyk_jpeg_and_bilevel() -> None:
    made = luminance(saved(GRAY.convert("RGB").convert("CMYK"), "JPEG", quality=95))
    assert np.abs(made - RAMP).mean() < 2
    steps = Image.fromarray(RAMP > 127)
    for form in ("PNG", "TIFF", "PPM", "BMP"):
        np.testing.assert_array_equal(luminance(saved(steps, form)), np.where(RAMP > 127, 255, 0))
    np.testing.assert_array_equal(luminance(tiff(np.packbits(RAMP < 128, axis=1), 1, photometric=0))[:, :32], 0)


def test_lab_is_what_its_lightness_is_in_srgb() -> None:
    content, expected = lab()
    np.testing.assert_allclose(luminance(content), expected, rtol=0, atol=2)


def test_premultiplied_gray_is_put_on_white() -> None:
    """TIFF's associated alpha: the value is gray x alpha, so half of it and half of white is what is seen."""
    made = luminance(tiff(np.stack([RAMP // 2, np.full_like(RAMP, 128)], -1), 8, extra=1))
    expected = RAMP // 2 + 255 * (1 - 128 / 255)
    np.testing.assert_allclose(made, expected, rtol=0, atol=2)


def test_a_transparent_value_of_16_bits_becomes_white() -> None:
    made = luminance(png16(wide(16), clear=0))
    assert (made[:, 0] == 255).all()
    np.testing.assert_array_equal(made[:, 1:], RAMP[:, 1:])


def test_sixteen_bits_keep_their_orientation() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    content = saved(Image.fromarray(wide(16).astype(np.uint16)), "TIFF", exif=turned)
    np.testing.assert_array_equal(luminance(content), np.rot90(RAMP, 3))


UNKNOWN: dict[str, tuple[Callable[[], bytes], str]] = {
    "12 bits in PNG": (lambda: png16(wide(12)), r"16-bit unsigned gray from 0 to 4095 .*\[0, 4095\]"),
    "12 bits in PNG, step 16": (lambda: png16(RAMP.astype(int) * 16), r"\[0, 4095\]"),
    "12 bits in PNG, sBIT, dark or as they are": (lambda: png16(RAMP.astype(int) * 16, 12), "upper half"),
    "15 bits in PNG": (lambda: png16(wide(15)), r"\[0, 32767\]"),
    "8 bits in PNG of 16": (lambda: png16(wide(8)), r"\[0, 255\]"),
    "12 bits in TIFF": (lambda: tiff(wide(12).astype("<u2"), 16), r"\[0, 4095\]"),
    "12 bits in TIFF with statistics": (
        lambda: tiff(wide(12).astype("<u2"), 16, statistics=(0, 4095)),
        r"\[0, 4095\]",
    ),
    "12 bits in a PGM of 16": (
        lambda: b"P5\n256 4\n65535\n" + wide(12).astype(">u2").tobytes(),
        r"\[0, 4095\]",
    ),
    "10 bits in JPEG 2000": (
        lambda: saved(Image.fromarray(wide(10).astype(np.uint16)), "JPEG2000"),
        r"\[0, 1023\]",
    ),
    "signed 8-bit": (lambda: tiff((RAMP.astype(int) - 128).astype("i1"), 8, form=2), "8-bit signed gray from -128"),
    "signed 16-bit": (lambda: tiff((wide(12).astype(int) - 1024).astype("<i2"), 16, form=2), "from -1024 to 3071"),
    "32-bit": (lambda: tiff(wide(16).astype("<i4"), 32, form=2), r"32-bit signed .*\[0, 65535\]"),
    "unsigned 32-bit": (lambda: tiff(wide(32).astype("<u4"), 32), "32-bit unsigned gray from 0 to 4.29497e\\+09"),
    "float, 0 to 255": (lambda: tiff(RAMP.astype("<f4"), 32, form=3), r"floating-point gray from 0 to 255.*\[0, 255\]"),
    "dark float": (lambda: tiff((RAMP / 2550).astype("<f4"), 32, form=3), r"upper half of 0 to 1.*\[0.0, 1.0\]"),
    "negative float": (lambda: tiff((RAMP / 255 - 0.5).astype("<f4"), 32, form=3), "gray from -0.5"),
    "not a number": (lambda: tiff(np.where(RAMP > 9, 1.0, np.nan).astype("<f4"), 32, form=3), "not finite"),
    "PFM in units": (lambda: b"Pf\n256 4\n-2.5\n" + (RAMP / 255).astype("<f4").tobytes(), "states no range"),
    "12-bit colors in PNG": (lambda: png16(np.stack([wide(12)] * 3, -1)), "16-bit colors .* convert it to 8 bits"),
    "12-bit colors in TIFF": (
        lambda: tiff(np.stack([wide(12)] * 3, -1).astype("<u2"), 16, photometric=2),
        "16-bit colors",
    ),
    "12-bit colors in PPM": (
        lambda: b"P6\n256 4\n65535\n" + np.stack([wide(12)] * 3, -1).astype(">u2").tobytes(),
        "16-bit colors",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_picture_of_unknown_range_is_refused_with_the_remedy(name: str) -> None:
    make, message = UNKNOWN[name]
    with pytest.raises(DataError, match=message) as caught:
        decode(make())
    assert "\n" not in str(caught.value)
    assert "gray_range" in str(caught.value) or "not finite" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "given"),
    [
        (lambda: png16(wide(12)), (0, 4095)),
        (lambda: png16(wide(12), 12), (0, 4095)),
        (lambda: tiff(wide(12).astype("<u2"), 16), (0, 4095)),
        (lambda: tiff((4095 - wide(12)).astype("<u2"), 16, photometric=0), (0, 4095)),
        (lambda: b"P5\n256 4\n65535\n" + wide(12).astype(">u2").tobytes(), (0, 4095)),
        (lambda: pgm(4095), (0, 4095)),
        (lambda: pgm(1023, plain=True), (0, 1023)),
        (lambda: tiff((wide(12).astype(int) - 1024).astype("<i2"), 16, form=2), (-1024, 3071)),
        (lambda: tiff(wide(16).astype("<i4"), 32, form=2), (0, 65535)),
        (lambda: tiff(wide(32).astype("<u4"), 32), (0, 4294967295)),
        (lambda: tiff(RAMP.astype("<f4"), 32, form=3), (0.0, 255.0)),
        (lambda: tiff((RAMP.astype(int) - 128).astype("i1"), 8, form=2), (-128, 127)),
        (lambda: saved(GRAY, "PNG"), (0, 4095)),  # 8 bits need nothing said
    ],
)
def test_what_the_user_says_of_the_range_is_taken(content: Callable[[], bytes], given: tuple[float, float]) -> None:
    np.testing.assert_allclose(luminance(content(), given), RAMP, rtol=0, atol=0)


def test_a_given_range_cuts_off_and_may_be_reversed() -> None:
    made = luminance(png16(wide(16)), (0, 32767.5))
    np.testing.assert_array_equal(made, np.minimum(2 * RAMP.astype(int), 255))
    np.testing.assert_array_equal(luminance(png16(wide(16)), (65535, 0)), 255 - RAMP)


def test_black_is_black_at_any_depth() -> None:
    for content in (png16(np.zeros((4, 4))), tiff(np.zeros((4, 4), "<u2"), 16), tiff(np.zeros((4, 4), "<f4"), 32, 3)):
        assert luminance(content).max() == 0


def test_dark_colors_of_16_bits_are_read_where_the_user_says_so() -> None:
    dark = png16(np.stack([wide(12)] * 3, -1))
    assert luminance(dark, (0, 65535)).max() == 15
    with pytest.raises(DataError, match="convert it to 8 bits"):
        decode(dark, (0, 4095))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_pictures_in_memory_of_every_mode_become_rgb(mode: str) -> None:
    steps = Image.fromarray(np.where(RAMP > 127, 255, 0).astype(np.uint8))
    via = {
        "La": ["LA"],
        "PA": ["P"],
        "RGBa": ["RGBA"],
        "HSV": ["RGB"],
        "YCbCr": ["RGB"],
        "CMYK": ["RGB"],
        "RGBX": ["RGB"],
    }
    picture = steps
    for step in (*via.get(mode, []), mode):
        picture = picture.convert(step)
    made = rgb(picture)
    assert made.mode == "RGB"
    np.testing.assert_allclose(np.asarray(made)[..., 1], np.asarray(steps), rtol=0, atol=1)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_deep_pictures_in_memory_keep_their_brightness_or_are_refused(mode: str) -> None:
    values = {"I;16": wide(16).astype("<u2"), "I;16B": wide(16).astype(">u2"), "I": wide(16).astype("i4")}
    ramp = values.get(mode, RAMP.astype("f4"))
    picture = Image.frombytes(mode, (256, 4), ramp.tobytes())
    np.testing.assert_array_equal(np.asarray(rgb(picture))[..., 0], RAMP)
    dark = Image.frombytes(mode, (256, 4), (ramp // 16).astype(ramp.dtype).tobytes())
    with pytest.raises(DataError, match="upper half"):
        rgb(dark)


# --- DICOM -----------------------------------------------------------------------------------------------------------

HOUNSFIELD = (wide(12).astype(int) - 1024).astype("<i2")


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        (lambda: dicom(RAMP), 0),
        (lambda: dicom(255 - RAMP, PhotometricInterpretation="MONOCHROME1"), 0),
        (lambda: dicom(wide(12).astype("<u2"), BitsStored=12), 0),
        (lambda: dicom(wide(16).astype("<u2")), 0),
        # A window of width w around c is black at c - w/2 and white at c + w/2 - 1.
        (lambda: dicom(HOUNSFIELD, WindowCenter=1024, WindowWidth=4096), 0),
        (lambda: dicom(wide(12).astype("<u2"), RescaleIntercept=-1024, WindowCenter=1024, WindowWidth=4096), 0),
        (lambda: dicom(RAMP, RescaleSlope=0.5, RescaleIntercept=100, WindowCenter=164.25, WindowWidth=128.5), 0),
        (lambda: dicom(wide(12).astype("<u2"), WindowCenter=[2048, 40], WindowWidth=[4096, 80]), 0),
        (lambda: dicom(HOUNSFIELD, VOILUTFunction="LINEAR_EXACT", WindowCenter=1023.5, WindowWidth=4095), 0),
        (lambda: dicom(COLORS), 0),
        (lambda: dicom(np.ascontiguousarray(COLORS.transpose(2, 0, 1)).reshape(4, 256, 3), PlanarConfiguration=1), 0),
        (lambda: dicom(np.asarray(Image.fromarray(COLORS).convert("YCbCr")), PhotometricInterpretation="YBR_FULL"), 1),
        (lambda: dicom(wide(12).astype(">u2"), "1.2.840.10008.1.2.2", BitsStored=12), 0),
    ],
    ids=[
        *("8 bits", "MONOCHROME1", "12 bits stored", "16 bits", "window", "rescale and window", "slope", "two windows"),
        *("exact window", "RGB", "planar RGB", "YBR", "big-endian"),
    ],
)  # fmt: skip
def test_dicom_is_shown_as_its_header_says(content: Callable[[], bytes], tolerance: int) -> None:
    pytest.importorskip("pydicom")
    np.testing.assert_allclose(luminance(content()), RAMP, rtol=0, atol=tolerance)


def test_window_functions_are_those_of_the_standard() -> None:
    """pydicom's own windowing is the oracle; its output covers the stored bits."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels.processing import apply_windowing

    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        for sign in ("MONOCHROME2", "MONOCHROME1"):
            content = dicom(
                HOUNSFIELD,
                PhotometricInterpretation=sign,
                VOILUTFunction=function,
                WindowCenter=40,
                WindowWidth=400,
            )
            header = pydicom.dcmread(io.BytesIO(content))
            shown = (apply_windowing(HOUNSFIELD, header) + 32768) * (255 / 65535)
            expected = 255 - shown if sign == "MONOCHROME1" else shown
            np.testing.assert_allclose(luminance(content), expected, rtol=0, atol=0.51)


def table(entries: np.ndarray, first: int, bits: int) -> object:
    from pydicom import Dataset, Sequence

    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries.tolist())
    return Sequence([item])


def test_lookup_tables_are_followed() -> None:
    pytest.importorskip("pydicom")
    inverse = (4095 - np.arange(4096)).astype(np.uint16)
    stored = wide(12).astype("<u2")
    voi = dicom(stored, BitsStored=12, VOILUTSequence=table(inverse, 0, 12))
    np.testing.assert_array_equal(luminance(voi), 255 - RAMP)
    modality = dicom(stored, BitsStored=12, ModalityLUTSequence=table(inverse * 16, 0, 16))
    np.testing.assert_allclose(luminance(modality), 255 - RAMP, rtol=0, atol=0.51)
    signed = dicom(HOUNSFIELD, VOILUTSequence=table((inverse >> 4).astype(np.uint16), -1024, 8))
    np.testing.assert_allclose(luminance(signed), 255 - RAMP, rtol=0, atol=1)


def test_a_palette_gives_colors() -> None:
    pytest.importorskip("pydicom")
    entries = np.arange(256, dtype="<u2") * 257
    palette = {}
    for color, values in (("Red", entries), ("Green", entries[::-1]), ("Blue", np.zeros_like(entries))):
        palette[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{color}PaletteColorLookupTableData"] = values.tobytes()
    picture = decode(dicom(RAMP, PhotometricInterpretation="PALETTE COLOR", **palette))
    np.testing.assert_array_equal(np.asarray(picture), np.stack([RAMP, 255 - RAMP, 0 * RAMP], -1))


def test_an_enhanced_file_of_one_frame_has_its_window_in_a_functional_group() -> None:
    pytest.importorskip("pydicom")
    from pydicom import Dataset, Sequence

    shared, rescale, window = Dataset(), Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1024
    window.WindowCenter, window.WindowWidth = 1024, 4096
    shared.PixelValueTransformationSequence, shared.FrameVOILUTSequence = Sequence([rescale]), Sequence([window])
    content = dicom(wide(12).astype("<u2"), NumberOfFrames=1, SharedFunctionalGroupsSequence=Sequence([shared]))
    np.testing.assert_array_equal(luminance(content), RAMP)


def test_compressed_dicom() -> None:
    pytest.importorskip("pydicom")
    whole = saved(Image.fromarray(wide(16).astype(np.uint16)), "JPEG2000", no_jp2=True)
    stored = wide(16).astype("<u2")
    np.testing.assert_array_equal(luminance(dicom(stored, "1.2.840.10008.1.2.4.90", compressed=whole)), RAMP)
    colors = saved(GRAY.convert("RGB"), "JPEG", quality=95)
    content = dicom(COLORS, JPEG, compressed=colors, PhotometricInterpretation="YBR_FULL_422")
    assert np.abs(luminance(content) - RAMP).mean() < 2


def test_a_given_range_stands_for_a_window() -> None:
    pytest.importorskip("pydicom")
    content = dicom(HOUNSFIELD, WindowCenter=40, WindowWidth=80)
    np.testing.assert_array_equal(luminance(content, (-1024, 3071)), RAMP)


JPEG = "1.2.840.10008.1.2.4.50"
UNREADABLE_DICOM: dict[str, tuple[Callable[[], bytes], str]] = {
    "frames": (lambda: dicom(np.tile(RAMP, (3, 1))[:4], NumberOfFrames=3), "of 3 frames; export the one"),
    "lossless JPEG": (lambda: dicom(RAMP, "1.2.840.10008.1.2.4.70", compressed=b"ab"), "JPEG Lossless.*dcmdjpeg"),
    "unknown syntax": (
        lambda: dicom(RAMP, JPEG, compressed=b"ab").replace(b"10008.1.2.4.50", b"10008.9.9.9.99"),
        "an unknown encoding",
    ),
    "not JPEG": (lambda: dicom(RAMP, JPEG, compressed=b"Doe^Jane"), "cannot be decoded here"),
    "cut": (lambda: dicom(RAMP)[:-600], "cannot be decoded here|damaged or unusual"),
    "cut header": (lambda: dicom(RAMP)[:400], "DICOM file"),
    "large": (lambda: dicom(RAMP, Rows=65535, Columns=65535), "65535 x 65535 pixels, more than"),
    "unwindowed": (lambda: dicom(wide(12).astype("<u2")), r"without a window.*few of its 16 bits.*\[0, 4095\]"),
    "unwindowed signed": (lambda: dicom(HOUNSFIELD), "without a window, with values from -1024 to 3071"),
    "no width": (lambda: dicom(RAMP, WindowCenter=1, WindowWidth=0), "no width"),
    "strange colors": (lambda: dicom(COLORS, PhotometricInterpretation="DOE^JANE"), "export it as RGB"),
    "bad number": (lambda: dicom(RAMP, RescaleSlope=1).replace(b"DS\x04\x001.0 ", b"DS\x04\x00Jane"), "DICOM file"),
}


@pytest.mark.parametrize("name", UNREADABLE_DICOM)
def test_dicom_that_cannot_be_read_is_refused_without_a_word_about_the_patient(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pydicom")
    make, message = UNREADABLE_DICOM[name]
    content = make()
    caplog.clear()
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match=message) as caught:
            decode(content)
    told = [str(caught.value), caplog.text, *capfd.readouterr(), *(str(warning.message) for warning in warned)]
    assert caught.value.__cause__ is None
    assert not any(word.lower() in text.lower() for word in ("Doe", "Jane", "4711") for text in told)


def test_of_a_header_nothing_that_names_a_patient_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydicom")
    from sordino.pictures import dicom as module

    header = module._header(dicom(RAMP))
    assert not any(word in str(header) for word in ("Doe", "4711"))
    assert "PatientName" not in header


def test_a_deflated_file_is_not_unpacked() -> None:
    pytest.importorskip("pydicom")
    plain = dicom(RAMP)
    deflated = plain.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    deflated = deflated.replace(b"UI\x14\x001.2.840.10008.1.2.1.99", b"UI\x16\x001.2.840.10008.1.2.1.99")
    with pytest.raises(DataError, match="deflated"):
        decode(deflated)


def test_formats_of_packages_that_are_missing_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydicom")
    content = dicom(RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setattr("sordino.pictures.dicom.find_spec", lambda name: None)
    monkeypatch.setattr("sordino.pictures.decoding.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'sordino\[medical\]'"):
        decode(content)
    with pytest.raises(DataError, match=r"a HEIC picture.*pip install 'sordino\[heif\]'"):
        decode(b"\0\0\0\x18ftypheic" + bytes(100))
