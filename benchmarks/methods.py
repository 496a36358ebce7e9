"""Seconds of one round of every method, as a multiple of PromptFL's, and the bytes of its messages.

Ten clients, 100 classes, 16 context tokens, batches of 32, one local step for all (where a method has several kinds of
steps, one of each). Methods on text prompts run on the bundled encoder; those that put prompts into a vision
transformer on a randomly initialized CLIP, with few classes and 64-pixel images, as PromptFL then does for comparison
(`encoder`). What models read of images is random, as time does not depend on it. Methods take turns within each
repetition, so that other work on the machine slows them alike; seconds are medians. Prints one JSON object.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))
from checkpoints import save_clip
from text_tower import CLASS_NAMES

from sordino.algorithms import METHODS, algorithm, settings_for
from sordino.algorithms.base import model_class
from sordino.encoders import load_encoder
from sordino.encoders.base import DualEncoder
from sordino.encoders.encode import forward
from sordino.errors import EncoderError
from sordino.runtime.local import LocalRuntime, Training
from sordino.runtime.settings import RuntimeSettings

CLIENTS, IMAGES, LENGTH, BATCH = 10, 40, 16, 32
VIT = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
PICTURES = {"image_size": 64, "patch_size": 8}
SETTINGS = {"context_length": LENGTH, "batch_size": BATCH, "local_steps": 1}
TWO_KINDS = ("pfedpt", "sgpt")  # methods that step in turns on two parts


def runtime_of(name: str, encoder: DualEncoder, names: list[str]) -> LocalRuntime:
    """A federation of ten clients that runs a method.

    Raises:
        EncoderError: the encoder cannot carry it.
    """
    method = algorithm(name)
    settings = settings_for(name, SETTINGS | ({"local_steps": 2} if name in TWO_KINDS else {}))
    model = model_class(method).of(settings, encoder, encoder.class_tokens(names))
    generator = torch.Generator().manual_seed(0)
    size = encoder.transform(Image.new("RGB", (8, 8))).shape[-1]
    rows = CLIENTS * IMAGES
    if model.reads == "image":
        table = torch.nn.functional.normalize(torch.randn(rows, encoder.feature_width, generator=generator), dim=-1)
    else:
        with torch.no_grad():
            one = forward(encoder, model.reads, torch.randn(1, 3, size, size, generator=generator))[0]
        table = torch.randn(rows, *one.shape, generator=generator) * one.std()
        if model.reads == "patch":
            table = torch.nn.functional.normalize(table, dim=-1)
    labels = torch.arange(rows) % len(names)
    held = [range(client * IMAGES, (client + 1) * IMAGES) for client in range(CLIENTS)]
    return LocalRuntime(method, settings, model, table, labels, held, 1000, RuntimeSettings(), seed=0)


def measure(encoder: DualEncoder, wanted: list[str], names: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """The figures of all wanted methods that the encoder can carry, PromptFL among them."""
    runtimes: dict[str, LocalRuntime] = {}
    for name in wanted:
        try:
            runtimes[name] = runtime_of(name, encoder, names)
        except EncoderError as error:
            print(error, file=sys.stderr)
    states: dict[str, Training] = {name: runtime.begun() for name, runtime in runtimes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    sizes = dict.fromkeys(runtimes, (0, 0))
    for repeat in range(repeats + 1):
        for name, runtime in runtimes.items():
            began = time.perf_counter()
            if runtime.rounds:
                states[name], record = runtime.round(states[name])
                sizes[name] = (record.upload_bytes, record.broadcast_bytes)
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
            print(name, f"{time.perf_counter() - began:.2f} s", file=sys.stderr, flush=True)
    reference = statistics.median(seconds["promptfl"])
    return {
        name: {
            "seconds": statistics.median(times),
            "times_promptfl": statistics.median(times) / reference,
            "upload_bytes": sizes[name][0],
            "broadcast_bytes": sizes[name][1],
            "encoder": encoder.name,
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 classes, one repetition")
    parser.add_argument("--methods", help="names, separated by commas, beside promptfl (default: all)")
    options = parser.parse_args()
    quick: bool = options.quick
    chosen = METHODS if options.methods is None else ["promptfl", *options.methods.split(",")]
    wanted = list(dict.fromkeys(chosen))
    if unknown := [name for name in wanted if name not in METHODS]:
        parser.error(f"--methods: no method {unknown[0]!r}; see sordino methods")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    names = [each.strip() for each in CLASS_NAMES.replace("\n", " ").split(",")]
    repeats = 1 if quick else 3
    device = torch.device("cpu")
    bundled = load_encoder("bundled", None, "float32", device)
    methods = measure(bundled, wanted, names[:10] if quick else names, repeats)
    missing = [name for name in wanted if name not in methods]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            save_clip(Path(folder), names[:10], vision=VIT | PICTURES)
            clip = load_encoder("clip", folder, "float32", device)
        found = measure(clip, ["promptfl", *missing], names[:10], repeats)
        methods |= {name: found[name] for name in missing}
    for name in [name for name in wanted if not algorithm(name).ABOUT.trains]:
        methods[name]["seconds"] = methods[name]["times_promptfl"] = 0.0
    print(json.dumps({"methods": methods, "threads": torch.get_num_threads(), "quick": quick}))


if __name__ == "__main__":
    main()
