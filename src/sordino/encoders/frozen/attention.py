"""Attention within sentences of equal lengths, and to a prefix that they share, with its own backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sordino.encoders.frozen.pullback import apply, for_each

Heads = Sequence[Tensor]  # queries, keys and values, each [N heads, T, d]


@dataclass(frozen=True)
class GroupedAttention:
    """Attention in N sequences of rows: a prefix, then blocks of sentences of one length each.

    A sentence attends to itself and to the whole prefix under one softmax; the prefix attends to itself. The prefix's
    keys and values enter one product with the queries of all sentences of a block, and are never copied.

    Attributes:
        heads: attention heads, each of width d = E / heads.
        groups: (number of sentences, their length), block after block.
        prefix: P, the number of rows that the sentences share; 0 if they share none.
        causal: whether a row attends to no later one of its sentence, or of the prefix.
        scale: factor of the products of queries and keys.
    """

    heads: int
    groups: tuple[tuple[int, int], ...]
    prefix: int = 0
    causal: bool = False
    scale: float = 1.0

    def __call__(self, qkv: Tensor) -> Tensor:
        """Mix values: queries, keys and values side by side [N, R, 3 E] to [N, R, E]."""
        return apply(self, qkv)

    def forward(self, qkv: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        mixed, kept = [], []
        shared = None
        for rows, (sentences, _) in zip(qkv.split(self._rows, dim=1), self._blocks, strict=True):
            heads = self._by_head(rows)
            attended, weights = attend(heads.unbind(), shared, sentences, self.causal, self.scale)
            if self.prefix and shared is None:
                shared = heads[1], heads[2]
            mixed.append(attended.unflatten(0, (len(qkv), self.heads)).transpose(1, 2))
            kept += [heads, weights]
        return torch.cat(mixed, dim=1).flatten(2), tuple(kept)

    def pullback(self, cotangent: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        if cotangent.ndim == 4:
            return for_each(self.pullback, cotangent, kept, [1, 0] * len(self._blocks))
        count, _, width = cotangent.shape
        result = cotangent.new_empty(*cotangent.shape[:2], 3 * width)
        heads, weights = kept[::2], kept[1::2]
        shared = heads[0][1:] if self.prefix else None
        of_shared = None if shared is None else torch.zeros_like(shared)
        blocks = list(
            zip(heads, weights, cotangent.split(self._rows, dim=1), result.split(self._rows, dim=1), strict=True)
        )
        for number, (sentences, _) in reversed(list(enumerate(self._blocks))):  # the prefix's own block comes last
            head, weight, incoming, outgoing = blocks[number]
            of_attended = incoming.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1)
            is_prefix = shared is not None and number == 0
            pulled = _pull_attention(
                of_attended, head, weight, None if is_prefix else shared, of_shared, sentences, self.scale
            )
            if is_prefix and of_shared is not None:
                pulled[1:] += of_shared
            split = outgoing.unflatten(2, (3, self.heads, -1))  # [N, n, 3, heads, d]
            split.copy_(pulled.unflatten(1, (count, self.heads)).permute(1, 3, 0, 2, 4))
        return (result,)

    @cached_property
    def _blocks(self) -> tuple[tuple[int, int], ...]:
        """Return the groups, with the prefix as one sentence before them."""
        return ((1, self.prefix), *self.groups) if self.prefix else self.groups

    @cached_property
    def _rows(self) -> list[int]:
        return [sentences * length for sentences, length in self._blocks]

    def _by_head(self, rows: Tensor) -> Tensor:
        """Reorder [N, n, 3 E] to queries, keys and values [3, N heads, n, d]."""
        heads: Tensor = rows.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)
        return heads


def attend(
    heads: Heads, shared: Sequence[Tensor] | None, sentences: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within sentences of one length, and to a shared prefix.

    Args:
        heads: queries [N heads, sentences n, d], keys and values [N heads, sentences L, d]. n is L, or 1 if only the
            last row of each sentence has a query.
        shared: keys and values [N heads, P, d] of the prefix; None if there is none.
        sentences: their number.
        causal: whether a row attends to no later one.
        scale: of products of queries and keys.

    Returns:
        The mixed values [N heads, sentences n, d], and the weights [N heads sentences, n, P + L].
    """
    query, key, value = (_by_sentence(part, sentences) for part in heads)
    later = None
    if causal and query.shape[1] > 1:
        later = torch.full((query.shape[1], key.shape[1]), float("-inf"), dtype=query.dtype, device=query.device)
        later = later.triu(1)
    to_own = scaled_product(query, key.mT, scale, later)
    if shared is None:
        weights = to_own.softmax(-1)
        mixed: Tensor = torch.bmm(weights, value).view(heads[0].shape)
        return mixed, weights
    to_prefix = scaled_product(heads[0], shared[0].mT, scale)  # [N heads, sentences n, P]
    weights = torch.cat([to_prefix.view(*query.shape[:2], -1), to_own], dim=-1).softmax(-1)
    on_prefix, on_own = weights.split([to_prefix.shape[-1], to_own.shape[-1]], dim=-1)
    of_own = torch.bmm(on_own, value).view(heads[0].shape)
    return torch.baddbmm(of_own, on_prefix.reshape(to_prefix.shape), shared[1]), weights


