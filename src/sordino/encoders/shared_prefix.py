"""Frozen text towers as plain functions: CLIP's with a prefix that all classes share, SigLIP's in full.

The sentences of one prompt are `start, context, name of class c, '.', end`, for C classes. In a
causal tower no token of the prefix (start and context) attends to the name. The prefix's hidden
states are therefore the same in all C sentences: they are computed once, and every class's suffix
attends to the same keys and values. The end token, whose state is the feature, does not attend to
later tokens either, so padding is not computed at all. Both hold exactly, not approximately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sordino.encoders.base import ClassTokens
from sordino.encoders.frozen.attention import GroupedAttention, attend
from sordino.encoders.frozen.blocks import attention_for
from sordino.encoders.transformer import Layer, Linear, Norm

# With more rows than this in a full (SigLIP) pass on a CPU, backward recomputes each layer instead of
# keeping its activations. An accelerator's memory bounds a pass otherwise, see `prompt_model`.
RECOMPUTED_ROWS = 4096


@dataclass(frozen=True)
class TextTower:
    """A frozen text transformer.

    Attributes:
        start: [S, E], embeddings of the tokens before the context (CLIP has one, SigLIP none).
        padding: [E], embedding of the padding token.
        positions: [limit, E].
        head: from width E to the joint space, width D.
        heads: attention heads, each of width d = E / heads.
    """

    start: Tensor
    padding: Tensor
    positions: Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear
    heads: int

    @classmethod
    def of(cls, model: Any, start: Tensor, padding: Tensor) -> TextTower:
        """Take the text tower out of a transformers CLIP or SigLIP model, which loses its own copy of the layers."""
        text, config, like = model.text_model, model.config.text_config, model.logit_scale
        tower = cls(
            start=start.to(like),
            padding=padding.to(like),
            positions=text.embeddings.position_embedding.weight.detach(),
            layers=tuple(Layer.of(layer, config.hidden_act) for layer in text.encoder.layers),
            final_norm=Norm.of(text.final_layer_norm),
            head=Linear.of(text.head if hasattr(text, "head") else model.text_projection),
            heads=config.num_attention_heads,
        )
        text.encoder.layers = nn.ModuleList()
        return tower

    def per_head(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Split [N, T, n E] into n tensors [N, heads, T, d]."""
        parts = projected.shape[-1] // self.layers[0].width
        split = projected.reshape(*projected.shape[:2], parts, self.heads, -1)
        return split.permute(2, 0, 3, 1, 4).unbind()


def causal_features(tower: TextTower, contexts: Tensor, classes: ClassTokens) -> Tensor:
    """Compute the features of N contexts and C classes through a causal tower, with a shared prefix.

    1. Join the prefix [N, P, E] (start, context) and suffixes [R, E] (R: real tokens of all
       classes) to one sequence of P + R rows, so that every linear layer is one large product.
    2. In each layer, let the prefix attend causally to itself. Let each suffix attend to the whole
       prefix and causally to itself.
    3. In the last layer, compute keys and values of all rows but queries of the C end tokens only.
    4. Apply the final norm and the head to the end tokens, and restore the caller's order of
       classes.

    Args:
        contexts: [N, J, M, E] in the tower's precision: the context, and what replaces its places in layers 1 to J - 1.

    Returns:
        [N, C, D], not normalized.
    """
    context = contexts[:, 0]
    count, prefix_length = len(context), len(tower.start) + context.shape[1]
    prefix = torch.cat([tower.start.expand(count, -1, -1), context], dim=1)
    prefix = prefix + tower.positions[:prefix_length]
    suffixes, positions = classes.by_length, tower.positions[prefix_length:]
    names = classes.embeddings.to(positions) + positions[: classes.mask.shape[1]]
    x = torch.cat([prefix, names.flatten(0, 1)[suffixes.rows].expand(count, -1, -1)], dim=1)
    attention = attention_for(GroupedAttention(tower.heads, suffixes.groups, prefix_length, causal=True), x)
    for number, layer in enumerate(tower.layers[:-1]):
        x = _with_context(x, contexts, number, len(tower.start))
        x = layer.finish(x, attention(layer.project(x)))
    x = _with_context(x, contexts, len(tower.layers) - 1, len(tower.start))
    layer, ends = tower.layers[-1], prefix_length + suffixes.ends
    at_end = x[:, ends]
    if not isinstance(attention, GroupedAttention):  # queries of all rows cost less than kernels for each length
        x = layer.finish(at_end, attention(layer.project(x))[:, ends])
        return tower.head(tower.final_norm(x))[:, suffixes.rank]
    query_rows = layer.qkv.rows(slice(0, layer.width))
    pair_rows = layer.qkv.rows(slice(layer.width, None))
    queries = query_rows(layer.norm1(at_end))
    # One split, since backward joins its parts in one copy; a slice's backward would fill a whole
    # tensor with zeros.
    parts = [prefix_length, *(group * length for group, length in suffixes.groups)]
    shared, *pairs = (_flat_heads(tower.per_head(part)) for part in pair_rows(layer.norm1(x)).split(parts, dim=1))
    group_sizes = [group for group, _ in suffixes.groups]
    attended = []
    for group, rows, pair in zip(group_sizes, queries.split(group_sizes, dim=1), pairs, strict=True):
        mixed, _ = attend((*_flat_heads(tower.per_head(rows)), *pair), shared, group, causal=False, scale=1.0)
        attended.append(mixed.unflatten(0, (count, tower.heads)).transpose(1, 2).flatten(2))
    x = layer.finish(at_end, torch.cat(attended, dim=1))
    return tower.head(tower.final_norm(x))[:, suffixes.rank]


