"""From labeled pictures to a `Task`: who trains on what, and which pictures each accuracy is measured on.

A *cell* is a class, or a (domain, class) pair where the partition is by domain. Training and test pictures are drawn
cell by cell, each from a generator of its own, so that a cell's split does not change with the other cells, the number
of clients, or the number of shots: the pictures of 4 shots are among those of 16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino.errors import ConfigError, DataError
from sordino.tasks.images import Flags, ImageSet, Indices
from sordino.tasks.settings import DataSettings, PartitionSettings

CLASSES_STREAM, CELLS_STREAM = 1, 2  # what a generator derived from the seed is for


@dataclass(frozen=True, eq=False)
class Task:
    """K clients' training pictures and everybody's test pictures, as indices into an `ImageSet` of N.

    Attributes:
        class_names: the C base classes, the candidates in training and in every evaluation but the novel one.
        novel_names: the classes that nobody trains on, the candidates of the novel evaluation.
        labels: [N], index into `class_names`, or into `novel_names` for their pictures; -1 for an unused picture.
        train: K index arrays without overlap, sorted but for attackers' pictures.
        test: [T], test pictures of base classes, of the domains that are trained on; disjoint from `train`.
        local: [K, T] float64, rows that sum to 1: over the test pictures of the client's own cells, each cell with the
            weight that it has in the client's training data. `local @ correct` is local accuracy.
        neighbor: [K, T] float64, uniform over the test pictures of cells that others train on and the client does not;
            rows sum to 1, or are all zero where there is no such cell.
        novel: test pictures of novel classes; empty where there are none.
        domain: the held-out domain's test pictures of base classes; empty where no domain is held out.
        client_classes: for each client the classes that it trains on, ascending.
        client_domains: for each client the names of the domains that its pictures come from; empty without domains.
        triggered: test pictures with an attacker's trigger, whose label is the attacker's target; empty without attack.
        attackers: how many clients attack: the first ones.
    """

    class_names: tuple[str, ...]
    novel_names: tuple[str, ...]
    labels: Indices
    train: tuple[Indices, ...]
    test: Indices
    local: NDArray[np.float64]
    neighbor: NDArray[np.float64]
    novel: Indices
    domain: Indices
    client_classes: tuple[tuple[int, ...], ...]
    client_domains: tuple[tuple[str, ...], ...]
    triggered: Indices = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    attackers: int = 0

    @property
    def clients(self) -> int:
        """K."""
        return len(self.train)

    @property
    def used(self) -> Indices:
        """Indices of all pictures that train or test anything, ascending: those worth encoding."""
        return np.unique(np.concatenate([*self.train, self.test, self.novel, self.domain, self.triggered]))

    def summary(self) -> list[dict[str, Any]]:
        """For each client its number of training pictures, and the names of its classes and domains."""
        return [
            {
                "client": client,
                "images": len(rows),
                "classes": [self.class_names[index] for index in classes],
                "domains": list(domains),
            }
            for client, (rows, classes, domains) in enumerate(
                zip(self.train, self.client_classes, self.client_domains, strict=True)
            )
        ]


@dataclass(frozen=True, eq=False)
class _Pool:
    """What the draws below look at: every picture's class and cell, and which pictures may serve for what.

    Attributes:
        labels: [N], as in `Task`, but without unused pictures marked.
        cells: [N], the picture's cell.
        cell_names: how a message names each cell.
        base: [N], true for pictures of base classes.
        trainable: [N], true for readable base pictures of domains that are trained on.
        held_out: [N], true for the held-out domain's pictures.
        own_test: [N], true in the source's own test split; None without one.
        readable: [N].
    """

    labels: Indices
    cells: Indices
    cell_names: tuple[str, ...]
    base: Flags
    trainable: Flags
    held_out: Flags
    own_test: Flags | None
    readable: Flags


def build_task(
    images: ImageSet,
    data: DataSettings,
    partition: PartitionSettings,
    seed: int,
    readable: Flags | None = None,
) -> Task:
    """Split and partition `images`. The result depends on the arguments alone.

    Test pictures are the source's own test split where it has one. Otherwise each cell gives `train_per_class` pictures
    to training and `test_per_class` to test, where an absent count stands for the rest; with both absent,
    `test_fraction` of it tests. Novel classes and the held-out domain test with all they have (with a source's own test
    split: with those in it), at most `test_per_class` a cell.

    Args:
        readable: [N], false for pictures that could not be read and so are left out; None if all could.

    Raises:
        ConfigError: a setting that these pictures cannot serve, such as an unknown domain.
        DataError: a class, domain or client that has too few pictures.
    """
    names, novel_names, pool = _pool(images, data, partition, seed, readable)
    train, test = _base_split(pool, data, seed)
    novel = _evaluation_only(pool, ~pool.base & ~pool.held_out, data, seed)
    domain = _evaluation_only(pool, pool.base & pool.held_out, data, seed)
    if novel_names and not len(novel):
        raise DataError(f"the novel classes ({', '.join(novel_names)}) have no test picture; set novel_classes = 0")
    if data.held_out_domain is not None and not len(domain):
        raise DataError(f"held_out_domain {data.held_out_domain!r} has no test picture of a class that is trained on")

    from sordino.tasks.partitions import partition as divide  # imports `datasets`, which takes a second

    domains = None if images.domains is None else images.domains[train]
    parts = divide(pool.labels[train], domains, partition, seed, class_names=names, domain_names=images.domain_names)
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
    images: ImageSet, data: DataSettings, partition: PartitionSettings, seed: int, readable: Flags | None
) -> tuple[tuple[str, ...], tuple[str, ...], _Pool]:
    """Base class names, novel class names, and the pool."""
    classes = len(images.class_names)
    if data.novel_classes > classes - 2:
        raise ConfigError(
            "data.novel_classes",
            data.novel_classes,
            f"{images.source} has {classes} classes, two of which at least must be trained on: at most {classes - 2}",
        )
    order = np.random.default_rng([seed, CLASSES_STREAM]).permutation(classes)
    base, novel = np.sort(order[: classes - data.novel_classes]), np.sort(order[classes - data.novel_classes :])
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
    )
    names = tuple(images.class_names[index] for index in base)
    for index, name in enumerate(names):
        if not np.any(pool.trainable & (pool.labels == index)):
            elsewhere = "" if data.held_out_domain is None else f" outside of held_out_domain {data.held_out_domain!r}"
            raise DataError(f"class {name!r} has no readable picture{elsewhere}; at least 2 are needed, or remove it")
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
    """[N], true for pictures of the held-out domain."""
    if data.held_out_domain is None:
        return np.zeros(len(images), dtype=np.bool_)
    if images.domains is None or images.domain_names is None:
        raise ConfigError("data.held_out_domain", data.held_out_domain, f"{images.source} has no domains")
    wanted = data.held_out_domain.replace("_", " ")  # a folder's own spelling serves too
    if wanted not in images.domain_names:
        known = ", ".join(images.domain_names)
        raise ConfigError("data.held_out_domain", data.held_out_domain, f"must be one of the domains: {known}")
    if len(images.domain_names) < 2:
        raise ConfigError("data.held_out_domain", data.held_out_domain, "it is the only domain, so none is left")
    flags: Flags = images.domains == images.domain_names.index(wanted)
    return flags


def _base_split(pool: _Pool, data: DataSettings, seed: int) -> tuple[Indices, Indices]:
    """Training and test pictures, sorted."""
    train: list[Indices] = []
    test: list[Indices] = []
    for cell in np.unique(pool.cells[pool.base & ~pool.held_out]).tolist():
        rows = _drawn(pool, cell, seed)
        rows = rows[pool.trainable[rows]]
        mine, tests = _cell_split(rows, pool.own_test, data, pool.cell_names[cell])
        train.append(mine)
        test.append(tests)
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _cell_split(rows: Indices, own_test: Flags | None, data: DataSettings, name: str) -> tuple[Indices, Indices]:
    """Training and test pictures among one cell's, which come in drawn order."""
    shots, tests = data.train_per_class, data.test_per_class
    if own_test is not None:
        mine, others = rows[~own_test[rows]], rows[own_test[rows]]
        _enough(mine, shots or 1, f"{name} has {len(mine)} readable pictures in the training split", "train_per_class")
        _enough(others, tests or 1, f"{name} has {len(others)} readable pictures in the test split", "test_per_class")
        return mine[:shots], others[:tests]
    need = (shots or 1) + (tests or 1)
    key = "test_per_class" if shots is None and tests is not None else "train_per_class"
    _enough(
        rows,
        need,
        f"{name} has {len(rows)} readable pictures, of which {shots or 1} train and {tests or 1} or more test",
        key,
    )
    if tests is None:  # the test pictures come from the end, so that they stay the same whatever the shots
        tests = len(rows) - shots if shots else min(max(1, round(data.test_fraction * len(rows))), len(rows) - 1)
    return rows[: len(rows) - tests][:shots], rows[len(rows) - tests :]


