"""Versions are whole, never change, and are refused once a byte of them did; on SQLite and on PostgreSQL."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from serving.conftest import Server, some_facts, some_files
from sordino.errors import ConfigError, PromptError, RunError
from sordino.privacy.signature import public_bytes, sign
from sordino.serving.manifest import CARD, LEDGER, PROMPT, Facts, Manifest
from sordino.serving.registry import Registry
from sordino.serving.server.keys import Keys
from sordino.serving.trust import Trusted

PUBLISHER = Path(__file__).with_name("publisher.py")
PRIVATE = {
    **{"private": True, "simulated": False, "epsilon": 1 / 3, "delta": 1e-5, "unit": "example"},
    **{"statement": "Differentially private.", "ledger_sha256": "00" * 32},
}


def publish(registry: Registry, key: Ed25519PrivateKey, name: str = "fabric", facts: Facts | None = None) -> Manifest:
    return registry.publish(name, facts or some_facts(), some_files(), key, accept_not_private=True)


@contextmanager
def by_hand(url: str, drop_triggers: bool = True) -> Iterator[Connection]:
    """A connection of somebody who can write into the database, and takes off what it refuses by itself."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        for table in ("prompts", "files", "withdrawals") if drop_triggers else ():
            if url.startswith("sqlite"):
                connection.execute(text(f"DROP TRIGGER {table}_no_update"))
                connection.execute(text(f"DROP TRIGGER {table}_no_delete"))
            else:
                connection.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER ALL"))
        yield connection
    engine.dispose()


def test_what_is_published_is_loaded(url: str, key: Ed25519PrivateKey, trusted: Trusted) -> None:
    facts = some_facts(privacy=PRIVATE, class_names=("café", "a\nb", "\x00"), client=3)
    with Registry(url, create=True) as registry:
        manifest = publish(registry, key, facts=facts)
    with Registry(url) as registry:
        found = registry.load("fabric", trusted=trusted)
    assert found.manifest == manifest
    assert Facts.model_validate({name: getattr(manifest, name) for name in Facts.model_fields}) == facts
    assert {name: found.files[name] for name in (PROMPT, LEDGER)} == some_files()
    assert manifest.privacy.epsilon == 1 / 3  # to the last bit
    assert manifest.label in ("fabric:1",)


def test_versions_count_up_by_name_and_the_latest_is_the_default(
    url: str, key: Ed25519PrivateKey, trusted: Trusted
) -> None:
    with Registry(url, create=True) as registry:
        assert [publish(registry, key, name).version for name in ("fabric", "fabric", "glass", "fabric")] == [
            1,
            2,
            1,
            3,
        ]
        assert registry.load("fabric", trusted=trusted).manifest.version == 3
        assert registry.load("fabric", 2, trusted).manifest.version == 2
        with pytest.raises(ConfigError, match=r"NAME = 'fabric:4'.*no such prompt"):
            registry.load("fabric", 4, trusted)


def test_a_withdrawn_version_stays_and_is_given_to_nobody(url: str, key: Ed25519PrivateKey, trusted: Trusted) -> None:
    with Registry(url, create=True) as registry:
        for _ in range(3):
            publish(registry, key)
        registry.withdraw("fabric", 3, "a hospital left")
        assert registry.load("fabric", trusted=trusted).manifest.version == 2
        with pytest.raises(PromptError, match=r"fabric:3 .* withdrawn since .* \(a hospital left\)"):
            registry.load("fabric", 3, trusted)
        with pytest.raises(ConfigError, match="withdrawn already"):
            registry.withdraw("fabric", 3, "again")
        for version in (1, 2):
            registry.withdraw("fabric", version, "so did the others")
        with pytest.raises(PromptError, match="withdrawn"):
            registry.load("fabric", trusted=trusted)
        assert publish(registry, key).version == 4  # no number is used twice
        listed = registry.listed(trusted)
    assert [each.withdrawn and each.withdrawn.reason for each in listed][2:] == ["a hospital left", None]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE prompts SET version = 7",
        "UPDATE files SET name = 'audit.json' WHERE name = 'ledger.json'",
        "DELETE FROM files",
        "DELETE FROM withdrawals",
        "UPDATE withdrawals SET reason = 'none'",
    ],
)
def test_the_database_itself_refuses_changes(url: str, key: Ed25519PrivateKey, change: str) -> None:
    with Registry(url, create=True) as registry:
        publish(registry, key)
        registry.withdraw("fabric", 1, "a test")
    with pytest.raises(DBAPIError, match="never changed or removed"), by_hand(url, drop_triggers=False) as connection:
        connection.execute(text(change))


