"""A server behind its proxy and three sites in real processes, over TLS with signed requests, on the loopback."""

from __future__ import annotations

import contextlib
import hashlib
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime import RuntimeHttpClient

from flare.parties import environment, until
from flower.parties import FlowerEngine, needs_nginx
from sites.owners import experiment
from sordino.experiments.config import Experiment, load_config
from sordino.flower.certificates import write_certificates
from sordino.flower.connection import Connection, Unreachable
from sordino.flower.control import APP, connected
from sordino.flower.keys import load_key, make_key
from sordino.flower.messages import answer, read_question
from sordino.flower.names import FLEET, QUIET
from sordino.flower.project import ServerProject
from sordino.sites.coordinator import OUTCOME
from sordino.sites.proposal import Proposal

pytestmark = [pytest.mark.slow, needs_nginx]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Iterator[FlowerEngine]:
    engine = FlowerEngine(tmp_path_factory.mktemp("flower"), clip_folder)
    try:
        engine.start()
        yield engine
    finally:
        engine.end()


def written(engine: FlowerEngine, name: str, config: Experiment) -> tuple[Path, Proposal]:
    file = engine.folder / f"{name}.toml"
    file.write_text(tomli_w.dumps(config.model_dump(exclude_none=True, exclude={"methods"})))
    return file, Proposal.of(load_config(file))


def outside(engine: FlowerEngine, path: str, **more: Any) -> int:
    """What the proxy answers to a request with nothing but the authority's certificate."""
    with httpx.Client(verify=ssl.create_default_context(cafile=str(engine.ca))) as client:
        method, url = more.pop("method", "POST"), f"https://127.0.0.1:{engine.port}{path}"
        # Its words are not read: nginx closes a connection whose body it refuses in the middle of them.
        with client.stream(method, url, **more) as answer:
            return answer.status_code


