"""What is said of the data that was read: names, sizes, and classes that look like people."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

from pages.blocks import shown
from sordino.tasks import DataSettings, PartitionSettings
from sordino.tasks.images import ImageSet
from sordino.tasks.overview import announce, doubts, overview
from sordino.tasks.splits import Task, build_task


def images_of(names: list[str], sizes: list[int], domains: tuple[str, ...] = ()) -> ImageSet:
    labels = np.repeat(np.arange(len(names)), sizes)
    return ImageSet(
        source="imagefolder:x",
        class_names=tuple(names),
        labels=labels.astype(np.int64),
        names=[str(row) for row in range(len(labels))],
        read=lambda index: b"",
        domain_names=domains or None,
        domains=np.arange(len(labels), dtype=np.int64) % len(domains) if domains else None,
    )


def task_of(images: ImageSet, **partition: object) -> Task:
    return build_task(images, DataSettings(source="digits"), PartitionSettings(**partition), 0)  # type: ignore[arg-type]


def test_classes_and_clients_by_name_with_sizes() -> None:
    images = images_of(["dog", "elephant", "horse"], [40, 40, 40], ("north", "south"))
    task = task_of(images, scheme="domain", clients=2)
    sizes = [len(rows) for rows in task.train]
    clients = f"clients: north ({sizes[0]}), south ({sizes[1]})"
    expected = f"3 classes: dog, elephant, horse; 2 domains: north, south; {clients}"
    assert overview(images, task) == expected
    assert [line["name"] for line in task.summary()] == ["north", "south"]


def test_clients_of_one_domain_are_numbered() -> None:
    """Names are distinct, and begin with the domain of the client's pictures."""
    images = images_of(["dog", "horse"], [60, 60], ("north", "south", "west"))
    task = task_of(images, scheme="domain", clients=5)
    assert task.client_names == ("north 1", "north 2", "south 1", "south 2", "west")
    assert all(name.startswith(domain) for name, (domain,) in zip(task.client_names, task.client_domains, strict=True))


def test_clients_whose_pictures_are_of_several_domains_have_numbers() -> None:
    images = images_of(["dog", "horse"], [60, 60], ("north", "south"))
    assert task_of(images, scheme="iid", clients=3).client_names == ("0", "1", "2")


def test_a_long_list_is_cut_and_counted() -> None:
    names = [f"kind of thing {letter}" for letter in "abcdefghijklmno"]
    images = images_of(names, [20] * 15)
    said = overview(images, task_of(images, scheme="iid", clients=12))
    assert re.search(
        r"15 classes: kind of thing a, .*, kind of thing j, and 5 more; clients: 0 \(\d+\), .*, and 2 more$", said
    )


@pytest.mark.parametrize(
    ("names", "size", "looks"),
    [
        ([f"patient {n:03}" for n in range(70)], 4, "are named like people or numbers"),
        ([f"Patient-{n}" for n in range(3)], 100, "are named like people or numbers"),
        ([str(1000 + n) for n in range(70)], 5, "are named like people or numbers"),
        ([f"P{n}" for n in range(12)], 50, "are named like people or numbers"),
        ([f"word {chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(70)], 5, "are many and small"),
        ([f"word {chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(70)], 50, ""),
        ([str(n) for n in range(10)], 100, ""),  # digits
        (["covid 19", "influenza", "healthy"], 30, ""),
        (["stage 1", "stage 2", "stage 3"], 30, ""),
    ],
)
def test_classes_that_look_like_people_are_doubted(names: list[str], size: int, looks: str) -> None:
    doubt = doubts(images_of(names, [size] * len(names)))
    if not looks:
        assert doubt == ""
    else:
        assert doubt.startswith(f"{len(names)} classes {looks} ({names[0]}, {names[1]}, {names[2]}")
        assert f"{size} to {size} pictures each" in doubt
        assert "data.person_level" in doubt


def test_a_doubt_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    images = images_of([f"patient {n}" for n in range(4)], [8] * 4)
    with caplog.at_level(logging.INFO, logger="sordino"):
        announce(images, task_of(images, scheme="iid", clients=2))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_data_is_announced_as_on_the_page() -> None:
    first, second = shown("docs/own-pictures.md")
    names = ["dog", "elephant", "horse"]
    images = images_of(names, [40] * 3, ("north", "south"))
    text = "Data: " + overview(images, task_of(images, scheme="domain", clients=2))
    assert re.sub(r"\d+", "N", text) + "." == re.sub(r"\d+", "N", first)
    people = [f"patient {number:03}" for number in range(1, 71)]
    assert doubts(images_of(people, [1, 4] * 35)) == second
