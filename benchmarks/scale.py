"""Rounds over sites that host shards of many clients: seconds, memory and bytes by the number of clients.

A server and two site processes exchange bytes over pipes, as over an engine. Each site holds half of the clients as one
stack; a tenth of all take part in a round. A client has 8 examples, as features of the bundled encoder's width, and its
prompt has 8 vectors. Sites write state and answers to disk in every round, and the server its ledger and state. Each
number of clients runs in processes of its own, so that peak memory is its own. Prints one JSON object; bytes are those
of a round on the wire, both ways.

    python benchmarks/scale.py --method dp-fpl --privacy cotangent

With `--server` there are no sites: it measures what the server alone does for many clients, of which few take part.

    python benchmarks/scale.py --server --clients 1000,10000,100000,1000000 --participation 0.001
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sordino.algorithms import algorithm, settings_for
from sordino.encoders import load_encoder
from sordino.encoders.prompt_model import PromptModel
from sordino.files import write_atomically
from sordino.privacy.ledger import Release
from sordino.privacy.settings import PrivacySettings
from sordino.randomness import Randomness
from sordino.runtime import checkpoint
from sordino.runtime.agreement import Agreement, Plan
from sordino.runtime.client import ClientEnd
from sordino.runtime.fleet import Answer, Ask, Lost, Patience, ServerRuntime
from sordino.runtime.local import LocalRuntime
from sordino.runtime.server import Questions, ServerEnd, ServerTraining
from sordino.runtime.settings import RuntimeSettings
from sordino.runtime.turns import FILE, Turns
from sordino.runtime.waiting import drive

EXPERIMENT = "ab" * 32
EACH, SITES = 8, 2
NAMES = ["cat", "dog", "sunflower", "grand piano", "bicycle", "lighthouse", "teapot", "tractor", "owl", "violin"]


PRIVACY: dict[str, dict[str, Any]] = {
    "none": {},
    "cotangent": {"mechanism": "cotangent", "noise_multiplier": 1.0, "subspace": 32},
    "dp-sgd": {"mechanism": "dp-sgd", "noise_multiplier": 1.0},
    "shares": {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "noise_by": "shares"},
}


@dataclass(frozen=True)
class Scale:
    """What is measured."""

    method: str
    privacy: str
    participation: float
    rounds: int


def federation_of(scale: Scale, clients: int) -> LocalRuntime:
    """The whole federation; a site uses its own part of the data."""
    encoder = load_encoder("bundled", None, "float32", torch.device("cpu"))
    model = PromptModel(encoder, encoder.class_tokens(NAMES))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(clients * EACH, encoder.feature_width, generator=generator)
    features = torch.nn.functional.normalize(features, dim=-1)
    labels = torch.arange(clients * EACH) % len(NAMES)
    rows = [range(k * EACH, (k + 1) * EACH) for k in range(clients)]
    tables = {"context_length": 8, "batch_size": 0, "local_steps": 1, "dp-fpl": {"rank": 4}}
    method = (algorithm(scale.method), settings_for(scale.method, tables))
    return LocalRuntime(
        *(*method, model, features, labels, rows, scale.rounds),
        RuntimeSettings(participation=scale.participation, weighting="uniform"),
        seed=0,
        privacy=PrivacySettings(**PRIVACY[scale.privacy]) if PRIVACY[scale.privacy] else None,
        digests=[str(k) for k in range(clients)],
    )


def site(scale: Scale, clients: int, mine: Sequence[int], folder: str, pipe: Connection) -> None:
    """A site's process: it answers until it is told nothing, and then says its peak memory."""
    torch.set_num_threads(1)
    runtime = federation_of(scale, clients)
    chosen = torch.tensor(list(mine))
    data = runtime.data
    data = replace(data, rows=data.rows[chosen], counts=data.counts[chosen], weights=data.weights[chosen])

    def make_end(randomness: Callable[[int, Sequence[int]], Randomness]) -> ClientEnd:
        return ClientEnd(runtime.federation, data, mine, randomness)

    def charge(number: int, releases: Sequence[Release]) -> None:
        """A benchmark has no ledger of its own."""

    turns = Turns(make_end, EXPERIMENT, Path(folder), charge)
    pipe.send_bytes(b"ready")
    while request := pipe.recv_bytes():
        pipe.send_bytes(turns.turn(request))
    state = (Path(folder) / FILE).stat().st_size
    pipe.send({"rss_mb": _peak(), "state_bytes": state})


class Pipes:
    """The sites at the other ends of pipes, as a fleet; it counts bytes."""

    def __init__(self, pipes: dict[str, Connection]) -> None:
        self.pipes, self.bytes = pipes, 0

    def sites(self) -> frozenset[str]:
        return frozenset(self.pipes)

    def may_return(self) -> bool:
        return False

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        for name, payload in ask.payloads.items():
            self.bytes += len(payload)
            self.pipes[name].send_bytes(payload)
        for name in ask.payloads:
            content = self.pipes[name].recv_bytes()
            self.bytes += len(content)
            yield Answer(name, content)


