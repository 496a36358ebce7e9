"""Estimates from a release of class statistics; all of it is post-processing, and costs no privacy.

A party's noisy counts say which classes it holds (`held`). Its noisy sums say where the means of their features lie
(`shrunk`): observations with known noise, for which the hand-written prompt's text features are the prior. Prior
variances are estimated from the release itself (empirical Bayes; James and Stein, 1961; Efron and Morris, 1973). So an
estimate is the text feature where noise is large, and the mean of the images where it is small. Nothing here is tuned
on images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A class mean has some cosine with its class's text feature. Over the encoders and data sets that were tried the mean
# feature's product with it lies around this; the spread of the belief is half of it, so that noise never turns it.
EXPECTED_PRODUCT = 0.2
LEAST_VARIANCE = 1e-4  # so that observations without noise have a finite weight
LEAST_COUNT = 1e-3  # a class with fewer examples in expectation has no mean of its own
MOST_NORM = 0.98  # of a center: what is seen from it must have a size
MOST_SPREAD = 0.95  # of the variance within classes is in few directions


@dataclass(frozen=True)
class Observed:
    """Sums over examples, observed with noise.

    Attributes:
        sums: [..., C, r], of the features of each class.
        counts: [..., C], of examples.
        sum_variance: [..., C], of the noise on each number of `sums`.
        count_variance: [..., C], of the noise on `counts`.
        expected: [..., C], of the counts, given the noisy ones; not negative. Sums over it are means.
        examples: [..., C], the expected number of examples: `expected`, but where parties were weighted.
        probability: [..., C], that there are any examples.
        holders: [..., C], the expected number of parties that hold any.
    """

    sums: Tensor
    counts: Tensor
    sum_variance: Tensor
    count_variance: Tensor
    expected: Tensor
    examples: Tensor
    probability: Tensor
    holders: Tensor


def held(counts: Tensor, variance: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """Infer which classes a party holds from noisy counts, and how many examples of each.

    A party holds each class with the same probability m / C. Of a class that it holds it has N(total / m, half of that)
    examples. m, the number of classes, is the one under which the noisy counts are most likely. How many examples a
    party holds is known to all (see `accounting`).

    Args:
        counts: [C], with noise.
        variance: [C], of the noise.
        total: how many examples the party holds.

    Returns:
        [C] the probability of each class, given the counts, and [C] the expected number of its examples.
    """
    counts, variance = counts.double(), variance.double()
    if not bool((variance > 0).all()):
        return (counts > 0.5).double(), counts.clamp(min=0)
    classes = len(counts)
    numbers = torch.arange(1, classes + 1, dtype=torch.float64, device=counts.device)[:, None]
    mean = total / numbers
    among = (mean / 2) ** 2
    rate = (numbers / classes).clamp(max=1 - 1e-3)
    absent = _log_normal(counts, variance) + torch.log1p(-rate)
    present = _log_normal(counts - mean, variance + among) + rate.log()
    likeliest = int(torch.logaddexp(absent, present).sum(1).argmax())
    probability = torch.sigmoid(present[likeliest] - absent[likeliest])
    mean, among = mean[likeliest], among[likeliest]
    expected = mean + among / (among + variance) * (counts - mean)
    return probability, probability * expected.clamp(min=0)


def observed(sums: Tensor, counts: Tensor, sum_variance: Tensor, count_variance: Tensor, total: float) -> Observed:
    """Return one party's statistics, [C, r] and [C], with what its counts tell."""
    probability, expected = held(counts, count_variance, total)
    probability, expected = probability.to(sums), expected.to(sums)
    return Observed(
        *(sums, counts, sum_variance, count_variance),
        *(expected, expected.clone(), probability, probability.clone()),
    )


