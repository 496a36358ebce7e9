"""Splits: who trains and tests on what, and that each accuracy is measured on the pictures that it is defined on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino.errors import ConfigError, DataError
from sordino.tasks import DataSettings, PartitionSettings
from sordino.tasks.images import ImageSet
from sordino.tasks.sources import load_images
from sordino.tasks.splits import build_task

DOMAINS = ("art painting", "photo", "sketch")
IID = PartitionSettings(scheme="iid", clients=2)


def image_set(labels, domains=None, is_test=None):
    """Pictures that are never looked at."""
    labels = np.asarray(labels, dtype=np.int64)
    return ImageSet(
        source="made up",
        class_names=tuple(f"class {index}" for index in range(labels.max() + 1)),
        labels=labels,
        names=[f"{row}.png" for row in range(len(labels))],
        read=lambda index: bytes([index]),
        domain_names=None if domains is None else DOMAINS,
        domains=None if domains is None else np.asarray(domains, dtype=np.int64),
        is_test=is_test,
    )


def grid(classes=4, each=12):
    """`each` pictures of every class in every domain."""
    labels = np.tile(np.repeat(np.arange(classes), each), len(DOMAINS))
    return image_set(labels, np.repeat(np.arange(len(DOMAINS)), classes * each))


def data(**values):
    return DataSettings(source="digits", **values)


@st.composite
def tasks(draw):
    """A set of pictures in classes and domains, settings that it can serve, and the task that they make."""
    images = grid(draw(st.integers(3, 6)), draw(st.integers(10, 14)))
    if draw(st.booleans()):
        images = image_set(images.labels, images.domains, np.arange(len(images)) % 3 == 0)
    chosen = data(
        train_per_class=draw(st.none() | st.integers(2, 4)),
        test_per_class=draw(st.none() | st.integers(1, 3)),
        novel_classes=draw(st.integers(0, 1)),
        held_out_domain=draw(st.none() | st.sampled_from(DOMAINS)),
    )
    partition = draw(
        st.sampled_from(
            [
                PartitionSettings(scheme="disjoint", clients=2),
                PartitionSettings(scheme="iid", clients=2),
                PartitionSettings(scheme="domain", clients=5),
                PartitionSettings(scheme="dirichlet", clients=2, beta=5.0),
            ]
        )
    )
    return images, chosen, partition, build_task(images, chosen, partition, draw(st.integers(0, 2**31)))


@given(tasks())
@settings(max_examples=40, deadline=None)
def test_training_and_every_evaluation_set_are_apart(made):
    images, chosen, _, task = made
    sets = [*task.train, task.test, task.novel, task.domain]
    together = np.concatenate(sets)
    assert len(np.unique(together)) == len(together)
    np.testing.assert_array_equal(task.used, np.sort(together))
    assert np.all((task.labels >= 0) == np.isin(np.arange(len(images)), together))
    held_out = chosen.held_out_domain
    seen = {DOMAINS[index] for index in np.unique(images.domains[np.concatenate([*task.train, task.test])])}
    assert seen == set(DOMAINS) - {held_out}
    if held_out is not None:
        assert {DOMAINS[index] for index in images.domains[task.domain]} == {held_out}
    if images.is_test is not None:
        assert not images.is_test[np.concatenate(task.train)].any()
        assert images.is_test[np.concatenate([task.test, task.novel, task.domain])].all()


@given(tasks())
@settings(max_examples=20, deadline=None)
def test_labels_index_the_candidates_of_their_evaluation(made):
    images, chosen, _, task = made
    assert len(task.novel_names) == chosen.novel_classes
    assert sorted(task.class_names + task.novel_names) == sorted(images.class_names)
    base = np.concatenate([*task.train, task.test, task.domain])
    for rows, names in ((base, task.class_names), (task.novel, task.novel_names)):
        assert [names[task.labels[row]] for row in rows] == [images.class_names[images.labels[row]] for row in rows]


@given(tasks())
@settings(max_examples=40, deadline=None)
def test_counts_per_cell_are_exact(made):
    images, chosen, partition, task = made
    cells = images.labels + (100 * images.domains if partition.scheme == "domain" else 0)
    trained = np.concatenate(task.train)
    if chosen.train_per_class is not None:
        assert set(np.unique(cells[trained], return_counts=True)[1]) == {chosen.train_per_class}
    for rows in (task.test, task.novel, task.domain):
        counts = np.unique(cells[rows], return_counts=True)[1]
        assert chosen.test_per_class is None or set(counts) <= {chosen.test_per_class}
    assert set(cells[task.test]) == set(cells[trained])


@given(tasks())
@settings(max_examples=40, deadline=None)
def test_local_and_neighbor_weights_are_what_they_are_defined_to_be(made):
    images, _, partition, task = made
    cells = images.labels + (100 * images.domains if partition.scheme == "domain" else 0)
    tested = cells[task.test]
    trained = set(cells[np.concatenate(task.train)].tolist())
    np.testing.assert_allclose(task.local.sum(axis=1), 1, rtol=1e-12)
    for client, rows in enumerate(task.train):
        own = set(cells[rows].tolist())
        others = trained - own
        assert set(tested[task.local[client] > 0].tolist()) == own
        assert set(tested[task.neighbor[client] > 0].tolist()) == others
        for cell in own:  # a cell's weight is its share of the client's training data
            assert task.local[client][tested == cell].sum() == pytest.approx(np.mean(cells[rows] == cell))
        assert len(set(task.neighbor[client][task.neighbor[client] > 0])) <= 1
        assert task.neighbor[client].sum() == pytest.approx(1 if others else 0)


@given(tasks())
@settings(max_examples=20, deadline=None)
def test_clients_are_described_by_what_they_hold(made):
    images, _, _, task = made
    for client, line in enumerate(task.summary()):
        rows = task.train[client]
        assert line["images"] == len(rows)
        assert set(line["classes"]) == {images.class_names[label] for label in images.labels[rows]}
        assert set(line["domains"]) == {DOMAINS[index] for index in images.domains[rows]}


def test_balanced_clients_have_plain_local_accuracy():
    task = build_task(grid(), data(train_per_class=4), PartitionSettings(scheme="disjoint", clients=2), 0)
    for row in task.local:
        assert set(row) == {0.0, 1 / np.count_nonzero(row)}


def test_the_same_seed_gives_the_same_task_and_another_seed_another():
    first, same, other = (build_task(grid(), data(novel_classes=1), IID, seed) for seed in (7, 7, 8))
    for rows, again in zip((*first.train, first.test, first.novel), (*same.train, same.test, same.novel), strict=True):
        np.testing.assert_array_equal(rows, again)
    assert not np.array_equal(first.test, other.test)
    assert len({build_task(grid(), data(novel_classes=1), IID, seed).novel_names for seed in range(20)}) > 1


def test_fewer_shots_are_among_more_and_test_on_the_same_pictures():
    few, many = (build_task(grid(), data(train_per_class=k, test_per_class=5), IID, 0) for k in (2, 6))
    assert set(np.concatenate(few.train)) < set(np.concatenate(many.train))
    np.testing.assert_array_equal(few.test, many.test)


def test_the_split_does_not_depend_on_the_clients():
    one, two = (build_task(grid(), data(), PartitionSettings(scheme="iid", clients=k), 0) for k in (1, 5))
    np.testing.assert_array_equal(one.test, two.test)


def test_a_fraction_tests_where_no_count_is_given():
    task = build_task(grid(each=10), data(test_fraction=0.2), IID, 0)
    assert np.bincount(task.labels[task.test]).tolist() == [6] * 4
    assert sum(map(len, task.train)) == 4 * 24


def test_unreadable_pictures_are_left_out_and_do_not_move_the_others():
    images = grid()
    whole = build_task(images, data(train_per_class=3), IID, 0)
    readable = np.ones(len(images), dtype=bool)
    gone = np.concatenate(whole.train)[0]
    readable[gone] = False
    task = build_task(images, data(train_per_class=3), IID, 0, readable)
    before, after = set(np.concatenate(whole.train)), set(np.concatenate(task.train))
    assert before - after == {gone}
    assert len(after) == len(before)  # another picture took its place
    assert gone not in task.used


@pytest.mark.parametrize(
    ("chosen", "partition", "expected"),
    [
        ({"train_per_class": 36}, {"scheme": "iid", "clients": 2}, "class 'class 0' has 36 .* at least 37 are needed"),
        ({"test_per_class": 36}, {"scheme": "iid", "clients": 2}, "at least 37 are needed; lower test_per_class"),
        (
            {"train_per_class": 12},
            {"scheme": "domain", "clients": 3},
            "class 'class 0' in domain 'art painting' has 12 readable pictures, of which 12 train and 1 or more test",
        ),
        ({"novel_classes": 3}, {"scheme": "iid", "clients": 2}, "data.novel_classes = 3: .* at most 2"),
        (
            {"held_out_domain": "cartoon"},
            {"scheme": "iid", "clients": 2},
            "data.held_out_domain = 'cartoon': must be one of the domains: art painting, photo, sketch",
        ),
    ],
)
def test_what_the_pictures_cannot_serve_is_refused_in_one_line(chosen, partition, expected):
    with pytest.raises((ConfigError, DataError), match=expected) as caught:
        build_task(grid(), data(**chosen), PartitionSettings(**partition), 0)
    assert "\n" not in str(caught.value)


def test_domains_are_asked_for_only_where_there_are_any():
    plain = image_set(np.repeat(np.arange(3), 9))
    with pytest.raises(ConfigError, match="made up has no domains; use 'disjoint'"):
        build_task(plain, data(), PartitionSettings(scheme="domain", clients=3), 0)
    with pytest.raises(ConfigError, match="made up has no domains"):
        build_task(plain, data(held_out_domain="photo"), IID, 0)
    assert build_task(plain, data(), IID, 0).client_domains == ((), ())


def test_a_class_without_a_readable_picture_is_named():
    images = grid()
    with pytest.raises(DataError, match="class 'class 2' has no readable picture"):
        build_task(images, data(), IID, 0, images.labels != 2)
    only_there = image_set(np.repeat(np.arange(3), 9), np.repeat([0, 1, 2], 9))
    with pytest.raises(DataError, match="class 'class 2' has no readable picture outside of held_out_domain 'sketch'"):
        build_task(only_there, data(held_out_domain="sketch"), IID, 0)


def test_a_class_that_a_domain_lacks_is_no_error():
    labels, domains = np.repeat([0, 1, 0, 1, 2], 8), np.repeat([0, 0, 1, 1, 2], 8)
    task = build_task(image_set(labels, domains), data(), PartitionSettings(scheme="domain", clients=3), 0)
    assert task.client_classes == ((0, 1), (0, 1), (2,))


def test_a_folders_own_spelling_of_a_domain_serves():
    task = build_task(grid(), data(held_out_domain="art_painting"), IID, 0)
    assert len(task.domain) == 48


def test_the_demo():
    demo = PartitionSettings(scheme="classes", clients=10, classes_per_client=2)
    task = build_task(load_images(data()), data(), demo, 0)
    assert task.client_classes == tuple(tuple(sorted((i, (i + 1) % 10))) for i in range(10))
    assert len(task.test) == 539
    assert sum(map(len, task.train)) == 1797 - 539


def test_real_domains(real_data):
    chosen = DataSettings(source=f"imagefolder:{real_data('pacs')}", train_per_class=16)
    task = build_task(load_images(chosen), chosen, PartitionSettings(scheme="domain", clients=8), 0)
    assert [len(rows) for rows in task.train] == [56] * 8
    assert len(task.test) == 4 * 7 * 64
    assert [names[0] for names in task.client_domains[::2]] == ["art painting", "cartoon", "photo", "sketch"]
