"""A privacy statement as a page or as JSON, its signature, and the check of both.

A file holds three things: the `statement`, in plain data and with the words that its page shows; `page_sha256`, the
digest of that page without the data inside it; and the `signature` of the other two, in Base64, or null. The public key
is part of the statement, and so is signed too.

A page is checked twice: by the signed digest, which any version of Sordino can do, and by laying it out again from its
data, which only the version that wrote it can do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import sordino
from sordino.errors import DataError, StatementError
from sordino.files import ANOTHER_OUT, read_regular, write_atomically
from sordino.privacy.signature import fingerprint, public_bytes, sign, signed_by
from sordino.report.document import Block, Document, Section, document_page

KIND, FORMAT = "sordino privacy statement", 1
LARGEST = 16 * 2**20  # bytes of a file that is read

_OPENING = '<script type="application/json" id="statement">'
_CLOSING = "</script>\n"
_CHANGED = "it was changed after it was written; ask for the original"


@dataclass(frozen=True)
class Checked:
    """A statement that was found unchanged.

    Attributes:
        statement: its content.
        signer: the fingerprint of the key that signed it; None if nobody did.
        by_given_key: whether this is the key that the reader gave; else anybody may have signed.
        laid_out_again: whether the page was compared with one made of its data; else by its digest alone.
    """

    statement: dict[str, Any]
    signer: str | None
    by_given_key: bool
    laid_out_again: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the result of the check, without the statement, for JSON."""
        return {
            "unchanged": True,
            "signed": self.signer is not None,
            "fingerprint": self.signer,
            "by_given_key": self.by_given_key,
            "laid_out_again": self.laid_out_again,
            "verdict": self.statement["verdict"],
        }

    def as_text(self, file: Path) -> str:
        """Return the result of the check in lines, what it leaves open among them."""
        lines = [f"{file}: unchanged since it was written on {self.statement['written']}."]
        if self.signer is None:
            lines.append("Not signed: it shows who wrote it by nothing.")
        elif self.by_given_key:
            lines.append(f"Signed by the key that you gave, {self.signer}.")
        else:
            lines += [
                f"Signed by the key {self.signer}, which the file itself names.",
                "Anybody can sign with a key of their own: compare this fingerprint with the one that you had from the "
                "signer, or give --public-key.",
            ]
        if not self.laid_out_again:
            version = self.statement["versions"]["sordino"]
            lines.append(
                f"Sordino {version} wrote it: the page was compared by its signed digest, and not laid out again."
            )
        return "\n".join([*lines, f"It says: {self.statement['document']['banner']}"])


def sealed(content: Mapping[str, Any], key: Ed25519PrivateKey | None) -> dict[str, Any]:
    """Return what a file holds: the statement, its page's digest, and the signature if there is a key."""
    public = None if key is None else public_bytes(key)
    signer = None if public is None else {"public_key": public.hex(), "fingerprint": fingerprint(public)}
    statement = dict(content) | {"signer": signer}
    digest = _page_digest(statement)
    signature = None if key is None else sign(key, _message(statement, digest))
    return {"statement": statement, "page_sha256": digest, "signature": signature}


def as_page(envelope: Mapping[str, Any]) -> str:
    """Return a page that shows a statement, and holds the whole file's data."""
    return _page(envelope["statement"], f"{_OPENING}{_embedded(envelope)}{_CLOSING}")


def write(envelope: Mapping[str, Any], out: Path) -> None:
    """Write a statement: as JSON if `out` ends with .json, else as a page.

    Raises:
        RunError: it cannot be written.
    """
    text = json.dumps(envelope, indent=2) + "\n" if out.suffix.lower() == ".json" else as_page(envelope)
    write_atomically(out, _bytes(text), ANOTHER_OUT)


def check(file: Path, public_key: bytes | None = None) -> Checked:
    """Check that a file is a statement which nobody changed since it was written, and by whom it was signed.

    1. The file has the parts of a statement, each once, and nothing else.
    2. The signature is right, if there is one, for the key that the statement names.
    3. The page around the data has the digest that was signed.
    4. If this version of Sordino wrote it, the page is the one that its data make, to the byte.

    Args:
        file: a page or JSON.
        public_key: 32 bytes, of whoever should have signed; None accepts any key, and no signature at all.

    Raises:
        StatementError: one of these is not so.
    """
    try:
        content = read_regular(file, LARGEST)
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StatementError(f"{file}: cannot be read ({reason}); give a file of 'sordino privacy statement'") from None
    envelope, around = _parts(file, content)
    statement, digest = envelope["statement"], envelope["page_sha256"]
    signer = _signer(file, envelope, public_key)
    if around is not None and hashlib.sha256(around).hexdigest() != digest:
        raise StatementError(f"{file}: the text of the page is not the one that was written: {_CHANGED}")
    same_version = statement["versions"]["sordino"] == sordino.__version__
    if same_version and _laid_out(file, statement) != digest:
        raise StatementError(
            f"{file}: the page does not follow from its data: {_CHANGED}, or check it with the very build of Sordino "
            f"{sordino.__version__} that wrote it"
        )
    return Checked(statement, signer, public_key is not None, same_version)


