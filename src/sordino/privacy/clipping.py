"""Clipping: every contribution is scaled to a bounded norm by itself.

A contribution is a row of one or more tensors: an example's gradient, or a client's upload. A clipped row depends on
that row alone, whatever the others are. The sensitivity of a clipped sum rests on nothing else, so it holds at the
extremes too. A norm that is beyond the tensors' type is computed nonetheless, and a row that is not finite counts as
zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

# Number of entries whose squares are added up before the root is taken. In float32, a norm of seven million entries
# taken at once was wrong by 2e-4, and a clipped row was then too long by as much.
ENTRIES_AT_ONCE = 4096


def clip_jointly(tensors: Mapping[str, Tensor], clip: float) -> tuple[dict[str, Tensor], Tensor]:
    """Scale each row of all tensors together to a norm of at most `clip`.

    Args:
        tensors: each [n, ...].
        clip: the largest norm that is kept.

    Returns:
        The tensors: rows below `clip` are unchanged, rows that are not finite are zero. And [n], true for each row
        below `clip`.
    """
    reduced, factors, below = _reduced(tensors, clip)
    clipped = {name: tensor * _over_rows(factors, tensor) for name, tensor in reduced.items()}
    return clipped, below


def clipped_sum(tensors: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Return the sum over rows of tensors [n, ...], each row clipped as by `clip_jointly`.

    One row more or less moves the sum by at most `clip`. The difference depends on that row alone.
    """
    reduced, factors, _ = _reduced(tensors, clip)
    return {name: torch.tensordot(factors.to(tensor), tensor, dims=1) for name, tensor in reduced.items()}


def _reduced(tensors: Mapping[str, Tensor], clip: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Divide rows so that their largest entry is near 1.

    Rows are divided by powers of two, which rounds nothing. Then no square overflows, and none that counts vanishes.

    Returns:
        The divided rows [n, ...]; the factors [n] that make clipped rows of them; and [n], true below the clip.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()), torch.float32)
    largest = torch.stack([_largest(tensor).to(dtype) for tensor in tensors.values()]).amax(0)  # [n]
    finite, unit = largest.isfinite(), power_of_two(largest)
    reduced = {name: tensor / _over_rows(unit, tensor) for name, tensor in tensors.items()}
    # Done even if all are finite: to ask would make the host wait for an accelerator.
    reduced = {name: torch.where(_over_rows(finite, tensor), tensor, 0.0) for name, tensor in reduced.items()}
    norms = torch.stack([_norms(tensor).to(dtype) for tensor in reduced.values()]).norm(dim=0)
    factors = torch.minimum(unit, clip / norms.clamp(min=0.5))
    return reduced, factors, finite & (unit * norms <= clip)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, for sums over many rows; as it is on a device that has none.

    In float32 the sum of 100,000 rows that are alike is rounded so coarsely that one row more moved it by 1.0005 clips.
    """
    return tensor if tensor.device.type == "mps" else tensor.double()


def power_of_two(sizes: Tensor) -> Tensor:
    """Return powers of two near positive sizes, and 1 for zero and for sizes that are not finite.

    Division by a power of two is exact.
    """
    top = math.frexp(torch.finfo(sizes.dtype).max)[1] - 1  # 2 ** top is finite
    sized = sizes.isfinite() & (sizes > 0)
    powers: Tensor = torch.exp2(torch.where(sized, sizes, 1.0).log2().floor().clamp(max=top))
    return powers


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest absolute value of each row of [n, ...]; NaN if the row has a NaN."""
    width = tensor.shape[1:].numel()
    if not width:
        return tensor.new_zeros(len(tensor))
    return tensor.reshape(len(tensor), width).abs().amax(1)


def _norms(tensor: Tensor) -> Tensor:
    """Return the norm of each row of [n, ...], to a few units in the last place however long the rows are."""
    pieces = tensor.reshape(len(tensor), tensor.shape[1:].numel()).split(ENTRIES_AT_ONCE, dim=1)
    norms = [piece.norm(dim=1) for piece in pieces]
    whole: Tensor = torch.stack(norms).norm(dim=0) if len(norms) > 1 else norms[0]
    return whole


def _over_rows(values: Tensor, like: Tensor) -> Tensor:
    """Return values [n] in a shape that broadcasts over a tensor [n, ...]; floats in its type."""
    dtype = like.dtype if values.is_floating_point() and like.is_floating_point() else values.dtype
    return values.to(dtype).view(-1, *[1] * (like.ndim - 1))
