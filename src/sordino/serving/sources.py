"""The material of a published version: prompt, ledger, statement and audit of a run, held against each other.

The privacy that is told is the ledger's, counted anew, and its statement is written anew.
Two things of a ledger stay at home: the run's random name, and the digests of the parties' data. With these, whoever
knows all pictures of a party but one could confirm that one, whatever epsilon says.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sordino.audit.findings.strength import judge
from sordino.audit.findings.words import ATTACKS, result_words
from sordino.errors import ConfigError, DataError, PromptError, RunError, SordinoError, cause
from sordino.experiments.privacy.statement import statement_of
from sordino.files import read_regular
from sordino.privacy.ledger import Ledger
from sordino.prompt_file import SavedPrompt
from sordino.report.statement import sealed
from sordino.results import FILE as SUMMARY
from sordino.results import Summary, dataset_name
from sordino.serving.card import card
from sordino.serving.claims import FIELDS, Spending, check_prompt, check_summary
from sordino.serving.manifest import AUDIT, CARD, LEDGER, PROMPT, STATEMENT, Audit, Facts, facts_of
from sordino.serving.registry import Published

LARGEST = 1 << 28  # bytes of a file
MEASURES = ("local", "neighbor", "overall")
ENDING = ".safetensors"


@dataclass(frozen=True)
class Material:
    """The material of a version, before it has a name.

    Attributes:
        facts: what the prompt is.
        files: by name, their content.
        statement: of privacy, which is signed before it is a file too; None without a run.
    """

    facts: Facts
    files: Mapping[str, bytes]
    statement: Mapping[str, Any] | None = None

    def signed(self, key: Ed25519PrivateKey) -> Material:
        """Return it with the statement among the files, signed."""
        if self.statement is None:
            return self
        envelope = json.dumps(sealed(self.statement, key), indent=1) + "\n"
        return Material(self.facts, {**self.files, STATEMENT: envelope.encode()})


def from_run(folder: Path, key: Ed25519PrivateKey, client: int | None = None) -> Material:
    """Read a prompt of a finished run directory as `read_run` does, and sign its statement."""
    return read_run(folder, client).signed(key)


def read_run(folder: Path, client: int | None = None) -> Material:
    """Read a prompt of a finished run directory; its statement is not signed yet.

    Args:
        folder: the run directory.
        client: whose prompt; None for the one that all share, or that is alone.

    Raises:
        ConfigError: the run has no such prompt.
        RunError: the run is unfinished or damaged, or its files do not belong together.
        PromptError: the prompt is damaged, or is not of this run.
    """
    file = _prompt_file(folder, client)
    texts = {name: _read(folder / name) for name in (SUMMARY, LEDGER)}
    try:
        summary = Summary.from_json(texts[SUMMARY])
    except (ValueError, RecursionError) as error:
        raise RunError(f"{folder / SUMMARY} is damaged ({error}); finish the run with --resume") from None
    content = _read(file)
    saved = SavedPrompt.from_bytes(content, str(file))
    ledger = Ledger.from_json(texts[LEDGER], folder / LEDGER)
    told = {name: getattr(summary.privacy, name) for name in ("private", "simulated", "statement")}
    if saved.privacy.ledger_sha256 != hashlib.sha256(texts[LEDGER]).hexdigest() or told != {
        name: getattr(saved.privacy, name) for name in told
    }:
        raise PromptError(f"{file}: is not of the run whose {LEDGER} and {SUMMARY} lie above it; put its own there")
    spent = Spending.of(ledger)
    check_prompt(saved.privacy, spent, str(file))
    check_summary(summary.privacy, spent, str(folder / SUMMARY))
    files = {PROMPT: _told_anew(saved, spent, content), LEDGER: _public(ledger)}
    audit = None
    if (folder / AUDIT).exists():
        files[AUDIT] = _read(folder / AUDIT)
        audit = _audit(str(folder / AUDIT), files[AUDIT], ledger, spent)
    facts = _facts(saved, spent, audit, _training(summary, saved.client))
    return Material(facts, files, statement_of(folder, judge))


def from_file(file: Path, ledger_file: Path) -> Material:
    """Read a prompt without its run, as a site keeps it of an experiment across machines.

    Args:
        file: of the prompt.
        ledger_file: `ledger.json`, or a site's own file of what an experiment released.

    Raises:
        ConfigError: one of them lies in a run directory, which says more of the prompt.
        PromptError: the prompt is damaged, or says another privacy than the ledger, or the ledger is another one's.
        RunError: the ledger is damaged.
    """
    _require_no_run(file, ledger_file)
    content = _read(file)
    saved = SavedPrompt.from_bytes(content, str(file))
    text = _read(ledger_file)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise RunError(f"{ledger_file} is no ledger; give the ledger.json of the run, or the site's own") from None
    if isinstance(document, dict) and isinstance(document.get("ledger"), dict):  # a site's has its rounds beside it
        text = json.dumps(document["ledger"]).encode()
    ledger = Ledger.from_json(text, ledger_file)
    if saved.privacy.ledger_sha256 is None:
        raise PromptError(f"{file}: was learned without a ledger, as private tuning does; nothing bounds what it tells")
    if saved.privacy.ledger_sha256 != ledger.digest():
        raise PromptError(f"{file}: was learned under another ledger than {ledger_file}; give its own")
    spent = Spending.of(ledger)
    check_prompt(saved.privacy, spent, str(file))
    return Material(
        _facts(saved, spent, None, None), {PROMPT: _told_anew(saved, spent, content), LEDGER: _public(ledger)}
    )


def check_claim(found: Published) -> None:
    """Check that a version that was signed elsewhere says what its ledger comes to, counted anew, and its audit shows.

    Its card must be the one that `card` writes of its manifest, so that it says nothing else.

    Raises:
        PromptError: it says something else, or its ledger is none.
    """
    manifest, said = found.manifest, found.manifest.privacy
    remedy = "ask its publisher for another"
    try:
        ledger = Ledger.from_json(found.files[LEDGER])
        spent = Spending.of(ledger)
    except (SordinoError, ValueError, TypeError, ArithmeticError) as error:
        raise PromptError(f"{found.place}: {LEDGER} cannot be counted ({error}); {remedy}") from None
    wrong = spent.difference({name: getattr(said, name) for name in FIELDS})
    wrong = wrong or spent.difference_in_words(said.statement)
    if wrong:
        raise PromptError(f"{found.place}: claims another privacy than {LEDGER}: {wrong}; {remedy}")
    remedy = "ask its publisher to publish it again, with the version of Sordino that is here"
    if said.statement != spent.as_said(said.epsilon):
        raise PromptError(f"{found.place}: its statement of privacy is not in the words of {LEDGER}; {remedy}")
    try:
        audit = _audit(AUDIT, found.files[AUDIT], ledger, spent) if AUDIT in found.files else None
    except RunError as error:
        raise PromptError(f"{found.place}: {error}") from None
    if manifest.audit != (None if audit is None else Audit.model_validate(audit)):
        raise PromptError(f"{found.place}: tells of other attacks than {AUDIT}; {remedy}")
    others = sorted(name for name in found.files if name != CARD)
    if found.files[CARD] != card(manifest.model_copy(update={"files": {}}), others).encode():
        raise PromptError(f"{found.place}: {CARD} is not the card of its manifest; {remedy}")


def _prompt_file(folder: Path, client: int | None) -> Path:
    prompts = folder / "prompts"
    found = sorted(prompts.glob(f"*{ENDING}"))
    if not found:
        remedy = "a finished run directory with prompts in it" if folder.is_dir() else "a run directory"
        raise ConfigError("RUN", str(folder), f"no prompts/*{ENDING} in it; give {remedy}")
    shared = prompts / f"shared{ENDING}"
    if client is None:
        if len(found) == 1:
            return found[0]
        raise ConfigError("--client", None, f"this run has {len(found)} prompts; say whose, as --client 0")
    chosen = prompts / f"client-{client:04d}{ENDING}"
    if chosen not in found:
        what = "all clients share one prompt; leave this out" if shared in found else "no such client has a prompt here"
        raise ConfigError("--client", client, what)
    return chosen


def _require_no_run(*files: Path) -> None:
    """Check that files lie in no run directory, nor in a folder of one: a run's prompt goes with its audit.

    Raises:
        ConfigError: one does, or a link leads there.
    """
    for file in files:
        for place in (file.absolute(), file.resolve()):
            runs = [
                folder for folder in place.parents[:2] if any((folder / name).exists() for name in (SUMMARY, AUDIT))
            ]
            if runs:
                told = f"lies in the run directory {runs[0]}, whose audit and accuracy belong to it; give that instead"
                raise ConfigError("RUN", str(file), told)


def _told_anew(saved: SavedPrompt, spent: Spending, content: bytes) -> bytes:
    """Return the content of a prompt's file with the statement of its ledger; most files have it."""
    if saved.privacy.statement == spent.statement:
        return content
    return replace(saved, privacy=saved.privacy.model_copy(update={"statement": spent.statement})).to_bytes()


