"""Cosine and sine, and any Fourier series of the same argument, from one opening of a few low bits.

Luo et al., SecP-Tuning, ICLR 2026 (arXiv 2506.15307): with a period that is a power of two in the ring, wrap-around is
harmless. The parties open u = x - r modulo the period, and cos(k x) = cos(k u) cos(k r) - sin(k u) sin(k r) is linear
in the dealt cos(k r) and sin(k r), for all k at once.

Both parties must multiply their shares by the same integers: what they compute from u is taken from tables of integers,
whose entries are never so close to a half that two machines could round them differently, and from coefficients that
are part of what the parties agreed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from scipy.special import erf
from torch import Tensor

from sordino.mpc.arithmetic import kernels
from sordino.mpc.arithmetic.packing import MaskedShare
from sordino.mpc.arithmetic.ring import CHUNK, WORD, for_each, low_bits, lowest, narrow, worth_a_table
from sordino.mpc.dealing.correlations import Harmonics, Mask
from sordino.mpc.dealing.costs import protocol
from sordino.mpc.errors import OutOfRange
from sordino.mpc.protocols.party import Masked, Party, Shared
from sordino.mpc.protocols.waves import TABLE, rounded, tables, tabulated_rotations, turns_of

COEFFICIENT = 22  # fraction bits of a series' coefficients
DEALT = 2**24  # arguments times frequencies of one correlation, at most: about 200 MB dealt
HEAVIEST = 2**13  # sum of a series' coefficients' sizes, so that their products with public cosines fit 62 bits

Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Series:
    """constant + sum_k cosine_k cos(k t) + sine_k sin(k t), where t = 2 pi y / 2^period and y = x eighths / 8.

    Attributes:
        period: log2 of the period in y.
        frequencies: k, from 1.
        cosine, sine: coefficients times 2^22, integers.
        constant: likewise.
        low, high: where it approximates the function.
        error: at most, between low and high, of the series itself; relative if it was fitted so.
        eighths: from 8 to 15, since a period that fits the range needs the fewest frequencies. Only `gelu` takes
            other series than those of 8.

    Raises:
        OutOfRange: the coefficients' sizes add up to 2^13 or more.
    """

    period: int
    frequencies: tuple[int, ...]
    cosine: tuple[int, ...]
    sine: tuple[int, ...]
    constant: int
    low: float
    high: float
    error: float
    eighths: int = 8

    def __post_init__(self) -> None:
        if self.weight >= HEAVIEST:
            raise OutOfRange(
                f"coefficients of {self.weight:g} in all, above {HEAVIEST}: take fewer, or a longer period"
            )

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Its value at numbers of any shape."""
        angle = self.eighths / 8 * 2 * np.pi * np.asarray(x)[..., None] * np.array(self.frequencies) / 2.0**self.period
        terms = np.cos(angle) @ np.array(self.cosine) + np.sin(angle) @ np.array(self.sine)
        return np.asarray((self.constant + terms) / 2.0**COEFFICIENT)

    @property
    def weight(self) -> float:
        """The sum of its coefficients' sizes."""
        return float(np.abs([*self.cosine, *self.sine]).sum() / 2.0**COEFFICIENT)


