"""Noise on prefix sums of mean uploads: banded matrix factorization against independent noise, at equal epsilon.

The server adds the noise, and the client is the unit. BandMF (Choquette-Choo et al., (Amplified) Banded Matrix
Factorization, NeurIPS 2023) correlates the noise of `bands` successive rounds, so each client may take part once in
`bands` rounds only: the mean of a round is over a `bands`-th of the clients. Its strategy matrix C is lower triangular
with `bands` bands and columns of norm one. A client that takes part k times then moves C x by at most sqrt(k) clips,
so k compositions of a Gaussian mechanism account for it. C is optimized here by L-BFGS, from the banded square root of
the prefix-sum matrix.

Prints one JSON object. For every number of rounds and bands, it has the root mean square over rounds of the noise on
the sum of all means so far, in units of clip / clients:

- full: everyone takes part in every round, with independent noise.
- cyclic: everyone takes part once in `bands` rounds, with independent noise.
- poisson: everyone takes part with probability 1 / `bands`, with independent noise, amplified by sampling.
- banded: everyone takes part once in `bands` rounds, with banded noise.

    python benchmarks/banded_noise.py --epsilon 8
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import math

import torch
from torch import Tensor

from sordino.privacy import accounting


def strategy(columns: Tensor) -> Tensor:
    """Return C [n, n]: its column j has the entries `columns[j]` [bands] from the diagonal down, at norm one."""
    rounds, bands = columns.shape
    rows = torch.arange(rounds)[:, None] + torch.arange(bands)
    inside = rows < rounds
    entries = torch.where(inside, columns, 0.0)
    entries = entries / entries.norm(dim=1, keepdim=True)
    places = torch.arange(rounds)[:, None].expand(rounds, bands)
    return torch.zeros(rounds, rounds, dtype=columns.dtype).index_put((rows[inside], places[inside]), entries[inside])


def prefix_error(matrix: Tensor) -> Tensor:
    """Return the root mean square over prefixes of (A C^-1 z), for unit noise z and the prefix-sum matrix A."""
    prefix_sums = torch.ones_like(matrix).tril()
    factor = torch.linalg.solve_triangular(matrix, prefix_sums, upper=False, left=False)
    return (factor.square().sum() / len(matrix)).sqrt()


def banded_error(rounds: int, bands: int) -> float:
    """Return the least prefix error of a banded strategy that was found."""
    root = [1.0]  # coefficients of (1 - x)^(-1/2), whose square has all coefficients one
    for power in range(1, bands):
        root.append(root[-1] * (2 * power - 1) / (2 * power))
    columns = torch.tensor(root, dtype=torch.float64).repeat(rounds, 1).requires_grad_()
    optimizer = torch.optim.LBFGS([columns], max_iter=60, history_size=20, line_search_fn="strong_wolfe")

    def error() -> Tensor:
        optimizer.zero_grad()
        value = prefix_error(strategy(columns))
        value.backward()
        return value

    if bands > 1:
        optimizer.step(error)
    return float(prefix_error(strategy(columns.detach())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, nargs="+", default=[100, 200, 500])
    parser.add_argument("--bands", type=int, nargs="+", default=[2, 5, 10, 50])
    arguments = parser.parse_args()

    def multiplier(rate: float, steps: int) -> float:
        return accounting.noise_multiplier(arguments.epsilon, arguments.delta, {(rate, steps)})

    errors = []
    for rounds in arguments.rounds:
        independent = math.sqrt((rounds + 1) / 2)
        full = multiplier(1.0, rounds) * independent
        for bands in arguments.bands:
            participations = math.ceil(rounds / bands)
            cyclic = bands * multiplier(1.0, participations)
            errors.append(
                {
                    "rounds": rounds,
                    "bands": bands,
                    "full": full,
                    "cyclic": cyclic * independent,
                    "poisson": bands * multiplier(1 / bands, rounds) * independent,
                    # Unit noise on C x has sensitivity sqrt(k), as k compositions have: one multiplier serves both.
                    "banded": cyclic * banded_error(rounds, bands),
                }
            )
    print(json.dumps({"epsilon": arguments.epsilon, "delta": arguments.delta, "errors": errors}))


if __name__ == "__main__":
    main()
