"""The common part of every run directory: the configuration that it belongs to, and a line of metrics a step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sordino.errors import RunError
from sordino.experiments.run_lock import require_unused
from sordino.experiments.started import RUN, Kind, is_comparison, started_with, was_begun
from sordino.experiments.toml_tables import first_difference, to_toml
from sordino.files import write_atomically
from sordino.progress import log
from sordino.results import FILE

T = TypeVar("T")

SUMMARY_KEYS = ("accuracy", "seconds", "version")  # of every command's summary


def prepare(
    out: Path, tables: Mapping[str, Any], resume: bool, free: Sequence[str] = (), kind: Kind = RUN
) -> dict[str, Any] | None:
    """Check that `out` may be written, and return the summary of a run that is finished already.

    Args:
        out: the run directory.
        tables: the configuration, resolved.
        resume: whether it is to go on.
        free: tables that may differ from those that it was started with.
        kind: of the command.

    Raises:
        RunError: it may not; the message says what to do.
    """
    return finished(out, _any_summary) if was_started(out, tables, resume, free, kind) else None


def was_started(out: Path, tables: Mapping[str, Any], resume: bool, free: Sequence[str] = (), kind: Kind = RUN) -> bool:
    """Check that `out` may be written, and return whether it was started before with this configuration.

    Raises:
        RunError: see `prepare`.
    """
    if not resume:
        require_unused(out)
        return False
    old = started_with(out) if was_begun(out, kind) else {}
    if not old:  # nothing, or stopped before its configuration was written
        return False
    before, after = ({key: value for key, value in part.items() if key not in free} for part in (old, tables))
    difference = first_difference(before, after)
    if difference:
        key, before, after = difference
        if key.startswith("methods.") and key.endswith(".sha256"):
            kept = out / old["methods"][key.split(".")[1]]["file"]
            raise RunError(
                f"the method's file changed since {out} was started, where {kept} is its copy; change it back or "
                "choose another --out"
            )
        raise RunError(
            f"the configuration changed since {out} was started: {key} was {before!r} and is {after!r}; "
            "change it back or choose another --out"
        )
    return True


def require_run(folder: Path) -> None:
    """Check that a directory is there that may hold a finished run.

    Raises:
        RunError: there is none.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} holds no finished run (there is no such directory)")
    if is_comparison(folder):
        below = next((file.parent for file in sorted(folder.rglob(FILE))), folder / "METHOD" / "seed-0")
        raise RunError(f"{folder} holds a comparison; give one of its runs, such as {below}")


def start(out: Path, tables: Mapping[str, Any], methods: Mapping[str, bytes]) -> None:
    """Write the configuration of a run, and the files of methods that it names; what is there stays.

    Args:
        out: the run directory.
        tables: the configuration, resolved.
        methods: the content of each file by its path in `out`.

    Raises:
        RunError: the directory cannot be written.
    """
    if (out / "config.toml").exists():
        return
    for path, content in methods.items():
        write_atomically(out / path, content)
    write_atomically(out / "config.toml", to_toml(tables).encode())


def finished(out: Path, parse: Callable[[bytes], T]) -> T | None:
    """Read the summary of a finished run; None if it is missing, or damaged, as it can be made again.

    Args:
        out: the run directory.
        parse: reads the content of `summary.json`; raises ValueError or RecursionError if it is damaged.

    Raises:
        RunError: it cannot be read.
    """
    file = out / FILE
    if not file.exists():
        return None
    try:
        return parse(file.read_bytes())
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}; mend its permissions") from None
    except (ValueError, RecursionError) as error:
        log.warning("%s is damaged (%s); it is made again from what was trained", file, error)
        return None


def _any_summary(content: bytes) -> dict[str, Any]:
    """Read a summary of any command."""
    summary = json.loads(content)
    if not (isinstance(summary, dict) and set(SUMMARY_KEYS) <= set(summary)):
        raise ValueError("it lacks what every summary has")
    return summary


class Metrics:
    """`metrics.jsonl`: a line a round, of the rounds up to the one that training resumes after.

    Attributes:
        lines: what it holds.
        listener: is given each line that is added; None: nobody is.
    """

    listener: Callable[[dict[str, Any]], None] | None = None

    def __init__(self, path: Path, last: int, key: str = "round", numbers: Sequence[str] = (), first: int = 0) -> None:
        """Read what an interrupted run left, and drop the lines after `last`.

        Args:
            path: of the file.
            last: the round that training resumes after; 0 where it starts.
            key: the entry that numbers the lines.
            numbers: entries that every line must have as numbers.
            first: the number of the first line.

        Raises:
            RunError: a line is damaged, other than by a process that stopped in the middle of the last one, or a round
                is missing; nothing was changed.
        """
        self.path, self._key = path, key
        lines = _read_lines(path, key, (key, *numbers))
        self.lines = [line for line in lines if line[key] <= last]
        held = [line[key] for line in self.lines]
        if held != list(range(first, last + 1)) and (last or held):
            missing = sorted(set(range(first, last + 1)) - set(held))
            what = f"lacks {key} {missing[0]}" if missing else f"does not hold each {key} once and in order"
            raise RunError(f"{path} {what}, though the run got beyond it; {_REMEDY}")
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def add(self, line: dict[str, Any]) -> None:
        """Write a line."""
        self.lines.append(line)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that follows, which is flushed too
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror}; free space, then go on with --resume"
            ) from None
        if self.listener is not None:
            self.listener(line)

    def extend(self, entries: Mapping[str, Any]) -> None:
        """Add entries to the last line, which become known after it; the listener is given these with its number."""
        line = self.lines[-1]
        line |= entries
        write_atomically(self.path, "".join(json.dumps(each) + "\n" for each in self.lines).encode())
        if self.listener is not None:
            self.listener({self._key: line[self._key], **entries})

    def seconds(self, name: str) -> float:
        """The sum of one entry over all lines."""
        return float(sum(line[name] for line in self.lines))


_REMEDY = "nothing was changed; put the file back, or start a new run"


def _read_lines(path: Path, key: str, numbers: Sequence[str]) -> list[dict[str, Any]]:
    """The whole lines of a file of metrics.

    Raises:
        RunError: see `Metrics`.
    """
    try:
        texts = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from None
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        cut = number == len(texts)  # no line break after it: the process was stopped in the middle of this line
        if not text:
            continue
        try:
            line = json.loads(text)
            if not (isinstance(line, dict) and all(_is_number(line.get(name)) for name in numbers)):
                raise ValueError(f"it must be an object with the numbers {', '.join(numbers)}")
            if not isinstance(line[key], int):
                raise ValueError(f"{key} must be a whole number")
        except (ValueError, RecursionError) as error:
            if cut:
                break
            raise RunError(f"line {number} of {path} is damaged ({error}); {_REMEDY}") from None
        lines.append(line)
    return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
