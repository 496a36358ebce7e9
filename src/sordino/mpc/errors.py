"""What can go wrong in a computation on shares."""

from __future__ import annotations

from sordino.errors import SordinoError


class MpcError(SordinoError):
    """A step of a protocol that was refused, or that cannot be done."""


class OutOfRange(MpcError):
    """A number too large for the fixed point that was chosen, or a precision that does not fit the ring."""


class MaskReused(MpcError):
    """A mask, or dealt randomness, was asked for a second time: two openings under one mask tell their difference."""


class PartyLost(MpcError):
    """The other party ended, stalled, or sent something of a wrong length."""
