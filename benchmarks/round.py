"""Seconds of one DP-FPL round, 10 clients x 100 classes, for the bundled encoder and a CLIP of ViT-B/16's text size.

Each encoder is measured in a process of its own, so that peak memory is its own. `gemm_share` is the rate of the
round's matrix products over that of a 2048 x 2048 float32 product in the same process, by the faster of PyTorch's
`matmul` and the kernel that the towers use (`sordino.encoders.linear`); both rates are printed. FLOPs are those of the
text tower's forward products, twice: a backward pass through frozen weights costs as much as the forward one. Prints
one JSON object.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))
from text_tower import CLASS_NAMES

from sordino.algorithms import algorithm, settings_for
from sordino.encoders import load_encoder
from sordino.encoders.base import DualEncoder
from sordino.encoders.linear import frozen_linear
from sordino.encoders.prompt_model import PromptModel
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings

ENCODERS = ("bundled", "clip_vit_b16")


def rate(product: Callable[[], object], flops: float) -> float:
    """FLOP/s of a product, the best of ten."""
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return flops / min(seconds)


def encoder_of(name: str, names: list[str]) -> DualEncoder:
    """The bundled encoder, or a randomly initialized CLIP with ViT-B/16's text tower."""
    if name == "bundled":
        return load_encoder("bundled", None, "float32", torch.device("cpu"))
    from checkpoints import save_clip

    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    with tempfile.TemporaryDirectory() as folder:
        save_clip(Path(folder), names, text=text | {"vocab_size": 49408}, projection=512, merges=20)
        return load_encoder("clip", folder, "float32", torch.device("cpu"))


def measure(name: str, quick: bool) -> dict[str, object]:
    """One encoder's figures."""
    names = [each.strip() for each in CLASS_NAMES.replace("\n", " ").split(",")]
    clients, images = 10, 160
    names = names[:20] if quick else names
    encoder = encoder_of(name, names)
    model = PromptModel(encoder, encoder.class_tokens(names))
    features = torch.nn.functional.normalize(torch.randn(clients * images, encoder.feature_width), dim=-1)
    labels = torch.arange(clients * images) % len(names)
    rows = [range(k * images, (k + 1) * images) for k in range(clients)]
    settings = settings_for("dp-fpl", {"context_length": 16, "rank": 8, "batch_size": 32})
    runtime = LocalRuntime(
        algorithm("dp-fpl"), settings, model, features, labels, rows, 1000, RuntimeSettings(), seed=0
    )
    training, _ = runtime.round(runtime.begun())
    seconds = []
    for _ in range(3 if quick else 7):
        began = time.perf_counter()
        training, _ = runtime.round(training)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    square = torch.randn(2048, 2048)
    by_matmul = rate(lambda: square @ square, 2 * 2048**3)
    by_tower = rate(lambda: frozen_linear(square, square), 2 * 2048**3)
    flops = 2 * encoder.text_flops(clients, 16, model.classes)
    done = flops / statistics.median(seconds)
    return {
        "seconds": statistics.median(seconds),
        "gemm_share": done / max(by_matmul, by_tower),
        "gemm_share_of_matmul": done / by_matmul,
        "peak_rss_gb": peak / 1e9,
        "round_gflop": flops / 1e9,
        "gflop_per_second": {"round": done / 1e9, "matmul": by_matmul / 1e9, "tower_kernel": by_tower / 1e9},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 classes, fewer repeats")
    parser.add_argument("--one", choices=ENCODERS, help="measure one encoder in this process")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.quick)))
        return
    result: dict[str, object] = {}
    for name in ENCODERS:
        command = [sys.executable, __file__, "--one", name, *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result[name] = json.loads(done.stdout)
    print(json.dumps(result | {"threads": torch.get_num_threads(), "quick": arguments.quick}))


if __name__ == "__main__":
    main()
