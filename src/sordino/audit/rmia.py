"""RMIA: membership inference by pairwise likelihood ratios.

Zarifzadeh, Liu, Shokri, Low-Cost High-Power Membership Inference Attacks, ICML 2024 (arXiv 2312.03262). An image x is
compared with other images z of the population. The hypotheses are that the model was trained on x, or that it was
trained on z in its place. With p the probability that the model gives an image's class, and P its mean over models
that were trained without knowledge of the membership, the likelihood ratio is

    LR(x, z) = (p(x) / P(x)) / (p(z) / P(z)),

and the score of x is the share of the z that it beats: LR(x, z) >= gamma.

The z that x is compared with are the other candidates of the same prompt. Half of them are members, and nobody who
scores knows which. This changes the scores and not their order: for one prompt, LR(x, z) >= gamma is a threshold of
p(x) / P(x), whatever population z is drawn from. A population of known non-members would use coins that the bound on
epsilon (`scores`) must not see. And gamma is 1, the least that the paper considers: prompts move a probability by less
than the factor of 2 that its large models do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logsumexp

from sordino.audit.statistics import roc

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]

CORRECTIONS = tuple(float(step) / 10 for step in range(11))  # values of a that are tried
ATTACKED_SHADOWS = 8  # on which a is chosen; each is attacked by all others
ROUNDING = 1e-9  # log-ratios that differ by less are equal


def rmia(log_ratios: Floats, group: Indices) -> Floats:
    """Compute scores [n]: the share of the other candidates of the same prompt that each candidate beats.

    Equal ratios count half. Candidates that beat equally many are ordered by their own ratio.

    Args:
        log_ratios: [n], log(p / P); see `online` and `offline`.
        group: [n], the prompt of each candidate.
    """
    from scipy.stats import rankdata  # slow to import

    scores = np.empty(len(log_ratios))
    rounded = np.round(log_ratios / ROUNDING) * ROUNDING
    for prompt in np.unique(group):
        chosen = group == prompt
        beaten = rankdata(rounded[chosen]) - 1
        scores[chosen] = (beaten + (expit(rounded[chosen]) - 0.5) / 2) / max(len(beaten) - 1, 1)
    return scores


def online(target: Floats, shadows: Floats, included: Flags) -> Floats:
    """Compute log(p / P) [n], P the mean over shadows, those with and those without the candidate weighed alike.

    Args:
        target: [n], log-probabilities of the candidates' classes under the attacked prompts.
        shadows: [S, n], the same under the shadows' prompts.
        included: [S, n], true where a shadow was trained on the candidate; each column has both kinds.
    """
    # Differences to the target: if nothing was learned, all are exactly zero, and so is the result.
    differences = shadows - target
    return -np.asarray(np.logaddexp(_log_mean(differences, included), _log_mean(differences, ~included)) - np.log(2))


def offline(target: Floats, shadows: Floats, included: Flags, correction: float) -> Floats:
    """Compute log(p / P) [n] from shadows without the candidate alone, so that no shadow is trained for a candidate.

    P is half the sum of the means with and without the candidate. The first is unknown, and approximated as linear in
    the second: a P_out + 1 - a. So P = ((1 + a) P_out + 1 - a) / 2, as the paper has it.

    Args:
        target, shadows, included: as of `online`; each candidate is in no more than S - 1 shadows.
        correction: a, in [0, 1]; at 1 both means are equal.
    """
    outside = _log_mean(shadows - target, ~included)
    with np.errstate(divide="ignore"):
        certain = np.log((1 - correction) / 2) - target
    return -np.asarray(np.logaddexp(outside + np.log((1 + correction) / 2), certain))


def best_correction(shadows: Floats, included: Flags) -> float:
    """Choose a of `offline`: the one by which shadows attack each other best, in their mean AUC.

    Args:
        shadows: [S, n], log-probabilities of the candidates' classes under the shadows' prompts.
        included: [S, n], true where a shadow was trained on the candidate.
    """
    aucs = np.zeros(len(CORRECTIONS))
    for attacked in range(min(ATTACKED_SHADOWS, len(shadows))):
        others = np.arange(len(shadows)) != attacked
        known = (~included[others]).any(0)
        truth = included[attacked, known]
        if truth.all() or not truth.any():
            continue
        seen = (shadows[attacked, known], shadows[others][:, known], included[others][:, known])
        aucs += [roc(offline(*seen, correction), truth).auc for correction in CORRECTIONS]
    return CORRECTIONS[int(aucs.argmax())]


def _log_mean(logarithms: Floats, chosen: Flags) -> Floats:
    """Return the logarithm of the mean of exp over the chosen entries of each column of [S, n]."""
    with np.errstate(divide="ignore"):
        weights = np.where(chosen, 1.0, 0.0)
        return np.asarray(logsumexp(logarithms, axis=0, b=weights) - np.log(weights.sum(0)))
