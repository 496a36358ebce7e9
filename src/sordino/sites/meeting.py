"""The meeting of a coordinator and its sites: hello, differences, and the agreement; again for those who were late."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

import sordino
from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import model_of
from sordino.encoders.base import DualEncoder
from sordino.errors import RunError
from sordino.experiments.config import Experiment
from sordino.progress import log
from sordino.runtime.agreement import Agreement, federation_digest
from sordino.runtime.envelope import Envelope
from sordino.runtime.facts import Federation
from sordino.runtime.fleet import Answer, Ask, Fleet, Patience
from sordino.runtime.messages import MessageError
from sordino.sites.hello import Hello, names_digest
from sordino.sites.membership import ANSWERED, PROTOCOL
from sordino.sites.own_data import plan_of
from sordino.sites.proposal import Proposal

BEFORE = 0  # the number of the questions before the first round
POLL = 0.2  # seconds between two looks at who is there


@dataclass(frozen=True)
class Met:
    """The outcome of a meeting.

    Attributes:
        agreement: who takes part.
        federation: as the coordinator, and every site, computes it.
        class_names: the classes, in order.
        rounds: site to the last round that it answered; 0 before the first.
        data: "client k" to a digest of its data, which only its site can make.
        left_out: site to the reason why it takes no part, or is not there.
        tells_accuracy: the sites that will tell their clients' accuracies, which have no noise.
        silent: the agreement's sites that did not answer hello, or did not answer the agreement. Who refused is not
            among them.
    """

    agreement: Agreement
    federation: Federation
    class_names: tuple[str, ...]
    rounds: Mapping[str, int]
    data: Mapping[str, str]
    left_out: Mapping[str, str]
    tells_accuracy: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Begun:
    """The coordinator's knowledge of an experiment that goes on.

    Attributes:
        agreement: who takes part.
        data: "client k" to a digest of its data, as its site told it at first.
        answered: site to the last round that it is known to have answered.
    """

    agreement: Agreement
    data: Mapping[str, str]
    answered: Mapping[str, int]


@dataclass
class _Absent:
    """Who takes no part.

    Attributes:
        reasons: by site.
        silent: those of them that did not answer. The others refused, or differ.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Meeting:
    """A coordinator's side of the meeting.

    Attributes:
        config: of the experiment.
        proposal: of it.
        encoder: the coordinator's.
        fleet: the sites.
        patience: how long to wait, and for how many.
    """

    config: Experiment
    proposal: Proposal
    encoder: DualEncoder
    fleet: Fleet
    patience: Patience

    def meet(self, begun: Begun | None = None) -> Met:
        """Say hello to all sites, see that nothing differs, and have them agree.

        Args:
            begun: what is known of the experiment, when it goes on.

        Raises:
            RunError: fewer than a quorum take part; it names every site and why not.
        """
        agreed = begun.agreement if begun else None
        names = self._awaited() if agreed is None else sorted(agreed.sites)
        if not names:
            raise RunError("no site is there; start them, and see that they reach the server")
        # Whoever is late now takes no part at all, unless the experiment goes on: then it is asked again later.
        enough = len(names) if agreed is None else self.patience.of(len(names))
        absent = _Absent()
        here = self._greeted(names, replace(self._ask, quorum=enough), absent)
        classes = self._classes(here)
        self._compare(here, classes, begun, absent)
        self._need(here, names, absent)
        agreement = agreed or _agreement(here)
        federation = self._federation(agreement, classes, next(iter(here.values())))
        enough = len(here) if agreed is None else min(enough, len(here))
        known = begun or Begun(agreement, {}, {})
        rounds = self._agreed(here, known, federation, replace(self._ask, quorum=enough), absent)
        self._need(rounds, names, absent)
        data = {**known.data, **_data(agreement, here)}
        silent = frozenset(absent.silent & agreement.sites.keys())
        return Met(agreement, federation, classes, rounds, data, absent.reasons, _tell(here, rounds), silent)

    def again(self, met: Met, answered: Mapping[str, int], seconds: float) -> Met:
        """Say hello again to the sites that did not answer, and have them agree; return what holds then.

        Args:
            met: what held before.
            answered: site to the last round that it is known to have answered by now. This is what an old copy of a
                site's state is known by.
            seconds: how long it waits for their hellos, and again for their answers to the agreement.
        """
        ask = replace(self._ask, quorum=len(met.silent), deadline=seconds, grace=seconds)
        known, absent = Begun(met.agreement, met.data, answered), _Absent()
        here = self._greeted(sorted(met.silent), ask, absent)
        self._compare(here, met.class_names, known, absent)
        rounds = self._agreed(here, known, met.federation, replace(ask, quorum=len(here)), absent)
        before = {site: reason for site, reason in met.left_out.items() if site not in rounds}
        return replace(
            met,
            rounds={**met.rounds, **rounds},
            data={**met.data, **_data(met.agreement, {site: here[site] for site in rounds})},
            left_out=before | absent.reasons,
            tells_accuracy=met.tells_accuracy | _tell(here, rounds),
            silent=frozenset(absent.silent),
        )

    @property
    def _ask(self) -> Ask:
        """Return a question without messages that waits as long as the coordinator's patience says."""
        return Ask(BEFORE, {}, 0, self.patience.deadline, self.patience.grace)

    def _greeted(self, names: Sequence[str], ask: Ask, absent: _Absent) -> dict[str, Hello]:
        """Say hello to sites, and return what they tell."""
        proposed = Envelope("hello", self.proposal.fingerprint, self.proposal.facts)
        here: dict[str, Hello] = {}
        for site, envelope in sorted(self._asked(dict.fromkeys(names, proposed), ask, absent).items()):
            try:
                here[site] = Hello.read(envelope.facts, (sordino.__version__, PROTOCOL))
            except MessageError as error:
                absent.reasons[site] = str(error)
        return here

    def _compare(self, here: dict[str, Hello], classes: Sequence[str], begun: Begun | None, absent: _Absent) -> None:
        """Leave out the sites that differ."""
        for site, hello in list(here.items()):
            difference = self._difference(hello, classes)
            if begun is not None and not difference:
                difference = _changed(begun, site, hello)
            if difference:
                absent.reasons[site] = difference
                del here[site]

    def _agreed(
        self, here: Mapping[str, Hello], begun: Begun, federation: Federation, ask: Ask, absent: _Absent
    ) -> dict[str, int]:
        """Tell sites the agreement, and return the last round of each that computes the same from it."""
        facts, experiment = begun.agreement.facts, self.proposal.fingerprint
        told = {
            site: Envelope("agreement", experiment, facts | {ANSWERED: begun.answered.get(site, 0)})
            for site in sorted(here)
        }
        rounds: dict[str, int] = {}
        for site, envelope in self._asked(told, ask, absent).items():
            if envelope.facts.get("federation") != federation_digest(federation):
                absent.reasons[site] = "it computes another noise, or other messages, from what was agreed"
            else:
                last = envelope.facts.get("round")
                rounds[site] = last if isinstance(last, int) else 0
        return rounds

    def _awaited(self) -> list[str]:
        """Return the sites to ask: those expected, once they are there or the deadline is over; else those there."""
        if not self.patience.sites:
            return sorted(self.fleet.sites())
        patience = self.patience
        seconds = patience.deadline if patience.joining is None else patience.joining
        end = time.monotonic() + seconds
        while (missing := set(patience.sites) - self.fleet.sites()) and time.monotonic() < end:
            time.sleep(min(POLL, seconds))
        for site in sorted(missing):
            log.warning("%s is not there after %g s", site, seconds)
        return sorted(self.patience.sites)

    def _asked(self, messages: Mapping[str, Envelope], ask: Ask, absent: _Absent) -> dict[str, Envelope]:
        """Ask each site its own, and return the answers; note who did not answer or refused, with the reason of each.

        Once a quorum has answered, the others have the grace time.
        """
        answers: dict[str, Envelope] = {}
        if not messages:
            return answers
        payloads = {site: message.encode() for site, message in messages.items()}
        for event in self.fleet.ask(replace(ask, payloads=payloads, short=lambda: len(answers) < ask.quorum)):
            if not isinstance(event, Answer):
                absent.reasons[event.site] = event.reason
                absent.silent.add(event.site)
                continue
            try:
                envelope = Envelope.decode(event.content)
                if envelope.kind != messages[event.site].kind:
                    raise MessageError(str(envelope.facts.get("reason", f"it answered with a {envelope.kind}")))
                answers[event.site] = envelope
            except MessageError as error:
                absent.reasons[event.site] = str(error)
        return answers

    def _classes(self, here: Mapping[str, Hello]) -> tuple[str, ...]:
        """Return the classes: the experiment's, or those of the first site that tells its own."""
        told = next((hello.class_names for hello in here.values() if hello.class_names), [])
        names = self.proposal.class_names or tuple(told)
        if here and not names:
            raise RunError("no site tells the names of its classes; give them under fleet.class_names")
        return names

    def _difference(self, hello: Hello, classes: Sequence[str]) -> str:
        """Return the first difference of a site in words; nothing if there is none."""
        own = {"name": self.encoder.name, "fingerprint": self.encoder.fingerprint, "dtype": str(self.encoder.dtype)}
        for key, value in own.items():
            if (other := getattr(hello.encoder, key)) != value:
                return f"its encoder's {key} is {other!r}, and the coordinator's {value!r}"
        if hello.classes != names_digest(classes):
            return f"its classes are others{_told(hello.class_names, classes)}; set fleet.class_names to all"
        if hello.public:
            return "it uses public pictures, which experiments across machines do not support"
        return ""

    def _federation(self, agreement: Agreement, classes: Sequence[str], hello: Hello) -> Federation:
        name = self.config.algorithm
        settings, tokens = settings_for(name, self.config.settings), self.encoder.class_tokens(classes)
        model = model_of(algorithm(name), name, settings, self.encoder, tokens)
        example = torch.zeros(hello.example, device=self.encoder.device)
        return agreement.federation(plan_of(self.config, model, None, example))

    def _need(self, there: Collection[str], names: Sequence[str], absent: _Absent) -> None:
        if len(there) < self.patience.of(len(names)):
            reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(absent.reasons.items()))
            needed = self.patience.of(len(names))
            raise RunError(f"{len(there)} of {len(names)} sites take part, and {needed} are needed. {reasons}")


