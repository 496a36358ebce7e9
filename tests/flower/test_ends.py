"""The two ends inside Flower, with its own messages and no process: what they read, and what they refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from sites.owners import experiment, write_pictures, write_site
from sordino.errors import ConfigError, RunError
from sordino.flower import coordinator as module
from sordino.flower.answering import answered
from sordino.flower.coordinator import asked_for, run, run_config_of
from sordino.flower.messages import PART, Question, answer, question, read_answer, read_question
from sordino.flower.names import LINES, PROCESS, PROJECT_VARIABLE
from sordino.flower.node import FOLDER, NUMBER, _before
from sordino.flower.project import ServerProject
from sordino.flower.server import FlowerServer, write_run
from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import Patience
from sordino.sites.proposal import Proposal
from sordino.sites.settings import load_site
from sordino.sites.site import Site
from sordino.sites.submission import FAILED

TOKEN = b"of this question"


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower gives these to the process of a run
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def site(tmp_path: Path, clip_folder: Path) -> Site:
    write_pictures(tmp_path / "east" / "pictures", 0, 5)
    return Site(load_site(write_site(tmp_path / "east", "east", clip_folder)))


def hello(clip_folder: Path) -> bytes:
    proposal = Proposal.of(experiment(clip_folder))
    return Envelope("hello", proposal.fingerprint, proposal.facts).encode()


def asked(content: bytes, name: str = "east") -> Message:
    return question(7, Question(name, TOKEN, content), 1, 60.0)


@pytest.mark.parametrize("length", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 3])
def test_content_of_any_length_comes_back_and_no_part_is_longer_than_a_request(length: int) -> None:
    content = os.urandom(length)
    message = asked(content)
    assert read_question(message) == Question("east", TOKEN, content)
    assert read_answer(answer(message, TOKEN, content), TOKEN) == content
    longest = max(len(part.deflate()) for part in get_all_nested_objects(message).values())
    assert longest < PART + 2**12


@pytest.mark.parametrize(
    "records",
    [
        {},
        {"sordino": {"token": TOKEN}},
        {"sordino": {"site": "east", "content": b""}},
        {"sordino": {"site": "east", "token": TOKEN, "content": "text"}},
        {"sordino": {"site": "east", "token": TOKEN, "content": b""}, "sordino2": {"content": b""}},
        {"sordino": {"site": "east", "token": TOKEN, "content": b""}, "other": {"content": b""}},
    ],
)
def test_what_is_no_question_is_not_answered(records: Mapping[str, dict[str, Any]], site: Site) -> None:
    content = RecordDict({name: ConfigRecord(record) for name, record in records.items()})
    assert answered(site, Message(content, 7, "train")) is None


def test_a_reply_that_is_none_of_ours_is_no_answer() -> None:
    message = asked(b"x")
    assert read_answer(Message(RecordDict(), reply_to=message), TOKEN) == "it sent a message that is none of Sordino's"
    assert read_answer(answer(message, b"guessed", b"1"), TOKEN) == "it sent an answer without the question's token"
    failed = Message(Error(2, "ValueError: /patients/alice.png"), reply_to=message)
    assert read_answer(failed, TOKEN) == "it failed with error 2 of Flower's"


def content_of(reply: Message | None) -> bytes:
    assert reply is not None
    content = read_answer(reply, TOKEN)
    assert isinstance(content, bytes)
    return content


def test_a_site_answers_as_its_own_file_says(site: Site, clip_folder: Path) -> None:
    told = Envelope.decode(content_of(answered(site, asked(hello(clip_folder)))))
    assert (told.kind, told.facts["sizes"]) == ("hello", [9])


def test_a_site_whose_key_is_another_names_refuses_in_words(site: Site, clip_folder: Path) -> None:
    """The name in a question is the one that the server's operator wrote beside the key."""
    told = Envelope.decode(content_of(answered(site, asked(hello(clip_folder), "west"))))
    assert told.kind == "refusal"
    assert "name = 'east', and the server's file has 'west' for its key; write the same" in told.facts["reason"]
    assert not (site.state / "experiments").exists()


def test_a_failure_at_a_site_does_not_tell_of_its_data(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Site, request: bytes) -> bytes:
        raise ValueError("/patients/alice.png")

    monkeypatch.setattr(Site, "turn", fail)
    content = content_of(answered(site, asked(b"")))
    assert "ValueError" in Envelope.decode(content).facts["reason"]
    assert b"alice" not in content


