"""Requests of the last minute by key, in memory."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque

from limits.storage import MemoryStorage


class Window(MemoryStorage):
    """The storage of a moving window that forgets what is old when its key asks again.

    The library's own starts a thread for that with nearly every request, which the requests then wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.Lock()
        self._asked: defaultdict[str, deque[float]] = defaultdict(deque)

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count requests of a key, if all of them are within the limit; else count none.

        Args:
            key: whose they are.
            limit: of requests in a window.
            expiry: seconds of the window.
            amount: of requests.
        """
        now = time.monotonic()
        with self._guard:
            asked = self._asked[key]
            while asked and asked[0] <= now - expiry:
                asked.popleft()
            if len(asked) + amount > limit:
                return False
            asked.extend([now] * amount)
            return True
