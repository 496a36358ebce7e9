"""The guarantee of a ledger: epsilon by observer, and the statement in words."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sordino.errors import ConfigError, RunError, cause
from sordino.privacy import accounting
from sordino.privacy.accounting import Spent
from sordino.privacy.ledger import OBSERVERS, Ledger, Observer, Release, Unit
from sordino.results.summary import FILE as SUMMARY
from sordino.results.summary import MOST_PRIVATE_EPSILON
from sordino.results.wording import rounded_up

WHO: dict[Observer, str] = {
    "server": "the server",
    "clients": "the other clients",
    "public": "whoever is given a prompt",
}


NOISE_BY = {"client": "each client", "server": "the server", "shares": "all clients, a share each"}


def seen_by(ledger: Ledger, observer: Observer) -> list[str]:
    """Return what an observer sees, a line a kind: noised, and by whom, or not."""
    noised: dict[tuple[str, str], list[int]] = {}
    for release in ledger.releases:
        if observer in release.observers:
            noised.setdefault((release.content, release.noise_by), []).append(release.steps)
    lines = [
        f"{content}{f', {max(steps):,} times' if max(steps) > 1 else ''}; noise by {NOISE_BY[noise_by]}"
        for (content, noise_by), steps in noised.items()
    ]
    seen = [disclosure for disclosure in ledger.disclosures if observer in disclosure.observers]
    bare = [f"{disclosure.content}: no noise" for disclosure in seen]
    return [*lines, *bare] or ["nothing that was learned from images"]


def views(ledger: Ledger, unit: Unit) -> list[Spent]:
    """Return the privacy loss of one unit to each observer."""
    return [accounting.spent(ledger, observer, unit) for observer in OBSERVERS]


def headline(ledger: Ledger, unit: Unit) -> Spent | None:
    """Return the largest privacy loss to an untrusted observer; None if nothing was released with noise."""
    untrusted = [view for view in views(ledger, unit) if view.observer not in ledger.trusted]
    if not ledger.releases or not untrusted:
        return None
    return max(untrusted, key=lambda view: view.epsilon)


def is_private(ledger: Ledger, unit: Unit) -> bool:
    """Return true if a run may be called private: all is noised, and epsilon is one that says something."""
    return ledger.private and bounds(headline(ledger, unit))


def bounds(worst: Spent | None) -> bool:
    """Return true if the largest privacy loss is none, or at most `MOST_PRIVATE_EPSILON`."""
    return worst is None or worst.epsilon <= MOST_PRIVATE_EPSILON


def statement(ledger: Ledger, unit: Unit) -> str:
    """Return the guarantee in words: the protected unit and its epsilon, and everything left unprotected."""
    told = [each.content for part in ledger.parts or (ledger,) for each in part.told]
    leaks = "; ".join(dict.fromkeys(told or [each.content for each in ledger.disclosures]))
    worst = headline(ledger, unit)
    if worst is None:
        if ledger.private:
            return "Private: nothing that was learned from images was sent or published."
        return f"Not private: {leaks}. No noise was added and no epsilon holds."
    sentences = []
    if ledger.noised and bounds(worst):
        against = listed([WHO[observer] for observer in OBSERVERS if observer not in ledger.trusted])
        loss = f"epsilon = {rounded_up(worst.epsilon, 4)} at delta = {rounded_up(worst.delta, 2)}"
        claim = f"{loss} for each {unit}, against {against}"
        sentences.append(
            f"Simulated, not private: with noise from the operating system it would have {claim}."
            if ledger.simulated
            else f"Differentially private: {claim}."
        )
    elif ledger.noised and math.isfinite(worst.epsilon):
        least = f"epsilon is {worst.epsilon:.3g} for each {unit}, and nothing above {MOST_PRIVATE_EPSILON:g} is a bound"
        sentences.append(f"Not private: the noise is too small, as {least}.")
    elif ledger.noised:
        sentences.append(f"Not private: the noise that was added bounds nothing about each {unit}.")
    elif not leaks:
        sentences.append("Not private: contributions were clipped and sampled, but no noise was added.")
    else:
        sentences.append(f"Not private: {leaks}, without noise.")
    if ledger.trusted:
        seen = "; ".join(disclosure.content for disclosure in ledger.disclosures if "server" in disclosure.observers)
        sentences.append("The server is trusted" + (f": it sees {seen}." if seen else "."))
    elif trusting := [part for part in ledger.parts if part.trusted]:
        shown = [each.content for part in trusting for each in part.disclosures if "server" in each.observers]
        seen = "; ".join(dict.fromkeys(shown))
        where = f"In {len(trusting)} of the {len(ledger.parts)} runs the server is trusted"
        sentences.append(where + (f": there it sees {seen}." if seen else "."))
    if ledger.assumptions:
        sentences.append(f"Assumes that {listed(list(ledger.assumptions))}.")
    if ledger.simulated:
        sentences.append(
            "Noise and samples come from the seed and the run's nonce; whoever knows them can take them off."
        )
    return " ".join(sentences)


def as_summary(ledger: Ledger, unit: Unit) -> dict[str, Any]:
    """Return the `privacy` entry of a run's summary; a value that does not apply, or is infinite, is null."""
    worst = headline(ledger, unit)
    released = bool(ledger.releases)
    return {
        "private": ledger.private and bounds(worst),
        "simulated": ledger.simulated,
        "epsilon": _finite(worst.epsilon) if worst else 0.0 if ledger.private else None,
        "delta": ledger.delta,
        "unit": unit if released else None,
        "noise_multiplier": min((release.noise_multiplier for release in ledger.releases), default=None),
        "noise_by": sorted({release.noise_by for release in ledger.releases}),
        "trusted": list(ledger.trusted),
        "randomness": ledger.randomness if released else None,
        "observers": [
            {
                "observer": view.observer,
                "epsilon": _finite(view.epsilon),
                "epsilon_rdp": _finite(view.epsilon_rdp),
            }
            for view in (views(ledger, unit) if released else [])
        ],
        "statement": statement(ledger, unit),
        "ledger_digest": ledger.digest(),
    }


