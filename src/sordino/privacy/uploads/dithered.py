"""Quantization whose error is Gaussian noise, for whoever does not know the dither.

Ling, Shiu, Wu, Sun, Li, Song, Xu, Communication-Efficient and Privacy-Adaptable Mechanism for Federated Learning
(CEPAM), 2025 (arXiv 2501.12046), for single numbers, where nothing has to be rejected. A number x is sent as the
integer m = round(x / step + u), with a dither u, uniform in [-1/2, 1/2), and the random step 2 s w. Here w is the
length of a normal vector with three entries, so w^2 is chi-squared with three degrees of freedom. Both ends draw u
and w from one key. The receiver reads (m - u) step. The error is uniform within s w of zero, whatever x is, and over
w it is N(0, s^2): the density of N(0, 1) is a mixture of uniform ones, with just these half widths.

Who has the key sees no noise: m follows from x by a rule, and tells it to within half a step. Only who sees the sum,
and no key, has the noise. The paper's server is trusted so, too. Its public code draws the step twice; here both ends
draw it from the key.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sordino.randomness import KeyedRandomness, Randomness

KEY_BYTES = 32
LEAST_WIDTH = 1e-6  # of w; below it, with a probability under 1e-18, an integer might not fit its type


def drawn_keys(randomness: Randomness) -> Tensor:
    """Return a key for each of K clients, [K, KEY_BYTES], uint8."""
    keys = [words(KEY_BYTES // 8).view(np.uint8) for words in randomness.words("key of the dither")]
    return torch.from_numpy(np.stack(keys))


def quantized(values: Tensor, deviation: float, keys: Tensor, purpose: str) -> Tensor:
    """Return the integers that clients send, [K, ...], int32.

    Args:
        values: [K, ...].
        deviation: s, of the noise on each number.
        keys: [K, KEY_BYTES], of the round; no two tensors of one purpose have the same.
        purpose: the tensor's name.
    """
    steps, dither = _drawn(keys, purpose, values.shape, deviation)
    return (values.cpu().double() / steps + dither).round().to(torch.int32)


def restored(codes: Tensor, deviation: float, keys: Tensor, purpose: str) -> Tensor:
    """Return what clients sent, with noise N(0, deviation^2) on each number: [K, ...], float64."""
    steps, dither = _drawn(keys, purpose, codes.shape, deviation)
    return (codes.cpu().double() - dither) * steps


def _drawn(keys: Tensor, purpose: str, shape: tuple[int, ...], deviation: float) -> tuple[Tensor, Tensor]:
    """Return (steps, dither), each [K, ...]."""
    size = int(np.prod(shape[1:]))
    steps, dither = [], []
    for key in keys:
        draws = KeyedRandomness(bytes(key.tolist()), [0], torch.device("cpu"))
        width = draws.common_normal(f"steps of {purpose}", 3, size).double().norm(dim=0)
        steps.append(2 * deviation * width.clamp(min=LEAST_WIDTH))
        dither.append(draws.uniform(f"dither of {purpose}", [size])[0] - 0.5)
    return torch.stack(steps).view(shape), torch.stack(dither).view(shape)
