"""Rounds over engines beside the same rounds without one: a server and three sites, TLS and certificates, loopback.

DP-FPL with noise by each client on handwritten digits and the bundled encoder, one client a site. For each engine:

- round_seconds, local_round_seconds: medians of the coordinator's rounds, over the engine, and over the same sites in
  processes of their own behind pipes; round_overhead_seconds is their difference. First rounds are left out.
- first_round_seconds: from the command to the end of the first round.
- rss_mb: peak memory of processes: the engine's own at a site and that of a job (FLARE), a site and the largest of the
  server (Flower).
- bytes_over_bill: what sites and server hand to the engine, over the bytes of the method's messages.
- wire_bytes_over_bill: what passed the server's port after the first round, with the headers of TCP and IP, over the
  bill of these rounds: with the engine's questions for work, heartbeats and TLS. The command that watches is left out.
- wire_bytes_beside: the same less the bill, a site and a round. It does not grow with messages.

Prints one JSON object. It needs the extras `flare` and `flower`, and nginx.

    python benchmarks/engines.py --rounds 30
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import multiprocessing
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tomli_w
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from engines.engine import Engine
from engines.flare_engine import FlareEngine, flare
from engines.processes import Running
from flare.parties import processes_of
from flower.parties import FlowerEngine
from sordino.runtime.fleet import Answer, Ask, Lost, Patience
from sordino.sites.coordinator import METRICS, coordinate
from sordino.sites.fleet_config import FleetConfig, load_fleet_config
from sordino.sites.settings import load_site
from sordino.sites.site import Site

NAMES = ("east", "north", "west")
ETHERNET_IP = 0x0800
Memory = Callable[[], dict[str, int]]  # peak MB by process
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


def bills_of(out: Path) -> list[float]:
    """Bytes of the method's messages in each round."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [float((line["upload_bytes"] + line["broadcast_bytes"]) * line["participants"]) for line in lines]


def handed_over(page: Path) -> float:
    """Bytes that the page counts by site, down and up; as exact as it prints them."""
    units = {"B": 1, "kB": 1e3, "MB": 1e6}
    cells = re.findall(r"<td>([\d.,]+) (B|kB|MB) / ([\d.,]+) (B|kB|MB)</td>", page.read_text())
    return sum(float(a.replace(",", "")) * units[u] + float(b.replace(",", "")) * units[v] for a, u, b, v in cells)


class Wire:
    """Counts the bytes of IP packets on the loopback to and from a TCP port, by the other end's port.

    It needs the right to read packets.
    """

    def __init__(self, port: int) -> None:
        self._bytes = Counter[int]()
        self._port = port
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETHERNET_IP))
        self._socket.bind(("lo", 0))
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            try:
                packet, about = self._socket.recvfrom(64)
            except OSError:  # it was closed
                return
            header = (packet[0] & 15) * 4
            if about[2] == socket.PACKET_OUTGOING or packet[9] != socket.IPPROTO_TCP:  # each comes twice
                continue
            ends = struct.unpack("!HH", packet[header : header + 4])
            if self._port in ends:
                self._bytes[sum(ends) - self._port] += struct.unpack("!H", packet[2:4])[0]

    def bytes(self, but: set[int]) -> int:
        """The bytes so far, but for those of some ports."""
        return sum(count for port, count in dict(self._bytes).items() if port not in but)

    def close(self) -> None:
        """End the count."""
        self._socket.close()


def ports_of(process: int) -> set[int]:
    """The TCP ports that a process has open."""
    sockets = {str(file.readlink()) for file in Path(f"/proc/{process}/fd").iterdir() if file.is_symlink()}
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return {int(line[1].rpartition(":")[2], 16) for line in lines if f"socket:[{line[9]}]" in sockets}


def most(processes: Iterable[int]) -> int:
    """Peak memory in MB of the process that needs most."""
    sizes = [0]
    for process in processes:
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
        except OSError:  # it ended
            continue
        sizes.append(round(int(found.group(1)) / 1024) if found else 0)
    return max(sizes)


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

    def may_return(self) -> bool:
        return False

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


