"""Public sentences to calibrate a tower on, and others to check it on: WordNet's definitions and ImageNet's names.

Definitions come in all lengths up to 128 tokens, the long ones made of several; names stand behind soft contexts, which
is what tuning will put there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sordino.encoders.bundled import TextTower
from sordino.mpc.calibration import Calibration
from sordino.mpc.distill import HELD_OUT, SOFT_LENGTHS, SOFT_NOISE, definitions, names
from sordino.mpc.tower import PrivateTower

LENGTHS = (8, 16, 32, 64, 128)  # tokens, at most
BATCH = 64
TOKENS = 1024  # of a batch, about, at most
Batch = tuple[Tensor, Tensor]  # embeddings [B, T, E], and mask [B, T]


def calibrated(tower: PrivateTower, text_tower: TextTower, margin: float = 1.5) -> Calibration:
    """A tower's ranges on public text: 552 sentences of all lengths, and 256 behind soft contexts.

    Args:
        tower: in the clear.
        text_tower: whose tokens and embeddings it has.
        margin: see `Calibration.measure`.
    """
    return Calibration.measure(tower, calibration_batches(text_tower, 3, 4, seed=0), margin)


def calibration_batches(tower: TextTower, each: int, soft: int, seed: int) -> Iterator[Batch]:
    """Batches of up to 64: `each` of every length of `LENGTHS`, and `soft` behind soft contexts; none is held out."""
    generator = torch.Generator().manual_seed(seed)
    rows = [tower.tokenizer.encode(text).ids for text in _definitions(held_out=False)]
    for longest in LENGTHS:
        for _ in range(each):
            yield embedded(tower, [_joined(rows, longest, generator) for _ in range(min(BATCH, TOKENS // longest))])
    own = [tower.tokenizer.encode(f"{name}.", add_special_tokens=False).ids for name in names()]
    for _ in range(soft):
        yield _soft(tower, own, generator)


def held_out_rows(tower: TextTower, longest: int, count: int = HELD_OUT) -> list[list[int]]:
    """Tokens of definitions that neither distillation nor calibration sees; after the first 512 in pairs, reversed."""
    rows = [tower.tokenizer.encode(text).ids for text in _definitions(held_out=True)]
    pairs = [[*second[:-1], *first[1:]] for first, second in pairwise(rows)]
    return [_cut(row, longest) for row in [*rows, *pairs][:count]]


def embedded(tower: TextTower, rows: list[list[int]]) -> Batch:
    """Sentences of tokens, padded with token 0."""
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
    return tower.words[tokens] + tower.positions[:longest], mask


def _definitions(held_out: bool) -> list[str]:
    texts = definitions()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()  # that of `distill`
    return [texts[index] for index in (order[:HELD_OUT] if held_out else order[HELD_OUT:])]


def _joined(rows: list[list[int]], longest: int, generator: torch.Generator) -> list[int]:
    """Definitions at random, one after the other, between the first's [CLS] and the last's [SEP]."""
    least = longest // 2 + 1
    row: list[int] = []
    while len(row) < least:
        following = rows[int(torch.randint(len(rows), (), generator=generator))]
        row = [*row[:-1], *following[1:]] if row else following
    return _cut(row, longest)


def _cut(row: list[int], longest: int) -> list[int]:
    return row if len(row) <= longest else [*row[: longest - 1], row[-1]]


def _soft(tower: TextTower, own: list[list[int]], generator: torch.Generator) -> Batch:
    """Names behind soft contexts of one length: random words with noise."""
    low, high = SOFT_LENGTHS
    length = int(torch.randint(low, high + 1, (), generator=generator))
    start, end = (tower.tokenizer.token_to_id(mark) for mark in ("[CLS]", "[SEP]"))
    words = torch.randint(len(tower.words), (BATCH, length), generator=generator).tolist()
    chosen = torch.randint(len(own), (BATCH,), generator=generator).tolist()
    rows = [[start, *context, *own[name], end] for context, name in zip(words, chosen, strict=True)]
    embeddings, mask = embedded(tower, rows)
    noise = torch.randn(BATCH, length, embeddings.shape[-1], generator=generator)
    embeddings[:, 1 : 1 + length] += SOFT_NOISE * noise.to(embeddings)
    return embeddings, mask
