"""Epsilon of a ledger: the privacy loss of each party's units, by observer, over one run or several.

Every epsilon is for data sets that differ in one unit added or removed: an example, a person with all their images, or
a client with all it holds.
Samples are Poisson: every unit is in a sample independently of all others. `accountants` computes epsilon of a
composition and names its sources. `calibration` finds the noise that a target leaves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sordino.errors import RunError
from sordino.privacy.accountants import Accountant, Kinds, composed, kinds_epsilon, largest, merged, quick_epsilon
from sordino.privacy.calibration import check_delta, default_delta, noise_multiplier
from sordino.privacy.ledger import ALL_CLIENTS, OBSERVERS, UNITS, Ledger, Observer, Release, Unit

if TYPE_CHECKING:
    import dp_accounting

__all__ = [
    "Accountant",
    "Spent",
    "check_delta",
    "compose",
    "default_delta",
    "epsilon",
    "event",
    "formula_epsilon",
    "noise_multiplier",
    "quick_bound",
    "spent",
]


@dataclass(frozen=True)
class Spent:
    """Privacy loss of one unit to one observer: (epsilon, delta)-differential privacy against this observer.

    Attributes:
        observer: who saw the releases.
        unit: what neighboring data sets differ in.
        party: the party whose units are exposed most; None if the observer saw nothing.
        epsilon: of that party, by privacy loss distributions; math.inf where nothing is promised.
        epsilon_rdp: the largest of any party, by Renyi divergences.
        delta: the probability at which both hold; 0 where the ledger has none.
    """

    observer: Observer
    unit: Unit
    party: str | None
    epsilon: float
    epsilon_rdp: float
    delta: float


def event(releases: Iterable[Release]) -> dp_accounting.DpEvent:
    """Return the releases as an event of dp-accounting; print it to see the whole composition."""
    return composed((release.noise_multiplier, release.sampling_rate, release.steps) for release in releases)


def epsilon(releases: Iterable[Release], delta: float, accountant: Accountant = "pld") -> float:
    """Compute epsilon of all releases together, as if all were made of the same party's data.

    Args:
        releases: in any order.
        delta: the probability at which epsilon holds. At 0 or below, no finite epsilon holds for Gaussian noise.
        accountant: "pld" is tight. Where losses would not fit dp-accounting's grid of 1e-4, the grid is coarser and the
            result is an upper bound. If all sampling rates are 1 it is exact, below the grid's figure by some 1e-6
            under noise multipliers of thousands. "rdp" is what most papers report, a tenth larger.

    Returns:
        0.0 if nothing was released; math.inf if something was released without noise.
    """
    return kinds_epsilon(_kinds(releases), delta, accountant)


def spent(ledger: Ledger, observer: Observer, unit: Unit, delta: float | None = None, coarseness: float = 1.0) -> Spent:
    """Compute the privacy loss to an observer, of the party whose units are exposed most.

    Parties hold disjoint data. So a unit is exposed by its own party's releases and by those of ALL_CLIENTS (parallel
    composition).

    A release for a larger unit protects smaller ones too: a client-level release persons and examples, a person-level
    one examples. One example more or less may change the clipped contribution of its client, or of its person, into any
    other of the same norm, which is twice as far as adding it. So the release counts with half its noise multiplier,
    and without the sampling of units (by joint convexity, samples that are alike for both data sets can only help). If
    the example is all that its person has, the person is added or removed, which the release's own figures cover, and
    these are smaller.

    A release for a smaller unit bounds nothing about a larger one, which has many of it. So epsilon is math.inf if the
    observer saw one, and for every unit if it saw anything without noise. For unit "person" a
    client-level release counts so too if a person's images may be with several clients (`Ledger.whole_persons` is
    false), because the person then changes the contribution of each.

    Over several runs (`compose`), a unit may be with another party in each. If all runs hold a party's very data (by
    its digest), its releases in all of them add up. All other parties may share units with any party of another run,
    so the worst of each run add up. For persons this needs that they are whole in every run: then the images of one
    that two runs share are with one party in each.

    Args:
        ledger: of one run, or of several by `compose`.
        observer: who saw the releases.
        unit: what neighboring data sets differ in.
        delta: replaces the ledger's.
        coarseness: factor on the grid of privacy losses: larger ones take less time, and give a looser upper bound.
    """
    delta = (ledger.delta if delta is None else delta) or 0.0
    parties = _largest_named(_exposed(ledger, observer, unit))
    by_party = [(kinds_epsilon(kinds, delta, "pld", coarseness), party) for kinds, party in parties.items()]
    worst, party = max(by_party, key=lambda entry: entry[0], default=(0.0, None))
    worst_rdp = max((kinds_epsilon(kinds, delta, "rdp") for kinds in parties), default=0.0)
    return Spent(observer, unit, party, worst, worst_rdp, delta)


def quick_bound(ledger: Ledger, observer: Observer, unit: Unit, delta: float) -> float:
    """Return an upper bound on the epsilon of `spent`, in a fraction of its time; see `quick_epsilon`."""
    parties = _largest_named(_exposed(ledger, observer, unit))
    return max((quick_epsilon(kinds, delta) for kinds in parties), default=0.0)


def compose(ledgers: Sequence[Ledger]) -> Ledger:
    """Join the ledgers of several runs, on the same data or on others.

    Delta is the smallest of theirs. Randomness is "system" only if it was in all of them. An observer is trusted only
    if all of them trust it.

    Raises:
        RunError: one run is given twice.
    """
    runs = [ledger.run for ledger in ledgers if ledger.run]
    twice = next((run for run in runs if runs.count(run) > 1), None)
    if twice is not None:
        raise RunError(f"run {twice} is given {runs.count(twice)} times; give each run once: it was released once")
    total = Ledger()
    for ledger in ledgers:
        total = total.add(ledger.releases)
    deltas = [ledger.delta for ledger in ledgers if ledger.delta is not None]
    simulated = any(ledger.simulated for ledger in ledgers)
    return replace(
        total,
        whole_persons=bool(ledgers) and all(ledger.whole_persons for ledger in ledgers),
        disclosures=tuple(dict.fromkeys(entry for ledger in ledgers for entry in ledger.disclosures)),
        trusted=tuple(who for who in OBSERVERS if ledgers and all(who in ledger.trusted for ledger in ledgers)),
        assumptions=tuple(dict.fromkeys(entry for ledger in ledgers for entry in ledger.assumptions)),
        delta=min(deltas, default=None),
        randomness="simulation" if simulated else "system",
        parts=tuple(ledgers),
    )


def formula_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Compute sqrt(rounds log(1/delta)) / noise_multiplier, which public implementations of DP-FPL take for epsilon.

    It does not hold: a constant and the term rounds / (2 noise_multiplier^2) are missing, and it counts rounds, however
    many releases there are in one. It is here to be compared with `epsilon`, for nothing else.
    """
    return math.sqrt(rounds * -math.log(delta)) / noise_multiplier if noise_multiplier > 0 else math.inf


