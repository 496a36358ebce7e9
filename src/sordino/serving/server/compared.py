"""Runs below a folder, for the page that compares them: read as the report reads them, and never written to.

The folder is the operator's, but what lies in it may be of any size and kind. So the number of folders, of runs and of
bytes is bounded, no link is followed, and what cannot be read or shown is left out with its reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sordino.errors import ConfigError, RunError
from sordino.report.figures import PALETTE, SYMBOLS
from sordino.report.groups import Group, group_runs, settings_of
from sordino.report.runs import Run, read_run
from sordino.results import FILE, MEASURES, Spread, dataset_name, rounded_up, without_places

MOST_RUNS = 200
MOST_FOLDERS = 5_000
DEEPEST = 6  # folders below the one that is given
MOST_BYTES = 8 << 20  # of a file that is read
MOST_IN_ALL = 128 << 20
CONFIG = "config.toml"
MOST_CONFIG_BYTES = 1 << 20
MOST_SETTINGS, DEEPEST_SETTING = 2_000, 20  # of a config.toml: runs are compared setting by setting
MOST_DOTS = 200  # of one key; its reader takes time with their square
LONGEST_REASON = 300
COMPARISON = "comparison.json"
TEXT_FILES = (CONFIG, FILE, "metrics.jsonl", "audit.json")

Stamp = tuple[tuple[str, int, int], ...]  # of a run's files: name, time and size


@dataclass
class _Found:
    """Run directories with the comparison that they are of, and whether some were left out for their number."""

    runs: list[tuple[Path, Path]] = field(default_factory=list)
    alone: set[Path] = field(default_factory=set)  # those of no comparison
    cut: bool = False


class RunFolder:
    """The runs below a folder, for one caller at a time.

    Args:
        folder: it.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError("--runs", str(folder), "no such folder; give the one that run directories lie in")
        self._folder = folder.resolve()
        self._read: dict[Path, tuple[Stamp, Run]] = {}  # until a file of the run changes

    def compared(self) -> dict[str, Any]:
        """Return all runs, for JSON; those that differ in nothing but the seed are one entry.

        Returns:
            `runs`, see `_entry`; `left_out`, folders with the reason; `cut`, True if there are more than are read;
            `palette` and `symbols`, the report's.
        """
        found = self._find()
        known, self._read = self._read, {}
        left_out, size = [], 0
        together: dict[tuple[str, ...], list[Run]] = {}
        for path, comparison in found.runs:
            try:
                stamp = tuple(_stamps(path))
                size += sum(each[2] for each in stamp)
                if size > MOST_IN_ALL:
                    found.cut = True
                    break
                held = known.get(path)
                run = held[1] if held is not None and held[0] == stamp else _checked(path)
                kind = _kind(comparison, run)
            except Exception as error:  # files that somebody wrote by hand may break their readers anywhere
                left_out.append({"folder": self._name(path), "why": _shown(_why(error, path))})
                continue
            self._read[path] = stamp, run
            together.setdefault(kind, []).append(run)
        entries = [
            _entry(group, self._name(_place(group, Path(kind[0]), found.alone)))
            for kind, runs in together.items()
            for group in _groups(runs)
        ]
        look = {"palette": list(PALETTE), "symbols": list(SYMBOLS)}
        return {"runs": entries, "left_out": left_out, "cut": found.cut, **look}

    def _find(self) -> _Found:
        found, seen = _Found(), 0
        ahead = [(self._folder, self._folder, 0, False)]
        while ahead:
            folder, comparison, depth, inside = ahead.pop(0)
            seen += 1
            names, folders = _entries(folder)
            if COMPARISON in names:
                comparison, inside = folder, True
            if FILE in names:
                found.runs.append((folder, comparison if inside else folder.parent))
                if not inside:
                    found.alone.add(folder)
            elif depth < DEEPEST:
                ahead += [(each, comparison, depth + 1, inside) for each in folders]
            if len(found.runs) == MOST_RUNS or seen == MOST_FOLDERS:
                found.cut = bool(ahead)
                break
        return found

    def _name(self, path: Path) -> str:
        """Return a folder as the page shows it: below the given one, without the place of this on the disk."""
        below = path.relative_to(self._folder) if path.is_relative_to(self._folder) else Path()
        return _shown(below.as_posix() if below.parts else self._folder.name)


