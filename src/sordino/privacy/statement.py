"""What a ledger means: epsilon by observer, and the guarantee in words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sordino.errors import ConfigError, RunError
from sordino.privacy import accounting
from sordino.privacy.accounting import Spent
from sordino.privacy.ledger import OBSERVERS, Ledger, Observer, Release, Unit

WHO: dict[Observer, str] = {
    "server": "the server",
    "clients": "the other clients",
    "public": "whoever is given a prompt",
}


def views(ledger: Ledger, unit: Unit) -> list[Spent]:
    """What each observer learned about one unit."""
    return [accounting.spent(ledger, observer, unit) for observer in OBSERVERS]


def headline(ledger: Ledger, unit: Unit) -> Spent | None:
    """What the worst untrusted observer learned; None where nothing was released with noise."""
    untrusted = [view for view in views(ledger, unit) if view.observer not in ledger.trusted]
    if not ledger.releases or not untrusted:
        return None
    return max(untrusted, key=lambda view: view.epsilon)


def statement(ledger: Ledger, unit: Unit) -> str:
    """What is protected and what is not, in words."""
    leaks = "; ".join(each.content for each in ledger.disclosures)
    worst = headline(ledger, unit)
    if worst is None:
        if ledger.private:
            return "Private: nothing that was learned from images was sent or published."
        return f"Not private: {leaks}. No noise was added and no epsilon holds."
    sentences = []
    if ledger.noised and math.isfinite(worst.epsilon):
        against = listed([WHO[observer] for observer in OBSERVERS if observer not in ledger.trusted])
        claim = f"epsilon = {worst.epsilon:.4g} at delta = {worst.delta:.2g} for each {unit}, against {against}"
        sentences.append(
            f"Simulated, not private: with noise from the operating system it would have {claim}."
            if ledger.simulated
            else f"Differentially private: {claim}."
        )
    elif ledger.noised or not leaks:
        sentences.append("Not private: contributions were clipped and sampled, but no noise was added.")
    else:
        sentences.append(f"Not private: {leaks}, without noise.")
    if ledger.trusted:
        seen = "; ".join(each.content for each in ledger.disclosures if "server" in each.observers)
        sentences.append("The server is trusted" + (f": it sees {seen}." if seen else "."))
    if ledger.assumptions:
        sentences.append(f"Assumes that {listed(list(ledger.assumptions))}.")
    if ledger.simulated:
        sentences.append(
            "Noise and samples come from the seed and the run's nonce; whoever knows them can take them off."
        )
    return " ".join(sentences)


def as_summary(ledger: Ledger, unit: Unit) -> dict[str, Any]:
    """The `privacy` entry of a run's summary; what does not apply, or is infinite, is null."""
    worst = headline(ledger, unit)
    released = bool(ledger.releases)
    return {
        "private": ledger.private,
        "simulated": ledger.simulated,
        "epsilon": _finite(worst.epsilon) if worst else 0.0 if ledger.private else None,
        "delta": ledger.delta,
        "unit": unit if released else None,
        "noise_multiplier": min((each.noise_multiplier for each in ledger.releases), default=None),
        "noise_by": sorted({each.noise_by for each in ledger.releases}),
        "trusted": list(ledger.trusted),
        "randomness": ledger.randomness if released else None,
        "observers": [
            {"observer": view.observer, "epsilon": _finite(view.epsilon), "epsilon_rdp": _finite(view.epsilon_rdp)}
            for view in (views(ledger, unit) if released else [])
        ],
        "statement": statement(ledger, unit),
        "ledger_digest": ledger.digest(),
    }


def read_ledgers(folders: Sequence[Path], delta: float | None = None) -> Ledger:
    """The ledgers of run directories, composed where there are several.

    Raises:
        RunError: a directory has no ledger, or a damaged one; a run is given twice.
        ConfigError: delta is not a probability.
    """
    ledgers: list[Ledger] = []
    for folder in folders:
        try:
            ledgers.append(Ledger.from_json((folder / "ledger.json").read_bytes()))
        except OSError as error:
            raise RunError(f"{folder}: no ledger.json to read ({error.strerror}); give a run directory") from None
        twice = next((place for place, each in enumerate(ledgers[:-1]) if each.run == ledgers[-1].run), None)
        if twice is not None:
            raise RunError(f"{folder} is the same run as {folders[twice]}; its releases happened once, so give it once")
    ledger = ledgers[0] if len(ledgers) == 1 else accounting.compose(ledgers)
    if delta is None:
        return ledger
    if not 0 < delta < 1:
        raise ConfigError("--delta", delta, "must be between 0 and 1, and below one over the number of units")
    return replace(ledger, delta=delta)


def spending(ledger: Ledger) -> dict[str, Any]:
    """A ledger with what it comes to, by unit and observer; what is infinite is null."""
    units = list(dict.fromkeys(each.unit for each in ledger.releases)) or ["example"]
    content: dict[str, Any] = json.loads(ledger.to_json())
    del content["data"]  # digests would confirm a guess of somebody's data to whoever reads this
    return content | {
        "spent": [
            {
                "unit": unit,
                "observer": view.observer,
                "trusted": view.observer in ledger.trusted,
                "party": view.party,
                "epsilon": _finite(view.epsilon),
                "epsilon_rdp": _finite(view.epsilon_rdp),
                "delta": view.delta,
            }
            for unit in units
            for view in views(ledger, unit)
        ],
        "statement": statement(ledger, units[0]),
    }


def as_text(ledger: Ledger) -> str:
    """A ledger for a terminal: what was released, a line a kind, and what it comes to."""
    lines = ["Released with noise:"]
    kinds: dict[Release, list[Release]] = {}
    for each in ledger.releases:
        kinds.setdefault(replace(each, party="", steps=0, sampling_rate=1.0, noise_multipliers=()), []).append(each)
    for kind, same in kinds.items():
        lines.append(
            f"  {kind.content} ({counted(len(same), 'party', 'parties')}, unit {kind.unit}, noise by {kind.noise_by}, "
            f"seen by {listed(kind.observers)}):\n    {_range([x.steps for x in same])} times, noise multiplier "
            f"{_range([x.noise_multiplier for x in same])}, sampling rate {_range([x.sampling_rate for x in same])}"
        )
    lines += [] if kinds else ["  nothing"]
    lines += ["Disclosed without noise:"]
    lines += [f"  {each.content} (seen by {listed(each.observers)})" for each in ledger.disclosures] or ["  nothing"]
    content = spending(ledger)
    lines += [
        f"What each observer learned (delta {ledger.delta:.2g}):" if ledger.delta else "What each observer learned:"
    ]
    for each in content["spent"]:
        pld, rdp = ("unbounded" if each[name] is None else f"{each[name]:.6g}" for name in ("epsilon", "epsilon_rdp"))
        trusted = " (trusted)" if each["trusted"] else ""
        about = f", most about {each['party']}" if each["party"] else ""
        lines.append(f"  {WHO[each['observer']]}{trusted}: epsilon {pld} for each {each['unit']}{about} (by RDP {rdp})")
    return "\n".join([*lines, content["statement"]])


def counted(number: int, singular: str, plural: str) -> str:
    """`1 party`, `3 parties`."""
    return f"{number:,} {singular if number == 1 else plural}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
