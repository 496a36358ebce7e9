"""Where noise and samples come from: the run's seed, or the operating system.

With a seed, an experiment can be repeated, and whoever knows the seed can take the noise off again: nothing is
protected from them. `SystemRandomness` draws from the operating system's entropy and cannot be repeated.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor


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
        return torch.from_numpy(four.sum(0) / 2).float().to(self.device)

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        return [torch.from_numpy(_integers(count) * 2.0**-53) for count in counts]


def _integers(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Uniform integers below 2^53, as float64, which holds them exactly."""
    size = int(np.prod(shape))
    drawn = np.frombuffer(secrets.token_bytes(8 * size), dtype=np.uint64) >> np.uint64(11)
    return drawn.astype(np.float64).reshape(shape)
