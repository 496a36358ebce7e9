"""The server's end inside Flower: a run that coordinates one experiment over the connected nodes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sordino.errors import RunError, SordinoError
from sordino.experiments.run_lock import wait_until_free
from sordino.files import FREE_SPACE, make_private, write_atomically
from sordino.flower.fleet import FlowerFleet, Grid, Stopped
from sordino.flower.names import CONFIG, FINGERPRINT, LINES, PATIENCE, PROCESS, PROJECT_VARIABLE, PROPOSAL
from sordino.flower.project import ServerProject
from sordino.runtime.fleet import Patience
from sordino.sites.coordinator import coordinate
from sordino.sites.fleet_config import load_fleet_config
from sordino.sites.proposal import Proposal
from sordino.sites.server_settings import COORDINATOR_FILE, CoordinatorSettings, load_coordinator
from sordino.sites.submission import FAILED

LOCK_SECONDS = 120.0  # an earlier run's process may outlive the server that started it for a while


def run(grid: Grid, run_number: int, run_config: Mapping[str, Any]) -> None:
    """Run an experiment to its end, or from where an earlier run of it ended.

    Which keys are whose, where runs are kept and where encoders are, the server's own files say; a variable of the
    environment that `sordino flower up` sets says where these are.

    Args:
        grid: Flower's.
        run_number: of Flower's run.
        run_config: of the run; see `names`.

    Raises:
        SordinoError: the experiment failed; its run directory holds the reason.
    """
    project = server_project()
    proposal, patience = asked_for(run_config)
    settings = coordinator_settings(project)
    out = settings.folder(proposal)
    make_private(out)
    wait_until_free(out, LOCK_SECONDS)
    (out / FAILED).unlink(missing_ok=True)
    write_atomically(out / LINES, b"", FREE_SPACE)
    write_atomically(out / PROCESS, json.dumps({"run": run_number, "process": os.getpid()}).encode(), FREE_SPACE)

    def watch(line: dict[str, Any]) -> None:
        with (out / LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    try:
        coordinate(settings.config(proposal), proposal, FlowerFleet(grid, project.sites), out, patience, watch)
    except Stopped:
        raise
    except SordinoError as error:
        (out / FAILED).write_text(f"{error}\n", encoding="utf-8")
        raise


def coordinator_settings(project: ServerProject) -> CoordinatorSettings:
    """Return where runs and encoders are: `coordinator.toml` beside the project's file says it.

    Raises:
        ConfigError: that file is malformed, or a key or value is not allowed.
    """
    return load_coordinator(project.file.parent / COORDINATOR_FILE, "runs")


def server_project() -> ServerProject:
    """Return the project of this server.

    Raises:
        RunError: the server was started otherwise than with `sordino flower up`.
    """
    file = os.environ.get(PROJECT_VARIABLE)
    if not file:
        raise RunError(f"{PROJECT_VARIABLE} is not set; start the server with 'sordino flower up'")
    return ServerProject(Path(file))


def asked_for(run_config: Mapping[str, Any]) -> tuple[Proposal, Patience]:
    """Read what a run is of: a proposal, or a file at the server.

    Raises:
        SordinoError: it is malformed.
    """
    if file := run_config.get(CONFIG):
        chosen = load_fleet_config(Path(str(file)))
        return chosen.proposal(), chosen.patience
    try:
        proposal = Proposal.read(json.loads(str(run_config[PROPOSAL])))
        patience = Patience(**json.loads(str(run_config[PATIENCE])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"the run's proposal cannot be read ({error})"
        raise RunError(f"{reason}; use 'sordino flower run', or give config = 'FILE at the server'") from None
    if proposal.fingerprint != run_config.get(FINGERPRINT):
        raise RunError(f"the run holds experiment {proposal.fingerprint[:12]}, and names another")
    return proposal, patience


def run_config_of(proposal: Proposal, patience: Patience) -> dict[str, str]:
    """Return the configuration of a run for an experiment."""
    return {
        PROPOSAL: json.dumps(proposal.facts),
        FINGERPRINT: proposal.fingerprint,
        PATIENCE: json.dumps(asdict(patience)),
    }