def _agreement(here: Mapping[str, Hello]) -> Agreement:
    """Number the sites' clients: as they say, where they hold parts of one partition, or by the sites' names.

    Raises:
        RunError: two sites say that they hold one client, or nobody holds one.
    """
    sites: dict[str, list[int]] = {}
    sizes: dict[int, int] = {}
    for site, hello in sorted(here.items()):
        numbers = hello.numbers or list(range(len(sizes), len(sizes) + len(hello.sizes)))
        if both := sorted(sizes.keys() & set(numbers)):
            raise RunError(f"client {both[0]} is at two sites, {site} and another; mend `clients` in their files")
        sites[site] = numbers
        sizes |= dict(zip(numbers, hello.sizes, strict=True))
    if missing := sorted(set(range(len(sizes))) - sizes.keys()):
        raise RunError(f"client {missing[0]} is at no site that takes part")
    whole = all(hello.whole_persons for hello in here.values())
    return Agreement(sites, [sizes[client] for client in range(len(sizes))], whole)


def _data(agreement: Agreement, here: Mapping[str, Hello]) -> dict[str, str]:
    """Return the digests of the clients' data, as their sites tell them."""
    return {
        f"client {client}": digest
        for site, hello in here.items()
        for client, digest in zip(sorted(agreement.sites[site]), hello.data, strict=True)
    }


