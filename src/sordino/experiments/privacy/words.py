"""A ledger in plain words, for readers who are not of the trade: who learns what, and what its epsilon means.

Numbers come as plain data beside the words. No number looks better than it is: epsilon, delta and an attacker's success
are rounded up, noise is rounded down.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from sordino.privacy import accounting
from sordino.privacy.ledger import OBSERVERS, UNITS, Ledger, Observer, Unit
from sordino.privacy.meaning import group_epsilon, percent_up, right_at_most, rounded_down
from sordino.privacy.statement import NOISE_BY, WHO, bounds, headline, is_private, listed, seen_by, views
from sordino.report.document import Block, Section
from sordino.results import rounded_up

Verdict = Literal["private", "simulated", "not private"]

GROUPS = (2, 10)  # examples of one person, for which a bound is given where the example is the unit
WEAK = 0.95  # share of right answers from which a bound rules out little

A_UNIT: dict[Unit, str] = {
    "example": "one example (a picture with its label)",
    "person": "one person with all their pictures",
    "client": "one client with all its data",
}
IS_ASKED: dict[Unit, str] = {
    "example": "whether one example was used",
    "person": "whether one person was used",
    "client": "whether one client sent what it learned, or zeros",
}
QUESTION: dict[Unit, str] = {
    "example": "whether one particular picture was used for training",
    "person": "whether one particular person's pictures were used for training",
    "client": "whether one particular client sent what it learned, or zeros in its place",
}
SIMULATED_BANNER = "NOT PRIVATE: THIS IS A SIMULATION"
BARE_BANNER = "NOT PRIVATE"
# What the bounds of no run cover, whatever its mechanism is.
LEFT_OPEN_BY_ANY_RUN = (
    "Losses and accuracies in the run's log (metrics.jsonl), its summary and its report are computed from the real "
    "pictures, without noise. Giving them away is a disclosure of its own.",
    "Choosing settings by looking at results of several runs costs privacy too, and is not counted. What several runs "
    "on the same data released adds up: sordino privacy ledger RUN RUN says to how much.",
    "Computing is in floating point; the last bits are not part of the proof. The noise is drawn with a remedy against "
    "attacks on its last bits, not with a proof.",
)


def verdict(ledger: Ledger, unit: Unit) -> Verdict:
    """Return what may be said of a ledger in a word."""
    if ledger.simulated:
        return "simulated"
    return "private" if is_private(ledger, unit) else "not private"


def banner(ledger: Ledger, unit: Unit, planned: bool = False) -> str:
    """Return the largest text of a page, of a run or of a plan."""
    said, worst = verdict(ledger, unit), headline(ledger, unit)
    if said == "simulated":
        return SIMULATED_BANNER
    if said == "not private":
        return BARE_BANNER
    if worst is None:
        return "Private: nothing that was learned from pictures leaves a client."
    private = "Planned: differentially private" if planned else "Differentially private"
    return f"{private}, {_claim(worst.epsilon, worst.delta)} for {A_UNIT[unit]}."


def lead(ledger: Ledger, unit: Unit) -> list[str]:
    """Return the paragraphs under the banner: the promise, against whom, or why there is none."""
    said, worst = verdict(ledger, unit), headline(ledger, unit)
    if said == "private":
        if worst is None:
            return ["No noise is needed, as there is nothing to be hidden in what leaves."]
        return [f"This holds against {_untrusted(ledger)}, whatever else they know or learn. {_trusted(ledger)}"]
    if said == "simulated":
        claim = "no epsilon would hold either"
        if ledger.noised and worst is not None and bounds(worst):
            claim = (
                f"it would have {_claim(worst.epsilon, worst.delta)} for {A_UNIT[unit]}, against {_untrusted(ledger)}"
            )
        return [
            "Noise and samples come from a key that can be made again. Anyone who has the run's directory can take the "
            f"noise off, and nobody is protected. With noise from the operating system, {claim}. Do not publish what "
            "this run made as if it were private."
        ]
    if ledger.releases and not ledger.disclosures:
        return ["Contributions were clipped and sampled, but no noise was added that bounds what is learned."]
    bare = "; ".join(disclosure.content for disclosure in ledger.disclosures)
    return [f"These leave without noise: {bare}. No epsilon holds, and there is no bound on what is learned of anyone."]


def observer_data(ledger: Ledger, unit: Unit) -> list[dict[str, Any]]:
    """Return what each observer learns, as plain data; an epsilon that is unbounded is null."""
    return [
        {
            "observer": view.observer,
            "trusted": view.observer in ledger.trusted,
            "in_short": _in_short(ledger, view.observer),
            "sees": seen_by(ledger, view.observer),
            "epsilon": finite(view.epsilon),
            "epsilon_rdp": finite(view.epsilon_rdp),
            "right_at_most": finite(right_at_most(view.epsilon, view.delta)) if math.isfinite(view.epsilon) else None,
            "most_about": view.party,
        }
        for view in views(ledger, unit)
    ]


def _in_short(ledger: Ledger, observer: Observer) -> str:
    """Return what an observer sees in the plainest words; empty for nothing."""
    bare = {disclosure.channel for disclosure in ledger.disclosures if observer in disclosure.observers}
    releases = [release for release in ledger.releases if observer in release.observers]
    if "images" in bare:
        return "The pictures themselves:"
    if bare or any(release.noise_multiplier == 0 for release in releases):
        return "Numbers that were computed from the pictures, not all of them with noise:"
    return "No picture, only numbers with noise on them, and what is computed of these:" if releases else ""


def who_learns_what(observers: list[dict[str, Any]], unit: Unit, simulated: bool) -> Section:
    """Return the section on observers, a row for all that see the same and are bounded alike."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for entry in observers:
        if entry["epsilon"] is None:
            bound, right = "unbounded", "no bound"
        else:
            bound, right = rounded_up(entry["epsilon"]), percent_up(entry["right_at_most"])
        if simulated:
            right = "no bound: the noise can be taken off"
        sees = "\n".join(filter(None, [entry["in_short"], *entry["sees"]]))
        who = WHO[entry["observer"]] + (" (trusted)" if entry["trusted"] else "")
        rows.setdefault((sees, bound, right), []).append(who[0].upper() + who[1:])
    named = f"ε for each {unit}" + (", had the noise been real" if simulated else "")
    caption = (
        "All that each one sees. Right at most: how often one is right who must tell, of two equally likely answers, "
        f"{IS_ASKED[unit]}; guessing is 50%."
    )
    table: Block = {"table": {"caption": caption, "head": ["Who", "Sees", named, "Right at most"], "rows": []}}
    table["table"]["rows"] = [["\n".join(who), *cells] for cells, who in rows.items()]
    return {"title": "Who learns what", "blocks": [table]}


