"""The command line of the FLARE engine: its kits, and `sordino flare run`."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Annotated

import typer

from sordino.cli.console import at_work
from sordino.cli.options import AsJson, ConfigFile, Overrides, SigningKey
from sordino.errors import require_extra

app = typer.Typer(help="Experiments across machines of several owners, over NVIDIA FLARE.", no_args_is_help=True)


@app.command("provision")
def provision(
    project: Annotated[Path, typer.Argument(metavar="PROJECT.toml", help="server, sites and administrators")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the folder to make, with one startup kit a party")],
) -> None:
    """Make startup kits for all parties with their keys, for trials; where owners differ, use request, approve, kit."""
    require_extra("flare", "'sordino flare'")
    from sordino.flare.project import load_project

    settings = load_project(project)
    from sordino.flare.provision import provision as make_kits

    for folder in make_kits(settings, out):
        print(folder)


@app.command("request")
def request(
    name: Annotated[str, typer.Argument(help="as in the project's file; 'server' for the server")],
    organization: Annotated[str, typer.Option(metavar="NAME", help="as in the project's file")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="a new folder, which keeps the private key")],
    role: Annotated[
        str | None, typer.Option(help="of an administrator: lead (the default), org_admin or member")
    ] = None,
) -> None:
    """Make a private key, which stays here, and a request for a certificate to send to the project's owner."""
    require_extra("flare", "'sordino flare'")
    from sordino.flare.project import check_name, kind_of

    kind = kind_of(name, role)
    check_name(name, organization, kind)
    from sordino.flare.certificates import request as make_request

    file, key = make_request(name, organization, kind, out)
    print(f"Send to the project's owner: {file}")
    print(f"Key: {key}")


@app.command("approve")
def approve(
    project: Annotated[Path, typer.Argument(metavar="PROJECT.toml", help="server, sites and administrators")],
    requests: Annotated[list[Path], typer.Argument(metavar="REQUEST...", help="files of 'sordino flare request'")],
    ca: Annotated[Path, typer.Option(metavar="DIR", help="keeps the project's own key, which is made at first")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="where to write what is sent back")],
) -> None:
    """Sign requests of parties that the project names; before that, have each owner tell you the key's fingerprint."""
    require_extra("flare", "'sordino flare'")
    from sordino.flare.project import load_project

    settings = load_project(project)
    from sordino.flare.certificates import approve as sign
    from sordino.flare.certificates import fingerprint_of_authority

    for file in requests:
        made, key = sign(settings, file, ca, out)
        print(f"Send back: {made}")
        print(f"Key: {key}")
    print(f"Fingerprint of the project: {fingerprint_of_authority(settings, ca)}")


@app.command("kit")
def kit(
    approval: Annotated[Path, typer.Argument(metavar="APPROVED.json", help="what the project's owner sent back")],
    request: Annotated[Path, typer.Option(metavar="DIR", help="the folder of 'sordino flare request'")],
    fingerprint: Annotated[str, typer.Option(metavar="HEX", help="of the project, as its owner told you")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the folder to make")],
) -> None:
    """Put a startup kit together, where its private key is."""
    require_extra("flare", "'sordino flare'")
    from sordino.flare.certificates import make_kit

    print(make_kit(approval, request, fingerprint, out))


@app.command("run")
def run(
    config: ConfigFile,
    kit: Annotated[Path, typer.Option(metavar="DIR", help="the startup kit of an administrator who is a lead")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="where to copy the run directory at the end")],
    overrides: Overrides = None,
    tries: Annotated[int, typer.Option(min=1, help="the most jobs that are submitted")] = 5,
    key: SigningKey = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment at the sites of a FLARE server, and go on by itself where a job fails or the server dies."""
    require_extra("flare", "'sordino flare'")
    from sordino.cli.watching import print_outcome, proposed, watching
    from sordino.flare.administrator import Administrator
    from sordino.flare.job import write_job
    from sordino.sites.submission import Submission

    chosen, proposal = proposed(config, overrides, key)
    logging.getLogger("nvflare").setLevel(logging.CRITICAL)  # it tells every try to connect
    again = f"sordino flare run {shlex.quote(str(config))} --kit {shlex.quote(str(kit))} --out {shlex.quote(str(out))}"
    at_work(f"the job goes on at the server; to watch it again, repeat {again}")
    with Administrator(kit) as server, watching(chosen.experiment.tracking, out) as watch:
        Submission(server, proposal, chosen.patience, write_job, tries, watch, rejoining=server).run(out)
    print_outcome(out, as_json)