def pooled(parties: Observed) -> Observed:
    """Join the statistics of several parties, [K, C, ...], into one.

    The sum of a party that likely holds few images of a class is mostly noise. So a sum of n images has the weight
    n / (n s^2 + v), with the variance v of its noise and s^2 of the images around their class's mean. It is the best
    linear weight if the parties' class means are alike and the counts are known. Without noise all weights are equal,
    and the means are those of all images; with much, weights go by counts. As features have norms of at most 1, s^2 is
    taken to be 1 / r.
    """
    noise, within_class = parties.sum_variance, 1 / parties.sums.shape[-1]
    weights = parties.expected / (parties.expected * within_class + noise).clamp(min=1e-12)
    least = LEAST_COUNT / (LEAST_COUNT * within_class + noise.amin(0))  # a class that nobody holds keeps little noise
    weights = weights / torch.maximum(weights.amax(0), least)
    return Observed(
        (weights[..., None] * parties.sums).sum(0),
        (weights * parties.counts).sum(0),
        (weights**2 * parties.sum_variance).sum(0),
        (weights**2 * parties.count_variance).sum(0),
        (weights * parties.expected).sum(0),
        parties.examples.sum(0),
        1 - (1 - parties.probability).prod(0),
        parties.holders.sum(0),
    )


@dataclass(frozen=True)
class ClassMeans:
    """Means of each class's features, given a release.

    Attributes:
        means: [..., C, r], the expected means.
        variance: [..., C], of each number of them.
    """

    means: Tensor
    variance: Tensor


def shrunk(seen: Observed, prior: Tensor, parties: Tensor | float = 1.0) -> ClassMeans:
    """Infer class means from sums of one party, or of all, with text features as the prior.

    The mean of class c is rho t_c + e, with the text feature t_c, one factor rho for all classes, and e ~ N(0, s^2 I).
    Its observation, the sum over the count, has noise of known variance. rho and s^2 are estimated from all classes.

    Args:
        seen: [C, r].
        prior: [C, r], the text features in the released directions.
        parties: over how many parties with the class whatever is learned of these means will be averaged, [C]. Noise
            averages out and bias does not, so means are shrunk as far as the noise of the average asks for.
    """
    means, noise, known = _means(seen)
    precision = torch.where(known, 1 / (noise + LEAST_VARIANCE), torch.zeros_like(noise))
    # rho: a normal prior times the likelihood of the products of all classes.
    belief = (EXPECTED_PRODUCT / 2) ** -2
    rho = ((means * prior).sum(1) * precision).sum() + EXPECTED_PRODUCT * belief
    rho = (rho / ((prior.pow(2).sum(1) * precision).sum() + belief)).clamp(min=EXPECTED_PRODUCT / 4)
    rest = means - rho * prior
    among = _excess(rest, noise, precision)
    trust = torch.where(known, among / (among + noise / parties).clamp(min=1e-12), torch.zeros_like(noise))
    return ClassMeans(rho * prior + trust[:, None] * rest, among * (1 - trust))


def _excess(rest: Tensor, noise: Tensor, precision: Tensor) -> Tensor:
    """Estimate the variance that means have beyond noise, from deviations [C, r], by moments.

    It is not negative, and at most 1 / r, as means of features have a norm of at most 1. Two deviations of the estimate
    are taken off: a wrong variance above 0 would pass noise on as if it were known.
    """
    weights = precision**2 / (precision**2).sum().clamp(min=1e-12)
    squares = (weights * (rest.pow(2).mean(1) - noise)).sum()
    deviation = (weights**2 * 2 * noise**2 / rest.shape[1]).sum().sqrt()
    return (squares - 2 * deviation).clamp(0, 1 / rest.shape[1])


def personal(own: Observed, shared: ClassMeans) -> ClassMeans:
    """Infer one party's class means from its own sums and from what all parties' sums tell.

    Its mean of class c is the shared one plus N(0, d^2 I): 0 where the parties' images of a class are alike. The shared
    estimate is made of the party's own sums too, so only d^2 is a reason to trust these more. d^2 is estimated from all
    classes that the party holds.
    """
    means, noise, _ = _means(own)
    known = own.probability > 0.5
    rest = means - shared.means
    doubt = noise + shared.variance
    precision = torch.where(known, 1 / (doubt + LEAST_VARIANCE), torch.zeros_like(noise))
    between = _excess(rest, doubt, precision)
    trust = torch.where(known, between / (between + noise).clamp(min=1e-12), torch.zeros_like(noise))
    return ClassMeans(shared.means + trust[:, None] * rest, (between + shared.variance) * (1 - trust))


def _means(seen: Observed) -> tuple[Tensor, Tensor, Tensor]:
    """Return the observed means [C, r], the variance of their noise [C], and which classes have any [C]."""
    counts = seen.expected.clamp(min=LEAST_COUNT)
    return seen.sums / counts[:, None], seen.sum_variance / counts**2, seen.expected > LEAST_COUNT


