"""Tell what was read: classes, clients and their sizes; and warn where classes look like people."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sordino.progress import log
from sordino.tasks.images import ImageSet
from sordino.tasks.passed_over import told
from sordino.tasks.task import Task

SHOWN = 10  # names of classes, or of clients, in one line
MANY, SMALL = 50, 10  # more classes than this, with fewer pictures than this each, are hardly classes
NUMBERS = 10  # with more classes than this, numbers as names are hardly digits
_PEOPLE = re.compile(r"(patient|pat|person|people|subject|subj|sub|case|participant|volunteer|donor)[\s#.:-]*\d+", re.I)
_NUMBER = re.compile(r"[a-z]{0,3}[\s#.:-]*\d+", re.I)


def tell_passed_over(images: ImageSet) -> None:
    """Warn of files and splits that are not used."""
    if images.passed_over:
        log.warning("%s", told(images.passed_over))


def announce(images: ImageSet, task: Task) -> None:
    """Log what was read, and warn where classes look like people."""
    log.info("%s", overview(images, task))
    if doubt := doubts(images):
        log.warning("%s", doubt)


def overview(images: ImageSet, task: Task) -> str:
    """Return what the data was taken for, in one line: classes, domains, its own test split, persons, and clients.

    Clients come with their numbers of training pictures.
    """
    sizes = [f"{name} ({len(rows):,})" for name, rows in zip(task.client_names, task.train, strict=True)]
    novel = f"; {len(task.novel_names)} novel: {_some(task.novel_names)}" if task.novel_names else ""
    parts = [f"{len(task.class_names)} classes: {_some(task.class_names)}{novel}"]
    if images.domain_names is not None:
        parts.append(f"{_counted(len(images.domain_names), 'domain')}: {_some(images.domain_names)}")
    if images.is_test is not None:
        parts.append(f"its own test split ({len(task.test):,})")
    if images.person_names is not None:
        parts.append(_counted(len(images.person_names), "person"))
    return "; ".join([*parts, f"clients: {_some(sizes)}"])


def doubts(images: ImageSet) -> str:
    """Return a warning if classes are many and small, or named like people; an empty string if they are not.

    Folders of patients, taken for classes, would be learned as such, and their names would be in every prompt file.
    """
    names, classes = images.class_names, len(images.class_names)
    sizes = np.bincount(images.labels, minlength=classes)
    people = sum(bool(_PEOPLE.fullmatch(name)) for name in names)
    numbers = sum(bool(_NUMBER.fullmatch(name)) for name in names) if classes > NUMBERS else 0
    if 2 * max(people, numbers) > classes:
        looks = "are named like people or numbers"
    elif classes > MANY and np.median(sizes) < SMALL:
        looks = "are many and small"
    else:
        return ""
    return (
        f"{classes} classes {looks} ({_some(names, 3)}; {sizes.min():,} to {sizes.max():,} pictures each). If these "
        "are people and not classes, say so with data.person_level, or list pictures in a table; class names are in "
        "every prompt file"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def _some(names: Sequence[str], shown: int = SHOWN) -> str:
    more = f", and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
