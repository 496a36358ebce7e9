"""Server and clients in processes of their own exchange bytes and nothing else, with the local runtime's numbers."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.client_process import Spec, main, receive, send
from runtime.federations import SIX
from runtime.forked import code_of, started
from sordino.algorithms.base import map_tensors, named_tensors
from sordino.errors import ConfigError
from sordino.privacy.client_level import CLIP
from sordino.runtime import checkpoint
from sordino.runtime.client import ClientEnd
from sordino.runtime.local import LocalRuntime, Training
from sordino.runtime.server import Link, ServerEnd, ServerRecord, ServerTraining
from sordino.secure import Refusal

pytestmark = pytest.mark.slow


# The others differ in what the bytes say, which `test_fleet` compares in one process.
IN_PROCESSES = [
    "dp-fpl, adaptive clip, noise by the clients",
    "dp-fpl, adaptive clip, a secure sum",
    "dp-fpl, statistics, noise by client",
    "secfpp",
]


@contextmanager
def processes(spec: Spec, groups: list[list[int]], folder: Path) -> Iterator[Link]:
    """Clients in as many processes as there are groups; a link to them."""
    connections: list[socket.socket] = []
    running: list[ForkServerProcess] = []
    for place, clients in enumerate(groups):
        ours, theirs = socket.socketpair()
        file = folder / f"spec-{place}.json"
        replace(spec, clients=clients).write(file)
        running.append(started(main, file, theirs, folder / f"clients-{place}"))
        theirs.close()
        connections.append(ours)

    def link(contents: Mapping[int, bytes]) -> list[tuple[int, bytes | Refusal]]:
        reached = [(clients, connection) for clients, connection in zip(groups, connections, strict=True)]
        asked = [(c, {n: contents[n] for n in clients if n in contents}) for clients, c in reached]
        for connection, own in asked:
            if own:
                send(connection, list(own.items()))
        return sorted((reply for c, own in asked if own for reply in receive(c)), key=lambda reply: reply[0])

    try:
        yield link
    finally:
        for connection in connections:
            connection.close()
        assert [code_of(process) for process in running] == [0] * len(running)


def trained_locally(runtime: LocalRuntime) -> tuple[Training, list[Any]]:
    training, records = runtime.start(), []
    if runtime.releases_statistics:
        training, _ = runtime.release(training)
    for _ in range(runtime.rounds):
        training, record = runtime.round(training)
        records.append(record)
    return training, records


def trained_across(runtime: LocalRuntime, link: Link) -> tuple[ServerTraining, list[ServerRecord]]:
    end = ServerEnd(runtime.federation, runtime.randomness)
    training, records = end.start(run=runtime.start().ledger.run, data=runtime.start().ledger.data), []
    if runtime.releases_statistics:
        training = end.release(training, link)
    for _ in range(runtime.rounds):
        training, record = end.round(training, link)
        records.append(record)
    return training, records


@pytest.mark.parametrize("name", IN_PROCESSES)
def test_two_processes_have_the_local_runtimes_numbers(name: str, spec_of: Any, tmp_path: Path) -> None:
    """To the bit: states at both ends, clip, ledger, and bytes on the wire."""
    spec = spec_of(name)
    runtime = spec.build()
    expected, records = trained_locally(runtime)
    with processes(spec, [spec.clients], tmp_path) as link:
        training, seen = trained_across(runtime, link)
    for tensor_name, tensor in named_tensors(expected.server).items():
        assert torch.equal(named_tensors(training.state)[tensor_name], tensor), tensor_name
    clients = checkpoint.load_clients(tmp_path / "clients-0", runtime.start().at_clients)
    assert clients is not None
    for tensor_name, tensor in named_tensors(expected.clients).items():
        assert torch.equal(named_tensors(clients.state)[tensor_name], tensor), tensor_name
    for ours, theirs in (
        (clients.release, expected.at_clients.release),
        (training.release, expected.at_server.release),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert training.mechanism.keys() == expected.mechanism.keys()
    assert all(torch.equal(training.mechanism[key], expected.mechanism[key]) for key in expected.mechanism)
    assert training.ledger.releases == expected.ledger.releases
    assert bool(training.ledger.releases) == bool(spec.privacy)
    sizes = [(record.upload_bytes, record.broadcast_bytes) for record in seen]
    assert sizes == [(record.upload_bytes, record.broadcast_bytes) for record in records]
    if "clip_quantile" in spec.privacy:
        assert float(training.mechanism[CLIP]) != spec.build().privacy.clip


@pytest.mark.parametrize(
    "name", ["dp-fpl, adaptive clip, noise by the clients", "dp-fpl, statistics, noise by client", "secfpp"]
)
def test_a_process_for_each_client(name: str, spec_of: Any, tmp_path: Path) -> None:
    """A stack of one computes what its slice of all does, up to how its matrices are multiplied."""
    spec = spec_of(name)
    runtime = spec.build()
    expected, _ = trained_locally(runtime)
    with processes(spec, [[client] for client in spec.clients], tmp_path) as link:
        training, _ = trained_across(runtime, link)
    for tensor_name, tensor in named_tensors(expected.server).items():
        torch.testing.assert_close(named_tensors(training.state)[tensor_name], tensor, rtol=1e-4, atol=1e-5)
    assert training.ledger.releases == expected.ledger.releases
    first = torch.zeros(1, dtype=torch.int64)
    start = runtime.start().at_clients
    like = replace(start, state=map_tensors(start.state, lambda _, tensor: tensor[first]))
    for client in spec.clients:
        alone = checkpoint.load_clients(tmp_path / f"clients-{client}", like)
        assert alone is not None
        for tensor_name, tensor in named_tensors(expected.clients).items():
            mine = named_tensors(alone.state)[tensor_name]
            torch.testing.assert_close(mine, tensor[client : client + 1], rtol=1e-4, atol=1e-5)


def test_nobody_but_the_local_runtime_simulates_noise(spec_of: Any) -> None:
    runtime = spec_of("dp-fpl, dp-sgd").build()
    for end in (
        lambda: ServerEnd(runtime.federation),
        lambda: ClientEnd(runtime.federation, runtime.data, range(len(SIX))),
    ):
        with pytest.raises(ConfigError, match=r"privacy.simulation.*only the local runtime"):
            end()
