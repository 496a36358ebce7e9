"""Canaries: examples whose presence in training an adversary guesses, and a federation that has them.

**Left out** means masked. Every canary has an inclusion bit, and a place in its client's rows whatever the bit is. So
sizes, sampling rates, divisors, weights and everything drawn at random are the same with it and without. If the bit is
0, the canary is masked in every batch after the batch was drawn (`ClientData.hidden`). No model ever reads it, and it
adds exactly nothing to any sum, for any method and mechanism. So runs that differ in one bit are neighbors in the
accountant's sense: one sum with and without one clipped term, under the very same sampling. The ledger's epsilon bounds
what can be learned about each bit. (A blank in its place, an example that is all zeros, would not do: behind an image
tower it has a gradient like any other.)

**A canary** is an example that is as unlike the others as possible, with a random label. No class name and no other
image explains it, so only training on the canary itself lowers its loss. Its error p - y is large, so clipping leaves
it its full influence. If methods read features, it is a stack of unit vectors drawn at random. With D dimensions two of
them are orthogonal up to some 1/sqrt(D), so they hide each other little. If methods read pixels, it is a picture of
random patches of color, as bright and as varied as pictures are. If they read a layer of the image tower, it is that
layer's output for such a picture: numbers that no picture has may have no finite gradient there. The guarantee is for
every example, so the audit may choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sordino.audit.subject import vary
from sordino.encoders.encode import forward
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy import accounting
from sordino.randomness import derive_key, generator
from sordino.runtime.local import LocalRuntime

# Claim and bound are stated at this delta, or at the run's if that is smaller. A bound from m canaries gives away
# 2 m delta, so at a delta near one over the number of examples it could show little.
DELTA = 1e-5
PATCHES = 4  # of color, in a row and in a column of a canary's picture
AT_ONCE = 64  # pictures


@dataclass(frozen=True)
class Canaries:
    """Examples whose presence an adversary guesses.

    Attributes:
        features, labels: [m, ...] as the method's model reads images, and [m].
        owners: [m], the client that holds the canary.
        included: [m], the inclusion bit: true if the canary is trained on.
    """

    features: Tensor
    labels: Tensor
    owners: Tensor
    included: Tensor

    @classmethod
    def draw(cls, count: int, clients: int, model: PromptModel, shape: Sequence[int], seed: int) -> Canaries:
        """Draw `count` canaries, as `model` reads images of `shape` [...]; clients take turns."""
        draw = generator(seed, "canaries")
        if model.reads in ("image", "patch"):
            features = F.normalize(torch.from_numpy(draw.standard_normal((count, *shape))), dim=-1)
        else:
            features = _read(model, _pictures(count, model, draw))
        labels = torch.from_numpy(draw.integers(len(model.classes), size=count))
        included = torch.from_numpy(draw.random(count) < 0.5)
        return cls(features, labels, torch.arange(count) % clients, included)

    def to(self, like: Tensor) -> Canaries:
        """Return the same canaries on the device of `like`, features in its type."""
        device = like.device
        return Canaries(
            self.features.to(like), self.labels.to(device), self.owners.to(device), self.included.to(device)
        )


def _pictures(count: int, model: PromptModel, draw: np.random.Generator) -> Tensor:
    """Draw pictures [count, 3, H, W] of random patches, in the encoder's units: of mean 0 and deviation near 1."""
    size = model.encoder.transform(Image.new("RGB", (8, 8))).shape[-2:]
    patches = torch.from_numpy(draw.standard_normal((count, 3, PATCHES, PATCHES)))
    grain = torch.from_numpy(draw.standard_normal((count, 3, *size)))
    return (F.interpolate(1.5 * patches, size=size, mode="bilinear") + 0.3 * grain).clamp(-2, 2)


@torch.no_grad()
def _read(model: PromptModel, pictures: Tensor) -> Tensor:
    """Return the model's input for pictures."""
    encoder = model.encoder
    pieces = pictures.to(encoder.device, encoder.dtype).split(AT_ONCE)
    return torch.cat([forward(encoder, model.reads, piece) for piece in pieces])


def with_canaries(runtime: LocalRuntime, canaries: Canaries, seed: int) -> LocalRuntime:
    """Return the same federation, each client with its canaries added; those left out are hidden from training."""
    data = runtime.data
    rows = []
    for client, (padded, count) in enumerate(zip(data.rows, data.counts, strict=True)):
        # Canaries are the last rows of the joined table.
        canary_rows = len(data.features) + (canaries.owners == client).nonzero().flatten()
        rows.append([*padded[: int(count)].tolist(), *canary_rows.tolist()])
    units = sum(map(len, rows))
    stated = runtime.mechanism.delta
    delta = {} if stated is None else {"delta": min(stated, accounting.default_delta(units), DELTA)}
    table = torch.cat([data.features, canaries.features])
    labels = torch.cat([data.labels, canaries.labels])
    varied = vary(runtime, table, labels, rows, derive_key(seed, "training"), **delta)
    real = torch.zeros(len(data.features), dtype=torch.bool, device=canaries.included.device)
    varied.data = replace(varied.data, hidden=torch.cat([real, ~canaries.included]))
    return varied
