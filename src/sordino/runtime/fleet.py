"""The seam between rounds and engines: what a server asks, and who answers; `waiting.drive` joins the two.

An engine is a `Fleet`: it brings bytes to sites and their answers back. A server without I/O says what it asks next and
takes what comes. So the same two ends of a round run in one process, over processes, and over every engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sordino.errors import SordinoError
from sordino.runtime.envelope import Envelope
from sordino.runtime.messages import MessageError
from sordino.runtime.release import RELEASE_ROUND, Keep, drawn_anew
from sordino.runtime.server import Link, Questions, ServerEnd, ServerRecord, ServerTraining
from sordino.runtime.uploads import read_uploads
from sordino.secure import Refusal


def _no() -> bool:
    return False


@dataclass(frozen=True)
class Ask:
    """One question of the server's to some sites.

    Attributes:
        round: which it belongs to; 0 before the first.
        payloads: bytes by site.
        quorum: answers that are enough.
        deadline: seconds after which nobody is waited for.
        grace: seconds that the others have once a quorum has answered.
        short: tells whether what came is too little all the same, as whoever hears it knows after each answer. A site
            that refuses at once, or answers otherwise than agreed, would else take the others' time.
    """

    round: int
    payloads: Mapping[str, bytes]
    quorum: int
    deadline: float
    grace: float
    short: Callable[[], bool] = field(default=_no, compare=False)


@dataclass(frozen=True)
class Done:
    """There is nothing left to ask.

    Attributes:
        training: the server's state after the last round.
    """

    training: ServerTraining


@dataclass(frozen=True)
class Answer:
    """A site's answer.

    Attributes:
        site: its name, as the engine authenticated it.
        content: what it sent.
    """

    site: str
    content: bytes


@dataclass(frozen=True)
class Lost:
    """A site that was asked and does not answer any more.

    Attributes:
        site: its name.
        reason: in words.
        asked: the question may have reached it. Where it surely did not, nothing can have left the site.
    """

    site: str
    reason: str
    asked: bool = True


class Fleet(Protocol):
    """The sites, as an engine reaches them."""

    def sites(self) -> frozenset[str]:
        """Return the names of the sites that are there now."""
        ...

    def may_return(self) -> bool:
        """Tell whether sites that are not there may come back, so that a server waits for them between rounds.

        An engine raises an error here if its job is to end.
        """
        ...

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        """Bring a question to its sites, and yield what comes, one entry a site.

        It ends when all have answered, `grace` after a quorum has, or at the deadline; who has not answered is lost.
        """
        ...


@dataclass(frozen=True)
class Patience:
    """How long a server waits, and for how many.

    Attributes:
        quorum: fraction of the sites asked that is enough.
        deadline, grace: see `Ask`.
        sites: those that are waited for before the first round; empty: those that are there.
        joining: seconds that they are waited for; None: the deadline.
    """

    quorum: float = 1.0
    deadline: float = 600.0
    grace: float = 30.0
    sites: Sequence[str] = ()
    joining: float | None = None

    def of(self, count: int) -> int:
        """Return how many of `count` are enough; at least one."""
        return max(1, math.ceil(self.quorum * count - 1e-9))


@dataclass
class Heard:
    """The replies to one question.

    Attributes:
        replies: by client.
        useful: site to its clients whose replies can be used.
    """

    replies: dict[int, bytes | Refusal] = field(default_factory=dict)
    useful: dict[str, int] = field(default_factory=dict)


class ServerRuntime:
    """The rounds of a run, without I/O: `next` says whom to ask what, `take` and `lost` hear, `close_round` goes on.

    Args:
        end: the server's end.
        training: the state to start from.
        sites: site to the numbers of its clients.
        experiment: its fingerprint.
        patience: how long it waits, and for how many.
        save: is given every new state, the round's record (None for a release), and the sites that were lost in it,
            before anything else is asked.
        keep: keeps what the server noised of class statistics, before it is told.

    Attributes:
        training: the state after the last round.
        patience: as given.
        traffic: site to bytes that it was sent, and that it sent.
        facts: site to what it is told with every question; changed between rounds only.
        missed: why rounds were void or could not be asked, of those in a row up to the last one.
    """

    def __init__(
        self,
        end: ServerEnd,
        training: ServerTraining,
        sites: Mapping[str, Sequence[int]],
        experiment: str,
        patience: Patience,
        save: Callable[[ServerTraining, ServerRecord | None, Mapping[str, str]], None],
        keep: Keep = drawn_anew,
    ) -> None:
        self._keep = keep
        self.training, self._end, self.patience, self._save = training, end, patience, save
        self._sites = {site: sorted(clients) for site, clients in sites.items()}
        self._site_of = {client: site for site, clients in self._sites.items() for client in clients}
        self._experiment = experiment
        self._round: Questions[Any] | None = None
        self._heard = Heard()
        self._lost: dict[str, str] = {}  # in this round
        self._unasked: set[str] = set()  # those that the pending question surely did not reach
        self.missed: list[str] = []
        # An earlier process may have asked for this one already, and sites may have answered it.
        self._first = training.round + 1
        self.traffic = dict.fromkeys(self._sites, (0, 0))
        self.facts: Mapping[str, Mapping[str, Any]] = {}

    def next(self) -> Ask | Done:
        """Return what to ask now, or that all rounds are over.

        Raises:
            RoundError: the release failed, or training diverged.
        """
        while self._round is None or self._round.pending is None:
            if self._round is not None:
                self._finish(self._round)
            if not self.goes_on():
                return Done(self.training)
            self._lost = {}
            self._round = Questions(self._started())
        self._heard, self._unasked = Heard(), set()
        payloads = self._by_site(self._round.pending)
        for site, payload in payloads.items():
            self._count(site, len(payload), 0)
        quorum = self.patience.of(len(payloads)) if self._released else len(payloads)
        return Ask(self.number, payloads, quorum, self.patience.deadline, self.patience.grace, self._short)

    def take(self, site: str, answer: bytes) -> None:
        """Hear a site's answer. One that is not what was agreed makes the site lost in this round."""
        asked = {client for client in self._pending if self._site_of[client] == site}
        self._count(site, 0, len(answer))
        try:
            envelope = Envelope.decode(answer)
            if envelope.kind == "refusal":
                raise MessageError(str(envelope.facts.get("reason", "it refused")))
            if envelope.experiment != self._experiment:
                raise MessageError(f"its answer is of experiment {envelope.experiment[:12]}")
            if strangers := sorted({*envelope.contents, *envelope.refused} - asked):
                raise MessageError(f"it answered for client {strangers[0]}, which is not its own, or was not asked")
        except MessageError as error:
            self.lost(site, str(error))
            return
        if not asked & self._heard.replies.keys():  # a second answer is not taken
            self._heard.replies |= envelope.contents
            self._heard.replies |= {client: Refusal(reason) for client, reason in envelope.refused.items()}
            if useful := self._useful(envelope.contents):
                self._heard.useful[site] = useful

    def lost(self, site: str, reason: str, asked: bool = True) -> None:
        """Hear that a site does not answer; `asked` as in `Lost`."""
        self._lost[site] = reason
        self._unasked |= set() if asked else {site}
        for client in self._pending:
            if self._site_of[client] == site and client not in self._heard.replies:
                self._heard.replies[client] = Refusal(reason)

    def close_round(self) -> None:
        """Go on with the answers that came. A round whose question reached nobody is as if it had not begun.

        Raises:
            RoundError: the release failed, or training diverged.
        """
        assert self._round is not None, "next() comes first"
        if self._reached_nobody and not self._by_turns:
            reasons = ", ".join(f"{site}: {reason}" for site, reason in sorted(self._lost.items()))
            self.stop()
            self.missed.append(f"the question of {self.name} reached nobody ({reasons})")
            return
        sampled = self._end.federation.mechanism.samples_clients
        unsent = self._reached_nobody and not sampled and self.number > self._first
        self._round.reply(sorted(self._heard.replies.items(), key=lambda reply: reply[0]))
        if self._round.pending is None:
            self._finish(self._round, unsent)

    def awaits(self, there: Collection[str]) -> list[str]:
        """Return the sites that the next round waits for; none if enough of its clients' sites are there.

        Sampled clients are drawn after it, and all are counted here. Else rounds would begin for some samples only, and
        how long one takes would tell who is in it.
        """
        if self._round is not None:
            return []
        sampled = self._end.federation.mechanism.samples_clients
        everyone = sampled or not self._released
        clients = sorted(self._site_of) if everyone else self._end.participants(self.number)
        needed = self.patience.of(len(clients)) if self._released else len(clients)
        if sum(self._site_of[client] in there for client in clients) >= min(needed, len(clients)):
            return []
        return sorted({self._site_of[client] for client in clients} - set(there)) if self.goes_on() else []

    def goes_on(self) -> bool:
        """Return whether there is another round, and a budget for it."""
        if self.training.round >= self._end.federation.rounds:
            return False
        return not self._released or self._end.within_budget(self.training)

    def goes_without(self, there: Collection[str]) -> bool:
        """Tell whether the next round is asked though too few of its sites are there, so that it will be void.

        Where others take part in the next one, a site that stays away must not stop all of them.
        """
        return self._by_turns and not self._sites.keys().isdisjoint(there)

    def _count(self, site: str, sent: int, received: int) -> None:
        before = self.traffic.get(site, (0, 0))
        self.traffic[site] = before[0] + sent, before[1] + received

    def stop(self) -> None:
        """Give up the round that waits for answers, if there is one; the state is that before it."""
        if self._round is not None:
            self._round.drop()
            self._round = None

    @property
    def number(self) -> int:
        """Return the number of the round that is asked next, or now."""
        return self.training.round + 1 if self._released else RELEASE_ROUND

    @property
    def name(self) -> str:
        """Return the same in words."""
        return f"round {self.number}" if self._released else "the release before the first round"

    @property
    def _by_turns(self) -> bool:
        """Return whether rounds differ in who takes part."""
        end = self._end
        sampled = end.federation.mechanism.samples_clients
        return self._released and (sampled or len(end.participants(self.number)) < end.federation.clients)

    @property
    def _reached_nobody(self) -> bool:
        """Return whether the round's first question surely reached none of its sites."""
        asked = {self._site_of[client] for client in self._pending}
        return self._round is not None and self._round.first and asked <= self._unasked

    @property
    def _released(self) -> bool:
        return self.training.released or not self._end.federation.mechanism.releases_statistics

    @property
    def _pending(self) -> Mapping[int, bytes]:
        return (self._round.pending if self._round else None) or {}

    def _started(self) -> Callable[[Link], Any]:
        end, training = self._end, self.training
        if not self._released:
            return lambda link: (end.release(training, link, self._keep), None)
        return lambda link: end.round(training, link, self.patience.of)

    def _finish(self, finished: Questions[Any], unsent: bool = False) -> None:
        """Save what a round made; one that was sent to nobody (`unsent`) is void, and charges nothing."""
        ledger, self._round = self.training.ledger, None
        self.training, record = finished.result()
        if unsent:
            self.training = replace(self.training, ledger=ledger)
        self._save(self.training, record, dict(self._lost))
        if record is not None:
            self.missed = [*self.missed, f"round {self.training.round} was void: {record.void}"] if record.void else []

    def _useful(self, contents: Mapping[int, bytes]) -> int:
        """Return how many of some clients' replies can be used.

        Uploads are read twice for it, so they are only where fewer than all are enough.
        """
        if self.patience.quorum == 1 or not self._released or self._round is None or not self._round.first:
            return len(contents)
        number = self.training.round + 1
        return len(read_uploads(self._end.federation, number, sorted(contents), contents).clients)

    def _short(self) -> bool:
        """Return whether replies that can be used came of too few sites, or clients, for the round."""
        clients, useful = len(self._pending), self._heard.useful
        sites = len({self._site_of[client] for client in self._pending})
        return len(useful) < self.patience.of(sites) or sum(useful.values()) < self.patience.of(clients)

    def _by_site(self, contents: Mapping[int, bytes]) -> dict[str, bytes]:
        grouped: dict[str, dict[int, bytes]] = {}
        for client, content in contents.items():
            grouped.setdefault(self._site_of[client], {})[client] = content
        return {
            site: Envelope("round", self._experiment, self.facts.get(site, {}), messages).encode()
            for site, messages in grouped.items()
        }


class LocalFleet:
    """Sites in this process, asked one after another.

    Args:
        sites: name to its turn, which takes a request and returns the answer.
    """

    def __init__(self, sites: Mapping[str, Callable[[bytes], bytes]]) -> None:
        self._sites = dict(sites)

    def sites(self) -> frozenset[str]:
        return frozenset(self._sites)

    def may_return(self) -> bool:
        return False

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        for site, payload in ask.payloads.items():
            if site not in self._sites:
                yield Lost(site, "it is not there", asked=False)
                continue
            try:
                answer = self._sites[site](payload)
            except SordinoError as error:
                yield Lost(site, str(error))
            else:
                yield Answer(site, answer)
