"""The search over pairs: what it finds, and that noise does not look like structure to it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics import adjusted_rand_score, silhouette_score

from sordino.secure import Client, Pairs, PlainDistances, SecureError, Server, finish, plan, run, search
from sordino.secure.pairs import _Derived, chance, effective_dimensions, silhouette_of


def points_of(clients: int, width: int, count: int, gap: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centers = gap * generator.normal(size=(count, width))
    points = centers[np.arange(clients) % count] + generator.normal(size=(clients, width))
    return np.rint(1000 * points).astype(np.int64)


def found(points: np.ndarray, how: Pairs | None = None) -> list[int]:
    labels: list[int] = finish(search(PlainDistances(points), how or Pairs(), 50)).labels.tolist()
    return labels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clients", "width", "count", "gap"), [(12, 50, 4, 1.5), (12, 2, 3, 40.0), (24, 5, 3, 4.0), (40, 20, 4, 2.0)]
)
def test_groups_are_found_in_few_and_in_many_dimensions(clients: int, width: int, count: int, gap: float) -> None:
    scores = [
        adjusted_rand_score(np.arange(clients) % count, found(points_of(clients, width, count, gap, seed)))
        for seed in range(10)
    ]
    assert np.mean(scores) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "width"), [(12, 2), (12, 20), (12, 100), (40, 5)])
def test_noise_is_one_cluster(clients: int, width: int) -> None:
    """Splits that are none are kept about as rarely as the level of the test says."""
    split = [max(found(points_of(clients, width, 1, 0.0, seed))) > 0 for seed in range(30)]
    assert sum(split) <= 7


@pytest.mark.slow
def test_more_significance_never_splits_less() -> None:
    for seed in range(5):
        points = points_of(12, 20, 3, 0.7, seed)
        counts = [max(found(points, Pairs(significance=level))) for level in (0.001, 0.05, 0.5, 0.999)]
        assert counts == sorted(counts)


def test_a_known_number_of_clusters_is_kept() -> None:
    points = points_of(12, 20, 4, 3.0, 0)
    assert [max(found(points, Pairs(count=count))) + 1 for count in (1, 2, 3, 4, 6)] == [1, 2, 3, 4, 6]


def test_no_cluster_is_smaller_than_the_smallest() -> None:
    points = points_of(12, 5, 1, 0.0, 3)
    points[0] += 100_000  # one client far from all
    for smallest in (2, 3, 4):
        assert np.bincount(found(points, Pairs(smallest, significance=0.999))).min() >= smallest


def test_the_silhouette_is_scikit_learns() -> None:
    points = points_of(9, 3, 3, 1.0, 0)
    labels = np.array([1, 1, 2, 3, 2, 2, 1, 2, 3])
    for each in (labels, np.array([1, 1, 2, 3, 2, 2, 1, 2, 2])):  # the second with one client alone
        assert silhouette_of(squareform(pdist(points)), each) == pytest.approx(silhouette_score(points, each))


def test_effective_dimensions_are_those_of_the_scatter() -> None:
    generator = np.random.default_rng(0)
    for width in (2, 8, 64):
        matrix = squareform(pdist(generator.normal(size=(60, width))))
        assert effective_dimensions(matrix, np.zeros(60)) == pytest.approx(width, rel=0.35)
    stretched = squareform(pdist(generator.normal(size=(60, 64)) * np.r_[10.0, np.full(63, 0.01)]))
    assert effective_dimensions(stretched, np.zeros(60)) == 1


def test_chance_is_a_quantile_and_falls_with_dimensions() -> None:
    for which in (0, 1):
        assert chance(12, 4, 2, 0.05)[which] > chance(12, 4, 2, 0.5)[which] > chance(12, 64, 2, 0.5)[which]


def test_distances_to_centers_follow_exactly_from_those_between_clients() -> None:
    points = points_of(9, 6, 2, 2.0, 0)
    plain = PlainDistances(points)
    between = finish(plain.columns([frozenset({client}) for client in plain.clients]))
    sets = [frozenset({0}), frozenset({1, 4, 5}), frozenset(range(9))]
    derived = finish(_Derived(plain.clients, between).columns(sets))
    assert (derived == finish(plain.columns(sets))).all()


@pytest.mark.parametrize("reveal", ["distances", "ratios"])
def test_on_shares_as_in_the_clear(reveal: str) -> None:
    points = points_of(12, 20, 4, 2.0, 1)
    largest = float(np.abs(points).max())
    columns = 12 if reveal == "distances" else 60
    setup = plan(clients=12, width=20, largest=largest, reveal=reveal, columns=columns)  # type: ignore[arg-type]
    outcome = run([Client(number, point) for number, point in enumerate(points)], Server(setup), Pairs())
    assert outcome.result.labels.tolist() == [0, 1, 2, 3] * 3
    if reveal == "distances":
        assert len(outcome.opened) == 12


def test_too_few_columns_are_refused_by_name() -> None:
    points = points_of(6, 4, 2, 3.0, 0)
    setup = plan(clients=6, width=4, largest=float(np.abs(points).max()), columns=5)
    with pytest.raises(SecureError, match="all of 6 clients"):
        run([Client(number, point) for number, point in enumerate(points)], Server(setup), Pairs())
