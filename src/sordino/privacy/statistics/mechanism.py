"""The mechanism `statistics`: one noisy release before the first round, and no noise after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sordino.privacy.cotangent import image_directions, public_directions
from sordino.privacy.example_level import IMAGES_PUBLIC, PERSONS_KNOWN, SIZES_KNOWN
from sordino.privacy.ledger import OBSERVERS, Channel, Disclosure, Ledger, Observer, Release, release_name
from sordino.privacy.mechanism import CLASSES_KNOWN, Mechanism, summed_securely
from sordino.privacy.statistics.estimates import Estimator, Noise, Released
from sordino.privacy.statistics.posterior import Observed
from sordino.privacy.statistics.release import (
    center_share,
    center_sum,
    class_sums,
    contributions,
    count_share,
    scatter_share,
    scatter_sum,
)
from sordino.privacy.uploads.secure_mean import ServerSums, SumTerms
from sordino.randomness import Randomness, noised

CONTENT = "class counts and class sums of features, once"
CENTER, MATRIX, SCATTER = "center", "matrix", "scatter"  # the parts of a release
PARTS = {CENTER: "sums for the center", MATRIX: "class statistics", SCATTER: "sums of squares and products"}
BESIDE = {CENTER: "their sum over all classes", SCATTER: "sums of their products"}  # for the ledger
# What leaves in rounds is made of the release; images that are handed over before it are not.
MADE_OF_IT: tuple[Channel, ...] = ("upload", "shares", "clusters", "mean", "prompt", "memory", "sizes")
COUNTS_ONLY = 0.9999  # of the squared norm goes to the counts, for a method that uses nothing else


@dataclass(frozen=True)
class StatisticsMechanism(Mechanism):
    """Release class statistics once; see `release` for what that is and why its sensitivity is 1.

    With `noise_by = "client"` each client's matrix has enough noise for itself, the server sees them all, and what they
    tell together is told to all. With "server" and "shares" the sum of all matrices is released, with one noise. A
    method with a personal part then needs the client's own matrix too: both are made of the same examples, so together
    they are one Gaussian release, and `shared_budget` of it goes to the sum. Center and scatter, where there are any,
    are of all clients together; a method that sends nothing has centers of its own, and no scatter.

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
    def noised_by_server(self) -> bool:
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
    def uploads_sums(self) -> bool:
        """Tell whether the server sees the clients' sums, with noise or not."""
        return self.joins and not self.in_shares

    @property
    def uploads_exact(self) -> bool:
        """Tell whether those are without noise, for a trusted server that adds it.

        They stay float64: what rounding to float32 does to a large sum would not be within the sensitivity.
        """
        return self.uploads_sums and self.settings.on and self.settings.noise_by == "server"

    @cached_property
    def multipliers(self) -> Noise:
        """Return the noise multipliers of the parts of a release."""
        if self.earlier is not None:
            return self.earlier
        center, scatter, shared = self.center_share, self.scatter_share, self.settings.shared_budget
        z = self.noise_multiplier / math.sqrt(1 - center - scatter)
        parts = {CENTER: center, SCATTER: scatter}
        beside = {name: self.noise_multiplier / math.sqrt(share) for name, share in parts.items() if share}
        if self.by_client:
            return Noise(z, None, **beside)
        if not self.inputs.personal:
            return Noise(None, z, **beside)
        return Noise(z / math.sqrt(1 - shared), z / math.sqrt(shared), **beside)

    @property
    def by_client(self) -> bool:
        """Tell whether each client adds noise to all that it releases."""
        return not self.settings.on or self.settings.noise_by == "client"

    @cached_property
    def center_share(self) -> float:
        """Return the part of the budget that the center gets; from public numbers alone.

        A plan that has no model leaves it open. All parts together have the noise multiplier of the whole in any case.
        """
        if self.model is None or self.inputs.counts_only or self.directions is not None or not self.settings.on:
            return 0.0
        if self.settings.center_share is not None:
            return self.settings.center_share
        return center_share(self.noise_multiplier, *self._of_all(self._width))

    @cached_property
    def scatter_share(self) -> float:
        """Return the part of the budget that the scatter gets; from public numbers alone."""
        if self.model is None or self.inputs.counts_only or not self.joins or not self.settings.on:
            return 0.0
        if self.settings.scatter_share is not None:
            return self.settings.scatter_share
        return scatter_share(self.noise_multiplier, *self._of_all(self.shape[1] - 1))

    def _of_all(self, width: int) -> tuple[int, int, float]:
        """Return how many noises are in a sum over clients, the numbers of a feature, and the number of examples."""
        sizes = sorted(self.inputs.sizes)
        noises = len(sizes) if self.joins and self.by_client else 1
        return noises, width, self.rate * (sum(sizes) if self.joins else sizes[len(sizes) // 2])

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
        if rank is None or rank >= self._width or not self.settings.on:
            return None
        if self.settings.directions == "names":
            return public_directions(encoder, rank)
        assert self.public is not None
        return image_directions(self.public, rank).to(encoder.device)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of a matrix, (C, 1 + r)."""
        assert self.model is not None
        return len(self.model.classes), 1 + (self._width if self.directions is None else self.directions.shape[1])

    @property
    def _width(self) -> int:
        assert self.model is not None
        return self.model.encoder.feature_width

    @property
    def stages(self) -> list[list[str]]:
        """Return the parts of a release by the messages in which clients answer."""
        parts = self.multipliers.parts
        return [*([[CENTER]] if CENTER in parts else []), [MATRIX, *([SCATTER] if SCATTER in parts else [])]]

    def part_shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a client's part of a release."""
        classes, width = self.shape
        return {CENTER: (1 + self._width,), MATRIX: (classes, width), SCATTER: ((width - 1) * width // 2,)}[part]

    @cached_property
    def estimator(self) -> Estimator:
        """Return what turns released matrices into estimates."""
        assert self.model is not None
        encoder = self.model.encoder
        with torch.no_grad():
            text = encoder.text_features(encoder.zero_shot_context()[None], self.model.classes)[0]
        return Estimator(
            self.multipliers.times(self.clip),
            self.count_share,
            self.rate,
            [size * self.clip for size in self.inputs.sizes],
            self.directions,
            text,
            not self.inputs.personal and self.inputs.server_uses == "mean",
            self.joins,
            not self.settings.by_person,
        )

    def sampled(self, rows: Sequence[Tensor], randomness: Randomness, persons: Tensor | None = None) -> list[Tensor]:
        """Return which rows are in the release: each example, or person, independently of all others.

        Args:
            rows: K lists of row numbers.
            randomness: of the clients' samples.
            persons: [N], whose images they are; needed where persons are protected.
        """
        rate = self.rate
        if rate == 1:
            return list(rows)
        whose = persons if self.settings.by_person else None
        units = [torch.arange(len(part)) if whose is None else _numbered(whose[part]) for part in rows]
        counts = [int(part.max()) + 1 if len(part) else 0 for part in units]
        drawn = randomness.uniform("sample of statistics", counts)
        chosen = [(numbers < rate)[unit] for numbers, unit in zip(drawn, units, strict=True)]
        return [part[taken.to(part.device)] for part, taken in zip(rows, chosen, strict=True)]

    def exact(
        self,
        part: str,
        features: Tensor,
        labels: Tensor,
        rows: Sequence[Tensor],
        persons: Tensor | None = None,
        centers: Tensor | None = None,
    ) -> Tensor:
        """Add up one part of the statistics of a stack of clients; see `release`.

        Args:
            part: "center", "matrix" or "scatter".
            features, labels: [N, D] and [N], the table of images.
            rows: K lists of row numbers, of what was `sampled`.
            persons: [N], whose images they are; needed where persons are protected.
            centers: [K, D], from where the features are seen, or None.

        Returns:
            [K, ...] exact sums, float64, which must not leave.
        """
        persons = persons if self.settings.by_person else None

        def of_client(place: int, chosen: Tensor) -> Tensor:
            whose = None if persons is None else persons[chosen]
            if part == CENTER:
                return center_sum(features[chosen], whose, self.clip)
            center = None if centers is None else centers[place]
            if part == MATRIX:
                terms = contributions(features[chosen], self.count_share, self.directions, center)
                return class_sums(terms, labels[chosen], self.shape[0], whose, self.clip)
            return scatter_sum(contributions(features[chosen], 0.0, self.directions, center)[:, 1:], whose, self.clip)

        return torch.stack([of_client(place, chosen) for place, chosen in enumerate(rows)])

    def with_own_noise(self, part: str, exact: Tensor, randomness: Randomness) -> Tensor | None:
        """Return a part [K, ...] with each client's own noise, float32, or None if clients release none of it.

        Args:
            part: as of `exact`.
            exact: the sums.
            randomness: of the clients' noise.
        """
        multiplier = self.multipliers.own if part == MATRIX else self.multipliers.parts[part]
        if multiplier is None or not (part == MATRIX or self.by_client):
            return None
        noise = randomness.normal(f"noise on {PARTS[part]}", *exact.shape[1:])
        return noised(exact, multiplier * self.clip, noise).float()

    def summed(self, part: str, exact: Tensor, randomness: Randomness) -> Tensor:
        """Return the sum of all clients' part [...] with the server's noise, float32.

        Args:
            part: as of `exact`.
            exact: [K, ...], which a trusted server has.
            randomness: of the server.
        """
        noise = randomness.common_normal(f"noise on the sum of {PARTS[part]}", *exact.shape[1:])
        return noised(exact.double().sum(0), self._of_sum(part) * self.clip, noise).float()

    def summed_in_shares(self, part: str, sums: ServerSums) -> tuple[Tensor, float]:
        """Return the secure sum of a part, float32, and the noise multiplier that its survivors left."""
        like = {part: torch.zeros(1, *self.part_shape(part), dtype=torch.float64)}
        summed = sums.of(self.terms(part), like)
        return summed.fields[part].float(), summed.noise_multiplier

    def terms(self, part: str) -> SumTerms:
        """Return the terms of a secure sum; one entry may hold all of a client's examples."""
        largest = float(max(self.inputs.sizes)) * self.clip
        return SumTerms(f"the sum of {PARTS[part]}", self.settings.unit, self.clip, self._of_sum(part), largest)

    def _of_sum(self, part: str) -> float:
        """Return the noise multiplier of the sum of all clients' part."""
        multiplier = self.multipliers.total if part == MATRIX else self.multipliers.parts[part]
        assert multiplier is not None
        return multiplier

    def centers(self, released: Released, clients: Sequence[int]) -> Tensor | None:
        """Return the points [K, D] from which K clients see features, or None for the origin.

        Args:
            released: what they keep of the release.
            clients: [K], their numbers.
        """
        centers = self.estimator.centers(released, clients)
        return None if centers is None else centers[0]

    def pooled(self, released: Released, total: Tensor | None) -> Observed:
        """Return what all clients' releases tell together; see `Estimator.pooled`."""
        return self.estimator.pooled(released, total)

    def empty_ledger(self) -> Ledger:
        if not self.settings.on:
            return Ledger(disclosures=self.inputs.discloses)
        noise_by = self.settings.noise_by
        bare = Disclosure(f"each client's {self._content}; to the server", "upload")
        trusted: tuple[Observer, ...] = ("server",) if noise_by == "server" or self.inputs.pools_data else ()
        assumptions = [PERSONS_KNOWN if self.settings.by_person else SIZES_KNOWN, CLASSES_KNOWN]
        if noise_by == "shares":
            assumptions.append(summed_securely(self.settings))
        if self.settings.directions == "images":
            assumptions.append(IMAGES_PUBLIC)
        disclosures = (*self._left_open(MADE_OF_IT), *((bare,) if noise_by == "server" else ()))
        stated = Ledger((), disclosures, trusted, tuple(assumptions), self.delta, self._randomness)
        return replace(stated, whole_persons=self.inputs.whole_persons)

    def released(self, run: str, charged: Mapping[str, float] | None = None) -> list[Release]:
        """Return the ledger's entries of the release.

        Args:
            run: the run's name, which no other has; the release gets one that it does not follow from.
            charged: the noise multipliers that secure sums' survivors left, by part, if there were any.
        """
        sums = {"total" if part == MATRIX else part: multiplier for part, multiplier in (charged or {}).items()}
        name = release_name(run)
        return [replace(release, name=name) for release in self._entries(replace(self.multipliers, **sums))]

    def planned(self, rounds: int | None = None) -> list[Release]:
        return self._entries(self.multipliers) if self.settings.on else []

    @property
    def _content(self) -> str:
        """Return what is released, in words."""
        return "; ".join([CONTENT, *(what for part, what in BESIDE.items() if part in self.multipliers.parts)])

    def _entries(self, noise: Noise) -> list[Release]:
        noise_by, rate = self.settings.noise_by, self.settings.sampling_rate
        seen_by: tuple[Observer, ...] = ("clients", "public") if noise_by == "server" else OBSERVERS
        multipliers = tuple(noise.parts.values())
        return [
            Release(self._content, f"client {client}", self.settings.unit, multipliers, rate, 1, noise_by, seen_by)
            for client in range(len(self.inputs.sizes))
        ]


def _numbered(persons: Tensor) -> Tensor:
    """Return persons [n] as numbers from 0, on the CPU."""
    numbers: Tensor = persons.unique(return_inverse=True)[1]
    return numbers.cpu()
