"""The terminal of an experiment across machines, over any engine: its fingerprint, rounds as they come, its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sordino.cli.console import say
from sordino.cli.site_words import round_as_text
from sordino.cli.terminal import live_progress
from sordino.experiments.tracking import Heard, TrackingSettings, require_tracker, tracked
from sordino.privacy.signature import load_private_key
from sordino.sites.coordinator import OUTCOME
from sordino.sites.fleet_config import FleetConfig, load_fleet_config
from sordino.sites.proposal import Proposal


def proposed(config: Path, overrides: Sequence[str] | None, key: Path | None) -> tuple[FleetConfig, Proposal]:
    """Read an experiment across machines, and say its fingerprint, which sites allow it by.

    Args:
        config: the file.
        overrides: of `--set`.
        key: file of the private key that signs it; None: nobody does.

    Raises:
        SordinoError: file, key or overrides are malformed, or the tracker that is asked for is not installed.
    """
    chosen = load_fleet_config(config, overrides or [])
    require_tracker(chosen.experiment.tracking)
    proposal = chosen.proposal(load_private_key(key, "--key") if key else None)
    print(f"Experiment: {proposal.fingerprint}", file=sys.stderr, flush=True)
    return chosen, proposal


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
        say(round_as_text(line), sys.stderr)
        if not line.get("waits"):
            heard.add(line)

    with live_progress(), tracked(tracking, out, heard):
        yield watch


def print_outcome(out: Path, as_json: bool) -> None:
    """Print how an experiment across machines ended."""
    outcome: dict[str, Any] = json.loads((out / OUTCOME).read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(outcome))
    else:
        void = f", {outcome['void_rounds']} of them void," if outcome.get("void_rounds") else ""
        say(f"{outcome['rounds']} rounds{void} at {', '.join(outcome['sites'])}")
        for site, reason in sorted(outcome["left_out"].items()):
            say(f"{site} took no part: {reason}")
        print(outcome["privacy"]["statement"])
        print(f"Run directory: {out}")