def test_a_node_remembers_its_number_at_each_server(tmp_path: Path) -> None:
    assert _before(tmp_path / FOLDER, "a:1") is None
    (tmp_path / NUMBER).write_text(json.dumps({"a:1": 5}))
    assert (_before(tmp_path, "a:1"), _before(tmp_path, "b:1")) == (5, None)
    (tmp_path / NUMBER).write_text("[1")
    assert _before(tmp_path, "a:1") is None


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> ServerProject:
    server = {"host": "fl.example.org"}
    document = {"name": "eyes", "server": server, "sites": [{"name": "east", "key": "east.pub"}]}
    (tmp_path / "project.toml").write_text(tomli_w.dumps(document))
    (tmp_path / "coordinator.toml").write_text(tomli_w.dumps({"checkpoints": {"clip": str(clip_folder)}}))
    monkeypatch.setenv(PROJECT_VARIABLE, str(tmp_path / "project.toml"))
    return ServerProject(tmp_path / "project.toml")


def test_a_run_holds_the_proposal_and_nothing_of_its_senders_machine(clip_folder: Path) -> None:
    proposal = Proposal.of(experiment(clip_folder))
    config = run_config_of(proposal, Patience(0.5, 7, 3, ["east"]))
    assert asked_for(config) == (proposal, Patience(0.5, 7, 3, ["east"]))
    assert str(clip_folder) not in json.dumps(config)
    with pytest.raises(RunError, match="holds experiment .*, and names another"):
        asked_for(config | {"fingerprint": "0" * 64})
    for broken in ({}, config | {"proposal": "["}, config | {"patience": '{"x": 1}'}):
        with pytest.raises(RunError, match="the run's proposal cannot be read .* use 'sordino flower run'"):
            asked_for(broken)


def test_flwr_run_names_a_file_at_the_server(tmp_path: Path, clip_folder: Path) -> None:
    config = experiment(clip_folder)
    file = tmp_path / "experiment.toml"
    tables = config.model_dump(exclude_none=True, exclude={"methods"}) | {"fleet": {"quorum": 0.7}}
    file.write_text(tomli_w.dumps(tables))
    proposal, patience = asked_for({"config": str(file), "proposal": "", "fingerprint": "", "patience": ""})
    assert (proposal.fingerprint, patience.quorum) == (Proposal.of(config).fingerprint, 0.7)


def test_a_server_that_was_started_otherwise_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROJECT_VARIABLE, raising=False)
    with pytest.raises(RunError, match="is not set; start the server with 'sordino flower up'"):
        run(SimpleNamespace(), 1, {})  # type: ignore[arg-type]


class Control:
    """A SuperLink's control of which a test says the runs."""

    def __init__(self, *runs: tuple[int, str, str, str]) -> None:
        self._runs = {
            number: SimpleNamespace(
                status=SimpleNamespace(status=status, sub_status=more),
                override_config={"fingerprint": SimpleNamespace(WhichOneof=lambda _: "string", string=fingerprint)},
            )
            for number, fingerprint, status, more in runs
        }
        self.stopped: list[int] = []
        self.started: list[dict[str, str]] = []

    def runs(self) -> Mapping[int, Any]:
        return self._runs

    def run(self, number: int) -> Any:
        return self._runs.get(number)

    def stop(self, number: int) -> None:
        self.stopped.append(number)

    def start(self, config: dict[str, str]) -> int:
        self.started.append(config)
        return 12


