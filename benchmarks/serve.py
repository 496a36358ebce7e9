"""The server of prompts under a bounded load on the loopback: requests a second and latency, with and without batches.

A run of `promptfl` on handwritten digits (one round, the bundled encoder) is published and served by a real server in a
process of its own; clients are in another. Each request is one JPEG of 256 x 256. For each number of clients at once:
requests a second, and the 50th, 95th and 99th percentile of latency in milliseconds.

- batched, one_by_one: the server as it is, and one that encodes one picture after the other.
- tower: pictures a second of the image tower alone, in full batches of 32 that are ready as pixels, by itself.
- tower_speedup: the same over one picture after the other, in turn with them: the most that batches can give there.
- speedup: batched over one_by_one; share: batched over tower; both at the most clients.
- rss_mb: of the server, after a tenth and after all of `--memory` requests at the most clients.
- failed: requests that were not answered with 200.

Prints one JSON object. It needs the extra `serve`.

    python benchmarks/serve.py
"""

from __future__ import annotations

import kept_memory  # noqa: F401  the same, before anything starts threads

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from sordino.encoders import load_encoder
from sordino.experiments.config import parse_config
from sordino.experiments.run import run
from sordino.privacy.signature import public_bytes
from sordino.serving.registry import Registry
from sordino.serving.server.listen import Address, serve
from sordino.serving.server.settings import ServerSettings
from sordino.serving.sources import from_run
from sordino.serving.trust import Trusted

NAME, FULL = "digits", 32
UNBOUNDED = {"per_minute": 10**9, "per_day": 10**9}
WAYS = {"batched": ServerSettings(**UNBOUNDED), "one_by_one": ServerSettings(batch=1, wait=0.0, workers=1, **UNBOUNDED)}


def pictures(count: int) -> list[bytes]:
    """JPEGs that look like nothing, of a photo's size for the encoder."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        content = io.BytesIO()
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
        made.append(content.getvalue())
    return made


def published(folder: Path) -> tuple[str, Trusted]:
    """A registry with one prompt, and whom to trust."""
    tables = {
        "algorithm": "promptfl",
        "rounds": 1,
        "data": {"source": "digits", "train_per_class": 5, "test_per_class": 5},
        "partition": {"scheme": "iid", "clients": 2},
        "settings": {"batch_size": 8, "local_steps": 1},
    }
    run(parse_config(tables), folder / "run")
    key = Ed25519PrivateKey.generate()
    url = f"sqlite:///{folder}/prompts.db"
    with Registry(url, create=True) as registry:
        material = from_run(folder / "run", key)
        registry.publish(NAME, material.facts, material.files, key, accept_not_private=True)
    return url, Trusted(frozenset({public_bytes(key)}))


def serving(url: str, trusted: Trusted, way: str, pipe: Connection) -> None:
    """A server's process."""
    with Registry(url) as registry:
        serve(registry, trusted, Address(port=0), WAYS[way], None, [NAME], None, pipe.send)


def loading(address: str, clients: int, requests: int, pipe: Connection) -> None:
    """The clients' process: each asks again as soon as it is answered.

    Requests are made beforehand, and of an answer the status alone is read: clients are meant to take none of the
    server's cores.
    """
    host, port = address.removeprefix("http://").split(":")
    asks = [request(host, picture) for picture in pictures(64)]

    async def load() -> tuple[list[float], int, float]:
        left, failed, latencies = iter(range(requests)), 0, []

        async def one() -> None:
            nonlocal failed
            reader, writer = await asyncio.open_connection(host, int(port))
            for number in left:
                began = time.perf_counter()
                writer.write(asks[number % len(asks)])
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"content-length: (\d+)", head)
                await reader.readexactly(int(length.group(1)) if length else 0)
                latencies.append(time.perf_counter() - began)
                failed += not head.startswith(b"http/1.1 200 ")
            writer.close()

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return latencies, failed, time.perf_counter() - began

    pipe.send(asyncio.run(load()))


