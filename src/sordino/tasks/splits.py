"""From labeled pictures to a `Task`: each client's training pictures, and the test pictures of each accuracy.

A *cell* is a class, or a (domain, class) pair if the partition is by domain. Training and test
pictures are drawn cell by cell, each cell from a generator of its own. So a cell's split does not
change with the other cells, the number of clients, or the number of shots: the pictures of 4 shots
are among those of 16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sordino.errors import ConfigError, DataError
from sordino.tasks.images import Flags, ImageSet, Indices
from sordino.tasks.partitions import partition as divide
from sordino.tasks.person_splits import at_one_client, testing_persons
from sordino.tasks.settings import DataSettings, PartitionSettings
from sordino.tasks.task import Task

__all__ = ["Task", "build_task"]

CLASSES_STREAM, CELLS_STREAM = 1, 2  # purposes of generators that are derived from the seed


@dataclass(frozen=True, eq=False)
class _Pool:
    """The input of the draws below: every picture's class and cell, and its possible uses.

    Attributes:
        labels: [N], as in `Task`, but without unused pictures marked.
        cells: [N], the picture's cell.
        cell_names: each cell's name in messages.
        base: [N], true for pictures of base classes.
        trainable: [N], true for readable base pictures of domains that are trained on.
        held_out: [N], true for the held-out domain's pictures.
        own_test: [N], true in the source's own test split; None without one.
        readable: [N], true for pictures that can be read.
        persons: [N], whose each picture is; None if unknown.
    """

    labels: Indices
    cells: Indices
    cell_names: tuple[str, ...]
    base: Flags
    trainable: Flags
    held_out: Flags
    own_test: Flags | None
    readable: Flags
    persons: Indices | None = None


def build_task(
    images: ImageSet,
    data: DataSettings,
    partition: PartitionSettings,
    seed: int,
    readable: Flags | None = None,
) -> Task:
    """Split and partition `images`. The result depends on the arguments alone.

    Test pictures are the source's own test split if it has one. Otherwise each cell gives
    `train_per_class` pictures to training and `test_per_class` to test, and an absent count stands
    for the rest. If both are absent, `test_fraction` of the cell tests. Novel classes and the
    held-out domain test with all their pictures, at most `test_per_class` a cell. With a source's
    own test split, they test with the pictures in it.

    If it is known whose the pictures are, persons stay whole. Each trains or tests, chosen so that the counts hold for
    every cell (`testing_persons`). With a source's own test split, a person who has training pictures does not test.
    Each person's training pictures are at one client (`at_one_client`).

    Args:
        images: N pictures.
        data, partition: the settings.
        seed: the run's seed.
        readable: [N], false for unreadable pictures, which are left out; None if all can be read.

    Raises:
        ConfigError: a setting does not fit these pictures, such as an unknown domain.
        DataError: a class, domain or client has too few pictures.
    """
    names, novel_names, pool = _pool(images, data, partition, seed, readable)
    train, test = _base_split(_persons_apart(pool, data, seed), data, seed)
    if pool.persons is not None:  # who trains does not test elsewhere
        pool = replace(pool, readable=pool.readable & ~np.isin(pool.persons, pool.persons[train]))
    novel = _evaluation_only(pool, ~pool.base & ~pool.held_out, data, seed)
    domain = _evaluation_only(pool, pool.base & pool.held_out, data, seed)
    if novel_names and not len(novel):
        raise DataError(
            f"the novel classes ({', '.join(novel_names)}) have no test picture; set novel_classes = 0",
        )
    if data.held_out_domain is not None and not len(domain):
        raise DataError(f"held_out_domain {data.held_out_domain!r} has no test picture of a class that is trained on")

    domains = None if images.domains is None else images.domains[train]
    parts = divide(
        pool.labels[train],
        domains,
        partition,
        seed,
        class_names=names,
        domain_names=images.domain_names,
    )
    if images.persons is not None:
        parts = at_one_client(parts, images.persons[train], seed)
    clients = tuple(train[part] for part in parts)
    local, neighbor = _weights(pool.cells, clients, test)
    labels = np.full(len(images), -1, dtype=np.int64)
    used = np.concatenate([train, test, novel, domain])
    labels[used] = pool.labels[used]
    return Task(
        class_names=names,
        novel_names=novel_names,
        labels=labels,
        train=clients,
        test=test,
        local=local,
        neighbor=neighbor,
        novel=novel,
        domain=domain,
        client_classes=tuple(tuple(np.unique(labels[rows]).tolist()) for rows in clients),
        client_domains=tuple(_domains_of(images, rows) for rows in clients),
    )


def _pool(
    images: ImageSet,
    data: DataSettings,
    partition: PartitionSettings,
    seed: int,
    readable: Flags | None,
) -> tuple[tuple[str, ...], tuple[str, ...], _Pool]:
    """Return base class names, novel class names, and the pool."""
    classes = len(images.class_names)
    if data.novel_classes > classes - 2:
        raise ConfigError(
            "data.novel_classes",
            data.novel_classes,
            f"{images.source} has {classes} classes, two of which at least must be trained on: at most {classes - 2}",
        )
    order = np.random.default_rng([seed, CLASSES_STREAM]).permutation(classes)
    base = np.sort(order[: classes - data.novel_classes])
    novel = np.sort(order[classes - data.novel_classes :])
    index_of = np.empty(classes, dtype=np.int64)
    index_of[base], index_of[novel] = np.arange(len(base)), np.arange(len(novel))
    is_base = np.isin(images.labels, base)
    held_out = _held_out(images, data)
    readable = np.ones(len(images), dtype=np.bool_) if readable is None else readable
    cells, cell_names = images.labels, tuple(f"class {name!r}" for name in images.class_names)
    if partition.scheme == "domain":
        domains, domain_names = _domains(images)
        cells = domains * classes + images.labels
        cell_names = tuple(f"{name} in domain {domain!r}" for domain in domain_names for name in cell_names)
    pool = _Pool(
        labels=index_of[images.labels],
        cells=cells,
        cell_names=cell_names,
        base=is_base,
        trainable=is_base & ~held_out & readable,
        held_out=held_out,
        own_test=images.is_test,
        readable=readable,
        persons=images.persons,
    )
    names = tuple(images.class_names[index] for index in base)
    for index, name in enumerate(names):
        if not np.any(pool.trainable & (pool.labels == index)):
            elsewhere = ""
            if data.held_out_domain is not None:
                elsewhere = f" outside of held_out_domain {data.held_out_domain!r}"
            raise DataError(
                f"class {name!r} has no readable picture{elsewhere}; at least 2 are needed, or remove it",
            )
    return names, tuple(images.class_names[index] for index in novel), pool


def _domains(images: ImageSet) -> tuple[Indices, tuple[str, ...]]:
    if images.domains is None or images.domain_names is None:
        raise ConfigError(
            "partition.scheme",
            "domain",
            f"{images.source} has no domains; use 'disjoint', 'classes', 'dirichlet' or 'iid', or domain folders",
        )
    return images.domains, images.domain_names


def _held_out(images: ImageSet, data: DataSettings) -> Flags:
    """Return [N], true for pictures of the held-out domain."""
    if data.held_out_domain is None:
        return np.zeros(len(images), dtype=np.bool_)
    if images.domains is None or images.domain_names is None:
        raise ConfigError(
            "data.held_out_domain",
            data.held_out_domain,
            f"{images.source} has no domains",
        )
    wanted = data.held_out_domain.replace("_", " ")  # a folder's own spelling is accepted too
    if wanted not in images.domain_names:
        known = ", ".join(images.domain_names)
        raise ConfigError(
            "data.held_out_domain",
            data.held_out_domain,
            f"must be one of the domains: {known}",
        )
    if len(images.domain_names) < 2:
        raise ConfigError(
            "data.held_out_domain",
            data.held_out_domain,
            "it is the only domain, so none is left",
        )
    flags: Flags = images.domains == images.domain_names.index(wanted)
    return flags


def _persons_apart(pool: _Pool, data: DataSettings, seed: int) -> _Pool:
    """Return a pool in which no person has both training and test pictures; the same one if persons are unknown."""
    if pool.persons is None:
        return pool
    rows = np.flatnonzero(pool.trainable)
    persons = pool.persons[rows]
    if pool.own_test is None:
        own_test = np.zeros(len(pool.labels), dtype=np.bool_)
        own_test[rows] = testing_persons(persons, pool.cells[rows], data, seed)
        return replace(pool, own_test=own_test)
    training = persons[~pool.own_test[rows]]
    both = pool.own_test & np.isin(pool.persons, training)
    return replace(pool, trainable=pool.trainable & ~both)


def _base_split(pool: _Pool, data: DataSettings, seed: int) -> tuple[Indices, Indices]:
    """Draw training and test pictures, sorted."""
    train: list[Indices] = []
    test: list[Indices] = []
    for cell in np.unique(pool.cells[pool.base & ~pool.held_out]).tolist():
        rows = _drawn(pool, cell, seed)
        rows = rows[pool.trainable[rows]]
        trains, tests = _cell_split(rows, pool.own_test, data, pool.cell_names[cell], pool.persons is not None)
        train.append(trains)
        test.append(tests)
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _cell_split(
    rows: Indices,
    own_test: Flags | None,
    data: DataSettings,
    name: str,
    of_persons: bool,
) -> tuple[Indices, Indices]:
    """Split one cell's pictures, which come in drawn order, into training and test.

    Args:
        rows: the cell's pictures.
        own_test: [N], true for pictures that may test only; None if any may train or test.
        data: the counts.
        name: of the cell, for messages.
        of_persons: whether whole persons train or test.
    """
    shots, tests = data.train_per_class, data.test_per_class
    if own_test is not None:
        trainable, testable = rows[~own_test[rows]], rows[own_test[rows]]
        for part, need, split, key in (
            (trainable, shots or 1, "training", "train_per_class"),
            (testable, tests or 1, "test", "test_per_class"),
        ):
            apart = ", where each person either trains or tests" if of_persons else ""
            _require_enough(
                part,
                need,
                f"{name} has {len(part)} readable pictures in the {split} split{apart}",
                key,
            )
        return trainable[:shots], testable[:tests]
    need = (shots or 1) + (tests or 1)
    key = "test_per_class" if shots is None and tests is not None else "train_per_class"
    count = len(rows)
    shortage = f"{name} has {count} readable pictures, of which {shots or 1} train and {tests or 1} or more test"
    _require_enough(rows, need, shortage, key)
    if tests is None and shots:
        tests = count - shots
    elif tests is None:
        tests = min(max(1, round(data.test_fraction * count)), count - 1)
    # The test pictures come from the end, so that they stay the same for any number of shots.
    return rows[: count - tests][:shots], rows[count - tests :]


def _require_enough(rows: Indices, need: int, shortage: str, key: str) -> None:
    if len(rows) < need:
        raise DataError(
            f"{shortage}: at least {need} are needed; lower {key}, add pictures, or remove it",
        )


def _evaluation_only(pool: _Pool, among: Flags, data: DataSettings, seed: int) -> Indices:
    """Draw test pictures of cells that no client trains on, sorted: at most `test_per_class` a cell."""
    among = among & pool.readable
    if pool.own_test is not None:
        among = among & pool.own_test
    chosen = [np.empty(0, dtype=np.int64)]
    for cell in np.unique(pool.cells[among]).tolist():
        rows = _drawn(pool, cell, seed)
        chosen.append(rows[among[rows]][: data.test_per_class])
    return np.sort(np.concatenate(chosen))


def _drawn(pool: _Pool, cell: int, seed: int) -> Indices:
    """Return all pictures of a cell in drawn order, with unreadable ones, so that they do not change the draw."""
    rows = np.flatnonzero(pool.cells == cell)
    return np.random.default_rng([seed, CELLS_STREAM, cell]).permutation(rows)


def _weights(
    cells: Indices, clients: tuple[Indices, ...], test: Indices
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute `Task.local` and `Task.neighbor` from every picture's cell [N]."""
    count = int(cells.max()) + 1
    counts = [np.bincount(cells[rows], minlength=count) for rows in clients]
    held = np.stack(counts).astype(np.float64)  # [K, cells]
    tests = np.bincount(cells[test], minlength=count)
    share = held / held.sum(axis=1, keepdims=True)
    local = (share / np.maximum(tests, 1))[:, cells[test]]
    others = (held == 0) & held.any(axis=0)
    neighbor = others[:, cells[test]].astype(np.float64)
    return local, neighbor / np.maximum(neighbor.sum(axis=1, keepdims=True), 1)


def _domains_of(images: ImageSet, rows: Indices) -> tuple[str, ...]:
    if images.domains is None or images.domain_names is None:
        return ()
    return tuple(images.domain_names[index] for index in np.unique(images.domains[rows]).tolist())
