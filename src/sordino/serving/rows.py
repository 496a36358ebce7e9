"""Rows of a registry as they lie in the database, where whoever writes into it may put values of any type.

SQLite takes any value in any column. So values are fetched as they are, and checked here: no conversion by the way of a
query may break what is asked about other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, Row, select, type_coerce
from sqlalchemy.types import NullType

from sordino.errors import PromptError
from sordino.serving.manifest import CHANGED, Manifest, Sealed
from sordino.serving.tables import files, prompts, withdrawals
from sordino.serving.trust import Trusted

SHOWN = 500  # characters of a value that nobody checked


@dataclass(frozen=True)
class Withdrawal:
    """Why and when (UTC) a version was withdrawn."""

    at: str
    reason: str


def all_rows() -> Any:
    """Return the query of all versions' rows, with their withdrawals."""
    joined = prompts.outerjoin(withdrawals, withdrawals.c.prompt == prompts.c.id)
    return select(*map(_as_it_is, [*prompts.c, withdrawals.c.at, withdrawals.c.reason])).select_from(joined)


def columns_of(manifest: Manifest) -> dict[str, Any]:
    """Return what a row repeats of its manifest."""
    return {
        "name": manifest.name,
        "version": manifest.version,
        "created": manifest.created,
        "method": manifest.method,
        "task": manifest.task,
        "encoder": manifest.encoder.name,
        "fingerprint": manifest.encoder.fingerprint,
        "private": manifest.privacy.private,
        "simulated": manifest.privacy.simulated,
        "epsilon": manifest.privacy.epsilon,
    }


def label(row: Row[Any]) -> tuple[str, int]:
    """Return name and version as a row says; a version that is no number is 0, which none has."""
    return _shown(row.name), row.version if isinstance(row.version, int) else 0


def opened(row: Row[Any], place: str, trusted: Trusted | None = None) -> tuple[Sealed, Manifest]:
    """Read a row's manifest, and check its signature and that the columns say the same.

    Args:
        row: of the version.
        place: for messages.
        trusted: publishers; None: whoever signed.

    Raises:
        PromptError: one is not so.
    """
    _require_type(row.manifest, bytes, "manifest", place)
    _require_type(row.signature, str, "signature", place)
    _require_type(row.public_key, str, "public_key", place)
    try:
        sealed = Sealed(row.manifest, row.signature, bytes.fromhex(row.public_key))
    except ValueError:
        raise PromptError(f"{place}: the column 'public_key' of its row is damaged (no key): {CHANGED}") from None
    manifest = sealed.open(place, trusted)
    for column, value in columns_of(manifest).items():
        if getattr(row, column) != value:
            raise PromptError(f"{place}: the column {column!r} of its row is not what its manifest says: {CHANGED}")
    return sealed, manifest


def files_of(connection: Connection, row: Row[Any]) -> Sequence[Row[Any]]:
    """Return the rows of a version's files."""
    query = select(_as_it_is(files.c.name), _as_it_is(files.c.content)).where(files.c.prompt == row.id)
    return connection.execute(query).all()


def content_of(found: Sequence[Row[Any]], place: str) -> dict[str, bytes]:
    """Return the content of files by name.

    Raises:
        PromptError: one is none.
    """
    for each in found:
        _require_type(each.name, str, "name", f"{place}: a file")
        _require_type(each.content, bytes, "content", f"{place}: {_shown(each.name)}")
    return {each.name: each.content for each in found}


def withdrawal(row: Row[Any]) -> Withdrawal | None:
    """Return the withdrawal of a row's version; a damaged one holds too."""
    return None if row.at is None else Withdrawal(_shown(row.at), _shown(row.reason))


def _as_it_is(column: Column[Any]) -> Any:
    return type_coerce(column, NullType()).label(column.name)


def _require_type(value: object, kind: type, column: str, place: str) -> None:
    if not isinstance(value, kind):
        told = type(value).__name__
        raise PromptError(f"{place}: the column {column!r} of its row is damaged (of type {told}): {CHANGED}")


def _shown(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() and len(value) <= SHOWN else repr(value)[:SHOWN]
