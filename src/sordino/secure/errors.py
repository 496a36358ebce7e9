"""What can go wrong in a round of secure computation; none of it ends a training."""

from __future__ import annotations

from sordino.errors import SordinoError


class SecureError(SordinoError):
    """A step of the protocol that was refused, or that cannot be done."""


FEWER_NEEDED = "plan the round with fewer blocks or less privacy, or wait for more clients"


class TooFewAnswers(SecureError):
    """Fewer clients answered than it takes to decode.

    Attributes:
        needed: how many answers it takes.
        had: how many there were.
    """

    def __init__(self, step: str, needed: int, had: int, remedy: str = FEWER_NEEDED) -> None:
        super().__init__(f"{step}: {needed} answers are needed and {had} came; {remedy}")
        self.needed, self.had = needed, had


class TooManyErrors(SecureError):
    """Answers that contradict each other in more places than the surplus of answers can locate.

    Attributes:
        correctable: how many wrong answers could have been located.
    """

    def __init__(self, answers: int, needed: int) -> None:
        self.correctable = (answers - needed) // 2
        super().__init__(
            f"{answers} answers contradict each other, and more than {self.correctable} of them are wrong, which is "
            f"all that {answers - needed} more than the {needed} needed can locate; nothing was decoded"
        )
