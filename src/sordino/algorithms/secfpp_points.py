"""The reduction of prompts to the points that SecFPP clusters clients by.

A context as it is, 3,072 numbers of which most is noise, did not show PACS's domains. So a context is reduced to its
change of the class features, [C, D], since the context that all clients start from. The mean over classes is taken off,
which no softmax sees. The rest is projected on leading directions of public class names' features, and given unit norm.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.cotangent import public_directions

DIRECTIONS = 64  # public directions on which class features are projected, at most


def points(model: PromptModel, contexts: Tensor, start: Tensor, width: int) -> Tensor:
    """Reduce contexts to points; differentiable in the contexts.

    Args:
        model: the frozen model.
        contexts: [K, M, E].
        start: [M, E], the context that all clients start from.
        width: d, the largest width of a point.

    Returns:
        [K, d] of unit norm, d as `point_width` says.
    """
    directions = _directions(model, width)
    change = model.class_features(contexts) - model.class_features(start[None].to(contexts)).detach()  # [K, C, D]
    basis = public_directions(model.encoder, directions).to(change)
    projected = ((change - change.mean(1, keepdim=True)) @ basis).flatten(1)
    if projected.shape[1] > width:  # more classes than numbers: a projection that all clients draw alike
        drawn = np.random.default_rng(0).standard_normal((projected.shape[1], width)) / np.sqrt(width)
        projected = projected @ torch.from_numpy(drawn).to(projected)
    return torch.nn.functional.normalize(projected, dim=1)


def point_width(model: PromptModel, width: int) -> int:
    """Return the width of a point, which is at most `width`."""
    return min(width, len(model.classes) * _directions(model, width))


def _directions(model: PromptModel, width: int) -> int:
    """Return the number of directions on which each class's feature is projected."""
    return max(1, min(DIRECTIONS, model.encoder.feature_width, width // len(model.classes)))
