"""How long-running parts say how far they are; the command line draws it, a library user may ignore it."""

from __future__ import annotations

import logging
from typing import Protocol

log = logging.getLogger("sordino")


class Progress(Protocol):
    """Called with a stage's name, how much of it is done, how much there is, and a short note."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Say nothing."""
