"""Partitions: whatever the scheme, each training picture has one owner; and what each scheme promises of its own."""

import datasets
import numpy as np
import pytest
from flwr_datasets import partitioner as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino.errors import ConfigError, DataError
from sordino.tasks.partitions import DRAW_STREAM, ROWS_STREAM, partition
from sordino.tasks.settings import PartitionSettings

LABELS = np.repeat(np.arange(10), 30)
DEMO = PartitionSettings(scheme="classes", clients=10, classes_per_client=2)


def classes_of(labels, parts):
    return [set(labels[part].tolist()) for part in parts]


@st.composite
def problems(draw):
    """Labels (each class at least 8 times, in any order), domains, and settings that they can serve."""
    classes = draw(st.integers(2, 12))
    counts = draw(st.lists(st.integers(8, 20), min_size=classes, max_size=classes))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    labels = rng.permutation(np.repeat(np.arange(classes), counts))
    domains = rng.permutation(np.arange(len(labels)) % 3)
    scheme = draw(st.sampled_from(["disjoint", "classes", "dirichlet", "iid", "domain"]))
    if scheme == "disjoint":
        chosen = PartitionSettings(scheme=scheme, clients=draw(st.integers(1, classes)))
    elif scheme == "classes":
        each = draw(st.integers(1, classes))
        clients = draw(st.integers(classes - each + 1, classes))
        shuffle = draw(st.booleans())
        chosen = PartitionSettings(scheme=scheme, clients=clients, classes_per_client=each, shuffle_classes=shuffle)
        if each > 8:  # more holders than a class may have pictures
            chosen = PartitionSettings(scheme=scheme, clients=classes, classes_per_client=8)
    elif scheme == "dirichlet":
        chosen = PartitionSettings(scheme=scheme, clients=draw(st.integers(1, 4)), beta=draw(st.floats(1.0, 1e6)))
    elif scheme == "iid":
        chosen = PartitionSettings(scheme=scheme, clients=draw(st.integers(1, 16)))
    else:
        chosen = PartitionSettings(
            scheme=scheme, clients=draw(st.integers(3, 9)), beta=draw(st.none() | st.floats(1.0, 1e6))
        )
    return labels, domains, chosen


