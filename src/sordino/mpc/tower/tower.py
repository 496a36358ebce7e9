"""A text tower that is cheap on shares: BERT's layers with random feature attention in place of softmax.

Luo et al., SecP-Tuning, ICLR 2026 (arXiv 2506.15307), based on Peng et al., Random Feature Attention, ICLR 2021.
Queries and keys have unit norm. A query q weighs a key k by the mean over R frequencies of cos(w_r . (q - k)). This
mean is the product of their features [cos(w_r . x), sin(w_r . x)]. Each head learns its frequencies, and its
temperature with them. This module has the tower in the clear, differentiable. `distill` makes one from a tower with
softmax.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sordino.encoders.bundled import TextTower
from sordino.errors import ConfigError
from sordino.mpc.errors import MpcError

BUNDLED = Path(__file__).parent / "data" / "private_tower.safetensors"
FEATURES = "features"  # name of a layer's frequencies, [H, d, R]


@dataclass(frozen=True)
class PrivateTower:
    """A tower's weights.

    Attributes:
        heads: H, a layer's heads; each has width d.
        epsilon: of the layer norms.
        norm: weight and bias of the norm on embeddings, each [E].
        layers: weights of each layer, by the short names of `TextTower`, and `features`.
    """

    heads: int
    epsilon: float
    norm: tuple[Tensor, Tensor]
    layers: tuple[Mapping[str, Tensor], ...]

    @property
    def width(self) -> int:
        """E, the width of embeddings."""
        return len(self.norm[0])

    @classmethod
    def from_softmax(cls, tower: TextTower, features: int, seed: int) -> PrivateTower:
        """Combine a tower's weights with random frequencies. Before training, the result is far from the tower.

        Args:
            tower: with softmax attention.
            features: R, frequencies a head.
            seed: of the frequencies, standard normal and orthogonal in blocks of d (Yu et al., Orthogonal Random
                Features, 2016).
        """
        generator = torch.Generator().manual_seed(seed)
        width = tower.width // tower.heads
        layers = []
        for layer in tower.layers:
            drawn = [_orthogonal(width, features, generator) for _ in range(tower.heads)]
            layers.append({**layer, FEATURES: torch.stack(drawn).to(tower.words)})
        return cls(tower.heads, tower.epsilon, tower.norm, tuple(layers))

    def __call__(self, embeddings: Tensor, mask: Tensor) -> list[Tensor]:
        """Compute hidden states [B, T, E] after each layer.

        Args:
            embeddings: [B, T, E], of tokens with their positions.
            mask: [B, T], 1 for tokens, 0 for padding.
        """
        return [states for states, _ in self.passes(embeddings, mask)]

    def passes(self, embeddings: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Compute hidden states and mean attention weights after each layer.

        Returns:
            For each layer, states [B, T, E], and the mean weights over keys for every query, [B, H, T].

        Raises:
            MpcError: embeddings have another width.
        """
        width = embeddings.shape[-1]
        if width != self.width:
            raise MpcError(
                f"embeddings are {width} wide where the tower takes {self.width}: set model.tower and "
                "model.embeddings to those of one checkpoint"
            )
        x, states = F.layer_norm(embeddings, (width,), *self.norm, self.epsilon), []
        for layer in self.layers:
            mixed, weights = self.attend(x, layer, mask)
            x = _after_attention(x, mixed, layer, self.epsilon)
            states.append((x, weights))
        return states

    def attend(self, x: Tensor, layer: Mapping[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a layer's attention [B, T, E] before its projection, and its mean weights [B, H, T]."""
        return self.attend_to(*self.projected(x, layer), layer, mask)

    def projected(self, x: Tensor, layer: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values of a layer, [B, H, T, d] each."""
        qkv = F.linear(x, layer["qkv.weight"], layer["qkv.bias"])
        q, k, v = (part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        return q, k, v

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Mapping[str, Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute what `attend` does, of what `projected` computes."""
        phi_q, phi_k = (_phi(F.normalize(part, dim=-1), layer[FEATURES]) for part in (q, k))
        phi_k = phi_k * mask[:, None, :, None]
        sums = phi_q @ (phi_k.mT @ v)  # [B, H, T, d]
        weights = phi_q @ phi_k.sum(2)[..., None]  # [B, H, T, 1]
        mixed = (sums / weights).transpose(1, 2).flatten(2)
        return mixed, weights.squeeze(-1) / mask.sum(1)[:, None, None]

    def to_bytes(self, about: Mapping[str, str]) -> bytes:
        """Serialize weights as safetensors in half precision, with `about` as metadata."""
        named = {f"norm.{kind}": part for kind, part in zip(("weight", "bias"), self.norm, strict=True)}
        for number, layer in enumerate(self.layers):
            named |= {f"{number}.{name}": part for name, part in layer.items()}
        halves = {name: part.detach().half().contiguous() for name, part in named.items()}
        form = {"heads": str(self.heads), "epsilon": str(self.epsilon), "layers": str(len(self.layers))}
        return safetensors.torch.save(halves, metadata=form | dict(about))

    @classmethod
    def load(cls, file: Path, key: str = "model.tower") -> PrivateTower:
        """Load a file that `to_bytes` made. Loading executes no code.

        Args:
            file: to read.
            key: configuration key or option that names the file, for messages.

        Raises:
            ConfigError: the file is missing or malformed.
        """
        try:
            with safe_open(file, "pt") as stored:
                form = stored.metadata() or {}
                named = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
            layers = tuple(
                {name.split(".", 1)[1]: part for name, part in named.items() if name.startswith(f"{number}.")}
                for number in range(int(form["layers"]))
            )
            norm = (named["norm.weight"], named["norm.bias"])
            tower = cls(int(form["heads"]), float(form["epsilon"]), norm, layers)
            tower._check()
        except (OSError, KeyError, ValueError, IndexError, SafetensorError) as error:
            why = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else error
            problem = "no such file" if isinstance(error, FileNotFoundError) else f"holds no private tower ({why})"
            raise ConfigError(key, str(file), f"{problem}; make one with 'sordino mpc distill'") from None
        return tower

    def _check(self) -> None:
        """Check that the parts' shapes fit each other.

        Raises:
            KeyError: a part is missing.
            ValueError: a part does not fit the others.
        """
        width, heads = self.width, self.heads
        if not self.layers or heads < 1 or width % heads:
            raise ValueError(f"{len(self.layers)} layers of {heads} heads, {width} wide")
        for number, layer in enumerate(self.layers):
            inner, frequencies = len(layer["inner.bias"]), layer[FEATURES].shape[-1]
            sides = {"qkv": (3 * width, width), "out": (width, width), "inner": (inner, width), "outer": (width, inner)}
            shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in sides.items()}
            shapes |= {f"{name}.bias": shape[:1] for name, shape in sides.items()}
            shapes |= {f"norm{which}.{kind}": (width,) for which in (1, 2) for kind in ("weight", "bias")}
            shapes[FEATURES] = (heads, width // heads, frequencies)
            for name, shape in shapes.items():
                if layer[name].shape != shape:
                    raise ValueError(f"{number}.{name} is of shape {tuple(layer[name].shape)} and not {shape}")


class SoftmaxTower(PrivateTower):
    """A checkpoint's tower with softmax attention, on the same code path; differentiable in its weights."""

    @classmethod
    def of(cls, tower: TextTower) -> SoftmaxTower:
        """Take a tower's weights."""
        return cls(tower.heads, tower.epsilon, tower.norm, tuple(tower.layers))

    def attend_to(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Mapping[str, Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `PrivateTower`. The sum that softmax divides by cannot vanish, so mean weights are set to 1."""
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :] > 0)
        return mixed.transpose(1, 2).flatten(2), torch.ones_like(q[..., 0])


def bundled_tower() -> PrivateTower:
    """Load the distilled tower that comes with the package.

    Raises:
        ConfigError: the file is missing.
    """
    return PrivateTower.load(BUNDLED, "bundled tower")


def about(file: Path) -> dict[str, str]:
    """Return a stored tower's metadata: its teacher, its recipe, and its agreement with the teacher."""
    with safe_open(file, "pt") as stored:
        return dict(stored.metadata() or {})


def _after_attention(x: Tensor, mixed: Tensor, layer: Mapping[str, Tensor], epsilon: float) -> Tensor:
    """Compute the rest of a post-norm layer: projection, norm, two linear layers with GeLU between them, norm.

    The weights may need gradients, so every operation is PyTorch's own.

    Args:
        x: the layer's input, [..., E].
        mixed: the attention's output before its projection, [..., E].
        layer: weights by short names.
        epsilon: of the norms.

    Returns:
        [..., E].
    """
    width = x.shape[-1:]
    attended = F.linear(mixed, layer["out.weight"], layer["out.bias"])
    x = F.layer_norm(x + attended, width, layer["norm1.weight"], layer["norm1.bias"], epsilon)
    inner = F.gelu(F.linear(x, layer["inner.weight"], layer["inner.bias"]))
    outer = F.linear(inner, layer["outer.weight"], layer["outer.bias"])
    return F.layer_norm(x + outer, width, layer["norm2.weight"], layer["norm2.bias"], epsilon)


def _phi(x: Tensor, frequencies: Tensor) -> Tensor:
    """Compute features [B, H, T, 2 R] of unit-norm x [B, H, T, d]. Their products are means over R."""
    angles = x @ frequencies
    return torch.cat([angles.cos(), angles.sin()], -1) / math.sqrt(frequencies.shape[-1])


def _orthogonal(width: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw standard normal directions [d, R], orthogonal in blocks of d."""
    blocks = []
    for _ in range(-(-count // width)):
        basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        lengths = torch.randn(width, width, generator=generator, dtype=torch.float64).norm(dim=0)
        blocks.append(basis * lengths)
    return torch.cat(blocks, 1)[:, :count]
