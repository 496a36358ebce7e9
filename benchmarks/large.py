"""How a round and an encoding grow: with clients, classes, context, pictures and their pixels.

Each axis is measured in a process of its own, on one thread, from the smallest size to the largest, so that peak memory
is that of the size. Seconds are those of the processor that the process used, not of the clock: other work on the
machine changes them little. `exponent` is the slope of a least-squares line through log seconds, or log bytes above
what the smallest size needs, over log size. `last` is the slope of the last two points, where a constant part weighs
least. The exponent should be at most 1.1: nothing may be quadratic.

Rounds use a small randomly initialized CLIP by default, so that a quadratic step beside the towers would show;
`--encoder bundled` has the real one. Pictures are JPEGs in memory, encoded by the bundled encoder without a cache. With
one core of work for decoding and tower together, `tower_share` is the tower's seconds over all seconds of an encoding:
what decoding, scaling, hashing and handing over leave to it. `rate_share` is the rate of an encoding over that of the
tower on full batches by the clock, with all threads, in turns. Prints one JSON object.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import io
import json
import logging
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))

from sordino.algorithms import algorithm, settings_for
from sordino.encoders import load_encoder
from sordino.encoders.base import DualEncoder
from sordino.encoders.encode import encode, forward
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings

EACH, BATCH, SEED = 8, 64, 10
MOST = 1.1
ROUNDS: dict[str, tuple[str, str]] = {
    "dp-fpl": ("dp-fpl", "none"),
    "dp-fpl, cotangent": ("dp-fpl", "cotangent"),
    "promptfl, statistics": ("promptfl", "statistics"),
}
PRIVACY: dict[str, dict[str, Any]] = {
    "none": {},
    "cotangent": {"mechanism": "cotangent", "noise_multiplier": 1.0, "subspace": 4},
    "statistics": {"mechanism": "statistics", "noise_multiplier": 1.0},
}
AXES = {
    "clients": ([10, 30, 100, 300, 1000], {"classes": 10, "context": 8}),
    "classes": ([10, 30, 100, 300, 1000], {"clients": 10, "context": 8}),
    "context": ([4, 8, 16, 32, 64], {"clients": 10, "classes": 100}),
}
QUICK = {"clients": [10, 30, 100], "classes": [10, 30, 100], "context": [4, 16, 64]}
PICTURES = {"pictures": ([64, 128, 256], {"side": 250}), "side": ([250, 500, 1000, 2000], {"pictures": 64})}
QUICK_PICTURES = {"pictures": ([64, 128], {"side": 250}), "side": ([250, 1000], {"pictures": 64})}


def encoder_of(name: str) -> DualEncoder:
    if name == "bundled":
        return load_encoder("bundled", None, "float32", torch.device("cpu"))
    from checkpoints import save_clip

    with tempfile.TemporaryDirectory() as folder:
        save_clip(Path(folder), text={"max_position_embeddings": 128})
        encoder = load_encoder("clip", folder, "float32", torch.device("cpu"))
        assert len(encoder.fingerprint) == 64  # read while the folder is there
    return encoder


def class_names(count: int) -> list[str]:
    """ImageNet's names, each with its number, as some are equal."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [f"{info.index_to_description(index).partition(',')[0]} {index}" for index in range(count)]


def round_point(loaded: DualEncoder, kind: str, clients: int, classes: int, context: int) -> dict[str, float]:
    """Processor seconds of the start, with a release if there is one, and of a round; peak memory."""
    method, mechanism = ROUNDS[kind]
    generator = torch.Generator().manual_seed(SEED)
    features = F.normalize(torch.randn(clients * EACH, loaded.feature_width, generator=generator), dim=-1)
    tables = {"context_length": context, "batch_size": EACH, "local_steps": 1, "dp-fpl": {"rank": 4}}
    began = time.process_time()
    runtime = LocalRuntime(
        algorithm(method),
        settings_for(method, tables),
        PromptModel(loaded, loaded.class_tokens(class_names(classes))),
        features,
        torch.arange(clients * EACH) % classes,
        [range(k * EACH, (k + 1) * EACH) for k in range(clients)],
        10,
        RuntimeSettings(weighting="uniform"),
        SEED,
        PrivacySettings(**PRIVACY[mechanism]),
    )
    training = runtime.begun()
    started = time.process_time() - began
    training, _ = runtime.round(training)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        training, _ = runtime.round(training)
        seconds.append(time.process_time() - began)
    return {"start_seconds": started, "round_seconds": statistics.median(seconds), "bytes": peak()}


