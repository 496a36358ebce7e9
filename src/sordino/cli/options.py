"""Arguments and options that several commands share, and the experiment and the run directory that they name."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sordino.cli.console import in_run_folder, say
from sordino.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sordino.experiments.config import Experiment
    from sordino.experiments.started import Kind

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="the experiment")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. settings.dp-fpl.rank=4")
]
OutFolder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="where to write; default: a new runs/...")]
MethodFile = Annotated[
    Path | None, typer.Option("--method", metavar="FILE.py", help="a method in a file, which is executed")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on where DIR was interrupted")]
SigningKey = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="signs the experiment, for sites that name its public key")
]
Jobs = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="runs at once, each with its share of the cores; seconds are then longer"),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON object on standard output, and nothing else there")
]


def chosen_experiment(config: Path, overrides: list[str], resume: bool = False) -> Experiment:
    """The configuration, refused before torch is imported where it is wrong or names what is not there."""
    from sordino.experiments.config import check_places

    experiment = loaded_experiment(config, overrides)
    if not resume:  # a finished run needs no data any more
        check_places(experiment)
    return experiment


def loaded_experiment(config: Path, overrides: Sequence[str]) -> Experiment:
    """The configuration, refused where an override is of a checkpoint that its encoder does not read."""
    from sordino.experiments.config import WITH_CHECKPOINT, load_config

    experiment = load_config(config, overrides)
    name, checkpoint = experiment.encoder.name, experiment.encoder.checkpoint
    overridden = {override.partition("=")[0].strip() for override in overrides}
    if checkpoint and name not in WITH_CHECKPOINT and "encoder.checkpoint" in overridden:
        remedy = f"encoder.name = {name!r} has none; set it to {' or '.join(WITH_CHECKPOINT)}, or leave this out"
        raise ConfigError("encoder.checkpoint", checkpoint, remedy)
    return experiment


def chosen_folder(out: Path | None, resume: bool, label: str, kind: Kind) -> Path:
    """The run directory: the one asked for, or a new one under runs/; it is named on standard error.

    Args:
        out: the one asked for.
        resume: go on in it. Where there is nothing to go on with, a line says that all starts anew.
        label: of a new one's name.
        kind: of the command.

    Raises:
        RunError: it holds something else than what the command goes on with.
    """
    if out is None and resume:
        raise ConfigError("--resume", True, "say which run with --out DIR")
    from sordino.experiments.run_lock import require_unused
    from sordino.experiments.started import was_begun

    folder = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{label}" if out is None else out
    if not resume:
        require_unused(folder)
    elif not was_begun(folder, kind):
        say(f"Nothing was started in {folder} before, so there is nothing to go on with: this starts anew", sys.stderr)
    in_run_folder(folder)
    return folder
