"""Copies of pictures: what is counted, against counting by hand."""

from __future__ import annotations

import numpy as np

from sordino.tasks.copies import Copies, find_copies
from sordino.tasks.images import ImageSet
from sordino.tasks.splits import Task

NONE = np.empty(0, dtype=np.int64)


def images(labels: list[int]) -> ImageSet:
    return ImageSet(
        source="test",
        class_names=("ant", "bee", "cow"),
        labels=np.array(labels),
        names=[f"{row}.png" for row in range(len(labels))],
        read=lambda index: b"",
    )


def task(train: list[list[int]], test: list[int], novel: list[int] | None = None) -> Task:
    return Task(
        class_names=("ant", "bee"),
        novel_names=("cow",),
        labels=NONE,
        train=tuple(np.array(rows) for rows in train),
        test=np.array(test),
        local=np.empty((0, 0)),
        neighbor=np.empty((0, 0)),
        novel=np.array(novel or [], dtype=np.int64),
        domain=NONE,
        client_classes=(),
        client_domains=(),
    )


def digests(text: str) -> dict[int, bytes]:
    """A letter a row; rows of one letter are copies, and '-' is a row without a digest."""
    return {row: letter.encode() for row, letter in enumerate(text) if letter != "-"}


def test_each_kind_of_copy_is_counted() -> None:
    #  rows:            0 1 2 3 4 5 6 7
    found = find_copies(task([[0, 1], [2, 3]], [4, 5, 6]), images([0, 0, 1, 1, 0, 1, 1, 0]), digests("aabacdda"))
    # 'a': rows 0, 1, 3 train (3 is another class and client), none tests, row 7 is not used. 'd': rows 5 and 6 test.
    assert found == Copies(
        tested_and_trained=0,
        in_two_classes=1,
        at_two_clients=1,
        repeated_in_training=2,
        examples={
            "repeated_in_training": ("0.png", "1.png"),
            "in_two_classes": ("0.png", "3.png"),
            "at_two_clients": ("0.png", "3.png"),
        },
    )


def test_training_pictures_among_test_pictures() -> None:
    found = find_copies(task([[0], [1]], [2, 3, 4], [5]), images([0, 1, 0, 0, 1, 2]), digests("abaaca"))
    assert found.tested_and_trained == 3  # rows 2, 3, and 5 of a novel class
    assert found.in_two_classes == 1
    assert found.examples["tested_and_trained"] == ("0.png", "2.png")
    assert "3 test pictures are trained on too ('0.png' and '2.png')" in found.told()
    assert found.as_summary()["examples"]["tested_and_trained"] == ["0.png", "2.png"]


def test_what_has_no_digest_is_no_copy() -> None:
    found = find_copies(task([[0], [1]], [2]), images([0, 1, 0]), digests("---"))
    assert not found
    assert found == Copies()
