"""What the conformance suite needs of an engine: a server and three sites in real processes on the loopback."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol

from sordino.sites.proposal import Proposal


class Engine(Protocol):
    """A server and the sites `sites.owners.NAMES`, started with TLS and authentication; each test runs experiments.

    Processes of the sites have `FAULTY` of `engines.processes` as the first folder of their PYTHONPATH, and `faults` in
    their environment as SORDINO_TEST_FAULTS; without a file in there they are sites like others.

    Attributes:
        folder: an empty folder for the tests' files.
        clip: the encoder's folder; None: the bundled encoder.
        homes: site to the folder of its `site.toml`, with its pictures in `pictures`.
        states: site to its state folder.
        faults: the folder in which a test says which faults sites have.
        rejoined: what the command tells when it found that a site is back; empty where it does not look for that,
            as the run that goes on asks the site again.
    """

    folder: Path
    clip: Path | None
    homes: Mapping[str, Path]
    states: Mapping[str, Path]
    faults: Path
    rejoined: str

    def run(self, config: Path, out: Path, told: IO[str] | int, *overrides: str) -> subprocess.Popen[str]:
        """Start the command that runs an experiment to its end; it prints one JSON object, and its stderr is `told`."""
        ...

    def lines(self, proposal: Proposal, out: Path) -> Path:
        """Return the coordinator's metrics.jsonl, which grows as the rounds go."""
        ...

    def server_files(self) -> list[Path]:
        """Return all that the server's processes wrote: runs, logs, jobs."""
        ...

    def kill_site(self, name: str) -> None:
        """Kill a site with all of its processes, at once (SIGKILL)."""
        ...

    def start_site(self, name: str) -> None:
        """Start a site that was killed, and wait until the server knows it."""
        ...

    def kill_server(self) -> None:
        """Kill the server with all of its processes, at once (SIGKILL)."""
        ...

    def start_server(self) -> None:
        """Start the server again."""
        ...
