"""Reciprocals, inverse square roots, and what is made of them: unit vectors and LayerNorm. No comparisons.

Newton's method needs a start that is near wherever the argument lies in a stated range; a Fourier series, fitted to the
range in relative error, is one, and costs one opening. See `calibrate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from sordino.mpc.arithmetic.ring import WORD
from sordino.mpc.dealing.correlations import Powers
from sordino.mpc.dealing.costs import protocol
from sordino.mpc.errors import OutOfRange
from sordino.mpc.protocols.fourier import Series, angle_of, evaluate, fit
from sordino.mpc.protocols.linear import hide, lifted, product, triple_product, truncate
from sordino.mpc.protocols.party import Masked, Party, Shared

HARMONICS = (4, 6, 8, 12, 16, 24, 32)  # tried in turn
ROOM = 61  # bits that a value to be truncated may take


@dataclass(frozen=True)
class Root:
    """How x^(-1/power) is computed for x in a range.

    Attributes:
        power: 1 for reciprocals, 2 for inverse square roots.
        start: the series that is the first guess; its range is the root's.
        steps: of Newton's method after it.
        error: relative, at most, before the result is rounded.
    """

    power: int
    start: Series
    steps: int
    error: float

    @property
    def fractions(self) -> tuple[int, int]:
        """Fraction bits of y and of x in a step: the same bits s below the smallest y and x, as many as fit.

        The largest number there, (power + 1) y, has (power + 1) times the fraction bits of y and those of x.
        """
        low, high = math.log2(self.start.low), math.log2(self.start.high)
        largest = math.log2(self.power + 1) - low / self.power
        s = (ROOM - largest - (self.power + 1) * high / self.power + low) / (self.power + 2)
        return math.floor(s + high / self.power), math.floor(s - low)

    @property
    def precision(self) -> int:
        """Fraction bits of the start's cosines."""
        return _precision(self.power, self.start)


def calibrate(power: int, low: float, high: float, error: float = 1e-3, steps: int = 1) -> Root:
    """The cheapest start from which Newton's method reaches an error everywhere in a range.

    A relative error e becomes e^2 for reciprocals, and at most 3/2 e^2 + 1/2 e^3 for inverse square roots; the fixed
    point of x adds its own.

    Args:
        power: 1 or 2.
        low, high: the range; arguments outside give nonsense, without notice.
        error: relative, at most.
        steps: of Newton's method, two rounds each.

    Raises:
        OutOfRange: no start of up to 32 frequencies will do.
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
    """The relative error after so many steps, infinite where the start is too far."""
    rounding = math.sqrt(2) * (len(start.frequencies) + start.weight) * 2.0 ** -_precision(power, start)
    error = start.error + rounding * math.pow(start.high, 1 / power)
    for _ in range(steps):
        if error > 0.5:
            return math.inf
        error = error**2 if power == 1 else 1.5 * error**2 + 0.5 * error**3
    return error


def _precision(power: int, start: Series) -> int:
    """As many bits as the largest result leaves."""
    return min(24, (ROOM - 2 - math.ceil(-math.log2(start.low) / power)) // 2)


@protocol
def inverse_root(party: Party, x: Shared, root: Root, fraction: int) -> Shared:
    """x^(-1/p): reciprocals or inverse square roots.

    1. Hide x.
    2. `evaluate` the start on it; truncate it.
    3. `newton_step` and truncate, as often as the root says; x is lifted from step 1, and hidden again with the first
       y.

    Rounds: 2 + 2 steps. Online: N n / 8 + 8 N + 16 N steps + (8 N if there are any), for x modulo 2^n, less the bits
    that each truncation drops. Offline: 16 K N + 16 N for the start, 16 N for x if there are steps, 8 (2 p + 1) N +
    16 N a step; K frequencies.
    Error: that of the root, relative; and 2^-fraction.

    Args:
        x: within the root's range, shared modulo 2^n, and below 2^(n-2) as an integer.
        root: see `calibrate`.
        fraction: bits of the result.
    """
    (hidden,) = hide(party, x, bits=x.bits)
    y = evaluate(party, angle_of(hidden, root.start.period), root.start, root.precision)
    if not root.steps:
        return truncate(party, y, fraction=fraction)[0]
    y_fraction, x_fraction = root.fractions
    (y,) = truncate(party, y, fraction=min(y_fraction, y.fraction))
    factor = lifted(party, hidden, min(x_fraction, x.fraction))
    for step in range(root.steps):
        if step == 0:
            base, hidden = hide(party, y, factor)
        else:
            (base,) = hide(party, y)
        following = newton_step(party, base, hidden, root.power)
        last = step == root.steps - 1
        (y,) = truncate(party, following, fraction=fraction if last else y.fraction)
    return y


@protocol
def newton_step(party: Party, y: Masked, x: Masked, power: int) -> Shared:
    """((p + 1) y - x y^(p+1)) / p, nearer than y to x^(-1/p).

    With y = u + r and x = w + a, x y^d is the sum over j of C(d, j) u^(d-j) (w r^j + a r^j), for d = p + 1.

    1. Take shares of r^2 .. r^d and a r .. a r^d.
    2. Add up. Division by 2 is a fraction bit more.

    Rounds: 0. Online: 0. Offline: 8 (2 d - 1) N. Error: none; the result has d times the fraction bits of y and those
    of x, and one more for p = 2.
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
    return (linear - cubic).doubled(-1 if power == 2 else 0)


