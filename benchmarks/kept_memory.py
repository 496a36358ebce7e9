"""Importing this keeps freed memory, as the command line does before it imports what starts threads."""

from __future__ import annotations

from sordino.memory import keep_freed

keep_freed()
