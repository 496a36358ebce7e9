"""Checkpoints that are whole or absent, and never overwrite a good one.

A server and its clients have a safetensors file each, named after the round. `latest.json` names the files that
belong together, with their SHA-256, and holds the ledger of that round. A party on its own machine has only its own
file. All files are written to a temporary name, flushed to the disk, and renamed, `latest.json` last. A killed process
or a full disk therefore leaves the last complete checkpoint in place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sordino.algorithms.base import AnyState, State, map_tensors, named_tensors
from sordino.errors import RunError
from sordino.files import write_atomically
from sordino.privacy.ledger import Ledger
from sordino.runtime.client import ClientTraining
from sordino.runtime.local import Training
from sordino.runtime.server import ServerTraining

LATEST = "latest.json"
RELEASE = "release."  # prefix of names
KEPT = 2  # checkpoints: the latest and its predecessor


def save(folder: Path, training: Training) -> None:
    """Write a checkpoint of a whole run, and remove all older ones but its predecessor.

    Raises:
        RunError: the checkpoint cannot be written.
    """
    _write(folder, training.round, training.at_server, training.at_clients)


def save_server(folder: Path, training: ServerTraining) -> None:
    """Write a checkpoint of a server alone; see `save`."""
    _write(folder, training.round, training, None, alone=True)


def save_clients(folder: Path, training: ClientTraining) -> None:
    """Write a checkpoint of a stack of clients alone; see `save`."""
    _write(folder, training.round, None, training, alone=True)


def load(folder: Path, like: Training) -> Training | None:
    """Return the latest checkpoint of a whole run, or None if there is none; loading executes nothing.

    Args:
        folder: where it was saved.
        like: a state of the same method and settings, for types, shapes and devices.

    Raises:
        RunError: the checkpoint is damaged or belongs to another run.
    """
    parts = _read(folder, like.at_server, like.at_clients)
    if parts is None:
        return None
    server, clients = parts
    assert server is not None
    assert clients is not None
    return Training(server, clients)


def load_server(folder: Path, like: ServerTraining) -> ServerTraining | None:
    """Return the latest checkpoint of a server alone; see `load`."""
    parts = _read(folder, like, None)
    return parts and parts[0]


def load_clients(folder: Path, like: ClientTraining) -> ClientTraining | None:
    """Return the latest checkpoint of a stack of clients alone; see `load`."""
    parts = _read(folder, None, like)
    return parts and parts[1]


def tensors_of(training: ClientTraining) -> dict[str, Tensor]:
    """Return the state of a stack of clients as tensors by name, with what it released."""
    return _tensors("clients.", training.state) | _kept(training.release, True)


def clients_of(like: ClientTraining, tensors: dict[str, Tensor], number: int) -> ClientTraining:
    """Return the state of a stack of clients from its tensors.

    Args:
        like: a state of the same method and settings, for types, shapes and devices.
        tensors: as `tensors_of` gave them, among others.
        number: of the last round.

    Raises:
        ValueError, KeyError: a tensor is missing or of another shape.
    """
    state = _fill(like.state, tensors, "clients.")
    return replace(like, round=number, state=state, release=_release(tensors) or like.release)


def _write(
    folder: Path, number: int, server: ServerTraining | None, clients: ClientTraining | None, alone: bool = False
) -> None:
    """Write the parties' files, then `latest.json`, which makes them the latest checkpoint.

    A party that is alone keeps what was released of class statistics here, so that it never releases them again. A
    whole run has a file for it.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    if server is not None:
        entries = server.mechanism.items()
        mechanism = {f"mechanism.{name}": tensor.contiguous() for name, tensor in entries}
        parts["server"] = mechanism | _tensors("server.", server.state) | _kept(server.release, alone)
    if clients is not None:
        parts["clients"] = tensors_of(clients) if alone else _tensors("clients.", clients.state)
    files: dict[str, dict[str, str]] = {}
    for party, tensors in parts.items():
        content = safetensors.torch.save(tensors) if tensors else b""
        name = f"round-{number:06d}.{party}.safetensors"
        write_atomically(folder / name, content, private=True)
        files[party] = {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
    latest: dict[str, Any] = {"round": number, **files}
    if server is not None:
        latest["ledger"] = server.ledger.to_json()
        latest["released"] = server.released
    write_atomically(folder / LATEST, json.dumps(latest).encode(), private=True)
    for party in parts:
        for old in sorted(folder.glob(f"round-*.{party}.safetensors"))[:-KEPT]:
            old.unlink(missing_ok=True)


def _read(
    folder: Path, server: ServerTraining | None, clients: ClientTraining | None
) -> tuple[ServerTraining | None, ClientTraining | None] | None:
    """Return the parties' states from the latest checkpoint, with the types and shapes of those given.

    Raises:
        RunError: the checkpoint is damaged or belongs to another run.
    """
    if not (folder / LATEST).exists():
        return None
    try:
        latest = json.loads((folder / LATEST).read_bytes())
        number = int(latest["round"])
        if server is not None:
            tensors = _part(folder, latest["server"])
            mechanism = {name: tensors[f"mechanism.{name}"] for name in server.mechanism}
            state = _fill(server.state, tensors, "server.")
            ledger = Ledger.from_json(latest["ledger"])
            server = replace(server, round=number, state=state, mechanism=mechanism, ledger=ledger)
            released = server.released or latest.get("released") is True
            server = replace(server, release=_release(tensors) or server.release, released=released)
        if clients is not None:
            clients = clients_of(clients, _part(folder, latest["clients"]), number)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise RunError(
            f"checkpoint in {folder} is damaged ({error}); nothing was changed; "
            "delete the folder to train from the start"
        ) from None
    return server, clients


def _part(folder: Path, entry: Mapping[str, str]) -> dict[str, Tensor]:
    content = (folder / str(entry["file"])).read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError("its SHA-256 is not the one recorded")
    return safetensors.torch.load(content) if content else {}


def _kept(release: Mapping[str, Tensor], alone: bool) -> dict[str, Tensor]:
    if not alone:
        return {}
    return {RELEASE + name: tensor.detach().cpu().contiguous().clone() for name, tensor in release.items()}


def _release(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(RELEASE): tensor for name, tensor in tensors.items() if name.startswith(RELEASE)}


def _tensors(prefix: str, state: State) -> dict[str, Tensor]:
    tensors = named_tensors(state).items()
    return {prefix + name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors}


def _fill(like: AnyState, tensors: dict[str, Tensor], prefix: str) -> AnyState:
    def find(name: str, old: Tensor) -> Tensor:
        new = tensors[prefix + name]
        if new.shape != old.shape:
            raise ValueError(f"{prefix}{name} has shape {tuple(new.shape)}, not {tuple(old.shape)}")
        return new.to(old)

    return map_tensors(like, find)
