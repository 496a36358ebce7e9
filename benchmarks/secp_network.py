"""Seconds of a private forward pass by three processes: without a network, and on imitated ones, against their limit.

Dealer and both servers are processes on this machine, with TLS; this one is model owner and data owner. Messages have
two batches of 4 sentences of 32 tokens for the first layers of the bundled tower. The first message is recorded; those
after it are timed, with randomness that is drawn beside the computation. For each network, of a message:

- seconds: the data owner waits, median of `--messages`.
- limit: what the servers' bytes and rounds alone take on that network; share: limit over seconds.
- waited: seconds that the slower server waited for dealt randomness.
- tokens_per_second.

`by_threads` has the same without a network, for numbers of torch's threads a process. All share the machine's
cores. The dealer's link is not imitated. Prints one JSON object.

    python benchmarks/secp_network.py
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from secp import whole_rows

from sordino.memory import keep_freed
from sordino.mpc import Calibration
from sordino.mpc.dealing.costs import Cost
from sordino.mpc.parties.certificates import (
    DATA_OWNER,
    DEALER,
    MODEL_OWNER,
    ROLES,
    SERVERS,
    Identity,
    make_certificates,
)
from sordino.mpc.parties.dealer_service import start_dealer
from sordino.mpc.parties.network import LAN, WAN, Network
from sordino.mpc.parties.server import start_server
from sordino.mpc.parties.session import connect, provide
from sordino.mpc.tower.distill import teacher_of
from sordino.mpc.tower.public_text import SENTENCES, calibration_of
from sordino.mpc.tower.sentences import Sentences
from sordino.mpc.tower.tower import PrivateTower, bundled_tower

BATCHES, BATCH, LENGTH = 2, 4, 32
HERE, TIMEOUT = "127.0.0.1:0", 600.0


def party(role: str, folder: str, threads: int, options: dict[str, Any], pipe: Connection) -> None:
    """A process of the dealer or a server, until the pipe closes."""
    keep_freed()
    torch.set_num_threads(threads)
    identity = Identity.load(Path(folder) / role, role)
    start = start_dealer if role == DEALER else start_server
    server, address = start(identity, HERE, timeout=TIMEOUT, **options)
    pipe.send(address)
    pipe.poll(None)
    server.stop(grace=None)


@contextmanager
def running(folder: str, threads: int, network: Network | None) -> Iterator[Sequence[str]]:
    """The servers' addresses, while dealer and servers run."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, addresses = [], [], dict[str, str]()
    try:
        for role in (DEALER, *SERVERS):
            options: dict[str, Any] = {}
            if role != DEALER:
                options = {"dealer": addresses[DEALER], "network": network}
                options["peer"] = addresses.get(SERVERS[0])
            ours, theirs = context.Pipe()
            process = context.Process(target=party, args=(role, folder, threads, options, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
            addresses[role] = ours.recv()
        yield [addresses[role] for role in SERVERS]
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(30)
            process.kill()


def measured(
    folder: str,
    tower: PrivateTower,
    calibration: Calibration,
    groups: list[Sentences],
    messages: int,
    threads: int = 1,
    network: Network | None = None,
) -> dict[str, float]:
    """What messages take after the first one."""
    identities = {role: Identity.load(Path(folder) / role, role) for role in (MODEL_OWNER, DATA_OWNER)}
    seconds, waited = [], []
    with running(folder, threads, network) as servers:
        provide(identities[MODEL_OWNER], servers, tower, calibration, TIMEOUT)
        with connect(identities[DATA_OWNER], servers, TIMEOUT) as session:
            session.forward(groups)
            before = session.costs.total
            for _ in range(messages):
                began, offline = time.perf_counter(), session.offline
                session.forward(groups)
                seconds.append(time.perf_counter() - began)
                waited.append(session.offline - offline)
            total = session.costs.total
    rounds, octets = total.rounds - before.rounds, total.online - before.online
    tokens = sum(int(group.lengths.sum()) for group in groups)
    found = {"seconds": median(seconds), "waited": median(waited), "tokens_per_second": tokens / median(seconds)}
    found |= {"rounds": rounds / messages, "online_bytes_per_server": octets / messages}
    if network is not None:
        limit = network.online(Cost(rounds=rounds, online=octets)) / messages
        found |= {"limit": limit, "share": limit / found["seconds"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="2 layers, one message, ranges of 300 sentences, no threads"
    )
    parser.add_argument("--messages", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tower, text_tower = bundled_tower(), teacher_of(None)
    tower = replace(tower, layers=tower.layers[: 2 if args.quick else 6])
    calibration = calibration_of(tower, text_tower, 300 if args.quick else SENTENCES)
    rows = whole_rows(text_tower, BATCHES * BATCH, LENGTH)
    parts = zip(rows.embeddings.split(BATCH), rows.lengths.split(BATCH), strict=True)
    groups = [Sentences(embeddings, lengths) for embeddings, lengths in parts]
    messages = 1 if args.quick else args.messages
    result: dict[str, Any] = {"quick": args.quick, "layers": len(tower.layers), "messages": messages}
    with tempfile.TemporaryDirectory() as folder:
        make_certificates(Path(folder))
        assert {DEALER, MODEL_OWNER, DATA_OWNER, *SERVERS} == set(ROLES)
        common = folder, tower, calibration, groups, messages
        for name, network in (("LAN", LAN), ("WAN", WAN)):
            result[name] = measured(*common, network=network)
        numbers = (1,) if args.quick else (1, 2)
        result["by_threads"] = {str(threads): measured(*common, threads=threads) for threads in numbers}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