class Pictures:
    """JPEGs in memory: smooth colors, which compress as photographs do."""

    def __init__(self, count: int, side: int) -> None:
        generator = np.random.Generator(np.random.Philox(SEED))
        self._files = []
        for _ in range(count):
            coarse = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
            grain = generator.integers(-8, 9, smooth.shape, dtype=np.int16)
            file = io.BytesIO()
            Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
            self._files.append(file.getvalue())
        self.names = [str(index) for index in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def raw(self, index: int, /) -> bytes:
        return self._files[index]

    def image(self, index: int, /) -> Image.Image:
        return Image.open(io.BytesIO(self._files[index]))


def pictures_point(loaded: DualEncoder, kind: str, pictures: int, side: int) -> dict[str, float]:
    """Processor seconds of an encoding on one thread, and of the tower alone on as many pictures in full batches."""
    images = Pictures(pictures, side)
    pixels = torch.stack([loaded.transform(images.image(index)) for index in range(min(BATCH, pictures))])

    @torch.no_grad()
    def tower() -> None:
        for _ in range(pictures // BATCH):
            forward(loaded, "image", pixels)

    tower()
    alone, whole = [], []
    for _ in range(2):
        alone.append(used(tower))
        whole.append(used(lambda: encode(images, loaded, None, batch_size=BATCH)))
    both = {"encode_seconds": min(whole), "tower_seconds": min(alone), "bytes": peak()}
    return both | {"tower_share": min(alone) / min(whole)}


def used(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def peak() -> int:
    """Return the most bytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


Point = Callable[..., dict[str, float]]


def measured(
    point: Point, results: Connection, encoder: str, kind: str, axis: str, sizes: list[int], fixed: dict[str, int]
) -> None:
    """Measure the points of an axis in this process, the smallest one once before, to warm up."""
    torch.set_num_threads(1)
    quiet()
    loaded = encoder_of(encoder)
    point(loaded, kind, **{axis: sizes[0]}, **fixed)
    for size in sizes:
        results.send(point(loaded, kind, **{axis: size}, **fixed))


def growth(sizes: list[int], values: list[float]) -> dict[str, Any]:
    """Slopes of log values over log sizes."""
    x, y = np.log(sizes), np.log(np.maximum(values, 1e-9))
    return {
        "exponent": float(np.polyfit(x, y, 1)[0]),
        "last": float((y[-1] - y[-2]) / (x[-1] - x[-2])),
    }


def along(point: Point, encoder: str, kind: str, axis: str, sizes: list[int], fixed: dict[str, int]) -> dict[str, Any]:
    """Measure the points of an axis in a process of its own, and fit their growth."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measured, args=(point, theirs, encoder, kind, axis, sizes, fixed))
    process.start()
    theirs.close()  # or a process that failed would be waited for
    found = {}
    for size in sizes:
        found[size] = ours.recv()
        print(f"{kind}: {axis} {size}: {found[size]}", file=sys.stderr, flush=True)
    process.join()
    result: dict[str, Any] = {"fixed": fixed, "points": found}
    for name in found[sizes[0]]:
        values = [found[size][name] for size in sizes]
        if name.endswith("seconds"):
            result[name] = growth(sizes, values)
        if name == "bytes":  # above what the smallest size needs, which is mostly the libraries'
            more = [(size, value - values[0]) for size, value in zip(sizes, values, strict=True)]
            more = [(size, value) for size, value in more if value > 2**24]
            result[name] = growth(*map(list, zip(*more, strict=True))) if len(more) > 1 else "within 16 MiB"
    return result


def steep(result: dict[str, Any]) -> bool:
    slopes = [part for part in result.values() if isinstance(part, dict) and "exponent" in part]
    return any(math.isfinite(part["exponent"]) and part["exponent"] > MOST for part in slopes)


def by_the_clock(side: int, count: int) -> dict[str, float]:
    """The rate of an encoding over the tower's on full batches, with all threads."""
    loaded = encoder_of("bundled")
    images = Pictures(count, side)
    pixels = torch.stack([loaded.transform(images.image(index)) for index in range(BATCH)])

    @torch.no_grad()
    def tower() -> None:
        for _ in range(count // BATCH):
            forward(loaded, "image", pixels)

    def clock(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    tower()
    pairs = [(clock(tower), clock(lambda: encode(images, loaded, None, batch_size=BATCH))) for _ in range(3)]
    alone, whole = (statistics.median(part) for part in zip(*pairs, strict=True))
    rates = {"tower_per_second": count / alone, "encoded_per_second": count / whole}
    return rates | {"rate_share": alone / whole}


def quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=["small", "bundled"], default="small", help="of the rounds")
    parser.add_argument("--only", choices=["rounds", "pictures"], help="one half")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes, DP-FPL without a mechanism")
    arguments = parser.parse_args()
    quiet()
    result: dict[str, Any] = {"quick": arguments.quick, "encoder": arguments.encoder, "threads": 1, "rounds": {}}
    kinds = ["dp-fpl"] if arguments.quick else list(ROUNDS)
    for kind in kinds if arguments.only != "pictures" else ():
        for axis, (sizes, fixed) in AXES.items():
            sizes = QUICK[axis] if arguments.quick else sizes
            found = along(round_point, arguments.encoder, kind, axis, sizes, fixed)
            result["rounds"].setdefault(kind, {})[axis] = found
    result["pictures"] = {}
    if arguments.only != "rounds":
        for axis, (sizes, fixed) in (QUICK_PICTURES if arguments.quick else PICTURES).items():
            result["pictures"][axis] = along(pictures_point, "bundled", "pictures", axis, sizes, fixed)
        result["by_the_clock"] = {
            side: by_the_clock(side, BATCH if arguments.quick else 4 * BATCH) for side in (250, 1000)
        } | {"threads": torch.get_num_threads()}
    every = [*(found for axes in result["rounds"].values() for found in axes.values()), *result["pictures"].values()]
    print(json.dumps(result | {"at_most_linear": not any(steep(found) for found in every)}))


if __name__ == "__main__":
    main()
