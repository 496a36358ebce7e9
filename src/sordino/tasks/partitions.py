"""Partitions of training pictures over clients.

The schemes divide rows as the partitioners of flwr-datasets do; a test compares them. They are
implemented here because that package installs `datasets`, pandas, pyarrow and matplotlib, which
only Hugging Face data sets and plots need.

Rows are divided in an order drawn from the seed, because some schemes cut the rows as they lie
(iid, and the split of a class between its holders).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sordino.errors import ConfigError, DataError
from sordino.tasks.images import Indices
from sordino.tasks.settings import PartitionSettings

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
    classes = np.unique(labels)
    if len(classes) < settings.clients:
        raise ConfigError(
            "partition.clients",
            settings.clients,
            f"scheme 'disjoint' gives each client a class of its own, and there are {len(classes)}: at most that many",
        )
    dealt = _class_order(len(classes), settings, seed)
    groups = np.array_split(classes[dealt], settings.clients)
    owner = np.empty(int(classes.max()) + 1, dtype=np.int64)
    for client, group in enumerate(groups):
        owner[group] = client
    return [np.flatnonzero(owner[labels] == client) for client in range(settings.clients)]


def _classes(
    labels: Indices, settings: PartitionSettings, seed: int, class_names: Sequence[str] | None
) -> list[Indices]:
    classes = np.unique(labels)
    count, per_client = len(classes), settings.classes_per_client or 1
    if per_client > count:
        allowed = f"there are {count} classes: at most that many"
        raise ConfigError("partition.classes_per_client", per_client, allowed)
    if settings.clients + per_client - 1 < count:
        raise ConfigError(
            "partition.clients",
            settings.clients,
            f"with {per_client} classes each, from the i-th on, some of the {count} classes would have no holder; have "
            f"at least {count - per_client + 1} clients, or use scheme 'disjoint'",
        )
    dealt = classes[_class_order(count, settings, seed)]
    # [K, classes_per_client]: the classes that a client holds, as places in `dealt`.
    held = (np.arange(settings.clients)[:, None] + np.arange(per_client)) % count
    owner = np.empty(len(labels), dtype=np.int64)
    for index in range(count):
        holders = np.flatnonzero((held == index).any(axis=1))
        rows = np.flatnonzero(labels == dealt[index])
        if len(rows) < len(holders):
            name = dealt[index] if class_names is None else class_names[dealt[index]]
            raise DataError(
                f"class {str(name)!r} has {len(rows)} training pictures for {len(holders)} clients that hold it; "
                "have fewer clients, fewer classes_per_client, or a higher train_per_class"
            )
        for client, share in zip(holders, np.array_split(rows, len(holders)), strict=True):
            owner[share] = client
    return [np.flatnonzero(owner == client) for client in range(settings.clients)]


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

    Bounds between clients are rounded down. This gives the last client half a picture too many of
    every class, and all pictures of a class with one. The proportions of a class are exchangeable,
    so the last client is drawn anew for each class.
    """
    for _ in range(DIRICHLET_DRAWS):
        proportions = np.random.default_rng(int(rng.integers(2**31)))
        owner = np.empty(len(labels), dtype=np.int64)
        for index in np.unique(labels):
            rows = np.flatnonzero(labels == index)
            bounds = np.cumsum(proportions.dirichlet(np.full(clients, float(beta)))) * len(rows)
            sizes = np.diff(bounds.astype(np.int64)[:-1], prepend=0, append=len(rows))
            owner[rows] = np.repeat(rng.permutation(clients), sizes)
        if len(np.unique(owner)) == clients:
            return [np.flatnonzero(owner == client) for client in range(clients)]
    raise DataError(
        f"Dirichlet(beta = {beta}) left one of {clients} clients without a picture in each of "
        f"{DIRICHLET_DRAWS} draws from {len(labels)} training pictures of {len(np.unique(labels))} classes; raise "
        "partition.beta or have fewer clients"
    )


def _iid(count: int, clients: int) -> list[Indices]:
    return np.array_split(np.arange(count), clients)


def _by_domain(
    labels: Indices,
    domains: Indices | None,
    settings: PartitionSettings,
    seed: int,
    domain_names: Sequence[str] | None,
) -> list[Indices]:
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
    shares = [len(share) for share in np.array_split(np.arange(settings.clients), len(present))]
    parts: list[Indices] = []
    for index, (domain, share) in enumerate(zip(present, shares, strict=True)):
        rows = np.flatnonzero(domains == domain)
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
