"""The mechanism `statistics`: one noisy release before the first round, and no noise after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sordino.privacy.cotangent import image_directions, public_directions
from sordino.privacy.example_level import IMAGES_PUBLIC, PERSONS_KNOWN, SIZES_KNOWN
from sordino.privacy.ledger import OBSERVERS, Channel, Disclosure, Ledger, Observer, Release
from sordino.privacy.mechanism import Mechanism, summed_securely
from sordino.privacy.secure_mean import ServerSums, SumTerms
from sordino.privacy.statistics.estimates import Estimator, Noise
from sordino.privacy.statistics.posterior import Observed
from sordino.privacy.statistics.release import class_sums, contributions, count_share
from sordino.randomness import Randomness

CONTENT = "class counts and class sums of features, once"
# What leaves in rounds is made of the release; images that are handed over before it are not.
MADE_OF_IT: tuple[Channel, ...] = ("upload", "shares", "mean", "prompt", "memory", "sizes")
FIELD = "statistics"  # of the secure sum
COUNTS_ONLY = 0.9999  # of the squared norm goes to the counts, for a method that uses nothing else


@dataclass(frozen=True)
class StatisticsMechanism(Mechanism):
    """Release class statistics once; see `release` for what that is and why its sensitivity is 1.

    With `noise_by = "client"` each client's matrix has enough noise for itself, the server sees them all, and what they
    tell together is told to all. With "server" and "shares" the sum of all matrices is released, with one noise. A
    method with a personal part then needs the client's own matrix too: both are made of the same examples, so together
    they are one Gaussian release, and `shared_budget` of it goes to the sum.

    If no mechanism is on and the method works on statistics, they are exchanged without noise.

    Attributes:
        earlier: the noise multipliers of a release that is used again; None if the run makes its own.
    """

    earlier: Noise | None = None

    @property
    def releases_statistics(self) -> bool:
        return True

    @property
    def replaces_images(self) -> bool:
        """Tell whether clients train on examples drawn from the release instead of their images."""
        return self.settings.on

    @property
    def sums_securely(self) -> bool:
        return False  # in no round

    @property
    def in_shares(self) -> bool:
        """Tell whether the release of the sum is a secure sum."""
        return self.settings.on and self.settings.noise_by == "shares"

    @property
    def joins(self) -> bool:
        """Tell whether what the clients released is joined; a method that sends nothing uses its own only."""
        return self.inputs.server_uses != "nothing"

    @property
    def uploads_matrices(self) -> bool:
        """Tell whether the server sees the clients' matrices, with noise or not."""
        return self.joins and not self.in_shares

    @property
    def uploads_exact(self) -> bool:
        """Tell whether those are without noise, for a trusted server that adds it.

        They stay float64: what rounding to float32 does to a large sum would not be within the sensitivity.
        """
        return self.uploads_matrices and self.settings.on and self.settings.noise_by == "server"

    @cached_property
    def multipliers(self) -> Noise:
        """Return the noise multipliers of a client's own matrix and of the sum."""
        if self.earlier is not None:
            return self.earlier
        z, share = self.noise_multiplier, self.settings.shared_budget
        if self.settings.noise_by == "client" or not self.settings.on:
            return Noise(z, None)
        if not self.inputs.personal:
            return Noise(None, z)
        return Noise(z / math.sqrt(1 - share), z / math.sqrt(share))

    @property
    def rate(self) -> float:
        """Return the probability with which a unit is in the release."""
        return self.settings.sampling_rate if self.settings.on else 1.0

    @property
    def clip(self) -> float:
        """Return the sensitivity: the largest norm of one unit's contribution; 1 for examples."""
        return self.settings.clip if self.settings.by_person else 1.0

    @cached_property
    def count_share(self) -> float:
        """Return a^2, the counts' share of a contribution's squared norm; from public numbers alone."""
        if self.settings.count_share is not None:
            return self.settings.count_share
        if self.inputs.counts_only:
            return COUNTS_ONLY
        sizes = sorted(self.inputs.sizes)
        examples = sizes[len(sizes) // 2] if self.multipliers.own is not None else sum(sizes)
        noise = self.multipliers.own if self.multipliers.own is not None else self.multipliers.total
        assert noise is not None
        return count_share(noise, self.inputs.classes, self.rate * examples)

    @cached_property
    def directions(self) -> Tensor | None:
        """Return the public directions [D, r], or None for all."""
        assert self.model is not None
        encoder, rank = self.model.encoder, self.settings.subspace
        if rank is None or not self.settings.on:
            return None
        if self.settings.directions == "names":
            return public_directions(encoder, rank)
        assert self.public is not None
        return image_directions(self.public, rank).to(encoder.device)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of a matrix, (C, 1 + r)."""
        assert self.model is not None
        width = self.model.encoder.feature_width if self.directions is None else self.directions.shape[1]
        return len(self.model.classes), 1 + width

    @cached_property
    def estimator(self) -> Estimator:
        """Return what turns released matrices into estimates."""
        assert self.model is not None
        encoder = self.model.encoder
        with torch.no_grad():
            text = encoder.text_features(encoder.zero_shot_context()[None], self.model.classes)[0]
        own, total = self.multipliers.own, self.multipliers.total
        noise = Noise(None if own is None else own * self.clip, None if total is None else total * self.clip)
        return Estimator(
            noise,
            self.count_share,
            self.rate,
            [size * self.clip for size in self.inputs.sizes],
            self.directions,
            text,
            not self.inputs.personal and self.inputs.server_uses == "mean",
            self.joins,
        )

    def matrices(
        self,
        features: Tensor,
        labels: Tensor,
        rows: Sequence[Tensor],
        randomness: Randomness,
        persons: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Add up the statistics of a stack of clients.

        Args:
            features, labels: [N, D] and [N], the table of images.
            rows: K lists of row numbers.
            randomness: of the clients' noise and samples.
            persons: [N], whose images they are; needed where persons are protected.

        Returns:
            [K, C, 1 + r] exact sums, float64, which must not leave; and the same with each client's own noise, float32,
            or None if clients release none.
        """
        if not self.settings.by_person:
            persons = None
        chosen = self._sampled(rows, persons, randomness)
        classes, width = self.shape

        def of_client(part: Tensor) -> Tensor:
            shares = contributions(features[part], self.count_share, self.directions)
            whose = None if persons is None else persons[part]
            return class_sums(shares, labels[part], classes, whose, self.clip)

        exact = torch.stack([of_client(part) for part in chosen])
        if self.multipliers.own is None:
            return exact, None
        noise = randomness.normal("noise on class statistics", classes, width).to(exact)
        return exact, (exact + self.multipliers.own * self.clip * noise).float()

    def _sampled(self, rows: Sequence[Tensor], persons: Tensor | None, randomness: Randomness) -> list[Tensor]:
        """Return the rows that are in the release: each example, or person, independently of all others."""
        rate = self.rate
        if rate == 1:
            return list(rows)
        units = [torch.arange(len(part)) if persons is None else _numbered(persons[part]) for part in rows]
        counts = [int(part.max()) + 1 if len(part) else 0 for part in units]
        drawn = randomness.uniform("sample of statistics", counts)
        chosen = [(numbers < rate)[unit] for numbers, unit in zip(drawn, units, strict=True)]
        return [part[taken.to(part.device)] for part, taken in zip(rows, chosen, strict=True)]

    def summed(self, exact: Tensor, randomness: Randomness) -> Tensor:
        """Return the sum of all clients' matrices [C, 1 + r] with the server's noise, float32.

        Args:
            exact: [K, C, 1 + r], which a trusted server has.
            randomness: of the server.
        """
        assert self.multipliers.total is not None
        noise = randomness.common_normal("noise on the sum of class statistics", *exact.shape[1:])
        total: Tensor = exact.double().sum(0) + self.multipliers.total * self.clip * noise.to(exact.device).double()
        return total.float()

    def summed_in_shares(self, sums: ServerSums) -> tuple[Tensor, float]:
        """Return the secure sum [C, 1 + r], float32, and the noise multiplier that its survivors left."""
        fields, charged = sums.of(self.terms, {FIELD: torch.zeros(1, *self.shape, dtype=torch.float64)})
        return fields[FIELD].float(), charged

    @cached_property
    def terms(self) -> SumTerms:
        """Return the terms of the secure sum; one entry may hold all of a client's examples."""
        assert self.multipliers.total is not None
        largest = float(max(self.inputs.sizes)) * self.clip
        return SumTerms("the sum of class statistics", self.settings.unit, self.clip, self.multipliers.total, largest)

    def pooled(self, own: Tensor, total: Tensor | None) -> Observed:
        """Return what all clients' releases tell together; see `Estimator.pooled`."""
        return self.estimator.pooled(own, total)

    def empty_ledger(self) -> Ledger:
        if not self.settings.on:
            return Ledger(disclosures=self.inputs.discloses)
        noise_by = self.settings.noise_by
        bare = Disclosure("each client's class counts and class sums of features, to the server once", "upload")
        trusted: tuple[Observer, ...] = ("server",) if noise_by == "server" or self.inputs.pools_data else ()
        assumptions = [PERSONS_KNOWN if self.settings.by_person else SIZES_KNOWN]
        if noise_by == "shares":
            assumptions.append(summed_securely(self.settings))
        if self.settings.directions == "images":
            assumptions.append(IMAGES_PUBLIC)
        disclosures = (*self._left_open(MADE_OF_IT), *((bare,) if noise_by == "server" else ()))
        stated = Ledger((), disclosures, trusted, tuple(assumptions), self.delta, self._randomness)
        return replace(stated, whole_persons=self.inputs.whole_persons)

    def released(self, name: str, charged: float | None = None) -> list[Release]:
        """Return the ledger's entries of the release.

        Args:
            name: of the release, which no other has.
            charged: the noise multiplier that a secure sum's survivors left, if there was one.
        """
        planned = [replace(release, name=name) for release in self.planned()]
        if charged is None:
            return planned
        return [replace(r, noise_multipliers=(*r.noise_multipliers[:-1], charged)) for r in planned]

    def planned(self, rounds: int | None = None) -> list[Release]:
        if not self.settings.on:
            return []
        noise_by, noise = self.settings.noise_by, self.multipliers
        multipliers = tuple(z for z in (noise.own, noise.total) if z is not None)
        seen_by: tuple[Observer, ...] = ("clients", "public") if noise_by == "server" else OBSERVERS
        rate = self.settings.sampling_rate
        return [
            Release(CONTENT, f"client {client}", self.settings.unit, multipliers, rate, 1, noise_by, seen_by)
            for client in range(len(self.inputs.sizes))
        ]


def _numbered(persons: Tensor) -> Tensor:
    """Return persons [n] as numbers from 0, on the CPU."""
    numbers: Tensor = persons.unique(return_inverse=True)[1]
    return numbers.cpu()
