"""How a party's process gets its memory."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt, as in its header malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


def keep_freed() -> bool:
    """Let this process keep the memory that it frees, for its next tensors; call it before there are threads.

    glibc hands large blocks back as soon as they are free, and the system clears each page of the next. On shares each
    value is a large tensor that is used once, and clearing took a third of the time that dealing takes. From here on
    the process is as large as it was at its largest.

    Returns:
        Whether the C library is glibc, and was told so.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26, ARENA_MAX: 1}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
