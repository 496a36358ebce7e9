"""Features of frozen towers, kept on disk.

A feature belongs to (encoder, kind of feature, content of the picture), whatever the file's name or
data set. Features lie in *shards*: files of up to about a thousand features that are written once
and never changed. A shard's name is the digest of its content, so a damaged one is recognized. It
is created by a rename, so a reader sees a whole shard or none, and any number of processes may
write at once.

A shard tells which pictures were encoded, by their digests, and their exact features, to which no
noise was added. So only their owner enters the folder of features, and reads a shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from sordino.errors import SordinoWarning
from sordino.files import entered_by_others, make_private, replace_file

Kind = str  # "image", "patch", "pixels", as `layer_kind` says, or one of `STATES`
Features = NDArray[np.float32]

# What a generative model keeps of a picture, a row a token: its tokens, or keys and values of all before the prompt.
IMAGE_TOKENS, KEYS_VALUES = "image-tokens", "keys-values"
STATES = (IMAGE_TOKENS, KEYS_VALUES)

LAYOUT = "2"  # part of every key: raise it when shards or the decoding of pictures change
FOLDER = "features"  # in the cache's directory
STALE_SECONDS = 24 * 3600.0  # a temporary file this old was left by a process that was killed


def layer_kind(layer: int) -> Kind:
    """Return the kind of feature that is the hidden states entering a layer of the image tower."""
    return f"layer {layer}"


def layer_of(kind: Kind) -> int | None:
    """Return the layer whose input a kind of feature is; None for other kinds."""
    name, _, number = kind.partition(" ")
    return int(number) if name == "layer" else None


class FeatureCache:
    """Features on disk, by encoder fingerprint, kind and content digest.

    A failure of the cache costs time only. A directory that cannot be read or written, a full disk
    or a damaged shard is a SordinoWarning, and the features in question are computed again.

    Args:
        directory: created by the first write; None means `default_directory`. If that is None too,
            nothing is kept.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = default_directory() if directory is None else directory
        self._writable = self.directory is not None
        if self.directory is None:
            _warn_homeless()
        else:
            with contextlib.suppress(OSError):  # what cannot be looked at is told where it is read or written
                _warn_open(self.directory / FOLDER)

    def find(self, fingerprint: str, kind: Kind, digests: Sequence[bytes]) -> dict[bytes, Features]:
        """Return the cached features, by digest."""
        missing = set(digests) if self.directory is not None else set()
        features: dict[bytes, Features] = {}
        for shard in self._shards(fingerprint, kind) if missing else ():
            if not missing:
                break
            rows = self._read(shard, missing)
            features.update(rows)
            missing -= rows.keys()
        return features

    def store(self, fingerprint: str, kind: Kind, features: Mapping[bytes, Features]) -> None:
        """Write features as one shard; a failure is a warning, and ends this object's writing."""
        if not features or not self._writable:
            return
        content = save(
            {
                "digests": np.frombuffer(b"".join(features), dtype=np.uint8).reshape(
                    len(features),
                    -1,
                ),
                # A stack takes its rows' memory order, which a frozen tower chooses; safetensors
                # looks at bytes only.
                "features": np.ascontiguousarray(np.stack(list(features.values()))),
            }
        )
        folder = self._folder(fingerprint, kind)
        try:
            make_private(folder.parent)
            folder.mkdir(exist_ok=True)
            _remove_stale(folder)
            replace_file(folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content, private=True)
        except OSError as error:
            self._writable = False
            reason = error.strerror or str(error)
            self._warn(f"cannot be written ({reason}); going on without keeping features")

    def _folder(self, fingerprint: str, kind: Kind) -> Path:
        key = hashlib.sha256("\n".join((LAYOUT, fingerprint, kind)).encode()).hexdigest()
        assert self.directory is not None
        return self.directory / FOLDER / key[:32]

    def _shards(self, fingerprint: str, kind: Kind) -> list[Path]:
        folder = self._folder(fingerprint, kind)
        try:
            return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self._warn(f"cannot be read ({error.strerror}); features are computed again")
            return []

    def _read(self, shard: Path, wanted: set[bytes]) -> dict[bytes, Features]:
        """Return the wanted features of a shard; of a damaged one nothing, with a warning, and remove it."""
        try:
            with safe_open(
                shard,
                framework="numpy",
            ) as file:  # the digests alone, to leave most shards unread
                digests = [row.tobytes() for row in file.get_tensor("digests")]
            if wanted.isdisjoint(digests):
                return {}
            content = shard.read_bytes()
            if hashlib.sha256(content).hexdigest() != shard.stem:
                raise SafetensorError("its content does not match its checksum")
            features = load(content)["features"]
        except FileNotFoundError:
            return {}  # another process found it damaged and removed it, or it is another user's alone
        except OSError as error:
            self._warn(
                f"has a file that cannot be read, {shard.name} ({error.strerror}); its pictures are encoded again"
            )
            return {}
        except (SafetensorError, KeyError, ValueError) as error:
            self._warn(
                f"holds a damaged file, {shard.name} ({error}); its pictures are encoded again",
            )
            _remove(shard)
            return {}
        # Copies, so that a row does not keep its whole shard in memory.
        return {digest: features[row].copy() for row, digest in enumerate(digests) if digest in wanted}

    def _warn(self, what: str) -> None:
        warnings.warn(f"feature cache {str(self.directory)!r} {what}", SordinoWarning, stacklevel=2)


def default_directory() -> Path | None:
    """Return $SORDINO_CACHE, else $XDG_CACHE_HOME/sordino, else ~/.cache/sordino; None for a user without a home."""
    sordino_cache = os.environ.get("SORDINO_CACHE")
    user_cache = os.environ.get("XDG_CACHE_HOME")
    try:
        if sordino_cache:
            return Path(sordino_cache).expanduser()
        return (Path(user_cache) if user_cache else Path("~/.cache").expanduser()) / "sordino"
    except RuntimeError:
        # No HOME, and no entry in the system's list of users, as in many containers.
        return None


@cache
def _warn_homeless() -> None:
    """Warn once that features are not kept."""
    warnings.warn(
        "this user has no home directory, so features of pictures are not kept; set SORDINO_CACHE to a folder that "
        "can be written",
        SordinoWarning,
        stacklevel=3,
    )


@cache
def _warn_open(folder: Path) -> None:
    """Warn once of a folder of features that others may enter: earlier versions let everybody read the files in it."""
    entered = entered_by_others(folder)
    if entered:
        warnings.warn(
            f"feature cache {str(folder)!r} {entered}, and its files tell which pictures were encoded, with their "
            f"features; run 'chmod 700 {folder}'",
            SordinoWarning,
            stacklevel=3,
        )


def _remove_stale(folder: Path) -> None:
    """Remove temporary files of writers that were killed long ago."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process may remove it first
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