def _exposed(ledger: Ledger, observer: Observer, unit: Unit) -> dict[str, Kinds]:
    """Return the releases that an observer saw, by party, or by each choice of parties that may hold one unit."""
    if ledger.parts:
        # What a run lets an observer see whom it trusts is no loss of it, unless all runs trust that observer.
        untrusting = [part for part in ledger.parts if observer not in part.trusted]
        parts = _without_repetitions(untrusting or ledger.parts)
        return _over_data([(part, _exposed(part, observer, unit)) for part in parts])
    seen = [
        _for_unit(release, unit, ledger.whole_persons)
        for release in ledger.releases
        if observer in release.observers and release.steps > 0 and release.sampling_rate > 0
    ]
    # A disclosure counts as one release of everybody's data without noise.
    seen += [
        Release(disclosure.content, ALL_CLIENTS, unit, (0.0,), 1.0, 1, "client", disclosure.observers)
        for disclosure in ledger.disclosures
        if observer in disclosure.observers
    ]
    return {party: _kinds(releases) for party, releases in _by_party(seen).items()}


def _without_repetitions(parts: Sequence[Ledger]) -> list[Ledger]:
    """Return ledgers of several runs, a named release in the first run only whose ledger has it.

    It is one release of the same party's data, so runs that use it again tell nothing more.
    """
    seen: set[tuple[str, str, Observer]] = set()
    kept = []
    for part in parts:
        named = [release for release in part.releases if release.name]
        rest = tuple(
            release
            for release in part.releases
            if not release.name or any((release.name, release.party, who) not in seen for who in release.observers)
        )
        seen |= {(release.name, release.party, who) for release in named for who in release.observers}
        kept.append(replace(part, releases=rest))
    return kept


