"""Checkpoints that are whole or absent, and never overwrite a good one.

A checkpoint is one safetensors file named after its round, beside `latest.json` that names it with its SHA-256 and
holds the ledger as it was then. Both are written to a temporary name, flushed to the disk, and renamed; so a process
that is killed, or a disk that is full, leaves the last complete checkpoint in place.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors.torch
from torch import Tensor

from sordino.algorithms.base import AnyState, State, map_tensors, named_tensors
from sordino.errors import RunError
from sordino.files import write_atomically
from sordino.privacy.ledger import Ledger
from sordino.runtime.local import Training

LATEST = "latest.json"


def save(folder: Path, training: Training) -> None:
    """Write a checkpoint, and remove those older than the one before it.

    Raises:
        RunError: it cannot be written.
    """
    content = safetensors.torch.save(_tensors(training)) if _tensors(training) else b""
    name = f"round-{training.round:06d}.safetensors"
    write_atomically(folder / name, content)
    latest = {
        "file": name,
        "round": training.round,
        "sha256": hashlib.sha256(content).hexdigest(),
        "ledger": training.ledger.to_json(),
    }
    write_atomically(folder / LATEST, json.dumps(latest).encode())
    for old in sorted(folder.glob("round-*.safetensors"))[:-2]:
        old.unlink(missing_ok=True)


def load(folder: Path, like: Training) -> Training | None:
    """The latest checkpoint, or None where there is none; loading executes nothing.

    Args:
        folder: where it was saved.
        like: a state of the same method and settings, for types, shapes and devices.

    Raises:
        RunError: the checkpoint is damaged or belongs to another run.
    """
    if not (folder / LATEST).exists():
        return None
    try:
        latest = json.loads((folder / LATEST).read_bytes())
        path = folder / str(latest["file"])
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != latest["sha256"]:
            raise ValueError("its SHA-256 is not the one recorded")
        tensors = safetensors.torch.load(content) if content else {}
        return Training(
            int(latest["round"]),
            _fill(like.server, tensors, "server."),
            _fill(like.clients, tensors, "clients."),
            {name: tensors[f"mechanism.{name}"] for name in like.mechanism},
            Ledger.from_json(latest["ledger"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise RunError(
            f"checkpoint in {folder} is damaged ({error}); nothing was changed; "
            "delete the folder to train from the start"
        ) from None


def _tensors(training: Training) -> dict[str, Tensor]:
    parts: dict[str, State] = {"server.": training.server, "clients.": training.clients}
    mechanism = {f"mechanism.{name}": tensor.contiguous() for name, tensor in training.mechanism.items()}
    return mechanism | {
        prefix + name: tensor.detach().cpu().contiguous().clone()
        for prefix, state in parts.items()
        for name, tensor in named_tensors(state).items()
    }


def _fill(like: AnyState, tensors: dict[str, Tensor], prefix: str) -> AnyState:
    def find(name: str, old: Tensor) -> Tensor:
        new = tensors[prefix + name]
        if new.shape != old.shape:
            raise ValueError(f"{prefix}{name} has shape {tuple(new.shape)}, not {tuple(old.shape)}")
        return new.to(old)

    return map_tensors(like, find)