@given(problems(), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_every_picture_goes_to_exactly_one_client_and_no_client_is_empty(problem, seed):
    labels, domains, chosen = problem
    parts = partition(labels, domains, chosen, seed)
    assert len(parts) == chosen.clients
    assert all(len(part) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    again = partition(labels, domains, chosen, seed)
    assert all(np.array_equal(part, other) for part, other in zip(parts, again, strict=True))


@pytest.mark.parametrize(
    "chosen",
    [
        PartitionSettings(scheme="disjoint", clients=5),
        DEMO,
        PartitionSettings(scheme="dirichlet", clients=5, beta=1.0),
        PartitionSettings(scheme="iid", clients=5),
        PartitionSettings(scheme="domain", clients=4),
    ],
    ids=lambda chosen: chosen.scheme,
)
def test_another_seed_gives_another_partition(chosen):
    domains = np.arange(len(LABELS)) % 2
    first, second = (partition(LABELS, domains, chosen, seed) for seed in (0, 1))
    assert any(not np.array_equal(part, other) for part, other in zip(first, second, strict=True))


@given(st.integers(1, 23), st.integers(0, 23), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_disjoint_deals_out_whole_classes_in_groups_that_differ_by_one(clients, more, seed):
    classes = clients + more
    labels = np.repeat(np.arange(classes), 3)
    owned = classes_of(labels, partition(labels, None, PartitionSettings(scheme="disjoint", clients=clients), seed))
    assert sum(map(len, owned)) == classes == len(set.union(*owned))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_disjoint_without_shuffling_follows_the_classes_order():
    chosen = PartitionSettings(scheme="disjoint", clients=5, shuffle_classes=False)
    assert classes_of(LABELS, partition(LABELS, None, chosen, 0)) == [{2 * i, 2 * i + 1} for i in range(5)]


def test_the_demo_gives_client_i_the_digits_i_and_i_plus_1_in_equal_parts():
    parts = partition(LABELS, None, DEMO, 3)
    assert classes_of(LABELS, parts) == [{i, (i + 1) % 10} for i in range(10)]
    for part in parts:
        assert sorted(np.unique(LABELS[part], return_counts=True)[1]) == [15, 15]


def test_shuffled_classes_keep_the_cycle_under_other_names():
    chosen = DEMO.model_copy(update={"shuffle_classes": True})
    owned = classes_of(LABELS, partition(LABELS, None, chosen, 0))
    assert owned != [{i, (i + 1) % 10} for i in range(10)]
    assert all(len(mine & following) == 1 for mine, following in zip(owned, owned[1:] + owned[:1], strict=True))


def test_a_huge_beta_makes_clients_alike():
    labels = np.repeat(np.arange(5), 400)
    parts = partition(labels, None, PartitionSettings(scheme="dirichlet", clients=4, beta=1e6), 0)
    for part in parts:  # shares have standard deviation sqrt(3 / 16 / 4e6) = 2e-4: below one picture of 400
        np.testing.assert_allclose(np.bincount(labels[part], minlength=5), 100, atol=2)


def test_no_client_gains_by_rounding():
    labels = np.arange(400)  # a picture a class: rounded bounds alone would give all of them to one client
    sizes = [
        len(part) for part in partition(labels, None, PartitionSettings(scheme="dirichlet", clients=4, beta=5.0), 0)
    ]
    np.testing.assert_allclose(sizes, 100, atol=5 * np.sqrt(400 * 0.25 * 0.75))


def test_a_tiny_beta_gives_each_class_to_one_client():
    labels = np.repeat(np.arange(40), 10)
    parts = partition(labels, None, PartitionSettings(scheme="dirichlet", clients=2, beta=1e-3), 0)
    # The lesser of two Beta(b, b) shares exceeds 1 in 10 pictures with probability of about 2 b ln 9 = 0.4 percent.
    shared = set.intersection(*classes_of(labels, parts))
    assert len(shared) <= 2


@pytest.mark.filterwarnings("error")
def test_a_beta_that_leaves_clients_empty_is_one_line_with_a_remedy_and_no_warning():
    chosen = PartitionSettings(scheme="dirichlet", clients=10, beta=0.001)
    with pytest.raises(DataError, match=r"raise partition.beta or have fewer clients$"):
        partition(LABELS, None, chosen, 0)


def test_iid_clients_hold_all_classes_even_where_rows_are_sorted_by_class():
    parts = partition(LABELS, None, PartitionSettings(scheme="iid", clients=7), 0)
    assert sorted(map(len, parts)) == [42] * 1 + [43] * 6
    assert all(len(owned) >= 8 for owned in classes_of(LABELS, parts))


def test_classes_may_be_unbalanced_within_a_domain():
    domains = np.arange(len(LABELS)) % 2

    def shares(beta):
        """How a domain's three clients divide each class, [6, 10]."""
        chosen = PartitionSettings(scheme="domain", clients=6, beta=beta)
        parts = partition(LABELS, domains, chosen, seed=0)
        assert [set(domains[part]) for part in parts] == [{0}] * 3 + [{1}] * 3
        return np.stack([np.bincount(LABELS[part], minlength=10) for part in parts]) / 15

    assert shares(0.2).std(0).mean() > 0.3  # of two to one for each class, (1, 0, 0) has 0.47
    np.testing.assert_allclose(shares(1e6), 1 / 3, atol=0.07)


def test_clients_are_dealt_out_over_domains_as_evenly_as_possible():
    domains = np.arange(len(LABELS)) % 4
    parts = partition(LABELS, domains, PartitionSettings(scheme="domain", clients=10), 0)
    owned = classes_of(domains, parts)
    assert owned == [{0}] * 3 + [{1}] * 3 + [{2}] * 2 + [{3}] * 2
    assert [len(part) for part in parts] == [25] * 6 + [38, 37] * 2


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"scheme": "disjoint", "clients": 11}, "there are 10: at most that many"),
        ({"scheme": "classes", "clients": 5, "classes_per_client": 2}, "have at least 9 clients"),
        ({"scheme": "classes", "clients": 10, "classes_per_client": 11}, "there are 10 classes"),
        ({"scheme": "domain", "clients": 1}, "each of the 2 domains \\(photo, sketch\\)"),
    ],
)
def test_a_number_of_clients_that_the_data_cannot_serve_is_refused(chosen, expected):
    domains = np.arange(len(LABELS)) % 2
    with pytest.raises(ConfigError, match=expected):
        partition(LABELS, domains, PartitionSettings(**chosen), 0, domain_names=("photo", "sketch"))


