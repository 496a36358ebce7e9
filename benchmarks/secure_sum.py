"""Seconds and bytes of one secure sum by number of clients, a tenth of whom drop out.

A whole sum with all its clients in one process, one after the other, messages made into bytes and back: vectors of
d = 8,192 entries (a context of 16 tokens of width 512), clipped and quantized, with noise from the operating system for
a noise multiplier of 1, one colluder, and the default threshold. Each pair of clients agrees on a mask. A tenth of the
clients drop out after they dealt shares, which is when it costs most: the server takes their masks off pair by pair.

`seconds` is all of it; `client_seconds` the median over survivors of all that one computes, `server_seconds` what the
server does. `bytes_per_client` is the median of what a survivor sends and receives, `upload_bytes_per_client` of what
it sends. `exact` says whether every sum was, in every entry, that of the survivors' quantized vectors and their noise.
`growth` holds the exponents by n, by least squares on logarithms. Seconds are medians of `repeats`. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
import time
from typing import Any

import numpy as np

from sordino.secure.local import Traffic, run_exchange
from sordino.secure.sums import client as client_module
from sordino.secure.sums.client import SumClient
from sordino.secure.sums.discrete_gaussian import Bits, discrete_gaussian
from sordino.secure.sums.plan import plan_sum
from sordino.secure.sums.server import SumServer

DIMENSION, DROPPED = 8192, 0.1
MASKING = 3  # the exchange that they drop out at


class TimedClient(SumClient):
    """A client that knows how long it computed."""

    seconds = 0.0

    def handle(self, content: bytes) -> bytes:
        began = time.perf_counter()
        reply = super().handle(content)
        self.seconds += time.perf_counter() - began
        return reply


class AllNoise:
    """The discrete Gaussian, which keeps the sum of all that was drawn, so that a sum can be checked."""

    def __init__(self) -> None:
        self.total = np.zeros(DIMENSION, np.int64)

    def __call__(self, deviation: int, count: int, bits: Bits) -> np.ndarray:
        samples = discrete_gaussian(deviation, count, bits)
        self.total += samples
        return samples


def one_sum(number: int) -> dict[str, Any]:
    """One sum of so many clients."""
    vectors = np.random.default_rng(number).normal(size=(number, DIMENSION)) / np.sqrt(DIMENSION)
    client_module.discrete_gaussian = noise = AllNoise()  # type: ignore[assignment]
    began = time.perf_counter()
    setup = plan_sum(
        session=secrets.token_hex(16), clients=number, dimension=DIMENSION, clip=1.0, noise_multiplier=1.0, colluders=1
    )
    clients = [TimedClient(setup, client, vector) for client, vector in enumerate(vectors)]
    traffic = Traffic()
    gone = dict.fromkeys(range(int(DROPPED * number)), MASKING)
    found = run_exchange(SumServer(setup).sum(), clients, traffic, gone)
    seconds = time.perf_counter() - began
    expected = noise.total + sum(setup.quantize(vectors[client]) for client in found.survivors)
    return {
        "seconds": seconds,
        "client_seconds": statistics.median(clients[client].seconds for client in found.survivors),
        "server_seconds": seconds - sum(client.seconds for client in clients),
        "bytes_per_client": statistics.median(traffic.of_client(client) for client in found.survivors),
        "upload_bytes_per_client": statistics.median(sum(traffic.sent[client].values()) for client in found.survivors),
        "threshold": setup.threshold,
        "survivors": len(found.survivors),
        "ring_bits": setup.ring_bits,
        "noise_multiplier": setup.charge(found.survivors).noise_multiplier,
        "exact": bool((found.total == expected).all()),
    }


def median_of(number: int, repeats: int) -> dict[str, Any]:
    """The median of every figure over repeated sums; exact if all were."""
    runs = [one_sum(number) for _ in range(repeats)]
    exact = all(each.pop("exact") for each in runs)
    return {name: statistics.median(each[name] for each in runs) for name in runs[0]} | {
        "repeats": repeats,
        "exact": exact,
    }


def exponents(by_clients: dict[int, dict[str, Any]]) -> dict[str, float]:
    """By which power of n figures grow."""
    logarithms = np.log(list(by_clients))
    names = ("seconds", "client_seconds", "server_seconds", "bytes_per_client")
    return {
        name: float(np.polyfit(logarithms, np.log([each[name] for each in by_clients.values()]), 1)[0])
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 100 clients, fewer repeats")
    quick = parser.parse_args().quick
    by_clients: dict[int, dict[str, Any]] = {}
    for number in (10, 100) if quick else (10, 100, 1000):
        repeats = 1 if number > 100 else 2 if quick else 5
        by_clients[number] = median_of(number, repeats)
        print(number, f"{by_clients[number]['seconds']:.2f} s", file=sys.stderr, flush=True)
    exact = all(each["exact"] for each in by_clients.values())
    print(
        json.dumps(
            {
                "by_clients": by_clients,
                "dropped": DROPPED,
                "exact": exact,
                "dimension": DIMENSION,
                "growth": exponents(by_clients),
                "quick": quick,
            }
        )
    )


if __name__ == "__main__":
    main()
