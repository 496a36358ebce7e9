"""`Task`: each client's training pictures, and the test pictures of each accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino.tasks.images import Indices


@dataclass(frozen=True, eq=False)
class Task:
    """K clients' training pictures and the common test pictures, as indices into an `ImageSet` of N.

    Attributes:
        class_names: the C base classes, the candidates in training and in every evaluation but the
            novel one.
        novel_names: the classes that no client trains on, the candidates of the novel evaluation.
        labels: [N], index into `class_names`, or into `novel_names` for their pictures; -1 for an
            unused picture.
        train: K index arrays without overlap, sorted except for attackers' pictures.
        test: [T], test pictures of base classes, of the domains that are trained on; disjoint from
            `train`.
        local: [K, T] float64 weights over the test pictures of the client's own cells; rows sum to 1. Each cell has
            its weight in the client's training data. `local @ correct` is local accuracy.
        neighbor: [K, T] float64, uniform over the test pictures of cells that others train on and
            the client does not. Rows sum to 1, or are all zero if there is no such cell.
        novel: test pictures of novel classes; empty where there are none.
        domain: the held-out domain's test pictures of base classes; empty where no domain is held
            out.
        client_classes: for each client the classes that it trains on, ascending.
        client_domains: for each client the names of the domains of its pictures; empty without
            domains.
        triggered: test pictures with an attacker's trigger, labeled as the attacker's target; empty
            without attack.
        attackers: the number of clients that attack, which are the first ones.
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
        """Return K."""
        return len(self.train)

    @property
    def used(self) -> Indices:
        """Return the indices of all pictures that train or test anything, ascending: those to encode."""
        parts = [*self.train, self.test, self.novel, self.domain, self.triggered]
        return np.unique(np.concatenate(parts))

    @property
    def client_names(self) -> tuple[str, ...]:
        """Return the name of each client: its domain's, numbered where several have it, or else its number from 0.

        All have numbers if a client's pictures are not of one domain.
        """
        if any(len(domains) != 1 for domains in self.client_domains):
            return tuple(str(client) for client in range(self.clients))
        domain_of = [domain for (domain,) in self.client_domains]
        place = [domain_of[:client].count(domain) + 1 for client, domain in enumerate(domain_of)]
        alone = [domain_of.count(domain) == 1 for domain in domain_of]
        return tuple(d if one else f"{d} {n}" for d, n, one in zip(domain_of, place, alone, strict=True))

    def summary(self) -> list[dict[str, Any]]:
        """Return for each client its name and number of training pictures, and the names of its classes and domains."""
        return [
            {
                "client": client,
                "name": self.client_names[client],
                "images": len(rows),
                "classes": [self.class_names[index] for index in classes],
                "domains": list(domains),
            }
            for client, (rows, classes, domains) in enumerate(
                zip(self.train, self.client_classes, self.client_domains, strict=True)
            )
        ]
