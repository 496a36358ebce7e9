"""Frozen pre-norm transformer layers, as in the towers of CLIP and SigLIP, as plain functions of their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sordino.encoders.linear import frozen_linear


@dataclass(frozen=True)
class Norm:
    """A layer norm's parameters."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> Norm:
        return cls(module.weight.detach(), module.bias.detach(), module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer's parameters: weight [O, I], bias [O] or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: nn.Linear) -> Linear:
        return cls(module.weight.detach(), None if module.bias is None else module.bias.detach())

    def __call__(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)

    def scaled(self, factor: float) -> Linear:
        return Linear(self.weight * factor, None if self.bias is None else self.bias * factor)

    def rows(self, rows: slice) -> Linear:
        return Linear(self.weight[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class Layer:
    """One pre-norm transformer layer of width E.

    Attributes:
        qkv: the three projections as one [3E, E]; the softmax's 1/sqrt(d) is folded into the
            query's rows.
    """

    norm1: Norm
    qkv: Linear
    out: Linear
    norm2: Norm
    fc1: Linear
    activation: Callable[[Tensor], Tensor]
    fc2: Linear

    @classmethod
    def of(cls, module: Any, activation: str) -> Layer:
        """Take the weights of a transformers CLIP or SigLIP encoder layer."""
        from transformers.activations import ACT2FN  # a heavy import, which only these towers need

        attention = module.self_attn
        query, key, value = (Linear.of(getattr(attention, f"{part}_proj")) for part in "qkv")
        query = query.scaled(attention.scale)
        qkv = Linear(
            torch.cat([query.weight, key.weight, value.weight]),
            None if query.bias is None else torch.cat([part.bias for part in (query, key, value)]),  # type: ignore[misc]
        )
        layer = cls(
            norm1=Norm.of(module.layer_norm1),
            qkv=qkv,
            out=Linear.of(attention.out_proj),
            norm2=Norm.of(module.layer_norm2),
            fc1=Linear.of(module.mlp.fc1),
            activation=ACT2FN[activation],
            fc2=Linear.of(module.mlp.fc2),
        )
        if activation != "quick_gelu":
            return layer
        # x * sigmoid(1.702 x) = silu(1.702 x) / 1.702: with both factors in the weights it is one
        # operation that keeps one tensor for backward, instead of three and three.
        fc2 = replace(layer.fc2, weight=layer.fc2.weight / 1.702)
        return replace(layer, fc1=layer.fc1.scaled(1.702), activation=F.silu, fc2=fc2)

    @property
    def width(self) -> int:
        return self.out.weight.shape[0]

    @property
    def row_flops(self) -> float:
        """Count the floating-point operations of one row, without the attention products."""
        attention = self.qkv.weight.numel() + self.out.weight.numel()
        return 2.0 * (attention + 2 * self.fc1.weight.numel())

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Compute the rest of the layer from its input and the attention's output, both [..., E]."""
        x = x + self.out(attended)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))
