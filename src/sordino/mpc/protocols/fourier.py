"""Cosine and sine, and any Fourier series of the same argument, from one opening of a few low bits.

Luo et al., SecP-Tuning, ICLR 2026 (arXiv 2506.15307). With a period that is a power of two in the ring, wrap-around is
harmless. The parties open u = x - r modulo the period. Then cos(k x) = cos(k u) cos(k r) - sin(k u) sin(k r) is linear
in the dealt cos(k r) and sin(k r), for all k at once.

Both parties must multiply their shares by the same integers. They compute them from u by tables of integers, of which
no entry is so close to a half that two machines could round it differently, and from coefficients that the parties
agreed on.
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
from sordino.mpc.protocols.trigonometry import TABLE, rounded, tables, tabulated_rotations, turns_of

COEFFICIENT = 22  # fraction bits of a series' coefficients
DEALT = 2**24  # arguments times frequencies of one correlation, at most: about 200 MB dealt
HEAVIEST = 2**13  # bound on the sum of a series' coefficients' sizes: products with public cosines then fit 62 bits

Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Series:
    """constant + sum_k cosine_k cos(k t) + sine_k sin(k t), where t = 2 pi y / 2^period and y = x eighths / 8.

    Attributes:
        period: log2 of the period in y.
        frequencies: k, from 1.
        cosine, sine: coefficients times 2^22, integers.
        constant: likewise.
        low, high: the range in which the series approximates the function.
        error: bound on the series' own error between low and high; relative if it was fitted so.
        eighths: from 8 to 15. A period that fits the range needs the fewest frequencies. Only `gelu` takes series
            with another value than 8.

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
        """Evaluate the series in the clear, at numbers of any shape."""
        frequencies = np.array(self.frequencies)
        angle = self.eighths / 8 * 2 * np.pi * np.asarray(x)[..., None] * frequencies / 2.0**self.period
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
    """Fit a series to a function between two numbers, by least squares at Chebyshev nodes.

    The rest of the period is left free. So the series converges fast although the function is not periodic (a Fourier
    extension: Huybrechs, SIAM Journal on Numerical Analysis 47(6), 2010).

    Args:
        function: of arrays.
        low, high: the range, shorter than a period.
        period: see `Series`.
        frequencies: from 1.
        parity: "even" for cosines and a constant, "odd" for sines, "both".
        relative: weigh errors by 1 / |function|.
        eighths: see `Series`.

    Raises:
        OutOfRange: the coefficients are too large.
    """
    ks = np.array(frequencies)
    evens, odds = (len(ks) if parity != "odd" else 0), (len(ks) if parity != "even" else 0)

    def design(x: np.ndarray) -> np.ndarray:
        angle = eighths / 8 * 2 * np.pi * x[:, None] * ks / 2.0**period
        constants = np.ones((len(x), 1 if evens else 0))
        return np.hstack([constants, np.cos(angle[:, :evens]), np.sin(angle[:, :odds])])

    nodes = np.cos(np.pi * (np.arange(40 * len(ks) + 400) + 0.5) / (40 * len(ks) + 400))
    x = (low + high) / 2 + (high - low) / 2 * nodes
    weights = 1 / np.abs(function(x)) if relative else np.ones_like(x)
    # Small singular values belong to functions that are large only outside the range. Left in, they would make huge
    # coefficients.
    solution = np.linalg.lstsq(design(x) * weights[:, None], function(x) * weights, rcond=1e-6)[0]
    whole = [round(float(value) * 2**COEFFICIENT) for value in solution]
    constant, rest = (whole[0], whole[1:]) if evens else (0, whole)
    cosine, sine = rest[:evens] or [0] * len(ks), rest[evens:] or [0] * len(ks)
    frequencies = tuple(map(int, ks))
    series = Series(period, frequencies, tuple(cosine), tuple(sine), constant, low, high, math.nan, eighths)
    x = np.linspace(low, high, 20001)
    error = np.abs(series(x) - function(x)) / (np.abs(function(x)) if relative else 1)
    return replace(series, error=float(error.max()))


@dataclass(frozen=True, eq=False)
class Angle:
    """An argument x of which both parties know x - r modulo its period, and neither knows r.

    Attributes:
        opened: x - r, from 0 to 2^bits - 1, int64 [...].
        bits: log2 of the period in the ring.
        mask: r.
    """

    opened: Tensor
    bits: int
    mask: Mask


