"""The publishers that count here: a reader's own choice, never that of a registry.

Whoever can write into a registry can add a prompt, and a key of their own beside it. So the keys lie with the reader:
in the folder `trusted` of the user's configuration, and in files named by `--trust`. A user's own key is trusted too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sordino.errors import ConfigError, DataError, PromptError
from sordino.files import read_regular
from sordino.privacy.signature import complete_pair, fingerprint, keep_key, load_private_key, load_public_key

FOLDER = "SORDINO_CONFIG"  # in the environment: the folder of keys
KEY, PUBLIC_KEY, TRUSTED = "publisher.pem", "publisher.pub.pem", "trusted"
ENDING = "*.pub.pem"


def config_folder() -> Path:
    """Return the user's folder of keys: `$SORDINO_CONFIG`, or `sordino` in `$XDG_CONFIG_HOME` or `~/.config`.

    Never one in the working folder, which may be somebody else's.

    Raises:
        ConfigError: the user has no home.
    """
    if own := os.environ.get(FOLDER):
        return Path(own)
    if above := os.environ.get("XDG_CONFIG_HOME"):
        return Path(above) / "sordino"
    try:
        return Path.home() / ".config" / "sordino"
    except RuntimeError:
        raise ConfigError(FOLDER, None, "this user has no home directory; set it to a folder for keys") from None


def publisher_key(file: Path | None = None) -> tuple[Ed25519PrivateKey, Path | None]:
    """Return the key that signs: from `file`, or the user's own, which is made where there is none.

    Returns:
        The key, and the file of its public half if it is the user's own and could be written.

    Raises:
        ConfigError: `file` holds no such key, or the folder of keys holds one half of a pair.
        RunError: a new one cannot be written.
    """
    if file is not None:
        return load_private_key(file), None
    own = own_key_file(KEY, "--key", Ed25519PrivateKey.generate)
    key = load_private_key(own, "--key")
    return key, complete_pair(key, own)


def own_key_file(name: str, option: str, generate: Callable[[], Ed25519PrivateKey | EllipticCurvePrivateKey]) -> Path:
    """Return the file of a private key in the user's folder of keys, which is made where there is none.

    Args:
        name: of the file.
        option: that gives another key, for messages.
        generate: makes the key.

    Raises:
        ConfigError: its public half is there and it is not, or its file was cut.
        RunError: it cannot be written.
    """
    own = config_folder() / name
    if _is_cut(own):
        remedy = "put the key back, or move the file away so that a new one is made"
        raise ConfigError(FOLDER, str(own.parent), f"{name} in it holds no such key, as a full disk left it; {remedy}")
    if not own.exists():
        try:
            keep_key(generate(), own, FOLDER, f"set {FOLDER} to another folder, or give a key with {option}")
        except ConfigError:
            if not own.exists():  # else another process made it since
                raise
    return own


def _is_cut(file: Path) -> bool:
    """Return whether a key's file lacks its end, as of a version that did not write it whole or not at all."""
    try:
        return b"-----END " not in read_regular(file, 1 << 14)
    except (OSError, DataError):
        return False


@dataclass(frozen=True)
class Trusted:
    """Public keys, 32 bytes each, that a reader trusts as publishers."""

    keys: frozenset[bytes]

    @classmethod
    def of(cls, places: Iterable[Path] = (), own: bool = True) -> Trusted:
        """Read keys.

        Args:
            places: files with a public key, or folders with such files named `*.pub.pem`.
            own: those of the user's configuration too: its own key, and all in `trusted`.

        Raises:
            ConfigError: a place holds no public key.
        """
        files: list[Path] = []
        for place in places:
            inside = sorted(place.glob(ENDING)) if place.is_dir() else [place]
            if not inside:
                raise ConfigError(
                    "--trust", str(place), f"no key in this folder ({ENDING}); give a publisher's public key"
                )
            files += inside
        if own:
            folder = config_folder()
            files += [folder / PUBLIC_KEY] if (folder / PUBLIC_KEY).exists() else []
            files += sorted((folder / TRUSTED).glob(ENDING))
        return cls(frozenset(load_public_key(file, "--trust") for file in files))

    def __contains__(self, public_key: object) -> bool:
        return public_key in self.keys

    def require(self, public_key: bytes, place: str) -> None:
        """Check that a key is trusted.

        Raises:
            PromptError: it is not.
        """
        if public_key not in self.keys:
            raise PromptError(
                f"{place}: was signed by the key {fingerprint(public_key)}, which is not trusted here; compare this "
                f"fingerprint with one that you had from the publisher, and give the key's file with --trust"
            )
