"""Long pictures: memory stays bounded whatever their shape, and ordinary ones keep every bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import save_clip, save_siglip

from sordino.encoders import pixels as module
from sordino.encoders.base import DualEncoder
from sordino.encoders.bundled import BundledEncoder
from sordino.encoders.clip import ClipEncoder
from sordino.encoders.pixels import MAX_RATIO, bounded, shrunk

CPU = torch.device("cpu")


def square_clip(folder: Path) -> Path:
    """A CLIP checkpoint that squeezes pictures, as some do."""
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(save_clip(folder))
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {"clip": save_clip, "square clip": square_clip, "siglip": save_siglip}


@pytest.fixture(scope="module", params=["bundled", *MAKERS])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    if request.param == "bundled":
        return BundledEncoder.load(CPU)
    return ClipEncoder.load(str(MAKERS[request.param](tmp_path_factory.mktemp("checkpoint"))), CPU)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Pixels of every picture that is made by scaling, and of what Pillow holds between its two passes."""
    made: list[int] = []
    resize = Image.Image.resize

    def recorded(self: Image.Image, size: tuple[int, int], *args: object, **kwargs: object) -> Image.Image:
        made.extend((size[0] * size[1], size[0] * self.height))
        assert max(made) < 1e8, "the test itself shall not fill memory"
        return resize(self, size, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", recorded)
    return iter([made])  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (4_000_000, 1), (1, 4_000_000), (3, 500_000), (70, 30_000)])
def test_a_long_picture_takes_little_memory(
    encoder: DualEncoder, size: tuple[int, int], sizes: Iterator[list[int]]
) -> None:
    made = next(sizes)
    pixels = encoder.transform(Image.new("L", size, 255))
    side = pixels.shape[-1]
    assert pixels.shape == (3, side, side)
    # At most the picture itself, or its shorter side scaled to at most 256 and the longer MAX_RATIO (and a pixel) times
    # that. What is squeezed has at most DETAIL x 32 of its longer side left by 32 of the other.
    assert max(made) <= max(size[0] * size[1], 256 * 256 * (MAX_RATIO + 1), module.DETAIL * 32 * 32)
    assert torch.equal(pixels.amin((1, 2)), pixels.amax((1, 2)))  # white all over, so nothing was padded


@pytest.mark.parametrize("size", [(300, 300), (640, 480), (50, 399), (80, 10), (7, 56), (1, 8)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_ordinary_pictures_keep_every_bit(
    encoder: DualEncoder, size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(size).convert(mode)
    ours = encoder.transform(image)
    for name in ("bundled", "clip"):
        for step in ("bounded", "shrunk"):
            monkeypatch.setattr(f"sordino.encoders.{name}.{step}", lambda image, *_: image, raising=False)
    assert torch.equal(encoder.transform(image), ours)


@pytest.mark.parametrize("size", [(1000, 8), (8, 1000), (999, 16), (16, 1001), (400, 32)])
def test_what_is_cut_off_was_not_seen(size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut picture has the pixels of the whole one, where both sides are scaled by one whole number."""
    for encoder in (BundledEncoder.load(CPU), ClipEncoder.load(str(save_clip(tmp_path)), CPU)):
        image = noise(size)
        ours = encoder.transform(image)
        assert bounded(image).size != size
        with monkeypatch.context() as patch:
            for name in ("bundled", "clip"):
                patch.setattr(f"sordino.encoders.{name}.bounded", lambda image: image)
            whole = encoder.transform(image)
        step = 1 / (0.25 * 255)  # one of 255, over the least deviation that preprocessing divides by
        torch.testing.assert_close(ours, whole, rtol=0, atol=1.01 * step)


def test_a_cut_keeps_the_middle() -> None:
    for length in (100, 101):
        ramp = Image.fromarray(np.tile(np.arange(length, dtype=np.uint8), (2, 1)))
        cut = np.asarray(bounded(ramp))[0]
        assert cut[0] + cut[-1] == length - 1
        assert np.asarray(bounded(ramp.transpose(Image.Transpose.TRANSPOSE)))[:, 0].tolist() == cut.tolist()


def test_squeezed_pictures_are_nearly_as_without_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smooth ramp of 40,000 x 2: shrunk first or not, a pixel of the square averages the same part of it."""
    ramp = np.tile(np.linspace(0, 255, 40_000).round().astype(np.uint8), (2, 1))
    image = Image.fromarray(ramp).convert("RGB")
    assert shrunk(image, 32).size == (module.DETAIL * 32, 2)
    direct = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    twice = np.asarray(shrunk(image, 32).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(direct - twice)[:, 2:-2].max() <= 2  # both round twice


def noise(size: tuple[int, int]) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)