def meaning(ledger: Ledger, unit: Unit, units: int | None, simulated: bool) -> Section | None:
    """Return the section that explains epsilon and delta by an example; None where no epsilon holds.

    Args:
        ledger: of the run.
        unit: what is protected.
        units: how many of them there are, if it is known.
        simulated: whether the noise protects nobody.
    """
    worst = headline(ledger, unit)
    if worst is None or not bounds(worst) or not ledger.noised:
        return None
    right, odds = right_at_most(worst.epsilon, worst.delta), math.exp(min(worst.epsilon, 700))
    epsilon, delta = rounded_up(worst.epsilon), rounded_up(worst.delta)
    texts = [
        f"An example: an attacker thinks it 50:50 {QUESTION[unit]}. The attacker knows the method "
        "and everything about all others, and then sees all that one of the parties which are not trusted sees. Even "
        f"then the attacker is right at most {percent_up(right)} of the time: (e^ε + δ) / (1 + e^ε), for ε = {epsilon} "
        f"and δ = {delta}. By guessing it is 50%. But for δ, the odds change by a factor of at most {rounded_up(odds)}."
    ]
    if right >= WEAK:
        texts.append(
            "So this bound by itself rules out little. Attacks may be far from it: see what they found, if there was "
            "an audit."
        )
    exposed = ""
    if units:
        open_to = rounded_up(worst.delta * units)
        exposed = f" With {units:,} {unit}s, it leaves open that {open_to} of them are exposed, on average."
    texts.append(f"δ is the probability with which this may fail altogether.{exposed}")
    if simulated:
        texts.append("All this holds for real noise alone. This run's noise is simulated, so none of it holds here.")
    return {"title": "What ε means for one " + unit, "blocks": [{"text": text} for text in texts]}


def unit_data(ledger: Ledger, unit: Unit) -> list[dict[str, Any]]:
    """Return the bounds for the unit, for smaller and larger ones, and for several examples of one person.

    The entries have a `unit`, a `number` of them, and `epsilon` against the worst untrusted observer at the ledger's
    delta; null if it is unbounded. See `accounting.spent` for other units than that of the releases.
    """
    untrusted = [observer for observer in OBSERVERS if observer not in ledger.trusted]
    entries = [(of, 1, max(accounting.spent(ledger, observer, of).epsilon for observer in untrusted)) for of in UNITS]
    if unit == "example" and math.isfinite(entries[0][2]):
        entries[1:1] = [("example", size, group_epsilon(ledger, "example", size)) for size in GROUPS]
    return [{"unit": of, "number": number, "epsilon": finite(epsilon)} for of, number, epsilon in entries]


