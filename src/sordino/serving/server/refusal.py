"""A refusal: what a client is told instead of an answer, in one line."""

from __future__ import annotations


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        reason: one line, with nothing of the server's inside.
        headers: besides.
    """

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers or {}