@contextmanager
def over_flare(folder: Path) -> Iterator[tuple[FlareEngine, int, Memory]]:
    """A server and sites of FLARE's; memory is that of FLARE's own process at a site, and of a job's."""
    with flare(folder, folder) as engine:
        for number, name in enumerate(NAMES):
            write_site(engine.homes[name] / "site.toml", number, "../state")
        kit = engine.kits[NAMES[0]]

        def memory() -> dict[str, int]:
            found = processes_of(kit)
            jobs = {each for each, words in found.items() if any("worker_process" in word for word in words)}
            return {"site": most(found.keys() - jobs), "site's job": most(jobs)}

        yield engine, port_of(kit), memory


@contextmanager
def over_flower(folder: Path) -> Iterator[tuple[FlowerEngine, int, Memory]]:
    """A server and sites of Flower's, behind its proxy; memory is that of a site, and of the largest at the server."""
    engine = FlowerEngine(folder, folder)
    for number, name in enumerate(NAMES):
        write_site(engine.homes[name] / "site.toml", number, "state")
    try:
        engine.start()
        site, server = engine.sites[NAMES[0]], engine.server
        assert server is not None
        yield engine, engine.port, lambda: {"site": most(site.processes()), "server": most(server.processes())}
    finally:
        engine.end()


def port_of(kit: Path) -> int:
    """The server's port, as a site's kit has it."""
    client = json.loads((kit / "startup" / "fed_client.json").read_text())
    return int(str(client["servers"][0]["service"]["target"]).rpartition(":")[2])


ENGINES = {"flare": over_flare, "flower": over_flower}


def measured(engine: Engine, port: int, memory: Memory, file: Path, out: Path) -> dict[str, Any]:
    """The rounds over an engine, and what they cost."""
    began, wire = time.monotonic(), Wire(port)
    first, before, crossed, used, watching = 0.0, 0, 0, dict[str, int](), set[int]()
    with Running(engine.run(file, out, subprocess.PIPE), Path(os.devnull)) as running:
        assert running.process.stderr is not None
        for line in running.process.stderr:
            if line.startswith("round "):
                watching |= ports_of(running.process.pid)
                crossed = wire.bytes(watching)
                if not first:
                    first, before = time.monotonic() - began, crossed
                now = memory()
                used = {name: max(size, used.get(name, 0)) for name, size in now.items()}
        if running.process.wait():
            raise SystemExit("the experiment failed")
    wire.close()
    seconds, bills = seconds_of(out), bills_of(out)
    beside = crossed - before - sum(bills[1:])
    return {
        "round_seconds": round(statistics.median(seconds), 3),
        "first_round_seconds": round(first, 1),
        "rss_mb": used,
        "bytes_over_bill": round(handed_over(out / "report.html") / sum(bills), 3),
        "wire_bytes_over_bill": round((crossed - before) / sum(bills[1:]), 3),
        "wire_bytes_beside": round(beside / len(seconds) / len(NAMES)),
        "bill_bytes": int(sum(bills)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--engines", default=",".join(ENGINES), help="one or several of them")
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        file = folder / "experiment.toml"
        file.write_text(tomli_w.dumps(EXPERIMENT | {"rounds": rounds}))
        torch.set_num_threads(1)
        local = statistics.median(without_engine(load_fleet_config(file), folder / "local"))
        results: dict[str, Any] = {"rounds": rounds, "quick": arguments.quick, "local_round_seconds": round(local, 3)}
        for name in arguments.engines.split(","):
            (folder / name).mkdir()
            with ENGINES[name](folder / name) as (engine, port, memory):
                found = measured(engine, port, memory, file, folder / f"{name}-run")
            results[name] = found | {"round_overhead_seconds": round(found["round_seconds"] - local, 3)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
