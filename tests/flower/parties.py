"""A server and sites over Flower in processes of their own, which end with all that they started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import tomli_w

from engines.processes import FAULTY
from flare.parties import end_all, environment, until
from ports import free_port
from sites.owners import NAMES, write_pictures, write_site
from sordino.flower.keys import make_key
from sordino.sites.proposal import Proposal

MARK = "SORDINO_TEST_PARTY"  # in the environment of a party's processes: Flower puts some into sessions of their own

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx") is None and "CI" not in os.environ, reason="needs nginx: apt-get install nginx"
)


class Party:
    """A command that runs on, with all that it starts.

    Args:
        folder: for its log.
        name: of it.
        words: after `sordino`.
        more: variables of its environment.

    Attributes:
        log: what it prints.
    """

    def __init__(self, folder: Path, name: str, *words: str, **more: str) -> None:
        self.log, self._mark = folder / f"{name}.log", f"{folder}/{name}"
        self._before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sordino", *words],
                env=environment(**{MARK: self._mark}, **more),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def says(self, text: str) -> bool:
        """Whether it printed a text since it was started; an end of it fails the test."""
        assert self._process.poll() is None, self.log.read_text(errors="replace")[-2000:]
        return text in self.log.read_bytes()[self._before :].decode(errors="replace")

    def processes(self) -> set[int]:
        """All processes that it started and that live."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"{MARK}={self._mark}\0".encode() in (folder / "environ").read_bytes()
                group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
            except OSError:  # it ended
                continue
            if marked or group == self._process.pid:
                found.add(int(folder.name))
        return found

    def end(self) -> None:
        """End everything that it started, at once."""
        end_all(self._living, self._process)

    def _living(self) -> set[int]:
        """All processes but the first one, once it has ended: it is there until it is waited for."""
        return self.processes() - {self._process.pid if self._process.poll() is not None else 0}


class FlowerEngine:
    """See `engines.engine.Engine`. The server is behind its proxy; keys and certificates are real.

    Args:
        folder: an empty one.
        clip: the encoder's.
    """

    rejoined = ""

    def __init__(self, folder: Path, clip: Path) -> None:
        self.folder, self.clip = folder / "tests", clip
        self.folder.mkdir()
        self.faults = folder / "faults"
        self.faults.mkdir()
        self._home = folder
        self.port, self.loopback = free_port(), free_port()
        self.homes = {name: folder / name for name in NAMES}
        self.states = {name: home / "state" for name, home in self.homes.items()}
        for number, (name, home) in enumerate(self.homes.items()):
            write_pictures(home / "pictures", number, 5 + number)
            write_site(home, name, clip)
            make_key(home / "node")
        server = {"host": "127.0.0.1", "address": "127.0.0.1", "port": self.port, "loopback": self.loopback}
        sites = [{"name": name, "key": f"{name}/node.pub"} for name in NAMES]
        self.project = folder / "project.toml"
        self.project.write_text(tomli_w.dumps({"name": "trial", "server": server, "sites": sites}))
        coordinator = {"runs": "runs", "device": "cpu", "checkpoints": {"clip": str(clip)}}
        (folder / "coordinator.toml").write_text(tomli_w.dumps(coordinator))
        self.ca = folder / "state" / "ca.crt"
        self.server: Party | None = None
        self.sites: dict[str, Party] = {}

    def start(self) -> None:
        """Start all parties."""
        self.start_server()
        for name in NAMES:
            self._start(name)
        for name in NAMES:
            self._await(name)

    def end(self) -> None:
        """End all parties."""
        for party in (*self.sites.values(), *([self.server] if self.server else [])):
            party.end()

    def run(self, config: Path, out: Path, told: IO[str] | int, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sordino", "flower", "run", str(config), "--project", str(self.project)]
        command += ["--out", str(out), "--json"]
        for override in overrides:
            command += ["--set", override]
        return subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            start_new_session=True,
        )

    def lines(self, proposal: Proposal, out: Path) -> Path:
        return self._home / "runs" / proposal.fingerprint / "metrics.jsonl"

    def server_files(self) -> list[Path]:
        assert self.server is not None
        folders = [self._home / "state", self._home / "runs"]
        return [self.server.log, *(file for folder in folders for file in folder.rglob("*"))]

    def kill_site(self, name: str) -> None:
        self.sites[name].end()

    def start_site(self, name: str) -> None:
        self._start(name)
        self._await(name)

    def kill_server(self) -> None:
        assert self.server is not None
        self.server.end()

    def start_server(self) -> None:
        self.server = server = Party(self._home, "server", "flower", "up", str(self.project))
        until("sites may connect", lambda: server.says("Sites connect to"), 240)

    def _start(self, name: str) -> None:
        home = self.homes[name]
        words = ["flower", "node", str(home / "site.toml"), "--server", f"127.0.0.1:{self.port}"]
        words += ["--ca", str(self.ca), "--key", str(home / "node")]
        own = {"SORDINO_TEST_FAULTS": str(self.faults), "SORDINO_CACHE": str(self._home / "cache")}
        self.sites[name] = Party(self._home, name, *words, PYTHONPATH=str(FAULTY), **own)

    def _await(self, name: str) -> None:
        until(f"{name} is connected", lambda: self.sites[name].says(f"{name} is connected"), 240)


@contextmanager
def flower(folder: Path, clip: Path) -> Iterator[FlowerEngine]:
    """Start a server and its sites, and end all their processes."""
    engine = FlowerEngine(folder, clip)
    try:
        engine.start()
        yield engine
    finally:
        engine.end()
