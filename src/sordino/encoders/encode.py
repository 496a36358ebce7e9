"""Pictures to features, each encoded once: `encode(images, encoder, cache)`."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sordino.encoders.base import Capability, DualEncoder
from sordino.encoders.cache import STATES, FeatureCache, Features, Kind, layer_kind, layer_of
from sordino.errors import DataError, EncoderError
from sordino.progress import log

# A shard is written when any of these is reached.
SHARD_IMAGES, SHARD_BYTES, SHARD_SECONDS = 1000, 1 << 26, 30.0
CHEAP = ("pixels", layer_kind(0))  # made of a picture in less time than they are worth on the disk
WORKERS = min(8, os.cpu_count() or 1)  # threads that read and decode pictures
TOGETHER = 16  # pictures in one pass on a CPU: more are no faster, and slower beside other work on its memory
NOT_FINITE = "the encoder gives features of it that are not finite"
SKIPPED_SHOWN = 20  # unreadable pictures that are named in the log; the summary names all
# Errors of a picture that cannot be read.
UNREADABLE = (DataError, OSError, ValueError, ArithmeticError, MemoryError)


class Images(Protocol):
    """Pictures to encode: the content that identifies each, and the picture itself.

    Both raise a DataError (or an OSError or ValueError) if a picture cannot be read.
    """

    @property
    def names(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def raw(self, index: int, /) -> bytes: ...
    def image(self, index: int, /) -> Image.Image: ...


@dataclass(frozen=True)
class Skipped:
    """A picture that could not be read, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Encoded:
    """Features of N pictures.

    Attributes:
        features: [N, ...] float32 on the CPU, of the kind's shape; rows of unreadable pictures are
            zero.
        readable: [N], false for unreadable pictures.
        skipped: the unreadable pictures.
        encoded: number of different pictures that went through the encoder.
        cached: number of different pictures that came from the cache.
        digests: [N], SHA-256 of each picture's raw content; None if the content cannot be read.
    """

    features: Tensor
    readable: NDArray[np.bool_]
    skipped: tuple[Skipped, ...]
    encoded: int
    cached: int
    digests: tuple[bytes | None, ...]


def encode(
    images: Images,
    encoder: DualEncoder,
    cache: FeatureCache | None,
    batch_size: int = 64,
    kind: Kind = "image",
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Return features of all pictures. Each different picture is encoded once, now or in an earlier run.

    A picture whose features are not finite counts as unreadable, unless the encoder itself fails.

    Args:
        images: N pictures.
        encoder: the frozen encoder.
        cache: the feature cache; None keeps nothing.
        batch_size: pictures that are read at once, and on an accelerator also in one forward pass.
        kind: "image" for `image_features`, "patch" for `patch_features`, "layer 3" for the hidden
            states that enter that layer of the image tower, "pixels" for the pixels themselves.
            Pixels and the input of the first layer are not kept on disk. "image-tokens" and "keys-values" are of
            `image_state`.
        progress: called with (pictures done, all pictures), the first time with those that the
            cache has.

    Raises:
        EncoderError: the encoder lacks patches or layers. Or its features are not finite for all of
            these pictures and for a plain gray one.
    """
    if kind in STATES:
        encoder.require(Capability.LIKELIHOODS, "encoding tokens")
    if kind == "patch":
        encoder.require(Capability.PATCHES, "encoding patches")
    if layer_of(kind) is not None:
        encoder.require(Capability.VISUAL_PROMPTS, "encoding hidden states")
    if kind in CHEAP:
        cache = None
    digests, reasons = _digests(images)
    places: dict[bytes, list[int]] = {}  # the rows of each different picture
    for row, digest in enumerate(digests):
        if digest is not None:
            places.setdefault(digest, []).append(row)
    features = {} if cache is None else cache.find(_key(encoder), kind, list(places))
    cached = len(features)
    done = len(reasons) + sum(len(places[digest]) for digest in features)
    todo = {digest: rows[0] for digest, rows in places.items() if digest not in features}
    progress = progress or (lambda done, total: None)
    progress(done, len(images))
    with contextlib.closing(_encoded(images, todo, encoder, cache, batch_size, kind)) as batches:
        for batch in batches:
            for digest, result in batch.items():
                done += len(places[digest])
                if isinstance(result, str):
                    reasons |= dict.fromkeys(places[digest], result)
                else:
                    features[digest] = result
            progress(done, len(images))
    if not features and NOT_FINITE in reasons.values():
        _require_finite(encoder, kind)
    shape = next((feature.shape for feature in features.values()), _empty_shape(encoder, kind))
    table = np.zeros((len(images), *shape), dtype=np.float32)
    for digest, feature in features.items():
        table[places[digest]] = feature
    return Encoded(
        features=torch.from_numpy(table),
        readable=np.asarray([row not in reasons for row in range(len(images))], dtype=np.bool_),
        skipped=tuple(Skipped(images.names[row], reasons[row]) for row in sorted(reasons)),
        encoded=len(features) - cached,
        cached=cached,
        digests=tuple(digests),
    )


def _empty_shape(encoder: DualEncoder, kind: Kind) -> tuple[int, ...]:
    """Return the shape of a feature when there is no picture to show it."""
    shapes = {
        "image": (encoder.feature_width,),
        "patch": (0, encoder.feature_width),
        "pixels": (3, 0, 0),
    }
    return shapes.get(kind, (0, encoder.image_width))


def _digests(images: Images) -> tuple[list[bytes | None], dict[int, str]]:
    """Return each picture's content digest (None if the content cannot be read), and the reasons by row."""

    def digest(row: int) -> bytes | str:
        try:
            return hashlib.sha256(images.raw(row)).digest()
        except UNREADABLE as error:
            return _reason(error)

    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(digest, range(len(images))))
    reasons = {row: result for row, result in enumerate(results) if isinstance(result, str)}
    return [None if isinstance(result, str) else result for result in results], reasons


