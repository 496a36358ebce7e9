"""The training examples of K clients, and the batches that are drawn from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sordino.errors import RunError
from sordino.privacy.gradients import Batch
from sordino.privacy.sampling import PoissonSampler
from sordino.privacy.statistics.estimates import ClassStatistics
from sordino.randomness import Streams


@dataclass(frozen=True)
class ClientData:
    """The training examples of K clients, as rows of one table of images, or of frozen layers' outputs for them.

    Attributes:
        features: [N, ...] the table, as the method's model reads it.
        labels: [N] class indices.
        rows: [K, n] row numbers, padded on the right to the largest client.
        counts: [K] number of real ones among a client's rows.
        weights: [K] the weight that each client tells the server for averaging; ones if sizes stay private.
        poisson: if set, it draws batches by Poisson sampling: each example, or person, independently of all others.
        hidden: [N], true for rows of the table that no batch shows. They are masked after a batch was drawn, so that
            sizes, rates and random draws are as if they were shown. An audit hides canaries so; None hides nothing.
        statistics: the clients' class statistics, if the mechanism releases them or the method works on them.
        persons: [N] whose each row of the table is, by number; None if unknown. Only a sampler of persons reads it.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor
    counts: Tensor
    weights: Tensor
    poisson: PoissonSampler | None = None
    hidden: Tensor | None = None
    statistics: ClassStatistics | None = None
    persons: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, steps: int, size: int | None, streams: Streams) -> Iterator[Batch]:
        """Yield `steps` minibatches of every client, each pass over a client's examples in a new random order.

        Args:
            steps: number of minibatches.
            size: examples a batch, at most; None gives every example each time. A pass's last batch may be smaller.
                Under Poisson sampling, the expected size, in persons where these are sampled.
            streams: decides the order.
        """
        if self.poisson is not None:
            yield from (self._sampled(size, self.poisson) for _ in range(steps))
            return
        columns = torch.arange(self.rows.shape[1], device=self.rows.device)
        if size is None or size >= self.rows.shape[1]:
            batch = self._batch(self.rows, columns < self.counts[:, None])
            yield from (batch for _ in range(steps))
            return
        plans = [
            _batch_plan(count, steps, size, generator)
            for count, generator in zip(self._sizes, streams.generators("batches"), strict=True)
        ]
        # All steps' plans are moved in one copy: [steps, K, B], -1 for none.
        for chosen in torch.stack(plans, dim=1).to(self.rows.device):
            yield self._batch(self.rows.gather(1, chosen.clamp(min=0)), chosen >= 0)

    @cached_property
    def _sizes(self) -> list[int]:
        """Return `counts` on the host."""
        sizes: list[int] = self.counts.tolist()
        return sizes

    def balanced(self) -> ClientData:
        """Return the same examples, those of a client's rarer classes repeated so that all its classes count alike.

        Hidden examples are left out, unless a client has no others.

        Raises:
            ValueError: batches are Poisson samples. A repeated example would be in a batch more than once, as often as
                the other examples decide, and no mechanism bounds that.
        """
        if self.poisson is not None:
            raise ValueError("classes cannot be balanced under Poisson sampling; take batches as they are")
        repeated = []
        for row, count in zip(self.rows, self.counts, strict=True):
            client_rows = row[:count]
            shown = client_rows[self.shown(client_rows)]
            client_rows = shown if len(shown) else client_rows
            labels = self.labels[client_rows]
            most = int(labels.bincount().max())
            classes = [client_rows[labels == label] for label in labels.unique()]
            # -(-a // b) rounds up: enough copies of a class to cut `most` rows from.
            repeated.append(torch.cat([rows.repeat(-(-most // len(rows)))[:most] for rows in classes]))
        counts = torch.tensor([len(rows) for rows in repeated], device=self.counts.device)
        padded = torch.nn.utils.rnn.pad_sequence(repeated, batch_first=True)
        return replace(self, rows=padded, counts=counts)

    def shown(self, rows: Tensor) -> Tensor:
        """Return true for rows of the table, of any shape, that are not hidden."""
        return torch.ones_like(rows, dtype=torch.bool) if self.hidden is None else ~self.hidden[rows]

    def _sampled(self, size: int | None, poisson: PoissonSampler) -> Batch:
        """Return a Poisson sample: each example, or person, is in it independently of all others. It may be empty."""
        if poisson.person_images is not None:
            return self._sampled_persons(size, poisson, poisson.person_images)
        drawn, sampling = poisson.draw(self._sizes, size)
        chosen = self._padded(drawn)
        batch = self._batch(self.rows.gather(1, chosen.clamp(min=0)), chosen >= 0)
        return replace(batch, sampling=sampling)

    def _sampled_persons(self, size: int | None, poisson: PoissonSampler, most: int) -> Batch:
        """Return a Poisson sample of persons, with the first `most` rows of each who was drawn.

        A person's rows come in the client's order, so which of them are first depends on no other person.
        """
        if self.persons is None:
            raise RunError("a sample of persons needs to know whose each image is; give ClientData its persons")
        held = [_by_person(row[:count]) for row, count in zip(self.persons[self.rows].cpu(), self._sizes, strict=True)]
        drawn, sampling = poisson.draw([persons.count for persons in held], size)
        pairs = [persons.images(numbers, most) for persons, numbers in zip(held, drawn, strict=True)]
        chosen = self._padded([places for places, _ in pairs])
        batch = self._batch(self.rows.gather(1, chosen.clamp(min=0)), chosen >= 0)
        return replace(batch, sampling=sampling, persons=self._padded([owners for _, owners in pairs]))

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        """Return one sequence of numbers a client, [K, B] with B at least 1, padded with -1."""
        padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=-1)
        padded = padded if padded.shape[1] else padded.new_full((len(parts), 1), -1)
        return padded.to(self.rows.device)

    def _batch(self, rows: Tensor, mask: Tensor) -> Batch:
        shown = self.shown(rows)
        # A hidden example is not even read: another stands in for it, so that its numbers, which may not be finite,
        # enter no sum, not even multiplied by zero.
        stand_in = 0 if self.hidden is None else int((~self.hidden).to(torch.int8).argmax())
        rows = torch.where(shown, rows, stand_in)
        return Batch(self.features[rows], self.labels[rows], mask & shown, rows=rows)


@dataclass(frozen=True)
class _Persons:
    """The persons of one client.

    Attributes:
        count: P, their number.
        order: [n], the places of the client's rows, those of one person together and each person's in their own order.
        owners: [n], for these places whose they are, from 0 to P - 1.
        ranks: [n], for these places how many of the same person come before.
    """

    count: int
    order: Tensor
    owners: Tensor
    ranks: Tensor

    def images(self, numbers: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return the places of the first `most` rows of each of some persons, and whose they are."""
        drawn = torch.zeros(self.count, dtype=torch.bool)
        drawn[numbers] = True
        kept = drawn[self.owners] & (self.ranks < most)
        return self.order[kept], self.owners[kept]


def _by_person(persons: Tensor) -> _Persons:
    """Return the persons of a client whose rows [n] are of these."""
    numbers, owners, counts = persons.unique(return_inverse=True, return_counts=True)
    order = owners.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    return _Persons(len(numbers), order, owners[order], torch.arange(len(order)) - starts[owners[order]])


def _batch_plan(count: int, steps: int, size: int, generator: np.random.Generator) -> Tensor:
    """Return the numbers of a client's `count` examples that each step takes: [steps, size], padded with -1."""
    plan = torch.full((steps, size), -1)
    order, used = torch.empty(0, dtype=torch.int64), 0
    for step in range(steps):
        if used >= len(order):
            order, used = torch.from_numpy(generator.permutation(count)), 0
        chosen = order[used : used + size]
        plan[step, : len(chosen)] = chosen
        used += size
    return plan
