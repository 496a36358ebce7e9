"""Partitions of training pictures over clients, by flwr-datasets' partitioners.

Each scheme becomes a column that a partitioner reads. Rows are passed in an order drawn from the
seed, because some partitioners cut the rows as they lie (IID, and the split of a class between its
holders).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sordino.errors import ConfigError, DataError
from sordino.tasks.images import Indices
from sordino.tasks.settings import PartitionSettings

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

# Purposes of generators that are derived from the seed.
ROWS_STREAM, CLASSES_STREAM, DRAW_STREAM = 11, 12, 13
DIRICHLET_DRAWS = 10


def partition(
    labels: Indices,
    domains: Indices | None,
    settings: PartitionSettings,
    seed: int,
    *,
    class_names: Sequence[str] | None = None,
    domain_names: Sequence[str] | None = None,
) -> list[Indices]:
    """Divide n training pictures over K clients, each picture to exactly one.

    - disjoint: classes are assigned in groups whose sizes differ by one at most.
    - classes: client i holds classes i, ..., i + classes_per_client - 1 modulo C; holders of a
      class divide its pictures evenly and without overlap.
    - dirichlet: each class is divided in proportions drawn from Dirichlet(beta, ..., beta) (Hsu et
      al., 2019), without the later variants' balancing of sizes.
    - iid: sizes differ by one at most.
    - domain: clients are assigned to the domains as evenly as possible, in the domains' order.
      Clients of one domain divide its pictures as in iid or, if beta is given, as in dirichlet.

    Args:
        labels: [n], classes 0 to C - 1.
        domains: [n], or None if the source has none.
        settings: the `[partition]` table.
        seed: the run's seed.
        class_names, domain_names: names for messages; None means indices.

    Returns:
        K sorted arrays of indices into `labels`.

    Raises:
        ConfigError: the classes or domains do not allow this number of clients.
        DataError: a client would have no picture.
    """
    order = np.random.default_rng([seed, ROWS_STREAM]).permutation(len(labels))
    if settings.clients > len(labels):
        raise DataError(
            f"{settings.clients} clients but only {len(labels)} training pictures; have fewer clients "
            "(partition.clients) or more pictures (data.train_per_class)"
        )
    if settings.scheme == "disjoint":
        parts = _disjoint(labels[order], settings, seed)
    elif settings.scheme == "classes":
        parts = _classes(labels[order], settings, seed, class_names)
    elif settings.scheme == "dirichlet":
        draws = np.random.default_rng([seed, DRAW_STREAM])
        parts = _dirichlet(labels[order], settings.clients, settings.beta or 1.0, draws)
    elif settings.scheme == "iid":
        parts = _iid(len(labels), settings.clients)
    else:
        parts = _by_domain(
            labels[order],
            None if domains is None else domains[order],
            settings,
            seed,
            domain_names,
        )
    return [np.sort(order[part]) for part in parts]


def _disjoint(labels: Indices, settings: PartitionSettings, seed: int) -> list[Indices]:
    from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

    classes = np.unique(labels)
    if len(classes) < settings.clients:
        raise ConfigError(
            "partition.clients",
            settings.clients,
            f"scheme 'disjoint' gives each client a class of its own, and there are {len(classes)}: at most that many",
        )
    dealt = _class_order(len(classes), settings, seed)
    # The partitioner derives the number of groups from their size; here the number is given, so
    # groups are made first.
    groups = np.array_split(classes[dealt], settings.clients)
    owner = np.empty(int(classes.max()) + 1, dtype=np.int64)
    for client, group in enumerate(groups):
        owner[group] = client
    partitioner = GroupedNaturalIdPartitioner(
        partition_by="part",
        group_size=1,
        sort_unique_ids=True,
    )
    return _parts(partitioner, owner[labels], settings.clients)


def _classes(
    labels: Indices, settings: PartitionSettings, seed: int, class_names: Sequence[str] | None
) -> list[Indices]:
    from flwr_datasets.partitioner import PathologicalPartitioner

    classes = np.unique(labels)
    count, per_client = len(classes), settings.classes_per_client or 1
    if per_client > count:
        raise ConfigError(
            "partition.classes_per_client",
            per_client,
            f"there are {count} classes: at most that many",
        )
    if settings.clients + per_client - 1 < count:
        raise ConfigError(
            "partition.clients",
            settings.clients,
            f"with {per_client} classes each, from the i-th on, some of the {count} classes would have no holder; have "
            f"at least {count - per_client + 1} clients, or use scheme 'disjoint'",
        )
    place = np.empty(int(classes.max()) + 1, dtype=np.int64)  # each class's place in the cycle
    dealt = classes[_class_order(count, settings, seed)]
    place[dealt] = np.arange(count)
    held = (np.arange(settings.clients)[:, None] + np.arange(per_client)) % count  # [clients, per_client] places
    holders = np.bincount(held.ravel(), minlength=count)
    for index in range(count):
        pictures = int(np.sum(labels == dealt[index]))
        if pictures < holders[index]:
            name = dealt[index] if class_names is None else class_names[dealt[index]]
            raise DataError(
                f"class {str(name)!r} has {pictures} training pictures for {holders[index]} clients that hold it; "
                "have fewer clients, fewer classes_per_client, or a higher train_per_class"
            )
    partitioner = PathologicalPartitioner(
        num_partitions=settings.clients,
        partition_by="part",
        num_classes_per_partition=per_client,
        class_assignment_mode="deterministic",
        shuffle=False,
    )
    return _parts(partitioner, place[labels], settings.clients)


def _class_order(count: int, settings: PartitionSettings, seed: int) -> NDArray[np.int64]:
    if not settings.shuffled:
        return np.arange(count)
    return np.random.default_rng([seed, CLASSES_STREAM]).permutation(count)


def _dirichlet(
    labels: Indices,
    clients: int,
    beta: float,
    rng: np.random.Generator,
) -> list[Indices]:
    """Divide pictures by Dirichlet proportions; draw until each client has a picture, at most `DIRICHLET_DRAWS` times.

    The partitioner rounds the bounds between clients down. This gives its last client half a
    picture too many of every class (all of them, of a class with one). The proportions of a class
    are exchangeable, so the last client is drawn anew for each class. The partitioner's own check
    for empty clients would come before that, so it is off.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    for _ in range(DIRICHLET_DRAWS):
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="part",
            alpha=float(beta),
            min_partition_size=0,
            self_balancing=False,
            shuffle=False,
            seed=int(rng.integers(2**31)),
        )
        owner = np.empty(len(labels), dtype=np.int64)
        for client, rows in enumerate(_parts(partitioner, labels, clients)):
            owner[rows] = client
        for index in np.unique(labels):
            of_class = labels == index
            owner[of_class] = rng.permutation(clients)[owner[of_class]]
        if len(np.unique(owner)) == clients:
            return [np.flatnonzero(owner == client) for client in range(clients)]
    raise DataError(
        f"Dirichlet(beta = {beta}) left one of {clients} clients without a picture in each of "
        f"{DIRICHLET_DRAWS} draws from {len(labels)} training pictures of {len(np.unique(labels))} classes; raise "
        "partition.beta or have fewer clients"
    )


