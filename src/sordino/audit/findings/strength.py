"""The strength of an audit: what it could have shown at most, and what it would take to contradict a claim.

An attack that found nothing says little if it could not have found much. The canaries' bound has a ceiling, which an
attack reaches that is right about every canary; so has that of pairs. A ceiling below the claim cannot contradict it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sordino.audit.findings.words import ATTACKS, result_words
from sordino.audit.one_run import CONFIDENCE
from sordino.audit.scores import DELTA, claimed
from sordino.audit.statistics import canaries_to_contradict, most_shown
from sordino.errors import RunError, cause
from sordino.privacy.ledger import Ledger, Unit
from sordino.report.document import Block
from sordino.results import rounded_up

VIEWS = 2  # of the canaries' audit, whose bounds hold together
MEMBERSHIP_ATTACKS = 4  # whose bounds hold together

TITLES = {
    "membership": "Membership: was a picture trained on? From the prompts",
    "release": "Membership, from released class statistics",
    "rounds": "Membership, by the server, from the uploads of all rounds",
    "canaries": "Canaries: was an example planted? From all releases",
    "inversion": "Inversion: what was in an upload?",
    "stealing": "Stealing: a copy of a personal prompt",
    "distances": "Prompts from the distances that clustering opens",
    "extraction": "Stealing through a service: a copy made of its answers",
    "label-only": "Membership, from a service's answers alone",
}


def judge(audit: Mapping[str, Any] | None, ledger: Ledger, unit: Unit) -> tuple[dict[str, Any], list[Block], bool]:
    """Say what was attacked, what was found, and how strong that is.

    Args:
        audit: the content of `audit.json`; None if the run was not attacked.
        ledger: of the run.
        unit: of its promise.

    Returns:
        Plain data; the same in words; and whether an attack contradicts the claim.

    Raises:
        RunError: the audit's content is damaged.
    """
    try:
        return _judged(audit, ledger, unit)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise RunError(
            f"audit.json is damaged, or of another version ({cause(error)}); repeat 'sordino audit'"
        ) from None


def _judged(audit: Mapping[str, Any] | None, ledger: Ledger, unit: Unit) -> tuple[dict[str, Any], list[Block], bool]:
    attacks: Mapping[str, Any] = {} if audit is None else audit["attacks"]
    made = {name: attacks[name] for name in ATTACKS if name in attacks}
    applied = [name for name, result in made.items() if not result.get("reason")]
    refuted = any(_refutes(made[name]) for name in applied)
    canaries = _canaries(made.get("canaries", {}), ledger, unit)
    pairs = _pairs(made.get("membership", {}))
    found = {name: result_words(name, result) for name, result in made.items()}
    data = {"audited": bool(applied), "attacks": found, "refuted": refuted, "canaries": canaries, "pairs": pairs}
    blocks: list[Block] = []
    if not applied:
        why = "no attack applies to this run" if made else "no attack on this run was tried"
        blocks.append({"warning": f"Not audited: {why}. The bounds rest on the proof and its implementation alone."})
    if made:
        rows = [[TITLES[name], "\n".join(lines)] for name, lines in found.items()]
        caption = (
            "Attacks on this run. One that finds nothing proves nothing; one that succeeds does. AUC: 0.5 is guessing, "
            "1 is always right. Found: the share of trained pictures that is recognized at that share of false alarms. "
            "Epsilon is at least: shown by the attack, at 95% confidence."
        )
        blocks.append({"table": {"caption": caption, "head": ["Attack", "Found"], "rows": rows}})
    if refuted:
        blocks.append({"warning": "An attack shows a larger epsilon than is claimed: the claim is false."})
    blocks += [{"text": text} for text in (_canaries_words(canaries), _pairs_words(pairs)) if text]
    return data, blocks, refuted


def _refutes(result: Mapping[str, Any]) -> bool:
    parts = [result, *(part for part in result.values() if isinstance(part, dict))]
    return any(part.get("refuted") is True for part in parts)


def _canaries(result: Mapping[str, Any], ledger: Ledger, unit: Unit) -> dict[str, Any] | None:
    """Return what canaries could show and would need; None where they do not apply, or where there is no claim."""
    if unit != "example" or not ledger.releases:
        return None
    delta = DELTA if ledger.delta is None else min(ledger.delta, DELTA)
    planted, epsilon = None, claimed(ledger, delta)
    if "canaries" in result:
        planted, epsilon, delta = int(result["canaries"]), result["claimed_epsilon"], float(result["delta"])
    if epsilon is None:
        return None
    confidence = 1 - (1 - CONFIDENCE) / VIEWS
    return {
        "claimed_epsilon": epsilon,
        "delta": delta,
        "confidence": CONFIDENCE,
        "planted": planted,
        "most_shown": most_shown(planted, delta, confidence) if planted else None,
        "needed": canaries_to_contradict(epsilon, delta, confidence),
    }


def _pairs(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what pairs of the membership attacks would need at least; None where there is no bound or no claim."""
    if "members" not in result or result["claimed_epsilon"] is None or result["lira"].get("epsilon") is None:
        return None
    epsilon, delta = float(result["claimed_epsilon"]), float(result["delta"])
    confidence = 1 - (1 - CONFIDENCE) / MEMBERSHIP_ATTACKS
    # A replaced example is one removed and one added; see `pair_epsilon`, whose bound is this one or less.
    replaced = min(1.0, delta * (1 + math.exp(min(epsilon, 700))))
    return {
        "claimed_epsilon": epsilon,
        "delta": delta,
        "confidence": CONFIDENCE,
        "pairs": int(result["members"]),
        "shadows": int(result["shadows"]),
        "needed": canaries_to_contradict(2 * epsilon, replaced, confidence),
    }


def _canaries_words(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    planted, needed, most = found["planted"], found["needed"], found["most_shown"]
    claim = f"ε = {rounded_up(found['claimed_epsilon'])} at δ = {rounded_up(found['delta'])}"
    text = ""
    if planted is not None:
        text = (
            f"Strength: with {planted:,} canaries the bound could have been {rounded_up(most)} at most, even with "
            f"every guess right; the claim for that training is {claim}. "
        )
    if needed is None:
        return f"{text}No number of canaries can contradict {claim}: what δ allows hides it."
    return f"{text}To contradict {claim} at {found['confidence']:.0%} confidence takes {needed:,} canaries or more."


def _pairs_words(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    had = f"Strength of membership: {found['pairs']:,} pairs of pictures, {found['shadows']:,} shadow federations. "
    claim = f"ε = {rounded_up(found['claimed_epsilon'])} at δ = {rounded_up(found['delta'])}"
    if found["needed"] is None:
        return f"{had}No number of pairs, and so of shadows, can contradict {claim}."
    return (
        f"{had}To contradict {claim} takes {found['needed']:,} pairs or more, all guessed right; more shadows make "
        "guesses better and the bound's ceiling no higher."
    )
