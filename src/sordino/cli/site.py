"""The command line of a site's owner: `sordino site init`, `check`, `ledger`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from sordino.cli.console import say
from sordino.cli.options import AsJson, Overrides
from sordino.errors import ConfigError

app = typer.Typer(help="What a site holds and allows in experiments across machines.", no_args_is_help=True)

SiteFile = Annotated[Path, typer.Argument(metavar="SITE.toml", help="the site's own file")]


@app.command("init")
def init(
    file: SiteFile,
    name: Annotated[str, typer.Option(help="the site's name, as its certificate or key says it")],
    source: Annotated[str, typer.Option(help="its pictures, as data.source in a configuration")],
    epsilon: Annotated[float, typer.Option(min=1e-9, help="the most that all experiments together may spend")] = 8.0,
    delta: Annotated[float, typer.Option(help="at which epsilon is counted")] = 1e-5,
    unit: Annotated[str, typer.Option(help="what is protected: example, person or client")] = "example",
) -> None:
    """Write a new site's file, which allows nothing yet."""
    from sordino.sites.check import write_template
    from sordino.sites.settings import load_site

    write_template(file, name, source, epsilon, delta, unit)
    try:
        load_site(file)
    except ConfigError:
        file.unlink()
        raise
    print(f"{file}: allow experiments under [policy], and look at it with: sordino site check {shlex.quote(str(file))}")


@app.command("check")
def check(
    file: SiteFile,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="an experiment to take part in")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what a site's file means, and whether the site takes part in an experiment, at what epsilon."""
    if overrides and config is None:
        remedy = "goes with an experiment's file, whose keys it overrides; give CONFIG.toml too, or leave it out"
        raise ConfigError("--set", overrides[0], remedy)
    from sordino.cli.site_words import facts_as_text, verdict_as_text
    from sordino.sites.check import facts_of, verdict
    from sordino.sites.fleet_config import load_fleet_config
    from sordino.sites.settings import load_site

    settings = load_site(file)
    told = facts_of(settings)
    answer = None
    if config is not None:
        fleet = load_fleet_config(config, overrides or [])
        answer = verdict(settings, fleet.proposal())
    if as_json:
        print(json.dumps(told | ({} if answer is None else {"verdict": answer})))
    else:
        say(facts_as_text(told) + ("" if answer is None else "\n" + verdict_as_text(answer, told)))
    if answer is not None and not answer["allowed"]:
        raise typer.Exit(1)


@app.command("ledger")
def ledger(file: SiteFile, as_json: AsJson = False) -> None:
    """Say what the site's data released in each experiment, and what that comes to together."""
    from sordino.cli.site_words import ledger_as_text
    from sordino.sites.check import ledger_of
    from sordino.sites.settings import load_site

    told = ledger_of(load_site(file))
    print(json.dumps(told) if as_json else ledger_as_text(told))
