"""Keys of nodes: made at the node, on the curve P-384, in OpenSSH's format, as Flower wants them."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from sordino.errors import ConfigError, RunError
from sordino.files import NewFile, create_files


def make_key(file: Path) -> str:
    """Write a new private key to a file that nobody else may read, and the public one beside it; return that.

    Raises:
        RunError: one of the files exists, or cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    try:
        create_files(NewFile(file, private, private=True), NewFile(public_file(file), f"{public}\n".encode()))
    except FileExistsError as error:
        raise RunError(f"{error.filename} exists; a node keeps its key, so choose another file for a new one") from None
    except OSError as error:
        raise RunError(
            f"{file} cannot be written: {error.strerror or error}; free space, or choose another file"
        ) from None
    return public


def public_file(file: Path) -> Path:
    """Return where the public key of a private one is."""
    return file.with_name(f"{file.name}.pub")


def load_key(file: Path, name: str = "--key") -> ec.EllipticCurvePrivateKey:
    """Read a node's private key.

    Raises:
        ConfigError: it is missing, or none on the curve P-384.
    """
    remedy = "is no private key of 'sordino flower key'; make one at this machine"
    try:
        key = load_ssh_private_key(file.read_bytes(), None)
    except FileNotFoundError:
        raise ConfigError(name, str(file), "there is no such file; make a key with 'sordino flower key'") from None
    except (OSError, ValueError, UnsupportedAlgorithm):
        raise ConfigError(name, str(file), remedy) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(name, str(file), remedy)
    return key


def load_public_key(file: Path, name: str) -> bytes:
    """Read a node's public key, as Flower has it in its lists.

    Raises:
        ConfigError: it is missing, or none on the curve P-384.
    """
    remedy = "is no public key of 'sordino flower key'; ask the site's owner for the file that ends with .pub"
    try:
        key = load_ssh_public_key(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(name, str(file), "there is no such file; put the site's public key there") from None
    except (OSError, ValueError, UnsupportedAlgorithm):
        raise ConfigError(name, str(file), remedy) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(name, str(file), remedy)
    return public_bytes(key)


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key as Flower has it in its lists: PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
