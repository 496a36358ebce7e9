"""The registry: versions of prompts in a database, each whole, signed, and never changed.

A version's row, files and signature are written in one transaction. Nothing of a row is believed on a load: the
signature must be that of the manifest, the key one that the reader trusts, every file the one that the manifest names,
and every column what the manifest says. So whoever can write into the database can remove versions, but neither change
one nor add one of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Row, func, select
from sqlalchemy.exc import IntegrityError

from sordino.errors import ConfigError, PromptError, RunError
from sordino.privacy.signature import fingerprint, public_bytes
from sordino.serving.card import card
from sordino.serving.database import Database
from sordino.serving.manifest import (
    CARD,
    MOMENT,
    Facts,
    Manifest,
    Sealed,
    check_files,
    check_mark,
    check_name,
    is_too_large,
    record,
)
from sordino.serving.rows import Withdrawal, all_rows, columns_of, content_of, files_of, label, opened, withdrawal
from sordino.serving.tables import files, prompts, withdrawals
from sordino.serving.trust import Trusted

ATTEMPTS: Final = 200  # to get a version's number, where others publish under the same name
MAX_BYTES: Final = 1 << 28  # of all files of a version
LONGEST_REASON: Final = 500
NO_NUMBER: Final = (1 << 31) - 1  # no version has it


class WithdrawnError(PromptError):
    """A version that was withdrawn, and when and why."""

    def __init__(self, place: str, withdrawal: Withdrawal) -> None:
        self.withdrawal = withdrawal
        super().__init__(f"{place}: is withdrawn since {withdrawal.at} ({withdrawal.reason}); take another version")


@dataclass(frozen=True, eq=False)
class Published:
    """One version, checked.

    Attributes:
        manifest: what it is.
        sealed: the manifest as it was signed.
        files: by name, their content.
        withdrawn: None for one that may be used.
        place: where it is from, for messages.
    """

    manifest: Manifest
    sealed: Sealed
    files: Mapping[str, bytes]
    withdrawn: Withdrawal | None
    place: str

    @property
    def card(self) -> str:
        """The card's text, which is the publisher's: it may say anything, and need not even be UTF-8."""
        return self.files[CARD].decode("utf-8", "replace")


@dataclass(frozen=True)
class Listed:
    """A version as a list shows it: manifest and row are checked, but not its files.

    Attributes:
        name, version: as its row says; 0 for a version that is no number.
        manifest: None where it is damaged.
        fault: in words, what is wrong with it; "" if nothing is.
        trusted: whether a trusted key signed it.
        withdrawn: None for one that may be used.
    """

    name: str
    version: int
    manifest: Manifest | None
    fault: str
    trusted: bool
    withdrawn: Withdrawal | None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        manifest = self.manifest
        told = None if manifest is None else manifest.model_dump(mode="json") | {"mark": manifest.mark}
        withdrawn = None if self.withdrawn is None else {"at": self.withdrawn.at, "reason": self.withdrawn.reason}
        return {
            "name": self.name,
            "version": self.version,
            "fault": self.fault or None,
            "trusted": self.trusted,
            "withdrawn": withdrawn,
            "manifest": told,
        }


class Registry:
    """Published prompts in a database.

    Args:
        url: of the database; None: `$SORDINO_REGISTRY`, or `sqlite:///prompts.db` in the working folder.
        create: make a registry where there is none.

    Raises:
        ConfigError, RunError: see `Database`.
    """

    def __init__(self, url: str | None = None, create: bool = False) -> None:
        self.database = Database(url, create)
        self.label = self.database.label

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self.database.close()

    def publish(
        self,
        name: str,
        facts: Facts,
        content: Mapping[str, bytes],
        key: Ed25519PrivateKey,
        accept_not_private: bool = False,
    ) -> Manifest:
        """Store the next version of a prompt: all of it, on the disk when this returns, or nothing.

        Args:
            name: under which it is published.
            facts: what it is.
            content: its files, without the card, which is written here.
            key: signs it.
            accept_not_private: publish a prompt with a mark, see `Facts.mark`.

        Returns:
            The manifest, with the version's number.

        Raises:
            ConfigError: the name is not allowed, or the prompt has a mark that was not accepted.
            PromptError: its files are too large.
            RunError: it cannot be written.
        """
        check_name(name)
        check_mark(facts, accept_not_private)
        if sum(map(len, content.values())) > MAX_BYTES:
            raise PromptError(f"{name}: its files have more than the {MAX_BYTES:,} bytes that a version may have")
        for _ in range(ATTEMPTS):
            try:
                with self.database.writing() as connection:
                    return _insert(connection, name, facts, content, key)
            except IntegrityError:  # another process took the number
                continue
        raise RunError(f"{name}: others publish under this name without a pause; repeat the command")

    def accept(self, found: Published) -> None:
        """Store a version that was signed elsewhere, as it is; the caller has checked it, and trusts its publisher.

        Raises:
            ConfigError: its version is not the next one of its name, or another process took it.
            RunError: it cannot be written.
        """
        manifest = found.manifest
        try:
            with self.database.writing() as connection:
                following = _following(connection, manifest.name)
                if manifest.version != following:
                    raise ConfigError("version", manifest.version, f"the next one of {manifest.name} is {following}")
                _write(connection, manifest, found.sealed, found.files)
        except IntegrityError:
            raise ConfigError("version", manifest.version, "somebody else published it at the same time") from None

    def load(self, name: str, version: int | None = None, trusted: Trusted | None = None) -> Published:
        """Read a version that may be used, and check all of it.

        Args:
            name: of the prompt.
            version: None: the latest that is not withdrawn. Where that one is damaged, no older one takes its place.
            trusted: publishers; None: those of the user's configuration.

        Raises:
            ConfigError: there is no such prompt or version.
            PromptError: it is withdrawn or was changed, or somebody signed it who is not trusted.
        """
        found = self.inspect(name, version, Trusted.of() if trusted is None else trusted)
        if found.withdrawn is not None:
            raise WithdrawnError(found.place, found.withdrawn)
        return found

    def ping(self) -> None:
        """See that the registry can be read.

        Raises:
            RunError: it cannot.
        """
        with self.database.reading() as connection:
            connection.execute(select(prompts.c.id).limit(1)).first()

    def current(self, name: str, version: int | None = None) -> tuple[str, int, str]:
        """Return name, version and signature of a version that is not withdrawn, without reading its files.

        Raises:
            ConfigError, PromptError: there is none, or it is withdrawn; see `load`.
        """
        with self.database.reading() as connection:
            row = self._row(connection, name, version)
        withdrawn = withdrawal(row)
        if withdrawn is not None:
            raise WithdrawnError(self._place(row), withdrawn)
        return row.name, row.version, row.signature

    def inspect(self, name: str, version: int | None = None, trusted: Trusted | None = None) -> Published:
        """Read a version as `load` does, even one that is withdrawn; without `trusted` by whomever it is signed."""
        with self.database.reading() as connection:
            row = self._row(connection, name, version)
            content = files_of(connection, row)
        place = self._place(row)
        sealed, manifest = opened(row, place, trusted)
        found = content_of(content, place)
        check_files(manifest, found, place)
        return Published(manifest, sealed, found, withdrawal(row), place)

    def listed(self, trusted: Trusted | None = None, name: str | None = None) -> list[Listed]:
        """Return all versions, by name and version, whatever is wrong with them.

        Args:
            trusted: publishers; None: those of the user's configuration.
            name: of one prompt; None: of all.
        """
        known = Trusted.of() if trusted is None else trusted
        query = all_rows().order_by(prompts.c.name, prompts.c.version)
        with self.database.reading() as connection:
            rows = connection.execute(query if name is None else query.where(prompts.c.name == name)).all()
        answer = []
        for row in rows:
            manifest, fault, trust = None, "", False
            try:
                sealed, manifest = opened(row, self._place(row))
                trust = sealed.public_key in known
            except PromptError as error:
                fault = str(error).removeprefix(f"{self._place(row)}: ")
            answer.append(Listed(*label(row), manifest, fault, trust, withdrawal(row)))
        return answer

    def withdraw(self, name: str, version: int, reason: str) -> Withdrawal:
        """Withdraw a version for good: it stays, with the reason, and nobody is given it any more.

        Raises:
            ConfigError: there is no such version, it is withdrawn already, or the reason is no line of text.
            RunError: it cannot be written.
        """
        if not (reason.strip() and reason.isprintable() and len(reason) <= LONGEST_REASON):
            raise ConfigError("--reason", reason, f"say why, in one line of at most {LONGEST_REASON} characters")
        made = Withdrawal(_now(), reason)
        try:
            with self.database.writing() as connection:
                row = self._row(connection, name, version)
                connection.execute(withdrawals.insert().values(prompt=row.id, at=made.at, reason=made.reason))
        except IntegrityError:
            raise ConfigError("NAME", f"{name}:{version}", "is withdrawn already, which is for good") from None
        return made

    def _row(self, connection: Connection, name: str, version: int | None) -> Row[Any]:
        """Return a version's row; None is the latest one that is not withdrawn, or of those that are."""
        query = (
            all_rows().where(prompts.c.name == name).order_by(withdrawals.c.at.is_not(None), prompts.c.version.desc())
        )
        if version is not None:
            query = query.where(prompts.c.version == version)
        row = connection.execute(query.limit(1)).first()
        if row is None:
            label = name if version is None else f"{name}:{version}"
            remedy = "see 'sordino prompts list'"
            raise ConfigError("NAME", label, f"there is no such prompt in {self.label}; {remedy}")
        return row

    def _place(self, row: Row[Any]) -> str:
        name, version = label(row)
        return f"{name}:{version} in {self.label}"