def _iid(count: int, clients: int) -> list[Indices]:
    from flwr_datasets.partitioner import IidPartitioner

    return _parts(IidPartitioner(num_partitions=clients), np.zeros(count, dtype=np.int64), clients)


def _by_domain(
    labels: Indices,
    domains: Indices | None,
    settings: PartitionSettings,
    seed: int,
    domain_names: Sequence[str] | None,
) -> list[Indices]:
    from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

    if domains is None:
        raise ConfigError(
            "partition.scheme",
            "domain",
            "the source has no domains; use another scheme",
        )
    present = np.unique(domains)
    if settings.clients < len(present):
        names = ", ".join(str(index) if domain_names is None else domain_names[index] for index in present.tolist())
        raise ConfigError(
            "partition.clients",
            settings.clients,
            f"scheme 'domain' needs a client at least for each of the {len(present)} domains ({names})",
        )
    partitioner = GroupedNaturalIdPartitioner(
        partition_by="part",
        group_size=1,
        sort_unique_ids=True,
    )
    shares = [len(share) for share in np.array_split(np.arange(settings.clients), len(present))]
    by_domain = zip(_parts(partitioner, domains, len(present)), shares, strict=True)
    parts: list[Indices] = []
    for index, (rows, share) in enumerate(by_domain):
        if len(rows) < share:
            name = present[index] if domain_names is None else domain_names[int(present[index])]
            raise DataError(
                f"domain {str(name)!r} has {len(rows)} training pictures for {share} clients; have fewer clients "
                "(partition.clients) or more pictures (data.train_per_class)"
            )
        if settings.beta is None:
            within = _iid(len(rows), share)
        else:
            rng = np.random.default_rng([seed, DRAW_STREAM, index])
            within = _dirichlet(labels[rows], share, settings.beta, rng)
        parts += [rows[part] for part in within]
    return parts


def _parts(partitioner: Partitioner, column: NDArray[np.int64], count: int) -> list[Indices]:
    """Return the row numbers of each of `count` partitions of a table with this one column."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"part": column, "row": np.arange(len(column))})
    numbered = [partitioner.load_partition(index).with_format("numpy") for index in range(count)]
    return [np.asarray(part["row"][:], dtype=np.int64) for part in numbered]
