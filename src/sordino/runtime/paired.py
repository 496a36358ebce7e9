"""The difference between two prompts on the same test pictures: how much it varies over pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.runtime.evaluate import Evaluation, Scores


@dataclass(frozen=True)
class PairedVariance:
    """Variance of a mean difference of accuracies over clients and test pictures.

    Attributes:
        pictures: the number of test pictures that count.
        over_pictures: with pictures as the sample; None for one picture.
        over_pairs: with pairs of a client and a picture as the sample.
    """

    pictures: int
    over_pictures: float | None
    over_pairs: float


def paired_variances(evaluation: Evaluation, learned: Scores, given: Scores) -> dict[str, PairedVariance]:
    """Return by measure how the honest clients' mean difference of two scores varies over test pictures.

    Args:
        evaluation: that both scores are of.
        learned, given: the difference is the first less the second.
    """
    uniform = {name: torch.ones(1, hits.shape[1], dtype=torch.float64) for name, hits in learned.hits.items()}
    weights: Mapping[str, tuple[str, Tensor]] = {
        "local": ("test", evaluation.local),
        "neighbor": ("test", evaluation.neighbor),
        **{name: (split, uniform[split]) for name, split in _UNIFORM.items() if split in uniform},
    }
    variances = {}
    for name, (split, shares) in weights.items():
        shares = shares.expand(len(evaluation.local), -1)[evaluation.attackers :]
        differences = (learned.hits[split].double() - given.hits[split].double()).expand(len(evaluation.local), -1)
        if shares.any():
            variances[name] = paired_variance(differences[evaluation.attackers :], shares)
    return variances


_UNIFORM = {"overall": "test", "novel": "novel", "domain": "domain"}  # measures that weigh a split's pictures alike


def paired_variance(differences: Tensor, shares: Tensor) -> PairedVariance:
    """Return how a mean of differences varies, of weighted means [K] over pictures, and plainly over clients.

    Linearized as a ratio: a picture's part is its weighted differences from the mean (Särndal, Swensson and Wretman,
    Model Assisted Survey Sampling, 1992, section 5.7).

    Args:
        differences: [K, T] float64, in -1, 0 and 1.
        shares: [K, T] float64, not negative; a row of zeros is a client that does not count.
    """
    whole = shares.sum(1, keepdim=True)
    counted = whole.flatten() > 0
    weights = shares[counted] / whole[counted] / int(counted.sum())  # sum to 1
    parts = weights * (differences[counted] - (weights * differences[counted]).sum())
    pictures = int((weights.sum(0) > 0).sum())
    of_pictures = float(parts.sum(0).square().sum())
    corrected = of_pictures * pictures / (pictures - 1) if pictures > 1 else None
    return PairedVariance(pictures, corrected, float(parts.square().sum()))