def request(host: str, picture: bytes) -> bytes:
    """A request as `curl -F image=@picture.jpg` sends it."""
    made = httpx.Request("POST", f"http://{host}/v1/prompts/{NAME}/classify", files={"image": ("picture.jpg", picture)})
    head = "".join(f"{name}: {value}\r\n" for name, value in made.headers.items())
    return f"POST {made.url.path} HTTP/1.1\r\n{head}\r\n".encode() + made.read()


def loaded(address: str, clients: int, requests: int) -> tuple[list[float], int, float]:
    """Latencies, failed requests and seconds of a load."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=loading, args=(address, clients, requests, theirs))
    process.start()
    theirs.close()
    result: tuple[list[float], int, float] = ours.recv()
    process.join()
    return result


def memory(process: BaseProcess) -> int:
    """Memory of a process now, in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return round(int(found.group(1)) / 1024) if found else 0


def tower_rates(seconds: float) -> dict[int, float]:
    """Pictures a second of the image tower in full batches, and one after the other; in turn, for `seconds` each."""
    encoder = load_encoder("bundled", None, "float32", torch.device("cpu"))
    picture = encoder.transform(Image.open(io.BytesIO(pictures(1)[0])))
    batches = {size: torch.stack([picture] * size) for size in (FULL, 1)}
    counts, spent = dict.fromkeys(batches, 0), dict.fromkeys(batches, 0.0)
    with torch.inference_mode():
        for pixels in batches.values():  # once to warm up
            encoder.image_features(pixels)
        while min(spent.values()) < seconds:
            for size, pixels in batches.items():
                began = time.perf_counter()
                for _ in range(FULL // size):
                    encoder.image_features(pixels)
                counts[size] += FULL
                spent[size] += time.perf_counter() - began
    return {size: counts[size] / spent[size] for size in batches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests", type=int, default=1000, help="of each load")
    parser.add_argument("--memory", type=int, default=10_000, help="requests after which memory is looked at")
    parser.add_argument("--quick", action="store_true", help="150 requests a load, and 300 for memory")
    arguments = parser.parse_args()
    requests, more = (150, 300) if arguments.quick else (arguments.requests, arguments.memory)
    numbers = [int(number) for number in arguments.clients.split(",")]
    context = multiprocessing.get_context("spawn")
    tower = tower_rates(5.0)
    results: dict[str, Any] = {"quick": arguments.quick, "requests": requests, "tower": round(tower[FULL], 1)}
    results["tower_speedup"] = round(tower[FULL] / tower[1], 2)
    rates, failures = {}, 0
    with tempfile.TemporaryDirectory() as made:
        url, trusted = published(Path(made))
        for way in WAYS:
            ours, theirs = context.Pipe()
            process = context.Process(target=serving, args=(url, trusted, way, theirs))
            process.start()
            theirs.close()
            try:
                address = ours.recv()
                loaded(address, numbers[-1], 2 * FULL)
                results[way] = {}
                for clients in numbers:
                    latencies, failed, seconds = loaded(address, clients, requests)
                    failures += failed
                    rates[way, clients] = len(latencies) / seconds
                    cuts = statistics.quantiles(latencies, n=100)
                    percentiles = {str(at): round(1000 * cuts[at - 1], 1) for at in (50, 95, 99)}
                    results[way][str(clients)] = {
                        "per_second": round(rates[way, clients], 1),
                        "latency_ms": percentiles,
                    }
                if way == "batched":
                    sizes = []
                    for part in (more // 10, more - more // 10):
                        failures += loaded(address, numbers[-1], part)[1]
                        sizes.append(memory(process))
                    results["rss_mb"] = sizes
            finally:
                process.terminate()
                process.join()
    most = numbers[-1]
    results["speedup"] = round(rates["batched", most] / rates["one_by_one", most], 2)
    results["share"] = round(rates["batched", most] / results["tower"], 2)
    results["failed"], results["cores"] = failures, os.cpu_count()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
