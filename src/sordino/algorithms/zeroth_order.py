"""Gradients from losses alone: two measurements on either side of a point, in random directions.

Spall, Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation, IEEE Transactions
on Automatic Control 1992 (SPSA). The estimate in a direction d is ((l(x + c d) - l(x - c d)) / 2 c) / d, by entries.
For a linear loss it is unbiased whatever c is, as entries of d are independent and symmetric: the mean of d_j / d_i is
1 if i = j and else 0. In the limit of a small c, its product with d is the derivative along d, times the number of
entries. Entries of d are uniform on [-1, -1/2] and [1/2, 1], as in BlackVIP (Oh et al., CVPR 2023), so that none is
near zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sordino.algorithms.base import RoundContext


def directions_of(
    parameters: Mapping[str, Tensor], count: int, round_context: RoundContext, step: int
) -> dict[str, Tensor]:
    """Return `count` directions for each of K clients: by name [K, count, ...], each client's own."""
    drawn = {}
    for name, value in parameters.items():
        normal = round_context.streams.normal(f"direction {step} of {name}", 2, count, *value.shape[1:])
        sizes = 0.75 + 0.25 * torch.erf(normal[:, 0] / 2**0.5)  # uniform on [1/2, 1]
        drawn[name] = (sizes * torch.where(normal[:, 1] < 0, -1.0, 1.0)).to(value)
    return drawn


def both_sides(
    parameters: Mapping[str, Tensor], directions: Mapping[str, Tensor], smoothing: float
) -> dict[str, Tensor]:
    """Return the points x + c d, and after them x - c d, by name [K, 2 count, ...]."""
    return {
        name: torch.cat([value[:, None] + sign * smoothing * directions[name] for sign in (1, -1)], dim=1)
        for name, value in parameters.items()
    }


def estimate(losses: Tensor, directions: Mapping[str, Tensor], smoothing: float) -> dict[str, Tensor]:
    """Return the mean over directions of the estimated gradients, by name [K, ...].

    Args:
        losses: [K, 2 count], at the points of `both_sides`.
        directions: by name [K, count, ...].
        smoothing: c.
    """
    ahead, behind = losses.chunk(2, dim=1)
    slopes = (ahead - behind) / (2 * smoothing)  # [K, count]
    return {
        name: (slopes.to(value).view(*slopes.shape, *[1] * (value.ndim - 2)) / value).mean(1)
        for name, value in directions.items()
    }