def read_ledgers(folders: Sequence[Path], delta: float | None = None) -> Ledger:
    """Read the ledgers of run directories, and compose them if there are several.

    A published ledger has no run's name and no digests of data. So it counts as a run of its own, and each of its
    clients may hold the data of any client of another run: the worst clients add up. If two of them are one run after
    all, the sum is too large, never too small.

    Raises:
        RunError: a directory has no ledger, or a damaged one, or another than its summary names; a run is given twice.
        ConfigError: delta is not a probability.
    """
    ledgers: list[Ledger] = []
    for folder in folders:
        try:
            text = (folder / "ledger.json").read_bytes()
        except OSError as error:
            raise RunError(f"{folder}: no ledger.json to read ({error.strerror}); give a run directory") from None
        ledgers.append(Ledger.from_json(text, folder / "ledger.json"))
        named = _named_digest(folder / SUMMARY)
        if named and named != hashlib.sha256(text).hexdigest():
            raise RunError(
                f"{folder}: ledger.json is not the one that {SUMMARY} was written with, so nobody knows what was "
                "spent; put it back, or finish the run with --resume"
            )
        here, latest = folder.resolve(), ledgers[-1].run
        for place, earlier in zip(folders, ledgers[:-1], strict=False):
            if place.resolve() == here or (latest and earlier.run == latest):
                raise RunError(f"{folder} is the same run as {place}; its releases happened once, so give it once")
    ledger = ledgers[0] if len(ledgers) == 1 else accounting.compose([_by_itself(each) for each in ledgers])
    if delta is None:
        return ledger
    if not 0 < delta < 1:
        raise ConfigError("--delta", delta, "must be between 0 and 1, and below one over the number of units")
    accounting.check_delta(delta, max((_units(folder / SUMMARY, ledger) for folder in folders), default=1), "--delta")
    return replace(ledger, delta=delta)


