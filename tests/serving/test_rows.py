"""SQLite takes a value of any type in any column: it damages the version that it belongs to, and no other."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from serving.conftest import some_facts, some_files
from sordino.cli.app import invoke
from sordino.errors import ConfigError, PromptError
from sordino.privacy.signature import keep_key, public_bytes
from sordino.serving.registry import Registry
from sordino.serving.tables import files, prompts, withdrawals
from sordino.serving.trust import Trusted, config_folder

# By storage class; SQLite itself turns some into the type of the column.
VALUES = ("7", "-1", "9223372036854775807", "0.5", "9e999", "'a'", "''", "'a' || char(10) || 'b'", "x'ff'", "x''")
VALUES += ("CAST(x'ff' AS TEXT)", "zeroblob(100000)", "NULL")
PRIVATE = {
    **{"private": True, "simulated": False, "epsilon": 1 / 3, "delta": 1e-5, "unit": "example"},
    **{"statement": "Differentially private.", "ledger_sha256": "00" * 32},
}
COLUMNS = [(table.name, column.name) for table in (prompts, files, withdrawals) for column in table.c]


@pytest.fixture(scope="module")
def registry(key: Ed25519PrivateKey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions of two names; the second one, which is withdrawn, will be damaged."""
    file = tmp_path_factory.mktemp("registry") / "prompts.db"
    with Registry(f"sqlite:///{file}", create=True) as opened:
        for name in ("fabric", "fabric", "glass"):
            opened.publish(name, some_facts(privacy=PRIVATE), some_files(), key)
        opened.withdraw("fabric", 2, "a test")
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return file


def damaged(whole: Path, folder: Path, table: str, column: str, value: str) -> str | None:
    """The URL of a copy with another value; None if SQLite refuses it."""
    file = folder / "prompts.db"
    for old in folder.glob("prompts.db*"):
        old.unlink()
    shutil.copy(whole, file)
    place = "id = 2" if table == "prompts" else "prompt = 2" + " AND name = 'README.md'" * (table == "files")
    connection = sqlite3.connect(file)
    try:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(f"UPDATE {table} SET {column} = {value} WHERE {place}")
        connection.commit()
    except (sqlite3.IntegrityError, sqlite3.OperationalError):
        return None
    finally:
        connection.close()
    return f"sqlite:///{file}"


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_value_of_any_type_damages_one_version(
    table: str, column: str, registry: Path, key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path
) -> None:
    assert public_bytes(key) in trusted
    for value in VALUES:
        url = damaged(registry, tmp_path, table, column, value)
        if url is None:
            continue
        with Registry(url) as opened:
            listed = opened.listed(trusted)
            assert len(listed) == 3
            json.dumps([each.as_dict() for each in listed]).encode()
            assert [each.fault for each in listed if (each.name, each.version) in (("fabric", 1), ("glass", 1))] == [
                *("", "")
            ], value
            for name in ("fabric", "glass"):
                opened.inspect(name, 1, trusted)
            if table == "withdrawals":  # which nobody signed
                opened.inspect("fabric", 2, trusted)
            else:
                with pytest.raises((PromptError, ConfigError)) as error:
                    opened.inspect("fabric", 2, trusted)
                assert "\n" not in str(error.value)
                assert len(str(error.value)) < 2000
            following = opened.publish("fabric", some_facts(), some_files(), key, accept_not_private=True)
            assert following.version > 1, value
            if table == "withdrawals" and column != "prompt":
                assert [each.withdrawn is not None for each in opened.listed(trusted, "fabric")][:2] == [False, True]


@pytest.mark.parametrize(("table", "column"), [("files", "content"), ("prompts", "name"), ("prompts", "version")])
def test_verify_tells_a_damaged_version_in_one_line(
    table: str, column: str, registry: Path, key: Ed25519PrivateKey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_folder().mkdir(parents=True, exist_ok=True)
    keep_key(key, config_folder() / "publisher.pem", "key", "")
    for value in ("'a'", "x'ff'"):
        url = damaged(registry, tmp_path, table, column, value)
        assert url is not None
        assert invoke(["prompts", "verify", "--registry", url]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3
        assert sum("every byte is as it was signed" in line for line in lines) == 2
        assert invoke(["prompts", "verify", "--json", "--registry", url]) == 1
        answers = json.loads(capsys.readouterr().out)["prompts"]
        assert [bool(each["fault"]) for each in answers].count(True) == 1
        assert invoke(["prompts", "list", "--registry", url]) == 0
        capsys.readouterr()
