"""Experiments as commands: their files, their ends, and what they leave at the coordinator and the sites."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import tomli_w
import torch

from engines.engine import Engine
from engines.faulty.site_faults import PACE
from sites.owners import NOISE, experiment
from sordino.experiments.config import Experiment, load_config
from sordino.files import replace_file
from sordino.sites.coordinator import METRICS
from sordino.sites.proposal import Proposal

FAULTY = Path(__file__).with_name("faulty")
SECONDS = 1.0  # of a round that is paced
HELD = 1000.0  # seconds of a round that waits for the test


@dataclass
class Trial:
    """One experiment over an engine.

    Attributes:
        engine: what runs it.
        name: of its files.
        config: of it.
        file: with the configuration.
    """

    engine: Engine
    name: str
    config: Experiment
    file: Path

    @classmethod
    def of(cls, engine: Engine, name: str, algorithm: str = "dp-fpl", **tables: Any) -> Trial:
        """An experiment; with noise where nothing else is said."""
        file = engine.folder / f"{name}.toml"
        config = experiment(engine.clip, algorithm, **{"privacy": NOISE} | tables)
        file.write_text(tomli_w.dumps(config.model_dump(exclude_none=True, exclude={"methods"})))
        return cls(engine, name, load_config(file), file)

    @property
    def proposal(self) -> Proposal:
        return Proposal.of(self.config)

    @property
    def out(self) -> Path:
        return self.engine.folder / "runs" / self.name

    def start(self, quorum: float = 0.6, deadline: float = 120.0, grace: float = 20.0, *more: str) -> Running:
        """Start the command that runs it."""
        patience = [f"fleet.quorum={quorum}", f"fleet.deadline={deadline}", f"fleet.grace={grace}"]
        told = self.engine.folder / f"{self.name}.told"
        with told.open("w") as stderr:
            return Running(self.engine.run(self.file, self.out, stderr, *patience, *more), told)

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of its rounds so far, as the coordinator wrote them."""
        file = self.engine.lines(self.proposal, self.out)
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def back(self, site: str) -> bool:
        """Tell whether a site was lost in a round, and is in the last one."""
        lost = [site in line.get("lost", {}) for line in self.rounds()]
        return any(lost) and not lost[-1]

    def written(self) -> list[dict[str, Any]]:
        """The lines of its rounds in its run directory, at the end."""
        return [json.loads(line) for line in (self.out / METRICS).read_text().splitlines()]

    def charged(self, site: str) -> list[int]:
        """The rounds in a site's own ledger."""
        file = self.engine.states[site] / "ledger" / f"{self.proposal.fingerprint}.json"
        ledger = json.loads(file.read_text())
        steps = {release["steps"] for release in ledger["ledger"]["releases"]}
        assert steps == {len(ledger["rounds"])}, "each is charged once"
        return list(ledger["rounds"])

    def prompts(self, states: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of the prompts that sites kept."""
        found = {}
        for site, state in states.items():
            (prompt,) = (state / "experiments" / self.proposal.fingerprint / "prompts").iterdir()
            found[site] = safetensors.torch.load(prompt.read_bytes())
        return found


@dataclass
class Running:
    """The command of an experiment, while it runs.

    Attributes:
        process: its process.
        file: with what it told on stderr.
    """

    process: subprocess.Popen[str]
    file: Path

    def told(self) -> str:
        return self.file.read_text(errors="replace")

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, seconds: float = 300) -> tuple[dict[str, Any], str]:
        """Wait for its end; the one JSON object that it printed, and what it told."""
        printed, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 0, self.told()
        return json.loads(printed), self.told()


@contextmanager
def paced(engine: Engine, site: str) -> Iterator[Callable[[float], None]]:
    """Have a site answer each round after `SECONDS` or more, and give what changes these.

    So a round waits for what a test waits for, on a fast machine too, and no experiment needs rounds to fill time.
    """
    file = engine.faults / f"{site}.json"

    def pace(seconds: float) -> None:
        replace_file(file, json.dumps({PACE: seconds}).encode())  # at once: the site may be reading it

    pace(SECONDS)
    try:
        yield pace
    finally:
        file.unlink()
