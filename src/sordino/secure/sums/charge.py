"""The charge for a sum with discrete noise: its sensitivity in steps, and the equivalent Gaussian noise.

Kairouz, Liu and Steinke, The Distributed Discrete Gaussian Mechanism for Federated Learning with
Secure Aggregation, ICML 2021 (arXiv 2102.06387). Vectors are rounded to multiples of a step, each
client adds a discrete Gaussian, and only the sum is opened. A ledger knows the continuous Gaussian
mechanism. The two differ in two ways:

**A sum of discrete Gaussians is not one** (`sum_divergence`). Their section 4: let X of parameter
a^2 and Y of b^2 be independent. The probability that X + Y = z is that of the discrete Gaussian of
a^2 + b^2 at z, times the sum over integers x of exp(-(x - m)^2 / (2 c^2)), up to a constant. Here 1
/ c^2 = 1 / a^2 + 1 / b^2, and m is proportional to z. By Poisson's summation this is constant up to
a factor between 1 - 3 q and 1 + 3 q, where q = exp(-2 pi^2 c^2). So logarithms of probabilities
differ by 10 q at most (7 q, to be exact), and with every further summand by as much again. From a
deviation of four steps on this is below 10^-60.

**A discrete Gaussian is not a rounded one** (`rounding_divergence`). With G = N(0, S - 1/12),
rounding G + v to integers is post-processing of the Gaussian mechanism. For an integer shift v it
is round(G) + v. So the mechanism that adds round(G) is at least as private as the one that adds G,
with no correction. It remains to compare the discrete Gaussian of parameter S with round(G). Let b
= 1 / (S - 1/12), a = k b and U uniform on [-1/2, 1/2]. The logarithm of the ratio of their
probabilities at k is

    a^2 / 24 / (1 + b / 12) - log(1 + b / 12) / 2 - log E exp(a U - b U^2 / 2),

and a constant below 3 exp(-2 pi^2 S). With w = a^2 + b <= 1, the terms of order m of the
expectation are at most (w / 8)^m / ((2 m + 1) m!), because U^2 <= 1/4. First orders cancel, which
is the purpose of 1/12. Second orders add up to (a^4 - 6 a^2 b + 3 b^2) / 2880, at most w^2 / 960,
and all others to w^3 / 2500 at most. So it is below w^2 / 500.

Let h be the sum of both bounds over d entries. Let f be the probability that any entry of a
discrete Gaussian is beyond 14 deviations, where w is not bounded; f is at most 2 d exp(-98). If the
Gaussian mechanism with variance S - 1/12 is (epsilon, delta)-private, also sampled or composed,
then a release of the sum is (epsilon + 2 h, exp(h) delta + (1 + exp(epsilon + h)) f)-private.
`charge` refuses settings with h above 10^-9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sordino.secure.errors import SecureError

DEVIATIONS = 14  # the range in which a discrete and a rounded Gaussian are compared
MOST_DIVERGENCE = 1e-9  # h, of one release


@dataclass(frozen=True)
class Charge:
    """The Gaussian mechanism that a ledger charges for one release of a sum.

    Attributes:
        noise_multiplier: z, the deviation of the noise over the sensitivity, for an observer who
            subtracts colluders' noise.
        variance: the variance of that Gaussian, in squared steps: the sum of the parameters less
            1/12.
        sensitivity: the sensitivity of the sum, in steps.
        divergence: h; epsilon is larger by 2 h at most. Below 10^-9.
        failure: f; delta is larger by (1 + exp(epsilon + h)) f at most, and by a part h of itself.
    """

    noise_multiplier: float
    variance: float
    sensitivity: float
    divergence: float
    failure: float


def charge(deviations: Sequence[int], colluders: int, sensitivity: float, dimension: int) -> Charge:
    """Return the charge for the sum of the clients who are really in it.

    Args:
        deviations: s_k in steps of each survivor, that is each client whose vector is in the sum.
        colluders: T, the number of survivors who subtract their own noise; they are those with the
            most noise.
        sensitivity: the sensitivity of the sum of quantized vectors, in steps; see
            `client_sensitivity`, `example_sensitivity`.
        dimension: d, the number of entries.

    Raises:
        SecureError: there are no more survivors than colluders, or there is no noise. Or the noise
            is so coarse that a discrete Gaussian differs from the continuous one by more than
            10^-9.
    """
    if not 0 <= colluders < len(deviations):
        raise SecureError(
            f"{len(deviations)} clients in a sum with {colluders} colluders: no noise is left that they do not know"
        )
    if not (sensitivity > 0 and dimension >= 1 and min(deviations) > 0):
        raise SecureError(
            f"a sum with sensitivity {sensitivity} in {dimension} entries and deviations from {min(deviations)} steps "
            "has no noise multiplier; all must be positive"
        )
    unknown = sorted(deviations)[: len(deviations) - colluders]
    parameter = sum(deviation**2 for deviation in unknown)
    divergence = dimension * (sum_divergence(unknown) + rounding_divergence(math.sqrt(parameter)))
    if not divergence <= MOST_DIVERGENCE:
        raise SecureError(
            f"noise of {math.sqrt(parameter):.4g} steps in {dimension} entries differs from a continuous Gaussian by "
            f"{divergence:.2g}, above {MOST_DIVERGENCE}; use a smaller step"
        )
    variance = parameter - 1 / 12
    return Charge(
        noise_multiplier=math.sqrt(variance) / sensitivity * (1 - 2.0**-50),
        variance=variance,
        sensitivity=sensitivity,
        divergence=divergence,
        failure=2 * dimension * math.exp(-(DEVIATIONS**2) / 2),
    )


def client_sensitivity(clip: float, step: float, dimension: int) -> float:
    """Return the largest norm, in steps, of a client's quantized vector: the change of the sum if it is absent.

    *Proof.* A vector v of norm at most C is rounded to q with |q_i - v_i / step| <= 1/2 in each of d entries. So
    |q| <= |v| / step + |q - v / step| <= C / step + sqrt(d) / 2. `SumSetup.quantize` checks it in integers.
    """
    return clip / step + math.sqrt(dimension) / 2


def example_sensitivity(clip: float, step: float, dimension: int) -> float:
    """Return the largest change, in steps, of a client's quantized vector if one example is absent.

    *Proof.* Without rounding, the vector a becomes b with |a - b| <= C. Clipping entries to a range
    moves no two numbers apart. Each entry of a and of b is rounded by 1/2 at most. The step is a
    power of two, so that division by it is exact: |round(a) - round(b)| <= |a - b| / step + 2
    sqrt(d) / 2 <= C / step + sqrt(d).
    """
    return clip / step + math.sqrt(dimension)


def sum_divergence(deviations: Sequence[int]) -> float:
    """Bound the difference of logarithms of probabilities of a sum of discrete Gaussians and of one.

    For m equal deviations s it is tau = 10 sum_{k=1}^{m-1} exp(-2 pi^2 s^2 k / (k + 1)), theorem 1
    of Kairouz et al. For others, k / (k + 1) s^2 becomes 1 / (1 / S_k + 1 / s_{k+1}^2) with the
    partial sums S_k of squares.

    Raises:
        SecureError: a deviation is below one step.
    """
    if min(deviations) < 1:
        raise SecureError(f"a deviation of {min(deviations)} steps: must be 1 or more")
    bound, parameter = 0.0, float(deviations[0]) ** 2
    for deviation in deviations[1:]:
        square = float(deviation) ** 2
        bound += 10 * math.exp(-2 * math.pi**2 * parameter * square / (parameter + square))
        parameter += square
    return bound


def rounding_divergence(deviation: float) -> float:
    """Bound the same difference for a discrete Gaussian and a rounded one of variance less 1/12.

    The bound holds within 14 deviations. It is infinite below 15 steps, where nothing is proved.
    See the module's docstring.
    """
    square = deviation**2
    precision = 1 / (square - 1 / 12) if square > 1 / 12 else math.inf
    w = precision * (DEVIATIONS**2 * square * precision + 1)
    return w**2 / 500 + 3 * math.exp(-2 * math.pi**2 * square) if w <= 1 else math.inf
