"""Ed25519 signatures (RFC 8032) of what a document says, with keys in PEM files.

A signature says that the holder of a key wrote these bytes. Whose key it is, a reader must know from elsewhere: by the
key's fingerprint, or by its file.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from sordino.errors import ConfigError, DataError, RunError
from sordino.files import NewFile, create_files, read_regular
from sordino.progress import log

_LARGEST = 16384  # bytes of a file with a key


def make_key(out: Path) -> tuple[Path, str]:
    """Make a pair of keys: the private one in `out`, which its owner alone can read, the public one beside it.

    Returns:
        The public key's file, named as `out` with the ending .pub.pem, and the public key's fingerprint.

    Raises:
        ConfigError: one of the files exists. None is ever overwritten, as signatures would lose their key.
        RunError: a file cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    return keep_key(key, out), fingerprint(public_bytes(key))


def keep_key(
    key: Ed25519PrivateKey | EllipticCurvePrivateKey,
    out: Path,
    option: str = "--out",
    instead: str = "choose another --out",
) -> Path:
    """Write a new pair of keys as `make_key` does, both files or none; the public key's file.

    Args:
        key: the private one.
        out: its file.
        option: of the caller, which names the place, for messages.
        instead: what the caller can do where a file is there already or cannot be written.

    Raises:
        ConfigError, RunError: see `make_key`.
    """
    public_file = out.with_name(f"{out.stem}.pub.pem")
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        create_files(NewFile(out, secret, private=True), NewFile(public_file, _public_pem(key), derived=True))
    except FileExistsError as error:
        name = Path(error.filename).name
        raise ConfigError(
            option, str(out), f"{name} is there already, and keys are never overwritten; {instead}"
        ) from None
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}; free space, or {instead}") from None
    return public_file


def complete_pair(key: Ed25519PrivateKey | EllipticCurvePrivateKey, file: Path) -> Path | None:
    """Write the public key beside a private one where it is missing; its file, or None if it cannot be written."""
    public_file = file.with_name(f"{file.stem}.pub.pem")
    try:
        if not public_file.exists():
            create_files(NewFile(public_file, _public_pem(key), derived=True))
    except OSError as error:
        log.warning("the public key that belongs to %s cannot be written: %s", file, error.strerror or error)
        return None
    return public_file


def _public_pem(key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def load_private_key(file: Path, option: str = "--key") -> Ed25519PrivateKey:
    """Read a private key, unencrypted, from a PEM file.

    Raises:
        ConfigError: the file holds no such key.
    """
    try:
        key = load_pem_private_key(_read(file, option), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        made = "give the private Ed25519 key, unencrypted, that 'sordino privacy key' made"
        raise ConfigError(option, str(file), f"holds no such key; {made}")
    return key


def load_public_key(file: Path, option: str = "--public-key") -> bytes:
    """Read a public key from a PEM file; its 32 bytes.

    Raises:
        ConfigError: the file holds no such key.
    """
    try:
        key = load_pem_public_key(_read(file, option))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(option, str(file), "holds no public Ed25519 key; give the .pub.pem of 'sordino privacy key'")
    return key.public_bytes_raw()


def _read(file: Path, option: str) -> bytes:
    try:
        return read_regular(file, _LARGEST)
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(option, str(file), f"cannot be read ({reason}); give a PEM file") from None


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """Return the 32 bytes of the public key that belongs to a private one."""
    return key.public_key().public_bytes_raw()


def fingerprint(public_key: bytes) -> str:
    """Return SHA-256 of a public key's 32 bytes, as hex in groups of four that a person can compare."""
    digest = hashlib.sha256(public_key).hexdigest()
    return " ".join(digest[start : start + 4] for start in range(0, len(digest), 4))


def sign(key: Ed25519PrivateKey, message: bytes) -> str:
    """Return the signature of a message, in Base64."""
    return base64.b64encode(key.sign(message)).decode()


def signed_by(public_key: bytes, signature: str, message: bytes) -> bool:
    """Tell whether a message was signed with the private key of `public_key`."""
    try:
        content = base64.b64decode(signature, validate=True)
        if base64.b64encode(content).decode() != signature:  # one signature has one text
            return False
        Ed25519PublicKey.from_public_bytes(public_key).verify(content, message)
    except (InvalidSignature, ValueError):
        return False
    return True
