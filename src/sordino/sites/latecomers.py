"""Sites that did not answer in the meeting: they are in no round before they agree, and are asked again between rounds.

An experiment that goes on in a new process of its coordinator meets its sites again, and waits for the last of them no
longer than in a round. Only the agreement tells a site how many rounds it is known to have answered. Without that, an
old copy of a site's state cannot know that it is one, and would draw noise again. So who did not agree is in no round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from sordino.progress import log
from sordino.runtime.fleet import Answer, Ask, Lost
from sordino.sites.meeting import Meeting, Met

SHARE = 0.25  # of the time may be spent on waiting for sites that were late
LEAST = 1.0  # seconds that a hello is waited for where the grace is shorter


class Latecomers:
    """A fleet without the sites that did not answer in the meeting, until they do.

    Args:
        meeting: the coordinator's side of it.
        met: its outcome.
        clock: seconds that only grow.

    Attributes:
        met: who takes part by now.
    """

    def __init__(self, meeting: Meeting, met: Met, clock: Callable[[], float] = time.monotonic) -> None:
        self.met = met
        self._meeting, self._fleet, self._clock = meeting, meeting.fleet, clock
        self._began, self._waited = clock(), 0.0

    def sites(self) -> frozenset[str]:
        return self._fleet.sites() - self.met.silent

    def may_return(self) -> bool:
        return self._fleet.may_return()

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        """See `Fleet.ask`. Who did not agree is lost at once."""
        silent = [site for site in ask.payloads if site in self.met.silent]
        yield from (Lost(site, f"it has not agreed: {self.met.left_out[site]}", asked=False) for site in silent)
        agreed = {site: payload for site, payload in ask.payloads.items() if site not in self.met.silent}
        yield from self._fleet.ask(replace(ask, payloads=agreed))

    def again(self, answered: Mapping[str, int], needed: bool = False, last: bool = False) -> None:
        """Ask those who did not answer once more.

        It waits for as long as `Patience.grace`, at least `LEAST`, for hellos, and again for answers to the agreement.
        It asks again when no more than `SHARE` of the time was spent so. Where a site is not connected, it waits for
        nobody.

        Args:
            answered: site to the last round that it is known to have answered.
            needed: nothing goes on without all sites, so they are waited for until the deadline.
            last: nobody is asked any more after this, so it asks in any case.
        """
        silent, start, patience = self.met.silent, self._clock(), self._meeting.patience
        if not silent or not (needed or last or self._waited <= SHARE * (start - self._began)):
            return
        seconds = patience.deadline if needed else min(max(patience.grace, LEAST), patience.deadline)
        self.met = self._meeting.again(self.met, answered, seconds)
        self._waited += self._clock() - start
        for site in sorted(silent - self.met.silent):
            reason = self.met.left_out.get(site)
            log.warning("%s was late: it %s", site, f"takes no part: {reason}" if reason else "takes part from now on")
