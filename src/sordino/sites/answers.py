"""Answers of sites: one that is busy is asked again, and what one tells outside of rounds is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import Answer, Ask, Fleet, Lost
from sordino.runtime.messages import MessageError

AGAIN = 1.0  # seconds until a busy site is asked again; it has waited much longer itself
AT_ONCE = 10_000  # clients whose broadcasts after the last round are held at once
LONGEST = 2**12  # bytes of an answer that says no more than that a site is busy


class BusyAskedAgain:
    """A fleet that asks a site again which is busy with another experiment, and has it lost where time is up.

    Nothing happened at such a site. So it is as if it had not answered yet, and never a refusal.

    Args:
        fleet: the sites.
        clock: seconds that only grow.
        rest: waits for some seconds.
    """

    def __init__(
        self, fleet: Fleet, clock: Callable[[], float] = time.monotonic, rest: Callable[[float], None] = time.sleep
    ) -> None:
        self._fleet, self._clock, self._rest = fleet, clock, rest

    def sites(self) -> frozenset[str]:
        return self._fleet.sites()

    def may_return(self) -> bool:
        return self._fleet.may_return()

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        """See `Fleet.ask`. Those who are busy are asked again once all others answered, or are lost."""
        end, answered, enough, now = self._clock() + ask.deadline, 0, False, ask
        while True:
            busy = []
            for event in self._fleet.ask(now):
                if isinstance(event, Answer) and _is_busy(event.content):
                    busy.append(event.site)
                    continue
                answered += isinstance(event, Answer)
                yield event
            if busy and not enough and answered >= ask.quorum and not ask.short():
                enough, end = True, min(end, self._clock() + ask.grace)
            left = end - self._clock() - AGAIN
            if not busy or left <= 0:
                break
            self._rest(AGAIN)
            payloads = {site: ask.payloads[site] for site in busy}
            now = replace(ask, payloads=payloads, quorum=max(1, ask.quorum - answered), deadline=left)
        yield from (Lost(site, "it is busy with another experiment") for site in busy)


def _is_busy(content: bytes) -> bool:
    """Return whether an answer says no more than that its site is busy."""
    if len(content) > LONGEST:
        return False
    try:
        return Envelope.decode(content).kind == "busy"
    except MessageError:
        return False


def groups(sites: Mapping[str, Sequence[int]]) -> Iterator[dict[str, Sequence[int]]]:
    """Yield groups of sites that together have not many more than `AT_ONCE` clients."""
    group: dict[str, Sequence[int]] = {}
    for site, clients in sites.items():
        group[site] = clients
        if sum(map(len, group.values())) >= AT_ONCE:
            yield group
            group = {}
    if group:
        yield group


def answer_of(event: Answer | Lost, kind: str, experiment: str) -> Envelope:
    """Return a site's answer of a kind; a refusal where it has none."""
    try:
        if isinstance(event, Lost):
            raise MessageError(event.reason)
        answer = Envelope.decode(event.content)
        if answer.kind not in (kind, "refusal"):
            raise MessageError(f"it answered with a {answer.kind}")
    except MessageError as error:
        return Envelope("refusal", experiment, {"reason": str(error)})
    return answer


def accuracy_of(answer: Envelope, clients: Sequence[int]) -> dict[str, float | None]:
    """Return the accuracies that a site tells of its own clients.

    Raises:
        MessageError: it refused, or tells something else.
    """
    if answer.kind == "refusal":
        raise MessageError(str(answer.facts.get("reason", "it refused")))
    told = answer.facts.get("accuracy", {})
    if not isinstance(told, dict) or set(told) - set(map(str, clients)):
        raise MessageError("it tells accuracies of clients that are not its own")
    if any(not (value is None or (isinstance(value, float | int) and 0 <= value <= 1)) for value in told.values()):
        raise MessageError("it tells accuracies that are none")
    return {f"client {client}": value for client, value in told.items()}
