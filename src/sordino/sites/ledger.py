"""A site's own ledger: what its data released in all experiments, and what that comes to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sordino.errors import RunError
from sordino.files import write_private
from sordino.privacy.accounting import compose, spent
from sordino.privacy.ledger import OBSERVERS, Ledger, Release, Unit
from sordino.runtime import messages, turns
from sordino.runtime.facts import Federation

STAYS = ("prompt", "memory")  # channels that a site opens itself, by publishing, and no experiment does


@dataclass(frozen=True)
class Entry:
    """The releases of one experiment.

    A round may be asked for twice, of other clients, where the first answer was entered and never left. So what was
    entered is known by round and release, which names its party.

    Attributes:
        ledger: of the experiment.
        rounds: those in which something is entered of some client, ascending; 0 is the release of statistics.
        entered: kind of release, which has no steps, to the rounds in which it is entered. Kinds that a file of an
            earlier version has are absent.
    """

    ledger: Ledger
    rounds: tuple[int, ...] = ()
    entered: Mapping[Release, frozenset[int]] = field(default_factory=dict)

    def with_rounds(self, numbers: Iterable[int], releases: Sequence[Release]) -> Entry:
        """Return it with the releases of each of some rounds; one is entered once, however often it is asked for."""
        asked, entered = frozenset(numbers), dict(self.entered)
        added = []
        for release in Ledger().add(releases).releases:  # equal kinds are one, with their steps added
            before = self._rounds_with(release)
            entered[_kind(release)] = before | asked
            if new := asked - before:
                added.append(replace(release, steps=release.steps * len(new)))
        return Entry(self.ledger.add(added), tuple(sorted({*self.rounds, *asked})), entered)

    def _rounds_with(self, release: Release) -> frozenset[int]:
        """Return the rounds in which a release is entered.

        A file of an earlier version does not say. If its steps are those of all rounds, it is in all. Else it may be
        in any, and counts as in none: nothing is entered too little.
        """
        kind = _kind(release)
        if kind in self.entered:
            return self.entered[kind]
        steps = sum(each.steps for each in self.ledger.releases if _kind(each) == kind)
        return frozenset(self.rounds) if steps == release.steps * len(self.rounds) else frozenset()

    def to_json(self) -> str:
        """Return the content of its file. For each release it has the rounds; null: all, none: unknown."""
        every, entered = frozenset(self.rounds), [self.entered.get(_kind(each), ()) for each in self.ledger.releases]
        document = {
            "rounds": list(self.rounds),
            "entered": [None if every == rounds else sorted(rounds) for rounds in entered],
            "ledger": json.loads(self.ledger.to_json()),
        }
        return json.dumps(document, indent=1)

    @classmethod
    def from_json(cls, text: bytes, source: Path | None = None) -> Entry:
        """Return the entry that `to_json` wrote, in this version or an earlier one.

        Raises:
            RunError, ValueError, KeyError, TypeError: the text is no such file's.
        """
        document = json.loads(text)
        ledger = Ledger.from_json(json.dumps(document["ledger"]).encode(), source, BACKUP)
        rounds = tuple(int(number) for number in document["rounds"])
        found = document.get("entered", [[]] * len(ledger.releases))
        pairs = zip(ledger.releases, found, strict=True)
        entered = {_kind(each): frozenset(rounds if some is None else map(int, some)) for each, some in pairs}
        return cls(ledger, rounds, {kind: some for kind, some in entered.items() if some})


def _kind(release: Release) -> Release:
    """Return a release without its steps, as the ledger tells kinds apart."""
    return replace(release, steps=0)


BACKUP = "without it nobody knows what was spent, so put a backup back"
EXPERIMENTS = "experiments"  # the folder of a site's state with a folder for each: its answers


@dataclass
class SiteLedger:
    """The ledgers of all experiments that a site took part in; each is a file.

    Attributes:
        folder: of the files.
    """

    folder: Path
    _entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in sorted(self.folder.glob("*.json")):
            self._entries[file.stem] = _read(file)

    @classmethod
    def of_state(cls, state: Path) -> SiteLedger:
        """Read the ledgers in a site's state, and check that none lacks a round that this site answered.

        A round is entered before its answer is kept. So where there is an answer and no entry, a file was lost, or
        an old one was put back, and what is left would say that less was spent.

        Raises:
            RunError: a ledger is damaged, missing or too old.
        """
        # Another process may answer meanwhile: what is answered by now is in every ledger that is read from now on.
        answered = {}
        for file in sorted((state / EXPERIMENTS).glob(f"*/{turns.FILE}")):
            with file.open("rb") as opened:
                head = messages.head_of(opened.read(8 + messages.HEADER_BYTES))
            answered[file.parent.name] = head.get("number")
        ledger = cls(state / "ledger")
        for experiment, number in answered.items():
            entry = ledger._entries.get(experiment)
            if entry is None or (number is not None and number not in entry.rounds):
                lacks = "is missing" if entry is None else f"lacks round {number}, which was answered"
                raise RunError(
                    f"{ledger.folder / f'{experiment}.json'} {lacks}; without it nobody knows what was spent, so put "
                    "the newest backup back"
                )
        return ledger

    def renew(self) -> None:
        """Read the ledgers again, as another process of the site may have entered more.

        Raises:
            RunError: a ledger is damaged, missing or too old; what was read before stays.
        """
        self._entries = SiteLedger.of_state(self.folder.parent)._entries

    @property
    def experiments(self) -> Mapping[str, Entry]:
        """Return what each experiment released, by its fingerprint."""
        return dict(self._entries)

    def entry(self, experiment: str, empty: Ledger) -> Entry:
        """Return what an experiment released so far; `empty` is its ledger before any release.

        A site may tell more from now on than it did as the experiment was entered, so what `empty` discloses is added.
        """
        if (entry := self._entries.get(experiment)) is None:
            return Entry(replace(empty, run=experiment))
        disclosures = tuple(dict.fromkeys((*entry.ledger.disclosures, *empty.disclosures)))
        return replace(entry, ledger=replace(entry.ledger, disclosures=disclosures))

    def charge(self, experiment: str, empty: Ledger, numbers: Iterable[int], releases: Sequence[Release]) -> None:
        """Enter what each of some rounds releases, on the disk, before it leaves.

        Raises:
            RunError: it cannot be written; nothing is entered.
        """
        self._enter(experiment, self.entry(experiment, empty).with_rounds(numbers, releases))

    def open(self, experiment: str, empty: Ledger) -> None:
        """Enter an experiment, on the disk, before anything leaves that is no round's; `empty` says what does.

        Raises:
            RunError: it cannot be written; nothing is entered.
        """
        if (entry := self.entry(experiment, empty)) != self._entries.get(experiment):
            self._enter(experiment, entry)

    def _enter(self, experiment: str, entry: Entry) -> None:
        write_private(self.folder / f"{experiment}.json", entry.to_json().encode())
        self._entries[experiment] = entry

    def spent_in(self, experiment: str, unit: Unit, delta: float) -> float:
        """Return epsilon of one experiment alone; see `spent`."""
        return epsilon_of([self._entries[experiment].ledger], unit, delta)

    def spent(self, unit: Unit, delta: float, more: Mapping[str, Ledger] | None = None) -> float:
        """Return epsilon of all experiments together, to the untrusted observer who learned most.

        What a site's owner publishes is not in it.

        Args:
            unit: what neighboring data sets differ in.
            delta: at which epsilon is stated.
            more: ledgers by experiment, that replace what these released so far.
        """
        ledgers = {name: entry.ledger for name, entry in self._entries.items()} | dict(more or {})
        return epsilon_of(list(ledgers.values()), unit, delta)


def charged_on_joining(federation: Federation) -> Sequence[int]:
    """Return the rounds that are entered in a site's ledger as it joins an experiment, before any is run.

    Where the server samples clients, a site is asked in a part of the rounds only, and a sampling rate below 1 says
    just that. To enter the rounds in which it was asked alone would take the same thing off twice. It does not see the
    others, so all rounds are entered, of an experiment too in which it is never asked.
    """
    return range(1, federation.rounds + 1) if federation.mechanism.samples_clients else ()


def epsilon_of(ledgers: Sequence[Ledger], unit: Unit, delta: float) -> float:
    """Return epsilon of several experiments together; see `SiteLedger.spent`."""
    seen = [left(ledger) for ledger in ledgers]
    if not seen:
        return 0.0
    whole = compose(seen)
    # An observer is trusted only where each experiment trusts it.
    trusted = set.intersection(*(set(ledger.trusted) for ledger in seen))
    epsilons = [spent(whole, observer, unit, delta).epsilon for observer in OBSERVERS if observer not in trusted]
    return math.inf if any(ledger.simulated for ledger in seen) else max(epsilons, default=0.0)


def releases_of(releases: Sequence[Release], clients: Sequence[int]) -> list[Release]:
    """Return the releases of some clients, and those of all together."""
    parties = {f"client {client}" for client in clients}
    return [release for release in releases if release.party in parties or not release.party.startswith("client ")]


def left(ledger: Ledger) -> Ledger:
    """Return a ledger without what only trusted observers see, and what stays until the site's owner publishes it."""
    trusted = set(ledger.trusted)
    told = (part for part in ledger.disclosures if part.channel not in STAYS and set(part.observers) - trusted)
    return replace(ledger, disclosures=tuple(told))


def _read(file: Path) -> Entry:
    try:
        return Entry.from_json(file.read_bytes(), file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged ({error}); {BACKUP}") from None
