"""A server and three sites in real processes, over TLS with certificates, on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flare.parties import Party, environment, free_port, until
from sites.owners import NAMES, NOISE, experiment, fleet, sites_at, write_pictures, write_site

from sordino.algorithms.base import named_tensors
from sordino.experiments.config import Experiment, load_config
from sordino.flare.job import write_job
from sordino.flare.project import load_project
from sordino.flare.provision import provision
from sordino.prompt_file import SavedPrompt
from sordino.runtime import checkpoint
from sordino.runtime.fleet import Patience
from sordino.sites.coordinator import AGREEMENT, LEDGER, METRICS, coordinate
from sordino.sites.proposal import Proposal

pytestmark = pytest.mark.slow

LEAD = "lead@example.org"


@dataclass
class Trial:
    """What is running.

    Attributes:
        folder: with everything in it.
        kits: by name; nobody has started that of `south`.
        parties: by name.
        clip: the encoder.
    """

    folder: Path
    kits: dict[str, Path]
    parties: dict[str, Party]
    clip: Path

    def config(self, name: str, **tables: Any) -> tuple[Path, Experiment]:
        file = self.folder / f"{name}.toml"
        config = experiment(self.clip, "dp-fpl", privacy=NOISE, **tables)
        file.write_text(tomli_w.dumps(config.model_dump(exclude_none=True, exclude={"methods"})))
        return file, load_config(file)

    def start(self, file: Path, out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sordino", "flare", "run", str(file), "--kit", str(self.kits[LEAD])]
        command += ["--out", str(out), "--json"]
        command += ["--set", "fleet.quorum=0.6", "--set", "fleet.deadline=120.0", "--set", "fleet.grace=20.0"]
        return subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def site(self, name: str, proposal: Proposal) -> dict[str, Any]:
        """The rounds that a site charged, and how many prompts it has."""
        state = self.kits[name] / "state"
        ledger = json.loads((state / "ledger" / f"{proposal.fingerprint}.json").read_text())
        (prompt,) = (state / "experiments" / proposal.fingerprint / "prompts").iterdir()
        return {"rounds": ledger["rounds"], "client": SavedPrompt.load(prompt).client}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Iterator[Trial]:
    folder = tmp_path_factory.mktemp("flare")
    project = {
        "name": "trial",
        "server": {"host": "127.0.0.1", "port": free_port(), "store": str(folder / "store")},
        "sites": [{"name": name, "organization": f"{name}_org"} for name in (*NAMES, "south")],
        "admins": [{"name": LEAD, "organization": "coordinator"}],
    }
    (folder / "project.toml").write_text(tomli_w.dumps(project))
    kits = {kit.name: kit for kit in provision(load_project(folder / "project.toml"), folder / "out")}
    for number, name in enumerate(NAMES):
        write_pictures(kits[name] / "local" / "pictures", number, 5 + number)
        write_site(kits[name] / "local", name, clip_folder, state="../state")
    checkpoints = {"clip": str(clip_folder)}
    coordinator = {"runs": "../runs", "device": "cpu", "checkpoints": checkpoints}
    (kits["server"] / "local" / "coordinator.toml").write_text(tomli_w.dumps(coordinator))
    (kits[LEAD] / "local" / "sordino.json").write_text(json.dumps({"sites": list(NAMES)}))  # south stays away
    # A server whose operator lets code through: the sites must not need its help.
    authorization = kits["server"] / "local" / "authorization.json"
    permissions = json.loads(authorization.read_text())
    permissions["permissions"]["lead"]["byoc"] = "any"
    authorization.write_text(json.dumps(permissions))
    parties: dict[str, Party] = {}
    try:
        parties["server"] = Party(kits["server"])
        for name in NAMES:
            parties[name] = Party(kits[name])
        for name in NAMES:
            until(f"{name} registered", lambda name=name: parties["server"].says(f"client {name} registered"))
        yield Trial(folder, kits, parties, clip_folder)
    finally:
        for party in parties.values():
            party.end()


def finished(process: subprocess.Popen[str], seconds: float = 300) -> tuple[dict[str, Any], str]:
    """The one JSON object that a run printed, and what it told; the process is ended whatever happens."""
    try:
        printed, told = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, told
    return json.loads(printed), told


def test_noise_at_three_sites_for_three_rounds(trial: Trial) -> None:
    file, config = trial.config("first")
    out = trial.folder / "first"
    outcome, told = finished(trial.start(file, out))
    proposal = Proposal.of(config)
    assert (outcome["experiment"], outcome["rounds"]) == (proposal.fingerprint, 3)
    assert outcome["sites"] == {name: [number] for number, name in enumerate(NAMES)}
    assert outcome["privacy"]["private"]
    assert "round 3: " in told
    assert len((out / METRICS).read_text().splitlines()) == 3
    assert {LEDGER, AGREEMENT, "checkpoint", "config.toml"} <= {path.name for path in out.iterdir()}
    for number, name in enumerate(NAMES):
        assert trial.site(name, proposal) == {"rounds": [1, 2, 3], "client": number}


def test_without_noise_it_has_the_bits_of_sites_in_one_process(trial: Trial) -> None:
    file = trial.folder / "plain.toml"
    config = experiment(trial.clip, "promptfl")
    file.write_text(tomli_w.dumps(config.model_dump(exclude_none=True, exclude={"methods"})))
    run = trial.start(file, trial.folder / "plain")
    try:
        files = {}
        for number, name in enumerate(NAMES):
            write_pictures(trial.folder / "here" / name / "pictures", number, 5 + number)
            files[name] = write_site(trial.folder / "here" / name, name, trial.clip)
        here = coordinate(
            config, Proposal.of(config), fleet(sites_at(files)), trial.folder / "here" / "out", Patience()
        )
    finally:
        finished(run)
    there = checkpoint.load_server(trial.folder / "plain" / "checkpoint", here.training)
    assert there is not None
    assert there.round == here.training.round == 3
    for name, tensor in named_tensors(here.training.state).items():
        assert tensor.equal(named_tensors(there.state)[name]), name


def test_a_site_whose_process_is_killed_is_asked_again_by_the_next_job(trial: Trial) -> None:
    """FLARE fails the whole job. The run goes on from its last round, and no round is charged or drawn twice."""
    file, config = trial.config("killed", rounds=30)
    proposal, out = Proposal.of(config), trial.folder / "killed"
    lines = trial.kits["server"] / "runs" / proposal.fingerprint / METRICS
    run = trial.start(file, out)
    try:
        until("the first round is over", lambda: lines.exists() and lines.read_text().count("\n") >= 1)
        killed = trial.parties["north"].job_process()
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
    finally:
        outcome, told = finished(run)
    assert "try 1 of 5" in told
    assert outcome["rounds"] == 30
    rounds = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [line["round"] for line in rounds] == list(range(1, 31)), "none is run twice, none left out"
    whole = [number for number, line in enumerate(rounds, 1) if line["participants"] == 3]
    assert len(whole) >= 28
    assert trial.site("east", proposal)["rounds"] == trial.site("west", proposal)["rounds"] == list(range(1, 31))
    assert set(whole) <= set(trial.site("north", proposal)["rounds"])


def test_a_server_that_was_killed_goes_on_when_it_is_started_again(trial: Trial) -> None:
    """FLARE has no resume, and says for ever that the job runs. It is aborted, and another goes on."""
    file, config = trial.config("restarted", rounds=30, seed=3)
    proposal, out = Proposal.of(config), trial.folder / "restarted"
    lines = trial.kits["server"] / "runs" / proposal.fingerprint / METRICS
    run = trial.start(file, out)
    try:
        until("the first round is over", lambda: lines.exists() and lines.read_text().count("\n") >= 1)
        trial.parties["server"].end()
        before = lines.read_text()
        assert before.count("\n") < 30
        trial.parties["server"] = Party(trial.kits["server"])
    finally:
        outcome, told = finished(run)
    assert "a server that lost it" in told
    assert outcome["rounds"] == 30
    assert (out / METRICS).read_text().startswith(before)
    assert [json.loads(line)["round"] for line in (out / METRICS).read_text().splitlines()] == list(range(1, 31))
    for name in NAMES:
        assert trial.site(name, proposal)["rounds"] == list(range(1, 31)), "each charged once"


def test_a_certificate_under_another_sites_name_is_refused(trial: Trial) -> None:
    thief = trial.folder / "thief" / "south"
    shutil.copytree(trial.kits["south"], thief)
    for file in ("client.crt", "client.key"):
        shutil.copyfile(trial.kits["east"] / "startup" / file, thief / "startup" / file)
    party = Party(thief)
    try:
        refused = "authenticated as 'east' but claimed endpoint 'south'"
        until("the server refuses", lambda: trial.parties["server"].says(refused), 60)
        assert not trial.parties["server"].says("client south registered")
    finally:
        party.end()


def test_code_in_a_job_is_refused_at_every_site(trial: Trial) -> None:
    _, config = trial.config("code", seed=9)
    job = write_job(trial.folder / "code", Proposal.of(config), Patience(0.3), 1)
    marker = trial.folder / "ran"
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "code_of_mine.py").write_text(
        f"import pathlib\nfrom sordino.flare.executor import SiteExecutor\npathlib.Path({str(marker)!r}).touch()\n"
    )
    client = job / "app" / "config" / "config_fed_client.json"
    client.write_text(client.read_text().replace("sordino.flare.executor.", "code_of_mine."))
    command = [sys.executable, str(Path(__file__).with_name("submit_job.py")), str(trial.kits[LEAD]), str(job)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=180)
    told = json.loads(done.stdout)
    assert set(NAMES) <= set(told["sites"])
    refused = {line.partition(":")[0] for line in told["refused"] if "BYOC not permitted" in line}
    assert refused == set(NAMES), "the server let it through, and no site did"
    assert not marker.exists()
