"""Seconds and bytes of one secure clustering by number of clients, and its share of a training round.

A whole clustering with all its clients in one process, messages made into bytes and back: points of d = 64 entries in
four groups, T = N / 10, four clusters from first centers by farthest-first; where the number of clusters adapts takes
more exchanges, and is `adaptive_seconds`. Shares are not sealed there, so that what grows is the protocol; up to 100
clients, `sealed_seconds` has them sealed, and `pairs_seconds` is the search over pairs, sealed. `client_seconds` is the
median over clients of all that one computes, `server_seconds` what the server does; `bytes_per_client` is what a client
sends and receives, `upload_bytes_per_client` what it sends. `growth` holds the exponents by N, by least squares on
logarithms. Seconds are medians of `repeats`.

`share_of_training_round` is the time of a sealed clustering of ten clients by pairs, with the averages of contexts of
16 tokens within its clusters, over that of one PromptFL round of ten clients and 100 classes on the bundled encoder,
with one local step as in `methods.py`: a round with more steps makes the share smaller. The two take turns, so that
other work on the machine slows them alike. Prints one JSON object.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))
from text_tower import CLASS_NAMES

from sordino.algorithms import algorithm, settings_for
from sordino.encoders import load_encoder
from sordino.encoders.prompt_model import PromptModel
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings
from sordino.secure import (
    Adaptive,
    Cipher,
    Client,
    EncryptingCipher,
    InitContext,
    Pairs,
    PlainCipher,
    Server,
    plan,
    run,
    run_average,
)

WIDTH, GROUPS, IMAGES, LENGTH = 64, 4, 160, 16


class TimedClient(Client):
    """A client that knows how long it computed."""

    seconds = 0.0

    def handle(self, content: bytes) -> bytes:
        began = time.perf_counter()
        reply = super().handle(content)
        self.seconds += time.perf_counter() - began
        return reply


def points_of(clients: int) -> np.ndarray:
    """Points [N, d] within [-1, 1], in four groups that overlap a little."""
    generator = np.random.default_rng(clients)
    points = generator.normal(size=(GROUPS, WIDTH))[np.arange(clients) % GROUPS]
    points = points + generator.normal(size=(clients, WIDTH))
    return points / np.abs(points).max()


def clustering(
    number: int, start: InitContext, vectors: np.ndarray | None = None, cipher: Callable[[], Cipher] = PlainCipher
) -> dict[str, float]:
    """One clustering, and averages within its clusters if there are vectors [N, L]."""
    length = 0 if vectors is None else vectors.shape[1]
    began = time.perf_counter()
    columns = {"columns": number} if isinstance(start, Pairs) else {}
    setup = plan(clients=number, width=WIDTH, largest=1.0, privacy=number // 10, length=length, **columns)
    clients = [
        TimedClient(i, point, None if vectors is None else vectors[i], cipher=cipher())
        for i, point in enumerate(points_of(number))
    ]
    server = Server(setup)
    outcome = run(clients, server, start)
    if vectors is not None:
        run_average(clients, server, outcome.result.sets)
    seconds = time.perf_counter() - began
    by_client = [client.seconds for client in clients]
    traffic = outcome.traffic
    return {
        "seconds": seconds,
        "client_seconds": statistics.median(by_client),
        "server_seconds": seconds - sum(by_client),
        "bytes_per_client": statistics.median(traffic.of_client(client) for client in range(number)),
        "upload_bytes_per_client": statistics.median(sum(traffic.sent[client].values()) for client in range(number)),
        "exchanges": traffic.exchanges,
        "columns_opened": len(outcome.opened),
        "blocks": setup.blocks,
        "privacy": setup.privacy,
        "answers_needed": setup.needed,
    }


def median_of(measure: Callable[[], dict[str, float]], repeats: int) -> dict[str, float]:
    """The median of every figure over repeated runs."""
    runs = [measure() for _ in range(repeats)]
    return {name: statistics.median(each[name] for each in runs) for name in runs[0]} | {"repeats": repeats}


def exponents(by_clients: dict[int, dict[str, float]]) -> dict[str, float]:
    """By which power of N figures grow."""
    names = ("seconds", "client_seconds", "server_seconds", "bytes_per_client")
    logarithms = np.log(list(by_clients))
    return {
        name: float(np.polyfit(logarithms, np.log([each[name] for each in by_clients.values()]), 1)[0])
        for name in names
    }


def training(names: list[str]) -> tuple[Callable[[], float], int]:
    """A function that runs a PromptFL round of ten clients and says how long it took; and a context's entries."""
    encoder = load_encoder("bundled", None, "float32", torch.device("cpu"))
    model = PromptModel(encoder, encoder.class_tokens(names))
    features = torch.nn.functional.normalize(torch.randn(10 * IMAGES, encoder.feature_width), dim=-1)
    labels = torch.arange(10 * IMAGES) % len(names)
    rows = [range(k * IMAGES, (k + 1) * IMAGES) for k in range(10)]
    settings = settings_for("promptfl", {"context_length": LENGTH, "batch_size": 32, "local_steps": 1})
    runtime = LocalRuntime(
        algorithm("promptfl"), settings, model, features, labels, rows, 1000, RuntimeSettings(), seed=0
    )
    state = runtime.begun()

    def round() -> float:
        nonlocal state
        began = time.perf_counter()
        state, _ = runtime.round(state)
        return time.perf_counter() - began

    return round, LENGTH * encoder.context_width


def share_of_round(names: list[str], repeats: int) -> dict[str, float]:
    """Seconds of clustering and averaging ten clients, and of a training round, in turns."""
    train, length = training(names)
    vectors = np.random.default_rng(0).uniform(-1, 1, (10, length))
    train()
    pairs = [(clustering(10, Pairs(), vectors, EncryptingCipher)["seconds"], train()) for _ in range(repeats)]
    secure, rounds = (statistics.median(each) for each in zip(*pairs, strict=True))
    return {"secure_seconds": secure, "round_seconds": rounds, "share_of_training_round": secure / rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100 clients, 20 classes, fewer repeats")
    quick = parser.parse_args().quick
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    names = [each.strip() for each in CLASS_NAMES.replace("\n", " ").split(",")]
    by_clients: dict[int, dict[str, float]] = {}
    for number in (10, 50, 100) if quick else (10, 50, 100, 500, 1000):
        repeats = 1 if number > 100 else 3 if quick else 5
        by_clients[number] = median_of(partial(clustering, number, GROUPS), repeats)
        if number <= 100:
            adaptive = median_of(partial(clustering, number, Adaptive()), repeats)
            by_clients[number] |= {f"adaptive_{name}": adaptive[name] for name in ("seconds", "exchanges")}
            for name, start in (("sealed", GROUPS), ("pairs", Pairs())):
                sealed = median_of(partial(clustering, number, start, None, EncryptingCipher), repeats)
                by_clients[number][f"{name}_seconds"] = sealed["seconds"]
        print(number, f"{by_clients[number]['seconds']:.2f} s", file=sys.stderr, flush=True)
    share: dict[str, Any] = share_of_round(names[:20] if quick else names, 1 if quick else 5)
    result = {"by_clients": by_clients, "growth": exponents(by_clients)} | share
    print(json.dumps(result | {"threads": torch.get_num_threads(), "quick": quick}))


if __name__ == "__main__":
    main()