def _facts(saved: SavedPrompt, spent: Spending, audit: dict[str, Any] | None, training: dict[str, Any] | None) -> Facts:
    return facts_of(
        method=saved.method,
        task=saved.task,
        client=saved.client,
        class_names=saved.class_names,
        encoder={"name": saved.encoder.name, "fingerprint": saved.encoder.fingerprint},
        privacy=asdict(spent) | {"ledger_sha256": saved.privacy.ledger_sha256},
        audit=audit,
        training=training,
        words=saved.words,
    )


def _public(ledger: Ledger) -> bytes:
    """Return a ledger without what would let others confirm pictures; see the module."""
    return ledger.for_others().to_json().encode()


def _audit(file: str, content: bytes, ledger: Ledger, spent: Spending) -> dict[str, Any]:
    """Return what attacks found.

    Raises:
        RunError: the audit is damaged, or of another run.
    """
    try:
        found = json.loads(content)
        claimed, attacks = found["claimed"]["epsilon"], found["attacks"]
        made = {name: attacks[name] for name in ATTACKS if name in attacks}
        words = {
            name: {"found": tuple(result_words(name, result)), "epsilon": _bound(result)}
            for name, result in made.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({cause(error)}); repeat 'sordino audit'") from None
    if spent.difference({"epsilon": claimed}):
        raise RunError(f"{file} is of a run with another claim; repeat 'sordino audit', or remove it")
    return {"attacks": words, "refuted": judge(found, ledger, spent.unit or "example")[2]}


def _bound(result: Any) -> float | None:
    """Return the largest lower bound on epsilon in an attack's result, at any depth."""
    if not isinstance(result, dict):
        return None
    bounds = [float(value) for name, value in result.items() if name == "epsilon" and isinstance(value, int | float)]
    bounds += [bound for value in result.values() if (bound := _bound(value)) is not None]
    return max((bound for bound in bounds if math.isfinite(bound) and bound >= 0), default=None)


def _training(summary: Summary, client: int | None) -> dict[str, Any]:
    """Return the accuracy of a prompt's own client, or the mean over clients, beside the hand-written prompt's."""
    own = next((result for result in summary.per_client if result.client == client), None)
    hand = summary.hand_written
    written: Any = None
    if hand is not None:
        written = hand.accuracy if client is None else dict(enumerate(hand.per_client)).get(client)
    return {
        "dataset": dataset_name(summary.dataset),
        "clients": summary.clients,
        "rounds": summary.rounds,
        "of": "mean" if own is None else "client",
        "accuracy": _measures(summary.accuracy if own is None else own),
        "hand_written": None if written is None else _measures(written),
        "words": None if hand is None else hand.prompt,
    }


def _measures(result: Any) -> dict[str, float | None]:
    return {name: getattr(result, name) for name in MEASURES}


def _read(file: Path) -> bytes:
    try:
        return read_regular(file, LARGEST)
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror or error}); give a finished run directory") from None
    except DataError as error:
        raise RunError(f"{file} cannot be read ({error}); give a finished run directory") from None
