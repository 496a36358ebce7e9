"""The feature cache: nothing is encoded twice, and nothing that happens to the disk gives a wrong feature."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sordino.encoders import cache as cache_module
from sordino.encoders import encode as encode_module
from sordino.encoders.base import Capability, DualEncoder
from sordino.encoders.cache import FeatureCache, default_directory
from sordino.encoders.encode import Skipped, encode, tell_skipped
from sordino.errors import DataError, EncoderError, SordinoWarning

WIDTH = 6


class TinyEncoder(DualEncoder):
    """Features that are a fixed function of a picture's pixels, and a count of what was asked for."""

    name = "tiny"
    context_width = 4
    feature_width = WIDTH
    logit_scale = 1.0
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, fingerprint="one", patches=True):
        self.fingerprint = fingerprint
        self.capabilities = frozenset({Capability.PATCHES} if patches else ())
        self.decoded = self.encoded = 0
        self.scale = 1.0

    def transform(self, image):
        self.decoded += 1
        return torch.from_numpy(np.array(image.convert("RGB").resize((2, 2)), dtype=np.float32)).permute(2, 0, 1)

    def image_features(self, pixels):
        self.encoded += len(pixels)
        features = pixels.flatten(1)[:, :WIDTH] + 1
        return self.scale * features / features.norm(dim=-1, keepdim=True)

    def patch_features(self, pixels):
        self.encoded += len(pixels)
        return pixels.flatten(2).transpose(1, 2)  # [B, 4, 3]

    def class_tokens(self, names):
        raise NotImplementedError

    def embed(self, text):
        raise NotImplementedError

    def text_features(self, context, classes):
        raise NotImplementedError

    def text_flops(self, contexts, context_length, classes):
        raise NotImplementedError


class Pictures:
    """2 x 2 pictures in memory; content that is text cannot be read."""

    def __init__(self, contents, names=None):
        self.contents = list(contents)
        self.names = names or [f"{row}.png" for row in range(len(self.contents))]

    def __len__(self):
        return len(self.contents)

    def raw(self, index):
        return self.contents[index]

    def image(self, index):
        if len(self.contents[index]) != 12:
            raise DataError("damaged picture: not 12 bytes")
        return Image.frombytes("RGB", (2, 2), self.contents[index])


def contents(count, seed=0):
    return [row.tobytes() for row in np.random.default_rng(seed).integers(0, 256, (count, 12), dtype=np.uint8)]


def shards(directory):
    return sorted(directory.rglob("*.safetensors"))


def run(images, directory, encoder=None, **options):
    encoder = encoder or TinyEncoder()
    return encode(images, encoder, None if directory is None else FeatureCache(directory), **options), encoder


def test_features_are_the_encoders_own(tmp_path):
    images = Pictures(contents(5))
    result, encoder = run(images, tmp_path, batch_size=2)
    direct = encoder.image_features(torch.stack([encoder.transform(images.image(row)) for row in range(5)]))
    torch.testing.assert_close(result.features, direct, rtol=0, atol=0)
    assert (result.encoded, result.cached, result.skipped) == (5, 0, ())
    assert result.readable.all()
    patches, encoder = run(images, tmp_path, kind="patch")
    assert patches.features.shape == (5, 4, 3)
    assert patches.encoded == 5


def test_a_second_pass_decodes_and_encodes_nothing(tmp_path):
    images = Pictures(contents(7))
    first, _ = run(images, tmp_path)
    second, encoder = run(images, tmp_path)
    assert torch.equal(first.features, second.features)
    assert (second.encoded, second.cached, encoder.decoded, encoder.encoded) == (0, 7, 0, 0)


def test_features_belong_to_content_whatever_its_name_and_place(tmp_path):
    made = contents(4)
    first, _ = run(Pictures(made), tmp_path)
    moved = Pictures([made[2], made[0], made[0]], names=["x", "y", "z"])
    second, encoder = run(moved, tmp_path)
    assert encoder.decoded == 0
    assert torch.equal(second.features, first.features[[2, 0, 0]])
    changed = bytes([made[0][0] ^ 1]) + made[0][1:]
    third, encoder = run(Pictures([changed, *made[1:]]), tmp_path)
    assert (third.encoded, third.cached, encoder.decoded) == (1, 3, 1)