def _entries(folder: Path) -> tuple[set[str], list[Path]]:
    """Return the names of the regular files in a folder, and the folders, without links and what is hidden."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError:
        return set(), []
    files = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
    return files, [folder / entry.name for entry in folders]


def _stamps(path: Path) -> Iterator[tuple[str, int, int]]:
    """Iterate over the files that are read of a run.

    Raises:
        RunError: one is no regular file, or too large.
    """
    distances, _ = _entries(path / "distances")
    for name in (*TEXT_FILES, *(f"distances/{each}" for each in sorted(distances))):
        try:
            status = (path / name).lstat()
        except OSError:
            continue  # the reader says what is missing
        if not stat.S_ISREG(status.st_mode):
            raise RunError(f"{name} is no regular file")
        if status.st_size > MOST_BYTES:
            raise RunError(f"{name} has more than {MOST_BYTES:,} bytes")
        yield name, status.st_mtime_ns, status.st_size


def _checked(path: Path) -> Run:
    """Read a run, and see that it can be shown.

    Raises:
        Exception: of any type, where it cannot.
    """
    with contextlib.suppress(FileNotFoundError):  # the reader says so
        _require_readable((path / CONFIG).read_text(encoding="utf-8", errors="replace"))
    run = _slim(read_run(path))
    _require_few_settings(run.config)
    for group in group_runs([run]):
        _require_json(_entry(group, ""))
    return run


def _require_readable(config: str) -> None:
    """Check that the reader of TOML takes no minutes."""
    if len(config) > MOST_CONFIG_BYTES:
        raise RunError(f"{CONFIG} has more than {MOST_CONFIG_BYTES:,} bytes")
    if any(part.count(".") > MOST_DOTS for part in re.split(r"[\n,={}\[\]]", config)):
        raise RunError(f"{CONFIG} has a key of more than {MOST_DOTS} parts")


def _require_few_settings(config: Mapping[str, Any]) -> None:
    count, tables = 0, [config]
    for _ in range(DEEPEST_SETTING):
        count += sum(map(len, tables))
        tables = [each for table in tables for each in table.values() if isinstance(each, Mapping)]
        if count > MOST_SETTINGS or not tables:
            break
    if count > MOST_SETTINGS or tables:
        raise RunError(f"{CONFIG} has more than {MOST_SETTINGS:,} settings, or {DEEPEST_SETTING} tables in each other")


def _require_json(entry: dict[str, Any]) -> None:
    """Check that an entry is of finite numbers and of text, as an answer is written."""
    try:
        json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise RunError(f"{FILE} has a number that is not finite, or text that is none") from None


def _why(error: Exception, path: Path) -> str:
    """Return the reason why a run is left out, without the place of this on the disk."""
    if isinstance(error, RunError):
        return str(error).removeprefix(f"{path}: ")[:LONGEST_REASON]
    if isinstance(error, OSError):
        return error.strerror or "cannot be read"
    return f"its files are malformed ({type(error).__name__}); repeat the run, or leave this directory out"


def _slim(run: Run) -> Run:
    """Return a run without what this page does not show, and would keep in memory."""
    return replace(run, rounds=(), audit=None, distances=None)


def _kind(comparison: Path, run: Run) -> tuple[str, ...]:
    """Return what runs have in common that are told apart by their settings alone; no label names a place then."""
    encoder, data = (json.dumps(run.config.get(name), sort_keys=True, default=str) for name in ("encoder", "data"))
    return str(comparison), run.summary.dataset, run.summary.encoder, encoder, data


def _place(group: Group, comparison: Path, alone: set[Path]) -> Path:
    """Return the folder that an entry is known by: of a run by itself its own, for others may lie beside it."""
    own = group.runs[0].directory
    return own if len(group.runs) == 1 and own in alone else comparison


def _groups(runs: Sequence[Run]) -> list[Group]:
    try:
        groups = group_runs(runs)
        for group in groups:
            _require_json(_entry(group, ""))
    except Exception:  # a run was repeated, or one does not fit the others: each stands for itself
        return [group for run in runs for group in group_runs([run])]
    return groups


def _entry(group: Group, folder: str) -> dict[str, Any]:
    """Return an entry, for JSON: runs that differ in the seed, and their means with deviations.

    Accuracies are fractions, `[mean, deviation]`, with None where there is no deviation.
    """
    first, results = group.runs[0].summary, group.results
    claim = results.claim
    spreads = {measure: results.accuracy(measure) for measure in MEASURES}
    by_client = {measure: results.client_accuracy(measure) for measure in MEASURES}
    label, line = (without_places(text, settings_of(group.runs[0]).values()) for text in (group.label, group.line))
    itself = first.hand_written is not None and first.hand_written.itself
    return {
        "folder": folder,
        "label": _shown(label),
        "line": _shown(line or label),
        "method": _shown(first.algorithm),
        "dataset": _shown(dataset_name(first.dataset)),
        "encoder": _shown(first.encoder),
        "clients": first.clients,
        "rounds": first.rounds,
        "seeds": results.seeds,
        "over_seeds": results.over_seeds,
        "zero_shot": itself or first.algorithm == "zero-shot",
        "accuracy": {measure: _pair(spread) for measure, spread in spreads.items() if spread is not None},
        "hand_written": {
            measure: value for measure in MEASURES if (value := results.hand_written(measure)) is not None
        },
        "privacy": {
            "private": claim.private,
            "simulated": claim.simulated,
            "bounded": claim.bounded,
            "epsilon": _finite(claim.epsilon),
            "epsilon_words": None if claim.epsilon is None else rounded_up(claim.epsilon),
            "delta_words": None if claim.delta is None else rounded_up(claim.delta),
            "units": [_shown(unit) for unit in claim.units],
        },
        "upload_bytes": results.mean_bytes("upload_bytes_per_client_round"),
        "seconds": results.seconds,
        "by_client": [
            {"name": _shown(client.called), **{measure: by_client[measure].get(client.client) for measure in MEASURES}}
            for client in first.per_client
        ],
    }


def _pair(spread: Spread) -> list[float | None]:
    return [spread.mean, spread.deviation]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _shown(text: str) -> str:
    """Return text that JSON can hold: a folder's name need not be UTF-8."""
    return text.encode("utf-8", "replace").decode()
