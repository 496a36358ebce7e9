"""Parts of a prompt that belong to classes: found again by the classes' names, whatever the candidates are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sordino.randomness import derive_key


def class_number(name: str) -> int:
    """Return a number for a class by its name, the same in every process."""
    return derive_key("class", name) & 0x7FFFFFFFFFFFFFFF  # an int64 holds 63 bits


def class_numbers(names: Sequence[str], device: torch.device | None = None) -> Tensor:
    """Return the numbers of classes, [C] int64."""
    return torch.tensor([class_number(name) for name in names], dtype=torch.int64, device=device)


def at_candidates(values: Tensor, classes: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values that belong to candidate classes.

    Args:
        values: [P, S, ...], of the S classes that the prompts know.
        classes: [P, S] their numbers, see `class_number`.
        candidates: [C] the candidates' numbers.

    Returns:
        The values [P, C, ...], zeros for candidates that the prompt does not know; and [P, C], which it knows.
    """
    same = classes[:, None, :] == candidates[:, None]  # [P, C, S]
    known = same.any(-1)
    # `max` of no classes at all is an error, so a prompt that knows none is answered before.
    if not classes.shape[1]:
        return values.new_zeros(len(values), len(candidates), *values.shape[2:]), known
    places = same.to(torch.uint8).argmax(-1)  # [P, C]
    prompts = torch.arange(len(values), device=values.device)[:, None]
    found = values[prompts, places]
    return torch.where(known.view(*known.shape, *[1] * (values.ndim - 2)), found, 0.0), known
