"""The numbers of a secure sum, chosen: threshold, step, shares of noise, ring."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sordino.secure.errors import SecureError
from sordino.secure.sums.charge import MOST_DIVERGENCE, charge
from sordino.secure.sums.discrete_gaussian import LARGEST_DEVIATION
from sordino.secure.sums.setup import SumSetup, check_threshold, default_threshold

GROWTH = 1e-3  # of the sensitivity by rounding, at most
FINEST = 1000  # steps of a client's deviation, at least: rounding it up to a whole step adds a part in 1,000 at most


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
    """Return the numbers of a sum; see `SumSetup` for what they mean.

    The step is the largest power of two with which rounding makes the sensitivity larger by a part `growth` at most, a
    client's deviation has 1,000 steps or more, and noise differs from a continuous Gaussian by 10^-9 at most. The ring
    has 32 bits where these suffice.

    Args:
        largest: by default the clip, where the client is the unit. It must not depend on the data.
        noise_multiplier: z. Each client adds a share of variance sigma^2 / (t - T), so that the sum of any t survivors
            has noise sigma = z times the sensitivity, quantization included, for T colluders who take their own shares
            off. With more survivors there is more noise; `SumSetup.charge` says how much. 0 adds none.
        deviations: a number or [n], in the vectors' units: what each client adds, in place of a noise multiplier; the
            next whole steps above.
        threshold: by default floor(2 n / 3) + 1, or more where T asks for it.

    Raises:
        SecureError: there is no such sum; the message names the numbers and what to change.
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
    rough = SumSetup(
        round=round,
        session=session,
        clients=clients,
        threshold=default_threshold(clients, colluders) if threshold is None else threshold,
        colluders=colluders,
        dimension=dimension,
        step=_power_of_two(growth * clip * (2 if unit == "client" else 1) / math.sqrt(max(1, dimension))),
        largest=float(clip if largest is None else largest),
        unit=unit,
        clip=float(clip),
        ring_bits=64,
        deviations=np.zeros(max(0, min(clients, 2**20)), np.int64),
    )
    if noise_multiplier or deviations is not None:
        rough = _noised(rough, noise_multiplier, None if deviations is None else np.asarray(deviations, np.float64))
    rough.check()
    if rough.largest_sum < 2**31:
        rough = replace(rough, ring_bits=32)
    return rough


def _noised(setup: SumSetup, noise_multiplier: float, added: NDArray[np.float64] | None) -> SumSetup:
    """The setup with shares of noise, and a step as fine as these need."""
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
    """Each client's deviation in steps, with which t - T of them are charged the noise multiplier."""
    variance = (noise_multiplier * setup.sensitivity) ** 2 * (1 + 1e-12) + 1 / 12
    share = math.ceil(math.sqrt(variance / (setup.threshold - setup.colluders)))
    return np.full(setup.clients, share, np.float64)


def _fine_enough(setup: SumSetup) -> bool:
    """Whether the t clients with the least noise, less T colluders, have noise like a continuous Gaussian's."""
    weakest = np.sort(setup.deviations)[: setup.threshold].tolist()
    try:
        return charge(weakest, setup.colluders, setup.sensitivity, setup.dimension).divergence <= MOST_DIVERGENCE
    except SecureError:
        return False


def _power_of_two(number: float) -> float:
    """The largest power of two that is not larger."""
    return 2.0 ** (math.frexp(number)[1] - 1)
