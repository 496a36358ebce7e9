"""Layers of small networks that clients train: one set of weights for each of P prompts, as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from sordino.algorithms.base import InitContext


def linear_weight(init: InitContext, purpose: str, outputs: int, inputs: int) -> Tensor:
    """Return initial weights [outputs, inputs] that all clients share, with the variance of torch's, 1 / (3 inputs)."""
    return init.streams.common_normal(purpose, outputs, inputs) / math.sqrt(3 * inputs)


def linear(x: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """Return P linear layers of x [P, ..., inputs].

    Args:
        x: the input, with any axes between.
        parts: `name` has the weights [P, outputs, inputs], and `name`_bias the bias [P, outputs], if there is one.
        name: of the layer.
    """
    weight, bias = parts[name], parts.get(f"{name}_bias")
    product = (x.flatten(1, -2) @ weight.mT).view(*x.shape[:-1], weight.shape[1])
    return product if bias is None else product + bias.view(len(bias), *[1] * (x.ndim - 2), -1)
