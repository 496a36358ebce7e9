"""What FLARE's processes hear once they are shut, message by message; `test_processes` sends the messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nvflare
import pytest
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessagePropKey
from nvflare.fuel.f3.cellnet.fqcn import FqcnInfo
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import STREAM_CHANNEL, STREAM_DATA_TOPIC, StreamHeaderKey
from nvflare.fuel.sec.authz import AuthorizationService
from nvflare.private.admin_defs import Message as Request
from nvflare.private.defs import RequestHeader
from nvflare.security.security import FLAuthorizer

from flare.parties import environment
from flare.test_provision import kits  # noqa: F401
from sordino.errors import RunError
from sordino.flare import gate
from sordino.flare.names import GATE

JOB = "0b1c6f5e-5a0e-4b2e-9a55-3f1d8f0f6c11"  # fixed, as tests are named by it
LEAD = "_admin_5d7a2f60-1c1f-4a43-8f0e-6f2b7c9d8e22"
TO_A_SITE = ("admin", "admin")


def message(own: str, by: str, subject: tuple[str, str], origin: str | None = None, to: str | None = None) -> Message:
    """A message that comes from a neighbour, which may say another origin, and be for another one."""
    made = Message({MessageHeaderKey.ORIGIN: origin or by, MessageHeaderKey.DESTINATION: to or own})
    made.add_headers({MessageHeaderKey.CHANNEL: subject[0], MessageHeaderKey.TOPIC: subject[1]})
    made.set_prop(MessagePropKey.ENDPOINT, Endpoint(by))
    return made


@pytest.mark.parametrize(
    ("own", "by", "subject"),
    [
        ("east", "server", TO_A_SITE),
        ("east", f"east.{JOB}", ("admin", "train.notify_job_status")),
        (f"east.{JOB}", "east", ("client_command", "abort")),
        ("server", "east", ("task", "heart_beat")),
        (f"server.{JOB}", "server", ("server_command", "app_command")),
        ("server", LEAD, ("hci_channel", "any")),
    ],
)
def test_what_a_job_needs_is_heard(own: str, by: str, subject: tuple[str, str]) -> None:
    assert gate.hears(message(own, by, subject), FqcnInfo(own)) == ""


def test_the_servers_job_is_asked_for_tasks() -> None:
    """By way of the server, which passes the question on."""
    for own, by in (("server", f"east.{JOB}"), (f"server.{JOB}", "server")):
        asked = message(own, by, ("server_command", "get_task"), f"east.{JOB}", f"server.{JOB}")
        assert gate.hears(asked, FqcnInfo(own)) == ""


@pytest.mark.parametrize(
    ("own", "by", "subject", "more"),
    [
        ("east", "server", ("_net_manager", "stop_cell"), {}),
        ("east", "server", ("cellnet.channel", "bulk"), {}),
        ("east", "server", ("aux_communication", "fed.event"), {}),
        ("east", "server", TO_A_SITE, {"origin": "north"}),
        ("east", "server", ("client_command", "abort"), {"origin": "east", "to": f"east.{JOB}"}),
        ("east", "north", TO_A_SITE, {}),
        ("east", "north", TO_A_SITE, {"origin": "server"}),
        ("east", f"east.{JOB}", TO_A_SITE, {}),
        (f"east.{JOB}", "east", ("client_command", "configure_job_log"), {}),
        (f"east.{JOB}", "server", ("client_command", "abort"), {}),
        (f"east.{JOB}", "server", ("server_command", "get_task"), {}),
        ("server", "north", TO_A_SITE, {"to": "east"}),
        ("server", LEAD, TO_A_SITE, {"to": "east"}),
        ("server", LEAD, TO_A_SITE, {"to": "east", "origin": "server"}),
        ("server", "north", ("task", "quit"), {"origin": "east"}),
        ("server", "north", ("_net_manager", "stop_cell"), {}),
        ("server", "north", ("hci_channel", "any"), {}),
        ("server", "north", ("server_parent_listener", "update_run_status"), {}),
        ("server", LEAD, ("server_command", "configure_job_log"), {}),
        (f"server.{JOB}", "server", ("server_command", "configure_job_log"), {"origin": f"north.{JOB}"}),
        (f"server.{JOB}", "server", ("server_command", "app_command"), {"origin": LEAD}),
        (f"server.{JOB}", "server", ("_net_manager", "stop"), {"origin": "north"}),
    ],
)
def test_all_else_is_refused(own: str, by: str, subject: tuple[str, str], more: dict[str, str]) -> None:
    refused = message(own, by, subject, **more)
    assert gate.hears(refused, FqcnInfo(own))
    assert gate.intercept(refused, FqcnInfo(own)) is not None


def test_of_a_stream_what_it_is_for_decides() -> None:
    def heard(channel: str, topic: str) -> bool:
        part = message(f"east.{JOB}", f"server.{JOB}", (STREAM_CHANNEL, STREAM_DATA_TOPIC))
        part.add_headers({StreamHeaderKey.CHANNEL: channel, StreamHeaderKey.TOPIC: topic})
        part.set_prop(MessagePropKey.ENDPOINT, Endpoint("server"))
        return gate.hears(part, FqcnInfo(f"east.{JOB}")) == ""

    assert heard("aux_communication", "__end_run__")
    assert heard("return_only", "server_command:get_task")
    assert not heard("_net_manager", "stop")
    assert not heard("aux_communication", "__do_task__")


@pytest.fixture
def authorized(kits: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    policy = json.loads((kits["east"] / "local" / "authorization.json").read_text())
    monkeypatch.setattr(AuthorizationService, "the_authorizer", FLAuthorizer("east_hospital", policy))


def request(topic: str, role: str = "", **headers: Any) -> Request:
    made = Request(topic, None)
    made.set_headers(headers)
    if role:
        named = {RequestHeader.USER_NAME: "a@b.org", RequestHeader.USER_ORG: "b", RequestHeader.USER_ROLE: role}
        made.set_headers(named)
    return made


@pytest.mark.usefixtures("authorized")
def test_a_request_needs_a_right_whatever_it_says() -> None:
    quiet = {RequestHeader.REQUIRE_AUTHZ: "false"}
    assert gate.refusal(request("train.deploy", "lead", job_id=JOB)) == ""
    assert gate.refusal(request("train.check_status", "lead", **quiet)) == ""
    for topic in ("train.deploy", "train.check_status", "scheduler.check_resource"):
        for role in ("", "member", "org_admin"):
            asked = request(topic, role, job_id=JOB, admin_command="report_version", **quiet)
            assert gate.refusal(asked), (topic, role)
    assert gate.refusal(request("sys.shell", "lead", job_id=JOB)) == "this site does not answer that"


@pytest.mark.usefixtures("authorized")
@pytest.mark.parametrize("job", ["state", "local", "../state", JOB + "/..", JOB.upper() + "x", "", 7, None])
def test_a_jobs_id_names_no_other_folder(job: Any) -> None:
    """FLARE deletes the folder of this name, and puts the job's files there."""
    for topic in ("train.deploy", "train.delete_run", "train.start_job", "train.abort"):
        assert "job_id" in gate.refusal(request(topic, "lead", job_id=job)), topic
    assert "job_id" in gate.refusal(request("train.start_job", job_id=JOB, job_meta={"job_id": job}))
    assert gate.refusal(request("train.start_job", job_id=JOB, job_meta={"job_id": JOB})) == ""