def _by_itself(ledger: Ledger) -> Ledger:
    """Return a ledger of an unknown run without the names of its releases, by which another run could share them."""
    if ledger.run:
        return ledger
    return replace(ledger, releases=tuple(replace(release, name="") for release in ledger.releases))


def _units(summary: Path, ledger: Ledger) -> int:
    """Return how many of a ledger's units a finished run had, as far as its summary tells it; else 1."""
    if not summary.exists():
        return 1
    clients, units = json.loads(summary.read_bytes()).get("per_client", ()), {each.unit for each in ledger.releases}
    examples = sum(client.get("examples") or 0 for client in clients)
    return max(1, len(clients) if "client" in units else 0, examples if "example" in units else 0)


def _named_digest(summary: Path) -> str:
    """Return the digest of the ledger that a summary was written with; "" if a run has none yet, or is unfinished.

    Raises:
        RunError: the summary is damaged.
    """
    if not summary.exists():
        return ""
    try:
        return str(json.loads(summary.read_bytes())["privacy"].get("ledger_digest", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{summary} is damaged ({cause(error)}); put it back, or finish the run with --resume") from None


def spending(ledger: Ledger) -> dict[str, Any]:
    """Return a ledger's content with its privacy losses by unit and observer; an infinite value is null."""
    units = list(dict.fromkeys(release.unit for release in ledger.releases)) or ["example"]
    content: dict[str, Any] = json.loads(ledger.for_others().to_json())
    for empty in ("data", "run", "parts"):
        del content[empty]
    return content | {
        "private": all(is_private(ledger, unit) for unit in units),
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
    """Return a ledger for a terminal: its releases, a line a kind, and each observer's epsilon."""
    lines = ["Released with noise:"]
    kinds: dict[Release, list[Release]] = {}
    for release in ledger.releases:
        kind = replace(release, party="", steps=0, sampling_rate=1.0, noise_multipliers=())
        kinds.setdefault(kind, []).append(release)
    for kind, releases in kinds.items():
        parties = counted(len(releases), "party", "parties")
        steps = _range([release.steps for release in releases])
        multiplier = _range([release.noise_multiplier for release in releases])
        rate = _range([release.sampling_rate for release in releases])
        lines.append(
            f"  {kind.content} ({parties}, unit {kind.unit}, noise by {kind.noise_by}, "
            f"seen by {listed(kind.observers)}):\n    {steps} times, noise multiplier {multiplier}, "
            f"sampling rate {rate}"
        )
    lines += [] if kinds else ["  nothing"]
    lines += ["Disclosed without noise:"]
    lines += [
        f"  {disclosure.content} (seen by {listed(disclosure.observers)})" for disclosure in ledger.disclosures
    ] or ["  nothing"]
    content = spending(ledger)
    at = f" (delta {rounded_up(ledger.delta, 2)})" if ledger.delta else ""
    lines.append(f"What each observer learned{at}:")
    for view in content["spent"]:
        losses = (view["epsilon"], view["epsilon_rdp"])
        pld, rdp = ("unbounded" if loss is None else rounded_up(loss, 6) for loss in losses)
        observer = WHO[view["observer"]] + (" (trusted)" if view["trusted"] else "")
        about = f", most about {view['party']}" if view["party"] else ""
        lines.append(f"  {observer}: epsilon {pld} for each {view['unit']}{about} (by RDP {rdp})")
    return "\n".join([*lines, content["statement"]])


def counted(number: int, singular: str, plural: str) -> str:
    """Return a number with its noun: `1 party`, `3 parties`."""
    return f"{number:,} {singular if number == 1 else plural}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: `a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
