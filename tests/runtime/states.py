"""States of a run for tests: with parts replaced, and in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from sordino.algorithms.base import map_tensors
from sordino.privacy.mechanism import WEIGHT
from sordino.runtime.facts import Schemas
from sordino.runtime.local import LocalRuntime, Training


def with_states(training: Training, server: Any = None, clients: Any = None) -> Training:
    """Return where a run stands, with the method's state at the server or at the clients replaced."""
    at_server, at_clients = training.at_server, training.at_clients
    return Training(
        at_server if server is None else replace(at_server, state=server),
        at_clients if clients is None else replace(at_clients, state=clients),
    )


def started_in_double(runtime: LocalRuntime) -> Training:
    """Return the start of a run in float64, so that identities hold to many digits; its messages then are, too."""

    def double(name: str, tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() and name != WEIGHT else tensor

    schemas = runtime.schemas
    broadcast, upload = (map_tensors(message, double) for message in (schemas.broadcast, schemas.upload))
    runtime.__dict__["schemas"] = Schemas(broadcast, upload)
    start = runtime.start()
    return with_states(start, map_tensors(start.server, double), map_tensors(start.clients, double))
