"""Digests of a task's pictures: what each party holds, and what a run directory writes down of its data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

import sordino
from sordino.experiments.data_record import sequence_digest, set_digest
from sordino.experiments.features import EncodedDataset, PublicImages
from sordino.tasks.images import Indices
from sordino.tasks.splits import Task


def party_digests(dataset: EncodedDataset, task: Task) -> list[str]:
    """Return for each client the SHA-256 of its training pictures, in hex.

    It is a digest of the set of (content, class name) pairs, so neither file names nor order matter: two runs give one
    digest if and only if the client trains on the same examples.

    Args:
        dataset: has encoded the task's pictures.
        task: K clients.
    """
    return [set_digest(_examples(dataset, task, rows)) for rows in task.train]


def data_record(dataset: EncodedDataset, task: Task, public: PublicImages | None = None) -> dict[str, Any]:
    """Return what `data.json` says of a run: version, encoder, parties, evaluation sets and partition.

    Args:
        dataset: has encoded the task's pictures.
        task: of the run.
        public: the public pictures, if the run uses any.
    """
    encoder = dataset.encoder
    of_public = {} if public is None else {"public": set_digest((digest, "") for digest in public.digests)}
    return (
        of_public
        | {
            "version": sordino.__version__,
            "encoder": {"name": encoder.name, "fingerprint": encoder.fingerprint, "dtype": str(encoder.dtype)},
            "parties": party_digests(dataset, task),
            "test": set_digest(_examples(dataset, task, task.test)),
            "novel": set_digest(_examples(dataset, task, task.novel, task.novel_names)),
            "domain": set_digest(_examples(dataset, task, task.domain)),
            "triggered": set_digest(_examples(dataset, task, task.triggered)),
            "partition": _partition_digest(dataset, task),
        }
        | ({} if dataset.images.persons is None else {"persons": _persons_digest(dataset.images.persons, task)})
    )


def _examples(
    dataset: EncodedDataset, task: Task, rows: Indices, class_names: tuple[str, ...] | None = None
) -> list[tuple[bytes, str]]:
    names = task.class_names if class_names is None else class_names
    return [(dataset.digests[row], names[task.labels[row]]) for row in rows.tolist()]


def _persons_digest(persons: Indices, task: Task) -> str:
    """Return a digest of which training pictures are of one person; the persons' names do not matter."""
    owners = persons[np.concatenate(task.train)].tolist()
    numbers = {person: number for number, person in enumerate(dict.fromkeys(owners))}
    return hashlib.sha256(json.dumps([numbers[person] for person in owners]).encode()).hexdigest()


def _partition_digest(dataset: EncodedDataset, task: Task) -> str:
    """Order decides batches, and the classes' order decides what a label means; sets alone show neither."""
    order = hashlib.sha256(json.dumps([task.class_names, task.novel_names, task.attackers]).encode())
    for rows in task.train:
        examples = _examples(dataset, task, rows)
        placed = ((content, f"{row} {name}") for row, (content, name) in zip(rows.tolist(), examples, strict=True))
        order.update(sequence_digest(placed).encode())
    return order.hexdigest()
