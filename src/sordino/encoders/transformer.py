"""Frozen transformer layers, as in the towers of CLIP, SigLIP and BERT, as plain functions of their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sordino.encoders.frozen.pullback import apply, for_each
from sordino.encoders.linear import frozen_linear, frozen_linear_pullback
from sordino.errors import EncoderError


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
        return apply(self, x)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        normed, mean, inverse = torch.native_layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
        return normed, (x, mean, inverse)

    def pullback(self, cotangent: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor]:
        if cotangent.ndim > x.ndim:
            return for_each(self.pullback, cotangent, (x, mean, inverse), (0, 0, 0))
        wanted = [True, False, False]
        pulled: Tensor = torch.ops.aten.native_layer_norm_backward(
            cotangent, x, self.weight.shape, mean, inverse, self.weight, self.bias, wanted
        )[0]
        return (pulled,)


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer's parameters: weight [O, I], bias [O] or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: nn.Linear) -> Linear:
        return cls(module.weight.detach(), None if module.bias is None else module.bias.detach())

    def __call__(self, x: Tensor) -> Tensor:
        return apply(self, x)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return frozen_linear(x, self.weight, self.bias), ()

    def pullback(self, cotangent: Tensor) -> tuple[Tensor]:
        return (frozen_linear_pullback(cotangent, self.weight),)

    def scaled(self, factor: float) -> Linear:
        return Linear(self.weight * factor, None if self.bias is None else self.bias * factor)

    def rows(self, rows: slice) -> Linear:
        return Linear(self.weight[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class Activation:
    """A function of single numbers, by PyTorch's own kernels.

    Attributes:
        forward: h to f(h).
        backward: (cotangent, h) to cotangent * f'(h).
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, h: Tensor) -> Tensor:
        return self.forward(h)

    def pullback(self, cotangent: Tensor, h: Tensor) -> Tensor:
        """Return the cotangent of h [...], or [n, ...] of n cotangents, which are overwritten."""
        if cotangent.ndim == h.ndim:
            return self.backward(cotangent, h)
        return cotangent.mul_(self.backward(torch.ones_like(h), h))


GELU = Activation(F.gelu, torch.ops.aten.gelu_backward)
ACTIVATIONS = {
    "gelu": GELU,
    "gelu_pytorch_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")
    ),
    "quick_gelu": Activation(F.silu, torch.ops.aten.silu_backward),  # with factors in the weights, see `Layer.of`
}


@dataclass(frozen=True)
class Layer:
    """One transformer layer of width E.

    Attributes:
        qkv: the three projections as one [3E, E].
        norm_first: true if each half norms its input (CLIP, SigLIP), false if it norms its sum with the input (BERT).
    """

    norm1: Norm
    qkv: Linear
    out: Linear
    norm2: Norm
    fc1: Linear
    activation: Activation
    fc2: Linear
    norm_first: bool = True

    @classmethod
    def of(cls, module: Any, activation: str) -> Layer:
        """Take the weights of a transformers CLIP or SigLIP encoder layer.

        The softmax's 1/sqrt(d) is folded into the query's rows.

        Raises:
            EncoderError: the activation is none that these towers have.
        """
        if activation not in ACTIVATIONS:
            raise EncoderError(f"hidden_act = {activation!r}: a tower's activation must be one of {list(ACTIVATIONS)}")
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
            activation=ACTIVATIONS[activation],
            fc2=Linear.of(module.mlp.fc2),
        )
        if activation != "quick_gelu":
            return layer
        # x * sigmoid(1.702 x) = silu(1.702 x) / 1.702: with both factors in the weights it is one operation.
        fc2 = replace(layer.fc2, weight=layer.fc2.weight / 1.702)
        return replace(layer, fc1=layer.fc1.scaled(1.702), fc2=fc2)

    @property
    def width(self) -> int:
        return self.out.weight.shape[0]

    @property
    def row_flops(self) -> float:
        """Count the floating-point operations of one row, without the attention products."""
        attention = self.qkv.weight.numel() + self.out.weight.numel()
        return 2.0 * (attention + 2 * self.fc1.weight.numel())

    def project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values [..., 3 E] of the layer's input [..., E]."""
        return self.qkv(self.norm1(x) if self.norm_first else x)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Compute the rest of the layer from its input and the attention's output, both [..., E]."""
        return apply(self, x, attended)

    def forward(self, x: Tensor, attended: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = x + self.out(attended)
        if not self.norm_first:
            x, kept = self.norm1.forward(x)
            h = self.fc1(x)
            normed, kept_last = self.norm2.forward(x + self.fc2(self.activation(h)))
            return normed, (h, *kept, *kept_last)
        normed, kept = self.norm2.forward(x)
        h = self.fc1(normed)
        return x + self.fc2(self.activation(h)), (h, *kept)

    def pullback(self, cotangent: Tensor, h: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        if self.norm_first:
            of_x = cotangent + self.norm2.pullback(self._pull_inner(cotangent, h), *kept)[0]
        else:
            of_sum = self.norm2.pullback(cotangent, *kept[3:])[0]
            of_x = self.norm1.pullback(self._pull_inner(of_sum, h).add_(of_sum), *kept[:3])[0]
        return of_x, *self.out.pullback(of_x)

    def _pull_inner(self, cotangent: Tensor, h: Tensor) -> Tensor:
        """Return the cotangent of the input of fc1."""
        return self.fc1.pullback(self.activation.pullback(self.fc2.pullback(cotangent)[0], h))[0]
