"""The loop that joins a server and a fleet, and how long it waits for sites and for answers, over every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from sordino.errors import RunError
from sordino.runtime.fleet import Answer, Ask, Fleet, Lost, ServerRuntime
from sordino.runtime.server import ServerTraining

POLL = 0.5  # seconds between two looks at which sites are there
# Rounds in a row that were void, or could not be asked, after which an experiment stops. A void one is charged. A site
# or server that is started again costs one or two, so the third says that this does not pass by itself.
MOST_MISSED = 3
# What came within some seconds, by site: an answer's bytes, or why there is none.
Wait = Callable[[float], Iterable[tuple[str, bytes | str]]]
# Told at each look before a round that cannot be asked yet: the sites that it waits for.
Waits = Callable[[Sequence[str]], None]


class Stalled(RunError):
    """Round after round was void, or could not be asked; what holds after the last one is saved."""


def drive(
    server: ServerRuntime,
    fleet: Fleet,
    waits: Waits = lambda away: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ServerTraining:
    """Run all rounds of a server over a fleet, and return its last state.

    Before each round it waits for sites of enough clients, until the deadline. Then nothing was drawn and nothing sent,
    so an outage costs time, and no epsilon.

    Args:
        server: the server.
        fleet: its sites.
        waits: is told whom it waits for; it may have sites join meanwhile.
        clock: seconds that only grow.
        sleep: lets some of them go by.

    Raises:
        RoundError: the release of statistics failed, or training diverged.
        Stalled: several rounds in a row were void, or could not be asked.
    """
    try:
        while True:
            if away := _awaited(server, fleet, waits, clock, sleep):
                without = f"too few of its sites are connected, without {' and '.join(away)}"
                server.missed.append(f"{server.name} was not asked: {without}")
            else:
                ask = server.next()
                if not isinstance(ask, Ask):
                    return ask.training
                put(ask, server, fleet)
                server.close_round()
            if len(server.missed) >= MOST_MISSED and server.goes_on():
                raise Stalled(
                    f"{len(server.missed)} rounds in a row were void or could not be asked. The last: "
                    f"{server.missed[-1]}. See that the sites run and are connected, and repeat the command, which "
                    "goes on from the last round"
                )
    finally:
        server.stop()


def put(ask: Ask, server: ServerRuntime, fleet: Fleet) -> None:
    """Put a server's question to a fleet, and have the server hear what comes."""
    for event in fleet.ask(ask):
        if isinstance(event, Answer):
            server.take(event.site, event.content)
        else:
            server.lost(event.site, event.reason, event.asked)


def _awaited(
    server: ServerRuntime,
    fleet: Fleet,
    waits: Waits,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> list[str]:
    """Wait until the next round can be asked, and return the sites without which it is not."""
    end = clock() + server.patience.deadline
    while away := server.awaits(there := fleet.sites()):
        waits(away)
        left = end - clock()
        if left <= 0 or not fleet.may_return():
            return [] if server.goes_without(there) else away
        sleep(min(POLL, left))
    return []


def hear(
    ask: Ask, asked: Sequence[str], wait: Wait, clock: Callable[[], float] = time.monotonic
) -> Iterator[Answer | Lost]:
    """Yield one entry for each site that was asked; see `Fleet.ask`.

    Args:
        ask: the question.
        asked: the sites that it was brought to.
        wait: returns what came within at most so many seconds. Second words of a site are not heard.
        clock: seconds that only grow.
    """
    waiting, enough = dict.fromkeys(asked), False
    end, answered, reason = clock() + ask.deadline, 0, f"no answer after {ask.deadline:g} s"
    while waiting and (left := end - clock()) > 0:
        for site, content in wait(left):
            if site not in waiting:  # it was heard before
                continue
            del waiting[site]
            if isinstance(content, str):
                yield Lost(site, content)
                continue
            answered += 1
            yield Answer(site, content)
            if enough or answered < ask.quorum or ask.short():
                continue
            enough = True
            if (soon := clock() + ask.grace) < end:
                end, reason = soon, f"no answer {ask.grace:g} s after {answered} of {len(ask.payloads)} had answered"
    yield from [Lost(site, reason) for site in waiting]
