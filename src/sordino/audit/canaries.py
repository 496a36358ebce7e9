"""Canaries: examples whose presence in training is to be guessed, and a federation that has them.

**Left out** means masked. A canary takes its place in its client's rows, whatever its coin says, so that sizes,
sampling rates, divisors, weights and everything drawn at random are the same with it and without. Where its coin says
"out", it is taken from every batch after the batch was drawn (`ClientData.hidden`): no model ever reads it, and it adds
exactly nothing to any sum, for any method and mechanism. So the runs that differ in one coin are neighbors in the
accountant's sense: one sum with and without one clipped term, under the very same sampling; and what each coin is worth
is bounded by the epsilon of the ledger. (A blank in its place, an example that is all zeros, would not do: behind an
image tower it has a gradient like any other.)

**What a canary is.** An example that is as unlike the others as an example may be, with a random label: no class name
and no other image explains it, so nothing but training on the canary itself lowers its loss, and its error p - y is
large, so that clipping leaves it its full influence. Where methods read features, it is a stack of unit vectors drawn
at random; with D dimensions two of them are orthogonal up to some 1/sqrt(D), so they hide each other little. Where they
read pixels, or what a layer of the image tower makes of pixels, it is a picture of random patches of color, as bright
and as varied as pictures are, or what that layer makes of it: numbers that no picture has may have no finite gradient
there. The guarantee is for every example, so the audit may choose.
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

# At which claim and bound are stated, or smaller where the run states a smaller one: a bound from m canaries gives away
# 2 m delta, so at a delta near one over the number of examples it could show little.
DELTA = 1e-5
PATCHES = 4  # of color, in a row and in a column of a canary's picture
AT_ONCE = 64  # pictures


@dataclass(frozen=True)
class Canaries:
    """Examples whose presence is to be guessed.

    Attributes:
        features, labels: [m, ...] as the method's model reads images, and [m].
        owners: [m], the client that each is offered to.
        included: [m], true where the coin says that it is trained on.
    """

    features: Tensor
    labels: Tensor
    owners: Tensor
    included: Tensor

    @classmethod
    def draw(cls, count: int, clients: int, model: PromptModel, shape: Sequence[int], seed: int) -> Canaries:
        """`count` canaries, as `model` reads images of `shape` [...]; clients take turns."""
        draw = generator(seed, "canaries")
        if model.reads in ("image", "patch"):
            features = F.normalize(torch.from_numpy(draw.standard_normal((count, *shape))), dim=-1)
        else:
            features = _read(model, _pictures(count, model, draw))
        labels = torch.from_numpy(draw.integers(len(model.classes), size=count))
        included = torch.from_numpy(draw.random(count) < 0.5)
        return cls(features, labels, torch.arange(count) % clients, included)

    def to(self, like: Tensor) -> Canaries:
        """The same on the device of `like`, features in its type."""
        device = like.device
        return Canaries(
            self.features.to(like), self.labels.to(device), self.owners.to(device), self.included.to(device)
        )


def _pictures(count: int, model: PromptModel, draw: np.random.Generator) -> Tensor:
    """Pictures [count, 3, H, W] of random patches, in the encoder's units: of mean 0 and deviation near 1."""
    size = model.encoder.transform(Image.new("RGB", (8, 8))).shape[-2:]
    patches = torch.from_numpy(draw.standard_normal((count, 3, PATCHES, PATCHES)))
    grain = torch.from_numpy(draw.standard_normal((count, 3, *size)))
    return (F.interpolate(1.5 * patches, size=size, mode="bilinear") + 0.3 * grain).clamp(-2, 2)


@torch.no_grad()
def _read(model: PromptModel, pictures: Tensor) -> Tensor:
    """What the model reads of pictures."""
    encoder = model.encoder
    pieces = pictures.to(encoder.device, encoder.dtype).split(AT_ONCE)
    return torch.cat([forward(encoder, model.reads, piece) for piece in pieces])


def with_canaries(runtime: LocalRuntime, canaries: Canaries, seed: int) -> LocalRuntime:
    """The same federation, each client with its canaries added; those that are left out are hidden from training."""
    data = runtime.data
    rows = [
        [*own[: int(count)].tolist(), *(len(data.features) + (canaries.owners == client).nonzero().flatten()).tolist()]
        for client, (own, count) in enumerate(zip(data.rows, data.counts, strict=True))
    ]
    units = sum(map(len, rows))
    stated = runtime.mechanism.delta
    delta = {} if stated is None else {"delta": min(stated, accounting.default_delta(units), DELTA)}
    table, labels = torch.cat([data.features, canaries.features]), torch.cat([data.labels, canaries.labels])
    varied = vary(runtime, table, labels, rows, derive_key(seed, "training"), **delta)
    real = torch.zeros(len(data.features), dtype=torch.bool, device=canaries.included.device)
    varied.data = replace(varied.data, hidden=torch.cat([real, ~canaries.included]))
    return varied
