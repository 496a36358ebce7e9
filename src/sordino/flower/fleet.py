"""The sites as Flower reaches them: a message a site, and for each a thread that looks for its answer.

Flower brings an answer that is half sent to whoever asks for it, and lets them wait for the rest, up to three minutes.
So each site is looked for by a thread of its own: a deadline is one, and nobody waits for another's upload.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Message
from flwr.supercore.run import RunNotRunningException

from sordino.errors import SordinoError
from sordino.flower.messages import Question, question, read_answer
from sordino.progress import log
from sordino.randomness import system_bytes
from sordino.runtime.fleet import Answer, Ask, Lost
from sordino.runtime.waiting import Wait, hear
from sordino.sites.rhythm import Rhythm

POLL = 0.2  # seconds between two looks for an answer
LOOK = 2.0  # seconds between two looks at whether a node was started again
NOT_TAKEN = "the server takes no message for it"
SPARE = 5.0  # seconds after the deadline for which Flower keeps a message


class Stopped(SordinoError):
    """Somebody stopped the run, or the server was started again."""


class Grid(Protocol):
    """The part of Flower's grid that a fleet needs."""

    def get_nodes(self) -> Iterable[Any]:
        """Return the connected nodes: `node_id`, `public_key` and `last_activated_at`."""
        ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        """Send messages, and return their ids; None for one that was not taken."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to some messages that are there."""
        ...


@dataclass(frozen=True)
class _Node:
    number: int
    since: str  # when it connected


@dataclass
class _Asking:
    """A question on its way.

    Attributes:
        ask: it.
        nodes: those of the sites that are waited for.
        sent: site to the number of its messages that may still be answered.
        heard: what came.
        over: set when nobody is waited for any more.
    """

    ask: Ask
    nodes: dict[str, _Node] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    heard: queue.SimpleQueue[tuple[str, bytes | str | Stopped]] = field(default_factory=queue.SimpleQueue)
    over: threading.Event = field(default_factory=threading.Event)


class FlowerFleet:
    """A fleet over a grid.

    Args:
        grid: Flower's, of one run; it is asked by several threads at once.
        names: public key of a node to the name of its site; nodes with other keys are not there.
        clock: seconds that only grow.
    """

    def __init__(self, grid: Grid, names: Mapping[bytes, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._grid, self._names, self._clock = grid, names, clock
        self._rhythms: defaultdict[str, Rhythm] = defaultdict(lambda: Rhythm(POLL, POLL, clock))

    def sites(self) -> frozenset[str]:
        return frozenset(self._nodes())

    def may_return(self) -> bool:
        return True

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        """See `Fleet.ask`. A node that was started again in between is asked again: its answer is the same.

        Raises:
            Stopped: the run is over.
        """
        asking, there = _Asking(ask), self._nodes()
        try:
            yield from (Lost(site, "it is not connected", asked=False) for site in ask.payloads if site not in there)
            here = [site for site in ask.payloads if site in there]
            asked = [site for site in here if self._send(asking, site, there[site])]
            yield from (Lost(site, NOT_TAKEN, asked=False) for site in here if site not in asked)
            yield from hear(ask, asked, self._waiting(asking), self._clock)
        finally:
            asking.over.set()

    def _nodes(self) -> dict[str, _Node]:
        """Return the connected sites. The server has checked each node's key.

        Raises:
            Stopped: the run is over.
        """
        try:
            nodes = list(self._grid.get_nodes())
        except RunNotRunningException:
            raise Stopped("the run was stopped") from None
        return {
            self._names[bytes(node.public_key)]: _Node(int(node.node_id), str(node.last_activated_at))
            for node in nodes
            if bytes(node.public_key) in self._names
        }

    def _send(self, asking: _Asking, site: str, node: _Node) -> bool:
        """Send a site its question, and have a thread look for the answer; return whether the server took it."""
        ask, token = asking.ask, system_bytes(16)
        message = question(node.number, Question(site, token, ask.payloads[site]), ask.round, ask.deadline + SPARE)
        (number,) = self._grid.push_messages([message]) or [None]
        asking.nodes[site] = node
        if number is None:
            return False
        asking.sent[site] += 1
        # The message's own number tells whose answer it is: errors come from the server, under its number.
        threading.Thread(target=self._look, args=[asking, site, number, token], daemon=True).start()
        return True

    def _look(self, asking: _Asking, site: str, number: str, token: bytes) -> None:
        """Look for the answer to a message until it is there, or nobody waits for it.

        The first look is after most of the time that the site's answers took lately: each costs the SuperLink more than
        a small message does.
        """
        rhythm = self._rhythms[site]
        rest = max(rhythm.answered(), POLL)
        while not asking.over.wait(rest):
            rest = POLL
            try:
                replies = list(self._grid.pull_messages([number]))
                content = read_answer(replies[0], token) if replies else None
            except RunNotRunningException:
                asking.heard.put((site, Stopped("the run was stopped")))
                return
            except Exception:  # of whatever somebody sent
                log.warning("an answer of %s cannot be read", site, exc_info=True)
                content = "its answer cannot be read"
            if content is not None:
                rhythm.asked()
                asking.heard.put((site, content))
                return

    def _waiting(self, asking: _Asking) -> Wait:
        looked = self._clock()

        def wait(seconds: float) -> list[tuple[str, bytes | str]]:
            nonlocal looked
            if self._clock() - looked > LOOK:
                looked = self._clock()
                self._ask_restarted(asking)
            try:
                site, content = asking.heard.get(timeout=min(seconds, LOOK))
            except queue.Empty:
                return []
            if isinstance(content, Stopped):
                raise content
            asking.sent[site] -= 1
            if isinstance(content, str) and asking.sent[site] > 0:
                return []  # it was asked again since
            asking.nodes.pop(site, None)
            return [(site, content)]

        return wait

    def _ask_restarted(self, asking: _Asking) -> None:
        """Ask those again whose node connected anew: what it had been told is gone."""
        there = self._nodes()
        for site, node in list(asking.nodes.items()):
            if site in there and there[site].since != node.since:
                log.info("%s was started again, and is asked again", site)
                if not self._send(asking, site, there[site]):
                    asking.heard.put((site, NOT_TAKEN))
