"""Rounds over engines beside the same rounds without one: a server and three sites, TLS and certificates, loopback.

DP-FPL with noise by each client on handwritten digits and the bundled encoder, one client a site. For each engine:

- round_seconds, local_round_seconds: medians of the coordinator's rounds, over the engine, and over the same sites in
  processes of their own behind pipes; round_overhead_seconds is their difference. First rounds are left out.
- first_round_seconds: from the command to the end of the first round.
- rss_mb: peak memory of the engine's own process at a site, and of the process of a site's job.
- bytes_over_bill: what sites and server hand to the engine, over the bytes of the method's messages.
- wire_bytes_over_bill: what crossed the loopback in that time, over the same: with the engine's questions for work,
  heartbeats and TLS. Meaningful only where nothing else uses the loopback.

Prints one JSON object. It needs the extra `flare`.

    python benchmarks/engines.py --rounds 30
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tomli_w
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from flare.parties import Party, environment, free_port, processes_of, until

from sordino.flare.project import load_project
from sordino.flare.provision import provision
from sordino.runtime.fleet import Answer, Ask, Lost, Patience
from sordino.sites.coordinator import METRICS, coordinate
from sordino.sites.fleet_config import FleetConfig, load_fleet_config
from sordino.sites.settings import load_site
from sordino.sites.site import Site

NAMES = ("east", "north", "west")
LEAD = "lead@example.org"
EXPERIMENT: dict[str, Any] = {
    "algorithm": "dp-fpl",
    "device": "cpu",
    "privacy": {"mechanism": "dp-sgd", "noise_multiplier": 1.0},
    "settings": {"context_length": 8, "batch_size": 32, "local_steps": 1, "dp-fpl": {"rank": 4}},
}


def write_site(file: Path, number: int, state: str) -> None:
    """A site with a third of the digits."""
    site = {
        "name": NAMES[number],
        "state": state,
        "device": "cpu",
        "clients": [number],
        "data": {"source": "digits", "train_per_class": 30, "test_per_class": 5},
        "partition": {"scheme": "iid", "clients": len(NAMES)},
        "policy": {"experiments": ["any"], "epsilon": 1e6, "delta": 1e-5},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(tomli_w.dumps(site))


def seconds_of(out: Path) -> list[float]:
    """Of each round but the first."""
    return [json.loads(line)["seconds"] for line in (out / METRICS).read_text().splitlines()][1:]


def bill_of(out: Path) -> float:
    """Bytes of the method's messages in all rounds."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return float(sum((line["upload_bytes"] + line["broadcast_bytes"]) * line["participants"] for line in lines))


def handed_over(page: Path) -> float:
    """Bytes that the page counts by site, down and up; as exact as it prints them."""
    units = {"B": 1, "kB": 1e3, "MB": 1e6}
    cells = re.findall(r"<td>([\d.,]+) (B|kB|MB) / ([\d.,]+) (B|kB|MB)</td>", page.read_text())
    return sum(float(a.replace(",", "")) * units[u] + float(b.replace(",", "")) * units[v] for a, u, b, v in cells)


def loopback() -> int:
    """Bytes that the loopback has carried."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def peak(process: int) -> int:
    """Peak memory of a process in MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return round(int(found.group(1)) / 1024) if found else 0


def answering(file: Path, pipe: Connection) -> None:
    """A site's process: it answers until it is told nothing."""
    torch.set_num_threads(1)
    site = Site(load_site(file))
    while request := pipe.recv_bytes():
        pipe.send_bytes(site.turn(request))


class Pipes:
    """The sites at the other ends of pipes; they work at the same time, as over an engine."""

    def __init__(self, pipes: dict[str, Connection]) -> None:
        self._pipes = pipes

    def sites(self) -> frozenset[str]:
        return frozenset(self._pipes)

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        for name, payload in ask.payloads.items():
            self._pipes[name].send_bytes(payload)
        for name in ask.payloads:
            yield Answer(name, self._pipes[name].recv_bytes())


def without_engine(config: FleetConfig, folder: Path) -> list[float]:
    """The rounds of the same sites over pipes."""
    context = multiprocessing.get_context("spawn")
    pipes, started = {}, []
    for number, name in enumerate(NAMES):
        write_site(folder / name / "site.toml", number, "state")
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=answering, args=(folder / name / "site.toml", theirs))
        process.start()
        started.append(process)
    coordinate(config.experiment, config.proposal(), Pipes(pipes), folder / "out", Patience())
    for name, process in zip(NAMES, started, strict=True):
        pipes[name].send_bytes(b"")
        process.join()
    return seconds_of(folder / "out")


def over_flare(file: Path, folder: Path) -> dict[str, Any]:
    """The rounds over FLARE, and what they cost."""
    project = {
        "name": "bench",
        "server": {"host": "127.0.0.1", "port": free_port(), "store": str(folder / "store")},
        "sites": [{"name": name, "organization": f"{name}_org"} for name in NAMES],
        "admins": [{"name": LEAD, "organization": "coordinator"}],
    }
    (folder / "project.toml").write_text(tomli_w.dumps(project))
    kits = {kit.name: kit for kit in provision(load_project(folder / "project.toml"), folder / "out")}
    for number, name in enumerate(NAMES):
        write_site(kits[name] / "local" / "site.toml", number, "../state")
    parties: list[Party] = []
    try:
        server = Party(kits["server"])
        parties.append(server)
        parties += [Party(kits[name]) for name in NAMES]
        for name in NAMES:
            until(f"{name} registered", lambda name=name: server.says(f"client {name} registered"))
        began, before = time.monotonic(), loopback()
        command = [sys.executable, "-m", "sordino", "flare", "run", str(file), "--kit", str(kits[LEAD])]
        running = subprocess.Popen(
            [*command, "--out", str(folder / "run")],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert running.stderr is not None
        first, site, job = None, 0, 0
        for line in running.stderr:
            if line.startswith("round "):
                first = first or time.monotonic() - began
                found = processes_of(kits[NAMES[0]])
                jobs = {n for n, words in found.items() if any("worker_process" in word for word in words)}
                job = max([job, *map(peak, jobs)])
                site = max([site, *(peak(number) for number in found if number not in jobs)])
        if running.wait():
            raise SystemExit("sordino flare run failed")
        crossed = loopback() - before
    finally:
        for party in parties:
            party.end()
    seconds, bill = seconds_of(folder / "run"), bill_of(folder / "run")
    return {
        "round_seconds": round(statistics.median(seconds), 3),
        "first_round_seconds": round(first or 0.0, 1),
        "rss_mb": {"site": site, "job": job},
        "bytes_over_bill": round(handed_over(folder / "run" / "report.html") / bill, 3),
        "wire_bytes_over_bill": round(crossed / bill, 3),
        "bill_bytes": int(bill),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        file = folder / "experiment.toml"
        file.write_text(tomli_w.dumps(EXPERIMENT | {"rounds": rounds}))
        (folder / "flare").mkdir()
        torch.set_num_threads(1)
        local = statistics.median(without_engine(load_fleet_config(file), folder / "local"))
        flare = over_flare(file, folder / "flare")
    flare |= {
        "local_round_seconds": round(local, 3),
        "round_overhead_seconds": round(flare["round_seconds"] - local, 3),
    }
    print(json.dumps({"rounds": rounds, "quick": arguments.quick, "flare": flare}))


if __name__ == "__main__":
    main()
