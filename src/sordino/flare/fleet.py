"""The sites as FLARE reaches them: one task a site, each with bytes of its own; answers come in other threads."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from sordino.errors import SordinoError
from sordino.runtime.fleet import Answer, Ask, Lost
from sordino.runtime.waiting import hear

TICK = 0.5  # seconds between two looks at whether the job was aborted

# Told once for a task: an answer's bytes, or why there is none.
Told = Callable[[bytes | str], None]


class Aborted(SordinoError):
    """The job was aborted, by an administrator or by FLARE."""


class Paused(SordinoError):
    """The job is to end between two rounds, and another one goes on."""


class Tasks(Protocol):
    """The part of FLARE's controller that a fleet needs."""

    def sites(self) -> frozenset[str]:
        """Return the names of the connected sites, as their certificates say."""
        ...

    def start(self, site: str, content: bytes, told: Told) -> Callable[[], None]:
        """Offer a site a task, and return what withdraws it."""
        ...

    def aborted(self) -> bool:
        """Tell whether the job is to end."""
        ...

    def paused(self) -> bool:
        """Tell whether the job is to end before the next round."""
        ...


class FlareFleet:
    """A fleet over tasks.

    Args:
        tasks: of the controller.
        clock: seconds that only grow.
    """

    def __init__(self, tasks: Tasks, clock: Callable[[], float] = time.monotonic) -> None:
        self._tasks, self._clock = tasks, clock
        self._round = 0

    def sites(self) -> frozenset[str]:
        return self._tasks.sites()

    def may_return(self) -> bool:
        """See `Fleet.may_return`.

        Raises:
            Aborted: the job is to end.
            Paused: the job is to end between two rounds.
        """
        if self._tasks.aborted():
            raise Aborted("the job was aborted")
        if self._tasks.paused():
            raise Paused("the job ends while it waits for sites")
        return True

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        """See `Fleet.ask`; tasks that were not answered are withdrawn, also where the caller stops listening.

        Raises:
            Aborted: the job is to end.
            Paused: the job is to end, and this is the first question of a round.
        """
        if ask.round > self._round and self._tasks.paused():
            raise Paused(f"the job ends before round {ask.round}")
        self._round = max(self._round, ask.round)  # a late site is asked for its hello between rounds
        heard: queue.SimpleQueue[tuple[str, bytes | str]] = queue.SimpleQueue()
        there, waiting = self.sites(), dict[str, Callable[[], None]]()

        def wait(seconds: float) -> list[tuple[str, bytes | str]]:
            if self._tasks.aborted():
                raise Aborted("the job was aborted")
            try:
                site, content = heard.get(timeout=min(seconds, TICK))
            except queue.Empty:
                return []
            waiting.pop(site, None)
            return [(site, content)]

        try:
            for site, content in ask.payloads.items():
                if site in there:
                    waiting[site] = self._tasks.start(site, content, _teller(heard, site))
            yield from (Lost(site, "it is not connected", asked=False) for site in ask.payloads if site not in there)
            yield from hear(ask, list(waiting), wait, self._clock)
        finally:
            for withdraw in waiting.values():
                withdraw()


def _teller(heard: queue.SimpleQueue[tuple[str, bytes | str]], site: str) -> Told:
    return lambda content: heard.put((site, content))
