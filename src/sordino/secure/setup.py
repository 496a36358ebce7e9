"""The public numbers of a round of SecPC, from which server and clients derive everything else."""

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
    """The numbers that the server sends to all clients at the start. `plan` chooses them.

    Attributes:
        round: the number of the round; a client takes part in each once.
        modulus: p.
        clients: N, the number of possible participants; they are numbered from 0.
        blocks: B, the number of blocks of a point.
        privacy: T, the number of colluding clients who learn nothing of others' points and vectors.
        width: d, entries of a point.
        largest: the largest absolute value of a point's entry.
        bits: bits of a point's fraction.
        reveal: "distances", or "ratios" of the distances in a row.
        factor_bits: the spread of the factors that hide a row's scale, in bits; 0 for "distances".
        columns: the number of distances of each client that may be opened.
        minimum: fewest members of a set whose sum is opened; at least `fewest_members(privacy)`.
        length: entries of a full vector; 0 if none is averaged.
        vector_largest: the largest absolute value of a vector's entry.
        vector_bits: bits of a vector's fraction.
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
            SecureError: too few clients for the degree, too small a field, or a minimum that
                protects nobody.
        """
        _check_sizes(
            self.clients,
            self.privacy,
            self.width,
            self.columns,
            self.largest,
            self.vector_largest,
        )
        if self.blocks < 1 or self.length < 0:
            raise SecureError(
                f"blocks = {self.blocks}, length = {self.length}: blocks must be 1 or more, length not negative"
            )
        try:
            _ = self.point_code, self.vector_code
        except ValueError as error:
            raise SecureError(f"no code for these sizes: {error}") from None
        has_factors = self.factor_bits > 0
        if self.reveal not in ("distances", "ratios") or has_factors != (self.reveal == "ratios"):
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
        """Return the number of answers that opens distances.

        The degree of distances is 2 (B + T - 1), or 3 (B + T - 1) with factors.
        """
        degree = 2 if self.reveal == "distances" else 3
        return degree * (self.blocks + self.privacy - 1) + 1

    @property
    def vector_needed(self) -> int:
        """Return the number of answers that opens sums of vectors: as many as for distances, and always a majority.

        An honest client answers for one partition only; T colluding ones may answer for every one.
        Two partitions with more than (N + T) / 2 answers each would need more than N - T honest
        clients. So a server that shows different partitions to different clients can open one of
        them at most.
        """
        return max(self.needed, (self.clients + self.privacy) // 2 + 1)

    @cached_property
    def field(self) -> PrimeField:
        """Return the integers modulo p."""
        return PrimeField(self.modulus)

    @cached_property
    def point_code(self) -> LagrangeCode:
        """Return the code by which points are shared."""
        return LagrangeCode(self.field, self.blocks, self.privacy, self.clients)

    @cached_property
    def vector_code(self) -> LagrangeCode:
        """Return the code by which vectors are shared.

        Sums have the degree of a share, so there is room for more and shorter blocks.
        """
        blocks = max(1, min(self.length, self.vector_needed - self.privacy))
        return LagrangeCode(self.field, blocks, self.vector_needed - blocks, self.clients)

    @property
    def points(self) -> FixedPoint:
        """Return the quantization of points."""
        return FixedPoint(self.largest, self.bits, self.field)

    @property
    def vectors(self) -> FixedPoint:
        """Return the quantization of vectors."""
        return FixedPoint(self.vector_largest, self.vector_bits, self.field)

    @property
    def point_block(self) -> int:
        """Return the entries of a block of a point; the last block is filled up with zeros."""
        return -(-self.width // self.blocks)

    @property
    def vector_block(self) -> int:
        """Return the entries of a block of a vector."""
        return -(-self.length // self.vector_code.blocks)


def fewest_members(privacy: int) -> int:
    """Return the fewest members of a set whose sum may be opened, if T = `privacy` clients may collude.

    The mean of a set goes to its members, and each knows its own vector. T members subtract theirs
    and have the sum of the others. At least two others must remain, or that sum is somebody's
    vector. One honest but curious member is a colluder too, so that a set of two is never opened.
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
    """Choose the numbers of a round that are not given. See `Setup` for their meaning.

    Args:
        tolerance: the fraction of clients that may drop out; it determines `blocks`.
        minimum: by default `fewest_members(privacy)`, which is also the least that is allowed. A
            sum over a set is protected against all but two of its members, with or without the
            server.

    Raises:
        SecureError: there is no such round; the message names the numbers and the remedy.
    """
    _check_sizes(clients, privacy, width, columns, largest, vector_largest)
    field, spread = PrimeField(modulus), factor_bits if reveal == "ratios" else 0
    if blocks is None:
        blocks = blocks_for(clients, privacy, width, tolerance, reveal)
    if bits is None:
        bits = bits_for_distances(field, largest, clients, width, spread)
    if vector_bits is None:
        vector_bits = bits_for_sums(field, vector_largest, clients)
    setup = Setup(
        round=round,
        modulus=modulus,
        clients=clients,
        blocks=blocks,
        privacy=privacy,
        width=width,
        largest=float(largest),
        bits=bits,
        reveal=reveal,
        factor_bits=spread,
        columns=columns,
        minimum=fewest_members(privacy) if minimum is None else minimum,
        length=length,
        vector_largest=float(vector_largest),
        vector_bits=vector_bits,
    )
    setup.check()
    return setup


def _check_sizes(
    clients: int,
    privacy: int,
    width: int,
    columns: int,
    largest: float,
    vector_largest: float,
) -> None:
    sizes = {"clients": clients, "privacy": privacy, "width": width, "columns": columns}
    for name, size in sizes.items():
        if size < 1:
            raise SecureError(f"{name} = {size}: must be 1 or more")
    for name, value in {"largest": largest, "vector_largest": vector_largest}.items():
        if not 0 < value < float("inf"):
            raise SecureError(f"{name} = {value}: must be positive and finite")


def blocks_for(
    clients: int,
    privacy: int,
    width: int,
    tolerance: float,
    reveal: Reveal = "distances",
) -> int:
    """Return the most blocks with which a fraction of the clients may drop out.

    More blocks make shares shorter. If fewer blocks give shares of the same length, fewer are
    returned.

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
