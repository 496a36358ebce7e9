"""The server's view of a run: every broadcast and every upload, recorded while the run is repeated."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sordino.algorithms.base import ClientData, named_tensors
from sordino.audit.subject import Subject
from sordino.privacy.mechanism import WEIGHT
from sordino.runtime.local import LocalRuntime, Training


@dataclass(frozen=True)
class Message:
    """The server's view of a round.

    Attributes:
        number: of the round.
        clients: the participants.
        broadcast: as they received it.
        upload: field to tensor [K, ...], as they uploaded it, without their weights.
    """

    number: int
    clients: tuple[int, ...]
    broadcast: Any
    upload: Mapping[str, Tensor]


def repeated(subject: Subject) -> tuple[Training, list[Message]]:
    """Repeat the run, and return it with everything that its server saw.

    With noise from the operating system it is another run of the same data, settings and mechanism. Class
    statistics that it released are used again, not released anew. No round after them has noise, so all are the same.
    """
    again = copy.copy(subject.runtime)  # the very same run, so that a simulation draws the same noise
    messages: list[Message] = []

    def observe(number: int, clients: Sequence[int], server: Any, upload: Any) -> None:
        seen = {name: part.detach().clone() for name, part in named_tensors(upload).items() if name != WEIGHT}
        messages.append(Message(number, tuple(clients), again.algorithm.broadcast(server), seen))

    again.observe = observe
    # From the run's own start, whose precision is the run's.
    training = subject.begun()
    while training.round < subject.training.round:
        training, _ = again.round(training)
        subject.progress("repeat the run", training.round, subject.training.round)
    return training, messages


def same_end(one: Training, other: Training) -> bool:
    """Return true if two runs ended at the same states, up to rounding."""
    pairs = [
        (tensor, named_tensors(second)[name])
        for first, second in ((one.server, other.server), (one.clients, other.clients))
        for name, tensor in named_tensors(first).items()
    ]
    return all(torch.allclose(a, b.to(a), rtol=1e-3, atol=1e-5) for a, b in pairs)


def no_data(runtime: LocalRuntime, clients: int) -> ClientData:
    """Return one blank image a client: an observer that has no data has as many batches as the run."""
    features = runtime.data.features
    ones = torch.ones(clients, dtype=torch.int64, device=features.device)
    blank = torch.zeros(1, *features.shape[1:], dtype=features.dtype, device=features.device)
    return ClientData(blank, 0 * ones[:1], 0 * ones[:, None], ones, ones.float())
