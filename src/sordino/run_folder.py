"""What every run directory has: a configuration that it belongs to, and a line of metrics for each step."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sordino.config import first_difference
from sordino.errors import RunError
from sordino.files import write_atomically
from sordino.run_lock import is_empty, writable


def prepare(out: Path, tables: Mapping[str, Any], resume: bool, free: Sequence[str] = ()) -> dict[str, Any] | None:
    """Check that `out` may be written; the summary of a run that is finished already.

    Args:
        out: the run directory.
        tables: the configuration, resolved.
        resume: whether it is to go on.
        free: tables that may differ from those that it was started with.

    Raises:
        RunError: it may not; the message says what to do.
    """
    writable(out)
    config_file = out / "config.toml"
    if not resume:
        if not is_empty(out):
            raise RunError(f"{out} exists; go on with --resume, or choose another --out")
        return None
    if not config_file.exists():
        return None
    try:
        old = tomllib.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{config_file} cannot be read ({error}); choose another --out") from None
    before, after = ({key: value for key, value in each.items() if key not in free} for each in (old, tables))
    difference = first_difference(before, after)
    if difference:
        key, before, after = difference
        raise RunError(
            f"the configuration changed since {out} was started: {key} was {before!r} and is {after!r}; "
            "change it back or choose another --out"
        )
    summary = out / "summary.json"
    return dict(json.loads(summary.read_bytes())) if summary.exists() else None


class Metrics:
    """`metrics.jsonl`: a line a round, of the rounds up to the one that training resumes after.

    Attributes:
        lines: what it holds.
    """

    def __init__(self, path: Path, last: int, key: str = "round") -> None:
        """Read what an interrupted run left, and drop the lines after `last`; `key` is a line's number."""
        self.path = path
        self.lines: list[dict[str, Any]] = []
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:
                break  # the process was stopped in the middle of this line
            if line[key] <= last:
                self.lines.append(line)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def add(self, line: dict[str, Any]) -> None:
        """Write a line."""
        self.lines.append(line)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror}; free space, then go on with --resume"
            ) from None

    def seconds(self, name: str) -> float:
        """The sum of one entry over all lines."""
        return float(sum(line[name] for line in self.lines))
