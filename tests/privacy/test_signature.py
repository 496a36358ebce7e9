"""Keys and signatures: the standard's own vector, files that are kept safe, and refusals."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from full_disk import full_disk
from sordino import files
from sordino.errors import ConfigError, RunError
from sordino.files import NewFile, create_files
from sordino.privacy.signature import (
    fingerprint,
    load_private_key,
    load_public_key,
    make_key,
    public_bytes,
    sign,
    signed_by,
)

# RFC 8032, section 7.1, test 2.
SECRET = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
MESSAGE = bytes.fromhex("72")
SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_the_signature_is_that_of_the_standard() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(SECRET))
    assert public_bytes(key).hex() == PUBLIC
    assert key.sign(MESSAGE).hex() == SIGNATURE
    signature = sign(key, MESSAGE)
    assert signed_by(bytes.fromhex(PUBLIC), signature, MESSAGE)
    assert not signed_by(bytes.fromhex(PUBLIC), signature, b"s")
    assert not signed_by(bytes(32), signature, MESSAGE)


@pytest.mark.parametrize("changed", [lambda text: text[:-1], lambda text: text + "=", lambda text: other_first(text)])
def test_a_changed_signature_is_none(changed: Callable[[str], str]) -> None:
    key = Ed25519PrivateKey.generate()
    signature = sign(key, MESSAGE)
    assert not signed_by(public_bytes(key), changed(signature), MESSAGE)


def other_first(text: str) -> str:
    """The text with another first character, whichever it had."""
    return ("B" if text[0] == "A" else "A") + text[1:]


def test_a_signature_has_one_text() -> None:
    """64 bytes leave four unused bits in Base64: other texts of the same bytes are refused."""
    key = Ed25519PrivateKey.generate()
    signature = sign(key, MESSAGE)
    last = signature[-3]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = signature[:-3] + alphabet[alphabet.index(last) ^ 1] + "=="
    assert other != signature
    assert not signed_by(public_bytes(key), other, MESSAGE)


def test_a_pair_of_keys_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    secret = tmp_path / "keys" / "officer.pem"
    public, shown = make_key(secret)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert load_public_key(public) == public_bytes(load_private_key(secret))
    assert shown == fingerprint(load_public_key(public))
    before = secret.read_bytes(), public.read_bytes()
    with pytest.raises(ConfigError, match=r"officer\.pem is there already"):
        make_key(secret)
    assert (secret.read_bytes(), public.read_bytes()) == before
    secret.unlink()
    with pytest.raises(ConfigError, match=r"officer\.pub\.pem is there already"):
        make_key(secret)
    assert not secret.exists()
    assert public.read_bytes() == before[1]


def test_a_full_disk_leaves_no_half_of_a_pair_that_blocks_the_next_try(tmp_path: Path) -> None:
    with (
        full_disk(),
        pytest.raises(RunError, match=r"cannot write .*officer\.pem: .*free space, or choose another --out"),
    ):
        make_key(tmp_path / "officer.pem")
    assert list(tmp_path.iterdir()) == []
    make_key(tmp_path / "officer.pem")
    assert {path.name for path in tmp_path.iterdir()} == {"officer.pem", "officer.pub.pem"}


@pytest.mark.parametrize("links", [True, False])
def test_new_files_are_all_made_or_none(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file system has no hard links."""
    if not links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(files.os, "link", refuse)
    new = [NewFile(tmp_path / "key", b"key", private=True), NewFile(tmp_path / "other", b"other")]
    (tmp_path / "other").write_bytes(b"another's")
    with pytest.raises(FileExistsError) as error:
        create_files(*new)
    assert Path(error.value.filename) == tmp_path / "other"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"other": b"another's"}
    (tmp_path / "other").unlink()
    create_files(*new)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"key": b"key", "other": b"other"}
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        create_files(new[0])


def test_a_pair_that_another_process_completes_is_whole(tmp_path: Path) -> None:
    """Who finds the private key alone writes the public one, which follows from it."""
    pair = [NewFile(tmp_path / "key", b"key", private=True), NewFile(tmp_path / "public", b"public", derived=True)]
    (tmp_path / "public").write_bytes(b"public")
    create_files(*pair)
    assert (tmp_path / "key").read_bytes() == b"key"


def test_a_link_is_not_followed_to_another_file(tmp_path: Path) -> None:
    (tmp_path / "officer.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is there already"):
        make_key(tmp_path / "officer.pem")
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_no_ed25519_key_is_refused_in_a_line(tmp_path: Path) -> None:
    make_key(tmp_path / "good.pem")
    curve = generate_private_key(SECP256R1())
    (tmp_path / "curve.pem").write_bytes(curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    locked = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")
    )
    (tmp_path / "locked.pem").write_bytes(locked)
    (tmp_path / "empty.pem").touch()
    for name in ("curve.pem", "locked.pem", "empty.pem", "good.pub.pem"):
        with pytest.raises(ConfigError, match=r"^--key = .*holds no such key") as error:
            load_private_key(tmp_path / name)
        assert "\n" not in str(error.value)
    for name in ("good.pem", "empty.pem", "curve.pem"):
        with pytest.raises(ConfigError, match="holds no public Ed25519 key"):
            load_public_key(tmp_path / name)
    for name in ("absent.pem", "."):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_private_key(tmp_path / name)
