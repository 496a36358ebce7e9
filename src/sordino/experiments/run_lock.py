"""One process at a time in a run directory: two would write every round twice, and count half of what they release.

The lock is the operating system's, on a file in the directory. It ends with its process however that ends, so what a
dead process left behind is no obstacle, and a process id that is in use again fools nobody: the id in the file is there
for the message only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sordino.errors import RunError
from sordino.files import make_private
from sordino.progress import log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
DOOR = "next"  # a folder inside one that is waited for: whoever holds it is the next to have that one
POLL = 0.02  # seconds between two tries to have a directory that is waited for
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that have none
_held: dict[Path, int] = {}  # directories that this process holds, and the thread that does
_guard = threading.Lock()


class InUse(RunError):
    """Another process or thread holds a directory."""


@contextmanager
def held(folder: Path, instead: bool = True) -> Iterator[None]:
    """Hold a run directory for as long as the block lasts; in one thread, blocks may be nested.

    The directory is made where it is missing, for its owner alone to enter, and removed again if nothing came to be in
    it.

    Args:
        folder: the directory.
        instead: whether the command has an `--out` that can name another one; for messages.

    Raises:
        InUse: another process or thread holds it; the message is one line.
        RunError: it cannot be written.
    """
    place = writable(folder, instead)
    with _guard:
        nested = _held.get(place) == threading.get_ident()
        if not nested:
            if place in _held:
                raise _in_use(folder, f"another thread of this process ({os.getpid()})", instead)
            made = _missing(folder)
            descriptor = _locked(folder, instead)
            _held[place] = threading.get_ident()
    try:
        yield
    finally:
        if not nested:
            with _guard:
                del _held[place]
                _release(folder, descriptor, made)


@contextmanager
def held_in_turn(folder: Path, seconds: float) -> Iterator[None]:
    """Hold a directory that others hold for short times, as `held` does, once it is free.

    Of several who wait, one stands at the door. So whoever just had the directory has it again after that one only.

    Args:
        folder: the directory.
        seconds: how long to wait.

    Raises:
        InUse: others still hold it.
        RunError: it cannot be written.
    """
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):  # `held` says why it cannot be made
        (folder / DOOR).mkdir(parents=True, exist_ok=True)  # and it stays, as it would else vanish under who comes
    with contextlib.ExitStack() as held_here:
        with contextlib.ExitStack() as at_door:
            _wait_for(folder / DOOR, end, at_door)
            _wait_for(folder, end, held_here)
        yield


def _wait_for(folder: Path, end: float, stack: contextlib.ExitStack) -> None:
    """Hold a directory until a stack ends.

    Raises:
        InUse: others still hold it at a time.
        RunError: it cannot be written.
    """
    while True:
        try:
            stack.enter_context(held(folder, instead=False))
            return
        except InUse:
            if time.monotonic() >= end:
                raise
            time.sleep(POLL)


def wait_until_free(folder: Path, seconds: float) -> None:
    """Wait until no other process holds a run directory.

    Raises:
        RunError: one still does.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            with held(folder):
                return
        except RunError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


@contextmanager
def lent(folder: Path) -> Iterator[None]:
    """Have a run directory that another thread holds, and lends for as long as the block lasts, held by this one."""
    place = writable(folder)
    with _guard:
        lender, _held[place] = _held[place], threading.get_ident()
    try:
        yield
    finally:
        with _guard:
            _held[place] = lender


@contextmanager
def all_held(folders: Sequence[Path]) -> Iterator[None]:
    """Hold several directories, or none of them."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(held(folder))
        yield


def is_empty(folder: Path) -> bool:
    """Return whether a directory holds nothing or does not exist; its lock, in use or left behind, does not count.

    A file in its place is something.
    """
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name == FILE for path in folder.iterdir())


def require_unused(folder: Path) -> None:
    """Check that a new run directory can be made.

    Raises:
        RunError: it cannot be written, or holds something.
    """
    writable(folder)
    if not is_empty(folder):
        raise RunError(f"{folder} exists; go on with --resume, or choose another --out")


def writable(folder: Path, instead: bool = True) -> Path:
    """The absolute path of a directory that may be written, or made; `instead` is as for `held`.

    Raises:
        RunError: it may not.
    """
    try:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if existing.is_dir() and os.access(existing, os.W_OK):
            return folder.resolve()
        if not existing.is_dir():
            reason = f"as {'it' if existing == folder else existing} is no folder"
        else:
            reason = f"as {'its permissions' if existing == folder else f'the permissions of {existing}'} forbid it"
    except (OSError, ValueError) as error:  # too long a name, or a null byte in it
        reason = f"as the system says: {getattr(error, 'strerror', None) or error}"
    remedy = "choose another --out" if instead else "mend that"
    raise RunError(f"{_short(folder)} cannot be written, {reason}; {remedy}")


def _locked(folder: Path, instead: bool) -> int | None:
    """The open and locked file; None where there are no locks to be had."""
    while True:
        try:
            make_private(folder)
            descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # another process ended, and removed the directory, in between
        except OSError as error:
            remedy = "choose another --out" if instead else "mend that"
            raise RunError(f"{_short(folder)} cannot be written: {error.strerror}; {remedy}") from None
        try:
            if not _lock(descriptor, folder):
                os.close(descriptor)
                return None
            if _is_current(descriptor, folder):
                _write_owner(descriptor)
                return descriptor
            os.close(descriptor)  # the file was removed by its holder when it ended: take the new one
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise _in_use(folder, owner, instead) from None


def _lock(descriptor: int, folder: Path) -> bool:
    """Take the lock; false where the system has none.

    Raises:
        BlockingIOError: somebody else has it.
    """
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError from None
            if error.errno not in NO_LOCKS:
                raise RunError(f"{folder / FILE} cannot be locked: {error.strerror}; choose another --out") from None
    log.warning("%s: its file system has no locks; see yourself that no other process writes there", folder)
    return False


def _is_current(descriptor: int, folder: Path) -> bool:
    """Return whether the open file is the one that is in the directory now."""
    try:
        return os.path.samestat(os.fstat(descriptor), (folder / FILE).stat())
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a full disk costs the message its number, no more
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _owner(descriptor: int) -> str:
    try:
        number = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
    except OSError:
        number = ""
    return f"process {number}" if number.isdecimal() else "another process"


def _release(folder: Path, descriptor: int | None, made: Sequence[Path]) -> None:
    """Remove the file while the lock is held, so that nobody's lock on it is taken for one on the directory."""
    with contextlib.suppress(OSError):
        (folder / FILE).unlink()
    if descriptor is not None:
        os.close(descriptor)
    with contextlib.suppress(OSError):  # not empty: all is well
        for parent in made:
            parent.rmdir()


def _missing(folder: Path) -> list[Path]:
    """The directories that are to be made for this one, the deepest first."""
    return [parent for parent in (folder, *folder.parents) if not parent.exists()]


def _in_use(folder: Path, owner: str, instead: bool) -> InUse:
    remedy = ", or choose another --out" if instead else ""
    return InUse(f"{folder} is in use by {owner}; wait until it ends{remedy}")


def _short(folder: Path) -> str:
    """A path for a message, its middle left out where it is longer than any line."""
    text = str(folder)
    return text if len(text) <= 300 else f"{text[:100]}...{text[-100:]}"
