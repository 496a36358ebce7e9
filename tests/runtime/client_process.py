"""A process that holds some clients of a federation, and exchanges bytes with a server over a socket."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import model_class
from sordino.encoders.clip import ClipEncoder
from sordino.privacy.settings import PrivacySettings
from sordino.runtime import checkpoint, messages
from sordino.runtime.client import ClientEnd
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings
from sordino.secure import Refusal

HEAD = struct.Struct("<iBI")  # client, whether it refuses, bytes that follow
NOBODY = -1  # in place of a client: the end of a batch of messages


@dataclass(frozen=True)
class Spec:
    """A federation, and the clients that one process holds.

    Attributes:
        method, tables, rows, rounds, privacy, runtime: as of `make_runtime`.
        clip: the folder of the small CLIP.
        table: a file with `features` and `labels`.
        clients: those of this process.
    """

    method: str
    tables: dict[str, Any]
    rows: list[list[int]]
    rounds: int
    privacy: dict[str, Any]
    runtime: dict[str, Any]
    clip: str
    table: str
    clients: list[int]

    def build(self) -> LocalRuntime:
        """Build the whole federation; a process uses its own end of it."""
        method, settings = algorithm(self.method), settings_for(self.method, self.tables)
        encoder = ClipEncoder.load(self.clip, torch.device("cpu"), torch.float64)
        encoder.logit_scale = 10.0
        classes = encoder.class_tokens(["cat", "dog", "sunflower", "grand piano"])
        table = safetensors.torch.load_file(self.table)
        return LocalRuntime(
            method,
            settings,
            model_class(method).of(settings, encoder, classes),
            table["features"],
            table["labels"],
            self.rows,
            self.rounds,
            RuntimeSettings(**self.runtime),
            0,
            PrivacySettings(**self.privacy),
        )

    def write(self, file: Path) -> None:
        """Write the JSON file."""
        file.write_text(json.dumps(asdict(self)))


def send(connection: socket.socket, contents: Sequence[tuple[int, bytes | Refusal]]) -> None:
    """Send messages of, or to, several clients."""
    for client, content in contents:
        refused = isinstance(content, Refusal)
        body = content.reason.encode() if isinstance(content, Refusal) else content
        connection.sendall(HEAD.pack(client, refused, len(body)) + body)
    connection.sendall(HEAD.pack(NOBODY, 0, 0))


def receive(connection: socket.socket) -> list[tuple[int, bytes | Refusal]]:
    """Receive a batch of messages; none where the other side has closed the connection."""

    def batch() -> Iterator[tuple[int, bytes | Refusal]]:
        while head := exactly(connection, HEAD.size):
            client, refused, length = HEAD.unpack(head)
            if client == NOBODY:
                return
            body = exactly(connection, length)
            yield client, Refusal(body.decode()) if refused else body

    return list(batch())


def exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer where the other side has closed the connection."""
    parts: list[bytes] = []
    while count and (part := connection.recv(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def main(spec_file: Path, connection: socket.socket, out: Path) -> None:
    """Take part in rounds until the server closes the connection; then write the clients' checkpoint.

    Args:
        spec_file: a `Spec` in JSON.
        connection: to the server.
        out: the folder for the checkpoint.
    """
    spec = Spec(**json.loads(spec_file.read_text()))
    runtime = spec.build()
    chosen = torch.tensor(spec.clients)
    data = runtime.data
    data = replace(data, rows=data.rows[chosen], counts=data.counts[chosen], weights=data.weights[chosen])
    end = ClientEnd(runtime.federation, data, spec.clients, runtime.randomness)
    clients = end.round(end.start())
    while batch := receive(connection):
        contents: Mapping[int, bytes] = {client: body for client, body in batch if isinstance(body, bytes)}
        if all(messages.opens_round(content) for content in contents.values()):
            clients = end.round(clients.training)
        send(connection, clients.handle(contents))
    checkpoint.save_clients(out, clients.training)
