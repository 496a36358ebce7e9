"""The command `sordino tune-private`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sordino.cli.options import AsJson, ConfigFile, OutFolder, Overrides, Resume, chosen_folder
from sordino.cli.terminal import live_progress
from sordino.errors import ConfigError

if TYPE_CHECKING:
    from sordino.private_tuning.settings import PrivateTuning


def tune_private(
    config: ConfigFile,
    overrides: Overrides = None,
    out: OutFolder = None,
    resume: Resume = False,
    as_json: AsJson = False,
    clear: Annotated[bool, typer.Option("--clear", help="without servers: the tower is here")] = False,
) -> None:
    """Tune a prompt for a private text tower by asking for features only; losses and the prompt stay here."""
    from sordino.private_tuning.settings import check_places, load_private_config

    settings = load_private_config(config, overrides or [])
    if not resume:  # a finished run needs no data any more
        check_places(settings)
    from sordino.experiments.started import TUNING

    folder, table = chosen_folder(out, resume, f"{config.stem}-private", TUNING), ""
    from sordino.private_tuning.tuning import as_text, finished_before
    from sordino.report.private import write_private_report

    summary = finished_before(settings, folder, resume)
    if summary is None:
        summary, table = _tuned(settings, folder, resume, clear)
    write_private_report(folder)
    if as_json:
        print(json.dumps(summary))
        return
    if table:
        print(table)
    print(as_text(summary))
    print(f"Run directory: {folder}\nReport: {folder / 'report.html'}")


def _tuned(settings: PrivateTuning, folder: Path, resume: bool, clear: bool) -> tuple[dict[str, Any], str]:
    """A search for a prompt in the clear or with servers: its summary, and the table of what it cost."""
    from sordino.mpc.errors import PartyLost
    from sordino.mpc.parties.session import connect
    from sordino.mpc.tower.sentences import in_the_clear
    from sordino.private_tuning.open_task import open_task
    from sordino.private_tuning.tuning import owner_of, tower_of, tune_private

    with live_progress() as progress:
        if clear:
            tower, task = tower_of(settings), open_task(settings, progress=progress)
            if tower.width != task.embedder.width:
                why = f"it takes embeddings {tower.width} wide, and the task's are {task.embedder.width} wide"
                remedy = "give model.tower and model.embeddings of one checkpoint; without, both are the bundled one's"
                raise ConfigError("model.tower", settings.model.tower, f"{why}; {remedy}")
            return tune_private(settings, folder, task, in_the_clear(tower), True, None, resume, progress), ""
        identity, servers = owner_of(settings)
        task = open_task(settings, progress=progress)
        try:
            with connect(identity, servers, settings.session.timeout) as session:
                given = (settings, folder, task, session.forward, False, session.costs, resume, progress)
                summary = tune_private(*given, session.model)
                return summary, session.costs.table()
        except PartyLost as error:
            if not (folder / "config.toml").exists():  # which is written once the parties have answered
                raise
            raise PartyLost(f"{error}; with all parties there, go on with --resume --out {folder}") from None
