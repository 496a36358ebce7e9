"""Run directories to one self-contained HTML page: `write_report`."""

import json
from collections.abc import Sequence
from pathlib import Path

from sordino.errors import RunError
from sordino.files import replace_file
from sordino.report.groups import group_runs
from sordino.report.page import render
from sordino.report.runs import read_run
from sordino.results import FILE


def write_report(runs: Sequence[Path], out: Path, title: str) -> Path:
    """Write one self-contained page about one run or several, and return its path.

    Runs of one algorithm with the same settings and different seeds are aggregated to mean and standard deviation; an
    algorithm with several settings gets one row for each. The page asks no host for anything, and replaces an older
    one only once it is whole.

    Args:
        runs: finished run directories, in the order in which the page shows their algorithms.
        out: the HTML file; folders above it are made.
        title: the page's title, as plain text.

    Raises:
        RunError: no run was given, a file of a run is missing or malformed, the same run stands twice among them, or
            `out` cannot be written. Nothing is written then.
    """
    if not runs:
        raise RunError("report: no run directory was given; name at least one")
    read = [read_run(Path(run)) for run in runs]
    _replace(Path(out), render(read, group_runs(read), title))
    return Path(out)


def finished_runs(folder: Path) -> list[Path]:
    """Return the finished runs in or below a folder; those of a comparison in its order, others by name after them."""
    runs = sorted(path.parent for path in folder.rglob(FILE))
    try:
        listed = json.loads((folder / "comparison.json").read_bytes())["folders"]
        order = {folder / str(name): place for place, name in enumerate(listed)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return runs  # no comparison, or one of an earlier version
    return sorted(runs, key=lambda run: order.get(run, len(order)))


def _replace(out: Path, text: str) -> None:
    try:
        replace_file(out, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise RunError(
            f"{out}: the report cannot be written ({error.strerror}); choose a file in a folder that can be written"
        ) from None