def test_equal_pictures_are_encoded_once(tmp_path):
    made = contents(2)
    for directory in (tmp_path, None):
        result, encoder = run(Pictures([made[0], made[1], made[0], made[0]]), directory)
        assert encoder.decoded == result.encoded == 2
        assert torch.equal(result.features[0], result.features[3])


def test_digests_are_those_of_the_content_by_row(tmp_path):
    made = contents(2)
    images = Pictures([made[1], b"text", made[0], made[1]])

    def vanish(index, raw=images.raw):
        if index == 2:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return raw(index)

    images.raw = vanish
    for _ in range(2):  # computed, then from the cache
        result, _ = run(images, tmp_path)
        expected = [hashlib.sha256(content).digest() for content in images.contents]
        assert result.digests == (expected[0], expected[1], None, expected[0])


def test_another_fingerprint_or_kind_is_another_feature(tmp_path):
    images = Pictures(contents(3))
    run(images, tmp_path)
    for options in ({"encoder": TinyEncoder("two")}, {"kind": "patch"}):
        result, _ = run(images, tmp_path, **options)
        assert (result.encoded, result.cached) == (3, 0)


def test_unreadable_pictures_are_named_and_their_rows_are_zero(tmp_path):
    made = contents(3)
    images = Pictures([made[0], b"", made[1], b"text", b"text"])

    def vanish(index, raw=images.raw):
        if index == 2:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return raw(index)

    images.raw = vanish
    result, _ = run(images, tmp_path)
    assert result.readable.tolist() == [True, False, False, False, False]
    damaged = "damaged picture: not 12 bytes"
    assert result.skipped[0] == Skipped("1.png", damaged)
    assert result.skipped[1].name == "2.png"
    assert "No such file" in result.skipped[1].reason
    assert result.skipped[2:] == (Skipped("3.png", damaged), Skipped("4.png", damaged))
    assert torch.count_nonzero(result.features[1:]) == 0
    assert result.encoded == 1


def test_nothing_readable_or_nothing_at_all(tmp_path):
    assert run(Pictures([b"text"]), tmp_path)[0].features.shape == (1, WIDTH)
    assert run(Pictures([]), tmp_path)[0].features.shape == (0, WIDTH)
    assert shards(tmp_path) == []


def test_progress_starts_with_what_the_cache_has_and_ends_with_all(tmp_path):
    made = contents(6)
    run(Pictures(made[:2]), tmp_path)
    calls = []
    run(Pictures([*made, b"text"]), tmp_path, batch_size=3, progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (2, 7)
    assert calls[-1] == (7, 7)
    assert calls == sorted(calls)


def test_what_the_encoder_cannot_do_or_does_wrongly_is_an_error_and_not_kept(tmp_path):
    with pytest.raises(EncoderError, match="patches"):
        run(Pictures(contents(1)), tmp_path, TinyEncoder(patches=False), kind="patch")
    broken = TinyEncoder()
    broken.scale = float("nan")
    with pytest.raises(EncoderError, match="'tiny' gives image features that are not finite"):
        run(Pictures(contents(2)), tmp_path, broken)
    assert shards(tmp_path) == []


class OverflowingEncoder(TinyEncoder):
    """Features are not finite where a picture's first value is 255."""

    def image_features(self, pixels):
        features = super().image_features(pixels)
        features[pixels[:, 0, 0, 0] == 255] = float("inf")
        return features


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_one_picture_without_finite_features_is_unreadable_and_ends_nothing(tmp_path, batch_size):
    made = contents(5)
    bad = bytes([255]) + made[1][1:]
    images = Pictures([bad, made[0], made[2], bad, made[3]])
    result, _ = run(images, tmp_path, OverflowingEncoder(), batch_size=batch_size)
    assert result.readable.tolist() == [False, True, True, False, True]
    assert {skipped.name for skipped in result.skipped} == {"0.png", "3.png"}
    assert "not finite" in result.skipped[0].reason
    assert torch.isfinite(result.features).all()
    clean, _ = run(Pictures([made[0], made[2], made[3]]), None, batch_size=batch_size)
    assert torch.equal(result.features[torch.from_numpy(result.readable)], clean.features)
    again, encoder = run(images, tmp_path, OverflowingEncoder())
    assert (again.cached, encoder.decoded) == (3, 1)  # what is not finite was not kept
    alone, _ = run(Pictures([bad]), None, OverflowingEncoder(), batch_size=batch_size)
    assert alone.readable.tolist() == [False]  # the encoder is sound: it is the picture


def test_many_unreadable_pictures_are_not_all_told(caplog):
    tell_skipped([Skipped(f"{row}.png", "damaged") for row in range(1000)])
    assert len(caplog.records) == encode_module.SKIPPED_SHOWN + 1
    assert "980 more" in caplog.records[-1].getMessage()


# --- what may happen to a disk ---------------------------------------------------------------------------------------


def damage_truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-10])