def test_without_a_file_of_rights_nothing_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuthorizationService, "the_authorizer", None)
    assert "authorization.json" in gate.refusal(request("train.deploy", "lead", job_id=JOB))


SHUT = """
from types import SimpleNamespace
from sordino.flare import gate
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors as every
from nvflare.private.fed.client.admin_commands import AdminCommands
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
gate.Gate(), gate.Gate()
cell = CoreCell("east", "tcp://127.0.0.1:1", False, {})
print(sorted(topic for each in every.request_processors for topic in each.get_topics()) == sorted(gate.REQUESTS))
print(all(isinstance(each, gate.Checked) for each in every.request_processors))
print([each.get_command_name() for each in AdminCommands.commands] == ["abort"])
print(cell.message_interceptor is gate.intercept and gate.is_shut())
agent = SimpleNamespace(processors={topic: each for each in every.request_processors for topic in each.get_topics()})
engine = SimpleNamespace(get_cell=lambda: SimpleNamespace(core_cell=cell), admin_agent=agent)
print(gate.left_open(engine) == "")
agent.processors["sys.shell"] = object()
print(gate.left_open(engine) == "it answers sys.shell")
cell.message_interceptor = None
print(gate.left_open(engine) == "a cell hears everything")
gate.Gate().handle_event("_system_start", SimpleNamespace(get_engine=lambda: None))
print("it goes on")
"""


def test_a_process_is_shut_before_it_listens() -> None:
    done = subprocess.run(
        [sys.executable, "-u", "-c", SHUT], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True"] * 7, done.stdout + done.stderr
    assert (done.returncode, "is not shut: AttributeError" in done.stderr) == (1, True), "it does not know, and ends"


def test_another_version_of_flare_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvflare, "__version__", "2.10.0")
    with pytest.raises(RunError, match=r"nvflare = 2.10.0: only 2.9.\* can be shut"):
        gate.Gate()


@pytest.mark.parametrize("party", ["server", "east"])
def test_kits_name_the_gate_before_all_else(party: str, kits: dict[str, Path]) -> None:  # noqa: F811
    resources = json.loads((kits[party] / "local" / "resources.json").read_text())
    assert resources["components"][0]["path"] == GATE
    assert GATE not in resources["class_allow_list"], "a job cannot"
