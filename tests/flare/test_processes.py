"""What is FLARE's own, beside the suite over all engines: certificates, code in jobs, processes of a job, requests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.flare_engine import FAULTY, LEAD, FlareEngine, flare
from engines.processes import HELD, SECONDS, Trial, paced
from flare.parties import Party, environment, processes_of, until
from sites.owners import NAMES
from sordino.flare.gate import REQUESTS
from sordino.flare.job import write_job
from sordino.flower.certificates import write_certificates
from sordino.runtime.fleet import Patience

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlareEngine]:
    with flare(tmp_path_factory.mktemp("flare"), hostile=True) as started:
        yield started


NOT_AGREED = "it has not agreed"
OLD = "its state ends with round"


def lost_for(reason: str, trial: Trial) -> bool:
    """Tell whether a round went on without north, for a reason."""
    return any(reason in line["lost"]["north"] for line in trial.rounds() if "north" in line.get("lost", {}))


def late_at_hello(engine: FlareEngine) -> None:
    """Have the first hello of north's next process come after a round went on without it."""
    (engine.faults / "north.json").write_text(json.dumps({"hello": "late"}))


def once_it_was_late(engine: FlareEngine, trial: Trial) -> None:
    """Let north's hello go when a round went on without it."""
    until("north is late", lambda: lost_for(NOT_AGREED, trial))
    (engine.faults / "north.json").unlink()


def test_a_site_whose_process_is_killed_is_asked_again_by_the_next_job(engine: FlareEngine) -> None:
    """FLARE fails the whole job. The run goes on from its last round, and no round is charged or drawn twice.

    The site's hello to the next job is later than the grace, so it is in no round at first.
    """
    trial = Trial.of(engine, "killed", rounds=10)
    with trial.start(grace=2.0) as run:
        with paced(engine, "east"):
            until("the first round is over", lambda: len(trial.rounds()) >= 1)
            late_at_hello(engine)
            killed = engine.parties["north"].job_process()
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            once_it_was_late(engine, trial)
            until("it is in a round again", lambda: trial.back("north"))
        outcome, told = run.end()
    assert "try 1 of 5" in told
    assert outcome["rounds"] == 10
    assert not outcome["left_out"]
    lines = trial.written()
    assert [line["round"] for line in lines] == list(range(1, 11)), "none is run twice, none left out"
    whole = [line["round"] for line in lines if line["participants"] == 3]
    late = [line["round"] for line in lines if NOT_AGREED in line.get("lost", {}).get("north", "")]
    assert set(whole).isdisjoint(late)
    for name in ("east", "west"):
        taken = {line["round"] for line in lines if name not in line.get("lost", {})}
        assert taken <= set(trial.charged(name)) <= set(range(1, 11))
    charged = set(trial.charged("north"))
    assert set(whole) <= charged
    assert charged.isdisjoint(late), "it was asked for nothing before it agreed"


def test_an_old_copy_of_a_site_takes_its_place_and_answers_nothing(engine: FlareEngine) -> None:
    """FLARE lets the later of two processes with one certificate in. Its state knows fewer rounds than the server."""
    trial = Trial.of(engine, "copied", rounds=12, seed=7)
    copy = engine.folder / "copy" / "north"
    with trial.start(deadline=400.0, grace=4.0) as run, paced(engine, "east") as pace:
        until("the first round is over", lambda: len(trial.rounds()) >= 1)
        shutil.copytree(engine.kits["north"], copy)
        ledger = copy / "state" / "ledger" / f"{trial.proposal.fingerprint}.json"
        before, copied = ledger.read_bytes(), len(trial.rounds())
        until("more rounds are over", lambda: len(trial.rounds()) >= copied + 2)
        engine.kill_site("north")
        until("a round is over without it", lambda: lost_for("", trial))
        pace(HELD)
        late_at_hello(engine)  # so that only the agreement that comes later tells it that it is old
        party = engine.site(copy)
        try:
            until("the command heard of it", lambda: engine.rejoined in run.told())
            pace(SECONDS)
            once_it_was_late(engine, trial)
            until("it is refused", lambda: lost_for(OLD, trial))
            pace(0)
            outcome, told = run.end()
        finally:
            party.end()
            engine.start_site("north")
    assert "north is back; another job goes on with it" in told
    assert OLD in outcome["left_out"]["north"]
    assert [line["round"] for line in trial.written()] == list(range(1, 13))
    assert ledger.read_bytes() == before, "it drew no noise"
    answered = trial.charged("north")
    assert {line["round"] for line in trial.written() if line["participants"] == 3} <= set(answered)
    assert answered == list(range(1, len(answered) + 1))


