"""One noisy release of class statistics: what a party adds up, and why one example changes it by at most 1.

Party k releases once, before the first round,

    M = sum over its examples (x, y) of onehot(y) (x) [a, b z] + N(0, (noise multiplier)^2 I),    a^2 + b^2 = 1,

with z the image's feature at norm at most 1, possibly projected on public directions, or seen from a center (below). M
is a matrix [C, 1 + r]: in column 0 the class counts times a, and in the others the class sums of features times b.

Sensitivity. Neighboring data sets differ in one example of one party, added or removed. Every term depends on its own
example alone. It has one row that is not zero, [a, b z], whose norm is sqrt(a^2 + b^2 |z|^2) <= 1. So M changes by one
term, by at most 1 in Frobenius norm, and by exactly 1 if |z| = 1. An example whose feature is not finite has the term
0. With Gaussian noise of standard deviation equal to the noise multiplier on every entry, M is one Gaussian release of
sensitivity 1. All that is made of M afterwards, however often and by whomever, is post-processing.

Two more sums may be released beside it, each with a part of the budget:

- the *center*, before M: the sum of [a, b z] over all classes. What it says of the mean feature is m, and M is then
  made of u = (z - m) / |z - m| instead of z. Where features lie close together, u tells more of a class under the same
  noise. Given m, which is released, every term of M depends on its own example alone, as before.
- the *scatter*: the sum of u u^T, as its upper triangle with the entries beside the diagonal times sqrt(2), so that the
  vector's norm is the matrix's. One example changes it by |u|^2 <= 1.

Each is a Gaussian release of sensitivity 1 with a noise multiplier of its own, z_i. Adaptively composed, releases of
the same sample are exactly one Gaussian release with 1 / z^2 = sum of 1 / z_i^2 (Dong, Roth and Su, Gaussian
Differential Privacy, JRSS B 2022, corollary 3.3); the ledger lists the z_i.

If the unit is a person, the terms of one person are summed, and each sum is scaled down to norm `clip` where it is
longer. If examples are sampled (Poisson sampling), each is in the sum with one probability, independently of all
others.

How much of the norm the counts get (a^2) is decided by `count_share`, from public numbers, and how much of the budget
center and scatter get by `center_share` and `scatter_share`.

Sources: releases of sums of frozen features are in Mehta et al., TMLR 2023 (arXiv 2211.13403), and Wahdany et al.,
Differentially Private Prototypes, AAAI 2025 (arXiv 2406.08039).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sordino.privacy.cotangent import project

LEAST_SHARE, MOST_SHARE = 0.1, 0.9
CENTER_ERROR = 0.2  # of the center that is wanted, in units of a feature's norm
LEAST_CENTER, MOST_CENTER = 0.01, 0.1
CENTER_COUNTS = 0.1  # the count's share of the squared norm of what is added up for the center
SCATTER_EDGE = 0.03  # of the scatter's noise: directions with less of the variance are lost in it
LEAST_SCATTER, MOST_SCATTER = 0.02, 0.25


def count_share(noise_multiplier: float, classes: int, examples: float) -> float:
    """Choose a^2, the share of the squared norm that the counts get.

    A party can tell that it holds a class if its count stands three deviations of the noise, z / a, above zero. It is
    not known how many classes a party holds. The geometric mean of 1 and C is assumed, so a count is n / sqrt(C). The
    rest is for the means: more for the counts would take from them, and less would leave means of unknown classes.

    Args:
        noise_multiplier: z.
        classes: C.
        examples: n, of a party.
    """
    wanted = 3 * noise_multiplier * math.sqrt(classes) / max(1.0, examples)
    return min(MOST_SHARE, max(LEAST_SHARE, wanted**2))


def center_share(noise_multiplier: float, terms: int, width: int, examples: float) -> float:
    """Choose the part of the budget that the center gets: enough for an error of `CENTER_ERROR`, and at most a tenth.

    It gets nothing if its error were then as long as a feature.

    Args:
        noise_multiplier: z of the whole budget.
        terms: how many noises add up in the sum that is used: one a client, or one.
        width: D.
        examples: N, in the sum.
    """
    error = noise_multiplier * math.sqrt(terms * width) / max(1.0, examples)  # if it had the whole budget
    share = min(MOST_CENTER, max(LEAST_CENTER, (error / CENTER_ERROR) ** 2))
    return share if error / math.sqrt(share) <= 1 else 0.0


def scatter_share(noise_multiplier: float, terms: int, width: int, examples: float) -> float:
    """Choose the part of the budget that the scatter gets: enough for noise of spectral radius 2 `SCATTER_EDGE`.

    It gets nothing if that were more than a quarter. Arguments are those of `center_share`.
    """
    error = noise_multiplier * math.sqrt(terms * width / 2) / max(1.0, examples)
    share = max(LEAST_SCATTER, (error / SCATTER_EDGE) ** 2)
    return share if share <= MOST_SCATTER else 0.0


def contributions(features: Tensor, share: float, directions: Tensor | None, center: Tensor | None = None) -> Tensor:
    """Compute every example's row [a, b z], or [a, b u].

    Args:
        features: [n, D].
        share: a^2.
        directions: [D, r] orthonormal columns, public; None for all.
        center: [D], m, from which features of unit norm are seen; None for the origin.

    Returns:
        [n, 1 + r] float64, each of norm at most 1; zero where a feature is not finite.
    """
    finite = features.isfinite().all(-1, keepdim=True)
    safe = torch.where(finite, features, 0.0)
    everything = torch.eye(features.shape[-1], dtype=features.dtype, device=features.device)
    if center is not None:
        safe = project(safe, everything).double() - center.double()
    projected = project(safe, everything if directions is None else directions).double()
    projected = projected / projected.norm(dim=-1, keepdim=True).clamp(min=1)  # rounding may leave it above 1
    rows = torch.cat([torch.full_like(projected[:, :1], math.sqrt(share)), math.sqrt(1 - share) * projected], -1)
    return torch.where(finite, rows, 0.0)


def class_sums(rows: Tensor, labels: Tensor, classes: int, persons: Tensor | None = None, clip: float = 1.0) -> Tensor:
    """Add contributions up by class, and bound those of each person if persons are given.

    Args:
        rows: [n, 1 + r], by `contributions`.
        labels: [n].
        classes: C.
        persons: [n] numbers of the persons whose examples they are, or None if examples are the unit.
        clip: the largest norm that one person's sum keeps.

    Returns:
        [C, 1 + r] float64. It changes by at most 1 for one example, or by at most `clip` for one person.
    """
    total = torch.zeros(classes, rows.shape[1], dtype=torch.float64, device=rows.device)
    if persons is None:
        return total.index_add_(0, labels, rows)
    for person in persons.unique():
        own = persons == person
        present, places = labels[own].unique(return_inverse=True)
        sums = torch.zeros(len(present), rows.shape[1], dtype=torch.float64, device=rows.device)
        sums.index_add_(0, places, rows[own])
        total.index_add_(0, present, sums * (clip / sums.norm().clamp(min=clip)))
    return total


def center_sum(features: Tensor, persons: Tensor | None = None, clip: float = 1.0) -> Tensor:
    """Count examples, and add their features up: their rows [a, b z] for a^2 = `CENTER_COUNTS`.

    Args:
        features: [n, D].
        persons, clip: as of `class_sums`.

    Returns:
        [1 + D] float64. It changes by at most 1 for one example, or by at most `clip` for one person.
    """
    rows = contributions(features, CENTER_COUNTS, None)
    return class_sums(rows, torch.zeros_like(rows[:, 0], dtype=torch.int64), 1, persons, clip)[0]


def scatter_sum(rows: Tensor, persons: Tensor | None = None, clip: float = 1.0) -> Tensor:
    """Add the products u u^T up.

    Args:
        rows: [n, r], each u of norm at most 1.
        persons, clip: as of `class_sums`.

    Returns:
        [r (r + 1) / 2] float64, see `packed`. It changes by at most 1 for one example, or by at most `clip` for one
        person.
    """
    rows = rows.double()
    if persons is None:
        return packed(rows.mT @ rows)
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for person in persons.unique():
        own = rows[persons == person]
        products = own.mT @ own
        total += products * (clip / products.norm().clamp(min=clip))
    return packed(total)


def packed(matrix: Tensor) -> Tensor:
    """Return a symmetric matrix [r, r] as a vector of the same norm: its upper triangle, row by row."""
    row, column = torch.triu_indices(len(matrix), len(matrix), device=matrix.device)
    entries: Tensor = matrix[row, column] * torch.where(row == column, 1.0, math.sqrt(2)).to(matrix)
    return entries


def unpacked(vector: Tensor) -> Tensor:
    """Return the symmetric matrix [r, r] of a vector [r (r + 1) / 2]; see `packed`."""
    rank = (math.isqrt(8 * len(vector) + 1) - 1) // 2
    row, column = torch.triu_indices(rank, rank, device=vector.device)
    upper = torch.zeros(rank, rank, dtype=vector.dtype, device=vector.device)
    upper[row, column] = vector / torch.where(row == column, 2.0, math.sqrt(2)).to(vector)
    return upper + upper.mT