def _tell(here: Mapping[str, Hello], rounds: Collection[str]) -> frozenset[str]:
    """Return those of the sites in rounds that tell accuracies."""
    return frozenset(site for site in rounds if here[site].accuracy)


def _changed(begun: Begun, site: str, hello: Hello) -> str:
    """Return in what a site is another one than when the experiment began; nothing if it is the same."""
    clients = sorted(begun.agreement.sites[site])
    before = [begun.agreement.sizes[client] for client in clients]
    if hello.sizes != before:
        return f"it holds {hello.sizes} now, and told {before} before"
    # A site without its state is another one: it does not know what it released, and has another key of digests.
    known = [begun.data.get(f"client {client}") for client in clients]
    if any(digest not in (None, now) for digest, now in zip(known, hello.data, strict=True)):
        return (
            "its data, or the key in its state, is not what it was when the experiment began; put its state back, and "
            "see that no other copy of the site runs"
        )
    return ""


def _told(theirs: Sequence[str] | None, classes: Sequence[str]) -> str:
    if theirs is None:
        return ""
    more, fewer = [name for name in theirs if name not in classes], [name for name in classes if name not in theirs]
    if not (more or fewer):
        return ": the same in another order"
    return f": it has {', '.join(map(repr, more)) or 'none'} besides, and lacks {', '.join(map(repr, fewer)) or 'none'}"
