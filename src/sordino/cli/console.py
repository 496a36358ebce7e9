"""The command line's ends towards the system: what is printed where, and what a signal does.

Imports nothing heavy, so that it is at work before anything that takes time is imported.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import shlex
import signal
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TextIO

from sordino.errors import SordinoWarning

OBEYED = ("Cc", "Cf", "Zl", "Zp")  # categories of Unicode: controls, formats, separators of lines
KEPT = "\n\t\u200c\u200d"  # with the joiners of Persian and of emoji
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
PLAIN = {
    "±": "+-",
    "ε": "epsilon",
    "δ": "delta",
    "σ": "sigma",
    "×": "x",
    "…": "...",
    "–": "-",
    "—": "-",
    "━": "-",
    "╸": "-",
    "╺": "-",
    "•": "*",
    "“": '"',
    "”": '"',
    "’": "'",
}


class Interrupted(KeyboardInterrupt):
    """The user or the system asks this process to end.

    Attributes:
        code: the exit code that says so.
    """

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class _State:
    """Return how to go on after an interruption, as a sentence, and the exit code of one that was asked for."""

    how = "nothing was written"
    code: int | None = None


def at_work(how: str) -> None:
    """Say what a message shall tell if the command is interrupted from here on."""
    _State.how = how


def in_run_folder(folder: Path) -> None:
    """Name a run directory on standard error, and how to go on in it if the command is interrupted."""
    at_work(f"go on with --resume --out {shlex.quote(str(folder))}")
    print(f"Run directory: {folder}", file=sys.stderr, flush=True)


def run_command(command: Callable[[], int]) -> int:
    """Run a command that may be interrupted; its exit code.

    A second signal ends the process at once: what is in a run directory is whole at any moment.
    """
    _prepare_streams()
    _State.how, _State.code = "nothing was written", None
    shown, warnings.formatwarning = warnings.formatwarning, _Warnings(warnings.formatwarning)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup
                signal.signal(number, _interrupt)
        code = command()
        if _State.code is not None:  # what was interrupted made something else of it
            return _tell_interruption(_State.code)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        return _tell_interruption(getattr(error, "code", INTERRUPTED))
    except OSError as error:
        return _tell_system_error(error)
    except Exception:
        # Inside of a library an interruption may surface as that library's own error.
        if _State.code is not None:
            return _tell_interruption(_State.code)
        raise
    finally:
        warnings.formatwarning = shown
        _drop_unwritable(sys.stdout)


def end_with_terminal() -> None:
    """Take a terminal that closes for an interruption, too: for commands that started other processes."""
    hangup = getattr(signal, "SIGHUP", None)  # not on every system
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:
        signal.signal(hangup, _interrupt)


def fail(message: object) -> int:
    """Print one line on standard error; the exit code of bad input."""
    with contextlib.suppress(OSError):
        say(f"sordino: {' '.join(str(message).splitlines())}", sys.stderr)
    return 2


def say(text: object, file: TextIO | None = None) -> None:
    """Print text that may repeat what others wrote; see `harmless`. It is flushed at once."""
    print(harmless(str(text)), file=file or sys.stdout, flush=True)


def harmless(text: str) -> str:
    """Return text without what a terminal obeys: names and cards of others could recolor, hide or erase lines.

    Controls, but line ends and tabs, and signs that turn the direction of writing are shown as Python writes them.
    """
    return "".join(
        repr(sign)[1:-1] if unicodedata.category(sign) in OBEYED and sign not in KEPT else sign for sign in text
    )


class _Warnings:
    """Puts our own warnings into one line each, once, without the place in the program that Python has before them."""

    def __init__(self, others: Callable[..., str]) -> None:
        self._others, self._told = others, set[str]()

    def __call__(self, message: Warning | str, category: type[Warning], *place: object, **more: object) -> str:
        if not issubclass(category, SordinoWarning):
            return self._others(message, category, *place, **more)
        text = harmless(" ".join(str(message).splitlines()))
        if text in self._told:
            return ""
        self._told.add(text)
        return f"sordino: warning: {text}\n"


def _interrupt(number: int, _: FrameType | None) -> None:
    for handled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, signal.SIG_DFL)
    _State.code = 128 + number
    raise Interrupted(128 + number)


def _tell_interruption(code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"sordino: interrupted; {_State.how}", file=sys.stderr, flush=True)
    return code


def _tell_system_error(error: OSError) -> int:
    """A file or stream that failed where nothing better is known about it than what the system says."""
    if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough, as `head` does
        return 1
    where = f"{error.filename}: " if error.filename is not None else ""
    return fail(f"{where}{error.strerror or error}")


def _prepare_streams() -> None:
    """See that whatever is printed can be: on any encoding, and where a stream is closed."""
    codecs.register_error("sordino", _replacement)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            # Python opens no stream on a closed descriptor. One must stand there, or the next file that is opened
            # gets the number, and whatever a library prints goes into that file.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="sordino")


def _replacement(error: UnicodeError) -> tuple[str | bytes, int]:
    """For characters that a stream's encoding lacks: plain words for signs of ours, bytes for names of files."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if 0xDC80 <= ord(sign) <= 0xDCFF:  # a byte of a file's name that is not UTF-8: as it was
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return PLAIN.get(sign, "?"), error.start + 1


def _drop_unwritable(stream: TextIO) -> None:
    """Without this, Python's own flush at exit would complain again about a closed pipe or a full disk."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
