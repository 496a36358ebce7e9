"""SecFPP without shares: the server sees every client's prompt, and clusters and averages in the clear.

It is the oracle of `secfpp`, with the same settings. On the same prompts, quantized alike, it finds the same clusters,
and the same means up to their quantization. The difference in cost is the cost of the shares.
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
    Upload,
    broadcast,
    check,
    client_init,
    client_round,
    prompt,
    schedule,
    server_init,
    server_round,
    unused,
)
from sordino.algorithms.settings.secfpp import Settings
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
    "discloses",
    "prompt",
    "schedule",
    "server_exchange",
    "server_init",
    "server_round",
    "unused",
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
        setup: the quantization of points, and the smallest size of a cluster.
        points: [n, d], the reduced prompts.
        changes: [n, M E], of the domain-level parts since the start.
        clients: the participants' numbers.
    """

    setup: secure.Setup
    points: NDArray[np.float64]
    changes: NDArray[np.float64]
    clients: tuple[int, ...]

    def cluster(self, start: secure.Start) -> secure.Clusters:
        """Cluster the clients; see `secfpp.Exchanged`."""
        distances = secure.PlainDistances(self.setup.points.integers(self.points, clip=True))
        return secure.finish(secure.search(distances, start, secure.ITERATIONS))

    def average(self, sets: Sequence[frozenset[int]]) -> secure.Averages:
        """Return the clusters' means; see `secfpp.Exchanged`."""
        changes = self.changes.clip(-self.setup.vector_largest, self.setup.vector_largest)
        large = [len(members) >= self.setup.minimum for members in sets]
        means = [
            changes[sorted(members)].mean(0) if enough else None for members, enough in zip(sets, large, strict=True)
        ]
        return secure.Averages(tuple(means), tuple(sets))


def discloses(settings: Settings, rounds: int) -> tuple[Disclosure, ...]:
    return secfpp.disclosed(ABOUT, settings, rounds)


def server_exchange(
    settings: Settings,
    model: PromptModel,
    server: Server,
    upload: Upload,
    clients: Sequence[int],
    round_context: RoundContext,
    carrier: secure.Carrier,
) -> PlaintextExchange:
    """Return the exchange of a server that sees everything; see `base` for the arguments."""
    points, changes = secfpp.reduced(settings, model, server.start, upload, round_context)
    setup = secfpp.agreed(settings, model, len(clients), changes.shape[1], round_context.round)
    return PlaintextExchange(setup, points, changes, tuple(clients))
