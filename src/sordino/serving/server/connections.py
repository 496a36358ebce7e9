"""Connections on which nobody asks: closed after a while, so that strangers cannot hold all that a server takes.

uvicorn waits without end for the first request of a connection, for the rest of a request's head, and for a client that
does not read its answer. None of this needs a key.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE: Final = 10.0  # seconds without a request that is being answered


class Connection(H11Protocol):
    """HTTP/1.1 on one connection, which ends where no request is being answered for `PATIENCE` seconds.

    A request that is being answered has the time of the guard, with its body. uvicorn makes one for each connection.
    """

    _watch: asyncio.TimerHandle | None = None
    _since = 0.0  # of the loop's clock: when the last answer ended, or the connection began
    _unsent = math.inf  # bytes of an answer, when it was looked last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._watch = self.loop.call_later(PATIENCE, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch no more."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Count anew from the end of an answer."""
        self._since = self.loop.time()
        super().on_response_complete()

    def _look(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete and not self.transport.is_closing()
        unsent = self.transport.get_write_buffer_size()
        if answering or 0 < unsent < self._unsent:  # a slow reader reads
            self._since = self.loop.time()
        self._unsent = unsent or math.inf
        left = self._since + PATIENCE - self.loop.time()
        if left <= 0:
            self.transport.abort()  # closing would wait for a client that does not read
        else:
            self._watch = self.loop.call_later(left, self._look)
