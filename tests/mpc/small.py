"""A small tower for tests, and sentences for it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mpc.both import normal
from sordino.mpc.tower.sentences import Sentences, in_the_clear
from sordino.mpc.tower.tower import PrivateTower

WIDTH, HEADS, INNER, FREQUENCIES = 32, 4, 64, 64
Batch = tuple[Tensor, Tensor]


def small_tower() -> PrivateTower:
    """Two layers with heads of very different scales, whose queries and keys need it."""

    def weights(seed: int, *shape: int) -> Tensor:
        return normal(*shape, seed=seed).float()

    layers = []
    for start in (0, 100):
        heads = torch.tensor([0.3, 1.0, 2.0, 6.0, *[1.0] * HEADS, *[0.5] * HEADS]).repeat_interleave(WIDTH // HEADS)
        layer = {
            "qkv.weight": weights(start, 3 * WIDTH, WIDTH) * heads[:, None] / math.sqrt(WIDTH),
            "qkv.bias": weights(start + 1, 3 * WIDTH) * heads,
            "features": 0.5 * weights(start + 2, HEADS, WIDTH // HEADS, FREQUENCIES),
            "out.weight": weights(start + 3, WIDTH, WIDTH) / math.sqrt(WIDTH),
            "inner.weight": weights(start + 4, INNER, WIDTH) / math.sqrt(WIDTH),
            "outer.weight": weights(start + 5, WIDTH, INNER) / math.sqrt(INNER),
        }
        layer |= {f"{name}.bias": 0.1 * weights(start + 6, len(layer[f"{name}.weight"])) for name in ("out", "inner")}
        layer["outer.bias"] = 0.1 * weights(start + 7, WIDTH)
        for number in (1, 2):
            layer[f"norm{number}.weight"] = 1 + 0.1 * weights(start + 7 + number, WIDTH)
            layer[f"norm{number}.bias"] = 0.1 * weights(start + 9 + number, WIDTH)
        layers.append(layer)
    norm = 1 + 0.1 * weights(201, WIDTH), 0.1 * weights(202, WIDTH)
    return PrivateTower(HEADS, 1e-12, norm, tuple(layers))


def sentences(batch: int, length: int, seed: int) -> Tensor:
    """Embeddings whose first token is always the same, and five times as large as the others."""
    first = 0.25 * normal(1, 1, WIDTH, seed=999).expand(batch, 1, WIDTH)
    return torch.cat([first, 0.05 * normal(batch, length - 1, WIDTH, seed=seed)], 1).float()


def batches(seed: int, count: int = 100) -> Iterator[Batch]:
    """Of several lengths, some of them padded; padding would be far out of range."""
    for length in (2, 3, 5, 8, 13, 32, 40):
        embeddings = sentences(count, length, 1000 * seed + length)
        mask = torch.ones(count, length)
        if length == 40:
            embeddings[:, 30:], mask[:, 30:] = 100.0, 0.0
        yield embeddings, mask


def groups() -> list[Sentences]:
    """Two batches, one of them padded."""
    padded = sentences(3, 7, seed=5)
    padded[0, 5:] = padded[0, 4]
    return [Sentences(padded, torch.tensor([5, 7, 7])), Sentences(sentences(2, 13, seed=6), torch.tensor([13, 13]))]


def agree(found: list[Tensor], given: list[Sentences]) -> bool:
    oracle = in_the_clear(small_tower())(given)
    return all(float(cosine_similarity(a, b, dim=-1).min()) > 0.9995 for a, b in zip(found, oracle, strict=True))