def units_section(entries: list[dict[str, Any]], ledger: Ledger, unit: Unit, simulated: bool) -> Section | None:
    """Return the section on the unit and on who has several; None where nothing is bounded for any unit."""
    if all(entry["epsilon"] is None for entry in entries) or not ledger.releases:
        return None
    rows = []
    for entry in entries:
        what = A_UNIT[entry["unit"]] if entry["number"] == 1 else f"{entry['number']} examples of one person together"
        if entry["unit"] == unit and entry["number"] == 1:
            what += ": the unit"
        if entry["epsilon"] is None:
            bound, right = "unbounded", "no bound"
        else:
            bound = rounded_up(entry["epsilon"])
            right = percent_up(right_at_most(entry["epsilon"], ledger.delta or 0.0))
        rows.append([what[0].upper() + what[1:], bound, "no bound" if simulated else right])
    texts = {
        "example": "The promise is for one example. Somebody with n pictures has n times the loss or more, as δ grows "
        "too, and this run does not know how many pictures anybody has: so for a person nothing is promised. With "
        "privacy.unit = 'person' it would be.",
        "person": "The promise is for a person with all their pictures, however many, if the list of whose pictures "
        "are whose is true. One picture more or less is bounded too, by another rule.",
        "client": "The promise is for a client with all its data: what it sends is compared with zeros in its place. "
        "That it takes part is known. Two answers of one client, from other data or from one picture more or less, may "
        "be twice as far apart, and no sampling hides which client it is: so the bound for one picture, which is also "
        "that for other data of the same client, is the larger one. "
        + (
            "All pictures of a person are known to be at one client, so a person is bounded too, by another rule."
            if ledger.whole_persons
            else "Whose pictures are whose is not known, so a person may be at several clients: for a person nothing "
            "is promised."
        ),
    }
    had = ", had the noise been real" if simulated else ""
    caption = f"Bounds at δ = {rounded_up(ledger.delta or 0.0)}, against whoever is not trusted and learns most{had}."
    if unit == "client":
        caption += (
            " For examples and persons this δ says something only if it is below one over their number; sordino "
            "privacy ledger --delta states another."
        )
    table: Block = {"table": {"caption": caption, "head": ["Whose data", "ε", "Right at most"], "rows": rows}}
    return {"title": "The unit, and somebody with several pictures", "blocks": [{"text": texts[unit]}, table]}


def noise(ledger: Ledger, mechanism: str | None) -> Section:
    """Return the section on the noise: its source, its size and who adds it."""
    if not ledger.releases:
        return {"title": "Where the noise comes from", "blocks": [{"text": "No noise is added to anything."}]}
    least = min(release.noise_multiplier for release in ledger.releases)
    rates = [release.sampling_rate for release in ledger.releases]
    by = listed([NOISE_BY[name] for name in sorted({release.noise_by for release in ledger.releases})])
    rate = rounded_up(max(rates))
    size = (
        f"Mechanism: {mechanism or 'not recorded'}. The noise is Gaussian and is added by {by}. Its standard deviation "
        f"is at least {rounded_down(least)} times the most by which one {ledger.releases[0].unit} can change a "
        f"release, and it has a part in a release with a probability of at most {rate}."
    )
    if ledger.simulated:
        source: Block = {
            "warning": "The noise is simulated: it comes from a key that can be made again, so it hides nothing."
        }
    else:
        source = {"text": "The noise and the samples come from the operating system's source of randomness."}
    return {"title": "Where the noise comes from", "blocks": [source, {"text": size}]}


def left_open(ledger: Ledger) -> list[str]:
    """Return what a ledger says that its epsilon does not cover: assumptions, trust, and what leaves without noise."""
    items = [f"Taken as given: {assumption}." for assumption in ledger.assumptions]
    for disclosure in ledger.disclosures:
        who = listed([WHO[observer] for observer in disclosure.observers])
        items.append(f"Leaves without noise: {disclosure.content}. Seen by: {who}.")
    if ledger.trusted:
        items.append(f"{_trusted(ledger)} What a trusted party sees is not bounded.")
    return items


def _claim(epsilon: float, delta: float) -> str:
    return f"ε = {rounded_up(epsilon)} at δ = {rounded_up(delta)}"


def _untrusted(ledger: Ledger) -> str:
    return listed([WHO[observer] for observer in OBSERVERS if observer not in ledger.trusted])


def _trusted(ledger: Ledger) -> str:
    if not ledger.trusted:
        return "Nobody is trusted."
    who = listed([WHO[observer] for observer in OBSERVERS if observer in ledger.trusted])
    return f"{who[0].upper()}{who[1:]} is trusted, and not bounded."


def finite(value: float) -> float | None:
    """Return a number, or None for an infinite one."""
    return value if math.isfinite(value) else None
