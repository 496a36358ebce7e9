"""All attacks on a run directory, and their results beside the run's claims."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sordino.audit.distances import expose
from sordino.audit.inversion import invert
from sordino.audit.membership import infer_membership
from sordino.audit.one_run import audit_in_one_run
from sordino.audit.release import attack_release
from sordino.audit.rounds import infer_from_rounds
from sordino.audit.stealing import steal
from sordino.audit.subject import Subject
from sordino.errors import ConfigError, DataError, RunError
from sordino.experiments.features import EncodedDataset
from sordino.experiments.run_folder import require_run
from sordino.experiments.run_lock import held
from sordino.files import write_atomically
from sordino.privacy.statement import as_summary
from sordino.progress import Progress, silent
from sordino.report import write_report

ATTACKS = ("membership", "release", "rounds", "canaries", "inversion", "stealing", "distances")
FILE = "audit.json"


def audit(
    folder: Path | str,
    attacks: Sequence[str] = ATTACKS,
    shadows: int = 64,
    canaries: int = 128,
    seed: int = 1,
    progress: Progress = silent,
    dataset: EncodedDataset | None = None,
) -> dict[str, Any]:
    """Attack a finished run, and write `audit.json` and its report.

    Attacks that were made before and are not asked for again keep their results.

    Args:
        folder: the run directory.
        attacks: of ATTACKS.
        shadows: shadow federations of the membership attacks; each costs as much as the run.
        canaries: of the one-run audit, which costs about as much as the run.
        seed: of the attacker's randomness.
        progress: is called as the attacks advance.
        dataset: data and encoder, if they are open already.

    Returns:
        The content of `audit.json`.

    Raises:
        SordinoError: the run cannot be opened, or an attack cannot be made of what it has.
    """
    for attack in attacks:
        if attack not in ATTACKS:
            raise ConfigError("--attacks", attack, f"not an attack; choose from {', '.join(ATTACKS)}")
    folder = Path(folder)
    require_run(folder)
    with held(folder):
        return _audit(folder, attacks, shadows, canaries, seed, progress, dataset)


def _audit(
    folder: Path,
    attacks: Sequence[str],
    shadows: int,
    canaries: int,
    seed: int,
    progress: Progress,
    dataset: EncodedDataset | None,
) -> dict[str, Any]:
    """Do the work of `audit`, with the run directory locked."""
    subject = Subject.open(folder, progress, dataset)
    if not (subject.runtime.rounds or subject.runtime.releases_statistics):
        raise RunError(f"{folder}: {subject.config.algorithm} learned nothing, so there is nothing to attack")
    results: dict[str, Any] = read_audit(folder)["attacks"] if (folder / FILE).exists() else {}
    for name in (attack for attack in ATTACKS if attack in attacks):
        try:
            results[name] = _attack(name, subject, shadows, canaries, seed)
        except (ConfigError, DataError) as error:
            if tuple(attacks) != ATTACKS:  # asked for by name
                raise
            results[name] = {"reason": str(error)}
    claimed = as_summary(subject.ledger, subject.config.privacy.unit)
    result = {
        "claimed": {key: claimed[key] for key in ("epsilon", "delta", "unit", "simulated")},
        "seed": seed,
        "attacks": results,
    }
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(folder / FILE, text.encode())
    title = f"Sordino: {subject.config.algorithm} on {subject.config.data.source}"
    write_report([folder], folder / "report.html", title)
    return dict(json.loads(text))


def read_audit(folder: Path) -> dict[str, Any]:
    """Read the results of an earlier audit.

    Raises:
        RunError: its file is damaged.
    """
    try:
        content = json.loads((folder / FILE).read_bytes())
        if not (isinstance(content, dict) and isinstance(content.get("attacks"), dict)):
            raise ValueError("it holds no attacks")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{folder / FILE} is damaged ({error}); remove it, and repeat the attacks") from None
    return content


def membership_auc(folder: Path, shadows: int, resume: bool, progress: Progress, dataset: EncodedDataset) -> float:
    """Return the AUC of membership inference by LiRA against a finished run.

    Args:
        folder: the run directory.
        shadows: shadow federations.
        resume: read the result of an earlier audit if there is one.
        progress: is called as the attack advances.
        dataset: data and encoder of the run.

    Raises:
        SordinoError: see `audit`.
    """
    if resume and (folder / FILE).exists():
        result = read_audit(folder)
    else:
        result = audit(folder, ["membership"], shadows, progress=progress, dataset=dataset)
    return float(result["attacks"]["membership"]["lira"]["auc"])


def _attack(name: str, subject: Subject, shadows: int, canaries: int, seed: int) -> dict[str, Any]:
    if name == "membership":
        return infer_membership(subject, shadows, seed).as_dict()
    if name == "release":
        return attack_release(subject, seed).as_dict()
    if name == "rounds":
        return infer_from_rounds(subject, seed).as_dict()
    if name == "canaries":
        rounds = subject.training.round
        return audit_in_one_run(subject.runtime, canaries, seed, subject.progress, rounds).as_dict()
    if name == "inversion":
        return invert(subject, seed).as_dict()
    if name == "distances":
        return expose(subject, seed).as_dict()
    return steal(subject, seed).as_dict()


def as_text(found: dict[str, Any]) -> str:
    """Return an audit's content as text for a terminal."""
    claimed, attacks = found["claimed"], found["attacks"]
    claim = "Claimed: no epsilon" if claimed["epsilon"] is None else f"Claimed: epsilon = {claimed['epsilon']:.4g}"
    lines = [claim + (" (simulated, not private)" if claimed.get("simulated") else "")]
    for name in (attack for attack in ATTACKS if attack in attacks):
        result = attacks[name]
        if result.get("reason"):
            lines.append(f"{name}: does not apply ({result['reason']})")
        else:
            lines += [f"{name}: {line}" for line in _WORDS[name](result)]
    return "\n".join(lines)


