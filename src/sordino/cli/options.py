"""Arguments and options that several commands share, and the run directory that they name."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from sordino.cli.console import in_run_folder
from sordino.errors import ConfigError

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="the experiment")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. settings.dp-fpl.rank=4")
]
OutFolder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="where to write; default: a new runs/...")]
MethodFile = Annotated[
    Path | None, typer.Option("--method", metavar="FILE.py", help="a method in a file, which is executed")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on where DIR was interrupted")]
AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON object on standard output, and nothing else there")
]


def chosen_folder(out: Path | None, resume: bool, label: str) -> Path:
    """The run directory: the one asked for, or a new one under runs/; it is named on standard error."""
    if out is None and resume:
        raise ConfigError("--resume", True, "say which run with --out DIR")
    folder = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{label}" if out is None else out
    in_run_folder(folder)
    return folder
