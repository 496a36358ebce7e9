"""Privacy loss distributions that are computed for all points of the grid at once, against dp-accounting's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

from sordino.privacy.accountants import Kinds, composed, quiet
from sordino.privacy.loss_distributions import composition, hockey_stick, one_release

RATES = (1e-9, 1e-4, 0.01, 0.5, 0.99, 0.999999, 1.0)


@pytest.mark.parametrize("adjacency", [AdjacencyType.ADD, AdjacencyType.REMOVE])
@pytest.mark.parametrize("rate", RATES)
def test_delta_is_that_of_dp_accounting(rate: float, adjacency: AdjacencyType) -> None:
    """At losses between and beyond those that an output has, at 0, and at the limit that no output reaches."""
    limit = -math.log1p(-rate) if rate < 1 else 30.0
    epsilons = np.concatenate([np.linspace(-5, 5, 201), [0.0, limit, -limit, 0.999 * limit, -0.999 * limit]])
    for multiplier in (0.3, 1.0, 20.0):
        loss = GaussianPrivacyLoss(multiplier, sampling_prob=rate, adjacency_type=adjacency)
        with quiet():
            np.testing.assert_allclose(
                hockey_stick(loss, epsilons), loss.get_delta_for_epsilon(epsilons), rtol=1e-12, atol=1e-15
            )


@pytest.mark.parametrize(
    "kinds",
    [
        ((1.0, 0.5, 1),),
        ((0.7, 0.01, 30),),
        ((2.0, 1.0, 7),),
        ((0.9, 0.25, 3), (1.5, 1.0, 1), (3.0, 0.1, 40)),
    ],
)
def test_a_composition_has_the_epsilon_of_dp_accounting(kinds: Kinds) -> None:
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    with quiet():
        accountant.compose(composed(kinds))
        found = composition(kinds, 1e-3)
        for delta in (1e-2, 1e-5, 1e-9):
            assert found.get_epsilon_for_delta(delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-12)


def test_a_rate_that_rounds_to_one_is_like_one() -> None:
    """dp-accounting itself ends with an error at some of the losses here."""
    delta = 1e-5
    nearly = one_release(1.0, 1 - 2**-53, 1e-3).get_epsilon_for_delta(delta)
    assert nearly == pytest.approx(one_release(1.0, 1.0, 1e-3).get_epsilon_for_delta(delta), abs=1e-6)