def test_flwr_run_starts_an_experiment_too(engine: FlowerEngine) -> None:
    """With Flower's own command, on the server's machine, and a configuration there."""
    file, proposal = written(engine, "by-flwr", experiment(engine.clip, "promptfl"))
    home = engine.folder / "flwr"
    home.mkdir()
    eyes = {"address": f"127.0.0.1:{engine.loopback}", "root-certificates": str(engine.ca)}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "eyes", "eyes": eyes}}))
    flwr = [str(Path(sys.executable).with_name("flwr")), "run", str(APP), "eyes", "--run-config", f'config="{file}"']
    variables = environment(FLWR_HOME=str(home), **QUIET)
    done = subprocess.run(flwr, env=variables, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = engine.lines(proposal, home).with_name(OUTCOME)
    until("the experiment is over", outcome.exists, 240)
    assert json.loads(outcome.read_text())["rounds"] == 3


def test_from_outside_nodes_own_calls_pass_and_no_others(engine: FlowerEngine) -> None:
    assert outside(engine, "/health", method="GET") == 200
    for path in FLEET:  # the SuperLink itself wants a signature of a known key
        assert outside(engine, path, headers={"content-type": PROTOBUF_MEDIA_TYPE}) == 401, path
        assert outside(engine, path, method="GET") == 403, path
    for path in (
        *("/", "/docs", "/openapi.json", "/v1/control/list-runs", "/v1/control/start-run"),
        *("/v1/control/register-node", "/v1/runtime/acquire-task", "/v1/fleet/register-node"),
        *("/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "//v1/control/list-runs"),
        *("/v1/control/list-runs?/v1/fleet/pull-messages", "/V1/FLEET/pull-messages", "/v1/fleet/pull-messages/"),
    ):
        assert outside(engine, path) == 403, path


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_flowers_own_clients_reach_control_and_runtime_from_inside_alone(engine: FlowerEngine, inside: bool) -> None:
    """The same calls with the same certificate: what refuses them is the proxy."""
    address = f"127.0.0.1:{engine.loopback if inside else engine.port}"
    control = ControlHttpClient.from_server_address(address, False, str(engine.ca), [])
    runtime = RuntimeHttpClient.from_server_address(address, False, str(engine.ca), [])
    calls = [
        lambda: control.ListNodes(ListNodesRequest()),
        lambda: control.ListRuns(ListRunsRequest()),
        lambda: runtime.AcquireTask(AcquireTaskRequest(supported_task_types=["none"])),
    ]
    for call in calls:
        if inside:
            call()
        else:
            with pytest.raises(httpx.HTTPStatusError) as caught:
                call()
            assert caught.value.response.status_code == 403


def test_a_long_body_and_plain_text_are_refused(engine: FlowerEngine) -> None:
    most = ServerProject(engine.project).settings.server.most_bytes
    assert outside(engine, "/v1/fleet/push-object", content=b"\0" * (most + 1)) == 413
    # Without a length it goes through as it comes: the SuperLink may refuse it first, and who refuses it closes early.
    chunks = iter([b"\0" * 2**20] * (most // 2**20 + 1))
    with contextlib.suppress(httpx.TransportError):
        assert outside(engine, "/v1/fleet/push-object", content=chunks) in (401, 413, 415)
    plain = httpx.post(f"http://127.0.0.1:{engine.port}/v1/fleet/pull-messages")
    assert plain.status_code == 400


def test_strangers_and_impostors_are_refused(engine: FlowerEngine, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    address = f"127.0.0.1:{engine.port}"
    with pytest.raises(Unreachable, match="does not know this node's key"):
        Connection(address, str(engine.ca), load_key(tmp_path / "stranger"), 2**20)
    # Another authority's certificate, as somebody between site and server would show one.
    write_certificates(tmp_path / "other", "trial", "127.0.0.1", 30)
    with pytest.raises(Unreachable, match="not signed by the authority of --ca"):
        Connection(address, str(tmp_path / "other" / "ca.crt"), load_key(engine.homes["east"] / "node"), 2**20)


SERVER = """
import hashlib, json, os, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from sordino.flower.coordinator import server_project
from sordino.flower.fleet import FlowerFleet
from sordino.runtime.fleet import Ask
app = ServerApp()
@app.main()
def main(grid, context):
    project = server_project()
    others = [node.node_id for node in grid.get_nodes() if project.sites[bytes(node.public_key)] != "east"]
    content = RecordDict({"any": ConfigRecord({"x": 1})})
    grid.push_messages([Message(content, node, "train") for node in others])
    (event,) = FlowerFleet(grid, project.sites).ask(Ask(1, {"east": os.urandom(4) * 2500000}, 1, 100.0, 0.0))
    told = getattr(event, "content", b"")
    Path(context.run_config["out"]).write_text(json.dumps([hashlib.sha256(told).hexdigest(), str(event)[:200]]))
"""
CLIENT = """
from pathlib import Path
from flwr.clientapp import ClientApp
Path(MARKER).touch()
app = ClientApp()
@app.train()
def train(message, context):
    Path(MARKER).touch()
"""
PYPROJECT = """
[project]
name = "mine"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "me"
[tool.flwr.app.components]
serverapp = "mine.server:app"
clientapp = "mine.client:app"
[tool.flwr.app.config]
out = ""
"""


def test_nodes_run_no_code_of_an_app_and_long_messages_pass_both_ways(engine: FlowerEngine) -> None:
    """The server's operator submits an app of their own. Two nodes ignore its code; the third is this test itself."""
    marker, result = engine.folder / "ran", engine.folder / "result.json"
    pyproject = PYPROJECT.replace('out = ""', f"out = {json.dumps(str(result))}")
    files = {
        "pyproject.toml": pyproject.encode(),
        "mine/__init__.py": b"",
        "mine/server.py": SERVER.encode(),
        "mine/client.py": CLIENT.replace("MARKER", repr(str(marker))).encode(),
    }
    content, _ = build_fab_from_files(files)
    engine.kill_site("east")
    number = json.loads((engine.states["east"] / "node" / "number.json").read_text())[f"127.0.0.1:{engine.port}"]
    key = load_key(engine.homes["east"] / "node")
    connection = Connection(f"127.0.0.1:{engine.port}", str(engine.ca), key, 2**27, number)
    try:
        with connected(ServerProject(engine.project)) as control:
            fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
            run = control._ask(control._client.StartRun, StartRunRequest(fab=fab)).run_id
            received = []

            def asked() -> bool:
                if (message := connection.receive()) is not None:
                    received.append(message)
                return bool(received)

            until("the app asks", asked, 240)
            question = read_question(received[0])
            assert (question.site, len(question.content)) == ("east", 10_000_000)
            told = question.content[::-1] + b"and more"
            connection.send(answer(received[0], question.token, told), 1.0)
            until("the app has the answer", result.exists, 120)
            digest, event = json.loads(result.read_text())
            assert digest == hashlib.sha256(told).hexdigest(), event
            for name in ("north", "west"):
                until(f"{name} ignores it", lambda name=name: engine.sites[name].says("none of Sordino's"), 60)
            until("the run ends", lambda: control.run(run).status.status == "finished", 60)
    finally:
        connection.close()
    assert not marker.exists()
    engine.start_site("east")