def test_a_write_waits_for_the_disk_unless_it_may_be_forgotten(url: str) -> None:
    """Also on a connection whose write before did not."""
    with Registry(url, create=True) as registry:
        database = registry.database
        asked, on, off = ("PRAGMA synchronous", 2, 1) if database.sqlite else ("SHOW synchronous_commit", "on", "off")
        for soon in (False, True, False):
            with database.writing(soon) as connection:
                assert connection.execute(text(asked)).scalar() == (off if soon else on)


def test_the_database_itself_refuses_a_second_row_of_a_version(url: str, key: Ed25519PrivateKey) -> None:
    with Registry(url, create=True) as registry:
        publish(registry, key)
    columns = "name, version, created, method, task, encoder, fingerprint, private, simulated, manifest, signature"
    copy = f"INSERT INTO prompts ({columns}, public_key) SELECT {columns}, public_key FROM prompts"
    with pytest.raises(DBAPIError, match=r"(?i)unique"), by_hand(url) as connection:
        connection.execute(text(copy))


# What is changed by hand, and what the message says of it.
TAMPERED = {
    **{f"file {name}": name.replace(".", r"\.") for name in (PROMPT, LEDGER, CARD)},
    **dict.fromkeys(("file gone", "file added"), "audit|ledger"),
    **dict.fromkeys(("manifest", "signature", "another's signature"), "signature is not that of its manifest"),
    "key": "signature is not that of its manifest",
    "signed anew": "not trusted here",
    **{f"column {name}": f"column '{name}'" for name in ("version", "created", "method", "task", "encoder")},
    **{f"column {name}": f"column '{name}'" for name in ("fingerprint", "private", "simulated", "epsilon")},
    "column public_key": "row is damaged",
}


def tamper(connection: Connection, what: str) -> None:
    """Change one thing of the only version."""
    kind, _, name = what.partition(" ")

    def update(table: str, **values: object) -> None:
        where = "" if table == "prompts" else f" WHERE name = '{name}'"
        sets = ", ".join(f"{column} = :{column}" for column in values)
        connection.execute(text(f"UPDATE {table} SET {sets}{where}"), values)

    manifest, signature = connection.execute(text("SELECT manifest, signature FROM prompts")).one()
    if what == "file gone":
        connection.execute(text("DELETE FROM files WHERE name = 'ledger.json'"))
    elif what == "file added":
        connection.execute(text("INSERT INTO files SELECT prompt, 'audit.json', content FROM files LIMIT 1"))
    elif kind == "file":
        (content,) = connection.execute(text("SELECT content FROM files WHERE name = :name"), {"name": name}).one()
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        update("files", content=bytes(flipped))
    elif what == "manifest":
        update("prompts", manifest=bytes(manifest).replace(b'"private":false', b'"private":true '))
    elif what == "signature":
        update("prompts", signature=("A" if signature[0] != "A" else "B") + signature[1:])
    elif what == "another's signature":  # of the same key, for another kind of document
        update("prompts", signature=sign(Ed25519PrivateKey.from_private_bytes(bytes(range(32))), bytes(manifest)))
    elif what == "key":
        update("prompts", public_key=public_bytes(Ed25519PrivateKey.generate()).hex())
    elif what == "column public_key":
        update("prompts", public_key="zz")
    elif kind == "column":
        replaced: dict[str, object] = {"version": 2, "private": True, "simulated": True, "epsilon": 1.0}
        update("prompts", **{name: replaced.get(name, "else")})


