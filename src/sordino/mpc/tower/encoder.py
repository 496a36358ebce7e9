"""Forward pass of a `PrivateTower` on shares. Neither server sees the weights or the sentences.

    calibration = Calibration.measure(tower, public_sentences)          # the model owner, in the clear
    plan = FixedPointPlan.of(tower, calibration)                        # sent to both servers, as JSON
    shares = shared_weights(tower, calibration)                         # one for each server

    def program(party):
        encoder = Encoder.mask_and_open(party, shares[party.number], plan)          # once
        return encode_sentences(party, encoder, sentences[party.number])

Shares allow no comparison, so no protocol can notice that a number left its calibrated range. Roots and GeLU are then
wrong, and sums wrap around, without notice. `Calibration`'s margin guards against this, and `Calibration.outside`
checks it in the clear.

Two causes of wide ranges are removed beforehand, at no cost. Vectors that get unit norm may be scaled first. So the
owner folds a scale for each head into the weights of queries and keys. A LayerNorm ignores the scale of a row. In some
towers the first token, [CLS] in every sentence, has states many times as large as others. So its rows are divided by a
public power of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sordino.mpc.arithmetic.ring import WORD, encode, share
from sordino.mpc.errors import OutOfRange
from sordino.mpc.protocols.attention import random_feature_attention
from sordino.mpc.protocols.fourier import gelu
from sordino.mpc.protocols.linear import concatenated, mask_and_open, product, truncate
from sordino.mpc.protocols.party import Masked, Party, Shared
from sordino.mpc.protocols.roots import Norm, layer_norm, unit_norm
from sordino.mpc.tower.calibration import Calibration, LayerRanges, heads_of
from sordino.mpc.tower.fixed_point_plan import (
    ACTIVATION,
    ANGLE,
    BELOW,
    CENTERED,
    COSINE,
    GAIN,
    GELU,
    MEAN,
    SQUARED_NORM,
    UNIT,
    WEIGHT,
    FixedPointPlan,
    LayerPlan,
    NormPlan,
    inverse_fraction,
)
from sordino.mpc.tower.sentences import bracket
from sordino.mpc.tower.tower import FEATURES, PrivateTower


def shared_weights(tower: PrivateTower, calibration: Calibration) -> tuple[dict[str, Shared], dict[str, Shared]]:
    """Share a tower's weights for both servers, by names such as `norm.weight` and `0.qkv.weight`.

    Frequencies are in turns, and gains are times sqrt(E). Queries and keys are scaled: the middle of each head's range
    of squared norms becomes about 16. This changes no result, as they get unit norm. Inner units are ordered by their
    ranges, which changes no result either. Weights have 15 fraction bits, an error of at most 2^-16 each, so a matrix
    of standard deviation 0.05 is off by 0.02%.
    """
    named = {f"norm.{kind}": part for kind, part in zip(("weight", "bias"), tower.norm, strict=True)}
    for number, (layer, ranges) in enumerate(zip(tower.layers, calibration.layers, strict=True)):
        named |= {f"{number}.{name}": part for name, part in _folded(layer, ranges).items()}
    both: tuple[dict[str, Shared], dict[str, Shared]] = {}, {}
    for name, part in named.items():
        module, _, kind = name.rpartition(".")
        fraction = WEIGHT if kind != "bias" else ACTIVATION + WEIGHT
        if "norm" in module:
            fraction = GAIN if kind == "weight" else ACTIVATION + WEIGHT
            part = part * len(part) ** 0.5 if kind == "weight" else part
        for shares, half in zip(both, share(encode(part.detach(), fraction)), strict=True):
            shares[name] = Shared(half, fraction)
    return both


@dataclass(frozen=True, eq=False)
class MaskedLayer:
    """A layer's weights, opened under masks.

    Attributes:
        plan: of the layer.
        weights: by the names `qkv`, `features`, `out`, `inner`, `outer`.
        biases: shares, by the names of the linear layers.
        norm1, norm2: parameters of the norms.
    """

    plan: LayerPlan
    weights: Mapping[str, Masked]
    biases: Mapping[str, Shared]
    norm1: Norm
    norm2: Norm


@dataclass(frozen=True, eq=False)
class Encoder:
    """A tower on shares; made by `mask_and_open`."""

    plan: FixedPointPlan
    norm: Norm
    layers: tuple[MaskedLayer, ...]

    @classmethod
    def mask_and_open(cls, party: Party, weights: Mapping[str, Shared], plan: FixedPointPlan) -> Encoder:
        """Open a tower's weights under masks, once for all forward passes. Costs have the label "set-up".

        1. `mask_and_open` all weights. Biases stay shares, as they are only added.

        Rounds: 1. Online: for each weight the bits of its products (see `LayerPlan`), and 64 for gains. These are
        54 MB for MiniLM's tower of six layers. Offline: 0. Error: none.

        Args:
            weights: this party's shares, of `shared_weights`.
            plan: of the same calibration.
        """
        widths = {"norm.weight": WORD}
        for number, layer in enumerate(plan.layers):
            bits = {"qkv.weight": layer.projected, FEATURES: UNIT + WEIGHT, "out.weight": layer.out}
            bits |= {"inner.weight": layer.inner, "outer.weight": layer.outer}
            bits |= {"norm1.weight": WORD, "norm2.weight": WORD}
            widths |= {f"{number}.{name}": width for name, width in bits.items()}
        with party.costs.label("set-up"):
            opened = mask_and_open(party, *(weights[name] for name in widths), bits=list(widths.values()))
        masked = {name: replace(weight, fixed=True) for name, weight in zip(widths, opened, strict=True)}

        def norm(name: str, norm_plan: NormPlan) -> Norm:
            gain, bias = masked[f"{name}.weight"], weights[f"{name}.bias"]
            return Norm(gain, bias, norm_plan.root, plan.epsilon, norm_plan.largest, norm_plan.inverse_fraction)

        layers = []
        for number, layer in enumerate(plan.layers):
            linear = {name: f"{number}.{name}" for name in ("qkv", "out", "inner", "outer")}
            layer_weights = {name: masked[f"{full}.weight"] for name, full in linear.items()}
            layer_weights[FEATURES] = masked[f"{number}.{FEATURES}"]
            biases = {name: weights[f"{full}.bias"] for name, full in linear.items()}
            norms = norm(f"{number}.norm1", layer.norm1), norm(f"{number}.norm2", layer.norm2)
            layers.append(MaskedLayer(layer, layer_weights, biases, *norms))
        return cls(plan, norm("norm", plan.norm), tuple(layers))


def encode_sentences(party: Party, encoder: Encoder, embeddings: Shared, lengths: Tensor | None = None) -> Shared:
    """Compute sentences as the mean of their tokens' last hidden states, [B, E].

    1. Take the `layer_norm` of the embeddings.
    2. Apply each layer: `attention_block`, then `feed_forward_block`.
    3. Add up each sentence's tokens, and multiply with 1 over its length, which is public.

    Costs are entered under the labels "embeddings", "layer 0", "layer 1" and so on.
    Rounds: 5 for the first norm, and 31 a layer. Each step of Newton's method in one of a layer's four roots adds two.
    An inverse square root needs no step for ranges up to about 1:50, one up to about 1:200, then two.
    Online, for MiniLM's tower with 64 frequencies a head and 4 sentences of 32 tokens: 0.37 MB, and 6.7 to 6.9 MB a
    layer. This is proportional to the number of sentences. Offline: 210 MB for six layers.
    Error, measured there: 0.15% of a sentence's norm, a cosine of 0.999999 with the tower in the clear.

    Args:
        encoder: see `Encoder.mask_and_open`.
        embeddings: [B, T, E], of tokens with their positions. They are small, so about 14 fraction bits suit them.
            Outside the plan's ranges the result is wrong without notice. Padding repeats a sentence's last token, as
            in `Sentences`, and changes no result.
        lengths: tokens of each sentence, int64 [B], public, of one `bracket`. T for all if absent.

    Raises:
        OutOfRange: a length is above T, or not of the bracket of T.
    """
    batch, length = embeddings.shape[:2]
    lengths = torch.full((batch,), length) if lengths is None else lengths
    if not all(1 <= number <= length and bracket(number) == bracket(length) for number in lengths.tolist()):
        raise OutOfRange(f"lengths {lengths.tolist()} in a batch of {length} tokens: must be of one bracket")
    whole = bool((lengths == length).all())
    mask = None if whole else (torch.arange(length) < lengths[:, None]).long()  # [B, T]
    with party.costs.label("embeddings"):
        x = _normed(party, embeddings, encoder.norm, encoder.plan.norm)
    for number, layer in enumerate(encoder.layers):
        with party.costs.label(f"layer {number}"):
            x = attention_block(party, x, layer, encoder.plan.heads, mask)
            x = feed_forward_block(party, x, layer)
    factors = torch.tensor([[round(2**MEAN / number)] for number in lengths.tolist()])
    if mask is not None:
        x = x.scaled(mask[..., None])
    return x.view(lambda share: share.sum(1)).scaled(factors, MEAN)


def attention_block(party: Party, x: Shared, layer: MaskedLayer, heads: int, mask: Tensor | None = None) -> Shared:
    """Compute hidden states [B, T, E] after attention, its projection and the norm.

    1. Mask and open x. Multiply with the weights of queries, keys and values.
    2. Truncate the result.
    3. Give queries and keys `unit_norm`.
    4. Take the `random_feature_attention`.
    5. Mask and open its result, multiply with the projection, truncate.
    6. Add x, and take the `layer_norm`.

    Rounds: 4, and those of the three protocols: 4, 9 and 5 if no root takes a step. Online, for N = B T E, in addition
    to the protocols: N (4 projected + 2 out - 4 WEIGHT) / 8, with the plan's bits. Offline:
    N (3 projected + out) / 8 + 64 N. Error: those of the protocols, 2^-ACTIVATION from each truncation, and 2^-16 a
    weight, see `shared_weights`.
    """
    plan = layer.plan
    width = x.shape[-1]
    (masked,) = mask_and_open(party, x, bits=plan.projected)
    projected = product(party, masked, layer.weights["qkv"], "matmul_nt", layer.biases["qkv"])
    parts = [
        projected.view(lambda share: heads_of(share[..., : 2 * width], 2 * heads)),  # queries and keys, [B, 2 H, T, d]
        projected.view(lambda share: heads_of(share[..., 2 * width :], heads)),
    ]
    both, value = truncate(party, *parts, fraction=ACTIVATION, bits=plan.projected)
    inverse = inverse_fraction(plan.unit)
    both = unit_norm(party, both, plan.unit, inverse, ACTIVATION + inverse + WEIGHT)
    query, key = both.view(lambda share: share[:, :heads]), both.view(lambda share: share[:, heads:])
    attended = random_feature_attention(
        party, query, key, value, layer.weights[FEATURES], plan.weights, ACTIVATION, UNIT, ANGLE, COSINE, mask
    )
    attended = attended.view(lambda share: share.transpose(1, 2).flatten(2))  # [B, T, E]
    (masked,) = mask_and_open(party, attended, bits=plan.out)
    result = product(party, masked, layer.weights["out"], "matmul_nt", layer.biases["out"])
    (result,) = truncate(party, result, fraction=ACTIVATION, bits=plan.out)
    return _normed(party, x + result, layer.norm1, plan.norm1)


def feed_forward_block(party: Party, x: Shared, layer: MaskedLayer) -> Shared:
    """Compute hidden states [B, T, E] after both linear layers and the norm.

    1. Mask and open x. Multiply with the weights of the first layer.
    2. Take `gelu`.
    3. Mask and open the result, multiply with the weights of the second layer, truncate.
    4. Add x, and take the `layer_norm`.

    Rounds: 3, and those of GeLU, 1, and of the norm, 5 if its root takes no step. Online, for N = B T E and M = B T
    times the inner width, in addition to the protocols: (N inner + (N + M) outer - N WEIGHT) / 8, with the plan's bits.
    Offline: (M inner + N outer) / 8 + 16 N. Error: as in `attention_block`.
    """
    plan = layer.plan
    (masked,) = mask_and_open(party, x, bits=plan.inner)
    inner = product(party, masked, layer.weights["inner"], "matmul_nt", layer.biases["inner"])
    counts = [units.count for units in plan.gelu]
    parts = [replace(inner, share=part) for part in inner.share.split(counts, -1)]
    series = [units.series for units in plan.gelu]
    activated = concatenated(gelu(party, *parts, series=series, below=BELOW, precision=GELU, bits=plan.inner))
    (masked,) = mask_and_open(party, activated, bits=plan.outer, fraction=ACTIVATION)
    result = product(party, masked, layer.weights["outer"], "matmul_nt", layer.biases["outer"])
    (result,) = truncate(party, result, fraction=ACTIVATION, bits=plan.outer)
    return _normed(party, x + result, layer.norm2, plan.norm2)


def _normed(party: Party, x: Shared, norm: Norm, plan: NormPlan) -> Shared:
    """Normalize x [B, T, E] after dividing its first token's rows by the plan's power of two.

    A negative exponent divides the other rows instead. A row's scale does not change the result.
    """
    first, rest = max(0, -plan.exponent), max(0, plan.exponent)
    times = torch.full((x.shape[1], 1), rest)
    times[0] = first
    scaled = x.view(lambda share: share << times).times_power_of_two(-rest)
    return layer_norm(party, scaled, norm, ACTIVATION, CENTERED)


def _folded(layer: Mapping[str, Tensor], ranges: LayerRanges) -> dict[str, Tensor]:
    """Fold a layer's weights: frequencies in turns, heads' scales in queries and keys, inner units by range."""
    squares = torch.tensor([math.sqrt(low * high) for low, high in (*ranges.query, *ranges.key)])
    scales = (SQUARED_NORM / squares).sqrt()  # [2 H]
    named = dict(layer)
    width = layer["qkv.bias"].shape[0] // 3
    of_queries_and_keys = scales.repeat_interleave(2 * width // len(scales))
    per_entry = torch.cat([of_queries_and_keys, torch.ones(width)]).to(layer["qkv.bias"])
    named["qkv.weight"] = layer["qkv.weight"] * per_entry[:, None]
    named["qkv.bias"] = layer["qkv.bias"] * per_entry
    named[FEATURES] = layer[FEATURES] / (2 * math.pi)
    order = torch.tensor([high for _, high in ranges.inner]).argsort(stable=True)
    named["inner.weight"], named["inner.bias"] = layer["inner.weight"][order], layer["inner.bias"][order]
    named["outer.weight"] = layer["outer.weight"][:, order]
    return named
