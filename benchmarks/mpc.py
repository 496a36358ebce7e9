"""What one layer of a transformer costs on shares: rounds, and bytes that each server sends, by protocol.

A layer as in BERT, with random feature attention on queries and keys of unit norm, 64 frequencies a head, and random
weights: batch 4, length 32, width 384, 12 heads, 1536 hidden units by default. Weights are hidden at set-up, which is
counted apart; the layer is run twice, and timed the second time. `cosine` is the least, over tokens, between the
layer's output and the same layer's in float64. `seconds` is for both servers and the dealer in this process;
`share_of_plain_rate` is what plain int64 matrix products by the same weights, once for each server, take of that.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu as plain_gelu
from torch.nn.functional import layer_norm as plain_layer_norm
from torch.nn.functional import normalize

from sordino.mpc import (
    Norm,
    Party,
    Shared,
    calibrate,
    encode,
    gelu,
    hide,
    layer_norm,
    lifted,
    product,
    random_feature_attention,
    reconstruct,
    run,
    share,
    truncate,
    unit_norm,
    variance_root,
)

ACTIVATION, WEIGHT, GAIN, QUERY = 11, 11, 10, 9  # fraction bits
LINEAR = ACTIVATION + WEIGHT + 8  # bits of a linear layer's result: numbers below 2^6
PRECISION = 12  # of GeLU's cosines
HIDDEN = 2 * PRECISION + WEIGHT + 7  # bits of the second linear layer's result: numbers below 2^5
RANGES = {"norm": (0.2, 8.0), "query": (6.0, 90.0), "weights": (0.1, 1.2)}


def weights_of(width: int, heads: int, inner: int, features: int) -> dict[str, Tensor]:
    """A layer's weights, drawn so that its values are of usual sizes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "qkv": normal(width, 3 * width, scale=width**-0.5),
        "features": normal(heads, width // heads, features),
        "out": normal(width, width, scale=width**-0.5),
        "gain": 1 + normal(2, width, scale=0.1),
        "bias": normal(2, width, scale=0.1),
        "up": normal(width, inner, scale=width**-0.5),
        "down": normal(inner, width, scale=inner**-0.5),
    }


