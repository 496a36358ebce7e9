"""A site's own ledger: what its data released in all experiments, and what that comes to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sordino.errors import RunError
from sordino.files import FREE_SPACE, write_atomically
from sordino.privacy.accounting import compose, spent
from sordino.privacy.ledger import OBSERVERS, Ledger, Release, Unit
from sordino.runtime import messages, turns
from sordino.runtime.facts import Federation

STAYS = ("prompt", "memory")  # channels that a site opens itself, by publishing, and no experiment does


@dataclass(frozen=True)
class Entry:
    """The releases of one experiment.

    Attributes:
        ledger: of the experiment.
        rounds: those that are in it, ascending; 0 is the release of statistics.
    """

    ledger: Ledger
    rounds: tuple[int, ...] = ()

    def with_rounds(self, numbers: Iterable[int], releases: Sequence[Release]) -> Entry:
        """Return it with the releases of each of some rounds; one is entered once, however often it is asked for."""
        new = set(numbers) - set(self.rounds)
        if not new:
            return self
        of_all = [replace(release, steps=release.steps * len(new)) for release in releases]
        return Entry(self.ledger.add(of_all), tuple(sorted((*self.rounds, *new))))


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
        ledger = cls(state / "ledger")
        for file in sorted((state / EXPERIMENTS).glob(f"*/{turns.FILE}")):
            experiment = file.parent.name
            with file.open("rb") as opened:
                number = messages.head_of(opened.read(8 + messages.HEADER_BYTES)).get("number")
            entry = ledger._entries.get(experiment)
            if entry is None or (number is not None and number not in entry.rounds):
                lacks = "is missing" if entry is None else f"lacks round {number}, which was answered"
                raise RunError(
                    f"{ledger.folder / f'{experiment}.json'} {lacks}; without it nobody knows what was spent, so put "
                    "the newest backup back"
                )
        return ledger

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
        document = {"rounds": list(entry.rounds), "ledger": json.loads(entry.ledger.to_json())}
        write_atomically(self.folder / f"{experiment}.json", json.dumps(document, indent=1).encode(), FREE_SPACE)
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
    left = [_left(ledger) for ledger in ledgers]
    if not left:
        return 0.0
    whole = compose(left)
    # An observer is trusted only where each experiment trusts it.
    trusted = set.intersection(*(set(ledger.trusted) for ledger in left))
    epsilons = [spent(whole, observer, unit, delta).epsilon for observer in OBSERVERS if observer not in trusted]
    return math.inf if any(ledger.simulated for ledger in left) else max(epsilons, default=0.0)


def _left(ledger: Ledger) -> Ledger:
    """Return a ledger without what only trusted observers see, and what stays until the site's owner publishes it."""
    trusted = set(ledger.trusted)
    left = (part for part in ledger.disclosures if part.channel not in STAYS and set(part.observers) - trusted)
    return replace(ledger, disclosures=tuple(left))


def _read(file: Path) -> Entry:
    try:
        document = json.loads(file.read_bytes())
        ledger = Ledger.from_json(json.dumps(document["ledger"]).encode())
        return Entry(ledger, tuple(int(number) for number in document["rounds"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} is damaged ({error}); without it nobody knows what was spent, so put a backup back"
        ) from None
