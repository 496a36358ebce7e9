"""Randomness that depends on its purpose and on nothing else.

Every draw comes from a generator that is keyed by (seed, round, client, purpose). So a resumed run
draws the same numbers as an uninterrupted one. A client draws the same numbers alone and in a
stack. No code touches a global generator. Numbers are drawn on the CPU and then moved, which makes
them equal on every device.

Generators are counter-based (Philox: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC
2011) and keyed by all 128 bits of a digest. torch's CPU generator would keep the low 32 bits of its
seed, and some streams of a long run would be equal.

A seed protects nothing: anyone who guesses it can draw the same numbers. Noise that has to protect
somebody comes from `sordino.privacy.noise`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = Callable[[int], NDArray[np.uint64]]  # returns as many uniform integers as it is asked for

KEY_BYTES = 16  # Philox takes a key of 128 bits


def derive_key(*parts: int | str) -> int:
    """Return a 128-bit key made of any mix of integers and words; different parts give independent keys."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest(), "big")


def generator(*parts: int | str) -> np.random.Generator:
    """Return a fresh generator that is keyed by `derive_key(*parts)`."""
    return np.random.Generator(np.random.Philox(key=derive_key(*parts)))


@dataclass(frozen=True)
class Streams:
    """The random numbers of one round: one stream a client, and one that all parties share.

    Attributes:
        seed: the run's seed, or another key.
        round: the round, counted from 1; 0 is initialization.
        clients: the K clients' numbers in the whole federation, in the order of the stack.
        device: where drawn tensors are put.
    """

    seed: int
    round: int
    clients: Sequence[int]
    device: torch.device

    def generators(self, purpose: str) -> list[np.random.Generator]:
        """Return one fresh generator for every client of the stack."""
        return [self._generator(f"client {client}", purpose) for client in self.clients]

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Return standard normal numbers [K, *shape], float32, each client's own."""
        drawn = [_normal(generator, shape) for generator in self.generators(purpose)]
        return torch.stack(drawn).to(self.device)

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        """Return standard normal numbers of the given shape, float32, that every party draws alike."""
        return _normal(self._generator("all", purpose), shape).to(self.device)

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        """Return uniform numbers in [0, 1), float64 on the CPU: `counts` of them by client."""
        pairs = zip(counts, self.generators(purpose), strict=True)
        return [torch.from_numpy(generator.random(count)) for count, generator in pairs]

    def words(self, purpose: str) -> list[Words]:
        """Return for each client a source of uniform integers below 2^64."""

        def source(client: np.random.Generator) -> Words:
            return lambda count: client.integers(0, 2**64, size=count, dtype=np.uint64)

        return [source(client) for client in self.generators(purpose)]

    def _generator(self, owner: str, purpose: str) -> np.random.Generator:
        return generator(self.seed, self.round, owner, purpose)


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.asarray(generator.standard_normal(shape), dtype=np.float32))
