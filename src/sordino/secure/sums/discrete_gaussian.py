"""Exact samples of the discrete Gaussian, from uniform integers alone.

Canonne, Kamath and Steinke, The Discrete Gaussian for Differential Privacy, NeurIPS 2020 (arXiv
2004.00010), algorithms 1 to 3. The deviation is a whole number s of steps, and the probability of
an integer x is proportional to exp(-x^2 / (2 s^2)).

1. A candidate is discrete Laplace: the probability of y is proportional to exp(-|y| / s).
2. It is accepted with probability exp(-(|y| - s)^2 / (2 s^2)). The product of both is exp(-1/2)
   times the target.
3. A Bernoulli variable of probability exp(-gamma), gamma a fraction of integers, is composed of
   Bernoulli variables of rational probability. Each of these takes one uniform integer below its
   denominator.

**Exactness.** Every decision compares integers, and every uniform integer is drawn by rejection. No
floating-point number and no table takes part. So the samples have exactly the stated distribution
if the words of the source are independent and uniform. There is one exception: a candidate of 2^32
steps or more is drawn again. As s is at most 2^26, such a candidate is at least 64 deviations away,
and would have been accepted with probability exp(-63^2 / 2) at most. The total variation distance
that this causes is below 2^-2800.

**Timing.** The number of words and the time that a sample takes depend on the sample, as in every
rejection sampler.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sordino.randomness import system_words
from sordino.secure.errors import SecureError

Words = NDArray[np.uint64]
Bits = Callable[[int], Words]  # returns as many uniform 64-bit integers as it is asked for

# In steps. Then 2 s^2 k fits a word for every k below 2^11, which 1 / k! makes certain.
LARGEST_DEVIATION = 2**26
LARGEST_CANDIDATE = 2**32  # steps: then the square of its distance from s fits a word
PIECE = 2**14  # candidates drawn at once, so that they stay in the cache
ALL_ONES = np.uint64(2**64 - 1)


def system_bits(count: int) -> Words:
    """Return `count` uniform 64-bit integers from the operating system."""
    return system_words(count)


def discrete_gaussian(deviation: int, count: int, bits: Bits = system_bits) -> NDArray[np.int64]:
    """Return `count` independent samples of the discrete Gaussian.

    Args:
        deviation: s, in steps: a whole number; 0 gives zeros.
        count: the number of samples.
        bits: the source of uniform 64-bit integers. Equal words give equal samples.

    Raises:
        SecureError: the deviation is negative, or above 2^26 steps.
    """
    if not 0 <= deviation <= LARGEST_DEVIATION:
        raise SecureError(
            f"a deviation of {deviation} steps: must be 0 to 2^26 = {LARGEST_DEVIATION}; use a larger step"
        )
    samples = np.zeros(count, np.int64)
    filled = 0 if deviation else count
    while filled < count:
        # About two thirds of the discrete Laplace candidates are accepted.
        candidates = _discrete_laplace(deviation, min(PIECE, 2 * (count - filled) + 16), bits)
        accepted = candidates[_accepted(candidates, deviation, bits)][: count - filled]
        samples[filled : filled + len(accepted)] = accepted
        filled += len(accepted)
    return samples


def bernoulli_exp(numerator: Words, denominator: Words, bits: Bits) -> NDArray[np.bool_]:
    """Draw Bernoulli variables that are true with probability exp(-numerator / denominator), [C] each.

    The whole part of the exponent takes as many variables of exp(-1). The rest takes one variable
    of `_bernoulli_exp_of_fraction`.
    """
    successes = _bernoulli_exp_of_fraction(numerator % denominator, denominator, bits)
    whole = numerator // denominator
    left = np.flatnonzero(successes & (whole > 0))
    trials = 0
    while len(left):
        trials += 1
        success = _bernoulli_exp_of_one(len(left), bits)
        successes[left[~success]] = False
        left = left[success]
        left = left[whole[left] > trials]
    return successes


def below(limit: Words, bits: Bits) -> Words:
    """Return exactly uniform integers from 0 to limit - 1, [C] for limits [C]; see `PrimeField.random`.

    A word is drawn again if it is among the last 2^64 mod limit ones. A remainder of such a word
    would make small integers a little likelier than large ones.
    """
    surplus = (ALL_ONES % limit + np.uint64(1)) % limit
    words = np.array(bits(len(limit)))
    again = np.flatnonzero(words > ALL_ONES - surplus)
    while len(again):
        words[again] = bits(len(again))
        again = again[words[again] > ALL_ONES - surplus[again]]
    return words % limit


def _discrete_laplace(scale: int, candidates: int, bits: Bits) -> NDArray[np.int64]:
    """Return independent samples, fewer than `candidates`, with probability proportional to exp(-|y| / scale)."""
    limits = np.full(candidates, scale, np.uint64)
    rest = below(limits, bits)
    rest = rest[_bernoulli_exp_of_fraction(rest, limits, bits)]
    sizes = rest + np.uint64(scale) * _geometric(len(rest), bits)
    octets = np.ascontiguousarray(bits(-(-len(sizes) // 64))).view(np.uint8)
    negative = np.unpackbits(octets, count=len(sizes)).astype(bool)
    # Without the first condition, zero would have two signs and twice its probability.
    kept = ~(negative & (sizes == 0)) & (sizes < LARGEST_CANDIDATE)
    signed: NDArray[np.int64] = sizes.astype(np.int64)
    signed[negative] *= -1
    samples: NDArray[np.int64] = signed[kept]
    return samples


def _accepted(candidates: NDArray[np.int64], deviation: int, bits: Bits) -> NDArray[np.bool_]:
    distances = np.abs(np.abs(candidates) - deviation).astype(np.uint64)
    return bernoulli_exp(
        distances * distances,
        np.full(len(distances), 2 * deviation**2, np.uint64),
        bits,
    )


def _geometric(count: int, bits: Bits) -> Words:
    """Return the number of variables of probability exp(-1) that are true before the first that is not, [count]."""
    successes = np.zeros(count, np.uint64)
    left = np.arange(count)
    while len(left):
        left = left[_bernoulli_exp_of_one(len(left), bits)]
        successes[left] += np.uint64(1)
    return successes


def _bernoulli_exp_of_one(count: int, bits: Bits) -> NDArray[np.bool_]:
    ones = np.ones(count, np.uint64)
    return _bernoulli_exp_of_fraction(ones, ones, bits)


def _bernoulli_exp_of_fraction(
    numerator: Words,
    denominator: Words,
    bits: Bits,
) -> NDArray[np.bool_]:
    """Draw Bernoulli variables of probability exp(-gamma) for gamma = numerator / denominator in [0, 1], [C] each.

    Draw variables of probability gamma, gamma / 2, gamma / 3, ... until one is false. It is the
    k-th with probability gamma^(k-1) / (k-1)! - gamma^k / k!, so k is odd with probability
    exp(-gamma).
    """
    successes = np.zeros(len(numerator), bool)
    left, k = np.arange(len(numerator)), 1
    if len(numerator) and (numerator == denominator).all():
        k = 2  # the variable of gamma = 1 is certain
    while len(left):
        success = below(denominator[left] * np.uint64(k), bits) < numerator[left]
        successes[left[~success]] = k % 2 == 1
        left, k = left[success], k + 1
    return successes
