"""Sentences as a data owner sends them to a tower: embedded, grouped by length, and padded with their own last token.

The owner embeds. Token and position embeddings are public to the data owner, and so is the tokenizer; what stays
private of a model is its layers. Whoever encodes learns how many sentences there are, and their lengths.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.errors import RunError
from sordino.mpc.tower.tower import PrivateTower


@dataclass(frozen=True, eq=False)
class Sentences:
    """A batch.

    Attributes:
        embeddings: [B, T, E], of tokens with their positions; places behind a sentence's end repeat its last token.
        lengths: tokens of each, int64 [B]; T is the longest, and ceil(log2) of all is the same, since attention on
            shares takes means over a power of two, see `bracket`.
    """

    embeddings: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """1 for tokens, 0 for padding, [B, T], in the embeddings' precision."""
        places = torch.arange(self.embeddings.shape[1])
        return (places < self.lengths[:, None]).to(self.embeddings)


Forward = Callable[[Sequence[Sentences]], list[Tensor]]  # to mean-pooled last hidden states, [B, E] a batch


def bracket(length: int) -> int:
    """The least b with length <= 2^b: sentences of one bracket may share a batch."""
    return math.ceil(math.log2(length))


def batches(rows: Sequence[Tensor], largest: int) -> tuple[list[Sentences], list[list[int]]]:
    """Embedded sentences as batches, and which sentences are in each.

    Args:
        rows: [T, E] each.
        largest: sentences of a batch, at most.
    """
    brackets: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        brackets[bracket(len(rows[index]))].append(index)
    members = [
        indices[start : start + largest]
        for _, indices in sorted(brackets.items())
        for start in range(0, len(indices), largest)
    ]
    return [_batch([rows[index] for index in indices]) for indices in members], members


def encoded(forward: Forward, rows: Sequence[Tensor], largest: int = 64) -> Tensor:
    """Mean-pooled last hidden states [N, E] of N embedded sentences, in their order.

    Raises:
        RunError: what came back is not of that shape.
    """
    groups, members = batches(rows, largest)
    features = forward(groups)
    if [tuple(part.shape) for part in features] != [(len(indices), rows[0].shape[-1]) for indices in members]:
        raise RunError("a tower gave features of another shape than was asked for")
    order = torch.tensor([index for indices in members for index in indices])
    return torch.cat(features)[order.argsort()]


def in_the_clear(tower: PrivateTower) -> Forward:
    """A tower that is not shared: the oracle."""

    def forward(groups: Sequence[Sentences]) -> list[Tensor]:
        pooled = []
        for group in groups:
            mask = group.mask
            states = tower(group.embeddings, mask)[-1]
            pooled.append((states * mask[..., None]).sum(1) / group.lengths[:, None].to(states))
        return pooled

    return forward


def _batch(rows: Sequence[Tensor]) -> Sentences:
    longest = max(len(row) for row in rows)
    filled = [F.pad(row.mT[None], (0, longest - len(row)), mode="replicate")[0].mT for row in rows]
    return Sentences(torch.stack(filled), torch.tensor([len(row) for row in rows]))
