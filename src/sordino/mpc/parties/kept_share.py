"""A server's share in an encrypted file, so that a restarted server needs nobody.

The file has a head in the clear (format, role, versions, key derivation) and pieces under ChaCha20-Poly1305 (RFC 8439).
Every file has a key of its own: from the bytes of a key file by HKDF, or from a passphrase by scrypt, with a random
salt. So nonces may count pieces. The last piece is marked in its nonce, and the head is authenticated with each piece.
So pieces that are cut off, exchanged, or of the other server's file are noticed (Hoang, Reyhanitabar, Rogaway and
Vizar, Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance, CRYPTO 2015: the construction STREAM).
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from sordino.errors import ConfigError, RunError
from sordino.files import FREE_SPACE, NewFile, create_files, replace_file
from sordino.mpc.parties.model_share import Model
from sordino.mpc.parties.transport import packed, unpacked
from sordino.mpc.parties.versions import own_versions
from sordino.randomness import system_bytes

PASSPHRASE = "SORDINO_SHARE_PASSPHRASE"  # environment variable
SHORTEST = 12  # characters of a passphrase
FORMAT = "sordino share 1"
PIECE, TAG = 2**24, 16  # bytes of a piece, and of its tag
KEY_BYTES, SALT_BYTES = 32, 32
SCRYPT = 2**17, 8, 1  # n, r and p: half a second and 128 MiB a guess
AGAIN = "or move the file away, start the server, and let the model owner run 'sordino mpc provide' again"


@dataclass(frozen=True)
class KeptShare:
    """The file of a server's share.

    Attributes:
        file: its path. It need not exist yet.
        secret: bytes of the key file, or the passphrase.
        kind: "key file" or "passphrase".
    """

    file: Path
    secret: bytes = field(repr=False)
    kind: str

    @classmethod
    def of(cls, file: Path, key_file: Path | None, environment: Mapping[str, str]) -> KeptShare:
        """Read the secret of a file, from a key file or else from the environment variable `PASSPHRASE`.

        A key file that does not exist is made with 32 random bytes and mode 600, unless there is a share already.

        Raises:
            ConfigError: there is no secret or there are two, others can read the key file, or a secret is too short.
        """
        passphrase = environment.get(PASSPHRASE)
        if (key_file is None) == (not passphrase):
            given = "neither is given" if key_file is None else "both are given"
            raise ConfigError(
                "--keep", str(file), f"a share is kept under --key-file FILE or the passphrase in {PASSPHRASE}; {given}"
            )
        if key_file is not None:
            return cls(file, _key_of(key_file, file), "key file")
        if len(str(passphrase)) < SHORTEST:
            raise ConfigError(PASSPHRASE, "***", f"must have at least {SHORTEST} characters")
        return cls(file, str(passphrase).encode(), "passphrase")

    def save(self, model: Model, role: str) -> None:
        """Write a server's share, in place of an earlier one.

        Raises:
            RunError: it cannot be written.
        """
        header, payload = model.to_message()
        salt = system_bytes(SALT_BYTES)
        head = {"format": FORMAT, "role": role, "versions": own_versions(), "kind": self.kind, "salt": salt.hex()}
        line = json.dumps(head).encode() + b"\n"
        cipher, content = ChaCha20Poly1305(self._key(salt)), memoryview(packed(payload, **header))
        starts = range(0, len(content), PIECE)
        pieces = [
            cipher.encrypt(_nonce(number, start + PIECE >= len(content)), content[start : start + PIECE], line)
            for number, start in enumerate(starts)
        ]
        try:
            replace_file(self.file, b"".join([line, *pieces]), private=True)
        except OSError as error:
            raise RunError(f"the share cannot be kept: {self.file}: {error.strerror or error}") from None

    def load(self, role: str) -> Model | None:
        """Read a server's share; None if the file does not exist.

        Raises:
            ConfigError: the file is damaged, of another role or version, or under another key.
        """
        try:
            line, newline, content = self.file.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(f"cannot be read: {error.strerror or error}") from None
        head = self._head(line)
        if head["role"] != role:
            raise self._refused(f"is the share of {head['role']}, and this is {role}; give {role}'s own file")
        if head["versions"] != own_versions():
            raise self._refused(f"was written by another version, {head['versions']}, and this is {own_versions()}")
        if head["kind"] != self.kind:
            raise self._refused(f"is under a {head['kind']}, and a {self.kind} is given; give the {head['kind']}")
        cipher, pieces, size = ChaCha20Poly1305(self._key(bytes.fromhex(head["salt"]))), [], PIECE + TAG
        try:
            for number, start in enumerate(range(0, len(content), size)):
                piece = memoryview(content)[start : start + size]
                pieces.append(cipher.decrypt(_nonce(number, start + size >= len(content)), piece, line + newline))
            return Model.of_message(*unpacked(b"".join(pieces)))
        except InvalidTag:
            raise self._refused(f"is damaged, or under another {self.kind}; give the right one") from None
        except Exception as error:  # authentic, and yet no model
            raise self._refused(f"holds no share ({type(error).__name__})") from None

    def _head(self, line: bytes) -> dict[str, Any]:
        """Parse the head, whose authenticity is checked with the pieces."""
        try:
            head: dict[str, Any] = json.loads(line)
            if head["format"] != FORMAT or {"role", "versions", "kind"} - head.keys():
                raise ValueError
            bytes.fromhex(head["salt"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._refused("is no share of a server") from None
        return head

    def _key(self, salt: bytes) -> bytes:
        if self.kind == "passphrase":
            return Scrypt(salt, KEY_BYTES, *SCRYPT).derive(self.secret)
        return HKDF(SHA256(), KEY_BYTES, salt, FORMAT.encode()).derive(self.secret)

    def _refused(self, why: str) -> ConfigError:
        return ConfigError("--keep", str(self.file), f"{why}, {AGAIN}")


def _key_of(key_file: Path, file: Path) -> bytes:
    """Read or make a key file."""
    name = str(key_file)
    if not key_file.exists() and not file.exists():
        try:
            with contextlib.suppress(FileExistsError):  # another process made it since
                create_files(NewFile(key_file, system_bytes(KEY_BYTES), private=True))
        except OSError as error:
            remedy = f"{FREE_SPACE}, or name another file"
            raise ConfigError("--key-file", name, f"cannot be made: {error.strerror or error}; {remedy}") from None
    try:
        mode = stat.S_IMODE(key_file.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            raise ConfigError("--key-file", name, f"others may read it (mode {mode:o}); run 'chmod 600 {name}'")
        secret = key_file.read_bytes()
    except OSError as error:
        raise ConfigError(
            "--key-file", name, f"{error.strerror or error}; give the file that {file} is under"
        ) from None
    if len(secret) < KEY_BYTES:
        raise ConfigError(
            "--key-file", name, f"must have at least {KEY_BYTES} random bytes; a file that is missing is made"
        )
    return secret


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
