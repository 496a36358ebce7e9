"""A person's contribution: the sum over the person's images in a batch, which is then clipped as one.

Hospitals have several images of a patient. If the person is the unit of privacy, neighboring data sets differ in one
person with all their images. A released sum has one vector for each person in the sample, of norm at most the clip.

Sensitivity. Write g_b for what image b of the batch contributes (a gradient, or a cotangent), a function of that image
and of earlier releases only, and zero if it is not finite. The vector of person j is v_j = clip(sum of g_b over the
images of j). The sum is computed in a place of j's own, so no other person's numbers enter it, not even times zero. So
v_j depends on j's images alone, |v_j| <= clip, and the sum over persons changes by at most `clip` if one is added or
removed, whatever the others are. A sum that overflows counts as zero, which also depends on j alone. Persons are in the
sample independently of each other (`sampling`), with all their images or with none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from sordino.privacy.gradients import finite_clients

Piece = dict[str, Tensor]
ENTRIES_AT_ONCE = 2**24  # of persons' matrices that are in memory together


def person_sums(pieces: Iterable[Mapping[str, Tensor]], persons: Tensor) -> Iterator[Piece]:
    """Sum the contributions of each person.

    Args:
        pieces: name to [n, ...], one after the other over all examples. An example with a number that is not finite
            counts as zero.
        persons: [B] whose each example is; those of one person come together.

    Yields:
        Name to [p, ...], the sums of p persons. Each person is in one of them.
    """
    waiting: tuple[int, Piece] | None = None  # a person whose examples may go on in the next piece, and the sum so far
    first = 0
    for piece in pieces:
        values = finite_clients(piece)
        count = len(next(iter(values.values())))
        owners = persons[first : first + count]
        first += count
        if not count:
            continue
        numbers, places = owners.unique_consecutive(return_inverse=True)
        sums = {name: _added(value, places, len(numbers)) for name, value in values.items()}
        if waiting is not None:
            person, earlier = waiting
            if person == int(numbers[0]):
                for name, value in earlier.items():
                    sums[name][:1] += value
            else:
                yield earlier
        if len(numbers) > 1:
            yield {name: value[:-1] for name, value in sums.items()}
        waiting = int(numbers[-1]), {name: value[-1:] for name, value in sums.items()}
    if waiting is not None:
        yield waiting[1]


def person_products(left: Tensor, right: Tensor, persons: Tensor) -> Iterator[Tensor]:
    """Sum the outer products of each person.

    Args:
        left: [B, C], finite.
        right: [B, r], finite.
        persons: [B] whose each row is; those of one person come together.

    Yields:
        [p, C, r], for p persons the sums of left_b right_b^T over their rows. Each person is in one of them.
    """
    if not len(persons):
        return
    numbers, places, counts = persons.unique_consecutive(return_inverse=True, return_counts=True)
    # Rows of a person side by side, [P, m, ...]: each product below is of one person's rows alone.
    starts = counts.cumsum(0) - counts
    place_within = torch.arange(len(persons), device=persons.device) - starts[places]
    shape = (len(numbers), int(counts.max()))
    lefts, rights = left.new_zeros(*shape, left.shape[1]), right.new_zeros(*shape, right.shape[1])
    lefts[places, place_within], rights[places, place_within] = left, right
    at_once = max(1, ENTRIES_AT_ONCE // max(1, left.shape[1] * right.shape[1]))
    for some, others in zip(lefts.split(at_once), rights.split(at_once), strict=True):
        yield some.mT @ others


def together(persons: Tensor) -> Tensor:
    """Return an order of examples [B] in which those of one person come together, and otherwise as they came."""
    return persons.argsort(stable=True)


def _added(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Return sums [count, ...] of the rows of values [n, ...] by their places [n]."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, places, values)