def plain(x: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """The layer in float64, [batch, length, width]."""
    query, key, value = (split(part, heads) for part in (x @ weights["qkv"]).chunk(3, -1))
    angles = [normalize(part, dim=-1) @ weights["features"] for part in (query, key)]
    phi_query, phi_key = (torch.cat([angle.cos(), angle.sin()], -1) for angle in angles)
    scores = phi_query @ phi_key.mT
    attended = merged(scores @ value / scores.sum(-1, keepdim=True))
    width = x.shape[-1:]
    x = plain_layer_norm(x + attended @ weights["out"], width, weights["gain"][0], weights["bias"][0], 1e-12)
    inner = plain_gelu(x @ weights["up"]) @ weights["down"]
    return plain_layer_norm(x + inner, width, weights["gain"][1], weights["bias"][1], 1e-12)


def split(x: Tensor, heads: int) -> Tensor:
    """[B, n, H d] as [B, H, n, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def part_of(projected: Tensor, part: int, width: int, heads: int) -> Tensor:
    """Of [B, n, 3 H d] the queries and keys, [B, 2 H, n, d], or the values, [B, H, n, d]."""
    return split(projected.split([2 * width, width], -1)[part], (2 - part) * heads)


def merged(x: Tensor) -> Tensor:
    """The inverse of `split`."""
    return x.transpose(1, 2).flatten(2)


def set_up(party: Party, held: dict[str, Callable[[Party], Shared]], width: int) -> dict[str, Any]:
    """Weights hidden once, and the parameters of both norms."""
    names = ("qkv", "features", "out", "up", "down", "gain")
    hidden: dict[str, Any] = dict(zip(names, hide(party, *(held[name](party) for name in names)), strict=True))
    root, bias = variance_root(width, *RANGES["norm"], steps=0), held["bias"](party)
    gains = hide(party, *(held["gain"](party).view(lambda share, i=i: share[i]) for i in range(2)))
    hidden["query"], hidden["weights"] = (
        calibrate(2, *RANGES["query"], steps=0),
        calibrate(1, *RANGES["weights"], steps=0),
    )
    hidden["norms"] = [
        Norm(gain, bias.view(lambda share, i=i: share[i]), root, inverse_fraction=16) for i, gain in enumerate(gains)
    ]
    return hidden


def layer(party: Party, x: Shared, hidden: dict[str, Any], heads: int, precision: int) -> Shared:
    """The layer on shares, [batch, length, width]."""
    (masked,) = hide(party, x, bits=LINEAR)
    projected = product(party, masked, hidden["qkv"])
    width = x.shape[-1]
    parts = hide(party, *(projected.view(lambda t, i=i: part_of(t, i, width, heads)) for i in range(2)), bits=LINEAR)
    both, value = (lifted(party, part, fraction) for part, fraction in zip(parts, (QUERY, ACTIVATION), strict=True))
    both = unit_norm(party, both, hidden["query"], ACTIVATION, inverse_fraction=14)
    query, key = (both.view(lambda t, i=i: t.chunk(2, 1)[i]) for i in range(2))
    attended = random_feature_attention(
        party, query, key, value, hidden["features"], hidden["weights"], ACTIVATION, resolution=12, precision=precision
    )
    (masked,) = hide(party, attended.view(merged), bits=LINEAR)
    (projected,) = truncate(party, product(party, masked, hidden["out"]), fraction=ACTIVATION, bits=LINEAR)
    x = layer_norm(party, x + projected, hidden["norms"][0], ACTIVATION)
    (masked,) = hide(party, x, bits=HIDDEN)
    inner = gelu(party, product(party, masked, hidden["up"]), resolution=16, precision=PRECISION, bits=HIDDEN)
    (masked,) = hide(party, inner, bits=HIDDEN)
    (projected,) = truncate(party, product(party, masked, hidden["down"]), fraction=ACTIVATION, bits=HIDDEN)
    return layer_norm(party, x + projected, hidden["norms"][1], ACTIVATION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("batch", 4), ("length", 32), ("width", 384), ("heads", 12), ("inner", 1536),
                          ("features", 64), ("precision", 5), ("threads", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weights = weights_of(args.width, args.heads, args.inner, args.features)
    x = torch.randn(
        args.batch, args.length, args.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    encoded = weights | {
        "features": weights["features"] / (2 * torch.pi),
        "gain": weights["gain"] * args.width**0.5,
        "x": x,
    }
    fractions = {"x": ACTIVATION, "bias": ACTIVATION, "gain": GAIN}
    shares = {name: share(encode(tensor, fractions.get(name, WEIGHT))) for name, tensor in encoded.items()}
    held = {
        name: lambda party, name=name: Shared(shares[name][party.number], fractions.get(name, WEIGHT))
        for name in shares
    }

    def program(party: Party) -> tuple[Shared, float]:
        with party.costs.label("set-up"):
            hidden = set_up(party, held, args.width)
        with party.costs.label("layer"):
            result = layer(party, held["x"](party), hidden, args.heads, args.precision)
        began = time.perf_counter()
        with party.costs.label("layer again"):
            layer(party, held["x"](party), hidden, args.heads, args.precision)
        return result, time.perf_counter() - began

    ran = run(program)
    output, oracle = reconstruct(tuple(result for result, _ in ran.results)), plain(x, weights, args.heads)
    cosine = torch.nn.functional.cosine_similarity(output, oracle, dim=-1)
    began = time.perf_counter()
    for name in ("qkv", "out", "up", "down"):
        rows = encode(torch.zeros(args.batch * args.length, weights[name].shape[0]), 0)
        for _ in range(2):
            rows @ shares[name][0]
    rate = (time.perf_counter() - began) / max(seconds for _, seconds in ran.results)
    by_protocol = ran.costs.by_protocol(2)
    print(
        json.dumps(
            {
                **vars(args),
                "cost": {label: asdict(cost) for label, cost in ran.costs.by_label().items()},
                "by_protocol_of_both_layers_and_set_up": {name: asdict(cost) for name, cost in by_protocol.items()},
                "cosine": cosine.min().item(),
                "largest_error": (output - oracle).abs().max().item(),
                "seconds": max(seconds for _, seconds in ran.results),
                "share_of_plain_rate": rate,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