@protocol
def open_angle(
    party: Party,
    *values: Shared,
    period: int | Sequence[int],
    resolution: int | Sequence[int],
    eighths: int | Sequence[int] = 8,
) -> list[Angle]:
    """Open arguments of cosines under masks, modulo their period.

    1. Take the share modulo the period, and keep only its highest `resolution` bits. One party rounds down, the other
       up. Wrap-around adds whole periods.
    2. Take a mask r, uniform modulo 2^resolution.
    3. Exchange shares of x - r, and add.

    Rounds: 1, for all values together. Online: N resolution / 8. Offline: 0. Error: below 2^(period - resolution)
    in x, none if no bits are dropped.

    Args:
        values: any shapes and sizes. The other arguments are one for all, or one each.
        period: log2 of the period.
        resolution: bits that are opened; all bits of the period in the ring, if these are fewer.
        eighths: the argument is the value times eighths / 8, which costs nothing.

    Raises:
        OutOfRange: shares are right modulo less than the period.
    """
    masks, masked = [], []
    settings = (for_each(setting, len(values)) for setting in (period, resolution, eighths))
    for value, log, most, eighth in zip(values, *settings, strict=True):
        times, more = (eighth, 3) if eighth != 8 else (1, 0)  # the division by 8 is three more fraction bits
        length = value.fraction + more + log
        if not 1 <= length <= value.bits:
            raise OutOfRange(f"a period of 2^{length} in a value shared modulo 2^{value.bits}: must divide it")
        width = min(length, most)
        mask, share = party.randomness.mask(value.shape, width)
        masks.append(mask)
        rounds_up = party.number == 1
        masked.append(MaskedShare(value.share.contiguous(), share, width, times, length - width, rounds_up))
    opened = party.open(masked)
    return [Angle(angle, share.bits, mask) for angle, share, mask in zip(opened, masked, masks, strict=True)]


def angle_of(value: Masked, period: int) -> Angle:
    """Return the angle of a value that is masked already. Costs nothing.

    Raises:
        OutOfRange: the value is masked modulo less than the period.
    """
    length = value.fraction + period
    if not 1 <= length <= value.bits:
        raise OutOfRange(f"a period of 2^{length} in a value masked modulo 2^{value.bits}: must divide it")
    return Angle(lowest(value.opened, length), length, value.mask)


@protocol
def cosine_and_sine(
    party: Party, *values: Shared, period: int = 0, resolution: int = 16, precision: int = 14, bits: int = WORD
) -> list[tuple[Shared, Shared]]:
    """Compute cos t and sin t of each value, where t = 2 pi x / 2^period.

    1. `open_angle`.
    2. Take shares of cos r and sin r with `precision` fraction bits.
    3. Compute cos u [cos r] - sin u [sin r] and sin u [cos r] + cos u [sin r], with cos u and sin u rounded to
       `precision` bits.

    Rounds: 1. Online: N resolution / 8. Offline: 2 N bits / 8. Error: at most 2 pi 2^-resolution + sqrt(2)
    2^-precision, for a resolution up to 26 and a precision up to 20, as opened angles are cut to 26 bits.

    Returns:
        Pairs of values with 2 precision fraction bits, shared modulo 2^bits.
    """
    results = []
    for angle in open_angle(party, *values, period=period, resolution=resolution):
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
    """Evaluate a Fourier series of K frequencies at opened angles.

    1. Take shares of cos(k r) and sin(k r), for all k. If there are many angles, a few k are taken at a time.
    2. Sum (a_k cos k u + b_k sin k u) [cos k r] + (b_k cos k u - a_k sin k u) [sin k r] over k, with public factors
       rounded to `precision` bits. Party 0 adds the constant.

    Rounds: 0. Online: 0. Offline: 2 K N bits / 8. Error, in addition to the series' own: at most
    sqrt(2) (K + weight) 2^-precision.

    Args:
        angle: of `open_angle` or `angle_of`.
        series: see `Series`.
        precision: fraction bits of both factors.
        bits: of the result.
        plus: a summand, if any. The result has its fraction bits, or 2 precision if these are more.
    """
    opened = angle.opened.reshape(-1)
    fraction = max(2 * precision, plus.fraction if plus else 0)
    start = plus.at(fraction) if plus else Shared(torch.zeros_like(opened), fraction)
    bits, total = min(bits, start.bits), start.share.reshape(-1)
    constant = 0
    if party.number == 0:
        constant = int(rounded(torch.tensor(series.constant), COEFFICIENT - 2 * precision))
    for piece in _pieces(len(series.frequencies), len(opened)):
        frequencies = series.frequencies[piece]
        dealt = party.randomness.correlated(Harmonics(angle.mask, angle.bits, frequencies, precision, bits))
        factors = dealt.view(len(opened), 2 * len(frequencies)).numpy()
        table, rows = _factors(opened, angle.bits, series, piece, precision)
        shift, addend = fraction - 2 * precision, 0 if piece.start else constant
        kernels.add_products(table.numpy(), rows.numpy(), factors, addend, shift, low_bits(bits), total.numpy())
    return Shared(total.view(angle.opened.shape), fraction, bits)


