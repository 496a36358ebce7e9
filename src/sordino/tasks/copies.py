"""Detection of copies of a picture, by its content: in training and test, in two classes, at two clients, or twice
in training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sordino.tasks.images import ImageSet
from sordino.tasks.task import Task


@dataclass(frozen=True)
class Copies:
    """Numbers of pictures of a task that are copies of others in it, byte for byte.

    Attributes:
        tested_and_trained: test pictures (of any evaluation) that also train, so that accuracy on
            them says little.
        in_two_classes: different pictures that are labeled with two classes or more.
        at_two_clients: different pictures that two clients or more train on.
        repeated_in_training: training pictures beyond the first of each content. A mechanism's
            guarantee for an example holds for one of them.
        examples: the names of two copies, for each count that is not 0.
    """

    tested_and_trained: int = 0
    in_two_classes: int = 0
    at_two_clients: int = 0
    repeated_in_training: int = 0
    examples: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.examples)

    def told(self) -> str:
        """Return one line of counts, each with an example."""
        words = {
            "tested_and_trained": "test pictures are trained on too",
            "in_two_classes": "pictures are in two classes",
            "at_two_clients": "pictures are at two clients",
            "repeated_in_training": "training pictures repeat another",
        }
        parts = [
            f"{getattr(self, key)} {text} ({' and '.join(map(repr, self.examples[key]))})"
            for key, text in words.items()
            if key in self.examples
        ]
        return f"copies of pictures: {'; '.join(parts)}"

    def as_summary(self) -> dict[str, Any]:
        """Return the counts and examples as in `summary.json`."""
        return asdict(self) | {
            "examples": {key: list(names) for key, names in self.examples.items()},
        }


def find_copies(task: Task, images: ImageSet, digests: Mapping[int, bytes]) -> Copies:
    """Find the copies among the pictures that a task uses.

    Args:
        task: the task, whose rows are indices into `images`.
        images: the pictures, with the source's own labels.
        digests: digests of the content, by row; rows without one are left out.
    """
    client_of = {int(row): client for client, rows in enumerate(task.train) for row in rows}
    tested = {int(row) for row in np.concatenate([task.test, task.novel, task.domain])}
    rows_of: dict[bytes, list[int]] = defaultdict(list)
    for row in sorted(client_of.keys() | tested):
        if row in digests:
            rows_of[digests[row]].append(row)
    counts = dict.fromkeys(
        ("tested_and_trained", "in_two_classes", "at_two_clients", "repeated_in_training"),
        0,
    )
    examples: dict[str, tuple[str, str]] = {}

    def record(key: str, count: int, first: int, second: int) -> None:
        counts[key] += count
        examples.setdefault(key, (images.names[first], images.names[second]))

    for rows in rows_of.values():
        trains = [row for row in rows if row in client_of]
        tests = [row for row in rows if row in tested]
        if trains and tests:
            record("tested_and_trained", len(tests), trains[0], tests[0])
        if len(trains) > 1:
            record("repeated_in_training", len(trains) - 1, trains[0], trains[1])
        other_class = next(
            (row for row in rows if images.labels[row] != images.labels[rows[0]]),
            None,
        )
        if other_class is not None:
            record("in_two_classes", 1, rows[0], other_class)
        other_client = next((row for row in trains if client_of[row] != client_of[trains[0]]), None)
        if other_client is not None:
            record("at_two_clients", 1, trains[0], other_client)
    return Copies(**counts, examples=examples)
