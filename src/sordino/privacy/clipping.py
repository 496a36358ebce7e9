"""Contributions scaled to a bounded norm, each by itself.

A contribution is a row of one or more tensors: an example's gradient, or a client's upload. What becomes of a row
depends on that row alone, whatever the others are. That is all that the sensitivity of a clipped sum rests on, so it
holds at the extremes too: a norm that is beyond the tensors' type is computed nonetheless, and a row that is not finite
counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

# Squares of so many entries are added up before their root is taken. In float32 a norm of seven million entries taken
# at once was wrong by 2e-4, and a clipped row was then too long by as much.
ENTRIES_AT_ONCE = 4096


def clip_jointly(tensors: Mapping[str, Tensor], clip: float) -> tuple[dict[str, Tensor], Tensor]:
    """Each row of all tensors together, scaled to a norm of at most `clip`.

    Args:
        tensors: each [n, ...].
        clip: the largest norm that is kept.

    Returns:
        The tensors; rows that are below `clip` are as they were, rows that are not finite are zero. And [n], whether a
        row was below it.
    """
    reduced, factors, below = _reduced(tensors, clip)
    return {name: tensor * _over_rows(factors, tensor) for name, tensor in reduced.items()}, below


def clipped_sum(tensors: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """The sum over rows of tensors [n, ...], each row clipped as by `clip_jointly`.

    One row more or less moves it by at most `clip`, and that by which it moves depends on the row alone.
    """
    reduced, factors, _ = _reduced(tensors, clip)
    return {name: torch.tensordot(factors.to(tensor), tensor, dims=1) for name, tensor in reduced.items()}


def _reduced(tensors: Mapping[str, Tensor], clip: float) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Rows whose largest entry is near 1, the factors [n] that make clipped rows of them, and whether below the clip.

    Rows are divided by powers of two, which rounds nothing; then no square overflows, and none that counts vanishes.
    """
    kind = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()), torch.float32)
    largest = torch.stack([_largest(tensor).to(kind) for tensor in tensors.values()]).amax(0)  # [n]
    finite, unit = largest.isfinite(), power_of_two(largest)
    reduced = {name: tensor / _over_rows(unit, tensor) for name, tensor in tensors.items()}
    if not bool(finite.all()):
        reduced = {name: torch.where(_over_rows(finite, tensor), tensor, 0.0) for name, tensor in reduced.items()}
    norms = torch.stack([_norms(tensor).to(kind) for tensor in reduced.values()]).norm(dim=0)
    factors = torch.minimum(unit, clip / norms.clamp(min=0.5))
    return reduced, factors, finite & (unit * norms <= clip)


def power_of_two(sizes: Tensor) -> Tensor:
    """Powers of two near sizes that are positive; 1 for zero, and for what is not finite. To divide by one is exact."""
    top = math.frexp(torch.finfo(sizes.dtype).max)[1] - 1  # 2 ** top is finite
    sized = sizes.isfinite() & (sizes > 0)
    powers: Tensor = torch.exp2(torch.where(sized, sizes, 1.0).log2().floor().clamp(max=top))
    return powers


def _largest(tensor: Tensor) -> Tensor:
    """The largest absolute value of each row of [n, ...]; not a number where the row has one."""
    width = tensor.shape[1:].numel()
    if not width:
        return tensor.new_zeros(len(tensor))
    return tensor.reshape(len(tensor), width).abs().amax(1)


def _norms(tensor: Tensor) -> Tensor:
    """The norm of each row of [n, ...], to a few units in the last place however long the rows are."""
    pieces = tensor.reshape(len(tensor), tensor.shape[1:].numel()).split(ENTRIES_AT_ONCE, dim=1)
    norms = [piece.norm(dim=1) for piece in pieces]
    whole: Tensor = torch.stack(norms).norm(dim=0) if len(norms) > 1 else norms[0]
    return whole


def _over_rows(values: Tensor, like: Tensor) -> Tensor:
    """Values [n], ready to meet a tensor [n, ...]; numbers in its type."""
    kind = like.dtype if values.is_floating_point() and like.is_floating_point() else values.dtype
    return values.to(kind).view(-1, *[1] * (like.ndim - 1))