@pytest.mark.parametrize("what", TAMPERED)
def test_whatever_is_changed_by_hand_is_refused(what: str, url: str, key: Ed25519PrivateKey, trusted: Trusted) -> None:
    signer = Ed25519PrivateKey.generate() if what == "signed anew" else key
    with Registry(url, create=True) as registry:
        publish(registry, signer)
    if what != "signed anew":
        with by_hand(url) as connection:
            tamper(connection, what)
    with Registry(url) as registry:
        with pytest.raises(PromptError, match=TAMPERED[what]) as refusal:
            registry.load("fabric", trusted=trusted)
        (listed,) = registry.listed(trusted)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("fabric:")
    assert listed.fault or not listed.trusted or what.startswith("file")


def test_a_changed_latest_version_is_refused_and_not_replaced_by_an_older_one(
    url: str, key: Ed25519PrivateKey, trusted: Trusted
) -> None:
    with Registry(url, create=True) as registry:
        publish(registry, key)
        publish(registry, key)
    with by_hand(url) as connection:
        connection.execute(text("UPDATE prompts SET signature = 'x' WHERE version = 2"))
    with Registry(url) as registry:
        with pytest.raises(PromptError, match="fabric:2"):
            registry.load("fabric", trusted=trusted)
        assert registry.load("fabric", 1, trusted).manifest.version == 1


def test_a_row_moved_to_another_name_is_refused(url: str, key: Ed25519PrivateKey, trusted: Trusted) -> None:
    with Registry(url, create=True) as registry:
        publish(registry, key)
    with by_hand(url) as connection:
        connection.execute(text("UPDATE prompts SET name = 'glass'"))
    with Registry(url) as registry, pytest.raises(PromptError, match="column 'name'"):
        registry.load("glass", trusted=trusted)


@pytest.mark.parametrize("mark", ["not private", "simulated", "contradicted"])
def test_what_is_not_private_needs_a_word_and_is_marked(mark: str, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    privacy = PRIVATE | {"private": mark == "contradicted", "simulated": mark == "simulated"}
    audit = {"attacks": {"canaries": {"found": ("a bound",), "epsilon": 9.0}}, "refuted": True}
    facts = some_facts(privacy=privacy, audit=audit if mark == "contradicted" else None)
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        with pytest.raises(ConfigError, match=r"--accept-not-private.*stays so wherever it shows"):
            registry.publish("fabric", facts, some_files(), key)
        registry.publish("fabric", facts, some_files(), key, accept_not_private=True)
        card = registry.inspect("fabric").files[CARD].decode()
        assert registry.publish("private", some_facts(privacy=PRIVATE), some_files(), key).mark == ""
    assert f"**{facts.mark}.**" in card
    assert mark.upper() in facts.mark


@pytest.mark.parametrize("name", ["", "Fabric", "a/b", "..", "a..b", "-a", "a:1", "a b", "a\n", "ä", "a" * 65])
def test_names_are_those_that_addresses_and_files_can_have(name: str, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    with (
        Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry,
        pytest.raises(ConfigError, match="--name"),
    ):
        publish(registry, key, name)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://localhost/x", "sqlite:///FILE or postgresql"),
        ("no url", "sqlite:///FILE or postgresql"),
        ("sqlite://", "must be a file"),
        ("sqlite:///{}/absent.db", "there is no registry"),
        ("sqlite:///{}/absent/prompts.db", "there is no registry"),
        ("sqlite:///{}/garbage.db", "cannot be used"),
        ("sqlite:///{}/empty.db", "is no registry yet"),
        ("postgresql://somebody:secret@127.0.0.1:1/x", "cannot be used"),
        ("postgresql://somebody@127.0.0.1:1/x?nonsense=abc", "cannot be used"),
        ("sqlite:///{}/empty.db?timeout=abc", "timeout.*takes no options"),
        ("sqlite:///{}/empty.db?foo=bar&mode=ro", "foo, mode.*takes no options"),
        ("sqlite:///{}/\udcff.db", "sqlite:///FILE or postgresql"),
    ],
)
def test_what_is_no_registry_is_told_in_one_line(url: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"no database at all" * 500)
    (tmp_path / "empty.db").write_bytes(b"")
    with pytest.raises((ConfigError, RunError), match=told) as error:
        Registry(url.format(tmp_path))
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def others() -> Iterator[Path]:
    """A folder that everybody may read; for root, who may write anywhere, the test goes on as nobody."""
    folder = Path(tempfile.mkdtemp(prefix="sordino-read-only-"))
    folder.chmod(0o755)
    yield folder
    os.seteuid(os.getuid())
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("folder", "file"), [(0o555, 0o444), (0o555, 0o644), (0o777, 0o444)])
def test_a_registry_that_can_only_be_read_is_read(
    folder: int, file: int, others: Path, key: Ed25519PrivateKey, trusted: Trusted
) -> None:
    place = others / "kept"
    place.mkdir()
    url = f"sqlite:///{place}/prompts.db"
    with Registry(url, create=True) as registry:
        publish(registry, key)
    (place / "prompts.db").chmod(file)
    place.chmod(folder)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with Registry(url) as registry:
        assert [each.fault for each in registry.listed(trusted)] == [""]
        assert registry.load("fabric", trusted=trusted).manifest.version == 1
        assert Keys(registry.database).listed() == []
        with pytest.raises(RunError, match="cannot be used"):
            publish(registry, key)
        with pytest.raises(RunError, match="cannot be used"):
            registry.withdraw("fabric", 1, "a test")


