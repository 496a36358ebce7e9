"""The results of attacks, as `audit.json` holds them, in lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BY_SERVICE = ("extraction", "label-only")  # attacks that need a service's answers alone
ATTACKS = ("membership", "release", "rounds", "canaries", "inversion", "stealing", "distances", *BY_SERVICE)


def as_text(found: dict[str, Any]) -> str:
    """Return an audit's content as text for a terminal."""
    claimed, attacks = found["claimed"], found["attacks"]
    claim = "Claimed: no epsilon" if claimed["epsilon"] is None else f"Claimed: epsilon = {claimed['epsilon']:.4g}"
    lines = [claim + (" (simulated, not private)" if claimed.get("simulated") else "")]
    for name in (attack for attack in ATTACKS if attack in attacks):
        lines += [f"{name}: {line}" for line in result_words(name, attacks[name])]
    return "\n".join(lines)


def result_words(attack: str, result: dict[str, Any]) -> list[str]:
    """Return the result of one attack in lines of text."""
    if result.get("reason"):
        return [f"does not apply ({result['reason']})"]
    return _WORDS[attack](result)


def _membership_words(result: dict[str, Any]) -> list[str]:
    titles = {"lira": "LiRA", "rmia": "RMIA", "rmia_offline": "RMIA offline", "shadow_attack": "shadow models"}
    # An audit of an earlier version has not all of them.
    made = {name: title for name, title in titles.items() if name in result}
    words = [f"{title}, {result['shadows']} shadows: {_success(result[name])}" for name, title in made.items()]
    return words + _judgement([result[name] for name in made])


def _release_words(result: dict[str, Any]) -> list[str]:
    alone = result["reconstruction"]
    words = [f"{name} with the released statistics: {_success(result[name])}" for name in ("product", "regression")]
    words.append(
        f"feature of an image alone in its class: cosine {alone['cosine']:.2f} ({alone['cosine_chance']:.2f} by "
        f"chance), {100 * alone['reidentified']:.0f}% of {alone['images']} recognized among {alone['gallery']}"
    )
    return words + _judgement([result["product"], result["regression"]])


def _rounds_words(result: dict[str, Any]) -> list[str]:
    counted = f"{result['rounds']} round{'s' if result['rounds'] > 1 else ''}"
    return [f"uploads of {counted}: {_success(result['attack'])}", *_judgement([result["attack"]])]


def _success(attack: dict[str, Any]) -> str:
    low, high = attack["auc_interval"]
    rates = ", ".join(
        f"{100 * point['true_positive_rate']:.1f}% found at {100 * point['false_positive_rate']:g}% false positives"
        for point in attack["found"]
    )
    bound = attack.get("epsilon")
    shown = "" if bound is None else f"; epsilon is at least {bound:.3g}"
    return f"AUC {attack['auc']:.3f} ({low:.3f} to {high:.3f}); {rates}{shown}"


def _judgement(attacks: Sequence[dict[str, Any]]) -> list[str]:
    """Say why there is no bound, if there is none, and if a bound refutes the claim."""
    reasons = dict.fromkeys(reason for attack in attacks if (reason := attack.get("no_bound")))
    refuted = any(attack.get("refuted") for attack in attacks)
    return [
        *(f"no bound on epsilon: {reason}" for reason in reasons),
        *(["THE CLAIM IS FALSE: the bound is above it"] if refuted else []),
    ]


def _canaries_words(result: dict[str, Any]) -> list[str]:
    words = [
        f"epsilon is at least {result['epsilon']:.4g} at 95% confidence ({result['correct']} of {result['guesses']} "
        f"guesses right, {result['canaries']} canaries, {result['observer']})"
    ]
    return words + _judgement([result])


def _inversion_words(result: dict[str, Any]) -> list[str]:
    return [
        f"from an upload of {attack['size']} example{'s' if attack['size'] > 1 else ''}: "
        f"{100 * attack['labels_found']:.0f}% of the labels ({100 * attack['labels_chance']:.0f}% by chance), "
        f"cosine to the image's feature {attack['cosine']:.2f} ({attack['cosine_chance']:.2f} by chance), "
        f"{100 * attack['reidentified']:.0f}% of images recognized "
        f"({100 * attack['reidentified_chance']:.2g}% by chance)"
        for attack in result["attacks"]
    ]


def _stealing_words(result: dict[str, Any]) -> list[str]:
    victims = result["victims"]

    def mean(thief: str, what: str) -> float:
        return float(sum(victim[thief][what] for victim in victims) / len(victims))

    accuracy = sum(victim["local_accuracy"] for victim in victims) / len(victims)
    return [
        f"{title}: local accuracy {100 * mean(thief, 'local_accuracy'):.1f}% (the victims' own {100 * accuracy:.1f}%), "
        f"agreement {100 * mean(thief, 'agreement'):.0f}%, cosine of the change {mean(thief, 'cosine'):.2f}"
        for thief, title in (("by_client", "another client"), ("by_server", "the server"))
    ]


def _distances_words(result: dict[str, Any]) -> list[str]:
    helped = ", ".join(
        f"{entry['cosine']:.2f} with {entry['helpers']} ({entry['cosine_of_mean']:.2f} by their mean alone)"
        for entry in result["helped"]
    )
    words = [
        f"{result['columns']} columns opened; distances between clients known to {100 * result['distance_error']:.2g}%",
        f"cosine to another client's reduced prompt, by how many clients help the server: {helped}",
    ]
    for key, what in (("by_best", "the best of these"), ("by_truth", "the true reduced prompt")):
        prompt = result[key]
        words.append(f"a prompt from {what}: cosine {prompt['cosine']:.2f}, agreement {100 * prompt['agreement']:.0f}%")
    if known := result["by_mean"]:
        words.append(
            f"the cluster's mean, which is opened anyway: cosine {known['cosine']:.2f}, agreement "
            f"{100 * known['agreement']:.0f}%"
        )
    return words


def _extraction_words(result: dict[str, Any]) -> list[str]:
    whose = f"prompts of {len(result['victims'])} clients" if result["victims"] else "the shared prompt"

    def compared(copy: dict[str, Any]) -> str:
        cosine = "" if copy["cosine"] is None else f", cosine of class features {copy['cosine']:.2f}"
        return f"agreement {100 * copy['agreement']:.0f}%, local accuracy {100 * copy['local_accuracy']:.1f}%{cosine}"

    words = [
        f"{whose}, local accuracy {100 * result['local_accuracy']:.1f}%; "
        f"the hand-written prompt in their place: {compared(result['hand_written'])}"
    ]
    shown = ("none", "top 5, two decimals")
    return words + [
        f"a copy from {copy['queries']:,} answers ({'exact' if copy['defence'] == 'none' else copy['defence']}): "
        f"{compared(copy)}"
        for defence in shown
        for copy in result["copies"]
        if copy["defence"] == defence
    ]


def _label_only_words(result: dict[str, Any]) -> list[str]:
    titles = {"gap": "best class", "augmented": "best classes of nine variants", "answers": "top 5 in two decimals"}
    words = [f"{title}: {_success(result[name])}" for name, title in titles.items()]
    return words + _judgement([result[name] for name in titles])


_WORDS = {
    "membership": _membership_words,
    "release": _release_words,
    "rounds": _rounds_words,
    "canaries": _canaries_words,
    "inversion": _inversion_words,
    "stealing": _stealing_words,
    "distances": _distances_words,
    "extraction": _extraction_words,
    "label-only": _label_only_words,
}
