"""A client's computations on the shares that it holds, and the random numbers that it deals with its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sordino.secure.field import Elements, Entropy
from sordino.secure.messages import Purpose
from sordino.secure.setup import Setup


@dataclass
class Held:
    """The shares that others dealt to a client, one row a dealer; rows of other clients are zero.

    Attributes:
        dealt: [N], true for dealers whose payloads were accepted.
        values: shares of their points or vectors, [N, length of a block].
        extra: shares of their factor (with "ratios" only), of their mask for a sum of distances,
            and of their masks for distances: [N, ...].
    """

    dealt: NDArray[np.bool_]
    values: Elements
    extra: Elements


def payload_sizes(setup: Setup, purpose: Purpose) -> tuple[int, int]:
    """Return the numbers of a payload's elements: those of the share of the point or vector, and those after it."""
    if purpose == "vector":
        return setup.vector_block, 0
    return setup.point_block, (1 if setup.factor_bits else 0) + 1 + setup.columns


def in_blocks(elements: Elements, blocks: int) -> Elements:
    """Reshape elements [d] to blocks [B, ceil(d / B)], filled up with zeros."""
    padded = np.zeros(blocks * -(-len(elements) // blocks), np.uint64)
    padded[: len(elements)] = elements
    return padded.reshape(blocks, -1)


def scaled_distances(setup: Setup, points: Elements, sets: NDArray[np.bool_]) -> Elements:
    """Compute || s x_i - sum_{l in S} x_l ||^2 for all clients i and sets S of s members, [N, C], of shares [N, block].

    It expands to s^2 |x_i|^2 - 2 s x_i . c + |c|^2 with c the sum over S, so it takes two matrix
    products.
    """
    field = setup.field
    sizes = sets.sum(1).astype(np.uint64)
    sums = field.matmul(sets.astype(np.uint64), points)  # [C, block]
    squares = field.sum(field.mul(points, points))  # [N]
    distances = field.mul(squares[:, None], field.reduce(sizes * sizes))
    products = field.mul(field.matmul(points, sums.T), field.reduce(2 * sizes))
    return field.add(field.sub(distances, products), field.sum(field.mul(sums, sums)))


def masked_distances(
    setup: Setup, held: Held, rows: NDArray[np.bool_], columns: NDArray[np.bool_], first: int
) -> Elements:
    """Compute a client's answer: distances [rows, C], times the row's factor if there is one, plus the row's masks.

    A client's distance to itself alone is known to be zero, and zero is the answer. A remainder
    added to it would show the size of the factor.
    """
    field = setup.field
    values = scaled_distances(setup, held.values, columns)[rows]
    masks = held.extra[rows]
    if setup.factor_bits:
        values, masks = field.mul(values, masks[:, :1]), masks[:, 1:]
    answers = field.add(values, masks[:, 1 + first : 1 + first + len(columns)])
    itself = (columns.sum(1) == 1) & columns[:, rows].T
    return np.where(itself, np.uint64(0), answers)


def random_factor(bits: int, entropy: Entropy) -> int:
    """Draw a factor from 1 to 2^bits - 1.

    All orders of magnitude are equally likely, so that a product hardly shows a scale.
    """
    exponent = random_below(bits, entropy)
    return (1 << exponent) + random_below(1 << exponent, entropy)


def random_below(limit: int, entropy: Entropy) -> int:
    """Draw a uniform integer in [0, limit), limit up to 2^64."""
    bits = (limit - 1).bit_length()
    drawn = limit
    while drawn >= limit:
        drawn = int.from_bytes(entropy(8), "little") >> (64 - bits)
    return drawn
