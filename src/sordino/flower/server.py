"""A SuperLink for the submission of one experiment: its runs, and the run directory on the same machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flwr.common.serde import user_config_from_proto

from sordino.errors import RunError
from sordino.experiments.run_lock import FILE as LOCK
from sordino.flower.control import Control, NoSuperLink
from sordino.flower.coordinator import run_config_of
from sordino.flower.names import FINGERPRINT, LINES, PROCESS
from sordino.runtime.fleet import Patience
from sordino.sites.proposal import Proposal
from sordino.sites.submission import JobStatus, Unreachable

Result = TypeVar("Result")

RUN_FILE = "run.json"  # in the folder of a job


def write_run(folder: Path, proposal: Proposal, patience: Patience, least: int) -> Path:
    """Write the configuration of a run into a folder, and return that; see `Submission`. The app is always the same."""
    (folder / RUN_FILE).write_text(json.dumps(run_config_of(proposal, patience)), encoding="utf-8")
    return folder


class FlowerServer:
    """A SuperLink, for the submission of one experiment; see `Server`.

    Its run directory is on this machine, and so is the process of a run.

    Args:
        control: of the SuperLink.
        folder: the experiment's run directory.
    """

    def __init__(self, control: Control, folder: Path) -> None:
        self._control, self._folder = control, folder

    @property
    def all_sites(self) -> frozenset[str]:
        return frozenset(self._control.project.sites.values())

    def sites(self) -> frozenset[str]:
        return _told(self._control.sites)

    def jobs(self, name: str) -> Mapping[str, str]:
        found = {}
        for number, run in _told(self._control.runs).items():
            fingerprint = str(user_config_from_proto(run.override_config).get(FINGERPRINT, ""))
            if fingerprint and name.endswith(fingerprint[:16]):
                found[str(number)] = status_of(run)
        return found

    def submit(self, folder: Path) -> str:
        config = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return str(_told(lambda: self._control.start(config)))

    def abort(self, job: str) -> None:
        if not self.status(job).over:
            with contextlib.suppress(RunError):  # it ended in between
                _told(lambda: self._control.stop(int(job)))

    def status(self, job: str) -> JobStatus:
        return JobStatus(status_of(_told(lambda: self._control.run(int(job)))))

    def progress(self, job: str, start: int) -> list[dict[str, Any]] | None:
        note = self._note()
        if note.get("run") != int(job) or not _lives(int(note["process"])):
            return None
        whole = (self._folder / LINES).read_text(encoding="utf-8").rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()[start:]]

    def results(self, job: str, folder: Path) -> Path | None:
        if self._note().get("run") != int(job):
            return None
        ignored = shutil.ignore_patterns(LOCK, LINES, PROCESS)
        return Path(shutil.copytree(self._folder, folder, ignore=ignored, dirs_exist_ok=True))

    def _note(self) -> dict[str, Any]:
        """Return which run was the last one to work in the run directory."""
        try:
            note = json.loads((self._folder / PROCESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}


def _told(ask: Callable[[], Result]) -> Result:
    """Ask a SuperLink.

    Raises:
        Unreachable: it is not there.
    """
    try:
        return ask()
    except NoSuperLink as error:
        raise Unreachable(str(error)) from None


def status_of(run: Any) -> str:
    """Return a run's status in the words of a submission."""
    if run is None:
        return "FINISHED:UNKNOWN"
    parts = [run.status.status, run.status.sub_status]
    return ":".join(part for part in parts if part).upper()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
