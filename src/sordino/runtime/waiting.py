"""How long a server waits for answers, the same over every engine: quorum, deadline and grace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from sordino.runtime.fleet import Answer, Ask, Lost

# What came within some seconds, by site: an answer's bytes, or why there is none.
Wait = Callable[[float], Iterable[tuple[str, bytes | str]]]


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
