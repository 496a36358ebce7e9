"""Faults that a test puts into a site's process, and noise that it can draw again; see `sitecustomize`.

Files of the folder SORDINO_TEST_FAULTS say what happens: `north.json`, with the fault of a round by its number, that of
a process's first hello as `hello`, and as `pace` the least seconds of each round's answer while the file says so; and
`noise`, which makes the noise of all sites a function of the round. No configuration, policy or message can do either.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import sordino.files
from sordino.randomness import KeyedRandomness, Randomness
from sordino.runtime import messages
from sordino.runtime.envelope import Envelope
from sordino.runtime.turns import Turns
from sordino.sites.site import Site

FOLDER = "SORDINO_TEST_FAULTS"  # a variable of the environment
NOISE = "noise"
SECRET = "patient Miller"
SLOW_SECONDS = 25.0
LATE_SECONDS = 300.0  # at most
PACE = "pace"
MANY = 10**6


def repeatable_noise(self: Turns, number: int, clients: Sequence[int]) -> Randomness:
    """Replace `Turns._noise`: the same in every process, for each round and client."""
    key = hashlib.sha256(b"noise of a test, round %d" % number).digest()
    return KeyedRandomness(key, clients, self.end.federation.device)


def install() -> None:
    """Change this process's site."""
    folder = Path(os.environ[FOLDER])
    noise, turn = Turns._noise, Site.turn
    earlier: list[bytes] = []

    def chosen(self: Turns, number: int, clients: Sequence[int]) -> Randomness:
        return (repeatable_noise if (folder / NOISE).exists() else noise)(self, number, clients)

    def faulty(self: Site, request: bytes) -> bytes:
        file = folder / f"{self.settings.name}.json"
        fault = fault_of(file, request, bool(earlier))
        if fault:
            print(f"TEST FAULT {fault}", flush=True)
        start = time.monotonic()
        answer = answered(lambda: turn(self, request), fault, earlier)
        end = time.monotonic() + LATE_SECONDS
        # The test decides when it is late enough, as the times of an engine depend on the machine.
        while fault == "late" and file.exists() and time.monotonic() < end:
            time.sleep(0.1)
        keep_pace(file, request, start)
        earlier.append(answer)
        return answer

    Turns._noise, Site.turn = chosen, faulty  # type: ignore[method-assign]


def fault_of(file: Path, request: bytes, answered: bool) -> str:
    """Return the fault of the round that a request opens, or of a hello before any answer; nothing if there is none."""
    faults = asked_for(file)
    if not faults:
        return ""
    envelope = Envelope.decode(request)
    if envelope.kind == "hello" and not answered:
        return str(faults.get("hello", ""))
    if envelope.kind != "round":
        return ""
    number = messages.round_header(next(iter(envelope.contents.values()))).round
    return str(faults.get(str(number), ""))


def keep_pace(file: Path, request: bytes, start: float) -> None:
    """Wait with a round's answer for as long as a site's file says, which may say less meanwhile."""
    if asked_for(file).get(PACE) and Envelope.decode(request).kind == "round":
        while time.monotonic() < start + min(float(asked_for(file).get(PACE, 0.0)), LATE_SECONDS):
            time.sleep(0.1)


def asked_for(file: Path) -> dict[str, Any]:
    """Return what a site's file says; nothing where there is none."""
    try:
        told: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    return told


def answered(turn: Callable[[], bytes], fault: str, earlier: Sequence[bytes]) -> bytes:
    """Return a site's answer, with a fault in it or on the way to it."""
    if fault == "exception":
        raise ValueError(SECRET)
    if fault == "full disk":
        return on_a_full_disk(turn)
    answer = turn()
    if fault == "slow":
        time.sleep(SLOW_SECONDS)
    if fault == "garbage":
        return b"nothing of Sordino's"
    if fault == "replayed":
        return earlier[-1]
    return damaged(answer, fault)


def on_a_full_disk(turn: Callable[[], bytes]) -> bytes:
    real = sordino.files.replace_file

    def full(path: Path, content: bytes, private: bool = False) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sordino.files.replace_file = full
    try:
        return turn()
    finally:
        sordino.files.replace_file = real


def damaged(answer: bytes, fault: str) -> bytes:
    """Return an answer whose largest tensor is another one."""
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "NaN": lambda tensor: tensor * torch.nan,
        "wrong shape": lambda tensor: tensor[..., :1].contiguous(),
        "oversized": lambda tensor: torch.zeros(MANY),
    }
    if fault not in changes:
        return answer
    envelope = Envelope.decode(answer)
    client, content = next(iter(envelope.contents.items()))
    tensors = safetensors.torch.load(content)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = changes[fault](tensors[name])
    changed = messages.with_head(tensors, messages.head_of(content))
    return replace(envelope, contents={**envelope.contents, client: changed}).encode()
