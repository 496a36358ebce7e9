"""All attacks on a run directory, and their results beside the run's claims."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sordino.audit.distances import expose
from sordino.audit.extraction.copying import QUERIES, steal_by_asking
from sordino.audit.extraction.label_only import infer_by_asking
from sordino.audit.findings.words import ATTACKS
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
from sordino.files import FREE_SPACE, write_atomically
from sordino.privacy.statement import as_summary
from sordino.progress import Progress, silent
from sordino.report import write_report

FILE = "audit.json"
SEED = 1  # of attackers, unless another is asked for
# The attack that reads each part of `Effort`.
READ_BY = {"shadows": "membership", "canaries": "canaries", "queries": "extraction", "jobs": "membership"}


def audit(
    folder: Path | str,
    attacks: Sequence[str] = ATTACKS,
    shadows: int | None = None,
    canaries: int | None = None,
    seed: int = SEED,
    progress: Progress = silent,
    dataset: EncodedDataset | None = None,
    queries: int | None = None,
    jobs: int | None = None,
    encoder: str | None = None,
) -> dict[str, Any]:
    """Attack a finished run, and write `audit.json` and its report.

    Attacks that were made before and are not asked for again keep their results, and their seeds.

    Args:
        folder: the run directory.
        attacks: of ATTACKS.
        shadows: shadow federations of the membership attacks; each costs as much as the run. By default 64.
        canaries: of the one-run audit, which costs about as much as the run. By default 128.
        seed: of the attacker's randomness.
        progress: is called as the attacks advance.
        dataset: data and encoder, if they are open already.
        queries: questions of the copies made of answers, at most; each is a picture that passes the encoder. By default
            10,000.
        jobs: shadow federations that are trained at once, each with its share of the cores. By default 1.
        encoder: folder or hub name where the run's encoder is now; None: where it was in training.

    Returns:
        The content of `audit.json`.

    Raises:
        ConfigError: an attack is unknown, or a value is given that none of the attacks reads.
        SordinoError: the run cannot be opened, or an attack cannot be made of what it has.
    """
    if isinstance(attacks, str):
        raise ConfigError("attacks", attacks, f"must be a list of names, such as [{attacks!r}]")
    if not attacks:  # an audit without any would count as one, on cards too
        raise ConfigError("--attacks", "", f"name one at least; choose from {', '.join(ATTACKS)}")
    for attack in attacks:
        if attack not in ATTACKS:
            raise ConfigError("--attacks", attack, f"not an attack; choose from {', '.join(ATTACKS)}")
    given = {"shadows": shadows, "canaries": canaries, "queries": queries, "jobs": jobs}
    chosen = {key: value for key, value in given.items() if value is not None}
    for key, value in chosen.items():
        if READ_BY[key] not in attacks:
            remedy = f"goes with the attack {READ_BY[key]!r}, which is not among --attacks; add it, or leave this out"
            raise ConfigError(f"--{key}", value, remedy)
    folder = Path(folder)
    require_run(folder)
    with held(folder, instead=False):
        return _audit(folder, attacks, Effort(**chosen), seed, progress, dataset, encoder)


@dataclass(frozen=True)
class Effort:
    """The size of attacks: shadow federations, planted examples, questions to a service; and shadows at once."""

    shadows: int = 64
    canaries: int = 128
    queries: int = QUERIES[-1]
    jobs: int = 1


def _audit(
    folder: Path,
    attacks: Sequence[str],
    effort: Effort,
    seed: int,
    progress: Progress,
    dataset: EncodedDataset | None,
    encoder: str | None,
) -> dict[str, Any]:
    """Do the work of `audit`, with the run directory locked."""
    subject = Subject.open(folder, progress, dataset, encoder)
    if not (subject.runtime.rounds or subject.runtime.releases_statistics):
        raise RunError(f"{folder}: {subject.config.algorithm} learned nothing, so there is nothing to attack")
    before = read_audit(folder) if (folder / FILE).exists() else {"attacks": {}}
    results: dict[str, Any] = before["attacks"]
    seeds = _seeds(before)
    for name in (attack for attack in ATTACKS if attack in attacks):
        try:
            results[name] = _attack(name, subject, effort, seed)
        except (ConfigError, DataError) as error:
            if tuple(attacks) != ATTACKS:  # asked for by name
                raise
            results[name] = {"reason": str(error)}
        seeds[name] = seed
    claimed = as_summary(subject.ledger, subject.config.privacy.unit)
    result = {
        "claimed": {key: claimed[key] for key in ("epsilon", "delta", "unit", "simulated")},
        "seeds": seeds,
        "attacks": results,
    }
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(folder / FILE, text.encode(), FREE_SPACE, private=True)
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


def membership_auc(
    folder: Path, shadows: int, resume: bool, progress: Progress, dataset: EncodedDataset, jobs: int = 1
) -> float:
    """Return the AUC of membership inference by LiRA against a finished run.

    Args:
        folder: the run directory.
        shadows: shadow federations.
        resume: read the result of an earlier audit if there is one of as many shadows, by the same seed.
        progress: is called as the attack advances.
        dataset: data and encoder of the run.
        jobs: shadow federations that are trained at once.

    Raises:
        SordinoError: see `audit`.
    """
    earlier = read_audit(folder) if resume and (folder / FILE).exists() else {"attacks": {}}
    found = earlier["attacks"].get("membership", {})
    # Only other attacks may have been made, this one may not have been possible, or it may have been another's.
    asked = "lira" in found and (found.get("shadows"), _seeds(earlier).get("membership")) == (shadows, SEED)
    if not asked:
        made = audit(folder, ["membership"], shadows, seed=SEED, progress=progress, dataset=dataset, jobs=jobs)
        found = made["attacks"]["membership"]
    return float(found["lira"]["auc"])


def _seeds(found: dict[str, Any]) -> dict[str, Any]:
    """Return the seed of each attack, which may have been made at several times.

    Audits of earlier versions tell the seed of the last time.
    """
    return dict(found.get("seeds", dict.fromkeys(found["attacks"], found.get("seed"))))


def _attack(name: str, subject: Subject, effort: Effort, seed: int) -> dict[str, Any]:
    if name == "membership":
        return infer_membership(subject, effort.shadows, seed, effort.jobs).as_dict()
    if name == "release":
        return attack_release(subject, seed).as_dict()
    if name == "rounds":
        return infer_from_rounds(subject, seed).as_dict()
    if name == "canaries":
        rounds = subject.training.round
        return audit_in_one_run(subject.runtime, effort.canaries, seed, subject.progress, rounds).as_dict()
    if name == "inversion":
        return invert(subject, seed).as_dict()
    if name == "distances":
        return expose(subject, seed).as_dict()
    if name == "extraction":
        return steal_by_asking(subject, seed, effort.queries).as_dict()
    if name == "label-only":
        return infer_by_asking(subject, seed).as_dict()
    return steal(subject, seed).as_dict()
