"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="the experiment")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. settings.dp-fpl.rank=4")
]
OutFolder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="where to write; default: a new runs/...")]
Resume = Annotated[bool, typer.Option("--resume", help="go on where DIR was interrupted")]
AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON object on standard output, and nothing else there")
]
