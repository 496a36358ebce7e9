"""Writing of files whole or not at all, and reading of others' files without hanging."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

from sordino.errors import ConfigError, DataError, RunError, nearest
from sordino.progress import log

# Flags that neither wait for a writer of a pipe, nor make a terminal the process's own, nor
# translate line ends.
READING = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY", "O_CLOEXEC"))

# Remedies where a file cannot be written.
GO_ON = "free space or choose another --out; what was written before is intact, go on with --resume"
ANOTHER_OUT = "free space or choose another --out"
FREE_SPACE = "free space, or mend its permissions"

NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that have no hard links

DATA = "$SORDINO_DATA"  # in a path of a configuration: the folder that this variable of the environment names
DATA_UNSET = "../shared/data"  # its value where it is not set


class Record(BaseModel):
    """Content of a file that may gain fields: without a value they are left out, so older files keep their bytes.

    Attributes:
        LATER: the fields that came later, whose default is None.
    """

    LATER: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return {key: value for key, value in content.items() if value is not None or key not in self.LATER}


def json_pieces(text: bytes) -> int:
    """Return a number that a JSON text has no more values than, without parsing it.

    A value stands at the beginning or behind one of these signs. Those inside strings count too; Base64 has none.
    """
    return 1 + sum(text.count(sign) for sign in (b"[", b"{", b",", b":"))


def read_regular(path: Path, limit: int) -> bytes:
    """Read a regular file, or the one that a link leads to.

    A path from somebody else's data may lead to a pipe that never ends, a device, or a file of any
    size.

    Args:
        path: the file's path.
        limit: the largest number of bytes to read.

    Raises:
        DataError: it is no regular file, or larger than `limit`; the message is the reason alone.
        OSError: it cannot be opened or read.
    """
    _require_regular(path.stat())  # before opening it, which may move a tape
    with os.fdopen(os.open(path, READING), "rb") as file:
        status = os.fstat(file.fileno())  # the open file may be another one by now
        _require_regular(status)
        content: bytes | None = file.read(limit + 1) if status.st_size <= limit else None
        if content is None or len(content) > limit:
            raise DataError(f"larger than the {limit:,} bytes that are read")
    return content


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DataError("not a regular file")


def replace_file(path: Path, content: bytes, private: bool = False) -> None:
    """Write or replace a file, all or nothing; create the folders above it.

    The content goes to a hidden temporary file beside it, is flushed to the disk, and is renamed.
    Any number of processes may write at once.

    Args:
        path: of the file.
        content: of it.
        private: only its owner may read it, at no moment anybody else; else as the process's umask says.

    Raises:
        OSError: it cannot be written; an older file is untouched, and no temporary file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb", opener=_open_private if private else None) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


@dataclass(frozen=True)
class NewFile:
    """A file to be made by `create_files`.

    Attributes:
        path: of the file.
        content: of it.
        private: only its owner may read it, at no moment anybody else; else as the process's umask says.
        derived: it follows from another file, as a public key does, so that one with this content is as good as made:
            another process may have completed a pair.
    """

    path: Path
    content: bytes
    private: bool = False
    derived: bool = False


def create_files(*files: NewFile) -> None:
    """Make new files, all of them or none; create the folders above them. No file is ever overwritten.

    Each goes to a hidden temporary file beside its place, is flushed to the disk, and is linked to its place.

    Raises:
        FileExistsError: a file is there, which its `filename` names; no other one was made.
        OSError: one cannot be written; none was made, and no temporary file remains.
    """
    staged: list[tuple[Path, NewFile]] = []
    made: list[Path] = []
    try:
        for file in files:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.path.with_name(f".{uuid4().hex}.tmp")
            staged.append((temporary, file))
            _write_new(temporary, file)
        for temporary, file in staged:
            if _linked(temporary, file):
                made.append(file.path)
        for folder in {file.path.parent for file in files}:
            _flush_folder(folder)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _write_new(path: Path, file: NewFile) -> None:
    """Write a file's content to a path at which there is nothing, and flush it."""
    with open(path, "xb", opener=_open_private if file.private else None) as opened:
        opened.write(file.content)
        opened.flush()
        os.fsync(opened.fileno())


