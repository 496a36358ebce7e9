"""Intervals of 95%, against scipy's, against other formulas, and against what they promise: how often they cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_rel

from sordino.results.interval import Interval, crossed, paired, points
from sordino.runtime.paired import paired_variance

DIFFERENCES = st.lists(st.floats(-0.4, 0.4), min_size=3, max_size=9)


@given(DIFFERENCES)
def test_a_paired_interval_is_students(differences: list[float]) -> None:
    interval = paired(differences)
    if np.std(differences) < 1e-9:
        return
    expected = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert interval == pytest.approx(
        (np.mean(differences), max(-1.0, expected.low), min(1.0, expected.high)), rel=1e-6, abs=1e-9
    )


def test_one_value_has_no_interval() -> None:
    assert paired([0.2]) == (0.2, None, None)
    assert paired([0.2]).percent() == "-"
    assert not paired([0.2]).above
    assert crossed(0.2, [0.2], 1, None, 0.1) == (0.2, None, None)


def test_ends_are_shown_in_percent_and_never_as_minus_zero() -> None:
    assert Interval(0.01, -0.019, 0.04).percent() == "-1.9 to 4.0"
    assert points(-0.0001) == "0.0"
    assert (Interval(0.1, 0.05, 0.2).above, Interval(0.1, -0.05, 0.2).above) == (True, False)
    assert (Interval(-0.1, -0.2, -0.01).below, Interval(0.1, -0.05, 0.2).below) == (True, False)


def drawn(generator: np.random.Generator, clients: int, pictures: int) -> torch.Tensor:
    return torch.from_numpy(generator.integers(-1, 2, (clients, pictures)).astype(float))


def of_run(differences: torch.Tensor, shares: torch.Tensor) -> Interval:
    """The interval of a run whose clients have these weighted differences."""
    variance = paired_variance(differences, shares)
    clients = (differences * shares / shares.sum(1, keepdim=True)).sum(1).tolist()
    mean = float(np.mean(clients))
    return crossed(mean, clients, variance.pictures, variance.over_pictures, variance.over_pairs)


def test_a_shared_prompt_has_the_paired_interval_over_pictures() -> None:
    """All clients have the same accuracy then; over clients alone the interval would be of width zero."""
    generator = np.random.default_rng(0)
    one, two = generator.random((2, 60)) < [[0.7], [0.5]]
    differences = torch.from_numpy(one.astype(float) - two.astype(float)).expand(5, -1)
    interval = of_run(differences, torch.ones(5, 60, dtype=torch.float64))
    expected = ttest_rel(one.astype(float), two.astype(float)).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_clients_on_pictures_of_their_own_have_the_paired_interval_over_clients() -> None:
    """Pictures of a client then tell nothing that the client's difference does not: no variance counts twice."""
    generator = np.random.default_rng(1)
    chance = np.array([[0.2], [0.5], [0.6], [0.9]])
    differences = torch.from_numpy((generator.random((4, 80)) < chance).astype(float))
    shares = torch.block_diag(*[torch.ones(1, 20, dtype=torch.float64)] * 4)
    own = (differences * shares).sum(1) / 20
    variance = paired_variance(differences, shares)
    assert variance.over_pictures == pytest.approx(variance.over_pairs * 80 / 79)
    interval = of_run(differences, shares)
    expected = ttest_1samp(own.numpy(), 0.0).confidence_interval(0.95)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low == pytest.approx(expected.low, abs=0.01)
    assert interval.high == pytest.approx(min(1.0, expected.high), abs=0.01)


def test_variances_are_those_of_loops() -> None:
    generator = np.random.default_rng(2)
    differences, shares = drawn(generator, 3, 7), torch.from_numpy(generator.random((3, 7)))
    shares[:, 6], shares[0, 2] = 0.0, 0.0
    idle = torch.zeros(1, 7, dtype=torch.float64)  # a client without such pictures
    variance = paired_variance(torch.cat([differences, idle + 1]), torch.cat([shares, idle]))
    weights = [[float(share / row.sum() / 3) for share in row] for row in shares]
    mean = sum(weights[k][t] * float(differences[k, t]) for k in range(3) for t in range(7))
    parts = [[weights[k][t] * (float(differences[k, t]) - mean) for t in range(7)] for k in range(3)]
    assert variance.pictures == 6
    assert variance.over_pairs == pytest.approx(sum(part**2 for row in parts for part in row))
    assert variance.over_pictures == pytest.approx(6 / 5 * sum(sum(row[t] for row in parts) ** 2 for t in range(7)))
    assert paired_variance(differences[:, :1], shares[:, :1]).over_pictures is None


@pytest.mark.parametrize(("of_clients", "of_pictures"), [(0.0, 0.3), (0.1, 0.0), (0.1, 0.3)])
def test_a_run_covers_the_truth_as_often_as_it_says(of_clients: float, of_pictures: float) -> None:
    """Eight clients with effects of their own on 100 shared pictures with effects of theirs; the truth is 0.1.

    Of 400 intervals that cover with 95%, fewer than 366 cover with a probability below 0.2%, by the binomial
    distribution. Over clients alone the first and third case would fail by far.
    """
    generator = np.random.default_rng(3)
    covered = narrow = 0
    for _ in range(400):
        clients = generator.normal(0, of_clients, (8, 1))
        pictures = generator.normal(0, of_pictures, (1, 100))
        differences = torch.from_numpy(0.1 + clients + pictures + generator.normal(0, 0.3, (8, 100)))
        interval = of_run(differences, torch.ones(8, 100, dtype=torch.float64))
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 0.1 <= interval.high
        over_clients = paired(differences.mean(1).tolist())
        assert over_clients.low is not None
        assert over_clients.high is not None
        narrow += over_clients.low <= 0.1 <= over_clients.high
    assert covered >= 366
    if of_pictures:
        assert narrow < 366
