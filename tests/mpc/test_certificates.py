"""Certificates: who is who, and what a folder must hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sordino.errors import ConfigError
from sordino.mpc.certificates import AUTHORITY, CERTIFICATE, KEY, ROLES, Identity, make_certificates


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
    before = (tmp_path / "assistant" / KEY).read_bytes()
    with pytest.raises(ConfigError, match=r"--out = .*server-0 is there already; choose another folder"):
        make_certificates(tmp_path)
    assert (tmp_path / "assistant" / KEY).read_bytes() == before


def test_another_role_and_no_role(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    with pytest.raises(ConfigError, match="is that of assistant; server-0 or server-1 is needed"):
        Identity.load(tmp_path / "assistant", "server-0", "server-1")
    with pytest.raises(ConfigError, match="no party's folder.*'sordino mpc certificates' makes them"):
        Identity.load(tmp_path / "nobody", "assistant")
    (tmp_path / "assistant" / CERTIFICATE).write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match="no party's folder"):
        Identity.load(tmp_path / "assistant", "assistant")