def test_a_run_is_followed_in_its_directory(project: ServerProject, clip_folder: Path, tmp_path: Path) -> None:
    """What an experiment's failure leaves is the reason; what the coordinator writes meanwhile is its progress."""
    proposal = Proposal.of(experiment(clip_folder))
    out = module.coordinator_settings(project).folder(proposal)
    assert out == tmp_path / "runs" / proposal.fingerprint
    out.mkdir(parents=True)
    (out / LINES).write_text('{"round": 1}\n')  # an earlier run's, too
    (out / FAILED).write_text("an earlier run's")

    def coordinate(config: Any, proposed: Proposal, fleet: Any, folder: Path, patience: Patience, watch: Any) -> None:
        assert (proposed.fingerprint, folder) == (proposal.fingerprint, out)
        assert config.encoder.checkpoint == str(clip_folder)
        assert not (out / FAILED).exists()
        watch({"round": 2})
        watch({"round": 3, "accuracy": {"local": 0.5}})
        with (out / LINES).open("a") as file:
            file.write('{"rou')  # a line is not told before it is whole
        raise RunError("1 of 2 sites take part, and 2 are needed")

    server = FlowerServer(Control(), out)  # type: ignore[arg-type]
    (project.file.parent / "east.pub").write_text(
        "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlzdHAzODQAAABhBKqHyiK+jgU3jvHHHvMgrXRuHTtimrlixNOe"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "coordinate", coordinate)
        patched.setattr(ServerProject, "sites", {b"key": "east"})
        with pytest.raises(RunError, match="1 of 2"):
            run(SimpleNamespace(), 12, run_config_of(proposal, Patience()))  # type: ignore[arg-type]
    assert server.progress("12", 0) == [{"round": 2}, {"round": 3, "accuracy": {"local": 0.5}}]
    assert server.progress("12", 1) == [{"round": 3, "accuracy": {"local": 0.5}}]
    assert server.progress("13", 0) is None, "another run works there"
    copied = server.results("12", tmp_path / "copied")
    assert copied is not None
    assert (copied / FAILED).read_text() == "1 of 2 sites take part, and 2 are needed\n"
    assert not {LINES, PROCESS} & {path.name for path in copied.iterdir()}
    note = json.loads((out / PROCESS).read_text())
    (out / PROCESS).write_text(json.dumps(note | {"process": 2**22 + 1}))  # more than the system has
    assert server.progress("12", 0) is None, "its process died"
    assert server.results("13", tmp_path / "other") is None


def test_runs_are_found_by_their_experiment(clip_folder: Path, tmp_path: Path) -> None:
    proposal = Proposal.of(experiment(clip_folder))
    other = Proposal.of(experiment(clip_folder, rounds=9)).fingerprint
    control = Control(
        (1, proposal.fingerprint, "finished", "failed"),
        (2, proposal.fingerprint, "running", ""),
        (3, other, "running", ""),
        (4, "", "running", ""),
    )
    server = FlowerServer(control, tmp_path)  # type: ignore[arg-type]
    found = server.jobs(f"sordino-{proposal.fingerprint[:16]}")
    assert found == {"1": "FINISHED:FAILED", "2": "RUNNING"}
    server.abort("1")
    server.abort("2")
    assert control.stopped == [2]
    assert server.status("99").over, "a server with a new database does not know it"
    assert server.submit(write_run(tmp_path, proposal, Patience(), 1)) == "12"
    assert asked_for(control.started[0]) == (proposal, Patience(sites=[]))


def test_a_projects_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    from sordino.flower.keys import make_key

    make_key(tmp_path / "east")
    make_key(tmp_path / "west")
    server: dict[str, Any] = {"host": "fl.example.org"}
    sites = [{"name": name, "key": f"{name}.pub"} for name in ("east", "west")]
    right: dict[str, Any] = {"name": "eyes", "server": server, "sites": sites}

    def load(**changed: Any) -> Mapping[bytes, str]:
        (tmp_path / "project.toml").write_text(tomli_w.dumps(right | changed))
        return ServerProject(tmp_path / "project.toml").sites

    assert sorted(load().values()) == ["east", "west"]
    (tmp_path / "text.pub").write_text("ssh-ed25519 AAAA")
    for changed, message in (
        ({"server": server | {"prot": 1}}, r"server.prot = 1: no such key; did you mean 'port'\?"),
        ({"server": server | {"key": "k.pem"}}, "server.certificate = None: needs server.key"),
        ({"server": server | {"loopback": 8443}}, "server.loopback = 8443: is the port for sites"),
        ({"server": server | {"most_bytes": 1000}}, "server.most_bytes = 1000: .* 5242880"),
        ({"sites": [*sites, sites[0]]}, "sites = 'east': is there twice"),
        ({"sites": [*sites, {"name": "north", "key": "east.pub"}]}, "sites.key = 'east.pub': is east's key, too"),
        ({"sites": [{"name": "east", "key": "none.pub"}]}, "none.pub': there is no such file; put the site's public"),
        ({"sites": [{"name": "east", "key": "text.pub"}]}, "text.pub': is no public key of 'sordino flower key'"),
        ({"sites": [{"name": "east", "key": "east"}]}, "/east': is no public key of 'sordino flower key'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(**changed)
