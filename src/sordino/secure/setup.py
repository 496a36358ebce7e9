"""The public numbers of a round of SecPC, which server and clients derive everything else from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sordino.secure.errors import SecureError
from sordino.secure.field import MERSENNE_61, PrimeField
from sordino.secure.lagrange import LagrangeCode
from sordino.secure.messages import Message
from sordino.secure.quantization import (
    FixedPoint,
    bits_for_distances,
    bits_for_sums,
    check_distances,
    check_sums,
)

Reveal = Literal["distances", "ratios"]


@dataclass(frozen=True)
class Setup(Message):
    """What the server tells all clients at the start. `plan` chooses the numbers.

    Attributes:
        round: counts rounds; a client takes part in each once.
        modulus: p.
        clients: N, those who may take part; they are numbered from 0.
        blocks: B, into which a point is cut.
        privacy: T, how many colluding clients learn nothing of others' points and vectors.
        width: d, entries of a point.
        largest: the largest absolute value of a point's entry.
        bits: of a point's fraction.
        reveal: "distances", or "ratios" of those in a row.
        factor_bits: how widely the factors that hide a row's scale are spread; 0 for "distances".
        columns: how many distances of each client may be opened.
        minimum: fewest members of a set whose sum is opened; at least `fewest_members(privacy)`.
        length: entries of a full vector; 0 if none is averaged.
        vector_largest: the largest absolute value of a vector's entry.
        vector_bits: of a vector's fraction.
    """

    modulus: int
    clients: int
    blocks: int
    privacy: int
    width: int
    largest: float
    bits: int
    reveal: Reveal
    factor_bits: int
    columns: int
    minimum: int
    length: int
    vector_largest: float
    vector_bits: int

    def check(self) -> None:
        """Refuse numbers that do not fit together, before anything is shared.

        Raises:
            SecureError: too few clients for the degree, too small a field, or a minimum that protects nobody.
        """
        _check_sizes(self.clients, self.privacy, self.width, self.columns, self.largest, self.vector_largest)
        if self.blocks < 1 or self.length < 0:
            raise SecureError(
                f"blocks = {self.blocks}, length = {self.length}: blocks must be 1 or more, length not negative"
            )
        try:
            _ = self.point_code, self.vector_code
        except ValueError as error:
            raise SecureError(f"no code for these sizes: {error}") from None
        if self.reveal not in ("distances", "ratios") or (self.factor_bits > 0) != (self.reveal == "ratios"):
            raise SecureError(
                f"reveal = {self.reveal!r} with {self.factor_bits} factor bits: ratios need some, distances none"
            )
        if self.needed > self.clients:
            raise SecureError(
                f"{self.needed} answers are needed with {self.blocks} blocks and privacy {self.privacy}, "
                f"of {self.clients} clients; use fewer blocks, less privacy, or more clients"
            )
        if self.minimum < fewest_members(self.privacy):
            raise SecureError(
                f"minimum = {self.minimum}: must be {fewest_members(self.privacy)} or more with privacy = "
                f"{self.privacy}, or colluding members of a set could compute another's vector; raise it"
            )
        check_distances(self.points, self.clients, self.width, self.factor_bits)
        if self.length:
            check_sums(self.vectors, self.clients)

    @property
    def needed(self) -> int:
        """Answers that it takes to open distances: their degree is 2 (B + T - 1), or 3 (B + T - 1) with factors."""
        return (2 if self.reveal == "distances" else 3) * (self.blocks + self.privacy - 1) + 1

    @property
    def vector_needed(self) -> int:
        """Answers that it takes to open sums of vectors: as many as for distances, and always a majority.

        An honest client answers for one partition only; T colluding ones may answer for every one. Two partitions of
        which each has more than (N + T) / 2 answers would take more than N - T honest clients. So a server that shows
        different partitions to different clients can open one of them at most.
        """
        return max(self.needed, (self.clients + self.privacy) // 2 + 1)

    @cached_property
    def field(self) -> PrimeField:
        """The integers modulo p."""
        return PrimeField(self.modulus)

    @cached_property
    def point_code(self) -> LagrangeCode:
        """By which points are shared."""
        return LagrangeCode(self.field, self.blocks, self.privacy, self.clients)

    @cached_property
    def vector_code(self) -> LagrangeCode:
        """By which vectors are shared: sums have the degree of a share, so there is room for more, shorter blocks."""
        blocks = max(1, min(self.length, self.vector_needed - self.privacy))
        return LagrangeCode(self.field, blocks, self.vector_needed - blocks, self.clients)

    @property
    def points(self) -> FixedPoint:
        """How points are quantized."""
        return FixedPoint(self.largest, self.bits, self.field)

    @property
    def vectors(self) -> FixedPoint:
        """How vectors are quantized."""
        return FixedPoint(self.vector_largest, self.vector_bits, self.field)

    @property
    def point_block(self) -> int:
        """Entries of a block of a point; the last block is filled up with zeros."""
        return -(-self.width // self.blocks)

    @property
    def vector_block(self) -> int:
        """Entries of a block of a vector."""
        return -(-self.length // self.vector_code.blocks)


def fewest_members(privacy: int) -> int:
    """The fewest members of a set whose sum may be opened, where T = `privacy` clients may collude.

    The mean of a set goes to its members, and each knows its own vector. T members take theirs off and have the sum of
    the others: at least two others have to be left, or that is somebody's vector. One honest but curious member is a
    colluder too, so that a set of two is never opened.
    """
    return max(3, privacy + 2)


def plan(
    *,
    clients: int,
    width: int,
    largest: float,
    round: int = 1,
    privacy: int = 1,
    tolerance: float = 0.25,
    blocks: int | None = None,
    bits: int | None = None,
    reveal: Reveal = "distances",
    factor_bits: int = 16,
    columns: int = 96,
    minimum: int | None = None,
    length: int = 0,
    vector_largest: float = 1.0,
    vector_bits: int | None = None,
    modulus: int = MERSENNE_61,
) -> Setup:
    """The numbers of a round; what is left out is chosen. See `Setup` for what they mean.

    Args:
        tolerance: the share of clients that may drop out, by which `blocks` are chosen.
        minimum: by default `fewest_members(privacy)`, which is also the least that is allowed. A sum over a set is
            protected against all but two of its members, with the server or without it.

    Raises:
        SecureError: there is no such round; the message names the numbers and what to change.
    """
    _check_sizes(clients, privacy, width, columns, largest, vector_largest)
    field, spread = PrimeField(modulus), factor_bits if reveal == "ratios" else 0
    if blocks is None:
        blocks = blocks_for(clients, privacy, width, tolerance, reveal)
    setup = Setup(
        round=round,
        modulus=modulus,
        clients=clients,
        blocks=blocks,
        privacy=privacy,
        width=width,
        largest=float(largest),
        bits=bits_for_distances(field, largest, clients, width, spread) if bits is None else bits,
        reveal=reveal,
        factor_bits=spread,
        columns=columns,
        minimum=fewest_members(privacy) if minimum is None else minimum,
        length=length,
        vector_largest=float(vector_largest),
        vector_bits=bits_for_sums(field, vector_largest, clients) if vector_bits is None else vector_bits,
    )
    setup.check()
    return setup


def _check_sizes(clients: int, privacy: int, width: int, columns: int, largest: float, vector_largest: float) -> None:
    sizes = {"clients": clients, "privacy": privacy, "width": width, "columns": columns}
    for name, size in sizes.items():
        if size < 1:
            raise SecureError(f"{name} = {size}: must be 1 or more")
    for name, value in {"largest": largest, "vector_largest": vector_largest}.items():
        if not 0 < value < float("inf"):
            raise SecureError(f"{name} = {value}: must be positive and finite")


def blocks_for(clients: int, privacy: int, width: int, tolerance: float, reveal: Reveal = "distances") -> int:
    """The most blocks with which a share of the clients may drop out.

    More blocks make shares shorter. Where fewer blocks give shares of the same length, there are fewer.

    Raises:
        SecureError: not even one block is possible.
    """
    answers = clients - int(tolerance * clients)
    degree = 2 if reveal == "distances" else 3
    most = (answers - 1) // degree - privacy + 1
    if most < 1:
        raise SecureError(
            f"{clients} clients of whom {tolerance:.0%} may drop out cannot have privacy {privacy}: that takes "
            f"{degree * privacy + 1} answers; use less privacy, less tolerance, or more clients"
        )
    block = -(-width // min(most, width))
    return -(-width // block)