def test_without_a_certificate_of_the_project_nothing_is_heard(engine: FlareEngine, tmp_path: Path) -> None:
    """Plain text, no certificate, and one that another authority signed: the server closes the connection."""
    port = tomllib.loads((engine.folder / "project.toml").read_text())["server"]["port"]
    startup = engine.kits["east"] / "startup"

    def heard(context: ssl.SSLContext | None) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
            channel = context.wrap_socket(plain, server_hostname="127.0.0.1") if context else plain
            channel.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            return channel.recv(100)

    def with_certificate(certificate: Path | None, key: Path | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
        context.check_hostname = False
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        return context

    assert b"HTTP/1.1" in heard(with_certificate(startup / "client.crt", startup / "client.key"))
    write_certificates(tmp_path, "strangers", "127.0.0.1", 1)
    strangers = with_certificate(tmp_path / "server.crt", tmp_path / "server.key")
    for context in (None, with_certificate(None), strangers):
        try:
            assert heard(context) == b""
        except (ssl.SSLError, ConnectionError):
            continue


def test_a_certificate_under_another_sites_name_is_refused(engine: FlareEngine) -> None:
    thief = engine.folder / "thief" / "south"
    shutil.copytree(engine.kits["south"], thief)
    for file in ("client.crt", "client.key"):
        shutil.copyfile(engine.kits["east"] / "startup" / file, thief / "startup" / file)
    party = Party(thief)
    try:
        refused = "authenticated as 'east' but claimed endpoint 'south'"
        until("the server refuses", lambda: engine.parties["server"].says(refused), 60)
        assert not engine.parties["server"].says("client south registered")
    finally:
        party.end()


def test_code_in_a_job_is_refused_at_every_site(engine: FlareEngine) -> None:
    """One of these has a kit whose key was made at the site; see `engines.flare_engine`."""
    trial = Trial.of(engine, "code", seed=9)
    job = write_job(engine.folder / "code", trial.proposal, Patience(0.3), 1)
    marker = engine.folder / "ran"
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "code_of_mine.py").write_text(
        f"import pathlib\nfrom sordino.flare.executor import SiteExecutor\npathlib.Path({str(marker)!r}).touch()\n"
    )
    client = job / "app" / "config" / "config_fed_client.json"
    client.write_text(client.read_text().replace("sordino.flare.executor.", "code_of_mine."))
    command = [sys.executable, str(Path(__file__).with_name("submit_job.py")), str(engine.kits[LEAD]), str(job)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=180)
    told = json.loads(done.stdout)
    assert set(NAMES) <= set(told["sites"])
    refused = {line.partition(":")[0] for line in told["refused"] if "BYOC not permitted" in line}
    assert refused == set(NAMES), "the server let it through, and no site did"
    assert not marker.exists()


SECRET = "patient Miller: melanoma"


def asked_by(engine: FlareEngine, party: str, targets: list[str], file: Path) -> dict[str, list[dict[str, Any]]]:
    """What parties answer to everything that another one sends."""
    asked = json.dumps([targets, str(file)])
    if party == LEAD:
        command = [sys.executable, str(Path(__file__).with_name("ask_as_lead.py")), str(engine.kits[LEAD]), asked]
        own = environment(PYTHONPATH=str(FAULTY))
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=True, timeout=180)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    (engine.faults / "ask").write_text(asked)
    (engine.faults / "ask").rename(engine.faults / f"{party}.ask")
    answers = engine.faults / f"{party}.answers"
    until(f"{party} was answered", answers.exists)
    return dict(json.loads(answers.read_text()))


def is_heard(answer: dict[str, Any]) -> bool:
    return answer["code"] == "ok" and not answer["refused"]


def test_no_party_reads_or_ends_anything_at_a_site_or_the_server(engine: FlareEngine) -> None:
    """Every topic of FLARE's, from the server's own process, another site's and a lead's, asking for rights or not."""
    file = engine.kits["east"] / "local" / "patients.csv"
    file.write_text(SECRET)

    def living() -> set[int]:
        found = processes_of(engine.kits["server"]) | processes_of(engine.kits["east"])
        return {number for number, arguments in found.items() if any("_train" in each for each in arguments)}

    before = living()
    assert len(before) == 2
    state = engine.kits["east"] / "state"
    state.mkdir(exist_ok=True)
    for party, targets in (("server", ["east"]), ("north", ["east", "server"]), (LEAD, ["east", "server"])):
        for target, answers in asked_by(engine, party, targets, file).items():
            assert len(answers) > 80
            assert not [each for each in answers if SECRET in each["text"]], (party, target)
            heard = {tuple(map(each.get, ("channel", "request", "authorized"))) for each in answers if is_heard(each)}
            allowed = {("admin", request, True) for request in REQUESTS} if party == "server" else set()
            assert heard <= allowed, (party, target)
    assert state.is_dir(), "a site's ledger is beside the folders of jobs"
    assert living() == before
    assert not (engine.kits["east"] / "restart.fl").exists()
    file.unlink()
