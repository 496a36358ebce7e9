"""Attention within sentences of any lengths, in blocks of equal size: few large kernels, for accelerators.

`GroupedAttention` computes nothing in vain, in some ten kernels for each length that a sentence has. An accelerator
waits for their launches. Here whole sentences share a block of some hundred rows, with a copy of the rows that all
sentences attend to, and a mask says who attends to whom. One fused kernel takes all blocks. The products that the mask
throws away are a few per cent of a layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.encoders.frozen.attention import GroupedAttention
from sordino.encoders.frozen.pullback import apply, apply_all

LEAST_ROWS = 64  # of sentences in a block, where there are as many
TILE = 128  # a block's size is a multiple of what fused kernels work on at once

Encode = Callable[[Tensor, Any], Tensor]

_many: ContextVar[bool] = ContextVar("many", default=False)


@dataclass(frozen=True)
class Blocks:
    """The rows of a sequence, which are a prefix and then sentences, in B blocks of T rows.

    A block has the prefix, some whole sentences, and rows without meaning up to T.

    Attributes:
        prefix: P, the number of rows that all sentences attend to.
        rows: [B T], the row of the sequence that each row of a block has; 0 where it has no meaning.
        places: [R], the row of the blocks where each row of the sequence is. The prefix's are in the first block.
        spare: [B T], true for the rows of the blocks that `places` does not name.
        allowed: [B, T, T], true where a row attends to another of its block. Rows without meaning attend to themselves.
    """

    prefix: int
    rows: Tensor
    places: Tensor
    spare: Tensor
    allowed: Tensor

    @classmethod
    @torch.inference_mode(False)  # it is kept, and a later pass may want gradients
    def of(cls, groups: tuple[tuple[int, int], ...], prefix: int, causal: bool, device: torch.device) -> Blocks:
        """Lay out blocks on the host; the result is on a device.

        Args:
            groups: (number of sentences, their length), one after the other.
            prefix: P.
            causal: whether a row attends to no later one of its sentence, or of the prefix.
            device: of the result.
        """
        lengths = [length for sentences, length in groups for _ in range(sentences)]
        size = prefix + max(LEAST_ROWS, *lengths)
        size += -size % TILE
        blocks: list[list[tuple[int, int]]] = [[]]  # the first row and the length of each sentence
        filled, row = prefix, prefix
        for length in lengths:
            if filled + length > size:
                blocks.append([])
                filled = prefix
            blocks[-1].append((row, length))
            filled, row = filled + length, row + length
        rows = torch.zeros(len(blocks), size, dtype=torch.long)
        sentence = torch.full((len(blocks), size), -1)  # 0 is the prefix
        for block, sentences in enumerate(blocks):
            rows[block, :prefix] = torch.arange(prefix)
            sentence[block, :prefix] = 0
            at = prefix
            for number, (first, length) in enumerate(sentences, 1):
                rows[block, at : at + length] = torch.arange(first, first + length)
                sentence[block, at : at + length] = number
                at += length
        kept = sentence >= 0
        kept[1:, :prefix] = False
        places = torch.empty(row, dtype=torch.long)
        places[rows[kept]] = kept.flatten().nonzero()[:, 0]
        own = (sentence[:, :, None] == sentence[:, None]) & (sentence >= 0)[:, :, None]
        if causal:
            own = own.tril()
        to_prefix = (sentence > 0)[:, :, None] & (sentence == 0)[:, None]
        allowed = own | to_prefix | torch.eye(size, dtype=torch.bool)
        on_device = (part.to(device) for part in (rows.flatten(), places, ~kept.flatten(), allowed))
        return cls(prefix, *on_device)

    @property
    def count(self) -> int:
        """Return B."""
        return len(self.allowed)


layout = lru_cache(maxsize=64)(Blocks.of)  # nothing moves between host and device in a later pass


@dataclass(frozen=True)
class Sequences:
    """The blocks of N sequences of R rows.

    Attributes:
        blocks: of each.
        count: N.
        rows: [N B T], the row of all sequences [N R] that each row of a block has.
        places: [N R], the row of all blocks where each row of the sequences is.
        spare: [N B T, 1], true for the rows of the blocks that `places` does not name.
    """

    blocks: Blocks
    count: int
    rows: Tensor
    places: Tensor
    spare: Tensor

    @classmethod
    def of(cls, blocks: Blocks, count: int) -> Sequences:
        """Return the blocks of `count` sequences that are laid out alike."""
        number = torch.arange(count, device=blocks.rows.device)[:, None]
        rows = (number * len(blocks.places) + blocks.rows).flatten()
        places = (number * len(blocks.rows) + blocks.places).flatten()
        return cls(blocks, count, rows, places, blocks.spare.repeat(count)[:, None])

    def shared(self, cotangent: Tensor) -> Tensor:
        """Return the sum [N, P, W] over each sequence's blocks of the prefix's rows in cotangents [N B T, W]."""
        parts = cotangent.view(self.count, self.blocks.count, -1, cotangent.shape[-1])
        return parts[:, :, : self.blocks.prefix].sum(1)


@dataclass(frozen=True)
class Spread:
    """Copies queries, keys and values [N, R, 3 E], side by side, to blocks: three tensors [N B, T, E]."""

    sequences: Sequences

    def forward(self, qkv: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        count = self.sequences.count * self.sequences.blocks.count
        rows = qkv.reshape(-1, 3, qkv.shape[-1] // 3)
        parts = (part.index_select(0, self.sequences.rows) for part in rows.unbind(1))
        return tuple(part.view(count, -1, part.shape[-1]) for part in parts), ()

    def pullback(self, *cotangents: Tensor) -> tuple[Tensor]:
        if cotangents[0].ndim > 3:
            return (torch.stack([self.pullback(*each)[0] for each in zip(*cotangents, strict=True)]),)
        sequences, flat = self.sequences, [each.reshape(-1, each.shape[-1]) for each in cotangents]
        pulled = torch.stack([part.index_select(0, sequences.places) for part in flat], dim=1)
        pulled = pulled.view(sequences.count, -1, 3, pulled.shape[-1])
        if (prefix := sequences.blocks.prefix) and sequences.blocks.count > 1:
            pulled[:, :prefix] = torch.stack([sequences.shared(part) for part in flat], dim=2)
        return (pulled.flatten(2),)


@dataclass(frozen=True)
class Collect:
    """Copies rows of blocks [N B, T, E] back to sequences [N, R, E]."""

    sequences: Sequences

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = x.reshape(-1, x.shape[-1]).index_select(0, self.sequences.places)
        return rows.view(self.sequences.count, -1, x.shape[-1]), ()

    def pullback(self, cotangent: Tensor) -> tuple[Tensor]:
        if cotangent.ndim > 3:
            return (torch.stack([self.pullback(each)[0] for each in cotangent]),)
        count = self.sequences.count * self.sequences.blocks.count
        spread = cotangent.reshape(-1, cotangent.shape[-1]).index_select(0, self.sequences.rows)
        return (spread.masked_fill_(self.sequences.spare, 0).view(count, -1, cotangent.shape[-1]),)


@dataclass(frozen=True)
class BlockedAttention:
    """The same attention as a `GroupedAttention`, in blocks.

    Attributes:
        heads: attention heads, each of width d = E / heads.
        sequences: the layout.
        mask: [N B, 1, T, T], added to the products of queries and keys.
        scale: factor of those products.
    """

    heads: int
    sequences: Sequences
    mask: Tensor
    scale: float

    def __call__(self, qkv: Tensor) -> Tensor:
        """Mix values: queries, keys and values side by side [N, R, 3 E] to [N, R, E]."""
        parts = apply_all(Spread(self.sequences), 3, qkv)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=self.scale)
        return apply(Collect(self.sequences), mixed.transpose(1, 2).flatten(2))


@contextmanager
def many_cotangents(wanted: bool = True) -> Iterator[None]:
    """Have passes of this block ready for `batched_gradients`, which fused kernels take one after the other."""
    token = _many.set(wanted)
    try:
        yield
    finally:
        _many.reset(token)


def as_now(encode: Encode) -> Encode:
    """Return the same function, whose attention has the form that it would have now, wherever it is called."""
    many = _many.get()

    def encoded(context: Tensor, classes: Any) -> Tensor:
        with many_cotangents(many):
            return encode(context, classes)

    return encoded


def attention_for(grouped: GroupedAttention, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the form of an attention that is fast where a tensor [N, R, E] is, for N sequences of its type."""
    return blocked(grouped, x) if fuses(x) and not _many.get() else grouped


def fuses(x: Tensor) -> bool:
    """Tell whether few large kernels are faster than many small ones where a tensor is."""
    return x.is_cuda


def blocked(grouped: GroupedAttention, x: Tensor) -> BlockedAttention:
    """Return an attention in blocks, for N sequences of the device and type of a tensor [N, R, E]."""
    blocks = layout(grouped.groups, grouped.prefix, grouped.causal, x.device)
    mask = torch.zeros(blocks.allowed.shape, dtype=x.dtype, device=x.device)
    mask = mask.masked_fill_(~blocks.allowed, float("-inf")).repeat(len(x), 1, 1)[:, None]
    return BlockedAttention(grouped.heads, Sequences.of(blocks, len(x)), mask, grouped.scale)
