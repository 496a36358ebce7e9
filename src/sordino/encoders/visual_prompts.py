"""Prompts inside a frozen vision transformer: tokens between its own, and adapters of its keys and values.

Jia et al., Visual Prompt Tuning, ECCV 2022 (arXiv 2203.12119). Learned tokens stand behind the class token, either at
the first layer only (*shallow*) or at several (*deep*). In the deep form a layer's tokens replace those of the layer
before. CLIP normalizes its embeddings before the first layer; tokens join behind that norm, and a method whose own pass
it applies `embedding_norm` to them. SigLIP has no such norm and no class token. There learned tokens stand first, and
its pooling head attends to the image's own tokens only, as it was trained to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sordino.encoders.transformer import Layer, Norm

# Numbers that a layer keeps for a backward pass, per number that enters it.
KEPT_BY_LAYER = 17
# Numbers that may be kept in all; above, backward recomputes each layer instead. A gigabyte in
# float32.
KEPT_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class Adapter:
    """K clients' contribution to the keys and values of a layer: scale (tanh(x down + bias) up + bias).

    Attributes:
        down, down_bias: [K, W, R] and [K, R].
        up, up_bias: [K, R, 2 W] and [K, 2 W]; keys first.
        scale: factor on the contribution.
        appended: whether the contribution stands beside the layer's own keys and values, or is
            added to them.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    scale: float
    appended: bool = False

    def __call__(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """Return the keys and values that are attended to.

        Args:
            x: [K, B, T, W] normed hidden states.
            keys_values: [K, B, T, 2 W], the layer's own.

        Returns:
            [K, B, T, 2 W], or [K, B, 2 T, 2 W] if the contribution is appended.
        """
        rows = x.flatten(1, 2)
        inner = torch.tanh(torch.baddbmm(self.down_bias[:, None].to(x), rows, self.down.to(x)))
        outer = torch.baddbmm(self.up_bias[:, None].to(x), inner, self.up.to(x))
        contribution = self.scale * outer.view(keys_values.shape)
        if self.appended:
            return torch.cat([contribution, keys_values], dim=2)
        return keys_values + contribution


@dataclass(frozen=True)
class ImageTower:
    """A frozen vision transformer, entered and left at any layer.

    Attributes:
        embed: pixels [N, 3, H, W] to the input of layer 0, [N, T, W].
        embedding_norm: CLIP's norm of embeddings [..., W] before layer 0; the identity for SigLIP.
        layers: its L layers, of width W.
        heads: attention heads.
        class_tokens: 1 if the first token stands for the whole image, else 0.
        patches: number of tokens that are patches.
        final_norm: the norm after the last layer.
        head: the last layer's output, [N, T, W] without prompts, to unit-norm features [N, D].
    """

    embed: Callable[[Tensor], Tensor]
    embedding_norm: Callable[[Tensor], Tensor]
    layers: tuple[Layer, ...]
    heads: int
    class_tokens: int
    patches: int
    final_norm: Norm
    head: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, vision: Any, project: Callable[[Tensor], Tensor]) -> ImageTower:
        """Take the weights of a transformers CLIP or SigLIP image tower.

        Args:
            vision: the image tower.
            project: maps its pooled output to unit-norm features.
        """
        is_clip = hasattr(vision, "pre_layrnorm")
        norm = Norm.of(vision.post_layernorm)

        def embedding_norm(x: Tensor) -> Tensor:
            normed: Tensor = vision.pre_layrnorm(x.to(norm.weight)) if is_clip else x
            return normed

        def embed(pixels: Tensor) -> Tensor:
            return embedding_norm(vision.embeddings(pixels.to(norm.weight)))

        def head(x: Tensor) -> Tensor:
            return project(norm(x[:, 0]) if is_clip else vision.head(norm(x)))

        layers = tuple(Layer.of(layer, vision.config.hidden_act) for layer in vision.encoder.layers)
        patches, heads = vision.embeddings.num_patches, vision.config.num_attention_heads
        return cls(embed, embedding_norm, layers, heads, int(is_clip), patches, norm, head)

    @property
    def width(self) -> int:
        return self.layers[0].width

    def hidden(self, pixels: Tensor, layer: int) -> Tensor:
        """Return the hidden states [N, T, W] that enter a layer, of pixels [N, 3, H, W]."""
        return self.forward(self.embed(pixels)[None], 0, layer)[0]

    def forward(
        self,
        x: Tensor,
        start: int,
        stop: int,
        prompts: Mapping[int, Tensor] | None = None,
        adapters: Mapping[int, Adapter] | None = None,
        replace: bool = True,
    ) -> Tensor:
        """Pass hidden states through layers start to stop - 1, with each of K clients' prompts.

        Args:
            x: [K, B, T, W], entering layer `start`.
            prompts: the tokens that join at a layer, by layer: each client's [K, n, W], or each
                image's [K, B, n, W].
            adapters: the adapter of a layer's keys and values, by layer.
            replace: whether a layer's prompts replace those of the layer before, or join them.

        Returns:
            [K, B, n + T, W], entering layer `stop`, its n prompt tokens behind the class token.
        """
        x = x.to(self.final_norm.weight)
        kept = KEPT_BY_LAYER * x.numel() * (stop - start)
        recompute = torch.is_grad_enabled() and kept > KEPT_AT_ONCE
        joined, first = 0, self.class_tokens
        for number in range(start, stop):
            if prompts and number in prompts:
                tokens = prompts[number] if prompts[number].ndim == 4 else prompts[number][:, None]
                tokens = tokens.to(x).expand(*x.shape[:2], -1, -1)
                dropped = joined if replace else 0
                x = torch.cat([x[:, :, :first], tokens, x[:, :, first + dropped :]], dim=2)
                joined = tokens.shape[2]
            adapter = adapters.get(number) if adapters else None
            if recompute:
                x = checkpoint(self._step, self.layers[number], x, adapter, use_reentrant=False)
            else:
                x = self._step(self.layers[number], x, adapter)
        return x

    def features(self, x: Tensor) -> Tensor:
        """Return unit-norm features [K, B, D] of the last layer's output [K, B, T, W], with prompts or without."""
        image_tokens = torch.cat([x[:, :, : self.class_tokens], x[:, :, -self.patches :]], dim=2)
        return self.head(image_tokens.flatten(0, 1)).view(*x.shape[:2], -1)

    def summary(self, x: Tensor) -> Tensor:
        """Return one vector an image, [K, B, T, W] to [K, B, W]: the class token, or the patches' mean, normed."""
        return self.final_norm(
            x[:, :, 0] if self.class_tokens else x[:, :, -self.patches :].mean(2),
        )

    def flops(self, images: int, start: int = 0, prompts: int = 0) -> float:
        """Count the forward matrix-product FLOPs of the layers from `start`, with `prompts` prompt tokens in each."""
        rows = self.class_tokens + self.patches + prompts
        by_layer = (rows * layer.row_flops + 4.0 * layer.width * rows**2 for layer in self.layers[start:])
        return images * sum(by_layer)

    def _step(self, layer: Layer, x: Tensor, adapter: Adapter | None) -> Tensor:
        """Apply one layer: [K, B, T, W] to the same."""
        normed = layer.norm1(x)
        query, pair = layer.qkv(normed).split([layer.width, 2 * layer.width], dim=-1)
        if adapter is not None:
            pair = adapter(normed, pair)
        key, value = pair.chunk(2, dim=-1)
        query, key, value = (
            part.reshape(-1, part.shape[2], self.heads, layer.width // self.heads).transpose(1, 2)
            for part in (query, key, value)
        )
        # The scale is in the query's weights.
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return layer.finish(x, attended.transpose(1, 2).reshape(x.shape))
