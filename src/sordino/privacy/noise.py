"""Where noise and Poisson samples come from: the operating system, or, for simulations, a key.

`SystemRandomness` draws from the operating system's entropy and cannot be repeated. It is the default wherever a
mechanism is on.

`simulated` numbers can be repeated. Whoever knows seed and nonce can take the noise off again, so nothing is protected
and no such run is called private. Two runs that shared noise would even give away each other's uploads: of u1 and u2
with noise multipliers z1 and z2, (z2 u1 - z1 u2) / (z2 - z1) has no noise. So the key depends on everything that a run
is made of: its nonce, seed, method, settings, model and data. Only the very same run draws the same noise again.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from sordino.randomness import Streams, Words, derive_key

NONCE_BYTES = 16


class Randomness(Protocol):
    """Numbers for the K clients of a stack, each client's own, and numbers of the server's."""

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers [K, *shape], float32."""
        ...

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers of the given shape, float32."""
        ...

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        """For each client as many uniform numbers in [0, 1) as it is asked for, float64 on the CPU."""
        ...

    def words(self, purpose: str) -> list[Words]:
        """For each client a source of uniform integers below 2^64."""
        ...


@dataclass(frozen=True)
class SystemRandomness:
    """Numbers from the operating system's entropy; `purpose` does not matter.

    Each normal number is half the sum of four, so that rounding errors of the one addition that releases it do not
    give away what was below the noise (Holohan and Braghin, Secure Random Sampling in Differential Privacy, ESORICS
    2021, the remedy that Opacus uses too, against the attack of Mironov, CCS 2012).

    Attributes:
        clients: K.
        device: where drawn tensors are put.
    """

    clients: int
    device: torch.device

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return self.common_normal(purpose, self.clients, *shape)

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        four = ndtri((_integers(4, *shape) + 0.5) * 2.0**-53)
        return torch.from_numpy(np.asarray(four.sum(0) / 2)).float().to(self.device)

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        return [torch.from_numpy(_integers(count) * 2.0**-53) for count in counts]

    def words(self, purpose: str) -> list[Words]:
        return [_words] * self.clients


def new_nonce() -> str:
    """Return 128 bits from the operating system, in hex: what tells a run from all others."""
    return secrets.token_hex(NONCE_BYTES)


def simulated(nonce: str, run: str, round: int, clients: Sequence[int], device: torch.device) -> Randomness:
    """Return noise and samples of a round that can be drawn again, for simulations.

    Args:
        nonce: of the run, as `new_nonce` gives it.
        run: a digest of all that the run is made of, its seed included.
        round, clients, device: as of `Streams`.
    """
    return Streams(derive_key("simulated noise", nonce, run), round, clients, device)


def _words(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64)


def _integers(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Uniform integers below 2^53, as float64, which holds them exactly."""
    size = int(np.prod(shape))
    drawn = _words(size) >> np.uint64(11)
    return drawn.astype(np.float64).reshape(shape)
