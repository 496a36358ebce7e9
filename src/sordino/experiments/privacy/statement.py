"""A finished run's privacy on a page for a data protection officer: its content, in plain data and plain words.

`sordino.report.statement` makes a page of it, signs it, and checks a page. Everything here follows from the run
directory, the date and the versions, so that whoever has the directory can make the same content again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import platform
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import sordino
from sordino.errors import RunError, StatementError
from sordino.experiments.data_record import FILE as DATA
from sordino.experiments.privacy import words
from sordino.privacy.ledger import Ledger, Unit
from sordino.privacy.statement import headline
from sordino.report.document import Block, Document, Section
from sordino.report.statement import FORMAT, KIND
from sordino.results import FILE as SUMMARY
from sordino.results import Summary, dataset_name

LEDGER, CONFIG, AUDIT = "ledger.json", "config.toml", "audit.json"
OF_RUN = ("algorithm", "dataset", "encoder", "clients", "rounds", "seed", "version")
LIBRARIES = ("torch", "dp-accounting")
NAMED = 12  # class names that are listed
DIGEST_NAMES = {
    LEDGER: "Ledger (ledger.json)",
    CONFIG: "Configuration (config.toml)",
    DATA: "Data record (data.json), salted",
    AUDIT: "Audit (audit.json)",
    "encoder": "Encoder's fingerprint",
}

# From audit.json (None without one), ledger and unit: what was attacked and how strongly, as data and as blocks; and
# whether an attack contradicts the claim. `sordino.audit.findings.strength` has it; experiments know of no audit.
Judged = tuple[dict[str, Any], list[Block], bool]
Judge = Callable[[Mapping[str, Any] | None, Ledger, Unit], Judged]


@dataclass(frozen=True)
class Evidence:
    """The sources of a statement: the files of a run directory.

    Attributes:
        ledger, summary: read.
        tables: the configuration.
        encoder: name, fingerprint and number type, from `data.json`.
        audit: the content of `audit.json`; None if the run was not attacked.
        digests: by file, and of the encoder; see `digests_of`.
    """

    ledger: Ledger
    summary: Summary
    tables: Mapping[str, Any]
    encoder: Mapping[str, Any]
    audit: Mapping[str, Any] | None
    digests: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """Read a finished run directory.

        Raises:
            RunError: a file is missing, damaged, or does not belong to the others.
        """
        texts = {name: _bytes(folder, name) for name in (LEDGER, CONFIG, DATA, SUMMARY)}
        if (folder / AUDIT).exists():
            texts[AUDIT] = _bytes(folder, AUDIT)
        ledger = Ledger.from_json(texts[LEDGER], folder / LEDGER)
        summary = _parsed(folder, SUMMARY, lambda: Summary.from_json(texts[SUMMARY]))
        tables = _parsed(folder, CONFIG, lambda: tomllib.loads(texts[CONFIG].decode()))
        record = _parsed(folder, DATA, lambda: _object(texts[DATA]))
        audit = _parsed(folder, AUDIT, lambda: _object(texts[AUDIT])) if AUDIT in texts else None
        if summary.privacy.ledger_digest != hashlib.sha256(texts[LEDGER]).hexdigest():
            raise RunError(
                f"{folder}: {LEDGER} is not the one that {SUMMARY} was written with, so nothing can be stated; put it "
                "back, or finish the run with --resume"
            )
        encoder = record.get("encoder") if isinstance(record.get("encoder"), dict) else {}
        return cls(ledger, summary, tables, cast(dict[str, Any], encoder), audit, digests_of(texts, ledger, encoder))


def digests_of(texts: Mapping[str, bytes], ledger: Ledger, encoder: Any) -> dict[str, str]:
    """Return SHA-256 of a run's files in hex, and the encoder's fingerprint.

    That of `data.json` is an HMAC, keyed by the run's random name, which only the ledger has. A bare digest would let a
    reader of the page who knows all pictures but one confirm that one, whatever epsilon says.
    """
    digests = {name: hashlib.sha256(texts[name]).hexdigest() for name in (LEDGER, CONFIG, AUDIT) if name in texts}
    digests[DATA] = hmac.new(ledger.run.encode(), texts[DATA], hashlib.sha256).hexdigest()
    return digests | {"encoder": str(encoder.get("fingerprint", "not recorded"))}


def written_now() -> dict[str, Any]:
    """Return the date, and the versions that a statement is written with."""
    return {
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "versions": {"sordino": sordino.__version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
    }


def statement_of(folder: Path, judge: Judge, made: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of a run's statement: data, and the document that a page shows.

    Args:
        folder: a finished run directory.
        judge: says what an audit found, and how strong it was.
        made: date and versions, as `written_now` returns them, to make a former statement again.

    Raises:
        RunError: the run directory is unfinished or damaged.
    """
    evidence, made = Evidence.read(folder), dict(made or written_now())
    ledger, summary = evidence.ledger, evidence.summary
    unit = cast(Unit, summary.privacy.unit or "example")
    said, worst = words.verdict(ledger, unit), headline(ledger, unit)
    privacy = evidence.tables.get("privacy", {})
    mechanism = privacy.get("mechanism") if isinstance(privacy, dict) else None
    found, audit_blocks, refuted = judge(evidence.audit, ledger, unit)
    data = {
        "kind": KIND,
        "format": FORMAT,
        "written": made["written"],
        "versions": made["versions"],
        # Others read this page, and where the data lie is none of their business.
        "run": {name: getattr(summary, name) for name in OF_RUN} | {"dataset": dataset_name(summary.dataset)},
        "verdict": "contradicted" if refuted else said,
        "unit": unit,
        "delta": ledger.delta,
        "epsilon": None if worst is None else words.finite(worst.epsilon),
        "mechanism": mechanism,
        "randomness": ledger.randomness if ledger.releases else None,
        "trusted": list(ledger.trusted),
        "observers": words.observer_data(ledger, unit),
        "units": words.unit_data(ledger, unit),
        "audit": found,
        "digests": evidence.digests,
    }
    return data | {"document": _document(data, evidence, unit, audit_blocks)}