def damage_empty(shard):
    shard.write_bytes(b"")


def damage_flip_a_bit(shard):
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # within the features, so that only a checksum can tell
    shard.write_bytes(content)


def damage_other_content(shard):
    shard.write_bytes(b"not a shard at all, but long enough to be one" * 10)


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_empty, damage_flip_a_bit, damage_other_content],
)
def test_a_damaged_shard_is_told_and_its_pictures_are_encoded_again(tmp_path, damage):
    images, more = Pictures(contents(5)), Pictures(contents(5, seed=1))
    first, _ = run(images, tmp_path)
    run(more, tmp_path)
    shard = next(path for path in shards(tmp_path) if hashlib.sha256(images.raw(0)).digest() in path.read_bytes())
    damage(shard)
    with pytest.warns(SordinoWarning, match=f"damaged file, {shard.name}"):
        again, _ = run(images, tmp_path)
    assert torch.equal(again.features, first.features)
    assert again.encoded == 5
    assert run(images, tmp_path)[0].encoded == 0  # mended, and without a warning
    assert run(more, tmp_path)[0].encoded == 0


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(SordinoWarning, match="cannot be written"):
        result, _ = run(Pictures(contents(3)), tmp_path / "file")
    assert result.encoded == 3


class PassingEncoder(TinyEncoder):
    """It notes how many pictures are in a pass, and its features depend on that as little as rounding does."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def image_features(self, pixels):
        self.passes.append(len(pixels))
        return super().image_features(pixels) + 1e-6 * len(pixels)


@pytest.mark.parametrize("size", [3, 5, 64])
def test_every_pass_on_a_cpu_has_one_shape_and_no_more_pictures_than_pay(size):
    made = contents(21)
    whole, encoder = run(Pictures(made), None, PassingEncoder(), batch_size=size)
    assert set(encoder.passes) == {min(size, encode_module.TOGETHER)}
    first, _ = run(Pictures(made[:8]), None, PassingEncoder(), batch_size=size)
    rest, _ = run(Pictures(made[8:]), None, PassingEncoder(), batch_size=size)
    assert torch.equal(torch.cat([first.features, rest.features]), whole.features)


def test_a_large_batch_of_pixels_is_passed_in_pieces():
    encoder, pixels = PassingEncoder(), torch.rand(20, 3, 2, 2)
    features = encode_module.forward(encoder, "image", pixels)
    assert encoder.passes == [encode_module.TOGETHER, 20 - encode_module.TOGETHER]
    torch.testing.assert_close(features, TinyEncoder().image_features(pixels), rtol=0, atol=1e-4)


def test_a_full_disk_is_told_once_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    monkeypatch.setattr(encode_module, "SHARD_IMAGES", 2)
    with pytest.warns(SordinoWarning, match="No space left on device") as caught:
        result, _ = run(Pictures(contents(9)), tmp_path, batch_size=2)
    assert len(caught) == 1
    assert result.encoded == 9
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_was_encoded_before_an_interruption_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "SHARD_IMAGES", 4)

    def interrupt(done, total):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Pictures(contents(20)), tmp_path, batch_size=2, progress=interrupt)
    result, _ = run(Pictures(contents(20)), tmp_path)
    assert 6 <= result.cached < 20
    assert result.encoded == 20 - result.cached


def test_leftovers_of_killed_writers_are_removed_in_time(tmp_path):
    run(Pictures(contents(1)), tmp_path)
    folder = shards(tmp_path)[0].parent
    old, young = folder / ".old.tmp", folder / ".young.tmp"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    run(Pictures(contents(1, seed=1)), tmp_path)
    assert not old.exists()
    assert young.exists()


WRITER = """
import importlib.util, sys
from pathlib import Path
import sordino.encoders.encode as encode_module
spec = importlib.util.spec_from_file_location("writer", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
encode_module.SHARD_IMAGES = 5
print("ready", flush=True)
result, _ = tests.run(tests.Pictures(tests.contents(400)[int(sys.argv[3]):]), Path(sys.argv[2]), batch_size=5)
assert result.readable.all()
"""


def start_writer(directory, first=0):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, __file__, str(directory), str(first)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_processes_may_write_at_once_and_be_killed(tmp_path):
    writers = [start_writer(tmp_path, first) for first in (0, 100)]
    victim = start_writer(tmp_path)
    assert victim.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not shards(tmp_path) and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    images = Pictures(contents(400))
    result, encoder = run(images, tmp_path)  # a damaged shard would be a warning, which is an error in these tests
    assert (result.encoded, encoder.decoded) == (0, 0)
    assert torch.equal(result.features, run(images, None)[0].features)


def test_no_other_user_reads_a_feature_or_which_pictures_there_are(tmp_path):
    before = os.umask(0)
    try:
        run(Pictures(contents(3)), tmp_path / "cache")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache" / "features").stat().st_mode) == 0o700
    assert [stat.S_IMODE(shard.stat().st_mode) for shard in shards(tmp_path)] == [0o600]


def test_a_folder_of_features_that_others_may_enter_is_warned_of_once_and_used(tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    folder.chmod(0o755)  # of an earlier version, or shared on purpose
    with pytest.warns(SordinoWarning, match=f"others than its owner .mode 755.*run 'chmod 700 {folder}'") as warned:
        found = [run(Pictures(contents(3)), tmp_path)[0] for _ in range(2)]
    assert len(warned) == 1
    assert [(result.encoded, result.cached) for result in found] == [(3, 0), (0, 3)]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert [stat.S_IMODE(shard.stat().st_mode) for shard in shards(tmp_path)] == [0o600]


def test_default_directory(monkeypatch):
    monkeypatch.setenv("SORDINO_CACHE", "/some/where")
    monkeypatch.setenv("XDG_CACHE_HOME", "/else/where")
    assert default_directory() == Path("/some/where")
    monkeypatch.delenv("SORDINO_CACHE")
    assert default_directory() == Path("/else/where/sordino")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory() == Path.home() / ".cache" / "sordino"


@pytest.mark.slow
def test_real_pictures_through_the_bundled_encoder(tmp_path):
    from sordino.encoders.bundled import BundledEncoder
    from sordino.tasks import DataSettings
    from sordino.tasks.sources import load_images

    for number, folder in enumerate(("noise", "plain")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for row in range(2):
            picture = Image.effect_noise((50, 40), 80) if number == 0 else Image.new("RGB", (40, 50), (90 * row, 9, 9))
            picture.save(tmp_path / "in" / folder / f"{row}.png")
    (tmp_path / "in" / "plain" / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    images = load_images(DataSettings(source=f"imagefolder:{tmp_path / 'in'}"))
    encoder = BundledEncoder.load(torch.device("cpu"))
    first = encode(images, encoder, FeatureCache(tmp_path / "cache"))
    assert [skipped.name for skipped in first.skipped] == ["plain/broken.jpg"]
    torch.testing.assert_close(first.features.norm(dim=-1)[torch.from_numpy(first.readable)], torch.ones(4))
    second = encode(images, encoder, FeatureCache(tmp_path / "cache"))
    assert (second.encoded, second.cached) == (0, 4)
    assert torch.equal(first.features, second.features)


@pytest.mark.slow
def test_a_feature_does_not_depend_on_where_an_encoding_was_interrupted(tmp_path):
    """Bit for bit: 70 digits in one go, and the same digits after the first 10 had been encoded before."""
    from sordino.encoders.bundled import BundledEncoder
    from sordino.tasks import DataSettings
    from sordino.tasks.sources import load_images

    images = load_images(DataSettings(source="digits"))
    encoder = BundledEncoder.load(torch.device("cpu"))
    whole = encode(images.subset(np.arange(70)), encoder, None)
    encode(images.subset(np.arange(10)), encoder, FeatureCache(tmp_path))
    resumed = encode(images.subset(np.arange(70)), encoder, FeatureCache(tmp_path))
    assert resumed.cached == 10
    assert torch.equal(resumed.features, whole.features)
