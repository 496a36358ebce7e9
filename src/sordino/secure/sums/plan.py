"""The choice of the numbers of a secure sum: threshold, step, shares of noise, ring."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sordino.secure.errors import SecureError
from sordino.secure.sums.charge import MOST_DIVERGENCE, charge
from sordino.secure.sums.discrete_gaussian import LARGEST_DEVIATION
from sordino.secure.sums.setup import SumSetup, check_threshold, default_threshold

GROWTH = 1e-3  # the largest relative growth of the sensitivity by rounding
# The fewest steps of a client's deviation; rounding it up to a whole step adds at most a part in
# 1,000.
FINEST = 1000


def plan_sum(
    *,
    session: str,
    clients: int,
    dimension: int,
    clip: float,
    round: int = 1,
    unit: str = "client",
    largest: float | None = None,
    noise_multiplier: float = 0.0,
    deviations: ArrayLike | None = None,
    threshold: int | None = None,
    colluders: int = 1,
    growth: float = GROWTH,
) -> SumSetup:
    """Choose the numbers of a sum; see `SumSetup` for their meaning.

    The step is the largest power of two with three properties. Rounding makes the sensitivity
    larger by a fraction `growth` at most. A client's deviation has 1,000 steps or more. Noise
    differs from a continuous Gaussian by 10^-9 at most. The ring has 32 bits if these suffice.

    Args:
        largest: by default the clip, if the client is the unit. It must not depend on the data.
        noise_multiplier: z. Each client adds a share of variance sigma^2 / (t - T). So the sum of
            any t survivors has noise sigma = z times the sensitivity, quantization included, for T
            colluders who subtract their own shares. With more survivors there is more noise;
            `SumSetup.charge` computes it. 0 adds none.
        deviations: a number or [n], in the vectors' units: the deviations of the clients' noise, in
            place of a noise multiplier. They are rounded up to whole steps.
        threshold: by default floor(2 n / 3) + 1, or more if T requires it.

    Raises:
        SecureError: there is no such sum; the message names the numbers and the remedy.
    """
    if not (math.isfinite(clip) and clip > 0 and 0 < growth < 1 and 0 <= noise_multiplier < math.inf):
        raise SecureError(
            f"clip = {clip}, growth = {growth}, noise_multiplier = {noise_multiplier}: must be positive and finite, "
            "growth below 1; the noise may be 0"
        )
    if largest is None and unit == "example":
        raise SecureError(
            "largest must be given where the unit is the example: it bounds an entry of a client's vector"
        )
    growth_in_norm = growth * clip * (2 if unit == "client" else 1)
    rough = SumSetup(
        round=round,
        session=session,
        clients=clients,
        threshold=default_threshold(clients, colluders) if threshold is None else threshold,
        colluders=colluders,
        dimension=dimension,
        step=_power_of_two(growth_in_norm / math.sqrt(max(1, dimension))),
        largest=float(clip if largest is None else largest),
        unit=unit,
        clip=float(clip),
        ring_bits=64,
        deviations=np.zeros(max(0, min(clients, 2**20)), np.int64),
    )
    if noise_multiplier or deviations is not None:
        rough = _noised(
            rough,
            noise_multiplier,
            None if deviations is None else np.asarray(deviations, np.float64),
        )
    rough.check()
    if rough.largest_sum < 2**31:
        rough = replace(rough, ring_bits=32)
    return rough


def _noised(
    setup: SumSetup,
    noise_multiplier: float,
    added: NDArray[np.float64] | None,
) -> SumSetup:
    """Add shares of noise to a setup, and choose a step that is fine enough for them."""
    check_threshold(setup.clients, setup.threshold, setup.colluders, noised=True)
    if setup.dimension < 1 or (added is not None and added.shape not in ((), (setup.clients,))):
        shape = None if added is None else added.shape
        raise SecureError(
            f"dimension = {setup.dimension} with deviations of shape {shape}: must be 1 or more entries, and one "
            f"number or {setup.clients}"
        )
    while True:
        steps = (
            _shares(setup, noise_multiplier)
            if added is None
            else np.ceil(np.broadcast_to(added, setup.clients) / setup.step)
        )
        if not (np.isfinite(steps).all() and steps.min() > 0 and steps.max() <= LARGEST_DEVIATION):
            raise SecureError(
                f"a client's noise would be {steps.min():.4g} to {steps.max():.4g} steps of {setup.step:.3g}: must be "
                f"1 to 2^26 = {LARGEST_DEVIATION}; with very much noise allow more growth, with very little use more"
            )
        noised = replace(setup, deviations=steps.astype(np.int64))
        if steps.min() >= FINEST and _fine_enough(noised):
            return noised
        setup = replace(setup, step=setup.step / 2)


def _shares(setup: SumSetup, noise_multiplier: float) -> NDArray[np.float64]:
    """Compute each client's deviation in steps, so that t - T of them are charged the noise multiplier."""
    variance = (noise_multiplier * setup.sensitivity) ** 2 * (1 + 1e-12) + 1 / 12
    share = math.ceil(math.sqrt(variance / (setup.threshold - setup.colluders)))
    return np.full(setup.clients, share, np.float64)


def _fine_enough(setup: SumSetup) -> bool:
    """Return true if the t clients with the least noise, less T colluders, have noise like a continuous Gaussian's."""
    weakest = np.sort(setup.deviations)[: setup.threshold].tolist()
    try:
        worst = charge(weakest, setup.colluders, setup.sensitivity, setup.dimension)
    except SecureError:
        return False
    return worst.divergence <= MOST_DIVERGENCE


def _power_of_two(number: float) -> float:
    """Return the largest power of two that is not larger than a number."""
    return 2.0 ** (math.frexp(number)[1] - 1)