def _insert(
    connection: Connection, name: str, facts: Facts, content: Mapping[str, bytes], key: Ed25519PrivateKey
) -> Manifest:
    """Enter the next version in a transaction.

    Raises:
        IntegrityError: another process entered this version in between.
    """
    about: dict[str, Any] = {
        **{field: getattr(facts, field) for field in Facts.model_fields},
        "name": name,
        "version": _following(connection, name),
        "created": _now(),
        "publisher": fingerprint(public_bytes(key)),
    }
    all_files = dict(content)
    all_files[CARD] = card(Manifest(**about, files={}), sorted(content)).encode()
    manifest = Manifest(**about, files={each: record(part) for each, part in all_files.items()})
    sealed = Sealed.of(manifest, key)
    if is_too_large(sealed.text):
        raise PromptError(f"{name}: has too many classes to be published")
    _write(connection, manifest, sealed, all_files)
    return manifest


def _following(connection: Connection, name: str) -> int:
    """Return the number of the next version of a name; those of withdrawn versions count."""
    # Of numbers alone: SQLite takes any value, and counts text as more than any of them.
    is_number = prompts.c.version < NO_NUMBER
    latest = connection.execute(select(func.max(prompts.c.version)).where(prompts.c.name == name, is_number)).scalar()
    return int(latest or 0) + 1


def _write(connection: Connection, manifest: Manifest, sealed: Sealed, content: Mapping[str, bytes]) -> None:
    values = columns_of(manifest) | {
        "manifest": sealed.text,
        "signature": sealed.signature,
        "public_key": sealed.public_key.hex(),
    }
    row = connection.execute(prompts.insert().values(values).returning(prompts.c.id)).scalar_one()
    entries = [{"prompt": row, "name": each, "content": part} for each, part in content.items()]
    connection.execute(files.insert(), entries)


def _now() -> str:
    return datetime.now(UTC).strftime(MOMENT)
