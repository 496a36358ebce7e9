"""An experiment as jobs of an engine: submit one, watch it, and where it fails submit another that goes on."""

from __future__ import annotations

import json
import math
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from sordino.errors import RunError, SordinoError
from sordino.experiments.run_lock import is_empty, writable
from sordino.files import make_private
from sordino.progress import log
from sordino.runtime.fleet import Patience
from sordino.sites.coordinator import PROPOSAL
from sordino.sites.proposal import Proposal

Result = TypeVar("Result")

COMPLETED = "FINISHED:COMPLETED"
RUNNING = "RUNNING"
FAILED = "failed.txt"  # in results, and only where the experiment itself failed: why
PAUSED = "paused.txt"  # in results, and only where the job was told to end before the last round

# Writes a job into a folder, for so many sites at least, and returns what a server is given.
Writer = Callable[[Path, Proposal, Patience, int], Path]


class Unreachable(RunError):
    """The server cannot be reached now; it may come back."""


@dataclass(frozen=True)
class JobStatus:
    """How a job is.

    Attributes:
        text: a word for it, as FLARE says it.
        refused: sites that did not take it, with their reasons.
    """

    text: str
    refused: tuple[str, ...] = ()

    @property
    def over(self) -> bool:
        return self.text.startswith("FINISHED")


class Server(Protocol):
    """The server of an engine; each question may raise `Unreachable`."""

    @property
    def all_sites(self) -> frozenset[str]: ...
    def sites(self) -> frozenset[str]: ...
    def jobs(self, name: str) -> Mapping[str, str]: ...
    def submit(self, folder: Path) -> str: ...
    def abort(self, job: str) -> None: ...
    def status(self, job: str) -> JobStatus: ...
    def progress(self, job: str, start: int) -> list[dict[str, Any]] | None: ...
    def results(self, job: str, folder: Path) -> Path | None: ...


class Rejoining(Protocol):
    """How an engine whose jobs take in no site while they run tells who is back, and makes room for another job."""

    def returned(self, job: str, sites: frozenset[str]) -> frozenset[str]:
        """Return those of some sites that are there, and in no process of a job."""
        ...

    def pause(self, job: str) -> bool:
        """Have a job end after its round, with `PAUSED` in its results; tell whether it heard."""
        ...


@dataclass(frozen=True)
class Pace:
    """Seconds that a submission waits.

    Attributes:
        look: between two looks at a job.
        seldom: the same, at most, of one whose rounds are long: half a round.
        server: for a server that went away.
        sites: for all sites of the project to be connected; then those that are there suffice, if enough.
        stale: until a job that runs by its server's word, and in no process, is taken for one that its server lost.
        back: between two questions to sites that were lost, whether they are back.
    """

    look: float = 1.0
    seldom: float = 5.0
    server: float = 600.0
    sites: float = 60.0
    stale: float = 30.0
    back: float = 3.0


