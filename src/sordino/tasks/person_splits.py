"""Splits that keep persons whole: each one trains or tests, and trains at one client.

A patient in training and in test would flatter accuracy. A patient at two clients would be protected in part by each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sordino.errors import DataError
from sordino.tasks.images import Flags, Indices
from sordino.tasks.settings import DataSettings

SIDES_STREAM, CLIENTS_STREAM = 31, 32  # purposes of generators that are derived from the seed


def testing_persons(persons: Indices, cells: Indices, data: DataSettings, seed: int) -> Flags:
    """Choose the persons who test; all others train.

    Cells choose one after the other, those of the fewest persons first, and each takes its persons in a drawn order
    until it has enough pictures. A person is passed over who would leave any cell with too few for the other side. If
    only `train_per_class` is given, cells choose the persons who train, so that all others test.

    Args:
        persons, cells: [n], whose each picture is, and its cell.
        data: the counts, or the fraction, of pictures that train and test.
        seed: the run's seed.

    Returns:
        [n], true for the pictures of persons who test. A cell may still have too few pictures on one side.
    """
    known, person_of = np.unique(persons, return_inverse=True)
    names, cell_of = np.unique(cells, return_inverse=True)
    held = np.zeros((len(known), len(names)), dtype=np.int64)  # pictures by person and cell
    np.add.at(held, (person_of, cell_of), 1)
    total = held.sum(0)
    choose_training = data.train_per_class is not None and data.test_per_class is None
    if choose_training:
        wanted, kept = np.minimum(data.train_per_class or 1, total), 1
    else:
        share = np.clip(np.round(data.test_fraction * total), 1, None)
        wanted = share if data.test_per_class is None else np.full(len(names), data.test_per_class)
        kept = data.train_per_class or 1
    chosen, taken = np.zeros(len(known), dtype=np.bool_), np.zeros_like(total)
    for cell in np.argsort((held > 0).sum(0), kind="stable").tolist():
        generator = np.random.default_rng([seed, SIDES_STREAM, int(names[cell])])
        for person in generator.permutation(np.flatnonzero(held[:, cell])).tolist():
            if taken[cell] >= wanted[cell]:
                break
            left = total - taken - held[person]
            if not chosen[person] and np.all(left[held[person] > 0] >= kept):
                chosen[person] = True
                taken += held[person]
    flags: Flags = (~chosen if choose_training else chosen)[person_of]
    return flags


def at_one_client(parts: Sequence[Indices], persons: Indices, seed: int) -> list[Indices]:
    """Move all pictures of each person to the client that has most of them; the seed decides between equal ones.

    Args:
        parts: K index arrays that divide n training pictures.
        persons: [n], whose each picture is.
        seed: the run's seed.

    Returns:
        K sorted index arrays.

    Raises:
        DataError: a client has no picture then.
    """
    owner = np.empty(len(persons), dtype=np.int64)
    for client, part in enumerate(parts):
        owner[part] = client
    known, person_of = np.unique(persons, return_inverse=True)
    held = np.zeros((len(known), len(parts)), dtype=np.int64)
    np.add.at(held, (person_of, owner), 1)
    ties = np.random.default_rng([seed, CLIENTS_STREAM]).random(held.shape)  # below 1, so they decide nothing else
    client_of = (held + ties).argmax(1)
    moved = [np.flatnonzero(client_of[person_of] == client) for client in range(len(parts))]
    empty = next((client for client, part in enumerate(moved) if not len(part)), None)
    if empty is not None:
        raise DataError(
            f"client {empty} has no training picture left once each of {len(known)} persons is at one client; have "
            "fewer clients (partition.clients) or more pictures (data.train_per_class)"
        )
    return moved
