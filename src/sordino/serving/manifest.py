"""The manifest of a published prompt: all that its publisher says of it, in one canonical text that is signed.

A manifest names the SHA-256 of every file of its version, so one signature covers prompt, ledger, statement, audit and
card. The text is JSON with sorted keys, in ASCII and without spaces: the same manifest has the same bytes, and a reader
accepts these bytes alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from sordino.errors import ConfigError, PromptError
from sordino.files import Record, json_pieces
from sordino.privacy.signature import fingerprint, public_bytes, sign, signed_by
from sordino.results.summary import MOST_PRIVATE_EPSILON
from sordino.results.wording import rounded_up
from sordino.serving.trust import Trusted

FORMAT: Final = "sordino published prompt 1"
PROMPT, LEDGER, STATEMENT, AUDIT, CARD = (
    "prompt.safetensors",
    "ledger.json",
    "statement.json",
    "audit.json",
    "README.md",
)
FILES = (PROMPT, LEDGER, STATEMENT, AUDIT, CARD)
MAX_MANIFEST = 1 << 24  # bytes
MOST_PIECES = 1 << 18  # of its JSON, see `json_pieces`: a class takes one
NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
LONGEST_NAME = 64
MOMENT: Final = "%Y-%m-%dT%H:%M:%SZ"  # UTC
WITHOUT_RUN = "Published without its run; whether it was attacked is not known here."
NOT_ATTACKED = "No attack on the run was tried."
CHANGED = "it was changed after it was signed; do not use it, and ask its publisher for it"


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


def _name(text: str) -> str:
    if not NAME.fullmatch(text) or len(text) > LONGEST_NAME:
        raise ValueError("must be lower-case letters and digits, with single dots, dashes or underscores between them")
    return text


def _file(name: str) -> str:
    if name not in FILES:
        raise ValueError(f"must be of {', '.join(FILES)}")
    return name


def _moment(text: str) -> str:
    if datetime.strptime(text, MOMENT).strftime(MOMENT) != text:
        raise ValueError(f"must be written as {MOMENT}")
    return text


Word = Annotated[str, Field(max_length=200), AfterValidator(_printable)]  # a column of the database
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0, le=1 + 1e-9)]
Epsilon = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(Record):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Part):
    """A file of a version: its SHA-256 in hex, and its size in bytes."""

    sha256: Digest
    size: Annotated[int, Field(ge=0)]


class Encoder(_Part):
    """The encoder that the prompt belongs to. Where it lay on the publisher's machine is no one else's business."""

    name: Word
    fingerprint: Word


class Privacy(_Part):
    """The privacy that training spent.

    Attributes:
        private: everything that was learned, and left a client or is published, was noised.
        simulated: the noise can be drawn again; then nothing is private.
        epsilon, delta, unit: towards the worst untrusted observer, by the ledger; None if there is no bound.
        statement: the guarantee and what it does not cover, in words.
        ledger_sha256: of the run's own ledger; the published one has neither its random name nor digests of data.
    """

    private: bool
    simulated: bool
    epsilon: Epsilon | None
    delta: Epsilon | None
    unit: Word | None
    statement: str
    ledger_sha256: Digest | None

    @property
    def bounded(self) -> bool:
        """True if there is an epsilon, and one that says something."""
        return self.epsilon is not None and self.epsilon <= MOST_PRIVATE_EPSILON


class Attack(_Part):
    """The finding of one attack on the run.

    Attributes:
        found: in lines of text.
        epsilon: the largest lower bound that it shows; None if it bounds nothing.
    """

    found: tuple[str, ...]
    epsilon: Epsilon | None


class Audit(_Part):
    """The attacks on the run, by name, and whether one contradicts its claim."""

    attacks: dict[Word, Attack]
    refuted: bool


class Accuracies(_Part):
    """Fractions in [0, 1] of test pictures; None where a measure does not apply."""

    local: Fraction | None = None
    neighbor: Fraction | None = None
    overall: Fraction | None = None


class Training(_Part):
    """The run that learned the prompt.

    Attributes:
        dataset: its name.
        clients, rounds: their numbers.
        of: whose accuracy it is: of the prompt's own client, or the mean over clients.
        accuracy: of the prompt.
        hand_written: of the words in `words` before the class name, on the same pictures; None if it is not known.
    """

    dataset: Word
    clients: Annotated[int, Field(ge=0)]
    rounds: Annotated[int, Field(ge=0)]
    of: Literal["client", "mean"]
    accuracy: Accuracies
    hand_written: Accuracies | None = None
    words: str | None = None


class Facts(_Part):
    """The facts of a prompt, whatever name it is published under.

    Attributes:
        method: that learned it.
        task: what it sorts into classes.
        client: whose own it is; None where all share it.
        class_names: in order.
        encoder, privacy: see there.
        audit: None if the run was not attacked, or is not known; see `attacks`.
        training: None if the prompt comes without its run.
        words: the prompt as text, which stands before a class name; None if it is vectors.
    """

    method: Word
    task: Literal["images", "text"]
    client: int | None
    class_names: tuple[str, ...]
    encoder: Encoder
    privacy: Privacy
    audit: Audit | None
    training: Training | None
    words: str | None = None

    LATER: ClassVar = ("words",)

    @property
    def mark(self) -> str:
        """Return what must be told wherever the prompt shows; "" for a private one that no attack contradicts."""
        if self.privacy.simulated:
            return "SIMULATED, NOT PRIVATE"
        if not self.privacy.private or not self.privacy.bounded:
            return "NOT PRIVATE"
        return "CLAIM CONTRADICTED" if self.audit is not None and self.audit.refuted else ""

    @property
    def attacks(self) -> Literal["unknown", "none", "tried", "contradicting"]:
        """The attacks on the run in a word. Only of a run that was read it is known that there were none."""
        if self.audit is None:
            return "unknown" if self.training is None else "none"
        return "contradicting" if self.audit.refuted else "tried"

    @property
    def promise(self) -> str:
        """The privacy in a few words: the mark, or epsilon."""
        if self.mark:
            return self.mark
        assert self.privacy.epsilon is not None  # or it would be marked
        if self.privacy.epsilon == 0:
            return "private: nothing was released"
        return f"epsilon = {rounded_up(self.privacy.epsilon, 4)} for each {self.privacy.unit}"


class Manifest(Facts):
    """A published version.

    Attributes:
        name, version: under which it is published; versions count from 1.
        created: when, UTC, as 2026-01-31T12:00:00Z.
        publisher: fingerprint of the public key that it is signed with.
        files: by name, all of them.
    """

    format: Literal["sordino published prompt 1"] = FORMAT
    name: Annotated[str, AfterValidator(_name)]
    version: Annotated[int, Field(ge=1)]
    created: Annotated[str, Field(pattern=r"^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z$"), AfterValidator(_moment)]
    publisher: Word
    files: dict[Annotated[str, AfterValidator(_file)], FileRecord]

    @property
    def label(self) -> str:
        """Name and version, as commands take them."""
        return f"{self.name}:{self.version}"

    def to_bytes(self) -> bytes:
        """Return the canonical text."""
        content = self.model_dump(mode="json")
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


@dataclass(frozen=True)
class Sealed:
    """A manifest's text as it was signed, with the signature in Base64 and the public key's 32 bytes."""

    text: bytes
    signature: str
    public_key: bytes

    @classmethod
    def of(cls, manifest: Manifest, key: Ed25519PrivateKey) -> Sealed:
        """Sign a manifest."""
        text = manifest.to_bytes()
        return cls(text, sign(key, _signed(text)), public_bytes(key))

    def open(self, place: str, trusted: Trusted | None = None) -> Manifest:
        """Check the signature, and read the manifest.

        Args:
            place: the beginning of a message.
            trusted: publishers, whose manifests alone are parsed; None: whoever signed.

        Raises:
            PromptError: the text is not what the key signed, the key is not trusted, or it is no manifest of this
                version.
        """
        if not signed_by(self.public_key, self.signature, _signed(self.text)):
            raise PromptError(f"{place}: the signature is not that of its manifest: {CHANGED}")
        if trusted is not None:
            trusted.require(self.public_key, place)
        try:
            found = "too large" if is_too_large(self.text) else json.loads(self.text)["format"]
            if found != FORMAT:
                raise PromptError(
                    f"{place}: its format is {found!r}, and this version reads {FORMAT!r}; update Sordino"
                )
            manifest = Manifest.model_validate_json(self.text)
        except (ValidationError, ValueError, KeyError, TypeError, RecursionError):
            raise PromptError(
                f"{place}: its manifest is signed, but malformed; ask its publisher for another"
            ) from None
        if manifest.to_bytes() != self.text:
            raise PromptError(
                f"{place}: its manifest is signed, but not in canonical form; ask its publisher for another"
            )
        if manifest.publisher != fingerprint(self.public_key):
            raise PromptError(f"{place}: its manifest names another publisher than the key that signed it: {CHANGED}")
        if not {PROMPT, LEDGER, CARD} <= manifest.files.keys():
            raise PromptError(f"{place}: its manifest lacks the prompt, the ledger or the card; ask its publisher")
        return manifest


def is_too_large(text: bytes) -> bool:
    """Tell whether a manifest has more bytes or values than one may have, without parsing it."""
    return len(text) > MAX_MANIFEST or json_pieces(text) > MOST_PIECES


def check_mark(facts: Facts, accepted: bool) -> None:
    """Check that a prompt has no mark, or that its mark was accepted.

    Raises:
        ConfigError: it was not.
    """
    if facts.mark and not accepted:
        raise ConfigError(
            "--accept-not-private",
            False,
            f"this prompt is marked {facts.mark} and stays so wherever it shows ({facts.privacy.statement}); give "
            "this option if that is meant",
        )


def record(content: bytes) -> FileRecord:
    """Return the record of a file's content."""
    return FileRecord(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def check_files(manifest: Manifest, files: Mapping[str, bytes], place: str) -> None:
    """Check that files are those of a manifest, all of them and no others.

    Raises:
        PromptError: one is missing, too many, or has other content.
    """
    for name in sorted({*manifest.files, *files}):
        if name not in files:
            raise PromptError(f"{place}: {name} is missing; ask its publisher for it")
        if name not in manifest.files:
            raise PromptError(f"{place}: {name} is not of this version: {CHANGED}")
        if record(files[name]) != manifest.files[name]:
            raise PromptError(f"{place}: {name} has another SHA-256 than its manifest says: {CHANGED}")


def check_name(name: str, option: str = "--name") -> str:
    """Return a name under which a prompt may be published.

    Raises:
        ConfigError: it is none.
    """
    try:
        return _name(name)
    except ValueError as error:
        raise ConfigError(option, name, f"{error}; at most {LONGEST_NAME} characters, as in fabric-faults") from None


def parse_label(label: str, option: str = "NAME") -> tuple[str, int | None]:
    """Return name and version of NAME or NAME:VERSION; no version is the latest one.

    Raises:
        ConfigError: it is neither.
    """
    name, colon, number = label.partition(":")
    if colon and not (number.isascii() and number.isdigit() and len(number) < 10 and int(number) > 0):
        raise ConfigError(option, label, "write NAME, or NAME:VERSION with a version from 1, as fabric-faults:2")
    return check_name(name, option), int(number) if colon else None


def facts_of(**parts: Any) -> Facts:
    """Return facts of plain data.

    Raises:
        PromptError: one is not allowed; the message names it.
    """
    try:
        return Facts.model_validate(parts)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise PromptError(f"cannot be published: {place}: {first['msg'].lower()}; see docs/serving.md") from None


def _signed(text: bytes) -> bytes:
    """Return what a signature is of: no other document of Sordino's starts like this."""
    return b"sordino published prompt " + hashlib.sha256(text).hexdigest().encode()
