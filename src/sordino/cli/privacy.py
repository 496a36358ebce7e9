"""The command line of privacy: `sordino privacy plan`, `ledger`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sordino.cli.options import AsJson, ConfigFile, Overrides

app = typer.Typer(help="What a run costs in privacy: before it, and after it.", no_args_is_help=True)


@app.command("plan")
def privacy_plan(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="also a page with a plot")] = None,
    as_json: AsJson = False,
) -> None:
    """Say who will learn what, who adds the noise, and epsilon by round; nothing is trained."""
    from sordino.experiments.config import load_config

    experiment = load_config(config, overrides or [])
    from sordino.experiments.plan_page import write_page
    from sordino.experiments.privacy_plan import as_text, plan

    chosen = plan(experiment)
    if out is not None:
        write_page(chosen, out)
    print(json.dumps(chosen.as_dict()) if as_json else as_text(chosen))
    if out is not None and not as_json:
        print(f"Page: {out}")


@app.command("ledger")
def privacy_ledger(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories; several are composed")],
    delta: Annotated[float | None, typer.Option(help="at which to state epsilon; default: the run's")] = None,
    as_json: AsJson = False,
) -> None:
    """Read what was released, and what that comes to; of several runs on the same data, together."""
    from sordino.privacy.statement import as_text, read_ledgers, spending

    ledger = read_ledgers(folders, delta)
    print(json.dumps(spending(ledger)) if as_json else as_text(ledger))