def _encoded(
    images: Images,
    todo: Mapping[bytes, int],
    encoder: DualEncoder,
    cache: FeatureCache | None,
    batch_size: int,
    kind: Kind,
) -> Generator[dict[bytes, Features | str], None, None]:
    """Yield batches of features, or of reasons why there are none, of the pictures in `todo`; store them on the way."""
    unstored: dict[bytes, Features] = {}
    stored_at = time.monotonic()

    def store() -> None:
        nonlocal stored_at
        if cache is not None:
            cache.store(_key(encoder), kind, unstored)
        unstored.clear()
        stored_at = time.monotonic()

    try:
        for batch in _pixels(images, todo, encoder, batch_size):
            decoded = batch.items()
            pixels = {digest: part for digest, part in decoded if not isinstance(part, str)}
            features = _forward(encoder, kind, list(pixels.values()), batch_size) if pixels else ()
            pairs = zip(pixels, features, strict=True)
            rows = {digest: row for digest, row in pairs if np.isfinite(row).all()}
            unstored |= rows
            size = sum(row.nbytes for row in unstored.values())
            waited = time.monotonic() - stored_at
            if len(unstored) >= SHARD_IMAGES or size >= SHARD_BYTES or waited > SHARD_SECONDS:
                store()
            # A picture without a row either has features that are not finite, or a reason from
            # decoding.
            yield {digest: rows.get(digest, NOT_FINITE if digest in pixels else str(batch[digest])) for digest in batch}
    finally:  # also on an interrupt, so that finished features are kept
        store()


def _pixels(
    images: Images, todo: Mapping[bytes, int], encoder: DualEncoder, batch_size: int
) -> Iterator[dict[bytes, Tensor | str]]:
    """Yield batches of pixels [3, H, W], or of reasons why there are none; threads decode two batches ahead."""

    def pixels(row: int) -> Tensor | str:
        try:
            return encoder.transform(images.image(row))
        except UNREADABLE as error:
            return _reason(error)

    remaining = iter(todo.items())
    waiting: deque[dict[bytes, Future[Tensor | str]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool, warnings.catch_warnings():
        # Such pictures are refused, by name.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        while True:
            while len(waiting) < 3 and (chunk := list(itertools.islice(remaining, batch_size))):
                waiting.append({digest: pool.submit(pixels, row) for digest, row in chunk})
            if not waiting:
                return
            yield {digest: future.result() for digest, future in waiting.popleft().items()}


@torch.no_grad()
def _forward(encoder: DualEncoder, kind: Kind, pixels: list[Tensor], size: int) -> Features:
    """Compute features [B, ...] of B pictures.

    The last pass is filled up with the first picture, as kernels of different shapes differ in the last
    bit. So a feature does not depend on the point at which an earlier encoding was interrupted.
    """
    passes = min(size, TOGETHER) if encoder.device.type == "cpu" else size
    filled = pixels + [pixels[0]] * (-len(pixels) % passes)
    batch = torch.stack(filled).to(encoder.device)
    rows: Features = forward(encoder, kind, batch)[: len(pixels)].float().cpu().numpy()
    return rows


def _require_finite(encoder: DualEncoder, kind: Kind) -> None:
    """Raise an EncoderError if not even a plain gray picture has finite features.

    The outcome depends on no picture of the data, so no single one of them can end a run.
    """
    plain = encoder.transform(Image.new("RGB", (64, 64), (128, 128, 128)))
    if not np.isfinite(_forward(encoder, kind, [plain], 1)).all():
        raise EncoderError(
            f"encoder {encoder.name!r} gives {kind} features that are not finite in {encoder.dtype}; use float32"
        )


def tell_skipped(skipped: Sequence[Skipped]) -> None:
    """Name unreadable pictures in the log, the first ones of many."""
    for picture in skipped[:SKIPPED_SHOWN]:
        log.warning("skipped %s: %s", picture.name, picture.reason)
    if len(skipped) > SKIPPED_SHOWN:
        log.warning("skipped %d more pictures", len(skipped) - SKIPPED_SHOWN)


def forward(encoder: DualEncoder, kind: Kind, pixels: Tensor) -> Tensor:
    """Return features [B, ...] of a kind, of pixels [B, 3, H, W]; on a CPU in passes of `TOGETHER`."""
    if kind == "pixels":
        return pixels
    if pixels.device.type == "cpu" and len(pixels) > TOGETHER:
        return torch.cat([_pass(encoder, kind, piece) for piece in pixels.split(TOGETHER)])
    return _pass(encoder, kind, pixels)


def _pass(encoder: DualEncoder, kind: Kind, pixels: Tensor) -> Tensor:
    """Return features [B, ...] of a kind, in one pass."""
    if (layer := layer_of(kind)) is not None:
        return encoder.image_tower.hidden(pixels, layer)
    if kind in STATES:
        return encoder.image_state(pixels, kind)
    return encoder.image_features(pixels) if kind == "image" else encoder.patch_features(pixels)


def _key(encoder: DualEncoder) -> str:
    """Return the cache key of an encoder's features: its fingerprint and its precision."""
    return f"{encoder.fingerprint} {encoder.dtype}"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