def _enough(rows: Indices, need: int, what: str, key: str) -> None:
    if len(rows) < need:
        raise DataError(f"{what}: at least {need} are needed; lower {key}, add pictures, or remove it")


def _evaluation_only(pool: _Pool, among: Flags, data: DataSettings, seed: int) -> Indices:
    """Test pictures of cells that nobody trains on, sorted: at most `test_per_class` a cell."""
    among = among & pool.readable
    if pool.own_test is not None:
        among = among & pool.own_test
    chosen = [np.empty(0, dtype=np.int64)]
    for cell in np.unique(pool.cells[among]).tolist():
        rows = _drawn(pool, cell, seed)
        chosen.append(rows[among[rows]][: data.test_per_class])
    return np.sort(np.concatenate(chosen))


def _drawn(pool: _Pool, cell: int, seed: int) -> Indices:
    """All pictures of a cell in drawn order. Unreadable ones are among them, so that they do not change the draw."""
    rows = np.flatnonzero(pool.cells == cell)
    return np.random.default_rng([seed, CELLS_STREAM, cell]).permutation(rows)


def _weights(
    cells: Indices, clients: tuple[Indices, ...], test: Indices
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`Task.local` and `Task.neighbor`, from every picture's cell [N]."""
    count = int(cells.max()) + 1
    held = np.stack([np.bincount(cells[rows], minlength=count) for rows in clients]).astype(np.float64)  # [K, cells]
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