def fit(
    function: Function,
    low: float,
    high: float,
    period: int,
    frequencies: Sequence[int],
    parity: str = "both",
    relative: bool = False,
    eighths: int = 8,
) -> Series:
    """The series nearest to a function between two numbers, by least squares at Chebyshev's nodes.

    Outside, where a period has room to spare, the series is free, and so converges fast although the function is not
    periodic (a Fourier extension: Huybrechs, SIAM Journal on Numerical Analysis 47(6), 2010).

    Args:
        function: of arrays.
        low, high: less than a period apart.
        period: see `Series`.
        frequencies: from 1.
        parity: "even" for cosines and a constant, "odd" for sines, "both".
        relative: weigh errors by 1 / |function|.
        eighths: see `Series`.

    Raises:
        OutOfRange: its coefficients are too large.
    """
    ks = np.array(frequencies)
    evens, odds = (len(ks) if parity != "odd" else 0), (len(ks) if parity != "even" else 0)

    def design(x: np.ndarray) -> np.ndarray:
        angle = eighths / 8 * 2 * np.pi * x[:, None] * ks / 2.0**period
        return np.hstack([np.ones((len(x), 1 if evens else 0)), np.cos(angle[:, :evens]), np.sin(angle[:, :odds])])

    nodes = np.cos(np.pi * (np.arange(40 * len(ks) + 400) + 0.5) / (40 * len(ks) + 400))
    x = (low + high) / 2 + (high - low) / 2 * nodes
    weights = 1 / np.abs(function(x)) if relative else np.ones_like(x)
    # Small singular values belong to functions that are large only outside: left in, they make huge coefficients.
    solution = np.linalg.lstsq(design(x) * weights[:, None], function(x) * weights, rcond=1e-6)[0]
    whole = [round(float(value) * 2**COEFFICIENT) for value in solution]
    constant, rest = (whole[0], whole[1:]) if evens else (0, whole)
    cosine, sine = rest[:evens] or [0] * len(ks), rest[evens:] or [0] * len(ks)
    series = Series(period, tuple(map(int, ks)), tuple(cosine), tuple(sine), constant, low, high, math.nan, eighths)
    x = np.linspace(low, high, 20001)
    error = np.abs(series(x) - function(x)) / (np.abs(function(x)) if relative else 1)
    return replace(series, error=float(error.max()))


@dataclass(frozen=True, eq=False)
class Angle:
    """An argument of which x - r is known modulo its period, and r to neither party.

    Attributes:
        opened: x - r, from 0 to 2^bits - 1, int64 [...].
        bits: log2 of the period in the ring.
        mask: r.
    """

    opened: Tensor
    bits: int
    mask: Mask


@protocol
def turn(
    party: Party,
    *values: Shared,
    period: int | Sequence[int],
    resolution: int | Sequence[int],
    eighths: int | Sequence[int] = 8,
) -> list[Angle]:
    """Arguments of cosines, opened under a mask modulo their period.

    1. Take the share modulo the period, and drop all but its highest `resolution` bits: one party rounds down, the
       other up. Wrap-around is whole periods.
    2. Take a mask r, uniform modulo 2^resolution.
    3. Exchange shares of x - r, and add.

    Rounds: 1, for all values together. Online: N resolution / 8. Offline: 0. Error: below 2^(period - resolution)
    in x, none if there are no bits to drop.

    Args:
        values: any shapes and sizes; what follows is for all, or one each.
        period: log2 of the period.
        resolution: bits, at most; as many as the period has in the ring if these are fewer.
        eighths: the argument is the value times these / 8, which costs nothing.

    Raises:
        OutOfRange: shares are right modulo less than the period.
    """
    masks, masked_shares = [], []
    given = (for_each(each, len(values)) for each in (period, resolution, eighths))
    for value, log, most, part in zip(values, *given, strict=True):
        times, more = (part, 3) if part != 8 else (1, 0)
        length = value.fraction + more + log
        if not 1 <= length <= value.bits:
            raise OutOfRange(f"a period of 2^{length} in a value shared modulo 2^{value.bits}: must divide it")
        width = min(length, most)
        mask, own = party.randomness.mask(value.shape, width)
        masks.append(mask)
        masked_shares.append(
            MaskedShare(value.share.contiguous(), own, width, times, length - width, party.number == 1)
        )
    return [
        Angle(opened, own.bits, mask)
        for opened, own, mask in zip(party.open(masked_shares), masked_shares, masks, strict=True)
    ]


def angle_of(value: Masked, period: int) -> Angle:
    """The argument of cosines of a value that is hidden anyway; costs nothing.

    Raises:
        OutOfRange: it is hidden modulo less than the period.
    """
    length = value.fraction + period
    if not 1 <= length <= value.bits:
        raise OutOfRange(f"a period of 2^{length} in a value hidden modulo 2^{value.bits}: must divide it")
    return Angle(lowest(value.opened, length), length, value.mask)


