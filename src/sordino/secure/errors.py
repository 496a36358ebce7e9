"""Errors of a round of secure computation; none of them ends a training."""

from __future__ import annotations

from sordino.errors import SordinoError


class SecureError(SordinoError):
    """A step of the protocol that was refused or is impossible."""


FEWER_NEEDED = "plan the round with fewer blocks or less privacy, or wait for more clients"


class TooFewAnswers(SecureError):
    """Fewer clients answered than decoding needs.

    Attributes:
        needed: the number of answers that are needed.
        had: the number of answers that came.
    """

    def __init__(self, step: str, needed: int, had: int, remedy: str = FEWER_NEEDED) -> None:
        super().__init__(f"{step}: {needed} answers are needed and {had} came; {remedy}")
        self.needed, self.had = needed, had


class TooManyErrors(SecureError):
    """Answers that contradict each other in more places than the surplus of answers can locate.

    Attributes:
        correctable: the number of wrong answers that could have been located.
    """

    def __init__(self, answers: int, needed: int) -> None:
        self.correctable = (answers - needed) // 2
        super().__init__(
            f"{answers} answers contradict each other, and more than {self.correctable} of them are wrong, which is "
            f"all that {answers - needed} more than the {needed} needed can locate; nothing was decoded"
        )
