"""Copies of a picture, by its content: in training and test, in two classes, at two clients, or twice in training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sordino.tasks.images import ImageSet
from sordino.tasks.splits import Task


@dataclass(frozen=True)
class Copies:
    """How many pictures of a task are copies of others in it, byte for byte.

    Attributes:
        tested_and_trained: test pictures (of any evaluation) that are trained on too, so accuracy on them says little.
        in_two_classes: different pictures that are labeled with two classes or more.
        at_two_clients: different pictures that two clients or more train on.
        repeated_in_training: training pictures beyond the first of each content; what a mechanism promises for an
            example holds for one of them.
        examples: for each of these that is not 0 the names of two copies.
    """

    tested_and_trained: int = 0
    in_two_classes: int = 0
    at_two_clients: int = 0
    repeated_in_training: int = 0
    examples: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.examples)

    def told(self) -> str:
        """One line of counts, each with an example."""
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
        """As in `summary.json`."""
        return asdict(self) | {"examples": {key: list(names) for key, names in self.examples.items()}}


def find_copies(task: Task, images: ImageSet, digests: Mapping[int, bytes]) -> Copies:
    """The copies among the pictures that a task uses.

    Args:
        task: whose rows are indices into `images`.
        images: with the source's own labels.
        digests: of the content, by row; rows without one are left out.
    """
    client_of = {int(row): client for client, rows in enumerate(task.train) for row in rows}
    tested = {int(row) for row in np.concatenate([task.test, task.novel, task.domain])}
    rows_of: dict[bytes, list[int]] = defaultdict(list)
    for row in sorted(client_of.keys() | tested):
        if row in digests:
            rows_of[digests[row]].append(row)
    counts = dict.fromkeys(("tested_and_trained", "in_two_classes", "at_two_clients", "repeated_in_training"), 0)
    examples: dict[str, tuple[str, str]] = {}

    def found(key: str, count: int, first: int, second: int) -> None:
        counts[key] += count
        examples.setdefault(key, (images.names[first], images.names[second]))

    for rows in rows_of.values():
        trains, tests = [row for row in rows if row in client_of], [row for row in rows if row in tested]
        if trains and tests:
            found("tested_and_trained", len(tests), trains[0], tests[0])
        if len(trains) > 1:
            found("repeated_in_training", len(trains) - 1, trains[0], trains[1])
        other_class = next((row for row in rows if images.labels[row] != images.labels[rows[0]]), None)
        if other_class is not None:
            found("in_two_classes", 1, rows[0], other_class)
        other_client = next((row for row in trains if client_of[row] != client_of[trains[0]]), None)
        if other_client is not None:
            found("at_two_clients", 1, trains[0], other_client)
    return Copies(**counts, examples=examples)
