"""A process that is one site of a federation: it answers requests over a socket, and keeps all on disk."""

import json
import socket
import struct
from dataclasses import replace
from pathlib import Path

import torch

from runtime.client_process import Spec, exactly
from sordino.errors import SordinoError
from sordino.privacy.ledger import Release
from sordino.runtime.client import ClientEnd
from sordino.runtime.envelope import Envelope
from sordino.runtime.facts import RandomnessOf
from sordino.runtime.local import LocalRuntime
from sordino.runtime.turns import Turns

LENGTH = struct.Struct("<Q")
EXPERIMENT = "ab" * 32
LEDGER = "charged.json"


def turns_of(runtime: LocalRuntime, clients: list[int], folder: Path) -> Turns:
    """The turns of a site that holds some of a federation's clients; a simulation's noise is the simulation's."""
    chosen = torch.tensor(clients)
    data = runtime.data
    data = replace(data, rows=data.rows[chosen], counts=data.counts[chosen], weights=data.weights[chosen])

    def make_end(randomness: RandomnessOf) -> ClientEnd:
        return ClientEnd(runtime.federation, data, clients, randomness)

    def charge(number: int, releases: list[Release]) -> None:
        charged = json.loads((folder / LEDGER).read_text()) if (folder / LEDGER).exists() else {}
        charged[str(number)] = sorted(f"{release.party} {release.steps}" for release in releases)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LEDGER).write_text(json.dumps(charged))

    given = runtime.randomness if runtime.privacy.simulation else None
    return Turns(make_end, EXPERIMENT, folder, charge, given)


def answered(turns: Turns, request: bytes) -> bytes:
    """The answer to a request, or a refusal."""
    try:
        return turns.turn(request)
    except SordinoError as error:
        return Envelope("refusal", EXPERIMENT, {"reason": str(error)}).encode()


def send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(LENGTH.pack(len(content)) + content)


def receive(connection: socket.socket) -> bytes:
    """One message; nothing where the other side has closed the connection."""
    head = exactly(connection, LENGTH.size)
    return exactly(connection, LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def main(spec_file: Path, connection: socket.socket, folder: Path) -> None:
    """Answer requests until the server closes the connection."""
    spec = Spec(**json.loads(spec_file.read_text()))
    turns = turns_of(spec.build(), spec.clients, folder)
    while request := receive(connection):
        send(connection, answered(turns, request))