def test_a_registry_whose_newest_part_cannot_be_read_is_refused(others: Path, key: Ed25519PrivateKey) -> None:
    """In a copy without all its files an older state would show, without a withdrawal."""
    (others / "own").mkdir()
    (others / "kept").mkdir()
    url = f"sqlite:///{others}/own/prompts.db"
    with Registry(url, create=True) as registry:
        publish(registry, key)
    with Registry(url) as registry:
        registry.withdraw("fabric", 1, "a test")
        for name in ("prompts.db", "prompts.db-wal"):
            shutil.copy(others / "own" / name, others / "kept")
            (others / "kept" / name).chmod(0o444)
    (others / "kept").chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(RunError, match="cannot be used"):
        Registry(url.replace("/own/", "/kept/"))


def test_a_registry_of_a_newer_version_is_refused(url: str, key: Ed25519PrivateKey) -> None:
    with Registry(url, create=True) as registry:
        publish(registry, key)
    with by_hand(url, drop_triggers=False) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RunError, match="9999"):
        Registry(url)


def test_an_older_registry_is_brought_up_to_date_with_its_prompts(
    url: str, key: Ed25519PrivateKey, trusted: Trusted
) -> None:
    """One as it was before there were keys; by reading it, too."""
    with Registry(url, create=True) as registry:
        publish(registry, key)
    with by_hand(url, drop_triggers=False) as connection:
        for change in ("DROP TABLE api_keys", "DROP TABLE asked", "UPDATE alembic_version SET version_num = '0001'"):
            connection.execute(text(change))
    with Registry(url) as registry:
        assert registry.load("fabric", trusted=trusted).manifest.version == 1
        secret = Keys(registry.database).create("kim")
        assert Keys(registry.database).find(secret) is not None
        assert publish(registry, key).version == 2


def test_a_new_registry_is_its_owners_alone(tmp_path: Path, key: Ed25519PrivateKey) -> None:
    """Also while it is written, when SQLite has more files."""
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        publish(registry, key)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert "prompts.db-wal" in modes
    assert set(modes.values()) == {0o600}


