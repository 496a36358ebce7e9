"""Every source of randomness: seeded streams, the operating system, and simulated noise.

Seeded randomness depends on its purpose and on nothing else.

Every draw comes from a generator that is keyed by (seed, round, client, purpose). So a resumed run
draws the same numbers as an uninterrupted one. A client draws the same numbers alone and in a
stack. No code touches a global generator. Numbers are drawn on the CPU and then moved, which makes
them equal on every device.

Generators are counter-based (Philox: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC
2011) and keyed by all 128 bits of a digest. torch's CPU generator would keep the low 32 bits of its
seed, and some streams of a long run would be equal.

A seed protects nothing: anyone who guesses it can draw the same numbers. Noise and Poisson samples
that have to protect somebody come from the operating system, and so do keys and shares.

`SystemRandomness` draws from the operating system's entropy and cannot be repeated. It is the default wherever a
mechanism is on.

`simulated` numbers can be repeated. Whoever knows seed and nonce can take the noise off again, so nothing is protected
and no such run is called private. Two runs that shared noise would even give away each other's uploads: of u1 and u2
with noise multipliers z1 and z2, (z2 u1 - z1 u2) / (z2 - z1) has no noise. So the key depends on everything that a run
is made of: its nonce, seed, method, settings, model and data. Only the very same run draws the same noise again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # functions import torch and scipy, as what needs bytes alone is imported in a moment without them
    import torch
    from torch import Tensor

Words = Callable[[int], NDArray[np.uint64]]  # returns as many uniform integers as it is asked for

NONCE_BYTES = 16
GRID_BITS = 20  # a number with noise is a multiple of this power of two below the noise's deviation
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
        import torch

        drawn = [_normal(generator, shape) for generator in self.generators(purpose)]
        return torch.stack(drawn).to(self.device)

    def normals(self, purposes: Sequence[str], *shape: int) -> Tensor:
        """Return the numbers of several purposes as one tensor [n, K, *shape], put on the device in one copy."""
        import torch

        drawn = [_normal(generator, shape) for purpose in purposes for generator in self.generators(purpose)]
        return torch.stack(drawn).view(len(purposes), len(self.clients), *shape).to(self.device)

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        """Return standard normal numbers of the given shape, float32, that every party draws alike."""
        return _normal(self._generator("all", purpose), shape).to(self.device)

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        """Return uniform numbers in [0, 1), float64 on the CPU: `counts` of them by client."""
        import torch

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
    import torch

    return torch.from_numpy(np.asarray(generator.standard_normal(shape), dtype=np.float32))


def system_bytes(count: int) -> bytes:
    """Return uniform bytes from the operating system: for keys, shares, noise, and names that nobody else has."""
    return os.urandom(count)


class Randomness(Protocol):
    """Numbers for the K clients of a stack, each client's own, and numbers of the server's.

    Normal numbers have all their bits, float64, and are added by `noised`. They are on the CPU where the device has no
    such numbers.
    """

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers [K, *shape], float64."""
        ...

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers of the given shape, float64."""
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

    Each normal number is half the sum of four, so that all floating-point numbers near it can come (Holohan and
    Braghin, Secure Random Sampling in Differential Privacy, ESORICS 2021); see `noised`.

    Attributes:
        clients: K.
        device: where drawn tensors are put.
    """

    clients: int
    device: torch.device

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return self.common_normal(purpose, self.clients, *shape)

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        return _put(_four_normal(system_words, shape), self.device)

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        import torch

        return [torch.from_numpy(_integers(system_words, count) * 2.0**-53) for count in counts]

    def words(self, purpose: str) -> list[Words]:
        return [system_words] * self.clients