def _pieces(frequencies: int, arguments: int) -> list[slice]:
    """Split frequencies into the fewest pieces of about one size that keep every dealt tensor small."""
    count = math.ceil(frequencies * arguments / DEALT)
    size = math.ceil(frequencies / max(1, count))
    return [slice(start, min(start + size, frequencies)) for start in range(0, frequencies, size)]


def least_period(high: float) -> float:
    """Return the least period of a series for GeLU up to `high`. It leaves 4 free on either side, which is enough."""
    return 2 * (high + 4)


@lru_cache(maxsize=8)
def gelu_series(period: int = 5, high: float = 11.5, harmonics: int = 10, eighths: int = 8) -> Series:
    """Fit x erf(x / sqrt 2) / 2 for |x| up to `high`. GeLU is this even function plus x / 2.

    The function is close to |x| / 2, a triangle wave, so odd frequencies are enough. By default: period 32, frequencies
    1, 3 .. 19, error below 6e-5 for |x| up to 11.5. A period of 16 with 6 harmonics: 2e-5 up to 4, 2e-3 up to 5.
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
    """Compute GeLU, x / 2 + x erf(x / sqrt 2) / 2, without a multiplication. The second term is a series.

    1. `open_angle` x times the series' eighths / 8.
    2. `evaluate` the series and x / 2, a share with one fraction bit more.

    Rounds: 1, for all values together. Online: N (period + below) / 8. Offline: 2 K N bits / 8, K = 10. Error: that of
    the series, 6e-5 for |x| up to 11.5; 0.6 2^-below = 7e-5 for the argument; and at most sqrt(2) (K + 8)
    2^-precision, 4 times less in the mean. Beyond the series' range the result is wrong without notice. Choose a larger
    period there.

    Args:
        values: shared modulo their series' periods or more.
        series: one for each value; by default `gelu_series()`.
        below: bits of the argument below one.
        precision, bits: see `evaluate`. bits must hold the result with max(2 precision, x.fraction + 1) fraction bits.
    """
    chosen = series or [gelu_series()] * len(values)
    angles = open_angle(
        party,
        *values,
        period=[chosen_series.period for chosen_series in chosen],
        resolution=[chosen_series.period + below for chosen_series in chosen],
        eighths=[chosen_series.eighths for chosen_series in chosen],
    )
    return [
        evaluate(party, angle, chosen_series, precision, bits, plus=value.times_power_of_two(-1))
        for value, angle, chosen_series in zip(values, angles, chosen, strict=True)
    ]


def public_factors(opened: Tensor, bits: int, series: Series, piece: slice, precision: int) -> Tensor:
    """Compute a cos k u + b sin k u for a piece of a series' frequencies k, then b cos k u - a sin k u: [N, 2 K].

    The factors have `precision` fraction bits. u [N] is modulo 2^bits.
    """
    turns, frequencies = turns_of(opened, bits), np.array(series.frequencies[piece])
    coefficients = np.array([series.cosine[piece], series.sine[piece]])
    cut = TABLE + COEFFICIENT - precision
    factors = torch.empty(len(turns), 2 * len(frequencies), dtype=torch.int64)
    kernels.harmonics(turns.numpy(), frequencies, coefficients, *tables(), cut, factors.numpy())
    return factors


def _factors(opened: Tensor, bits: int, series: Series, piece: slice, precision: int) -> tuple[Tensor, Tensor]:
    """Return `public_factors` as a table and rows of it: of a whole period, or of these angles alone."""
    if worth_a_table(len(opened), bits):
        return _all_factors(series, piece.start, piece.stop, precision, bits), opened
    return public_factors(opened, bits, series, piece, precision), torch.arange(len(opened))


@lru_cache(maxsize=64)
def _all_factors(series: Series, start: int, stop: int, precision: int, bits: int) -> Tensor:
    piece = slice(start, stop)
    parts = torch.arange(2**bits).split(CHUNK)
    return torch.cat([narrow(public_factors(part, bits, series, piece, precision)) for part in parts])
