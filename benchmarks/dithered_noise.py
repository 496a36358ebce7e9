"""Uploads whose rounding is the noise (`privacy.compress`) against other ways to send them, at equal epsilon.

K clients send vectors of norm `clip` in random directions to a server that is trusted with them. Prints one JSON
object; for every epsilon:

- noise_multiplier: z, on the sum.
- bytes: of one compressed upload, its key included and without a message's header; float32 and float16 beside it.
- error: root mean square of the mean's error, over that of the noise that epsilon asks for. It is above one, since a
  client knows its own part.
- fixed_bytes, fixed_error: the same with a dither and a fixed step, and Gaussian noise by the server, at equal bytes.
- server_right: how often a server is right about whether an upload or zeros were sent, by a fair coin: it has the key,
  and looks whether the integers are those that zeros have.
- others_right: the most that someone who sees the noised mean of one round can be right.

    python benchmarks/dithered_noise.py
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import math
import zlib

import torch
from scipy.stats import norm
from torch import Tensor

from sordino.privacy import accounting
from sordino.privacy.uploads.dithered import KEY_BYTES, drawn_keys, quantized, restored
from sordino.randomness import SystemRandomness

HALVINGS = 40  # of the range of steps that is searched


def mean_bytes(codes: Tensor) -> float:
    """Return the bytes of integers [K, d] by DEFLATE, a client's mean."""
    sizes = [len(zlib.compress(row.to(torch.int32).numpy().tobytes(), 9)) for row in codes]
    return sum(sizes) / len(sizes)


def fixed_step(uploads: Tensor, goal: float) -> tuple[float, float]:
    """Return the step of a dithered quantizer that needs about `goal` bytes, and its bytes."""
    dither = torch.rand(uploads.shape, dtype=uploads.dtype) - 0.5
    low, high = 1e-6, 1e6
    for _ in range(HALVINGS):
        step = math.sqrt(low * high)
        found = mean_bytes((uploads / step + dither).round())
        low, high = (step, high) if found > goal else (low, step)
    return step, found


def measured(epsilon: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Return one line of the result."""
    clients, size = arguments.clients, arguments.size
    z = accounting.noise_multiplier(epsilon, arguments.delta, {(1.0, arguments.rounds)})
    asked = z / clients  # deviation of the noise on the mean, in clips
    part = z / math.sqrt(clients - arguments.colluders)
    uploads = torch.nn.functional.normalize(torch.randn(clients, size, dtype=torch.float64), dim=1)
    randomness = SystemRandomness(clients, torch.device("cpu"))
    sent, squares, differ = [], [], []
    for _ in range(arguments.repeats):
        keys = drawn_keys(randomness)
        codes = quantized(uploads, part, keys, "change")
        sent.append(mean_bytes(codes))
        squares.append((restored(codes, part, keys, "change") - uploads).mean(0).square().mean())
        zeros = quantized(torch.zeros_like(uploads), part, keys, "change")
        differ.append((zeros != codes).any(1).double().mean())
    step, fixed_bytes = fixed_step(uploads, sum(sent) / len(sent))
    return {
        "epsilon": epsilon,
        "noise_multiplier": round(z, 2),
        "bytes": round(sum(sent) / len(sent) + KEY_BYTES),
        "float32_bytes": 4 * size,
        "float16_bytes": 2 * size,
        "error": round(float(torch.stack(squares).mean().sqrt()) / asked, 2),
        "fixed_bytes": round(fixed_bytes + KEY_BYTES),
        "fixed_error": round(math.sqrt(asked**2 + step**2 / 12 / clients) / asked, 2),
        "server_right": round(0.5 + float(torch.stack(differ).mean()) / 2, 3),
        "others_right": round(float(norm.cdf(1 / (2 * z))), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 2.0, 1.0])
    parser.add_argument("--delta", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--colluders", type=int, default=1)
    parser.add_argument("--size", type=int, default=8 * 384, help="numbers of an upload: tokens times width")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lines = [measured(epsilon, arguments) for epsilon in arguments.epsilon]
    print(json.dumps({"clients": arguments.clients, "rounds": arguments.rounds, "lines": lines}))


if __name__ == "__main__":
    main()
