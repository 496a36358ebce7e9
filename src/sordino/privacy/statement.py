"""What a ledger means: epsilon by observer, and the guarantee in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sordino.privacy import accounting
from sordino.privacy.accounting import Spent
from sordino.privacy.ledger import OBSERVERS, Ledger, Observer, Unit

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
    if ledger.private and math.isfinite(worst.epsilon):
        against = listed([WHO[observer] for observer in OBSERVERS if observer not in ledger.trusted])
        sentences.append(
            f"Differentially private: epsilon = {worst.epsilon:.4g} at delta = {worst.delta:.2g} for each {unit}, "
            f"against {against}."
        )
    elif ledger.private or not leaks:
        sentences.append("Not private: contributions were clipped and sampled, but no noise was added.")
    else:
        sentences.append(f"Not private: {leaks}, without noise.")
    if ledger.trusted:
        seen = "; ".join(each.content for each in ledger.disclosures if "server" in each.observers)
        sentences.append("The server is trusted" + (f": it sees {seen}." if seen else "."))
    if ledger.assumptions:
        sentences.append(f"Assumes that {listed(list(ledger.assumptions))}.")
    if ledger.randomness == "seed":
        sentences.append("Noise and samples come from the seed; whoever knows it can take them off.")
    return " ".join(sentences)


def as_summary(ledger: Ledger, unit: Unit) -> dict[str, Any]:
    """The `privacy` entry of a run's summary; what does not apply, or is infinite, is null."""
    worst = headline(ledger, unit)
    released = bool(ledger.releases)
    return {
        "private": ledger.private,
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
