"""The findings of attacks on a run: `audit.json` brought to one form, for the verdict, the tables and the figures."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sordino.errors import RunError, cause, shortened
from sordino.report.runs import Run

T = TypeVar("T")

_TITLES = {"lira": "LiRA", "rmia": "RMIA", "rmia_offline": "RMIA, offline", "shadow_attack": "shadow models"}
_ANSWERS = {"gap": "answers, best class", "augmented": "answers, nine variants", "answers": "answers, top five"}
_STATISTICS = ("product", "regression")


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon that an attack shows at 95% confidence.

    Attributes:
        title: of the attack.
        shown: the bound, 0 if nothing is shown.
        claimed: the claim that it tests, for the training that was attacked; None if there is none.
        delta: at which both hold.
        refuted: the bound is above the claim.
    """

    title: str
    shown: float
    claimed: float | None
    delta: float
    refuted: bool


@dataclass(frozen=True)
class Guess:
    """Membership inference by one attack.

    Attributes:
        title: of the attack.
        auc, low, high: area under the ROC curve with its interval of 95%.
        curve: (false positive rate, true positive rate) of thresholds; empty in audits of earlier versions.
        claimed: an example's epsilon that is claimed against the attacker; None if there is none.
        delta: of the claim.
    """

    title: str
    auc: float
    low: float
    high: float
    curve: tuple[tuple[float, float], ...]
    claimed: float | None
    delta: float


@dataclass(frozen=True)
class Evidence:
    """All that attacks found against one run.

    Attributes:
        tried: some attack applied.
        guesses: attacks on membership.
        bounds: lower bounds on epsilon.
        others: in words, attacks of other kinds that found something.
    """

    tried: bool
    guesses: tuple[Guess, ...]
    bounds: tuple[Bound, ...]
    others: tuple[str, ...]

    @property
    def refuted(self) -> bool:
        """True if a bound is above the claim that it tests."""
        return any(bound.refuted for bound in self.bounds)

    @property
    def shown(self) -> float:
        """The largest bound; 0 if there is none."""
        return max((bound.shown for bound in self.bounds), default=0.0)


def of_audit(run: Run, read: Callable[[dict[str, Any]], T]) -> T:
    """Read the results of a run's audit by attack; there are none if it was not attacked.

    Raises:
        RunError: the audit is damaged: one lacks a value, or has one of another type.
    """
    try:
        attacks = {} if run.audit is None else run.audit["attacks"]
        if not all(isinstance(each, dict) for each in (attacks, *attacks.values())):
            raise TypeError("an attack's result is no JSON object")
        return read(attacks)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        remedy = "repeat 'sordino audit', or remove the file"
        raise RunError(f"{run.directory}: audit.json is damaged ({cause(error)}); {remedy}") from None


def evidence(run: Run) -> Evidence:
    """Return what attacks found against a run.

    Raises:
        RunError: its audit is damaged.
    """
    return of_audit(run, _evidence)


def _evidence(attacks: dict[str, Any]) -> Evidence:
    guesses, bounds = [], []
    for title, attack, part in membership_attacks(attacks):
        if "reason" in attack:
            continue
        claimed, delta = _claim(part.get("claimed_epsilon")), _number(part.get("delta") or 0.0)
        low, high = map(_number, attack["auc_interval"])
        curve = tuple((_number(x), _number(y)) for x, y in attack.get("curve", ()))
        guesses.append(Guess(title, _number(attack["auc"]), low, high, curve, claimed, delta))
        if attack.get("epsilon") is not None:
            bounds.append(Bound(title, _number(attack["epsilon"]), claimed, delta, bool(attack.get("refuted"))))
    canaries = attacks.get("canaries", {})
    if "epsilon" in canaries:
        claimed, delta = _claim(canaries["claimed_epsilon"]), _number(canaries["delta"])
        bounds.append(Bound("canaries", _number(canaries["epsilon"]), claimed, delta, bool(canaries["refuted"])))
    tried = any(not attack.get("reason") for attack in attacks.values())
    return Evidence(tried, tuple(guesses), tuple(bounds), tuple(_others(attacks)))


def _claim(epsilon: Any) -> float | None:
    return None if epsilon is None else _number(epsilon)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError(f"{shortened(value)} is no number")
    return float(value)


def membership_attacks(attacks: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield the attacks that guess members: title, result or the reason why there is none, and what it is a part of."""
    membership, release, over_rounds = (attacks.get(name, {}) for name in ("membership", "release", "rounds"))
    for name, title in _TITLES.items():
        if name in membership:
            yield title, membership[name], membership
    if membership.get("reason"):
        yield "membership", membership, membership
    for name in _STATISTICS:
        if name in release:
            yield f"statistics, {name}", release[name], release
    if release.get("reason"):
        yield "statistics", release, release
    if over_rounds:
        yield "uploads over rounds", over_rounds.get("attack", over_rounds), over_rounds
    answers = attacks.get("label-only", {})
    for name, title in _ANSWERS.items():
        if name in answers:
            yield title, answers[name], answers
    if answers.get("reason"):
        yield "a service's answers", answers, answers


def of_one_image(attacks: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the share of images recognized from an upload of one, and that of chance; None if it was not tried."""
    sizes = attacks.get("inversion", {}).get("attacks") or ()
    one = next((attack for attack in sizes if attack["size"] == 1), None)
    return (one["reidentified"], one["reidentified_chance"]) if one else None


def stolen(attacks: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the local accuracy of prompts that the server replays, and of their owners'; means over clients."""
    victims: Sequence[Mapping[str, Any]] = attacks.get("stealing", {}).get("victims") or ()
    if not victims:
        return None
    theirs = sum(victim["by_server"]["local_accuracy"] for victim in victims) / len(victims)
    own = sum(victim["local_accuracy"] for victim in victims) / len(victims)
    return theirs, own


def copied(attacks: Mapping[str, Any]) -> tuple[int, float, float, float] | None:
    """Return how well a copy from a service's usual answers does; None if it was not tried.

    Returns:
        The most questions that were asked, the copy's local accuracy, the victims', and the hand-written prompt's.
    """
    found = attacks.get("extraction", {})
    usual = [copy for copy in found.get("copies", ()) if copy["defence"] == "top 5, two decimals"]
    if not usual:
        return None
    last = max(usual, key=lambda copy: copy["queries"])
    own, written = found["local_accuracy"], found["hand_written"]["local_accuracy"]
    return int(last["queries"]), last["local_accuracy"], own, written


def _others(attacks: Mapping[str, Any]) -> Iterator[str]:
    if (image := of_one_image(attacks)) and image[0] > image[1]:
        chance = f"{100 * image[1]:.2g}% by chance"
        yield f"the server recognizes {100 * image[0]:.0f}% of images from uploads of one ({chance})"
    if prompts := stolen(attacks):
        theirs, own = (f"{100 * accuracy:.1f}%" for accuracy in prompts)
        yield f"a prompt that the server replays has {theirs} local accuracy, its owner's {own}"
    if copy := copied(attacks):
        theirs, own = (f"{100 * accuracy:.1f}%" for accuracy in copy[1:3])
        yield f"a copy made of {copy[0]:,} answers of a service has {theirs} local accuracy, its owner's {own}"
