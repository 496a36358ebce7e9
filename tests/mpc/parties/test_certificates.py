"""Certificates: who is who, and what a folder must hold."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from typer.testing import CliRunner

from full_disk import full_disk
from sordino.cli.app import app
from sordino.errors import ConfigError, RunError
from sordino.mpc.parties import certificates
from sordino.mpc.parties.certificates import AUTHORITY, CERTIFICATE, KEY, ROLES, Identity, make_certificates


def test_each_role_has_a_key_of_its_own_signed_by_one_authority(tmp_path: Path) -> None:
    folders = make_certificates(tmp_path / "parties", days=3)
    assert [folder.name for folder in folders] == list(ROLES)
    authorities = {(folder / AUTHORITY).read_bytes() for folder in folders}
    (authority,) = map(x509.load_pem_x509_certificate, authorities)
    keys = set()
    for folder in folders:
        identity = Identity.load(folder, *ROLES)
        assert identity.role == folder.name
        certificate = x509.load_pem_x509_certificate(identity.certificate)
        certificate.verify_directly_issued_by(authority)
        own = load_pem_private_key(identity.key, None).public_key()
        assert own == certificate.public_key() != authority.public_key()
        assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 3
        assert (folder / KEY).stat().st_mode & 0o077 == 0
        assert folder.stat().st_mode & 0o077 == 0
        keys.add(identity.key)
    assert len(keys) == len(ROLES)


def test_the_authoritys_key_is_kept_nowhere(tmp_path: Path) -> None:
    """Else whoever finds it could make another server 1."""
    folders = make_certificates(tmp_path / "parties")
    authority = x509.load_pem_x509_certificate((folders[0] / AUTHORITY).read_bytes()).public_key()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 3 * len(ROLES)
    found = [load_pem_private_key(file.read_bytes(), None).public_key() for file in files if file.name == KEY]
    assert authority not in found


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    before = (tmp_path / "dealer" / KEY).read_bytes()
    with pytest.raises(ConfigError, match=r"--out = .*server-0 is there already; choose another folder"):
        make_certificates(tmp_path)
    assert (tmp_path / "dealer" / KEY).read_bytes() == before


@pytest.mark.parametrize("room", [8, 300])
def test_a_full_disk_leaves_no_party_that_blocks_the_next_try(room: int, tmp_path: Path) -> None:
    """Where keys have room, and certificates have none, too."""
    with full_disk(room), pytest.raises(RunError, match=r"cannot write to .*; free space or choose another --out"):
        make_certificates(tmp_path / "parties")
    assert not any((tmp_path / "parties").iterdir())
    make_certificates(tmp_path / "parties")


@pytest.mark.parametrize("key", ["--certificates", "session.certificates"])
def test_another_role_and_no_role(tmp_path: Path, key: str) -> None:
    """Named as whoever asks calls the folder."""
    make_certificates(tmp_path)
    with pytest.raises(ConfigError, match="is that of dealer; server-0 or server-1 is needed") as other:
        Identity.load(tmp_path / "dealer", "server-0", "server-1", key=key)
    with pytest.raises(ConfigError, match="no party's folder.*'sordino mpc certificates' makes them") as nobody:
        Identity.load(tmp_path / "nobody", "dealer", key=key)
    (tmp_path / "dealer" / CERTIFICATE).write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match="no party's folder") as damaged:
        Identity.load(tmp_path / "dealer", "dealer", key=key)
    assert {each.value.key for each in (other, nobody, damaged)} == {key}


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604])
def test_a_key_that_others_may_read_is_told(tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    """As after a copy that kept no modes."""
    make_certificates(tmp_path)
    key = tmp_path / "dealer" / KEY
    key.chmod(mode)
    certificates._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        Identity.load(tmp_path / "dealer", "dealer")
    told = f"others on this machine may read {key} (mode {mode:o})"
    assert (told in caplog.text) == bool(mode & 0o077)


def test_commands_name_their_option(tmp_path: Path) -> None:
    for words in (
        ["dealer", "--listen", "127.0.0.1:0"],
        ["server", "--listen", "127.0.0.1:0", "--dealer", "a:1"],
        ["provide", "--servers", "a:1,b:2"],
    ):
        found = CliRunner().invoke(app, ["mpc", *words, "--certificates", str(tmp_path)]).exception
        assert isinstance(found, ConfigError)
        assert found.key == "--certificates"


def test_addresses_are_checked_before_anything_is_started(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    server = ["server", "--listen", "127.0.0.1:0"]
    for role, words, key in (
        ("dealer", ["dealer", "--listen", "127.0.0.1"], "--listen"),
        ("dealer", ["dealer", "--listen", "127.0.0.1:65536"], "--listen"),
        ("server-0", ["server", "--listen", "7001", "--dealer", "a:1"], "--listen"),
        ("server-0", [*server, "--dealer", "http://a:1"], "--dealer"),
        ("server-1", [*server, "--dealer", "a:1", "--peer", "a"], "--peer"),
        ("model-owner", ["provide", "--servers", "a:1,b"], "--servers"),
        ("model-owner", ["provide", "--servers", "a:1,b:0"], "--servers"),
    ):
        found = CliRunner().invoke(app, ["mpc", *words, "--certificates", str(tmp_path / role)]).exception
        assert isinstance(found, ConfigError), words
        assert found.key == key
        assert "HOST:PORT" in found.allowed


def test_each_server_is_told_what_a_peer_is(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    words = ["mpc", "server", "--listen", "127.0.0.1:0", "--dealer", "a:1", "--certificates"]
    for given, message in (
        ([str(tmp_path / "server-1")], "--peer = None: .*server-1 dials server-0: give HOST:PORT of it"),
        ([str(tmp_path / "server-0"), "--peer", "b:2"], "--peer = 'b:2': is for server-1 alone.*leave it out"),
    ):
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(app, [*words, *given], catch_exceptions=False)


@pytest.mark.parametrize("days", [0, -1, 3651, 100_000, 999_999_999])
def test_certificates_are_valid_for_a_bounded_time(days: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--days = {days}: certificates are valid for 1 to 3650 days"):
        make_certificates(tmp_path / "parties", days)
    assert not (tmp_path / "parties").exists()
    assert len(make_certificates(tmp_path / "parties", 3650)) == len(ROLES)
