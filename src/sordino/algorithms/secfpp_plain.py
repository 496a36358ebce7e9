"""SecFPP without shares: the server sees every client's prompt, and clusters and averages in the clear.

The oracle of `secfpp`, with its settings: on the same prompts, quantized alike, it finds the same clusters, and the
same means up to their quantization. What it costs less is what the shares cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sordino import secure
from sordino.algorithms import secfpp
from sordino.algorithms.base import RoundContext
from sordino.algorithms.secfpp import (
    Broadcast,
    ClientState,
    Server,
    Settings,
    Upload,
    broadcast,
    check,
    client_init,
    client_round,
    prompt,
    schedule,
    server_init,
    server_round,
)
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.ledger import Disclosure

__all__ = [
    "ABOUT",
    "Broadcast",
    "ClientState",
    "Server",
    "Settings",
    "Upload",
    "broadcast",
    "check",
    "client_init",
    "client_round",
    "prompt",
    "schedule",
    "server_exchange",
    "server_init",
    "server_round",
]

ABOUT = replace(
    secfpp.ABOUT,
    privacy="none: the server sees every prompt",
    discloses=(Disclosure("each client's prompt, to the server every round", "upload"), *secfpp.ABOUT.discloses[1:]),
    server_uses="each",
)


@dataclass(frozen=True)
class PlaintextExchange:
    """An exchange that hides nothing.

    Attributes:
        setup: says how finely points are quantized, and which clusters are too small.
        points: [n, d].
        changes: [n, M E].
        clients: the participants' numbers.
    """

    setup: secure.Setup
    points: NDArray[np.float64]
    changes: NDArray[np.float64]
    clients: tuple[int, ...]

    def cluster(self, start: secure.Start) -> secure.Clusters:
        """See `secfpp.Exchanged`."""
        distances = secure.PlainDistances(self.setup.points.integers(self.points, clip=True))
        return secure.finish(secure.search(distances, start, secure.ITERATIONS))

    def average(self, sets: Sequence[frozenset[int]]) -> secure.Averages:
        """See `secfpp.Exchanged`."""
        changes = self.changes.clip(-self.setup.vector_largest, self.setup.vector_largest)
        large = [len(members) >= self.setup.minimum for members in sets]
        means = [
            changes[sorted(members)].mean(0) if enough else None for members, enough in zip(sets, large, strict=True)
        ]
        return secure.Averages(tuple(means), tuple(sets))


def server_exchange(
    settings: Settings,
    model: PromptModel,
    server: Server,
    upload: Upload,
    clients: Sequence[int],
    round_context: RoundContext,
    carrier: secure.Carrier,
) -> PlaintextExchange:
    """Return what the server sees, which is everything; see `base` for its arguments."""
    points, changes = secfpp.reduced(settings, model, server.start, upload, round_context)
    setup = secfpp.agreed(settings, model, len(clients), changes.shape[1], round_context.round)
    return PlaintextExchange(setup, points, changes, tuple(clients))