def _with_context(x: Tensor, contexts: Tensor, layer: int, start: int) -> Tensor:
    """Put a layer's own context [N, M, E] in its places of x [..., T, E], which enters the layer, if it has one.

    Args:
        x: [N, T, E], or [N C, T, E] where each of C classes has rows of its own.
        contexts: [N, J, M, E]; the first is in x from the beginning.
        layer: its number.
        start: the number of rows before the context.
    """
    if not 0 < layer < contexts.shape[1]:
        return x
    context = contexts[:, layer].repeat_interleave(len(x) // len(contexts), dim=0)
    return torch.cat([x[:, :start], context, x[:, start + context.shape[1] :]], dim=1)


def causal_flops(
    tower: TextTower,
    contexts: int,
    context_length: int,
    classes: ClassTokens,
) -> float:
    """Count the floating-point operations of the matrix products in `causal_features`."""
    groups = classes.by_length.groups
    prefix = len(tower.start) + context_length
    suffix = sum(count * length for count, length in groups)
    within_suffixes = sum(count * length * length for count, length in groups)
    *inner, last = tower.layers
    # An attention of q queries over k keys is two products of q x k x E, over all heads together.
    inner_attention = 4.0 * last.width * (prefix * prefix + suffix * prefix + within_suffixes)
    last_attention = 4.0 * last.width * (len(classes) * prefix + suffix)
    key_value_flops = 4.0 * last.width * last.width
    total = sum((prefix + suffix) * layer.row_flops + inner_attention for layer in inner)
    at_ends = len(classes) * (last.row_flops - key_value_flops)
    total += (prefix + suffix) * key_value_flops + at_ends + last_attention
    return contexts * (total + 2.0 * len(classes) * tower.head.weight.numel())


def _joined(attended: Tensor) -> Tensor:
    """Reshape [N, heads, T, d] to [N, T, E]."""
    return attended.transpose(1, 2).flatten(2)


def _flat_heads(heads: Sequence[Tensor]) -> list[Tensor]:
    """Reshape each [N, heads, T, d] to [N heads, T, d]."""
    return [part.flatten(0, 1) for part in heads]


def padded_features(tower: TextTower, contexts: Tensor, classes: ClassTokens) -> Tensor:
    """Compute the features of N contexts and C classes through a bidirectional tower that pools its last position.

    SigLIP is such a tower. Every token attends to every other, padding included: SigLIP was trained
    so, padded on the right. Hence nothing can be shared. Of the last layer's queries only the last
    position's are computed.

    Args:
        contexts: [N, J, M, E] in the tower's precision, as for `causal_features`.

    Returns:
        [N, C, D], not normalized.
    """
    context = contexts[:, 0]
    count, (limit, width) = len(context), tower.positions.shape
    names = torch.where(classes.mask[..., None], classes.embeddings.to(context), tower.padding)
    before = torch.cat([tower.start.expand(count, -1, -1), context], dim=1)
    parts = [before[:, None].expand(-1, len(classes), -1, -1), names.expand(count, -1, -1, -1)]
    short = limit - before.shape[1] - names.shape[1]
    parts.append(tower.padding.expand(count, len(classes), short, -1))
    x = (torch.cat(parts, dim=2) + tower.positions).flatten(0, 1)  # [N C, limit, E]

    def step(layer: Layer, x: Tensor) -> Tensor:
        query, key, value = tower.per_head(layer.project(x))
        return layer.finish(
            x,
            _joined(F.scaled_dot_product_attention(query, key, value, scale=1.0)),
        )

    recompute = x.requires_grad and not x.is_cuda and x.shape[0] * limit > RECOMPUTED_ROWS
    for number, layer in enumerate(tower.layers[:-1]):
        x = _with_context(x, contexts, number, len(tower.start))
        x = checkpoint(step, layer, x, use_reentrant=False) if recompute else step(layer, x)
    x = _with_context(x, contexts, len(tower.layers) - 1, len(tower.start))
    layer, normed = tower.layers[-1], tower.layers[-1].norm1(x)
    (query,) = tower.per_head(layer.qkv.rows(slice(0, width))(normed[:, -1:]))
    key, value = tower.per_head(layer.qkv.rows(slice(width, None))(normed))
    attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    x = layer.finish(x[:, -1:], _joined(attended))
    return tower.head(tower.final_norm(x)).view(count, len(classes), -1)


def padded_flops(tower: TextTower, contexts: int, classes: ClassTokens) -> float:
    """Count the floating-point operations of the matrix products in `padded_features`."""
    limit = len(tower.positions)
    *inner, last = tower.layers
    key_value_flops = 4.0 * last.width * last.width
    total = sum(limit * layer.row_flops + 4.0 * layer.width * limit * limit for layer in inner)
    total += limit * key_value_flops + last.row_flops - key_value_flops + 4.0 * last.width * limit
    return contexts * len(classes) * (total + 2.0 * tower.head.weight.numel())