@protocol
def cosine_and_sine(
    party: Party, *values: Shared, period: int = 0, resolution: int = 16, precision: int = 14, bits: int = WORD
) -> list[tuple[Shared, Shared]]:
    """cos t and sin t, t = 2 pi x / 2^period, of each value.

    1. `turn`.
    2. Take shares of cos r and sin r with `precision` fraction bits.
    3. Compute cos u [cos r] - sin u [sin r] and sin u [cos r] + cos u [sin r], with cos u and sin u rounded to
       `precision` bits.

    Rounds: 1. Online: N resolution / 8. Offline: 2 N bits / 8. Error: at most 2 pi 2^-resolution + sqrt(2)
    2^-precision, for a resolution up to 26 and a precision up to 20: opened angles are cut to 26 bits.

    Returns:
        Pairs of values with 2 precision fraction bits, shared modulo 2^bits.
    """
    results = []
    for angle in turn(party, *values, period=period, resolution=resolution):
        dealt = party.randomness.correlated(Harmonics(angle.mask, angle.bits, (1,), precision, bits)).view(-1, 2)
        opened = angle.opened.reshape(-1)
        pair = [torch.empty(angle.opened.shape, dtype=torch.int64) for _ in range(2)]
        table, rows = tabulated_rotations(opened, angle.bits, precision)
        kernels.rotate(table.numpy(), rows.numpy(), dealt.numpy(), *(part.view(-1).numpy() for part in pair))
        results.append((Shared(pair[0], 2 * precision, bits), Shared(pair[1], 2 * precision, bits)))
    return results


@protocol
def evaluate(
    party: Party, angle: Angle, series: Series, precision: int = 14, bits: int = WORD, plus: Shared | None = None
) -> Shared:
    """A Fourier series of an opened argument, of K frequencies.

    1. Take shares of cos(k r) and sin(k r), for all k, of a few k at a time where there are many arguments.
    2. Compute the sum over k of (a_k cos k u + b_k sin k u) [cos k r] + (b_k cos k u - a_k sin k u) [sin k r], whose
       public factors are rounded to `precision` bits; party 0 adds the constant.

    Rounds: 0. Online: 0. Offline: 2 K N bits / 8. Error, beside the series' own: at most sqrt(2) (K + weight)
    2^-precision.

    Args:
        angle: of `turn` or `angle_of`.
        series: see `Series`.
        precision: fraction bits of both factors.
        bits: of the result.
        plus: what is added to it, if anything; the result has its fraction bits, or 2 precision if these are more.
    """
    opened = angle.opened.reshape(-1)
    fraction = max(2 * precision, plus.fraction if plus else 0)
    start = plus.at(fraction) if plus else Shared(torch.zeros_like(opened), fraction)
    bits, total = min(bits, start.bits), start.share.reshape(-1)
    constant = int(rounded(torch.tensor(series.constant), COEFFICIENT - 2 * precision)) if party.number == 0 else 0
    for some in _pieces(len(series.frequencies), len(opened)):
        frequencies = series.frequencies[some]
        dealt = party.randomness.correlated(Harmonics(angle.mask, angle.bits, frequencies, precision, bits))
        factors = dealt.view(len(opened), 2 * len(frequencies)).numpy()
        table, rows = _factors(opened, angle.bits, series, some, precision)
        up, own = fraction - 2 * precision, 0 if some.start else constant
        kernels.add_products(table.numpy(), rows.numpy(), factors, own, up, low_bits(bits), total.numpy())
    return Shared(total.view(angle.opened.shape), fraction, bits)


def _pieces(frequencies: int, arguments: int) -> list[slice]:
    """Frequencies in as few pieces of about one size as keep each dealt tensor small."""
    count = math.ceil(frequencies * arguments / DEALT)
    size = math.ceil(frequencies / max(1, count))
    return [slice(start, min(start + size, frequencies)) for start in range(0, frequencies, size)]