def scaled_product(left: Tensor, right: Tensor, scale: float, added: Tensor | None = None) -> Tensor:
    """Return scale * left @ right [b, m, n], with [m, n] added."""
    if added is None:
        return torch.baddbmm(left.new_zeros(1), left, right, beta=0, alpha=scale)
    return torch.baddbmm(added, left, right, alpha=scale)


def _pull_attention(
    cotangent: Tensor,
    heads: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    of_shared: Tensor | None,
    sentences: int,
    scale: float,
) -> Tensor:
    """Return the cotangents of queries, keys and values [3, N heads, n, d], and add those of the prefix to `of_shared`.

    Args:
        cotangent: of the mixed values, [N heads, n, d].
        heads, weights, shared: as in `attend`, the heads as one tensor.
        of_shared: [2, N heads, P, d].
        sentences: their number.
        scale: of products of queries and keys.
    """
    query, key, value = (_by_sentence(part, sentences) for part in heads)
    of_mixed = _by_sentence(cotangent, sentences)
    pulled = torch.empty_like(heads)
    of_query, of_key, of_value = (_by_sentence(part, sentences) for part in pulled)
    prefix = 0 if shared is None else shared.shape[2]
    on_own = weights[..., prefix:]
    torch.bmm(on_own.mT, of_mixed, out=of_value)
    of_weights = torch.bmm(of_mixed, value.mT)
    if shared is not None:
        on_prefix = weights[..., :prefix].reshape(*cotangent.shape[:2], prefix)
        of_shared[1].baddbmm_(on_prefix.mT, cotangent)  # type: ignore[index]
        of_prefix = torch.bmm(cotangent, shared[1].mT).view(*of_weights.shape[:2], prefix)
        of_weights = torch.cat([of_prefix, of_weights], dim=-1)
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    own_scores = of_scores[..., prefix:]
    torch.baddbmm(of_query, own_scores, key, beta=0, alpha=scale, out=of_query)
    torch.baddbmm(of_key, own_scores.mT, query, beta=0, alpha=scale, out=of_key)
    if shared is not None:
        prefix_scores = of_scores[..., :prefix].reshape(*cotangent.shape[:2], prefix)
        pulled[0].baddbmm_(prefix_scores, shared[0], alpha=scale)
        of_shared[0].baddbmm_(prefix_scores.mT, heads[0], alpha=scale)  # type: ignore[index]
    return pulled


def _by_sentence(heads: Tensor, sentences: int) -> Tensor:
    """Split [N heads, sentences n, d] to [N heads sentences, n, d]."""
    return heads.reshape(-1, heads.shape[1] // sentences, heads.shape[2])
