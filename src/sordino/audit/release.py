"""Attacks on a release of class statistics itself: membership, and the features of single images.

A party's release is M = sum_i [a, b z_i] at row y_i, plus normal noise of known deviation (`privacy.statistics.release`
says why). It is the only thing that a run with `privacy.mechanism = "statistics"` tells, so nobody learns more from its
prompts or uploads. Two attacks guess which candidates are in the sum:

- **product**: <M, [a, b z]> at row y. For an attacker who knows all else in M and subtracts it, no statistic tells more
  of a single example. This one knows nothing else, so the other images of the class count as noise.
- **regression**: the expected inclusion bits of all candidates, given M. The attacker knows the images that are no
  candidates, and thinks that each candidate is in with probability 1/2. So M is the expected sum, plus sum_i u_i c_i
  with u_i of mean 0 and variance 1/4, plus noise. Estimates are the best linear ones. Rows of other classes tell
  nothing of a candidate, so classes are solved one by one. The length of the expected sum stays open, so that scores do
  not depend on how a mechanism scales rows.

If clients' own matrices and their sum are both released, each counts by the inverse of its noise variance.

**Reconstruction** reads an image's feature off the row of its class, where it is the only example of its client and
class. Fresh releases of single images by the run's own mechanism show how far noise hides it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sordino.audit.canaries import Canaries
from sordino.audit.membership import Indices, candidates
from sordino.audit.scores import Attack, Claim
from sordino.audit.subject import Subject
from sordino.errors import ConfigError
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.privacy.statistics.release import contributions
from sordino.randomness import Streams, derive_key, generator
from sordino.runtime.local import LocalRuntime, Training
from sordino.runtime.release import OWN

PRIOR_PRECISION = 4.0  # of a fair coin: one over its variance
LEAST_DEVIATION = 1e-3  # assumed of a release without noise, so that its weight is finite
SINGLES = 64  # images that are reconstructed
AT_ONCE = 16  # of them


@dataclass(frozen=True)
class Reconstruction:
    """Features of images, read off rows of their classes in which they are alone.

    Attributes:
        images: number of images.
        cosine: of the released row to the image's feature, mean.
        cosine_chance: the same of an image of the gallery at random.
        reidentified: share of rows whose nearest image of the gallery is the image itself.
        gallery: number of images among which the rows were looked up.
    """

    images: int
    cosine: float
    cosine_chance: float
    reidentified: float
    gallery: int


@dataclass(frozen=True)
class ReleaseAttack:
    """The result of the attacks on a release.

    Attributes:
        product, regression: the two attacks on membership, and their bounds, which hold together at 95% confidence.
        reconstruction: of single images.
        members, non_members: number of candidates of each kind, which are equal.
        noise_multipliers: of the clients' own matrices and of their sum, those that are released.
        claimed_epsilon: an example's, against the untrusted observer that learned most; None if it is infinite.
        delta: at which claim and bounds are stated.
    """

    product: Attack
    regression: Attack
    reconstruction: Reconstruction
    members: int
    non_members: int
    noise_multipliers: tuple[float, ...]
    claimed_epsilon: float | None
    delta: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def attack_release(subject: Subject, seed: int) -> ReleaseAttack:
    """Guess the members of every client from what the run released, and reconstruct single images.

    Args:
        subject: the run.
        seed: decides candidates, and the fresh noise of the reconstructed images.

    Raises:
        ConfigError: the run releases no class statistics, or the unit of privacy is the person.
        DataError: no client has both training and test images of a class.
    """
    runtime = subject.runtime
    _check(runtime)
    chosen = candidates(subject, generator(seed, "candidates"))
    known = [np.setdiff1d(rows, chosen.rows[chosen.member]) for rows in subject.task.train]
    holder = np.repeat(np.arange(len(known)), [len(rows) for rows in known])
    if runtime.algorithm.ABOUT.pools_data:  # one party holds all images
        holder = np.zeros_like(holder)
    owner = np.zeros_like(chosen.owner) if runtime.algorithm.ABOUT.pools_data else chosen.owner
    unknown = _Examples.of(subject.features, subject.labels, chosen.rows, owner)
    rest = _Examples.of(subject.features, subject.labels, np.concatenate(known), holder)
    sources = list(released(runtime, subject.training))
    mechanism = _mechanism(runtime)
    scores = {
        "product": products(mechanism, sources, unknown).numpy(),
        "regression": regressed(mechanism, sources, unknown, rest).numpy(),
    }
    claim = Claim.of(subject, subject.ledger)
    attacks = {
        name: claim.judge(Attack.of(values, chosen.member), values, seed, len(scores))
        for name, values in scores.items()
    }
    multipliers = (mechanism.multipliers.own, mechanism.multipliers.total)
    return ReleaseAttack(
        **attacks,
        reconstruction=reconstruct(subject, seed),
        members=int(chosen.member.sum()),
        non_members=int((~chosen.member).sum()),
        noise_multipliers=tuple(value for value in multipliers if value is not None),
        claimed_epsilon=claim.epsilon,
        delta=claim.delta,
    )


def canary_scores(runtime: LocalRuntime, training: Training, canaries: Canaries) -> Tensor:
    """Return the regression's scores [m] of canaries, which are the last rows of the runtime's table."""
    data, mechanism = runtime.data, _mechanism(runtime)
    real = len(data.features) - len(canaries.labels)
    held = [row[:count] for row, count in zip(data.rows, data.counts, strict=True)]
    held = [row[row < real] for row in held]
    holder = torch.arange(len(held)).repeat_interleave(torch.tensor([len(row) for row in held]))
    rows = torch.cat(held)
    rest = _Examples(data.features[rows].cpu(), data.labels[rows].cpu(), holder)
    unknown = _Examples(canaries.features.cpu(), canaries.labels.cpu(), canaries.owners.cpu())
    return regressed(mechanism, list(released(runtime, training)), unknown, rest)


@dataclass(frozen=True)
class _Examples:
    """Images of some clients, on the CPU.

    Attributes:
        features, labels: [n, D] and [n].
        owner: [n], the party whose release each of them is in, if it is in any.
    """

    features: Tensor
    labels: Tensor
    owner: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, rows: NDArray[np.int64], owner: Indices) -> _Examples:
        chosen = torch.from_numpy(rows).to(features.device)
        return cls(features[chosen].cpu(), labels[chosen].cpu(), torch.from_numpy(owner))


@dataclass(frozen=True)
class Source:
    """A released matrix.

    Attributes:
        matrix: [C, 1 + r], float64 on the CPU.
        deviation: of its noise, as it was planned; positive.
        client: whose it is; None if it is the sum of all clients' matrices.
    """

    matrix: Tensor
    deviation: float
    client: int | None

    def has(self, owner: Tensor) -> Tensor:
        """Return which examples may be in it, given their owners [n]."""
        return torch.ones_like(owner, dtype=torch.bool) if self.client is None else owner == self.client


def released(runtime: LocalRuntime, training: Training) -> Iterator[Source]:
    """Yield the matrices that a run released, from what clients keep of them.

    The sum of all clients' matrices is told as counts and sums of features, which are the same numbers in other units.
    """
    mechanism, release = _mechanism(runtime), training.at_clients.release
    noise = mechanism.multipliers
    if noise.own is not None:
        deviation = max(noise.own * mechanism.clip, LEAST_DEVIATION)
        for client, matrix in enumerate(release[OWN]):
            yield Source(matrix.cpu().double(), deviation, client)
    if noise.total is not None:
        rate, share = mechanism.settings.sampling_rate, mechanism.count_share
        counts, sums = release["counts"].cpu().double(), release["sums"].cpu().double()
        matrix = rate * torch.cat([share**0.5 * counts[:, None], (1 - share) ** 0.5 * sums], 1)
        yield Source(matrix, max(noise.total * mechanism.clip, LEAST_DEVIATION), None)


def products(mechanism: StatisticsMechanism, sources: Sequence[Source], unknown: _Examples) -> Tensor:
    """Return the product [n] of each example with the rows of its class in all matrices that it may be in."""
    rows = _contributions(mechanism, unknown)
    scores = torch.zeros(len(rows), dtype=torch.float64)
    for source in sources:
        along = (source.matrix[unknown.labels] * rows).sum(1) / source.deviation**2
        scores += torch.where(source.has(unknown.owner), along, 0.0)
    return scores


def regressed(mechanism: StatisticsMechanism, sources: Sequence[Source], unknown: _Examples, rest: _Examples) -> Tensor:
    """Return each example's expected inclusion bit, less 1/2: [n].

    Args:
        mechanism: says what an example contributes.
        sources: the released matrices.
        unknown: n examples, each in the sum of its owner with probability 1/2.
        rest: the examples that are in it for certain.
    """
    rows, others = _contributions(mechanism, unknown), _contributions(mechanism, rest)
    scores = torch.zeros(len(rows), dtype=torch.float64)
    for label in unknown.labels.unique():
        places = (unknown.labels == label).nonzero().flatten()
        certain = rest.labels == label
        gram = PRIOR_PRECISION * torch.eye(len(places), dtype=torch.float64)
        along = torch.zeros(len(places), dtype=torch.float64)
        for source in sources:
            inside = source.has(unknown.owner[places]).double()[:, None]
            own = inside * rows[places]
            expected = others[certain & source.has(rest.owner)].sum(0) + own.sum(0) / 2
            expected = F.normalize(expected, dim=0)
            own = (own - (own @ expected)[:, None] * expected) / source.deviation
            gram += own @ own.T
            along += own @ source.matrix[label] / source.deviation
        scores[places] = torch.linalg.solve(gram, along)
    return scores


def reconstruct(subject: Subject, seed: int) -> Reconstruction:
    """Release single images by the run's mechanism, each as its client's only example, and read them off.

    Args:
        subject: the run.
        seed: chooses images of clients, and draws the noise.
    """
    mechanism, used = _mechanism(subject.runtime), torch.from_numpy(subject.task.used)
    gallery = F.normalize(subject.features[used.to(subject.features.device)].cpu().double(), dim=-1)
    held = np.concatenate(subject.task.train)
    chosen = np.sort(generator(seed, "images alone").permutation(held)[:SINGLES])
    cosines, by_chance, found = [], [], []
    for first in range(0, len(chosen), AT_ONCE):
        rows = torch.from_numpy(chosen[first : first + AT_ONCE])
        features = subject.features[rows.to(subject.features.device)]
        labels = subject.labels[rows.to(subject.labels.device)]
        matrices = _alone(mechanism, features, labels, derive_key(seed, "images alone", first))
        read = matrices[torch.arange(len(rows)), labels.cpu(), 1:].double()
        if mechanism.directions is not None:
            read = read @ mechanism.directions.cpu().double().T
        read, truth = F.normalize(read, dim=-1), F.normalize(features.cpu().double(), dim=-1)
        own = (read * truth).sum(1)
        cosines.append(own)
        by_chance.append((truth @ gallery.T).mean(1))
        found.append(own >= (read @ gallery.T).amax(1) - 1e-9)
    return Reconstruction(
        len(chosen),
        float(torch.cat(cosines).mean()),
        float(torch.cat(by_chance).mean()),
        float(torch.cat(found).double().mean()),
        len(gallery),
    )


def _alone(mechanism: StatisticsMechanism, features: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return the releases [n, C, 1 + r], on the CPU, of parties with one example each.

    Where only the sum of all clients is released, it is that of one client, for an attacker who knows all others.
    """
    rows = list(torch.arange(len(labels), device=labels.device)[:, None])
    exact, own = mechanism.matrices(features, labels, rows, Streams(seed, 0, range(len(labels)), features.device), None)
    if own is not None:
        return own.cpu()
    alone = [
        mechanism.summed(matrix[None], Streams(derive_key(seed, "sum", place), 0, [0], features.device))
        for place, matrix in enumerate(exact)
    ]
    return torch.stack(alone).cpu()


def _contributions(mechanism: StatisticsMechanism, examples: _Examples) -> Tensor:
    """Return the examples' expected rows [n, 1 + r], float64 on the CPU."""
    directions = None if mechanism.directions is None else mechanism.directions.cpu().to(examples.features)
    return mechanism.settings.sampling_rate * contributions(examples.features, mechanism.count_share, directions)


def _mechanism(runtime: LocalRuntime) -> StatisticsMechanism:
    mechanism = runtime.mechanism
    assert isinstance(mechanism, StatisticsMechanism)
    return mechanism


def _check(runtime: LocalRuntime) -> None:
    if not runtime.releases_statistics:
        remedy = "nothing is released of class statistics; attack a run with 'statistics', or by other attacks"
        raise ConfigError("privacy.mechanism", runtime.privacy.mechanism, remedy)
    if runtime.privacy.by_person:
        remedy = "the attack guesses single examples, not persons; audit a run with privacy.unit = 'example'"
        raise ConfigError("privacy.unit", "person", remedy)