def least_period(high: float) -> float:
    """That of a series for GeLU's arguments up to `high`: free beyond these, where 4 on either side are enough."""
    return 2 * (high + 4)


@lru_cache(maxsize=8)
def gelu_series(period: int = 5, high: float = 11.5, harmonics: int = 10, eighths: int = 8) -> Series:
    """x erf(x / sqrt 2) / 2 for |x| up to `high`: the even part of GeLU, which is x / 2 more.

    The function is close to |x| / 2, a triangle wave, so odd frequencies do. As it stands: period 32, frequencies 1,
    3 .. 19, error below 6e-5 for |x| up to 11.5. A period of 16, 6 harmonics: 2e-5 up to 4, 2e-3 up to 5.
    """
    frequencies = range(1, 2 * harmonics, 2)
    return fit(lambda x: x * erf(x / math.sqrt(2)) / 2, -high, high, period, frequencies, "even", eighths=eighths)


@protocol
def gelu(
    party: Party,
    *values: Shared,
    series: Sequence[Series] | None = None,
    below: int = 13,
    precision: int = 14,
    bits: int = WORD,
) -> list[Shared]:
    """GeLU, x / 2 + x erf(x / sqrt 2) / 2, without a multiplication: the second term is even, and a series by itself.

    1. `turn` x times the series' eighths / 8.
    2. `evaluate` the series and x / 2, a share with one fraction bit more.

    Rounds: 1, for all values together. Online: N (period + below) / 8. Offline: 2 K N bits / 8, K = 10. Error: that of
    the series, 6e-5 for |x| up to 11.5; and 0.6 2^-below = 7e-5 for the argument; and at most sqrt(2) (K + 8)
    2^-precision, 4 times less in the mean. Beyond the series' range it is wrong without notice: choose a larger period
    there.

    Args:
        values: shared modulo their series' periods or more.
        series: of each; see `gelu_series`, which is the default.
        below: bits of the argument below one.
        precision, bits: see `evaluate`; bits must hold the result with max(2 precision, x.fraction + 1) fraction bits.
    """
    chosen = series or [gelu_series()] * len(values)
    periods, eighths = [each.period for each in chosen], [each.eighths for each in chosen]
    angles = turn(party, *values, period=periods, resolution=[each + below for each in periods], eighths=eighths)
    return [
        evaluate(party, angle, each, precision, bits, value.doubled(-1))
        for value, angle, each in zip(values, angles, chosen, strict=True)
    ]


def public_factors(opened: Tensor, bits: int, series: Series, some: slice, precision: int) -> Tensor:
    """a cos k u + b sin k u for some of a series' frequencies k, then b cos k u - a sin k u: [N, 2 K].

    They have `precision` fraction bits; u [N] is modulo 2^bits.
    """
    turns, frequencies = turns_of(opened, bits), np.array(series.frequencies[some])
    coefficients, cut = np.array([series.cosine[some], series.sine[some]]), TABLE + COEFFICIENT - precision
    factors = torch.empty(len(turns), 2 * len(frequencies), dtype=torch.int64)
    kernels.harmonics(turns.numpy(), frequencies, coefficients, *tables(), cut, factors.numpy())
    return factors


def _factors(opened: Tensor, bits: int, series: Series, some: slice, precision: int) -> tuple[Tensor, Tensor]:
    """`public_factors` of angles, as a table and rows of it: of a whole period, or of these angles alone."""
    if worth_a_table(len(opened), bits):
        return _all_factors(series, some.start, some.stop, precision, bits), opened
    return public_factors(opened, bits, series, some, precision), torch.arange(len(opened))


@lru_cache(maxsize=64)
def _all_factors(series: Series, start: int, stop: int, precision: int, bits: int) -> Tensor:
    some = slice(start, stop)
    parts = torch.arange(2**bits).split(CHUNK)
    return torch.cat([narrow(public_factors(part, bits, series, some, precision)) for part in parts])
