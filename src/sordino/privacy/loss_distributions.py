"""Privacy loss distributions of Poisson-sampled Gaussian releases, on a grid of privacy losses.

The distributions are those of Google's dp-accounting, by Doroshenko, Ghazi, Kamath, Kumar and Manurangsi, "Connect the
Dots" (PoPETs 2022). Its own `from_gaussian_mechanism` inverts the privacy loss at one point of the grid after another,
which for a grid of 1e5 points takes most of the time. Here one call inverts it at all points, by the same operations.
dp-accounting takes a second to import, so functions that need it import it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dp_accounting.pld.pld_pmf import PLDPmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

Floats = NDArray[np.float64]


def composition(kinds: tuple[tuple[float, float, int], ...], interval: float) -> PrivacyLossDistribution:
    """Return the privacy loss distribution of a composition; an upper bound, as the grid rounds up.

    Args:
        kinds: noise multiplier above 0, sampling rate in (0, 1] and number of each kind of release.
        interval: step of the grid of privacy losses.
    """
    from dp_accounting.pld.privacy_loss_distribution import identity

    total = identity(value_discretization_interval=interval)
    for multiplier, rate, steps in kinds:
        if rate == 1:
            total = total.compose(one_release(multiplier / math.sqrt(steps), 1.0, interval))
        else:
            total = total.compose(one_release(multiplier, rate, interval).self_compose(steps))
    return total


def one_release(multiplier: float, rate: float, interval: float) -> PrivacyLossDistribution:
    """Return the privacy loss distribution of one release, for a unit that is removed and one that is added."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

    removed = _on_grid(GaussianPrivacyLoss(multiplier, sampling_prob=rate), interval)
    if rate == 1:
        return PrivacyLossDistribution(removed)
    added = GaussianPrivacyLoss(multiplier, sampling_prob=rate, adjacency_type=AdjacencyType.ADD)
    return PrivacyLossDistribution(removed, _on_grid(added, interval))


def _on_grid(loss: GaussianPrivacyLoss, interval: float) -> PLDPmf:
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap

    bounds = loss.connect_dots_bounds()
    lowest, highest = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
    deltas = hockey_stick(loss, np.arange(lowest, highest + 1) * interval)
    return create_pmf_pessimistic_connect_dots_fixed_gap(interval, lowest, highest, deltas)


def hockey_stick(loss: GaussianPrivacyLoss, epsilons: Floats) -> Floats:
    """Return delta at each epsilon [N]: `loss.get_delta_for_epsilon`, for the addition or removal of a unit."""
    rate, adding = loss.sampling_prob, loss.adjacency_type.name == "ADD"
    deltas = np.zeros(len(epsilons))
    reached = np.ones(len(epsilons), dtype=bool)  # the losses that some output has
    if rate < 1 and adding:
        reached = epsilons < -math.log1p(-rate)
    elif rate < 1:
        reached = epsilons > math.log1p(-rate)
        deltas[~reached] = -np.expm1(epsilons[~reached])
    losses = epsilons[reached]
    outputs = _outputs(loss, losses)
    deltas[reached] = loss.mu_upper_cdf(outputs) - np.exp(losses + loss.mu_lower_log_cdf(outputs))
    return np.clip(deltas, 0, 1)


def _outputs(loss: GaussianPrivacyLoss, losses: Floats) -> Floats:
    """Return the largest output with at least each of the given privacy losses [N].

    A sampled release has the loss log(1 - q + q exp(u)) if a unit is removed, where the same release without sampling
    has the loss u. If one is added, both change their sign.
    """
    rate, sign = loss.sampling_prob, -1.0 if loss.adjacency_type.name == "ADD" else 1.0
    if rate < 1:
        signed, limit = sign * losses, math.log(1 - rate)  # no output has a loss of the limit or less
        scaled, subtracted = signed + np.log(1 / rate), np.log(1 / rate - 1)
        unsampled = scaled + np.log1p(-np.exp(subtracted - scaled))
        unsampled = np.where(signed == 0, np.log(1 / rate + (1 - 1 / rate)), unsampled)
        close = np.abs(signed - limit) <= 1e-9 * np.maximum(np.abs(signed), abs(limit))
        losses = sign * np.where(close | (scaled <= subtracted), -np.inf, unsampled)
    shift = loss.sensitivity if sign < 0 else 0.0
    outputs: Floats = shift + (-0.5 * loss.sensitivity - losses * loss._standard_deviation**2 / loss.sensitivity)
    return outputs