def compare(statement: Mapping[str, Any], folder: Path, judge: Judge) -> bool:
    """See that a statement is that of a run directory.

    Args:
        statement: of a file that `sordino.report.statement.check` passed.
        folder: the run directory.
        judge: as for `statement_of`.

    Returns:
        Whether all its content was made again and compared; else the digests alone were, as another version wrote it.

    Raises:
        StatementError: it is another run's, or the run has changed, or its content does not follow from the run.
        RunError: the run directory is unfinished or damaged.
    """
    stated, found = statement["digests"], Evidence.read(folder).digests
    for name in dict.fromkeys((*found, *stated)):
        if stated.get(name) != found.get(name):
            raise StatementError(
                f"{folder}: {DIGEST_NAMES.get(name, name)} is not the one that was stated: it is another run, or it "
                "changed since; give the run that the statement is of, or write the statement again"
            )
    made = {name: statement[name] for name in ("written", "versions")}
    now = written_now()["versions"]
    if any(made["versions"].get(name) != now[name] for name in ("sordino", "dp-accounting")):
        return False
    again = statement_of(folder, judge, made)
    for name, value in json.loads(json.dumps(again)).items():
        if not _alike(statement.get(name), value):
            raise StatementError(
                f"{folder}: gives another {name!r} than was stated, from the same files; write the statement again"
            )
    return True


def _alike(a: Any, b: Any) -> bool:
    """Compare plain data; numbers may differ in the last digits, as libraries of other machines compute them."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    return type(a) is type(b) and bool(a == b)


def _document(data: Mapping[str, Any], evidence: Evidence, unit: Unit, audit_blocks: list[Block]) -> Document:
    ledger, summary = evidence.ledger, evidence.summary
    simulated, refuted = ledger.simulated, data["verdict"] == "contradicted"
    examples = sum(result.examples for result in summary.per_client)
    numbers = {"example": examples, "client": summary.clients}
    sections: list[Section | None] = [
        words.who_learns_what(data["observers"], unit, simulated),
        words.meaning(ledger, unit, numbers.get(unit), simulated),
        words.units_section(data["units"], ledger, unit, simulated),
        {"title": "What is not covered", "blocks": [{"items": _not_covered(evidence)}]},
        words.noise(ledger, data["mechanism"]),
        {"title": "Audit", "blocks": audit_blocks},
        _record(data),
    ]
    clients = "one party" if summary.clients == 1 else f"{summary.clients:,} clients"
    # Sizes count as public where the example is the unit. Where it is larger, a number of pictures is as private as all
    # else, and this page is for others.
    held = f" with {examples:,} training pictures in all" if unit == "example" else ""
    lead = words.lead(ledger, unit)
    if refuted:
        lead = ["An attack shows more than what the run claims; see Audit. The claim below does not hold.", *lead]
    return {
        "title": f"Privacy statement: {summary.algorithm} on {data['run']['dataset']}",
        "subtitle": f"{clients}{held}, {summary.rounds:,} rounds, encoder {summary.encoder}. "
        f"Written {data['written']}.",
        "banner": "NOT PRIVATE: ITS OWN AUDIT CONTRADICTS THE CLAIM" if refuted else words.banner(ledger, unit),
        "exposed": data["verdict"] != "private",
        "lead": lead,
        "sections": [section for section in sections if section is not None],
        "footer": f"Written by Sordino {data['versions']['sordino']}. All bounds are rounded against the run: up.",
    }


def _not_covered(evidence: Evidence) -> list[str]:
    """Return everything that the bounds do not say, of this run and of any."""
    # Somebody holds each class. In the clients' order, names would say who holds which.
    names = sorted({name for result in evidence.summary.per_client for name in result.classes})
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if names[NAMED:] else "")
    audited = ["This page's figures of the audit are computed so, too."] if evidence.audit else []
    measured, *rest = words.LEFT_OPEN_BY_ANY_RUN
    return [
        *words.left_open(evidence.ledger),
        " ".join([measured, *audited]),
        *rest,
        f"Prompt files name their classes as they are: {shown or 'none'}.",
        "ledger.json and data.json hold digests of each client's pictures, by which a guess can be confirmed. They "
        "stay with the run's owner, and are not on this page.",
    ]


def _record(data: Mapping[str, Any]) -> Section:
    """Return the section with date, versions and digests."""
    versions = ", ".join(f"{name} {number}" for name, number in sorted(data["versions"].items()))
    run = data["run"]["version"] or "not recorded"
    rows = [[DIGEST_NAMES[name], digest] for name, digest in data["digests"].items()]
    head = ["Of", "SHA-256"]
    caption = "Digests of the files that this statement was made of; data.json's is keyed by the run's secret name."
    return {
        "title": "Record",
        "blocks": [
            {"text": f"Written {data['written']} with {versions}. The run was made with sordino {run}."},
            {"table": {"caption": caption, "head": head, "rows": rows}},
        ],
    }


def _bytes(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise RunError(
            f"{folder}: {name} cannot be read ({error.strerror}); give the directory of a finished 'sordino run'"
        ) from None


def _parsed(folder: Path, name: str, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except (ValueError, RecursionError) as error:
        raise RunError(f"{folder}: {name} is damaged ({error}); put it back, or repeat the run") from None


def _object(text: bytes) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content
