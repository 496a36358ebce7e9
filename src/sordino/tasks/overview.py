"""Tell what was read: classes, clients and their sizes; and warn where classes look like people."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sordino.progress import log
from sordino.tasks.images import ImageSet
from sordino.tasks.task import Task

SHOWN = 10  # names of classes, or of clients, in one line
MANY, SMALL = 50, 10  # more classes than this, with fewer pictures than this each, are hardly classes
NUMBERS = 10  # with more classes than this, numbers as names are hardly digits
_PEOPLE = re.compile(r"(patient|pat|person|people|subject|subj|sub|case|participant|volunteer|donor)[\s#.:-]*\d+", re.I)
_NUMBER = re.compile(r"[a-z]{0,3}[\s#.:-]*\d+", re.I)


def announce(images: ImageSet, task: Task) -> None:
    """Log what was read, and warn where classes look like people."""
    log.info("%s", overview(task))
    if doubt := doubts(images):
        log.warning("%s", doubt)


def overview(task: Task) -> str:
    """Return the classes and the clients with their numbers of training pictures, in one line."""
    sizes = [f"{name} ({len(rows):,})" for name, rows in zip(task.client_names, task.train, strict=True)]
    novel = f"; {len(task.novel_names)} novel: {_some(task.novel_names)}" if task.novel_names else ""
    return f"{len(task.class_names)} classes: {_some(task.class_names)}{novel}; clients: {_some(sizes)}"


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


def _some(names: Sequence[str], shown: int = SHOWN) -> str:
    more = f", and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
