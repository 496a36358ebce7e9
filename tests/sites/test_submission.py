"""Jobs that fail, hang and come back, with a server that a test scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sites.owners import experiment
from sordino.errors import RunError
from sordino.flare.job import write_job
from sordino.flare.names import CONTROLLER, EXECUTOR
from sordino.runtime.fleet import Patience
from sordino.sites.coordinator import OUTCOME, PROPOSAL
from sordino.sites.proposal import Proposal
from sordino.sites.submission import (
    COMPLETED,
    FAILED,
    PAUSED,
    RUNNING,
    JobStatus,
    Pace,
    Submission,
    Unreachable,
)

AT_ONCE = Pace(look=0.0, server=0.05, sites=0.0, stale=-1.0, back=-1.0)
FAILURE = "FINISHED:EXECUTION_EXCEPTION"


@dataclass
class Server:
    """A server whose jobs end as scripted, in this order.

    Attributes:
        ends: a status by job; RUNNING for one that no process runs, and that never ends.
        there: connected sites.
        reason: why the experiment failed, if it did.
        before: jobs that are there at first, and whether a process runs them.
        away: calls that fail before the server comes back.
        lines: of each job's rounds, in order.
        back: sites that are there, and in no job.
        deaf: questions to end a job that it does not hear.
    """

    ends: list[str]
    there: frozenset[str] = frozenset({"east", "west"})
    all_sites: frozenset[str] = frozenset({"east", "west"})
    reason: str = ""
    before: Mapping[str, bool] = field(default_factory=dict)
    away: int = 0
    submitted: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    lines: Sequence[list[dict[str, Any]]] = ()
    back: frozenset[str] = frozenset()
    deaf: int = 0
    paused: list[str] = field(default_factory=list)
    patience: list[Patience] = field(default_factory=list)
    _looks: int = 0

    def sites(self) -> frozenset[str]:
        if self.away > 0:
            self.away -= 1
            raise Unreachable("the server is not there")
        return self.there

    def jobs(self, name: str) -> Mapping[str, str]:
        return dict.fromkeys(self.before, RUNNING)

    def submit(self, folder: Path) -> str:
        self.submitted.append(json.loads((folder / "meta.json").read_text()))
        config = json.loads((folder / "app" / "config" / "config_fed_server.json").read_text())
        self.patience.append(Patience(**config["workflows"][0]["args"]["patience"]))
        self._looks = 0
        return f"job-{len(self.submitted)}"

    def abort(self, job: str) -> None:
        self.aborted.append(job)

    def status(self, job: str) -> JobStatus:
        if self.lines and job not in self.paused and self._looks < 5:  # it runs for five looks, or until it is paused
            self._looks += 1
            return JobStatus(RUNNING)
        return JobStatus(COMPLETED if job in self.before else self.ends[len(self.submitted) - 1])

    def progress(self, job: str, start: int) -> list[dict[str, Any]] | None:
        if self.lines:
            return self.lines[len(self.submitted) - 1][start:]
        return [] if self.before.get(job) else None

    def returned(self, job: str, sites: frozenset[str]) -> frozenset[str]:
        return sites & self.back

    def pause(self, job: str) -> bool:
        self.deaf -= 1
        if self.deaf < 0:
            self.paused.append(job)
        return self.deaf < 0

    def results(self, job: str, folder: Path) -> Path | None:
        found = folder / "results"
        found.mkdir()
        found.chmod(0o755)  # as an engine unpacks them
        (found / OUTCOME).write_text(json.dumps({"job": job}))
        if self.reason:
            (found / FAILED).write_text(self.reason)
        if job in self.paused:
            (found / PAUSED).touch()
        return found


@pytest.fixture
def submission(clip_folder: Path) -> Callable[..., Submission]:
    proposal = Proposal.of(experiment(clip_folder))

    def make(server: Server, quorum: float = 1.0, tries: int = 3) -> Submission:
        return Submission(server, proposal, Patience(quorum), write_job, tries, pace=AT_ONCE, rejoining=server)

    return make


def test_a_job_that_failed_is_followed_by_another(submission: Callable[..., Submission], tmp_path: Path) -> None:
    server = Server([FAILURE, FAILURE, COMPLETED])
    submission(server).run(tmp_path / "out")
    assert len(server.submitted) == 3
    assert len({meta["name"] for meta in server.submitted}) == 1
    assert json.loads((tmp_path / "out" / OUTCOME).read_text()) == {"job": "job-3"}


def test_results_are_copied_into_a_folder_of_the_owners_alone(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    """However open they were unpacked. A folder that is there stays as open as it is."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o755)
    for name, mode in {"out": 0o700, "shared": 0o755}.items():
        submission(Server([COMPLETED])).run(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_there_is_a_limit_of_tries(submission: Callable[..., Submission], tmp_path: Path) -> None:
    server = Server([FAILURE] * 9)
    with pytest.raises(RunError, match="3 jobs of sordino-.* failed, the last with FINISHED:EXECUTION_EXCEPTION"):
        submission(server).run(tmp_path / "out")
    assert len(server.submitted) == 3
    assert not (tmp_path / "out").exists()


def test_an_experiment_that_failed_itself_is_not_tried_again(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    server = Server([FAILURE] * 9, reason="1 of 2 sites take part, and 2 are needed")
    with pytest.raises(RunError, match="^1 of 2 sites take part, and 2 are needed$"):
        submission(server).run(tmp_path / "out")
    assert len(server.submitted) == 1


def test_a_job_that_its_server_lost_is_aborted_first(submission: Callable[..., Submission], tmp_path: Path) -> None:
    server = Server([RUNNING, COMPLETED])
    submission(server).run(tmp_path / "out")
    assert server.aborted == ["job-1"]
    assert len(server.submitted) == 2


def test_a_job_of_the_same_experiment_that_runs_is_watched_and_a_stale_one_aborted(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    server = Server([], before={"stale": False, "alive": True})
    submission(server).run(tmp_path / "out")
    assert (server.submitted, server.aborted) == ([], ["stale"])
    assert json.loads((tmp_path / "out" / OUTCOME).read_text()) == {"job": "alive"}


def test_it_waits_for_a_server_that_is_away_and_not_for_ever(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    submission(Server([COMPLETED], away=3)).run(tmp_path / "out")
    with pytest.raises(Unreachable):
        submission(Server([COMPLETED], away=10**9)).run(tmp_path / "other")


def line(number: int, *lost: str) -> dict[str, Any]:
    return {"round": number} | ({"lost": dict.fromkeys(lost, "no answer")} if lost else {})


def test_a_site_that_is_back_is_in_another_job_which_is_no_failure(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    for end, deaf in ((COMPLETED, 0), ("FINISHED:ABNORMAL", 0), (COMPLETED, 1)):
        lines = [[line(1), line(2, "west")], [line(3), line(4)]]
        server = Server([end, COMPLETED], lines=lines, back=frozenset({"west"}), deaf=deaf)
        out = tmp_path / f"{end} {deaf}"
        submission(server, tries=1).run(out)
        assert server.paused == ["job-1"]
        assert json.loads((out / OUTCOME).read_text()) == {"job": "job-2"}


def test_a_site_that_is_away_or_not_lost_any_more_ends_no_job(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    server = Server([COMPLETED], lines=[[line(1), line(2, "west")]], back=frozenset({"east"}))
    submission(server).run(tmp_path / "out")
    assert server.paused == []
    back = frozenset({"west"})
    server = Server([COMPLETED], lines=[[line(1, "west"), line(2)]], back=back)
    submission(server).run(tmp_path / "other")
    assert server.paused == []


def test_a_site_that_no_job_takes_in_does_not_end_one_after_the_other(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    """It is connected, and refuses every job: FLARE leaves it out of each."""
    server = Server([COMPLETED] * 3, lines=[[line(1, "west")], [line(2, "west")]], back=frozenset({"west"}))
    submission(server).run(tmp_path / "out")
    assert server.paused == ["job-1"]
    assert len(server.submitted) == 2


def test_named_sites_are_waited_for_before_the_job_and_not_in_it(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    server = Server([COMPLETED], all_sites=frozenset({"east", "west", "south"}))
    named = submission(server)
    named.patience = Patience(1.0, 0.0, 1.0, ["east", "west"])
    named.run(tmp_path / "out")
    assert [meta["min_clients"] for meta in server.submitted] == [2], "south is not named"
    assert [patience.joining for patience in server.patience] == [0.0]
    assert [list(patience.sites) for patience in server.patience] == [["east", "west"]]


def test_sites_of_the_project_that_are_not_there_are_in_the_job_to_be_named(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    server = Server([COMPLETED], there=frozenset({"east", "new"}))
    submission(server, quorum=0.5).run(tmp_path / "out")
    assert [list(patience.sites) for patience in server.patience] == [["east", "new", "west"]]


def test_a_quorum_of_sites_suffices_and_fewer_do_not(submission: Callable[..., Submission], tmp_path: Path) -> None:
    server = Server([COMPLETED], there=frozenset({"east"}))
    with pytest.raises(RunError, match="1 of 2 sites are connected, and 2 are needed; start west"):
        submission(server).run(tmp_path / "out")
    submission(server, quorum=0.5).run(tmp_path / "out")
    assert [meta["min_clients"] for meta in server.submitted] == [1]


def test_a_folder_with_another_experiment_is_refused_before_anything_is_submitted(
    submission: Callable[..., Submission], tmp_path: Path
) -> None:
    server = Server([COMPLETED])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match="holds something else, and not this experiment; choose another --out"):
        submission(server).run(tmp_path)
    (tmp_path / PROPOSAL).write_text(json.dumps({"tables": {"rounds": 7}}))
    with pytest.raises(RunError, match="and not this experiment"):
        submission(server).run(tmp_path)
    assert server.submitted == []
    own = submission(server)
    (tmp_path / PROPOSAL).write_text(json.dumps(own.proposal.facts))
    own.run(tmp_path)
    assert len(server.submitted) == 1


def test_a_job_holds_no_code_and_chooses_nothing_at_a_site(clip_folder: Path, tmp_path: Path) -> None:
    proposal = Proposal.of(experiment(clip_folder))
    job = write_job(tmp_path, proposal, Patience(0.5, 7, 3, ["east", "west"]), 2)
    files = sorted(str(path.relative_to(job)) for path in job.rglob("*") if path.is_file())
    assert files == ["app/config/config_fed_client.json", "app/config/config_fed_server.json", "meta.json"]
    client = json.loads((job / files[0]).read_text())
    (executor,) = client["executors"]
    assert executor["executor"] == {"path": EXECUTOR, "args": {}}
    assert [client[key] for key in ("components", "task_data_filters", "task_result_filters")] == [[], [], []]
    (workflow,) = json.loads((job / files[1]).read_text())["workflows"]
    assert workflow["path"] == CONTROLLER
    arguments = workflow["args"]
    assert Proposal.read(json.loads(arguments["proposal"])).fingerprint == proposal.fingerprint
    assert arguments["fingerprint"] == proposal.fingerprint
    assert Patience(**arguments["patience"]) == Patience(0.5, 7, 3, ["east", "west"])
    # Nothing of the coordinator's own machine travels.
    assert str(clip_folder) not in (job / files[1]).read_text()
