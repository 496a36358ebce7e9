"""A FLARE server and its sites, as the suite over all engines and FLARE's own tests start them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import tomli_w

from flare.parties import Party, environment, until
from ports import free_port
from sites.owners import NAMES, write_pictures, write_site
from sordino.flare.certificates import approve, fingerprint_of_authority, make_kit, request
from sordino.flare.project import Project, load_project
from sordino.flare.provision import provision
from sordino.sites.coordinator import METRICS
from sordino.sites.proposal import Proposal

LEAD = "lead@example.org"
FAULTY = Path(__file__).with_name("faulty")


@dataclass
class FlareEngine:
    """What is running; see `engines.engine.Engine`.

    Attributes:
        kits: by name; nobody has started that of `south`.
        parties: by name.
        rejoined: what the command says of a site that is back.
        hostile: whether server and sites can be told to send each other everything; see `faulty.hostile`.
    """

    folder: Path
    clip: Path | None
    kits: dict[str, Path]
    parties: dict[str, Party]
    rejoined: str = "is back; another job goes on with it"
    hostile: bool = False

    @property
    def homes(self) -> dict[str, Path]:
        return {name: self.kits[name] / "local" for name in NAMES}

    @property
    def states(self) -> dict[str, Path]:
        return {name: self.kits[name] / "state" for name in NAMES}

    @property
    def faults(self) -> Path:
        return self.folder / "faults"

    def run(self, config: Path, out: Path, told: IO[str] | int, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sordino", "flare", "run", str(config), "--kit", str(self.kits[LEAD])]
        command += ["--out", str(out), "--json", *(part for each in overrides for part in ("--set", each))]
        pipe, own = subprocess.PIPE, environment()
        return subprocess.Popen(command, env=own, stdout=pipe, stderr=told, text=True, start_new_session=True)

    def lines(self, proposal: Proposal, out: Path) -> Path:
        return self.kits["server"] / "runs" / proposal.fingerprint / METRICS

    def server_files(self) -> list[Path]:
        folders = [self.kits["server"], self.folder / "store"]
        return [self.parties["server"].log, *(file for folder in folders for file in folder.rglob("*"))]

    def kill_site(self, name: str) -> None:
        self.parties.pop(name).end()

    def start_site(self, name: str) -> None:
        log = self.parties["server"].log
        before = log.read_text(errors="replace").count(self._registered(name))
        self.parties[name] = self.site(self.kits[name])
        until(f"{name} is registered", lambda: log.read_text(errors="replace").count(self._registered(name)) > before)

    def site(self, kit: Path) -> Party:
        """Start a site from a kit."""
        own = {"SORDINO_TEST_FAULTS": str(self.faults), "SORDINO_CACHE": str(self.folder / "cache")}
        return Party(kit, PYTHONPATH=str(FAULTY), **own, **self._hostile())

    def kill_server(self) -> None:
        self.parties.pop("server").end()

    def start_server(self) -> None:
        self.parties["server"] = Party(self.kits["server"], PYTHONPATH=str(FAULTY), **self._hostile())

    def _hostile(self) -> dict[str, str]:
        return {"SORDINO_TEST_HOSTILE": str(self.faults)} if self.hostile else {}

    @staticmethod
    def _registered(name: str) -> str:
        return f"client {name} registered"


def made_kits(project: Project, folder: Path) -> dict[str, Path]:
    """The kits of a project by name: made in one place, but for that of `west`, whose key is made at its site."""
    others = project.model_copy(update={"sites": [site for site in project.sites if site.name != "west"]})
    kits = {kit.name: kit for kit in provision(others, folder / "out")}
    authority = folder / "out" / project.name / "state"
    file, _ = request("west", "west_org", "client", folder / "west's key")
    approval, _ = approve(project, file, authority, folder / "approved")
    fingerprint = fingerprint_of_authority(project, authority)
    return kits | {"west": make_kit(approval, file.parent, fingerprint, folder / "site" / "west")}


@contextmanager
def flare(folder: Path, clip: Path | None = None, hostile: bool = False) -> Iterator[FlareEngine]:
    """Make a project, start its server and sites, and end all their processes.

    Every job starts four processes. With the bundled encoder they do not import transformers, which takes longer than
    the job's rounds; Flower's processes stay, and have a CLIP folder.
    """
    project = {
        "name": "trial",
        "server": {"host": "127.0.0.1", "port": free_port(), "store": str(folder / "store")},
        "sites": [{"name": name, "organization": f"{name}_org"} for name in (*NAMES, "south")],
        "admins": [{"name": LEAD, "organization": "coordinator"}],
    }
    (folder / "project.toml").write_text(tomli_w.dumps(project))
    kits = made_kits(load_project(folder / "project.toml"), folder)
    for number, name in enumerate(NAMES):
        write_pictures(kits[name] / "local" / "pictures", number, 5 + number)
        write_site(kits[name] / "local", name, clip, state="../state")
    coordinator = {"runs": "../runs", "device": "cpu", "checkpoints": {"clip": str(clip)} if clip else {}}
    (kits["server"] / "local" / "coordinator.toml").write_text(tomli_w.dumps(coordinator))
    (kits[LEAD] / "local" / "sordino.json").write_text(json.dumps({"sites": list(NAMES)}))  # south stays away
    # A server whose operator lets code through: the sites must not need its help.
    authorization = kits["server"] / "local" / "authorization.json"
    permissions = json.loads(authorization.read_text())
    permissions["permissions"]["lead"]["byoc"] = "any"
    authorization.write_text(json.dumps(permissions))
    engine = FlareEngine(folder, clip, kits, {}, hostile=hostile)
    engine.faults.mkdir()
    try:
        engine.start_server()
        for name in NAMES:
            engine.parties[name] = engine.site(kits[name])
        for name in NAMES:
            registered = engine._registered(name)
            until(f"{name} is registered", lambda text=registered: engine.parties["server"].says(text))
        yield engine
    finally:
        for party in engine.parties.values():
            party.end()
