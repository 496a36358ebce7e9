"""A registry's database: SQLite in a file, or PostgreSQL by URL; opened, brought up to date, and told in one line."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from sordino.errors import ConfigError, RunError

VARIABLE, DEFAULT = "SORDINO_REGISTRY", "sqlite:///prompts.db"
MIGRATIONS = Path(__file__).parent / "migrations"
WAIT_SECONDS = 30  # for another writer
LOCK = 0x50726F6D707473  # any number that no other program on the same server uses
WRITE, SOON = "sordino_write", "sordino_write_soon"


def default_url() -> str:
    """Return the registry's URL where none is given."""
    return os.environ.get(VARIABLE) or DEFAULT


class Database:
    """A registry's database.

    Args:
        url: as SQLAlchemy takes it; `sqlite:///FILE`, or `postgresql://USER@HOST/NAME`.
        create: make what is missing. Otherwise a file that is not there is an error.

    Raises:
        ConfigError: the URL is malformed, or leads nowhere.
        RunError: it is there, but cannot be opened, or a newer version of Sordino made it.
    """

    def __init__(self, url: str | None = None, create: bool = False) -> None:
        self.url = _parsed(url or default_url())
        self.label = _told(self.url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        if self.sqlite:
            self._prepare_file(create)
        self.engine = _engine(self.url)
        with self.told():
            self._bring_up_to_date(create)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection that sees one state of the database."""
        with self.told(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self, soon: bool = False) -> Iterator[Connection]:
        """Give a connection whose changes are all made at the end, on the disk, or none.

        IntegrityError is left to the caller, who knows what it means.

        Args:
            soon: they reach the disk some moments later. They outlast the process, but perhaps no failure of power.
        """
        with self.told(), self.engine.connect() as plain:
            connection = plain.execution_options(**{WRITE: True, SOON: soon})
            with connection.begin():
                if soon and not self.sqlite:
                    connection.execute(text("SET LOCAL synchronous_commit = off"))
                yield connection

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell errors of the database in one line."""
        try:
            yield
        except IntegrityError:
            raise
        except (SQLAlchemyError, CommandError) as error:
            reason = " ".join(str(getattr(error, "orig", None) or error).split())
            raise RunError(
                f"the registry {self.label} cannot be used ({reason[:200]}); see that it is a registry of "
                "Sordino's that can be reached and written, and repeat the command"
            ) from None

    def _prepare_file(self, create: bool) -> None:
        name = self.url.database
        if not name or name == ":memory:" or "mode=memory" in name:
            raise ConfigError(
                "--registry", self.label, "must be a file, as sqlite:///prompts.db, that outlives a command"
            )
        file = Path(name)
        if file.exists():
            return
        if not create:
            remedy = f"there is no registry; publish a prompt with 'sordino publish', or say where it is ({VARIABLE})"
            raise ConfigError("--registry", self.label, remedy)
        try:
            # Its owner's alone: who reads prompts can use them without a budget. SQLite's other files follow its mode.
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise ConfigError(
                "--registry", self.label, f"cannot be made: {error.strerror}; give another file"
            ) from None

    def _bring_up_to_date(self, create: bool) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        head = ScriptDirectory.from_config(config).get_current_head()
        with self.engine.begin() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        if found == head:
            return
        if found is None and not create:
            raise ConfigError("--registry", self.label, "is no registry yet; publish a prompt with 'sordino publish'")
        with self.engine.connect() as plain:
            connection = plain.execution_options(**{WRITE: True})
            with connection.begin():  # one process alone, and all steps or none
                if not self.sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


def _parsed(url: str) -> URL:
    remedy = "must be sqlite:///FILE or postgresql://USER@HOST/NAME"
    try:
        url.encode()  # the argument of a command may hold bytes that are no text
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise ConfigError("--registry", url.partition("://")[0], remedy) from None
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername != "sqlite":
        raise ConfigError("--registry", parsed.drivername, remedy)
    if parsed.query:
        names = ", ".join(sorted(parsed.query))
        raise ConfigError("--registry", names, "a SQLite registry takes no options after its file; leave them out")
    return parsed


def _told(url: URL) -> str:
    """Return a URL for messages, without a password, wherever it stands: PostgreSQL takes one in the query, too."""
    hidden = {name: "***" if "password" in name.lower() else value for name, value in url.query.items()}
    return url.set(query=hidden).render_as_string(hide_password=True)


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": WAIT_SECONDS})
    assert url.database is not None
    file = Path(url.database).absolute()
    engine = create_engine(url, creator=lambda: _connected(file))

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its lock at once: one that first reads would fail where another wrote in between.
        options = connection.get_execution_options()
        if not options.get(WRITE):
            connection.exec_driver_sql("BEGIN")
            return
        # Each time, as the connection's last transaction may have been of the other kind.
        connection.exec_driver_sql(f"PRAGMA synchronous = {'NORMAL' if options.get(SOON) else 'FULL'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _connected(file: Path) -> sqlite3.Connection:
    """Open a SQLite file: to read and write, or to read alone, where this user or the medium allows no more."""
    try:
        connection = _opened(str(file))
        try:
            for pragma in ("journal_mode = WAL", "synchronous = FULL"):
                connection.execute(f"PRAGMA {pragma}")
            return connection
        except sqlite3.OperationalError:
            connection.close()
            raise
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise
    return _opened_to_read(file)


def _opened_to_read(file: Path) -> sqlite3.Connection:
    """Open a SQLite file that cannot be written.

    Beside a registry that is open elsewhere lie two more files, for those who read and write at once. Where these are
    neither there nor can be made, nobody writes, and the file alone is the whole registry.
    """
    name = f"{file.as_uri()}?mode=ro"
    connection = _opened(name, uri=True)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError as error:
        connection.close()
        log = file.with_name(f"{file.name}-wal")
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) or _holds(log):
            raise  # part of the registry is in the log, which cannot be read without the other file
    return _opened(f"{name}&immutable=1", uri=True)


def _holds(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:
        return False


def _opened(name: str, uri: bool = False) -> sqlite3.Connection:
    # Without an isolation level, as Python's driver would begin transactions late, and end them at a new table.
    connection = sqlite3.connect(name, WAIT_SECONDS, isolation_level=None, check_same_thread=False, uri=uri)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.text_factory = _text
    return connection


def _text(content: bytes) -> str:
    """Return text that need not be UTF-8 in a file: one such value would keep all others from being read."""
    return content.decode("utf-8", "replace")