def _membership_words(result: dict[str, Any]) -> list[str]:
    titles = {"lira": "LiRA", "rmia": "RMIA", "rmia_offline": "RMIA offline", "shadow_attack": "shadow models"}
    # An audit of an earlier version has not all of them.
    made = {name: title for name, title in titles.items() if name in result}
    words = [f"{title}, {result['shadows']} shadows: {_success(result[name])}" for name, title in made.items()]
    return words + _contradiction([result[name] for name in made])


def _release_words(result: dict[str, Any]) -> list[str]:
    alone = result["reconstruction"]
    words = [f"{name} with the released statistics: {_success(result[name])}" for name in ("product", "regression")]
    words.append(
        f"feature of an image alone in its class: cosine {alone['cosine']:.2f} ({alone['cosine_chance']:.2f} by "
        f"chance), {100 * alone['reidentified']:.0f}% of {alone['images']} recognized among {alone['gallery']}"
    )
    return words + _contradiction([result["product"], result["regression"]])


def _rounds_words(result: dict[str, Any]) -> list[str]:
    counted = f"{result['rounds']} round{'s' if result['rounds'] > 1 else ''}"
    return [f"uploads of {counted}: {_success(result['attack'])}", *_contradiction([result["attack"]])]


def _success(attack: dict[str, Any]) -> str:
    low, high = attack["auc_interval"]
    rates = ", ".join(
        f"{100 * point['true_positive_rate']:.1f}% found at {100 * point['false_positive_rate']:g}% false positives"
        for point in attack["found"]
    )
    bound = attack.get("epsilon")
    shown = "" if bound is None else f"; epsilon is at least {bound:.3g}"
    return f"AUC {attack['auc']:.3f} ({low:.3f} to {high:.3f}); {rates}{shown}"


def _contradiction(attacks: Sequence[dict[str, Any]]) -> list[str]:
    refuted = any(attack.get("refuted") for attack in attacks)
    return ["THE CLAIM IS FALSE: the bound is above it"] if refuted else []


def _canaries_words(result: dict[str, Any]) -> list[str]:
    words = [
        f"epsilon is at least {result['epsilon']:.4g} at 95% confidence ({result['correct']} of {result['guesses']} "
        f"guesses right, {result['canaries']} canaries, {result['observer']})"
    ]
    return words + _contradiction([result])


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


_WORDS = {
    "membership": _membership_words,
    "release": _release_words,
    "rounds": _rounds_words,
    "canaries": _canaries_words,
    "inversion": _inversion_words,
    "stealing": _stealing_words,
    "distances": _distances_words,
}
