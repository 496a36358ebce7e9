"""Reciprocals and inverse square roots, and the unit vectors and LayerNorm built on them. No comparisons.

Newton's method needs a first guess that is close everywhere in a stated range. A Fourier series, fitted to the range
in relative error, is such a guess and costs one opening. See `calibrate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from sordino.mpc.arithmetic.ring import WORD
from sordino.mpc.dealing.correlations import Powers
from sordino.mpc.dealing.costs import protocol
from sordino.mpc.errors import OutOfRange
from sordino.mpc.protocols.fourier import Series, angle_of, evaluate, fit
from sordino.mpc.protocols.linear import mask_and_open, product, triple_product, truncate, truncate_masked
from sordino.mpc.protocols.party import Masked, Party, Shared

HARMONICS = (4, 6, 8, 12, 16, 24, 32)  # tried in turn
ROOM = 61  # bits of a value that can still be truncated


@dataclass(frozen=True)
class Root:
    """A method to compute x^(-1/power) for x in a range.

    Attributes:
        power: 1 for reciprocals, 2 for inverse square roots.
        start: the series that gives the first guess. Its range is the root's.
        steps: of Newton's method after it.
        error: bound on the relative error, before the result is rounded.
    """

    power: int
    start: Series
    steps: int
    error: float

    @property
    def fractions(self) -> tuple[int, int]:
        """Fraction bits of y and of x in a step: the same s bits below the smallest y and x, as many as fit.

        The largest number in a step, (power + 1) y, has (power + 1) times the fraction bits of y, and those of x.
        """
        low, high = math.log2(self.start.low), math.log2(self.start.high)
        largest = math.log2(self.power + 1) - low / self.power
        s = (ROOM - largest - (self.power + 1) * high / self.power + low) / (self.power + 2)
        return math.floor(s + high / self.power), math.floor(s - low)

    @property
    def precision(self) -> int:
        """Fraction bits of the start's cosines."""
        return _precision(self.power, self.start)


@lru_cache(maxsize=64)  # each session of a server asks for the same few
def calibrate(power: int, low: float, high: float, error: float = 1e-3, steps: int = 1) -> Root:
    """Find the cheapest first guess from which Newton's method meets an error bound everywhere in a range.

    A step turns a relative error e into e^2 for reciprocals, and into at most 3/2 e^2 + 1/2 e^3 for inverse square
    roots. The fixed point of x adds an error of its own.

    Args:
        power: 1 or 2.
        low, high: the range. Arguments outside it give wrong results without notice.
        error: bound on the relative error.
        steps: of Newton's method, two rounds each.

    Raises:
        OutOfRange: no series of up to 32 frequencies meets the bound.
    """
    period = math.ceil(math.log2(1.2 * high))
    for count in HARMONICS:
        try:
            start = fit(lambda x: x ** (-1 / power), low, high, period, range(1, count + 1), relative=True)
        except OutOfRange:
            continue
        root = Root(power, start, steps, _reached(power, start, steps))
        if steps:
            root = replace(root, error=root.error + 2.0 ** -root.fractions[1] / (power * low))
        if root.error <= error:
            return root
    raise OutOfRange(f"x^(-1/{power}) from {low:g} to {high:g} within {error:g}: take more steps, or a narrower range")


def _reached(power: int, start: Series, steps: int) -> float:
    """Bound the relative error after `steps` steps. The bound is infinite if the start is too far away."""
    rounding = math.sqrt(2) * (len(start.frequencies) + start.weight) * 2.0 ** -_precision(power, start)
    error = start.error + rounding * math.pow(start.high, 1 / power)
    for _ in range(steps):
        if error > 0.5:
            return math.inf
        error = error**2 if power == 1 else 1.5 * error**2 + 0.5 * error**3
    return error