def _linked(temporary: Path, file: NewFile) -> bool:
    """Put a temporary file to its place; false if a derived one is there already."""
    try:
        os.link(temporary, file.path)
    except FileExistsError:
        if file.derived and file.path.is_file() and file.path.read_bytes() == file.content:
            return False
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file.path)) from None
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            _write_new(file.path, file)
        except FileExistsError:
            raise
        except BaseException:
            file.path.unlink(missing_ok=True)
            raise
    return True


def require_private(folder: Path, remedy: str) -> None:
    """Make a folder that only its owner may enter, or warn if one is there that others may.

    Args:
        folder: its path.
        remedy: what to do about one that others may enter, for the warning.

    Raises:
        RunError: it cannot be made.
    """
    try:
        make_private(folder)
        entered = entered_by_others(folder)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}; {FREE_SPACE}") from None
    if entered:
        log.warning("%s %s; %s", folder, entered, remedy)


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may enter; one that is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def entered_by_others(folder: Path) -> str:
    """Return in words that others than its owner may enter a folder; "" if they may not, or it is not there.

    Raises:
        OSError: its mode cannot be read.
    """
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except FileNotFoundError:
        return ""
    closed = os.name != "posix" or not mode & (stat.S_IRWXG | stat.S_IRWXO)
    return "" if closed else f"may be entered by others than its owner (mode {mode:o})"


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_atomically(path: Path, content: bytes, remedy: str = GO_ON, private: bool = False) -> None:
    """Write a file with `replace_file`.

    Args:
        path: of the file.
        content: of it.
        remedy: what to do if it cannot be written. The default is for run directories of a command with --resume.
        private: as for `replace_file`.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    try:
        replace_file(path, content, private)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None


def write_private(path: Path, content: bytes) -> None:
    """Write a file of a party's state, which only its owner may read; as `write_atomically`."""
    write_atomically(path, content, FREE_SPACE, private=True)


def user_path(text: str, key: str) -> Path:
    """Return a path as a user writes it, with `~` for a home and `$SORDINO_DATA` at its start for a folder of data.

    Args:
        text: the path.
        key: the key of the configuration that names it, for messages.

    Raises:
        ConfigError: there is no such home, or no file can have this name.
    """
    first, *rest = Path(text).parts or ("",)
    if first == DATA:
        text = str(Path(os.environ.get(DATA[1:]) or DATA_UNSET, *rest))
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError:
        raise ConfigError(
            key,
            text,
            "there is no such home directory; write the path out",
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            key,
            text,
            f"no file can have this name: {getattr(error, 'strerror', error)}",
        ) from None
    return path


def absolute_path(text: str, key: str) -> Path:
    """Return a user's path from the root, with all links resolved; see `user_path`.

    Raises:
        ConfigError: as for `user_path`, or links form a circle, or the working directory is gone.
    """
    path = user_path(text, key)
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            key,
            text,
            f"leads nowhere: {getattr(error, 'strerror', None) or error}",
        ) from None


def require_folder(path: Path, place: str, remedy: str = "", similar: bool = True) -> None:
    """Check that a folder is there.

    Args:
        path: of the folder.
        place: the key or value that names it, for messages.
        remedy: what to do.
        similar: name a folder beside it in place of the remedy, if one has a similar name.

    Raises:
        DataError: there is none.
    """
    if not path.is_dir():
        other = _nearest_beside(path, folders=True) if similar else ""
        raise DataError(f"{place}: there is no folder {str(path)!r}{other or remedy}")


def require_file(path: Path, place: str) -> None:
    """Check that a file is there; the message names one beside it that has a similar name.

    Args:
        path: of the file.
        place: the beginning of the message.

    Raises:
        DataError: there is none.
    """
    if not path.exists():
        other = _nearest_beside(path, folders=False)
        raise DataError(f"{place} cannot be read: No such file or directory{other}")


def _nearest_beside(path: Path, folders: bool) -> str:
    """Return "; did you mean 'NAME'?" with the folder or file beside a missing one that has the nearest name, or ""."""
    beside: list[str] = []
    with contextlib.suppress(OSError):
        beside = [other.name for other in path.parent.iterdir() if other.is_dir() == folders]
    return nearest(path.name, beside)


def _flush_folder(folder: Path) -> None:
    """Flush a folder to make a rename in it durable, if the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
