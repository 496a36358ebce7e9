"""Sentences in the form that a data owner sends to a tower: embedded, grouped by length, padded with the last token.

The data owner embeds them. It knows the tokenizer and the embeddings of tokens and positions; only a model's layers
stay private. The servers that encode learn the number of sentences and their lengths.
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
    """A batch of sentences.

    Attributes:
        embeddings: [B, T, E], of tokens with their positions. Places behind a sentence's end repeat its last token.
        lengths: tokens of each sentence, int64 [B]. T is the longest. All have the same ceil(log2), since attention
            on shares takes means over a power of two, see `bracket`.
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
    """Return the least b with length <= 2^b. Sentences of one bracket may share a batch."""
    return math.ceil(math.log2(length))


def batches(rows: Sequence[Tensor], largest: int) -> tuple[list[Sentences], list[list[int]]]:
    """Group embedded sentences in batches.

    Args:
        rows: sentences, [T, E] each.
        largest: most sentences of a batch.

    Returns:
        The batches, and for each batch the indices of its sentences.
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
    """Encode N embedded sentences to mean-pooled last hidden states [N, E], in their order.

    Raises:
        RunError: `forward` returned features of another shape.
    """
    groups, members = batches(rows, largest)
    features = forward(groups)
    if [tuple(part.shape) for part in features] != [(len(indices), rows[0].shape[-1]) for indices in members]:
        raise RunError("a tower gave features of another shape than was asked for")
    order = torch.tensor([index for indices in members for index in indices])
    return torch.cat(features)[order.argsort()]


def in_the_clear(tower: PrivateTower) -> Forward:
    """Return the forward pass of a tower that is not shared: the oracle."""

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