def _parts(file: Path, content: bytes) -> tuple[dict[str, Any], bytes | None]:
    """Return what a file holds, and of a page the bytes around its data."""
    try:
        text = content.decode()
        around = None
        data = text
        if not text.lstrip().startswith("{"):
            before, after = text.split(_OPENING)
            data, after = after.split(_CLOSING, 1)
            around = _bytes(before + after)
        envelope = json.loads(data, object_pairs_hook=_each_once, parse_constant=_no_number)
        if set(envelope) != {"statement", "page_sha256", "signature"} or envelope["statement"]["kind"] != KIND:
            raise ValueError
        number = envelope["statement"]["format"]
        str(envelope["statement"]["versions"]["sordino"])
        again = _embedded(envelope)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StatementError(
            f"{file}: is no privacy statement, or a damaged one; give a file of 'sordino privacy statement'"
        ) from None
    if number != FORMAT:
        raise StatementError(
            f"{file}: has format {number!r}, and this version reads {FORMAT}; use the one that wrote it"
        )
    if around is not None and again != data:
        raise StatementError(f"{file}: its data are not as they were written: {_CHANGED}")
    return envelope, around


def _signer(file: Path, envelope: Mapping[str, Any], public_key: bytes | None) -> str | None:
    """Return the fingerprint of the key that signed; None for nobody.

    Raises:
        StatementError: the signature is wrong or missing, or another key made it.
    """
    statement, signature = envelope["statement"], envelope["signature"]
    named = statement.get("signer")
    if named is None and signature is None:
        if public_key is not None:
            raise StatementError(f"{file}: is not signed; ask for one that is, made with --key")
        return None
    try:
        embedded = bytes.fromhex(named["public_key"])
        right = signed_by(embedded, signature, _message(statement, envelope["page_sha256"]))
        right = right and named == {"public_key": embedded.hex(), "fingerprint": fingerprint(embedded)}
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise StatementError(f"{file}: its signature is not that of its content: {_CHANGED}")
    if public_key is not None and embedded != public_key:
        raise StatementError(
            f"{file}: was signed by the key {fingerprint(embedded)}, and --public-key is {fingerprint(public_key)}; "
            "somebody else signed it"
        )
    return fingerprint(embedded)


def _laid_out(file: Path, statement: Mapping[str, Any]) -> str:
    try:
        return _page_digest(statement)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise StatementError(f"{file}: its data do not make a page: {_CHANGED}") from None


def _page_digest(statement: Mapping[str, Any]) -> str:
    return hashlib.sha256(_bytes(_page(statement, ""))).hexdigest()


def _page(statement: Mapping[str, Any], after: str) -> str:
    document = cast(Document, statement["document"])
    section = _signature(cast("dict[str, str] | None", statement["signer"]))
    return document_page({**document, "sections": [*document["sections"], section]}, after)


def _signature(signer: Mapping[str, str] | None) -> Section:
    """Return the section that says who signed."""
    if signer is None:
        blocks: list[Block] = [
            {"warning": "Not signed: anybody can have written or changed this page."},
            {"text": "sordino privacy verify FILE --run RUN compares it with the run, for whoever has that."},
        ]
    else:
        blocks = [
            {
                "text": "Signed with Ed25519. Check it with: sordino privacy verify FILE --public-key PEM. Anybody can "
                "sign with a key of their own, so compare the key's fingerprint with one that you had from its owner."
            },
            {"text": f"Fingerprint of the public key (SHA-256): {signer['fingerprint']}"},
            {"text": f"Public key (32 bytes in hex): {signer['public_key']}"},
        ]
    return {"title": "Signature", "blocks": blocks}


def _message(statement: Mapping[str, Any], page_digest: str) -> bytes:
    """Return the bytes that are signed; their first line keeps them apart from all else that a key may sign."""
    signed = {"page_sha256": page_digest, "statement": statement}
    text = json.dumps(signed, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{KIND} {FORMAT}\n{text}".encode()


def _embedded(envelope: Mapping[str, Any]) -> str:
    """Return the data as they stand in a page; no "<" is left that could end them."""
    text = json.dumps(envelope, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda sign: f"\\u{ord(sign[0]):04x}", text)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a file's name may hold bytes that are no text


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that names a key twice, of which two readers might take another one each."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice")
    return content


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