def test_too_few_pictures_for_the_clients_are_refused():
    labels = np.array([0, 0, 0, 1, 1])
    with pytest.raises(DataError, match="6 clients but only 5 training pictures"):
        partition(labels, None, PartitionSettings(scheme="iid", clients=6), 0)
    chosen = PartitionSettings(scheme="classes", clients=3, classes_per_client=2)
    with pytest.raises(DataError, match="class 'cat' has 2 training pictures for 3 clients"):
        partition(labels, None, chosen, 0, class_names=("dog", "cat"))
    with pytest.raises(DataError, match="domain 'sketch' has 1 training pictures for 2 clients"):
        partition(
            labels,
            np.array([0, 0, 0, 0, 1]),
            PartitionSettings(scheme="domain", clients=4),
            0,
            domain_names=("photo", "sketch"),
        )


def test_nothing_is_printed(capfd):
    for chosen in (DEMO, PartitionSettings(scheme="domain", clients=4), PartitionSettings(scheme="iid", clients=2)):
        partition(LABELS, np.arange(len(LABELS)) % 2, chosen, 0)
    assert capfd.readouterr() == ("", "")


def by_flower(column, partitioner):
    """The rows of each partition of a table whose column `part` is given."""
    partitioner.dataset = datasets.Dataset.from_dict({"part": column, "row": np.arange(len(column))})
    loaded = [partitioner.load_partition(index) for index in range(partitioner.num_partitions)]
    return [np.asarray(part["row"][:], dtype=np.int64) for part in loaded]


def natural(group_size=1):
    return flower.GroupedNaturalIdPartitioner(partition_by="part", group_size=group_size, sort_unique_ids=True)


def dirichlet_by_flower(labels, clients, beta, rng):
    """One draw, with the clients of each class permuted, as flwr-datasets always gives the last one the most."""
    drawn = flower.DirichletPartitioner(
        num_partitions=clients,
        partition_by="part",
        alpha=beta,
        min_partition_size=0,
        self_balancing=False,
        shuffle=False,
        seed=int(rng.integers(2**31)),
    )
    owner = np.empty(len(labels), dtype=np.int64)
    for client, rows in enumerate(by_flower(labels, drawn)):
        owner[rows] = client
    for label in np.unique(labels):
        owner[labels == label] = rng.permutation(clients)[owner[labels == label]]
    return [np.flatnonzero(owner == client) for client in range(clients)]


def expected_of_flower(labels, domains, chosen, seed):
    """Rows of each client by the partitioners of flwr-datasets; three domains, and two classes a client if disjoint."""
    clients, beta = chosen.clients, chosen.beta
    if chosen.scheme == "iid":
        return by_flower(labels, flower.IidPartitioner(num_partitions=clients))
    if chosen.scheme == "disjoint":
        return by_flower(labels, natural(group_size=2))
    if chosen.scheme == "classes":
        cyclic = flower.PathologicalPartitioner(
            num_partitions=clients,
            partition_by="part",
            num_classes_per_partition=chosen.classes_per_client,
            class_assignment_mode="deterministic",
            shuffle=False,
        )
        return by_flower(labels, cyclic)
    if chosen.scheme == "dirichlet":
        return dirichlet_by_flower(labels, clients, beta, np.random.default_rng([seed, DRAW_STREAM]))
    expected = []
    for domain, rows in enumerate(by_flower(domains, natural())):
        rng = np.random.default_rng([seed, DRAW_STREAM, domain])
        even = flower.IidPartitioner(num_partitions=clients // 3)
        within = by_flower(rows, even) if beta is None else dirichlet_by_flower(labels[rows], clients // 3, beta, rng)
        expected += [rows[part] for part in within]
    return expected


@pytest.mark.parametrize(
    "chosen",
    [
        {"scheme": "iid", "clients": 7},
        {"scheme": "disjoint", "clients": 5, "shuffle_classes": False},
        {"scheme": "classes", "clients": 10, "classes_per_client": 3},
        {"scheme": "classes", "clients": 13, "classes_per_client": 2},
        {"scheme": "dirichlet", "clients": 4, "beta": 1.0},
        {"scheme": "dirichlet", "clients": 6, "beta": 3.0},
        {"scheme": "domain", "clients": 6},
        {"scheme": "domain", "clients": 6, "beta": 2.0},
    ],
    ids=lambda chosen: "-".join(str(value) for value in chosen.values()),
)
def test_rows_are_divided_as_by_flwr_datasets(chosen):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.repeat(np.arange(10), rng.integers(15, 31, 10)))
        domains = rng.permutation(np.arange(len(labels)) % 3)
        asked = PartitionSettings(**chosen)
        order = np.random.default_rng([seed, ROWS_STREAM]).permutation(len(labels))
        expected = expected_of_flower(labels[order], domains[order], asked, seed)
        parts = partition(labels, domains, asked, seed)
        assert len(parts) == len(expected)
        for part, rows in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(part, np.sort(order[rows]))
