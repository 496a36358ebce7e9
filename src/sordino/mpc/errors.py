"""Errors of computations on shares."""

from __future__ import annotations

from sordino.errors import SordinoError


class MpcError(SordinoError):
    """A step of a protocol was refused, or cannot be done."""


class OutOfRange(MpcError):
    """A number is too large for the chosen fixed point, or a precision does not fit the ring."""


class MaskReused(MpcError):
    """A mask or dealt randomness was requested twice. Two openings under one mask reveal their difference."""


class PartyLost(MpcError):
    """The other party ended, stalled, or sent a message that is malformed or of a wrong length."""
