"""Progress reports of long-running parts; the command line draws them, a library user may ignore them."""

from __future__ import annotations

import logging
from typing import Protocol

log = logging.getLogger("sordino")


class Progress(Protocol):
    """A callback that gets a stage's name, the part of it that is done, its total, and a short note."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""
