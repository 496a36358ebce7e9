"""A second signature of an exported folder, which OpenSSF's own tool verifies: for whoever has no Sordino.

The tool is `model_signing` of the package model-signing. It takes keys on the curves of NIST alone and no Ed25519, so
this key is another than the publisher's. Nothing of Sordino reads the signature.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from model_signing.signing import Config

from sordino.errors import ConfigError, DataError, RunError
from sordino.files import read_regular
from sordino.privacy.signature import complete_pair
from sordino.serving.trust import own_key_file

KEY = "openssf.pem"
ENDING = ".sig"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
MAX_BYTES = 1 << 14  # of a file with a key


def openssf_key(file: Path | None = None) -> Path:
    """Return the file of the key that signs: `file`, or the user's own (P-256), which is made where there is none.

    Raises:
        ConfigError: `file` holds no such key, or the folder of keys holds one half of a pair.
        RunError: a new one cannot be written.
    """
    found = file or own_key_file(KEY, "--openssf-key", lambda: generate_private_key(SECP256R1()))
    try:
        key: object = load_pem_private_key(read_regular(found, MAX_BYTES), None)
    except (OSError, DataError, ValueError, TypeError):
        key = None
    if not (isinstance(key, EllipticCurvePrivateKey) and key.curve.name in CURVES):
        remedy = "holds no such key; give a private key on the curve P-256, P-384 or P-521, unencrypted, in a PEM file"
        raise ConfigError("--openssf-key", str(found), remedy)
    if file is None:
        complete_pair(key, found)
    return found


def check_free(folder: Path) -> None:
    """Check that there is no signature yet where `sign_folder` would write one.

    Raises:
        ConfigError: there is.
    """
    place = signature_of(folder)
    if place.exists() or place.is_symlink():
        raise ConfigError("--out", str(folder), f"{place.name} is there already; give another folder, or remove it")


def signature_of(folder: Path) -> Path:
    """Return where the signature of a folder lies: beside it, as it covers all that is inside."""
    return folder.with_name(folder.name + ENDING)


def sign_folder(folder: Path, key: Path) -> Path:
    """Sign all files of a folder; the signature's file.

    Raises:
        RunError: it cannot be written.
    """
    place = signature_of(folder)
    try:
        Config().use_elliptic_key_signer(private_key=key).sign(folder, place)
    except OSError as error:
        raise RunError(f"cannot write {place}: {error.strerror or error}; free space or give another --out") from None
    return place