def measure(scale: Scale, clients: int, results: Connection) -> None:
    """One number of clients, in a process of its own."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    groups = {f"site-{s}": list(range(s * clients // SITES, (s + 1) * clients // SITES)) for s in range(SITES)}
    with tempfile.TemporaryDirectory() as folder:
        pipes, started = {}, []
        for name, mine in groups.items():
            ours, theirs = context.Pipe()
            arguments = (scale, clients, mine, f"{folder}/{name}", theirs)
            process = context.Process(target=site, args=arguments)
            process.start()
            pipes[name] = ours
            started.append(process)
        runtime = federation_of(scale, clients)
        for pipe in pipes.values():
            assert pipe.recv_bytes() == b"ready"
        fleet, moments, traffic, writing = Pipes(pipes), [time.perf_counter()], [0], []

        def save(training: ServerTraining, *_: Any) -> None:
            writing.append(written(training, Path(folder)))
            moments.append(time.perf_counter())
            traffic.append(fleet.bytes)

        server = ServerRuntime(
            ServerEnd(runtime.federation), runtime.start().at_server, groups, EXPERIMENT, Patience(), save
        )
        drive(server, fleet)
        for pipe in pipes.values():
            pipe.send_bytes(b"")
        ends = [pipe.recv() for pipe in pipes.values()]
        for process in started:
            process.join()
    seconds = [after - before for before, after in itertools.pairwise(moments)]
    per_round = [after - before for before, after in itertools.pairwise(traffic)]
    results.send(
        {
            "participants": max(1, round(scale.participation * clients)),
            "of_which_server_writes": round(statistics.median(writing), 4),
            "round_seconds": round(statistics.median(seconds[1:] or seconds), 4),
            "round_bytes": int(statistics.median(per_round)),
            "server_rss_mb": _peak(),
            "site_rss_mb": max(end["rss_mb"] for end in ends),
            "state_bytes_per_site": max(end["state_bytes"] for end in ends),
        }
    )


def written(training: ServerTraining, folder: Path) -> float:
    """Write what a coordinator writes after a round, and return the seconds that it took."""
    began = time.perf_counter()
    write_atomically(folder / "ledger.json", training.ledger.to_json().encode())
    checkpoint.save_server(folder / "checkpoint", training)
    return time.perf_counter() - began


def server_alone(scale: Scale, clients: int, results: Connection) -> None:
    """The server's own work for many clients, in a process of its own: all but the clients' answers."""
    encoder = load_encoder("bundled", None, "float32", torch.device("cpu"))
    tables = {"context_length": 8, "batch_size": 0, "local_steps": 1, "dp-fpl": {"rank": 4}}
    budget = {name: value for name, value in PRIVACY[scale.privacy].items() if name != "noise_multiplier"}
    budget |= {"epsilon": 8.0, "delta": 1e-8} if budget else {}
    budget |= {"colluders": clients // SITES} if scale.privacy == "shares" else {}  # a site knows what its clients know
    plan = Plan(
        *(algorithm(scale.method), settings_for(scale.method, tables)),
        PromptModel(encoder, encoder.class_tokens(NAMES)),
        scale.rounds,
        RuntimeSettings(participation=scale.participation, weighting="uniform"),
        PrivacySettings(**budget),
        0,
        None,
        torch.zeros(encoder.feature_width),
    )
    groups = {f"site-{s}": range(s * clients // SITES, (s + 1) * clients // SITES) for s in range(SITES)}
    agreement = Agreement(groups, [EACH] * clients, False)
    before, seconds = _peak(), {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name] = round(now - began, 3)
        began = now

    agreed = json.dumps({**agreement.facts, "sites": {name: list(each) for name, each in groups.items()}})
    lap("write_agreement")
    Agreement.read(json.loads(agreed))
    lap("read_agreement")
    federation = agreement.federation(plan)
    lap("match_noise_to_the_plan")
    end = ServerEnd(federation)
    training = end.start("00", {f"client {k}": "ab" * 32 for k in range(clients)})
    lap("start")
    chosen = end.participants(1)
    asked = Questions(lambda link: end.round(training, link, 1))
    contents = asked.pending or {}
    lap("broadcasts_of_a_round")
    asked.drop()
    every = federation.mechanism.planned()
    training = replace(training, ledger=training.ledger.add(every))
    lap("enter_all_clients")
    end.within_budget(training)
    lap("check_budget")
    with tempfile.TemporaryDirectory() as folder:
        written(training, Path(folder))
        lap("write_ledger_and_state")
        size = (Path(folder) / "ledger.json").stat().st_size
    results.send(
        {
            "participants": len(chosen),
            "broadcast_bytes": sum(map(len, contents.values())),
            "agreement_bytes": len(agreed),
            "ledger_bytes": size,
            "rss_mb": _peak(),
            "rss_mb_without_clients": before,
            "seconds": seconds,
        }
    )


def _peak() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (2**20 if sys.platform == "darwin" else 2**10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["promptfl", "dp-fpl"], default="promptfl")
    parser.add_argument("--privacy", choices=PRIVACY, default="none")
    parser.add_argument("--participation", type=float, default=0.1)
    parser.add_argument("--server", action="store_true", help="the server alone")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", default="10,100,1000,10000")
    parser.add_argument("--quick", action="store_true", help="10 and 100 clients only")
    arguments = parser.parse_args()
    sizes = [10, 100] if arguments.quick else [int(size) for size in arguments.clients.split(",")]
    context = multiprocessing.get_context("spawn")
    scale = Scale(arguments.method, arguments.privacy, arguments.participation, arguments.rounds)
    by_clients = {}
    for clients in sizes:
        ours, theirs = context.Pipe()
        process = context.Process(target=server_alone if arguments.server else measure, args=(scale, clients, theirs))
        process.start()
        theirs.close()  # or a process that failed would be waited for
        by_clients[str(clients)] = ours.recv()
        process.join()
    print(json.dumps({**asdict(scale), "server": arguments.server, "by_clients": by_clients}))


if __name__ == "__main__":
    main()
