"""The command line of the FLARE engine: `sordino flare provision` and `sordino flare run`."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sordino.cli.console import at_work
from sordino.cli.options import AsJson, ConfigFile, Overrides
from sordino.cli.terminal import live_progress
from sordino.errors import require_extra

app = typer.Typer(help="Experiments across machines of several owners, over NVIDIA FLARE.", no_args_is_help=True)


@app.command("provision")
def provision(
    project: Annotated[Path, typer.Argument(metavar="PROJECT.toml", help="server, sites and administrators")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the folder to make, with one startup kit a party")],
) -> None:
    """Make startup kits for all parties; hand each its folder, by a way that nobody else reads."""
    require_extra("flare", "'sordino flare'")
    from sordino.flare.project import load_project

    settings = load_project(project)
    from sordino.flare.provision import provision as make_kits

    for folder in make_kits(settings, out):
        print(folder)


@app.command("run")
def run(
    config: ConfigFile,
    kit: Annotated[Path, typer.Option(metavar="DIR", help="the startup kit of an administrator who is a lead")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="where to copy the run directory at the end")],
    overrides: Overrides = None,
    tries: Annotated[int, typer.Option(min=1, help="the most jobs that are submitted")] = 5,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="signs the experiment, for sites that name its public key")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment at the sites of a FLARE server, and go on by itself where a job fails or the server dies."""
    require_extra("flare", "'sordino flare'")
    from sordino.cli.site_words import round_as_text
    from sordino.experiments.tracking import Heard, require_tracker, tracked
    from sordino.flare.administrator import Administrator
    from sordino.flare.submission import Submission
    from sordino.privacy.signature import load_private_key
    from sordino.sites.coordinator import OUTCOME
    from sordino.sites.fleet_config import load_fleet_config

    chosen = load_fleet_config(config, overrides or [])
    tracking = chosen.experiment.tracking
    require_tracker(tracking)
    proposal = chosen.proposal(load_private_key(key, "--key") if key else None)
    logging.getLogger("nvflare").setLevel(logging.CRITICAL)  # it tells every try to connect
    print(f"Experiment: {proposal.fingerprint}", file=sys.stderr, flush=True)
    again = f"sordino flare run {shlex.quote(str(config))} --kit {shlex.quote(str(kit))} --out {shlex.quote(str(out))}"
    at_work(f"the job goes on at the server; to watch it again, repeat {again}")
    heard = Heard()

    def watch(line: dict[str, Any]) -> None:
        print(round_as_text(line), file=sys.stderr, flush=True)
        heard.add(line)

    with Administrator(kit) as server, live_progress(), tracked(tracking, out, heard):
        Submission(server, proposal, chosen.patience, tries, watch).run(out)
    outcome: dict[str, Any] = json.loads((out / OUTCOME).read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(outcome))
    else:
        print(f"{outcome['rounds']} rounds at {', '.join(outcome['sites'])}")
        print(outcome["privacy"]["statement"])
        print(f"Run directory: {out}")
