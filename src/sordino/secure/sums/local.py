"""A secure sum in one process: every message is made into bytes and read back, as on a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sordino.errors import DataError
from sordino.secure.errors import SecureError
from sordino.secure.local import Traffic, run_exchange
from sordino.secure.sums.charge import Charge
from sordino.secure.sums.client import SumClient
from sordino.secure.sums.discrete_gaussian import Bits
from sordino.secure.sums.server import SecureSum, SumServer
from sordino.secure.sums.setup import SumSetup

Stage = Literal["advertise", "share", "mask", "confirm", "unmask"]
STAGES: tuple[Stage, ...] = ("advertise", "share", "mask", "confirm", "unmask")


@dataclass(frozen=True)
class NoisedSum:
    """A sum, and what it costs.

    Attributes:
        values: the sum of the survivors' clipped and quantized values with their noise, in the values' units.
        survivors: whose values are in it, ascending.
        charge: what a ledger charges for it; None for a sum without noise.
        bytes_by_client: [n], sent and received.
    """

    values: NDArray[np.float64]
    survivors: tuple[int, ...]
    charge: Charge | None
    bytes_by_client: tuple[int, ...]


def noised_sum(
    setup: SumSetup,
    values: ArrayLike,
    *,
    dropped: Mapping[Stage, Iterable[int]] | None = None,
    bits: Sequence[Bits] | None = None,
) -> NoisedSum:
    """Return the sum over clients of values [n, ...], of any shape with d entries a client; see `local_sum`.

        setup = plan_sum(session=secrets.token_hex(16), clients=10, dimension=12, clip=1.0, noise_multiplier=2.0)
        outcome = noised_sum(setup, uploads)      # uploads [10, 3, 4]
        outcome.values                            # [3, 4]
        outcome.charge.noise_multiplier           # at least 2.0, more with more survivors than the threshold

    Raises:
        SecureError: fewer than t clients survive.
        DataError: the values do not fit the setup.
    """
    array = np.asarray(values, np.float64)
    flat = array.reshape(len(array), -1) if array.ndim else array
    opened, traffic = local_sum(setup, flat, dropped=dropped, bits=bits)
    noised = bool(setup.deviations.any())
    return NoisedSum(
        opened.values.reshape(array.shape[1:]),
        opened.survivors,
        setup.charge(opened.survivors) if noised else None,
        tuple(traffic.of_client(client) for client in range(setup.clients)),
    )


def local_sum(
    setup: SumSetup,
    vectors: ArrayLike,
    *,
    dropped: Mapping[Stage, Iterable[int]] | None = None,
    bits: Sequence[Bits] | None = None,
) -> tuple[SecureSum, Traffic]:
    """Play all parties of one sum.

    Args:
        setup: the sum's numbers.
        vectors: [n, d], each client's, in their units.
        dropped: the clients who vanish before they answer a stage: "advertise", "share", "mask", "confirm" or
            "unmask". Clients who vanish before the last two are in the sum.
        bits: for simulations, each client's source of uniform 64-bit integers for its noise, [n]. By default it is the
            operating system.

    Raises:
        SecureError: the setup is not in order, or fewer than t clients answer a stage.
        DataError: the vectors do not fit the setup.
    """
    rows = np.asarray(vectors, np.float64)
    if rows.shape != (setup.clients, setup.dimension):
        raise DataError(f"vectors of shape {rows.shape} where {(setup.clients, setup.dimension)} are summed")
    if bits is not None and len(bits) != setup.clients:
        raise SecureError(f"{len(bits)} sources of noise for {setup.clients} clients; give one each")
    drop: dict[int, int] = {}
    for stage, clients in (dropped or {}).items():
        if stage not in STAGES:
            raise SecureError(f"stage {stage!r}: must be one of {', '.join(STAGES)}")
        for client in clients:
            drop[client] = min(STAGES.index(stage) + 1, drop.get(client, len(STAGES)))
    parties = [
        SumClient(setup, number, row) if bits is None else SumClient(setup, number, row, bits=bits[number])
        for number, row in enumerate(rows)
    ]
    traffic = Traffic()
    return run_exchange(SumServer(setup).sum(), parties, traffic, drop), traffic
