"""One noisy release of class statistics: what a party adds up, and why one example changes it by at most 1.

Party k releases once, before the first round,

    M = sum over its examples (x, y) of onehot(y) (x) [a, b z] + N(0, (noise multiplier)^2 I),    a^2 + b^2 = 1,

with z the image's feature at norm at most 1, possibly projected on public directions. M is a matrix [C, 1 + r]: in
column 0 the class counts times a, and in the others the class sums of features times b.

Sensitivity. Neighboring data sets differ in one example of one party, added or removed. Every term depends on its own
example alone. It has one row that is not zero, [a, b z], whose norm is sqrt(a^2 + b^2 |z|^2) <= 1. So M changes by one
term, by at most 1 in Frobenius norm, and by exactly 1 if |z| = 1. An example whose feature is not finite has the term
0. With Gaussian noise of standard deviation equal to the noise multiplier on every entry, M is one Gaussian release of
sensitivity 1. All that is made of M afterwards, however often and by whomever, is post-processing.

If the unit is a person, the terms of one person are summed, and the sum is scaled down to norm `clip` where it is
longer. If examples are sampled (Poisson sampling), each is in the sum with one probability, independently of all
others.

How much of the norm the counts get (a^2) is decided by `count_share`, from public numbers.

Sources: releases of sums of frozen features are in Mehta et al., TMLR 2023 (arXiv 2211.13403), and Wahdany et al.,
Differentially Private Prototypes, AAAI 2025 (arXiv 2406.08039).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sordino.privacy.cotangent import project

LEAST_SHARE, MOST_SHARE = 0.1, 0.9


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


def contributions(features: Tensor, share: float, directions: Tensor | None) -> Tensor:
    """Compute every example's row [a, b z].

    Args:
        features: [n, D].
        share: a^2.
        directions: [D, r] orthonormal columns, public; None for all.

    Returns:
        [n, 1 + r] float64, each of norm at most 1; zero where a feature is not finite.
    """
    finite = features.isfinite().all(-1, keepdim=True)
    safe = torch.where(finite, features, 0.0)
    if directions is None:
        directions = torch.eye(features.shape[-1], dtype=features.dtype, device=features.device)
    projected = project(safe, directions).double()
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
