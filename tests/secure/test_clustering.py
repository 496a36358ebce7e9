"""K-means and its number of clusters, in the clear, from distances alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from sordino.secure.adaptive import Adaptive, adaptive, closest
from sordino.secure.clustering import Clusters, farthest_first, lloyd, silhouette
from sordino.secure.distances import Exchange, Integers, PlainDistances, Set, finish
from sordino.secure.errors import SecureError


class Scaled(PlainDistances):
    """Distances of which only the ratios in a row mean anything; and which may be too few."""

    def __init__(self, points: np.ndarray, comparable: bool, most: int = 10**6) -> None:
        super().__init__(points)
        self.comparable, self.most, self.seen = comparable, most, set[Set]()
        factors = np.random.default_rng(0).integers(1, 10**6, len(points)).tolist()
        self.factors = np.array([1] * len(points) if comparable else factors, object)

    def affords(self, sets: Sequence[Set]) -> bool:
        return len(self.seen | {*sets}) <= self.most

    def columns(self, sets: Sequence[Set]) -> Exchange[Integers]:
        assert self.affords(sets)
        self.seen |= {*sets}
        columns = yield from super().columns(sets)
        return columns * self.factors[:, None]


def groups(clients: int, width: int, count: int, gap: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Integer points [N, d] in `count` groups; squared distance within a group about 2, between centers `gap`."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(count, width)) * np.sqrt(gap / 2 / width)
    labels = np.arange(clients) % count
    points = centers[labels] * (count > 1) + generator.normal(size=(clients, width)) / np.sqrt(width)
    return np.rint(points * 2**16).astype(np.int64), labels


def reference(points: np.ndarray, centers: np.ndarray, iterations: int = 300) -> np.ndarray:
    kmeans = KMeans(len(centers), init=centers.astype(float), n_init=1, algorithm="lloyd", tol=0, max_iter=iterations)
    labels: np.ndarray = kmeans.fit(points.astype(float)).labels_
    return labels


# Lloyd's algorithm


@pytest.mark.parametrize("comparable", [True, False])
@given(st.integers(8, 40), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_assignments_are_those_of_scikit_learn(
    comparable: bool, clients: int, width: int, count: int, seed: int
) -> None:
    points = np.random.default_rng(seed).integers(-(2**20), 2**20, (clients, width))
    first = [frozenset({client}) for client in range(count)]
    found = finish(lloyd(Scaled(points, comparable), first, 300))
    assert found.converged
    assert found.labels.tolist() == reference(points, points[:count]).tolist()
    assert [sorted(members) for members in found.sets] == [
        np.flatnonzero(found.labels == number).tolist() for number in range(count)
    ]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_so_they_are_when_stopped_early(seed: int, iterations: int) -> None:
    points = np.random.default_rng(seed).integers(-(2**20), 2**20, (40, 2))
    found = finish(lloyd(PlainDistances(points), [frozenset({client}) for client in range(5)], iterations))
    expected = KMeans(5, init=points[:5].astype(float), n_init=1, algorithm="lloyd", tol=0, max_iter=iterations)
    assert found.labels.tolist() == expected.fit(points.astype(float)).labels_.tolist()


@given(st.integers(0, 2**32 - 1))
def test_an_emptied_cluster_is_refounded_as_scikit_learn_does(seed: int) -> None:
    """First centers in one place: the lower number takes all, and the farthest client founds the other."""
    points = np.random.default_rng(seed).integers(-(2**20), 2**20, (12, 3))
    points[1] = points[0]
    found = finish(lloyd(PlainDistances(points), [frozenset({0}), frozenset({1}), frozenset({2})], 300))
    assert found.labels.tolist() == reference(points, points[:3]).tolist()
    assert found.count == 3


def test_a_tie_goes_to_the_lowest_number() -> None:
    points = np.array([[-2], [0], [2], [0]])
    found = finish(lloyd(PlainDistances(points), [frozenset({2}), frozenset({0})], 1))
    assert found.labels.tolist() == [1, 0, 0, 0]


def test_equal_points_are_one_cluster_whatever_was_asked() -> None:
    found = finish(lloyd(PlainDistances(np.full((5, 2), 7)), [frozenset({0}), frozenset({1}), frozenset({2})], 10))
    assert found.labels.tolist() == [0] * 5
    assert found.count == 1
    assert found.converged


def test_it_stops_where_no_more_may_be_opened() -> None:
    points, _ = groups(30, 2, 4, 1.0, 3)
    first = [frozenset({client}) for client in range(4)]
    assert finish(lloyd(Scaled(points, True), first, 50)).iterations > 3
    few = Scaled(points, True, most=9)
    found = finish(lloyd(few, first, 50))
    assert not found.converged
    assert len(few.seen) <= 9
    assert {*found.labels.tolist()} <= {0, 1, 2, 3}
    assert found.labels.min() >= 0
    with pytest.raises(SecureError, match="do not suffice for 4 clusters"):
        finish(lloyd(Scaled(points, True, most=3), first, 50))


def test_farthest_first_spreads_its_choices() -> None:
    """No client is farther from its nearest choice than twice the best radius (Gonzalez, 1985)."""
    points, labels = groups(40, 16, 4, 20.0, 1)
    chosen = [next(iter(each)) for each in finish(farthest_first(PlainDistances(points), 4))]
    assert sorted(labels[chosen].tolist()) == [0, 1, 2, 3]
    whole = ((points - points.mean(0)) ** 2).sum(1)
    assert chosen[0] == whole.argmax()


# The number of clusters


@pytest.mark.parametrize("comparable", [True, False])
@pytest.mark.parametrize(("clients", "count"), [(12, 4), (12, 2), (40, 4), (40, 8), (30, 3)])
def test_groups_are_found_and_counted(comparable: bool, clients: int, count: int) -> None:
    for seed in range(5):
        points, labels = groups(clients, 64, count, 8.0, seed)
        found = finish(adaptive(Scaled(points, comparable), Adaptive(), 50))
        assert adjusted_rand_score(labels, found.labels) == 1.0
        assert found.labels.tolist() == labels.tolist()  # numbered by their lowest client


@pytest.mark.parametrize("comparable", [True, False])
def test_one_cluster_is_possible(comparable: bool) -> None:
    for seed in range(5):
        points, _ = groups(40, 64, 1, 0.0, seed)
        assert finish(adaptive(Scaled(points, comparable), Adaptive(), 50)).count == 1
    assert finish(adaptive(Scaled(np.zeros((6, 2)), comparable), Adaptive(), 50)).count == 1


def test_there_are_no_more_clusters_than_allowed() -> None:
    points, labels = groups(24, 64, 4, 8.0, 0)
    assert finish(adaptive(PlainDistances(points), Adaptive(most=2), 50)).count <= 2
    assert finish(adaptive(PlainDistances(points), Adaptive(most=1), 50)).count == 1
    assert finish(adaptive(PlainDistances(points), Adaptive(most=4), 50)).labels.tolist() == labels.tolist()


def test_close_centers_are_merged() -> None:
    """Noise is split while its spread is above the threshold, and merged again, because its halves are too close."""
    points, _ = groups(40, 64, 1, 0.0, 0)
    eager = Adaptive(split=0.0, merge=0.0, silhouette=-1.0)
    assert finish(adaptive(PlainDistances(points), eager, 50)).count > 1
    assert finish(adaptive(PlainDistances(points), Adaptive(split=0.0, merge=1.0, silhouette=-1.0), 50)).count == 1


def test_chance_alone_does_not_keep_centers_apart() -> None:
    """Random thirds of noise are merged, though their centers are two thirds of a spread apart; true groups are not."""
    for seed in range(5):
        for gap, merged in ((0.0, True), (3.0, False)):
            points, labels = groups(9, 256, 3 if gap else 1, gap, seed)
            labels = np.arange(9) % 3
            sets = tuple(frozenset(range(k, 9, 3)) for k in range(3))
            spreads = tuple(float(points[labels == k].var(0, ddof=1).sum()) for k in range(3))
            state = Clusters(tuple(range(9)), labels, sets, 2, True, 0.0, spreads)
            apart = ((points[labels == 0].mean(0) - points[labels == 1].mean(0)) ** 2).sum() / spreads[0]
            assert apart > 0.4
            assert (finish(closest(PlainDistances(points), state, 0.25)) is not None) == merged


def test_few_columns_give_a_clustering_all_the_same() -> None:
    points, _ = groups(20, 64, 4, 8.0, 0)
    for most in range(1, 15):
        found = finish(adaptive(Scaled(points, True, most=most), Adaptive(), 50))
        assert len(found.labels) == 20
        assert found.labels.min() >= 0


def test_spreads_are_unbiased_variances() -> None:
    points, labels = groups(30, 8, 3, 50.0, 2)
    found = finish(adaptive(PlainDistances(points), Adaptive(), 50))
    assert found.labels.tolist() == labels.tolist()
    expected = [points[labels == number].var(0, ddof=1).sum() for number in range(3)]
    np.testing.assert_allclose(found.spreads, expected, rtol=1e-9)


def test_the_silhouette_is_that_of_the_other_members_center() -> None:
    points, labels = groups(24, 8, 3, 10.0, 0)
    sizes = np.bincount(labels)[labels]
    own, other = np.empty(24), np.full(24, np.inf)
    expected = []
    for i, x in enumerate(points):
        without = points[(labels == labels[i]) & (np.arange(24) != i)].mean(0)
        own[i] = ((x - points[labels == labels[i]].mean(0)) ** 2).sum()
        other[i] = min(((x - points[labels == k].mean(0)) ** 2).sum() for k in range(3) if k != labels[i])
        a, b = np.linalg.norm(x - without), np.sqrt(other[i])
        expected.append((b - a) / max(a, b))
    assert silhouette(own, other, sizes) == pytest.approx(np.mean(expected))
    assert abs(np.mean(expected) - silhouette_score(points, labels)) < 0.2  # of a kind with Rousseeuw's


def test_noise_has_no_silhouette() -> None:
    """Split at random, pure noise gives nothing, while the silhouette with biased centers gives a good deal."""
    generator = np.random.default_rng(0)
    points, labels = generator.normal(size=(120, 64)), np.arange(120) % 40
    centers = np.stack([points[labels == k].mean(0) for k in range(40)])
    distances = ((points[:, None] - centers) ** 2).sum(-1)
    own = distances[np.arange(120), labels]
    distances[np.arange(120), labels] = np.inf
    sizes = np.full(120, 3)
    assert silhouette(own, distances.min(1), sizes) < 0
    assert (1 - np.sqrt(own / distances.min(1))).mean() > 0.15