def within(seen: Observed, means: ClassMeans, squares: Tensor | float = 1.0) -> float:
    """Return the variance of an image's features around its class's mean, in one direction.

    Features have a known mean square. So what the means lack of it is within the classes: squares = |mean|^2 + r w. The
    squared norm of the mean is estimated from the noisy sums, over all classes.

    Args:
        seen: [C, r].
        means: what was inferred of them.
        squares: the mean squared norm of features: 1, or less where they are seen from a center.
    """
    counts = seen.expected
    width = seen.sums.shape[-1]
    total = counts.pow(2).sum().clamp(min=LEAST_COUNT)
    measured = (seen.sums.pow(2).sum(-1) - width * seen.sum_variance).sum() / total
    noise = (width * seen.sum_variance).sum() * math.sqrt(2 / width) / total
    assumed = means.means.pow(2).sum(-1).mean().clamp(max=1)
    # Where noise hides it, the posterior means' own norm stands in.
    trust = 1 / (1 + (noise / (squares / 4)) ** 2)
    norm = trust * measured + (1 - trust) * assumed
    return float((squares - norm).clamp(0, float(squares)) / width)


def center_of(
    noisy: Tensor, variance: float, count_share: float, expected: Tensor | None = None, rate: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Infer the mean feature from a noisy count and sum of features.

    It is shrunk towards 0 as noise grows (James and Stein, 1961), and kept inside the sphere of unit norm. An error of
    the count is an error of the mean's norm, and features that all lie near their mean then seem to vary by another
    amount. So what is known of the count is used beside its noisy value, each as precise as it is.

    Args:
        noisy: [K, 1 + D], counts times a, and sums times b.
        variance: of the noise on each number.
        count_share: a^2.
        expected: [K], how many examples are expected in the sums, where that is known to all; None if it is not.
        rate: the probability with which each example is in the sums, if their number is known.

    Returns:
        The means [K, D], and how far each is trusted [K]: 1 without noise, 0 where noise is all there is.
    """
    counts = noisy[:, 0] / count_share**0.5
    if expected is not None:
        expected = expected.to(counts)
        of_noise, of_sampling = variance / count_share, expected * (1 - rate)
        known = torch.where(of_sampling > 0, of_noise / (of_noise + of_sampling), 1.0)
        counts = torch.lerp(counts, expected, known)
    counts = counts.clamp(min=1)
    means = noisy[:, 1:] / (1 - count_share) ** 0.5 / counts[:, None]
    doubt = variance / (1 - count_share) / counts**2
    trust = (1 - means.shape[1] * doubt / means.pow(2).sum(1).clamp(min=1e-12)).clamp(0, 1)
    trust = torch.minimum(trust, MOST_NORM / means.norm(dim=1).clamp(min=1e-12))
    return trust[:, None] * means, trust


def principal(scatter: Tensor, noise: float, between: Tensor, width: float) -> Tensor:
    """Return the directions in which features vary most within their classes, times their standard deviations.

    The scatter of features around their classes' means is the sum of a multiple of the identity and of few directions,
    observed with noise of known size: a spiked Wigner matrix. Its eigenvalues are pushed outwards, and its eigenvectors
    turned, by known amounts (Benaych-Georges and Nadakuditi, Advances in Mathematics 2011). What stands out of the
    noise is corrected for both.

    Args:
        scatter: [r, r], the mean over examples of u u^T, with noise.
        noise: the standard deviation of the noise on an entry beside the diagonal.
        between: [r, r], the part of it that the classes' means explain.
        width: the mean of its eigenvalues within classes.

    Returns:
        [q, r], q >= 0. The sum of their squares is less than r `width`.
    """
    rank = len(scatter)
    values, vectors = torch.linalg.eigh(scatter - between)
    edge = math.sqrt(rank) * noise
    above = values - width
    seen = above > 2 * edge * (1 + 1e-6) + 1e-9
    above, vectors = above[seen], vectors[:, seen]
    own = (above + (above**2 - 4 * edge**2).clamp(min=0).sqrt()) / 2
    own = own * (1 - (edge / own) ** 2)
    own = own * (MOST_SPREAD * rank * width / own.sum().clamp(min=1e-12)).clamp(max=1)
    directions: Tensor = own.sqrt()[:, None] * vectors.mT
    return directions


def _log_normal(values: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (values**2 / variance + (2 * math.pi * variance).log())