@protocol
def unit_norm(party: Party, x: Shared, root: Root, inverse_fraction: int = 16, bits: int = 0) -> Shared:
    """Vectors of length one, from x [..., D]; T vectors.

    1. Hide x, modulo 2^n that holds its squared norm and the result; the former is a `product` with itself.
    2. Take the `inverse_root` of that.
    3. Hide it, multiply with x.

    Rounds: 2 + those of the root. Online: (T D + T) n / 8 + the root's. Offline: (T + T D) n / 8 + the root's.
    Error: relative, that of the root and 2^-inverse_fraction over the inverse norm.

    Args:
        x: squared norms within the root's range.
        root: a `calibrate`d inverse square root.
        inverse_fraction: bits of inverse norms.
        bits: n at least, for what the result is to be right modulo.

    Returns:
        Them with so many more fraction bits than x, shared modulo 2^n: whoever hides them next keeps few.

    Raises:
        OutOfRange: x has too many fraction bits for the ring.
    """
    bits = max(bits, _width(x, 2 * x.fraction + math.log2(root.start.high), x.fraction + inverse_fraction + 1))
    (hidden,) = hide(party, x, bits=bits)
    norm = inverse_root(party, product(party, hidden, hidden, "dot"), root, inverse_fraction)
    (inverse,) = hide(party, norm.view(lambda share: share[..., None]), bits=bits)
    return product(party, hidden, inverse, "multiply")


@dataclass(frozen=True, eq=False)
class Norm:
    """What a LayerNorm over D entries holds; see `layer_norm`.

    Attributes:
        gain: gamma sqrt(D), hidden modulo 2^64, [D].
        bias: beta, [D], with as many fraction bits as that product, or fewer.
        root: see `variance_root`.
        epsilon: added to variances.
        largest: log2 of what the result may come to.
        inverse_fraction: bits of inverse norms.
    """

    gain: Masked
    bias: Shared
    root: Root
    epsilon: float = 1e-12
    largest: int = 5
    inverse_fraction: int = 18


def variance_root(width: int, low: float, high: float, error: float = 1e-3, steps: int = 1) -> Root:
    """The inverse square root that a LayerNorm over `width` entries needs, where variances are from low to high."""
    return calibrate(2, _scale(width) * low, _scale(width) * high, error, steps)


@protocol
def layer_norm(party: Party, x: Shared, norm: Norm, fraction: int, kept: int = WORD) -> Shared:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta over the last of the axes of x [..., D]; T rows.

    The result does not depend on the scale of x, so the mean is taken out exactly, without a division: c = (D x - sum
    x) / 2^k, where 2^k is D or the next power of two.

    1. Compute c, and hide it with `kept` fraction bits or fewer, modulo 2^n that holds the sum of its squares and the
       result.
    2. That sum is a `product` of c with itself. Add epsilon, in that scale; take the `inverse_root`.
    3. Hide this, and take the `triple_product` with c and the gain, which was hidden at set-up.
    4. Add beta; truncate.

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
    centered = x.view(lambda share: width * share - share.sum(-1, keepdim=True)).doubled(-_log_width(width))
    left = min(kept, centered.fraction)
    squares_need = 2 * left + math.log2(norm.root.start.high)
    bits = _width(x, squares_need, left + norm.inverse_fraction + norm.gain.fraction + norm.largest)
    (hidden,) = hide(party, centered, bits=bits, fraction=left)
    squares = product(party, hidden, hidden, "dot")
    epsilon = party.public(_scale(width) * norm.epsilon, squares.fraction)
    inverse = inverse_root(party, squares + epsilon, norm.root, norm.inverse_fraction)
    (hidden_inverse,) = hide(party, inverse.view(lambda share: share[..., None]), bits=bits)
    scaled = triple_product(party, hidden, hidden_inverse, norm.gain)
    return truncate(party, scaled + norm.bias, fraction=fraction, bits=bits)[0]


def _log_width(width: int) -> int:
    return math.ceil(math.log2(width))


def _scale(width: int) -> float:
    """What the sum of squares of `layer_norm` is, over the variance."""
    return width * (width / float(2 ** _log_width(width))) ** 2


def _width(x: Shared, *needs: float) -> int:
    """Bits that hold numbers of these many, a sign, and the bit to spare that `lifted` needs."""
    bits = math.floor(max(needs)) + 3
    if bits > x.bits:
        raise OutOfRange(f"x with {x.fraction} fraction bits needs {bits} bits of {x.bits}: take fewer")
    return bits
