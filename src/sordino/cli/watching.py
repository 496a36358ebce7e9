"""What the terminal shows of an experiment across machines: rounds as they come, and how it ended."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sordino.cli.site_words import round_as_text
from sordino.cli.terminal import live_progress
from sordino.experiments.tracking import Heard, TrackingSettings, tracked
from sordino.sites.coordinator import OUTCOME


@contextmanager
def watching(tracking: TrackingSettings | None, out: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that takes a round's line: it prints it, and sends it on as `[tracking]` says.

    Args:
        tracking: None sends nothing.
        out: the run directory, whose path names the run.

    Raises:
        ConfigError: the tracker cannot be reached.
    """
    heard = Heard()

    def watch(line: dict[str, Any]) -> None:
        print(round_as_text(line), file=sys.stderr, flush=True)
        heard.add(line)

    with live_progress(), tracked(tracking, out, heard):
        yield watch


def print_outcome(out: Path, as_json: bool) -> None:
    """Print how an experiment across machines ended."""
    outcome: dict[str, Any] = json.loads((out / OUTCOME).read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(outcome))
    else:
        print(f"{outcome['rounds']} rounds at {', '.join(outcome['sites'])}")
        print(outcome["privacy"]["statement"])
        print(f"Run directory: {out}")
