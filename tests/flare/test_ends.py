"""The two ends inside FLARE, with its own messages and no process: where their files are, and what they refuse."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from sites.owners import experiment, write_pictures, write_site
from sordino.errors import ConfigError, RunError
from sordino.flare.controller import content_of, read_proposal
from sordino.flare.executor import SiteExecutor
from sordino.flare.names import CONTENT, TASK
from sordino.runtime.envelope import Envelope
from sordino.sites.proposal import Proposal
from sordino.sites.server_settings import load_coordinator
from sordino.sites.site import Site


class Context(FLContext):  # type: ignore[misc]
    """A site's context: where it was started, and what its certificate says."""

    def __init__(self, local: Path, certified: str) -> None:
        super().__init__()
        self._local, self._certified = local, certified

    def get_prop(self, key: str, default: Any = None) -> Any:
        return SimpleNamespace(get_site_config_dir=lambda: str(self._local))

    def get_identity_name(self, default: str = "") -> str:
        return self._certified


@pytest.fixture(autouse=True)
def shut(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is none of FLARE's, and stays as it is."""
    monkeypatch.setattr("sordino.flare.executor.is_shut", lambda: True)


@pytest.fixture
def local(tmp_path: Path, clip_folder: Path) -> Path:
    write_pictures(tmp_path / "local" / "pictures", 0, 5)
    write_site(tmp_path / "local", "east", clip_folder)
    return tmp_path / "local"


def asked(local: Path, certified: str, request: bytes, task: str = TASK) -> Any:
    message = Shareable()
    message[CONTENT] = request
    return SiteExecutor().execute(task, message, Context(local, certified), None)


def hello(clip_folder: Path) -> bytes:
    proposal = Proposal.of(experiment(clip_folder))
    return Envelope("hello", proposal.fingerprint, proposal.facts).encode()


def test_an_executor_takes_nothing_from_a_job() -> None:
    assert list(inspect.signature(SiteExecutor).parameters) == []


def test_a_site_answers_as_its_own_file_says(local: Path, clip_folder: Path) -> None:
    answer = Envelope.decode(asked(local, "east", hello(clip_folder))[CONTENT])
    assert (answer.kind, answer.facts["sizes"]) == ("hello", [9])


def test_a_link_to_the_sites_file_is_read_where_it_leads(local: Path, clip_folder: Path, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "site.toml").symlink_to(local / "site.toml")
    answer = Envelope.decode(asked(kit, "east", hello(clip_folder))[CONTENT])
    assert answer.kind == "hello", answer.facts
    assert [path.name for path in kit.iterdir()] == ["site.toml"], "its pictures and its state are at the file"


def test_a_file_of_another_site_or_none_is_refused_in_words(local: Path, clip_folder: Path, tmp_path: Path) -> None:
    answer = Envelope.decode(asked(local, "west", hello(clip_folder))[CONTENT])
    reason = "name = 'east': this site's certificate says 'west'; write the same here"
    assert (answer.kind, answer.facts["reason"]) == ("refusal", reason)
    answer = Envelope.decode(asked(tmp_path / "empty", "west", hello(clip_folder))[CONTENT])
    assert answer.kind == "refusal"
    assert "no such file" in answer.facts["reason"]


def test_a_state_that_cannot_be_read_is_told_without_its_place(local: Path, clip_folder: Path) -> None:
    ledger = local / "state" / "ledger"
    ledger.mkdir(parents=True)
    (ledger / f"{'0' * 64}.json").write_text("{")
    answer = Envelope.decode(asked(local, "east", hello(clip_folder))[CONTENT])
    assert answer.kind == "refusal"
    assert "state/ledger" in answer.facts["reason"]
    assert "is damaged" in answer.facts["reason"]
    assert str(local) not in answer.facts["reason"]


def test_a_failure_at_a_site_does_not_tell_of_its_data(
    local: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Site, request: bytes) -> bytes:
        raise ValueError("/patients/alice.png")

    monkeypatch.setattr(Site, "turn", fail)
    content = asked(local, "east", hello(clip_folder))[CONTENT]
    assert "ValueError" in Envelope.decode(content).facts["reason"]
    assert b"alice" not in content


def test_a_site_with_a_kit_that_leaves_flare_open_answers_nothing(
    local: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sordino.flare.executor.is_shut", lambda: False)
    answer = Envelope.decode(asked(local, "east", hello(clip_folder))[CONTENT])
    assert (answer.kind, "make all kits anew, with new keys" in answer.facts["reason"]) == ("refusal", True)


def test_a_site_rests_once_its_answer_is_sent(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then: FLARE sends the answer before the event, and asks for the next task after it."""
    rests: list[float] = []
    monkeypatch.setattr("sordino.flare.executor.time.sleep", rests.append)
    executor, context = SiteExecutor(), Context(local, "east")
    message = Shareable()
    message[CONTENT] = b"no question"
    for _ in range(5):
        executor.handle_event(EventType.BEFORE_SEND_TASK_RESULT, context)
        executor.execute(TASK, message, context, None)
        executor.handle_event(EventType.AFTER_SEND_TASK_RESULT, context)
    assert len(rests) == 5
    assert rests[:3] == [0, 0, 0]
    assert rests[4] > 0


def test_another_task_is_none_of_a_sites(local: Path) -> None:
    assert asked(local, "east", b"", "train").get_return_code() == ReturnCode.TASK_UNKNOWN


def test_a_result_without_bytes_is_no_answer() -> None:
    result = make_reply(ReturnCode.OK)
    assert content_of(result) == "its answer holds no bytes"
    result[CONTENT] = "text"
    assert content_of(result) == "its answer holds no bytes"
    result[CONTENT] = b"bytes"
    assert content_of(result) == b"bytes"
    assert content_of(make_reply(ReturnCode.EXECUTION_EXCEPTION)) == "it failed: EXECUTION_EXCEPTION"


def test_a_proposal_that_changed_on_its_way_is_refused(clip_folder: Path) -> None:
    proposal = Proposal.of(experiment(clip_folder))
    assert read_proposal(json.dumps(proposal.facts), proposal.fingerprint) == proposal
    other = Proposal.of(experiment(clip_folder, rounds=4))
    with pytest.raises(RunError, match="the job holds experiment"):
        read_proposal(json.dumps(other.facts), proposal.fingerprint)
    with pytest.raises(RunError, match="cannot be read"):
        read_proposal("[]", proposal.fingerprint)


def test_the_server_decides_where_runs_and_encoders_are(clip_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    proposal = Proposal.of(experiment(clip_folder))
    with pytest.raises(ConfigError, match="checkpoints.clip = None: .* coordinator.toml where it is"):
        load_coordinator(file).config(proposal)
    file.write_text(f'runs = "kept"\ndevice = "cpu"\n[checkpoints]\nclip = "{clip_folder}"\n')
    settings = load_coordinator(file)
    assert settings.folder(proposal) == tmp_path / "kept" / proposal.fingerprint
    assert settings.config(proposal).encoder.checkpoint == str(clip_folder)
    assert settings.config(proposal).tracking is None
    file.write_text(f'{file.read_text()}[tracking]\nto = "tensorboard"\nwhere = "curves"\n')
    tracking = load_coordinator(file).config(proposal).tracking
    assert tracking is not None
    assert tracking.where == str(tmp_path / "curves"), "from the file's folder, wherever FLARE was started"
    file.write_text("rums = 'kept'\n")
    with pytest.raises(ConfigError, match=r"rums = 'kept': no such key; did you mean 'runs'\?"):
        load_coordinator(file)