@dataclass
class Submission:
    """An experiment at a server.

    Attributes:
        server: the server.
        proposal: the experiment.
        patience: how long the coordinator waits, and for how many.
        write: writes a job.
        tries: the most jobs that are submitted.
        watch: is given a line after every round.
        pace: how long this waits.
        rejoining: takes sites that are back into another job; None where a job that runs asks them again.
    """

    server: Server
    proposal: Proposal
    patience: Patience
    write: Writer
    tries: int = 5
    watch: Callable[[dict[str, Any]], None] = lambda line: None
    pace: Pace = Pace()
    rejoining: Rejoining | None = None
    _tried: frozenset[str] = frozenset()  # sites for which a job was ended, and that took part in no round since

    def run(self, out: Path) -> None:
        """Run it to its end, and copy its run directory to `out`.

        Raises:
            RunError: the experiment failed, or `tries` jobs did, or `out` holds something else.
        """
        require_own(out, self.proposal)
        job, failed = self._patiently(self._running), 0
        while failed < self.tries:
            job = job or self._submitted()
            status = self._watched(job)
            end = self._fetched(job, status, out)
            if end == "done":
                return
            if end == "failed":
                failed += 1
                why = f"; {'; '.join(status.refused)}" if status.refused else ""
                log.warning("job %s ended with %s%s; try %d of %d", job[:8], status.text, why, failed, self.tries)
            job = None
        name = job_name(self.proposal)
        raise RunError(
            f"{self.tries} jobs of {name} failed, the last with {status.text}{why}; see the server's log, mend it, and "
            "repeat the command, which goes on from the last round"
        )

    def _running(self) -> str | None:
        """Return a job of this experiment that a process runs, so that it is watched on; stale ones are aborted."""
        alive = None
        for job, status in self.server.jobs(job_name(self.proposal)).items():
            if JobStatus(status).over:
                continue
            if (status == RUNNING and self.server.progress(job, 0) is None) or alive is not None:
                log.warning("job %s is stale and is aborted", job[:8])
                self.server.abort(job)
            else:
                alive = job
        return alive

    def _submitted(self) -> str:
        least, sites = self._await_sites()
        with tempfile.TemporaryDirectory() as folder:
            # It waited for sites; those that are not there are named in the job, which waits for nobody.
            patience = replace(self.patience, sites=sites, joining=0.0)
            job = self.write(Path(folder), self.proposal, patience, least)
            number = self._patiently(lambda: self.server.submit(job))
        log.info("submitted job %s", number)
        return number

    def _await_sites(self) -> tuple[int, list[str]]:
        """Wait until the project's sites are connected; return how many a job needs, and whom it asks.

        Raises:
            RunError: too few are there.
        """
        wanted = frozenset(self.patience.sites) or self.server.all_sites
        end = time.monotonic() + (self.patience.deadline if self.patience.sites else self.pace.sites)
        while missing := wanted - (there := self._patiently(self.server.sites)):
            if time.monotonic() > end:
                break
            time.sleep(self.pace.look)
        least = self.patience.of(len(wanted)) if wanted else 1
        if len(there) < least:
            names = ", ".join(sorted(missing))
            raise RunError(f"{len(there)} of {len(wanted)} sites are connected, and {least} are needed; start {names}")
        if missing:
            log.warning("goes on without %s, which are not connected", ", ".join(sorted(missing)))
        return least, sorted(self.patience.sites or wanted | there)

    def _watched(self, job: str) -> JobStatus:
        """Watch a job until it is over, or lost by its server."""
        told, missed, lost, looked = 0, None, frozenset[str](), -math.inf
        pause = self.pace.look
        while True:
            status = self._patiently(partial(self.server.status, job))
            lines = self._patiently(partial(self.server.progress, job, told)) if status.text == RUNNING else None
            for line in lines or []:
                told += 1
                self.watch(line)
                pause = max(self.pace.look, min(line.get("seconds", 0.0) / 2, self.pace.seldom))
                lost = frozenset(line.get("lost", {}))
                self._tried &= lost
            hoped = lost - self._tried
            if self.rejoining and lines is not None and hoped and time.monotonic() - looked > self.pace.back:
                self._rejoin(self.rejoining, job, hoped)
                looked = time.monotonic()
            if status.over:
                return status
            if status.text != RUNNING or lines is not None:
                missed = None
            elif missed is None:
                missed = time.monotonic()
            elif time.monotonic() - missed > self.pace.stale:
                self._patiently(lambda: self.server.abort(job))
                return JobStatus("a server that lost it", status.refused)
            time.sleep(pause)

    def _rejoin(self, rejoining: Rejoining, job: str, lost: frozenset[str]) -> None:
        """End a job after its round if a site is back."""
        back = self._patiently(lambda: rejoining.returned(job, lost))
        if not back:
            return
        if self._patiently(lambda: rejoining.pause(job)):
            log.warning("%s is back; another job goes on with it", " and ".join(sorted(back)))
            self._tried |= back

    def _fetched(self, job: str, status: JobStatus, out: Path) -> Literal["done", "paused", "failed"]:
        """Copy the run directory of a job that ran to the end of the experiment, and return how it ended.

        Raises:
            RunError: the experiment itself failed.
        """
        if not status.over:
            return "failed"
        with tempfile.TemporaryDirectory() as folder:
            found = self._patiently(lambda: self.server.results(job, Path(folder)))
            if found is not None and (found / FAILED).exists():
                raise RunError((found / FAILED).read_text(encoding="utf-8").strip())
            if found is not None and (found / PAUSED).exists():  # the site that died may leave it another status
                return "paused"
            if found is None or status.text != COMPLETED:
                return "failed"
            make_private(out)
            found.chmod(stat.S_IMODE(out.stat().st_mode))  # which the copy takes over
            shutil.copytree(found, out, dirs_exist_ok=True)
        return "done"

    def _patiently(self, ask: Callable[[], Result]) -> Result:
        """Ask a server, and wait where it is away.

        Raises:
            Unreachable: it did not come back.
        """
        end, told = time.monotonic() + self.pace.server, False
        while True:
            try:
                return ask()
            except Unreachable as error:
                if time.monotonic() > end:
                    raise
                if not told:
                    log.warning("%s; waiting for it", error)
                    told = True
                time.sleep(self.pace.look)


def job_name(proposal: Proposal) -> str:
    """Return the name that all jobs of an experiment have."""
    return f"sordino-{proposal.fingerprint[:16]}"


def require_own(out: Path, proposal: Proposal) -> None:
    """Check that a folder is empty, or holds what an earlier call of the same experiment copied there.

    Raises:
        RunError: it holds something else.
    """
    writable(out)
    if is_empty(out):
        return
    try:
        there = Proposal.read(json.loads((out / PROPOSAL).read_bytes())).fingerprint
    except (OSError, ValueError, AttributeError, SordinoError):
        there = "something else"
    if there != proposal.fingerprint:
        raise RunError(f"{out} holds {there[:14]}, and not this experiment; choose another --out")
