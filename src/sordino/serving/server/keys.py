"""The API's keys: made by command, hashed at rest, with scopes and limits; and the pictures that each had today.

A key is 256 random bits, so a plain SHA-256 of it cannot be inverted by guessing. The count of a day's pictures is kept
in the database: it is the budget against copying a prompt by its answers, and outlives a restart. No answer waits
for the disk: where the power fails, the pictures of the last moments may be forgotten.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Row, bindparam, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from sordino.errors import ConfigError
from sordino.randomness import system_bytes
from sordino.serving.database import Database
from sordino.serving.tables import api_keys, asked

SCOPES: Final = ("read", "classify", "publish")
USUAL: Final = ("read", "classify")  # of a new key, and of whoever asks a server without keys
PREFIX: Final = "sordino_"
ANYBODY: Final = "anybody"  # who asks a server without keys
LONGEST: Final = 64


@dataclass(frozen=True)
class ApiKey:
    """A key, without what opens anything.

    Attributes:
        name: whose it is.
        scopes: of SCOPES.
        per_minute: requests; None: the server's limit.
        per_day: pictures; None: the server's limit.
        created, revoked: UTC; None while it holds.
    """

    name: str
    scopes: tuple[str, ...]
    per_minute: int | None = None
    per_day: int | None = None
    created: str = ""
    revoked: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**vars(self), "scopes": list(self.scopes)}


class Keys:
    """The keys of a registry's server.

    Args:
        database: of the registry.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        dialect = sqlite if database.sqlite else postgresql
        entry = dialect.insert(asked).values(name=bindparam("who"), day=bindparam("today"), pictures=bindparam("more"))
        total = asked.c.pictures + bindparam("more")
        # One statement, so that requests at the same time cannot both take what is left; made once, as that takes
        # longer than carrying it out.
        counted = entry.on_conflict_do_update(
            index_elements=["name", "day"], set_={"pictures": total}, where=total <= bindparam("most")
        )
        self._count = counted.returning(asked.c.pictures)
        # SQLite has a writer that finds another one sleep, and look again; PostgreSQL keeps keys apart itself.
        self._counting: AbstractContextManager[Any] = threading.Lock() if database.sqlite else nullcontext()

    def create(
        self, name: str, scopes: Sequence[str] = USUAL, per_minute: int | None = None, per_day: int | None = None
    ) -> str:
        """Make a key, and return it; it is written down nowhere.

        Raises:
            ConfigError: a scope is unknown, or the name is taken, also by a key that was revoked.
        """
        if not (name and name == name.strip() and name.isprintable() and len(name) <= LONGEST and name != ANYBODY):
            raise ConfigError(
                "--name", name, f"say whose key it is, in at most {LONGEST} signs, none of them a space at an end"
            )
        for scope in scopes:
            if scope not in SCOPES:
                raise ConfigError("--scopes", scope, f"no such scope; choose from {', '.join(SCOPES)}")
        if not scopes:
            raise ConfigError("--scopes", "", f"at least one of {', '.join(SCOPES)}")
        secret = PREFIX + base64.urlsafe_b64encode(system_bytes(32)).decode().rstrip("=")
        values = {
            "name": name,
            "digest": _digest(secret),
            "scopes": ",".join(scope for scope in SCOPES if scope in scopes),
            "per_minute": per_minute,
            "per_day": per_day,
            "created": _now(),
        }
        try:
            with self._database.writing() as connection:
                connection.execute(api_keys.insert().values(values))
        except IntegrityError:
            raise ConfigError("--name", name, "there is a key of this name; take another one") from None
        return secret

    def listed(self) -> list[ApiKey]:
        """Return all keys, also those that were revoked."""
        with self._database.reading() as connection:
            return [_key(row) for row in connection.execute(select(api_keys).order_by(api_keys.c.id))]

    def revoke(self, name: str) -> None:
        """Revoke a key at once and for good.

        Raises:
            ConfigError: there is none that holds.
        """
        with self._database.writing() as connection:
            holds = (api_keys.c.name == name) & api_keys.c.revoked.is_(None)
            done = connection.execute(api_keys.update().where(holds).values(revoked=_now()))
            if done.rowcount == 0:
                raise ConfigError("NAME", name, "no key of this name holds; see 'sordino keys list'")

    def find(self, secret: str) -> ApiKey | None:
        """Return the key that holds; None for anything else."""
        if not secret.startswith(PREFIX) or len(secret) > 200:
            return None
        with self._database.reading() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.digest == _digest(secret))).first()
        return None if row is None or row.revoked is not None else _key(row)

    def spend(self, name: str, pictures: int, most: int) -> bool:
        """Count pictures of today, UTC, if all of them are within the budget; else count none.

        Args:
            name: of the key.
            pictures: that are asked about.
            most: of one day.

        Returns:
            Whether they are within the budget.
        """
        if pictures > most:
            return False
        values = {"who": name, "today": _today(), "more": pictures, "most": most}
        with self._counting, self._database.writing(soon=True) as connection:
            return connection.execute(self._count, values).first() is not None

    def used(self, name: str) -> int:
        """Return how many pictures a key, or anybody, asked about today, UTC."""
        today = (asked.c.name == name) & (asked.c.day == _today())
        with self._database.reading() as connection:
            return connection.execute(select(asked.c.pictures).where(today)).scalar() or 0


def seconds_left() -> int:
    """Return the seconds until the next day, UTC."""
    now = datetime.now(UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return int((midnight - now).total_seconds()) + 1


def _key(row: Row[Any]) -> ApiKey:
    scopes = tuple(row.scopes.split(","))
    return ApiKey(row.name, scopes, row.per_minute, row.per_day, row.created, row.revoked)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
