"""Attacks on a release of class statistics itself: membership, and the features of single images.

A party's release is M = sum_i [a, b z_i] at row y_i, plus normal noise of known deviation (`privacy.statistics.release`
says why). It is the only thing that a run with `privacy.mechanism = "statistics"` tells, so nobody learns more from its
prompts or uploads. Two attacks guess which candidates are in the sum:

- **product**: <M, [a, b z]> at row y. For an attacker who knows all else in M and subtracts it, no statistic tells more
  of a single example. This one knows nothing else, so the other images of the class count as noise.
- **regression**: the expected inclusion bits of all candidates, given M. The attacker knows the images that are no
  candidates, and thinks that each candidate is in with probability 1/2. So M is the expected sum, plus sum_i u_i c_i
  with u_i of mean 0 and variance 1/4, plus noise. Estimates are the best linear ones. The length of an expected sum
  stays open, so that scores do not depend on how a mechanism scales rows; each class has a sum of its own.

All parts that are released count by the inverse of their noise variance: clients' own matrices, their sum, and the sums
for center and scatter.

**Reconstruction** reads an image's feature off the row of its class, where it is the only example of its client and
class. Fresh releases of single images by the run's own mechanism show how far noise hides it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.audit.canaries import Canaries
from sordino.audit.evidence import Evidence, Examples, added, along_sums, statistics_mechanism
from sordino.audit.membership import candidates
from sordino.audit.scores import Attack, Claim
from sordino.audit.subject import Subject, refuse_persons
from sordino.errors import ConfigError
from sordino.privacy.statistics.estimates import Released
from sordino.privacy.statistics.mechanism import MATRIX, SCATTER, StatisticsMechanism
from sordino.randomness import Streams, derive_key, generator
from sordino.runtime.local import LocalRuntime, Training

PRIOR_PRECISION = 4.0  # of a fair coin: one over its variance
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
        noise_multipliers: of the parts of the release.
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
    unknown = Examples.of(subject.features, subject.labels, chosen.rows, owner)
    rest = Examples.of(subject.features, subject.labels, np.concatenate(known), holder)
    evidence = Evidence.of(runtime, subject.training)
    scores = {"product": products(evidence, unknown).numpy(), "regression": regressed(evidence, unknown, rest).numpy()}
    claim = Claim.of(subject, subject.ledger)
    return ReleaseAttack(
        **claim.judge_all(scores, chosen.member, seed, subject.persons_of(chosen.rows)),
        reconstruction=reconstruct(subject, seed),
        members=int(chosen.member.sum()),
        non_members=int((~chosen.member).sum()),
        noise_multipliers=tuple(evidence.mechanism.multipliers.parts.values()),
        claimed_epsilon=claim.epsilon,
        delta=claim.delta,
    )


def canary_scores(runtime: LocalRuntime, training: Training, canaries: Canaries) -> Tensor:
    """Return the regression's scores [m] of canaries, which are the last rows of the runtime's table."""
    data = runtime.data
    real = len(data.features) - len(canaries.labels)
    held = [row[:count] for row, count in zip(data.rows, data.counts, strict=True)]
    held = [row[row < real] for row in held]
    holder = torch.arange(len(held)).repeat_interleave(torch.tensor([len(row) for row in held]))
    rows = torch.cat(held)
    rest = Examples(data.features[rows].cpu(), data.labels[rows].cpu(), holder)
    unknown = Examples(canaries.features.cpu(), canaries.labels.cpu(), canaries.owners.cpu())
    return regressed(Evidence.of(runtime, training), unknown, rest)


def products(evidence: Evidence, unknown: Examples) -> Tensor:
    """Return the product [n] of each example with the rows of its class in all sums that it may be in."""
    scores = torch.zeros(len(unknown.labels), dtype=torch.float64)
    for source in evidence.sources:
        sums = source.sums[unknown.labels] if source.part == MATRIX else source.sums
        along = along_sums(sums, evidence.rows(source.part, unknown), source.part) / source.deviation**2
        scores += torch.where(source.has(unknown.owner), along, 0.0)
    return scores


def regressed(evidence: Evidence, unknown: Examples, rest: Examples) -> Tensor:
    """Return each example's expected inclusion bit, less 1/2: [n].

    Args:
        evidence: what was released.
        unknown: n examples, each in the sums of its owner with probability 1/2.
        rest: the examples that are in it for certain.
    """
    count = len(unknown.labels)
    gram = PRIOR_PRECISION * torch.eye(count, dtype=torch.float64)
    along = torch.zeros(count, dtype=torch.float64)
    for source in evidence.sources:
        rows, others = evidence.rows(source.part, unknown), evidence.rows(source.part, rest)
        inside, certain = source.has(unknown.owner), source.has(rest.owner)
        for label in unknown.labels.unique() if source.part == MATRIX else [None]:
            chosen = inside if label is None else inside & (unknown.labels == label)
            theirs = certain if label is None else certain & (rest.labels == label)
            sums = source.sums if label is None else source.sums[label]
            places, own = chosen.nonzero().flatten(), rows[chosen]
            expected = added(others[theirs], source.part) + added(own, source.part) / 2
            expected = expected / expected.norm().clamp(min=1e-12)
            lengths = along_sums(expected, own, source.part)
            similar = (own @ own.T) ** (2 if source.part == SCATTER else 1)
            gram[places[:, None], places] += (similar - lengths[:, None] * lengths) / source.deviation**2
            told = along_sums(sums, own, source.part) - lengths * (expected * sums).sum()
            along[places] += told / source.deviation**2
    scores: Tensor = torch.linalg.solve(gram, along)
    return scores


def reconstruct(subject: Subject, seed: int) -> Reconstruction:
    """Release single images by the run's mechanism, each as its client's only example, and read them off.

    Args:
        subject: the run.
        seed: chooses images of clients, and draws the noise.
    """
    mechanism, known = statistics_mechanism(subject.runtime), Released.of(subject.training.at_clients.release)
    centers = mechanism.centers(known, range(1 if known.own_center is None else len(known.own_center)))
    center = None if centers is None else centers[0]
    used = torch.from_numpy(subject.task.used)
    gallery = F.normalize(subject.features[used.to(subject.features.device)].cpu().double(), dim=-1)
    held = np.concatenate(subject.task.train)
    chosen = np.sort(generator(seed, "images alone").permutation(held)[:SINGLES])
    cosines, by_chance, found = [], [], []
    for first in range(0, len(chosen), AT_ONCE):
        rows = torch.from_numpy(chosen[first : first + AT_ONCE])
        features = subject.features[rows.to(subject.features.device)]
        labels = subject.labels[rows.to(subject.labels.device)]
        matrices = _alone(mechanism, features, labels, center, derive_key(seed, "images alone", first))
        read = matrices[torch.arange(len(rows)), labels.cpu(), 1:].double()
        if mechanism.directions is not None:
            read = read @ mechanism.directions.cpu().double().T
        if center is not None:
            read = _seen_from(center.cpu().double(), read)
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


def _seen_from(center: Tensor, read: Tensor) -> Tensor:
    """Return the features of unit norm [n, D] that lie in the directions [n, D] from a center [D]."""
    read = F.normalize(read, dim=-1)
    along = read @ center
    return center + ((along**2 + 1 - center @ center).sqrt() - along)[:, None] * read


def _alone(
    mechanism: StatisticsMechanism, features: Tensor, labels: Tensor, center: Tensor | None, seed: int
) -> Tensor:
    """Return the matrices [n, C, 1 + r], on the CPU, of parties with one example each.

    Where only the sum of all clients is released, it is that of one client, for an attacker who knows all others.
    """
    everyone = torch.arange(len(labels), device=labels.device)
    streams = Streams(seed, 0, range(len(labels)), features.device)
    centers = None if center is None else center.expand(len(labels), -1)
    rows = mechanism.sampled(list(everyone[:, None]), streams)
    exact = mechanism.exact(MATRIX, features, labels, rows, centers=centers)
    own = mechanism.with_own_noise(MATRIX, exact, streams)
    if own is not None:
        return own.cpu()
    alone = [
        mechanism.summed(MATRIX, matrix[None], Streams(derive_key(seed, "sum", place), 0, [0], features.device))
        for place, matrix in enumerate(exact)
    ]
    return torch.stack(alone).cpu()


def _check(runtime: LocalRuntime) -> None:
    if not runtime.releases_statistics:
        remedy = "nothing is released of class statistics; attack a run with 'statistics', or by other attacks"
        raise ConfigError("privacy.mechanism", runtime.privacy.mechanism, remedy)
    refuse_persons(runtime)