def _precision(power: int, start: Series) -> int:
    """Return the fraction bits of the start's cosines that the largest result leaves."""
    return min(24, (ROOM - 2 - math.ceil(-math.log2(start.low) / power)) // 2)


@protocol
def inverse_root(party: Party, x: Shared, root: Root, fraction: int) -> Shared:
    """Compute x^(-1/p): reciprocals or inverse square roots.

    1. Mask and open x.
    2. `evaluate` the start on it, and truncate the result: y.
    3. `newton_step` and truncate, `root.steps` times. x is truncated from step 1, and masked again with the first y.

    Rounds: 2 + 2 steps. Online: N n / 8 + 8 N + 16 N steps + (8 N if there are any), for x modulo 2^n, less the bits
    that each truncation drops. Offline: 16 K N + 16 N for the start, 16 N for x if there are steps, 8 (2 p + 1) N +
    16 N a step; K frequencies.
    Error: that of the root, relative; and 2^-fraction.

    Args:
        x: within the root's range, shared modulo 2^n, and below 2^(n-2) as an integer.
        root: see `calibrate`.
        fraction: bits of the result.
    """
    (masked,) = mask_and_open(party, x, bits=x.bits)
    y = evaluate(party, angle_of(masked, root.start.period), root.start, root.precision)
    if not root.steps:
        return truncate(party, y, fraction=fraction)[0]
    y_fraction, x_fraction = root.fractions
    (y,) = truncate(party, y, fraction=min(y_fraction, y.fraction))
    factor = truncate_masked(party, masked, min(x_fraction, x.fraction))
    for step in range(root.steps):
        if step == 0:
            base, masked = mask_and_open(party, y, factor)
        else:
            (base,) = mask_and_open(party, y)
        following = newton_step(party, base, masked, root.power)
        last = step == root.steps - 1
        (y,) = truncate(party, following, fraction=fraction if last else y.fraction)
    return y


@protocol
def newton_step(party: Party, y: Masked, x: Masked, power: int) -> Shared:
    """Compute ((p + 1) y - x y^(p+1)) / p, which is nearer than y to x^(-1/p).

    With y = u + r and x = w + a, x y^d is the sum over j of C(d, j) u^(d-j) (w r^j + a r^j), for d = p + 1.

    1. Take shares of r^2 .. r^d and a r .. a r^d.
    2. Add up. Division by 2 adds a fraction bit.

    Rounds: 0. Online: 0. Offline: 8 (2 d - 1) N. Error: none. The result has d times the fraction bits of y, those of
    x, and one more for p = 2.
    """
    degree = power + 1
    dealt = list(party.randomness.correlated(Powers(y.mask, x.mask, degree)))
    powers = [party.only(0, torch.ones_like(y.opened)), y.share, *dealt[: degree - 1]]  # r^j
    mixed = [x.share, *dealt[degree - 1 :]]  # a r^j
    total, known = torch.zeros_like(y.opened), torch.ones_like(y.opened)
    for j in range(degree, -1, -1):
        total += math.comb(degree, j) * known * (x.opened * powers[j] + mixed[j])
        known = known * y.opened
    cubic = Shared(total, degree * y.fraction + x.fraction)
    linear = Shared(y.share + party.only(0, y.opened), y.fraction).scaled(degree)
    return (linear - cubic).times_power_of_two(-1 if power == 2 else 0)


@protocol
def unit_norm(party: Party, x: Shared, root: Root, inverse_fraction: int = 16, bits: int = 0) -> Shared:
    """Scale T vectors x [..., D] to length one.

    1. Mask and open x, modulo a 2^n that holds its squared norm and the result. Take its `product` with itself.
    2. Take the `inverse_root` of this squared norm.
    3. Mask and open it, and multiply with x.

    Rounds: 2 + those of the root. Online: (T D + T) n / 8 + the root's. Offline: (T + T D) n / 8 + the root's.
    Error: relative, that of the root and 2^-inverse_fraction over the inverse norm.

    Args:
        x: squared norms within the root's range.
        root: a `calibrate`d inverse square root.
        inverse_fraction: bits of inverse norms.
        bits: lower bound on n, if the result must be right modulo 2^bits.

    Returns:
        The vectors, with `inverse_fraction` more fraction bits than x, shared modulo 2^n.

    Raises:
        OutOfRange: x has too many fraction bits for the ring.
    """
    squared_norm_needs = 2 * x.fraction + math.log2(root.start.high)
    bits = max(bits, _width(x, squared_norm_needs, x.fraction + inverse_fraction + 1))
    (masked,) = mask_and_open(party, x, bits=bits)
    norm = inverse_root(party, product(party, masked, masked, "dot"), root, inverse_fraction)
    (inverse,) = mask_and_open(party, norm.view(lambda share: share[..., None]), bits=bits)
    return product(party, masked, inverse, "multiply")


@dataclass(frozen=True, eq=False)
class Norm:
    """Parameters of a LayerNorm over D entries; see `layer_norm`.

    Attributes:
        gain: gamma sqrt(D), masked modulo 2^64, [D].
        bias: beta, [D], with at most as many fraction bits as the product that it is added to.
        root: see `variance_root`.
        epsilon: added to variances.
        largest: log2 of a bound on the result's size.
        inverse_fraction: fraction bits of inverse norms.
    """

    gain: Masked
    bias: Shared
    root: Root
    epsilon: float = 1e-12
    largest: int = 5
    inverse_fraction: int = 18


def variance_root(width: int, low: float, high: float, error: float = 1e-3, steps: int = 1) -> Root:
    """Calibrate the inverse square root of a LayerNorm over `width` entries, for variances from low to high."""
    return calibrate(2, _scale(width) * low, _scale(width) * high, error, steps)


@protocol
def layer_norm(party: Party, x: Shared, norm: Norm, fraction: int, kept: int = WORD) -> Shared:
    """Compute gamma (x - mean) / sqrt(variance + epsilon) + beta over the last axis of x [..., D], T rows.

    The result does not depend on the scale of x. So the mean is removed exactly and without a division:
    c = (D x - sum x) / 2^k, where 2^k is D or the next power of two.

    1. Compute c. Mask and open it with `kept` fraction bits or fewer, modulo a 2^n that holds the sum of its squares
       and the result.
    2. Take this sum as the `product` of c with itself. Add epsilon, in its scale. Take the `inverse_root`.
    3. Mask and open the root. Take the `triple_product` with c and the gain, which was masked at set-up.
    4. Add beta, and truncate.

    Rounds: 3 + those of the root. Online: ((2 T D + T) n - T D s) / 8 + the root's, with the s bits that step 4 drops.
    Offline: (T + 4 T D) n / 8 + 16 T D + the root's.
    Error: relative, that of the root and 2^-inverse_fraction over the inverse norm, which is 2^k / (D sqrt(D
    variance)); 2^-kept in c; and 2^-fraction.

    Args:
        x: variances within the root's range.
        norm: its parameters.
        fraction: bits of the result.
        kept: fraction bits of c.

    Raises:
        OutOfRange: there are too many fraction bits for the ring.
    """
    width = x.shape[-1]
    centered = x.view(lambda share: width * share - share.sum(-1, keepdim=True))
    centered = centered.times_power_of_two(-_log_width(width))
    left = min(kept, centered.fraction)
    squares_need = 2 * left + math.log2(norm.root.start.high)
    bits = _width(x, squares_need, left + norm.inverse_fraction + norm.gain.fraction + norm.largest)
    (masked,) = mask_and_open(party, centered, bits=bits, fraction=left)
    squares = product(party, masked, masked, "dot")
    epsilon = party.public(_scale(width) * norm.epsilon, squares.fraction)
    inverse = inverse_root(party, squares + epsilon, norm.root, norm.inverse_fraction)
    (masked_inverse,) = mask_and_open(party, inverse.view(lambda share: share[..., None]), bits=bits)
    scaled = triple_product(party, masked, masked_inverse, norm.gain)
    return truncate(party, scaled + norm.bias, fraction=fraction, bits=bits)[0]


def _log_width(width: int) -> int:
    return math.ceil(math.log2(width))


def _scale(width: int) -> float:
    """Return the ratio of the sum of squares in `layer_norm` to the variance."""
    return width * (width / float(2 ** _log_width(width))) ** 2


def _width(x: Shared, *needs: float) -> int:
    """Return the bits that hold numbers of `needs` bits, a sign, and the spare bit of `truncate_masked`."""
    bits = math.floor(max(needs)) + 3
    if bits > x.bits:
        raise OutOfRange(f"x with {x.fraction} fraction bits needs {bits} bits of {x.bits}: take fewer")
    return bits