@dataclass(frozen=True)
class KeyedRandomness:
    """Numbers of one round that only the holder of a key can draw, and draw again.

    A party that restarts in the middle of a round goes on with the same noise, rather than with a second one that
    nobody counted. The key comes from the operating system, anew for every round, and never leaves the party. Streams
    are ChaCha20's (Bernstein, 2008), one for each purpose and client. A stream that is used again goes on, so that no
    noise is added twice. Normal numbers are made as those of `SystemRandomness`.

    Attributes:
        key: 32 bytes of `system_bytes`; none is ever used for two rounds.
        clients: the K clients' numbers.
        device: where drawn tensors are put.
    """

    key: bytes
    clients: Sequence[int]
    device: torch.device
    _streams: dict[tuple[str, str], Words] = field(default_factory=dict, repr=False)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        import torch

        drawn = [_four_normal(self._stream(f"client {client}", purpose), shape) for client in self.clients]
        return _put(torch.stack(drawn), self.device)

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        return _put(_four_normal(self._stream("all", purpose), shape), self.device)

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        import torch

        pairs = zip(counts, self.words(purpose), strict=True)
        return [torch.from_numpy(_integers(words, count) * 2.0**-53) for count, words in pairs]

    def words(self, purpose: str) -> list[Words]:
        return [self._stream(f"client {client}", purpose) for client in self.clients]

    def _stream(self, owner: str, purpose: str) -> Words:
        if (owner, purpose) not in self._streams:
            self._streams[owner, purpose] = self._new_stream(owner, purpose)
        return self._streams[owner, purpose]

    def _new_stream(self, owner: str, purpose: str) -> Words:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        key = hashlib.blake2b(f"{owner}\x1f{purpose}".encode(), key=self.key, digest_size=32).digest()
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        return lambda count: np.frombuffer(stream.update(bytes(8 * count)), dtype=np.uint64)


def new_nonce() -> str:
    """Return 128 bits from the operating system, in hex: what tells a run from all others."""
    return system_bytes(NONCE_BYTES).hex()


def simulated(nonce: str, run: str, round: int, clients: Sequence[int], device: torch.device) -> Randomness:
    """Return noise and samples of a round that can be drawn again, for simulations.

    Args:
        nonce: of the run, as `new_nonce` gives it.
        run: a digest of all that the run is made of, its seed included.
        round, clients, device: as of `Streams`.
    """
    return SimulatedNoise(derive_key("simulated noise", nonce, run), round, clients, device)


class SimulatedNoise(Streams):
    """Streams whose normal numbers have all their bits, as noise must."""

    def normal(self, purpose: str, *shape: int) -> Tensor:
        import torch

        drawn = [torch.from_numpy(np.asarray(each.standard_normal(shape))) for each in self.generators(purpose)]
        return _put(torch.stack(drawn), self.device)

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        import torch

        return _put(torch.from_numpy(np.asarray(self._generator("all", purpose).standard_normal(shape))), self.device)


def noised(exact: Tensor, deviation: float | Tensor, normal: Tensor) -> Tensor:
    """Add noise, so that the bits of the result tell nothing that the noise hides.

    A float32 noise times a deviation takes few of the values near it, and other ones from another exact value: most
    rows of results would be possible with one data set alone, at any epsilon (Mironov, On Significance of the Least
    Significant Bits for Differential Privacy, CCS 2012). So the sum is computed in float64, where about 2^32 values of
    the noise lie between two numbers of a grid, and is then rounded to that grid. It is as fine as 2^-`GRID_BITS` of
    the deviation and depends on nothing else. All later rounding is post-processing. This holds while exact values are
    below 2^30 deviations.

    Args:
        exact: [K, ...], or of any shape where the deviation is one number.
        deviation: of the noise, public: one number, or one for each client [K]; where it is 0, nothing is changed.
        normal: standard normal numbers of a `Randomness`, in the shape of `exact`.

    Returns:
        a tensor as `exact`.
    """
    import torch

    normal = normal.double()
    scale = torch.as_tensor(deviation, dtype=normal.dtype, device=normal.device)
    if scale.ndim:
        scale = scale.view(-1, *[1] * (exact.ndim - 1))
    grid = torch.exp2(torch.log2(scale).floor() - GRID_BITS)
    total = exact.to(normal) + scale * normal
    return torch.where(scale > 0, (total / grid).round() * grid, exact.to(normal)).to(exact)


def _put(noise: Tensor, device: torch.device) -> Tensor:
    return noise if device.type == "mps" else noise.to(device)  # which has no float64


def system_words(count: int) -> NDArray[np.uint64]:
    """Return uniform integers below 2^64 from the operating system."""
    return np.frombuffer(system_bytes(8 * count), dtype=np.uint64)


def _integers(words: Words, *shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Uniform integers below 2^53, as float64, which holds them exactly."""
    drawn = words(int(np.prod(shape))) >> np.uint64(11)
    return drawn.astype(np.float64).reshape(shape)


def _four_normal(words: Words, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float64, each half the sum of four."""
    import torch
    from scipy.special import ndtri

    four = ndtri((_integers(words, 4, *shape) + 0.5) * 2.0**-53)
    return torch.from_numpy(np.asarray(four.sum(0) / 2))
