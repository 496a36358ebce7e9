"""Randomness that depends on what it is for and on nothing else.

Every draw comes from a generator that is derived from (seed, round, client, purpose). So a resumed run draws what an
uninterrupted one draws, a client draws the same whether it is simulated alone or in a stack, and no code touches
torch's global generator. Numbers are drawn on the CPU and then moved, which makes them equal on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any mix of integers and words; different parts give independent seeds."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Streams:
    """The random numbers of one round: one stream a client, and one that all parties have in common.

    Attributes:
        seed: the run's seed.
        round: the round, counted from 1; 0 is initialisation.
        clients: the K clients' numbers in the whole federation, in the order of the stack.
        device: where drawn tensors are put.
    """

    seed: int
    round: int
    clients: Sequence[int]
    device: torch.device

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One fresh CPU generator for every client of the stack."""
        return [self._generator(f"client {client}", purpose) for client in self.clients]

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers [K, *shape], float32, each client's own."""
        drawn = [torch.randn(shape, generator=generator) for generator in self.generators(purpose)]
        return torch.stack(drawn).to(self.device)

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers of the given shape, float32, that every party draws alike."""
        return torch.randn(shape, generator=self._generator("all", purpose)).to(self.device)

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        """Uniform numbers in [0, 1), float64 on the CPU, for each client as many as it is asked for."""
        return [
            torch.rand(count, generator=generator, dtype=torch.float64)
            for count, generator in zip(counts, self.generators(purpose), strict=True)
        ]

    def _generator(self, owner: str, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, self.round, owner, purpose))
