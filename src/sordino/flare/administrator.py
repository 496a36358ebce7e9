"""A FLARE server as an administrator reaches it, with a startup kit, for `sordino flare run`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import JobMetaKey
from nvflare.fuel.flare_api import api_spec
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.fuel.hci.proto import MetaKey, MetaStatusValue

from sordino.errors import ConfigError, RunError
from sordino.flare.gate import shut
from sordino.flare.names import KIT_FILE, PAUSE, PROGRESS, RESULTS
from sordino.sites.submission import JobStatus, Unreachable

GONE = (api_spec.NoConnection, api_spec.SessionClosed, TimeoutError)
UNHEARD = (api_spec.JobNotRunning, api_spec.NoReply, api_spec.InternalError)
REFUSED = (api_spec.AuthenticationError, api_spec.AuthorizationError, api_spec.InvalidJobDefinition)


class Administrator:
    """A session with a server, made anew where it broke.

    Args:
        kit: the administrator's startup kit.
        seconds: to wait for the server at the beginning.

    Raises:
        ConfigError: the folder is no such kit.
    """

    def __init__(self, kit: Path, seconds: float = 20.0) -> None:
        self._kit, self._seconds = kit, seconds
        self._session: Session | None = None
        try:
            admin = json.loads((kit / "startup" / "fed_admin.json").read_text(encoding="utf-8"))["admin"]
            self._user = str(admin["username"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                "--kit",
                str(kit),
                "is no administrator's startup kit; give the folder that 'sordino flare kit' or 'provision' made",
            ) from None

    @property
    def all_sites(self) -> frozenset[str]:
        """Return the names of the project's sites; empty where the kit does not say."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return frozenset(json.loads((self._kit / "local" / KIT_FILE).read_text(encoding="utf-8"))["sites"])
        return frozenset()

    def sites(self) -> frozenset[str]:
        """Return the names of the sites that are connected."""
        with self._asking() as session:
            return frozenset(client.name for client in session.get_connected_client_list())

    def jobs(self, name: str) -> Mapping[str, str]:
        """Return this name's jobs by id, with their status."""
        with self._asking() as session:
            found = session.list_jobs(name_prefix=name)
        return {job[JobMetaKey.JOB_ID.value]: job[JobMetaKey.STATUS.value] for job in found}

    def submit(self, folder: Path) -> str:
        """Submit a job, and return its id."""
        with self._asking() as session:
            return str(session.submit_job(str(folder)))

    def abort(self, job: str) -> None:
        """Abort a job; nothing happens if it is over."""
        with self._asking() as session, contextlib.suppress(api_spec.JobNotRunning, api_spec.InternalError):
            session.abort_job(job)

    def status(self, job: str) -> JobStatus:
        """Return how a job is, and why sites were left out of it."""
        with self._asking() as session:
            meta = session.get_job_meta(job)
        detail = meta.get(JobMetaKey.JOB_DEPLOY_DETAIL.value) or []
        refused = [str(line) for line in detail if not str(line).endswith(": OK")]
        return JobStatus(str(meta.get(JobMetaKey.STATUS.value)), tuple(refused))

    def progress(self, job: str, start: int) -> list[dict[str, Any]] | None:
        """Return the lines of a job's rounds from a number on; None if no process of the server runs it."""
        with self._asking() as session:
            try:
                told = session.do_app_command(job, PROGRESS, {"start": start})
            except api_spec.JobNotRunning:
                return None
            except UNHEARD:  # it begins or ends, and does not listen
                return []
        return list(told.get("lines", []))

    def returned(self, job: str, sites: frozenset[str]) -> frozenset[str]:
        """Return those of some sites that are there, and run no process of a job: they were started after it.

        A site that died stays in FLARE's list for a while, so it is the site itself that is asked.
        """
        if not (connected := sites & self.sites()):
            return frozenset()
        with self._asking() as session:
            told = session.get_client_job_status(sorted(connected)) or []
        status = [(str(line.get(MetaKey.CLIENT_NAME)), line) for line in told]
        silent = (MetaStatusValue.ERROR, MetaStatusValue.NO_REPLY)
        there = {site for site, line in status if line.get(MetaKey.STATUS) not in silent}
        return connected & there - {site for site, line in status if line.get(MetaKey.JOB_ID) == job}

    def pause(self, job: str) -> bool:
        """Have a job end after its round; tell whether it heard."""
        with self._asking() as session:
            try:
                session.do_app_command(job, PAUSE, {})
            except UNHEARD:
                return False
        return True

    def results(self, job: str, folder: Path) -> Path | None:
        """Fetch a job's results into a folder; their part of Sordino's, or None if there is none."""
        with self._asking() as session:
            location = Path(session.download_job_result(job, str(folder)))
        found = sorted(location.rglob(f"{RESULTS}/"))
        return next((each for each in found if each.is_dir()), None)

    def __enter__(self) -> Administrator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            session, self._session = self._session, None
            with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
                session.close()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[Session]:
        """Give the session, and tell its errors as ours.

        Raises:
            Unreachable: the server is not there.
            RunError: it refuses.
        """
        with contextlib.redirect_stdout(sys.stderr):  # FLARE prints
            try:
                if self._session is None:
                    shut()
                    self._session = new_secure_session(self._user, str(self._kit), timeout=self._seconds)
                yield self._session
            except GONE as error:
                self.close()
                raise Unreachable(f"the server is not there: {error or type(error).__name__}") from None
            except REFUSED as error:
                raise RunError(f"the server refuses {self._user}: {error}") from None
