"""Commands that run in the tests' own process: a new one takes seconds to import what they need."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from sordino.cli.app import app


def here(folder: Path, *words: str) -> Result:
    """Run a command of `sordino` in a folder."""
    with chdir(folder):
        return CliRunner().invoke(app, words)