def _over_data(runs: Sequence[tuple[Ledger, dict[str, Kinds]]]) -> dict[str, Kinds]:
    """Join what was seen in several runs of parties that may hold the same units."""
    by_digest = [_by_digest(ledger, exposed) for ledger, exposed in runs]
    common = set(by_digest[0]).intersection(*by_digest[1:])
    joined: dict[str, Kinds] = {}
    for digest in sorted(common):
        seen = [exposed[parties[digest]] for parties, (_, exposed) in zip(by_digest, runs, strict=True)]
        joined[by_digest[0][digest]] = merged(kind for kinds in seen for kind in kinds)
    # Every other party of one run may hold units of any other party of the next: keep the worst of all choices.
    others: dict[str, Kinds] = {"": ()}
    for number, (parties, (_, exposed)) in enumerate(zip(by_digest, runs, strict=True), 1):
        matched = {parties[digest] for digest in common}
        rest = _largest_named({party: kinds for party, kinds in exposed.items() if party not in matched})
        choices = {
            f"{before}{', ' if before else ''}{party} of run {number}": merged((*so_far, *kinds))
            for before, so_far in others.items()
            for kinds, party in rest.items()
        }
        others = {name: kinds for kinds, name in _largest_named(choices or others).items()}
    return joined | {name: kinds for name, kinds in others.items() if kinds}


def _by_digest(ledger: Ledger, parties: Collection[str]) -> dict[str, str]:
    """Return the parties by the digest of their data, without those whose digest is not known, or not theirs alone."""
    digests = {party: ledger.digest_of(party) for party in parties}
    known = list(digests.values())
    return {digest: party for party, digest in digests.items() if digest and known.count(digest) == 1}


def _for_unit(release: Release, unit: Unit, whole_persons: bool) -> Release:
    """Return a release as it protects another unit than its own; see `spent`."""
    if release.unit == unit:
        return release
    divided = unit == "person" and not whole_persons
    if divided or UNITS.index(unit) > UNITS.index(release.unit):
        return replace(release, noise_multipliers=(0.0,))
    return replace(release, noise_multipliers=(release.noise_multiplier / 2,), sampling_rate=1.0)


def _by_party(releases: Sequence[Release]) -> dict[str, list[Release]]:
    """Return the releases that expose each party's units.

    ALL_CLIENTS is an entry only if no party has releases of its own.
    """
    named = dict.fromkeys(release.party for release in releases if release.party != ALL_CLIENTS)
    parties = named or dict.fromkeys(release.party for release in releases)
    return {party: _exposing(party, releases) for party in parties}


def _exposing(party: str, releases: Iterable[Release]) -> list[Release]:
    return [release for release in releases if release.party in (party, ALL_CLIENTS)]


def _kinds(releases: Iterable[Release]) -> Kinds:
    return merged((release.noise_multiplier, release.sampling_rate, release.steps) for release in releases)


def _largest_named(parties: Mapping[str, Kinds]) -> dict[Kinds, str]:
    """Return the kinds of the parties that can be worst off, each with its party; of equals, the first."""
    names = {kinds: name for name, kinds in reversed(list(parties.items()))}
    return {kinds: names[kinds] for kinds in largest(names)}
