"""Which kind of command started a folder, and the lines of a comparison: `--resume` goes on in its own kind only.

A run and a search for a private prompt are known by `config.toml`, a trial by its parties' certificates, and a
comparison by `lines.json`, which is written before its first run starts.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sordino.errors import RunError
from sordino.experiments.config import KEPT_METHODS
from sordino.experiments.data_record import FILE as DATA
from sordino.experiments.run_lock import FILE as LOCK
from sordino.experiments.run_lock import writable
from sordino.experiments.tracking import LINES
from sordino.files import write_atomically

COMPARISON_FILE = "comparison.json"
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")  # what a process that was killed leaves of a file; see `replace_file`
PARTIES = {"server-0", "server-1", "dealer", "model-owner", "data-owner"}  # folders in a trial's folder `parties`
NAMED = 4  # files or lines in a message


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        words: for messages.
        how: the command that goes on with one.
    """

    words: str
    how: str


RUN = Kind("a run", "'sordino run --resume'")
COMPARISON = Kind("a comparison", "'sordino compare --resume', or 'sordino demo --resume' if that started it")
TUNING = Kind("a search for a private prompt", "'sordino tune-private --resume'")
TRIAL = Kind("a trial of private tuning", "'sordino mpc try --resume'")


def was_begun(folder: Path, kind: Kind) -> bool:
    """Check that a command may go on in a folder, and return whether there is something to go on with.

    A folder that does not exist has nothing, nor has one with a lock alone.

    Args:
        folder: the folder.
        kind: of the command.

    Raises:
        RunError: something else is in the folder, or it cannot be written. Nothing was written.
    """
    writable(folder)
    names = _names(folder)
    if not names:
        return False
    kinds = _kinds(folder, names)
    if kind in kinds:
        return True
    if kinds:
        raise RunError(
            f"{folder} holds {kinds[0].words}, not {kind.words}; choose another --out, or go on with {kinds[0].how}"
        )
    raise RunError(
        f"{folder} holds {_listed(sorted(names))}, and not {kind.words}, so --resume has nothing to go on with; "
        "choose another --out"
    )


def is_comparison(folder: Path) -> bool:
    """Return whether a folder is a comparison's, and no run's at the same time."""
    return _kinds(folder, _names(folder))[:1] == [COMPARISON]


def _names(folder: Path) -> set[str]:
    """Return the files and folders in a folder, but the lock and what a killed process left of a file."""
    if not folder.is_dir():
        return set()
    return {path.name for path in folder.iterdir() if path.name != LOCK and not TEMPORARY.fullmatch(path.name)}


def _kinds(folder: Path, names: set[str]) -> list[Kind]:
    """Return the kinds that a folder is of. There may be two, as earlier versions put one into the other."""
    kinds = []
    if "config.toml" in names:
        tables = started_with(folder)
        if "algorithm" in tables:
            kinds.append(RUN)
        elif "task" in tables:
            kinds.append(TUNING)
    elif DATA in names and not names - {DATA, KEPT_METHODS}:  # stopped before `config.toml`, which is written next
        record = _document(folder / DATA)
        kinds += [kind for key, kind in (("encoder", RUN), ("tower", TUNING)) if key in record]
    if _document(folder / LINES).get("kind") == "comparison" or "runs" in _document(folder / COMPARISON_FILE):
        kinds.append(COMPARISON)
    if (folder / "parties").is_dir():
        parties = _names(folder / "parties")
        if not parties or parties & PARTIES:  # none yet where it was stopped at once
            kinds.append(TRIAL)
    return kinds


def started_with(folder: Path) -> dict[str, Any]:
    """Return the configuration that a run was started with; empty where there is none.

    Raises:
        RunError: it cannot be read.
    """
    config_file = folder / "config.toml"
    try:
        return tomllib.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{config_file} cannot be read ({error}); choose another --out") from None


def _document(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty where there is none, or no object in it."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Line:
    """A line of a comparison.

    Attributes:
        name: its label.
        folder: of its runs, relative to the comparison's.
        seeds: of its runs.
    """

    name: str
    folder: str
    seeds: tuple[int, ...]


def begin_lines(out: Path, lines: Sequence[Line]) -> bool:
    """Write the lines of a comparison; return whether it is new.

    Raises:
        RunError: the file cannot be written.
    """
    new = not (out / LINES).exists()
    content = {"kind": "comparison", "lines": [asdict(line) for line in lines]}
    write_atomically(out / LINES, (json.dumps(content, indent=2) + "\n").encode())
    return new


def require_lines(out: Path, lines: Sequence[Line]) -> None:
    """Check that a comparison which goes on has every run that it started: no result may be dropped.

    A line that was planned, and of which no run was started, may be left out.

    Raises:
        RunError: a line or seed is missing, or `lines.json` is damaged.
    """
    now = {(line.folder, seed) for line in lines for seed in line.seeds}
    missing: dict[str, list[int]] = {}
    for line in _lines_before(out):
        for seed in line.seeds:
            if (line.folder, seed) not in now and (out / line.folder / f"seed-{seed}" / "config.toml").exists():
                missing.setdefault(line.name, []).append(seed)
    if missing:
        named = [f"{name} (seed {', '.join(map(str, seeds))})" for name, seeds in missing.items()]
        raise RunError(
            f"{out} was started with lines that are missing now: {_listed(named)}; repeat them, so that their results "
            "stay in the table, or choose another --out"
        )


def _lines_before(out: Path) -> list[Line]:
    """Return the lines that a comparison was started with; of an earlier version, those that it finished."""
    file = out / LINES
    if not file.exists():
        folders = [PurePosixPath(str(folder)) for folder in _document(out / COMPARISON_FILE).get("folders", ())]
        return [
            Line(str(folder.parent), str(folder.parent), (int(seed),))
            for folder in folders
            if (seed := folder.name.removeprefix("seed-")).isdecimal()
        ]
    try:
        return [_line(each) for each in json.loads(file.read_bytes())["lines"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(
            f"{file} cannot be read ({type(error).__name__}: {error}), so it is not known which lines were started; "
            "put it back, or choose another --out"
        ) from None


def _line(content: Mapping[str, Any]) -> Line:
    return Line(str(content["name"]), str(content["folder"]), tuple(int(seed) for seed in content["seeds"]))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
