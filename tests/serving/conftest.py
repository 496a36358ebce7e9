"""Runs to publish, prompts without a run, and databases: a SQLite file, and a PostgreSQL server of the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from ports import free_port
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.privacy.signature import public_bytes
from sordino.serving.manifest import LEDGER, PROMPT, Facts, facts_of
from sordino.serving.trust import Trusted

SHADES = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210), "grey": (90, 90, 90)}
NOT_PRIVATE = "Not private: a test, without noise."


@pytest.fixture(autouse=True)
def own_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's folder of keys."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("SORDINO_CONFIG", str(folder))
    monkeypatch.delenv("SORDINO_REGISTRY", raising=False)
    return folder


@pytest.fixture(scope="session")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(scope="session")
def trusted(key: Ed25519PrivateKey) -> Trusted:
    return Trusted(frozenset({public_bytes(key)}))


def some_facts(**changes: object) -> Facts:
    """Facts of a prompt that nobody trained."""
    privacy = {
        **{"private": False, "simulated": False, "epsilon": None, "delta": None, "unit": None},
        **{"statement": NOT_PRIVATE, "ledger_sha256": None},
    }
    parts: dict[str, object] = {
        **{"method": "promptfl", "task": "images", "client": None, "class_names": ("cat", "dog")},
        **{"encoder": {"name": "bundled", "fingerprint": "ab" * 32}, "privacy": privacy},
        **{"audit": None, "training": None},
    }
    return facts_of(**(parts | changes))


def some_files(size: int = 1000) -> dict[str, bytes]:
    """Files in the place of a prompt's and a ledger's: a registry keeps bytes."""
    return {PROMPT: bytes(range(256)) * (size // 256 + 1), LEDGER: b"{}"}


@dataclass(frozen=True)
class Server:
    """A PostgreSQL server of the tests' own, on the loopback."""

    programs: Path
    folder: Path
    port: int

    def call(self, program: str, *arguments: str) -> None:
        """Run one of its programs, as a user who is not root, which PostgreSQL refuses."""
        command = [str(self.programs / program), *arguments]
        user = pwd.getpwnam("postgres").pw_uid if os.geteuid() == 0 else None
        subprocess.run(command, check=True, user=user, cwd=self.folder, env={"LC_ALL": "C"}, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories={self.folder}"
        log = str(self.folder / "log")
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-w", "-o", options, "-l", log, "start")

    def stop(self, how: str) -> None:
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-m", how, "-w", "stop")

    def url(self, database: str) -> str:
        return f"postgresql://sordino@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"t{uuid4().hex}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A server with fsync on, as it is by default."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="sordino-postgres-"))  # pytest's own folders are closed to other users
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    server = Server(programs[-1], folder, free_port())
    data = str(folder / "data")
    server.call("initdb", "-D", data, "-U", "sordino", "--auth=trust", "--no-sync", "-E", "UTF8", "--no-locale")
    server.start()
    yield server
    server.stop("immediate")
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a registry that is not made yet, in both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/prompts.db"
    server: Server = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Callable[..., Path]:
    """Trains two clients for a round on noisy pictures of one color each; the run directory."""
    pictures = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, color in SHADES.items():
        (pictures / name).mkdir()
        for number in range(8):
            noise = generator.integers(-25, 25, (24, 24, 3))
            picture = Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8))
            picture.save(pictures / name / f"{number}.png")

    def make(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        config = folder / "config.toml"
        config.write_text(f"""
            algorithm = "promptfl"
            rounds = 1
            device = "cpu"
            [data]
            source = "imagefolder:{pictures}"
            train_per_class = 4
            [partition]
            scheme = "disjoint"
            clients = 2
            [encoder]
            name = "clip"
            checkpoint = "{clip_folder}"
        """)
        run(load_config(config, list(overrides)), folder / "run")
        return folder / "run"

    return make


@pytest.fixture(scope="session")
def shared_run(make_run: Callable[..., Path]) -> Path:
    """A run whose clients share a prompt, without privacy."""
    return make_run()
