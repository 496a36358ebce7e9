"""A published version as a folder of files, in the layout of Hugging Face: to hand on, and to check without a registry.

The folder holds the version's files, `manifest.json` as it was signed, and `signature.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from sordino.errors import ConfigError, DataError, PromptError, RunError
from sordino.files import read_regular, replace_file
from sordino.privacy.signature import fingerprint
from sordino.serving.manifest import CHANGED, FILES, MAX_MANIFEST, Manifest, Sealed, check_files
from sordino.serving.registry import MAX_BYTES, Published
from sordino.serving.trust import Trusted

MANIFEST, SIGNATURE = "manifest.json", "signature.json"
MAX_SIGNATURE = 1 << 10  # bytes; it has less than half of them


def export(published: Published, out: Path) -> None:
    """Write a version into a new folder, whole or not at all.

    Raises:
        ConfigError: the folder exists.
        RunError: it cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError("--out", str(out), "is there already; give a folder that does not exist")
    content = {
        **published.files,
        MANIFEST: published.sealed.text,
        SIGNATURE: _signature(published.sealed),
    }
    draft = out.with_name(f".{uuid4().hex}.tmp")
    try:
        for name, part in content.items():
            replace_file(draft / name, part)
        os.rename(draft, out)  # noqa: PTH104  # of an empty folder's name alone, unlike shutil.move
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}; free space or give another --out") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_folder(folder: Path, trusted: Trusted | None = None) -> Published:
    """Read a folder that `export` wrote, and check all of it.

    Args:
        folder: of the version.
        trusted: publishers; None: whoever signed.

    Raises:
        PromptError: a file is missing or was changed, or somebody signed it who is not trusted.
    """
    _require_no_other(folder)
    content = {name: _read(folder / name, MAX_BYTES) for name in FILES if _is_there(folder / name)}
    content[MANIFEST] = _read(folder / MANIFEST, MAX_MANIFEST)
    content[SIGNATURE] = _read(folder / SIGNATURE, MAX_SIGNATURE)
    return read_files(content, str(folder), trusted)


def read_files(content: Mapping[str, bytes], place: str, trusted: Trusted | None = None) -> Published:
    """Check the files that a folder of `export` has.

    Nothing but `signature.json` is parsed before it is known that somebody trusted signed it.

    Args:
        content: by name; `manifest.json` and `signature.json` are there.
        place: for messages.
        trusted: publishers; None: whoever signed.

    Raises:
        PromptError: see `read_folder`.
    """
    files = dict(content)
    text, manifest_text = files.pop(SIGNATURE), files.pop(MANIFEST)
    if len(text) > MAX_SIGNATURE:
        raise PromptError(f"{place}: {SIGNATURE} is too large: {CHANGED}")
    try:
        told: Any = json.loads(text)
        sealed = Sealed(manifest_text, str(told["signature"]), bytes.fromhex(told["public_key"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PromptError(f"{place}: {SIGNATURE} is damaged: {CHANGED}") from None
    if text != _signature(sealed):
        raise PromptError(f"{place}: {SIGNATURE} is not as it was written: {CHANGED}")
    manifest: Manifest = sealed.open(place, trusted)
    check_files(manifest, files, place)
    return Published(manifest, sealed, files, None, place)


def _signature(sealed: Sealed) -> bytes:
    """Return the content of `signature.json`."""
    content = {
        "algorithm": "Ed25519",
        "public_key": sealed.public_key.hex(),
        "fingerprint": fingerprint(sealed.public_key),
        "signature": sealed.signature,
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _require_no_other(folder: Path) -> None:
    """Check that nothing lies in a folder that nobody signed; hidden files are left to Git and hubs, which add some.

    Raises:
        PromptError: something does.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return  # the first file that is read tells why
    for name in names:
        if name not in (*FILES, MANIFEST, SIGNATURE) and not name.startswith("."):
            raise PromptError(f"{folder}: {name!r} is not of this version, and nobody signed it; remove it")


def _is_there(file: Path) -> bool:
    try:
        return not stat.S_ISDIR(file.stat().st_mode)
    except OSError:
        return False


def _read(file: Path, limit: int) -> bytes:
    try:
        return read_regular(file, limit)
    except FileNotFoundError:
        raise PromptError(f"{file.parent}: {file.name} is missing; give a folder of 'sordino prompts export'") from None
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"{file.parent}: {file.name} cannot be read ({reason}); export it again") from None