def start(url: str, name: str, count: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(PUBLISHER), url, name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_processes_that_publish_one_name_at_once_get_different_versions(url: str, trusted: Trusted) -> None:
    """Also where all of them find no tables yet."""
    running = [start(url, "fabric", 5) for _ in range(4)]
    versions: list[int] = []
    for process in running:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        versions += map(int, output.split())
    assert sorted(versions) == list(range(1, 21))
    with Registry(url) as registry:
        assert [registry.load("fabric", number, trusted).manifest.version for number in versions] == versions


def require_whole(url: str, told: set[int], trusted: Trusted) -> None:
    """Every version that was told is there, and every one that is there is whole."""
    with Registry(url) as registry:
        found = [listed.version for listed in registry.listed(trusted)]
        assert told <= set(found)
        assert len(found) <= len(told) + 1  # one may have been written but not told yet
        assert found == list(range(1, len(found) + 1))
        for number in found:
            registry.load("fabric", number, trusted)


@pytest.mark.slow
def test_a_killed_publisher_loses_nothing_and_leaves_nothing_half(url: str, trusted: Trusted) -> None:
    before: set[int] = set()  # versions that are there
    for wanted in (1, 4, 9):
        process = start(url, "fabric", 10_000)
        assert process.stdout is not None
        told = before | {int(process.stdout.readline()) for _ in range(wanted)}
        process.kill()
        told |= {int(line) for line in process.stdout if line.endswith("\n")}
        process.communicate()
        require_whole(url, told, trusted)
        with Registry(url) as registry:
            before = {listed.version for listed in registry.listed(trusted)}


@pytest.mark.slow
def test_a_database_server_that_dies_while_it_writes_loses_nothing(postgres: Server, trusted: Trusted) -> None:
    """It is stopped as by a failure of power to its processes, without a checkpoint, with fsync on."""
    url = postgres.new_database()
    process = start(url, "fabric", 10_000)
    assert process.stdout is not None
    told = {int(process.stdout.readline()) for _ in range(5)}
    postgres.stop("immediate")
    rest, errors = process.communicate(timeout=60)
    told |= {int(line) for line in rest.split()}
    assert process.returncode != 0
    assert "RunError" in errors
    postgres.start()
    for _ in range(600):  # it goes through its journal first
        try:
            Registry(url).close()
            break
        except RunError:
            time.sleep(0.2)
    require_whole(url, told, trusted)


def test_a_manifest_is_canonical(key: Ed25519PrivateKey, tmp_path: Path) -> None:
    """Sorted, ASCII, the same bytes for the same content; and read as what was written."""
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        manifest = publish(registry, key, facts=some_facts(class_names=("ä", "b")))
    written = manifest.to_bytes()
    content = json.loads(written)
    assert written == json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")
    assert Manifest.model_validate_json(written).to_bytes() == written


def test_a_signed_text_that_is_not_canonical_is_refused(
    key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path, sign_text: Callable[[bytes], str]
) -> None:
    """Two texts of one meaning would let two readers see two files where one is named twice."""
    url = f"sqlite:///{tmp_path}/prompts.db"
    with Registry(url, create=True) as registry:
        manifest = publish(registry, key)
    loose = json.dumps(json.loads(manifest.to_bytes())).encode()
    twice = manifest.to_bytes().replace(b'"version":1}', b'"version":2,"version":1}')
    for written, told in (
        (loose, "canonical"),
        (twice, "canonical"),
        (b'{"format":"x"}', "update"),
        (b"[", "malformed"),
    ):
        with by_hand(url, drop_triggers=written == loose) as connection:
            values = {"manifest": written, "signature": sign_text(written)}
            connection.execute(text("UPDATE prompts SET manifest = :manifest, signature = :signature"), values)
        with Registry(url) as registry, pytest.raises(PromptError, match=told):
            registry.load("fabric", trusted=trusted)


@pytest.fixture
def sign_text(key: Ed25519PrivateKey) -> Callable[[bytes], str]:
    """Signs any text as a manifest."""

    def signed(content: bytes) -> str:
        return sign(key, b"sordino published prompt " + hashlib.sha256(content).hexdigest().encode())

    return signed
