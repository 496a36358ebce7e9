"""Fixed-point plan of a tower on shares: bits, roots and series that suit the ranges of its states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from sordino.mpc.errors import OutOfRange
from sordino.mpc.protocols.attention import LARGEST
from sordino.mpc.protocols.fourier import Series, gelu_series, least_period
from sordino.mpc.protocols.roots import Root, calibrate, variance_root
from sordino.mpc.tower.calibration import Calibration, LayerRanges, NormRanges, Range, Stored
from sordino.mpc.tower.tower import FEATURES, PrivateTower

ACTIVATION, WEIGHT, GAIN = 11, 15, 8  # fraction bits of hidden states, of weights, of gains times sqrt(E)
CENTERED, UNIT = 13, 12  # fraction bits of a norm's centered input, of queries and keys of unit norm
COSINE, ANGLE = 8, 12  # of attention's cosines: fraction bits, and bits of their arguments
GELU, BELOW = 14, 12  # of GeLU: fraction bits of its cosines, and bits of its argument below one
INVERSE = 11  # bits of inverse norms below the smallest of them
SQUARED_NORM = 16.0  # of queries and keys, in the middle of each head's range
ERROR, GELU_ERROR = 5e-4, 2e-4  # bounds: relative error of roots, error of GeLU's series
HARMONICS = (*range(5, 16), *range(16, 32, 2), 32, 36, 40)  # numbers of frequencies of GeLU's series, tried in turn
MEAN = 20  # fraction bits of 1 / T


@dataclass(frozen=True)
class NormPlan:
    """Plan of a LayerNorm.

    Attributes:
        root: of variances; see `variance_root`.
        exponent: the first token's rows are divided by 2^exponent.
        largest: log2 of a bound on the result's size.
        inverse_fraction: bits of inverse norms.
    """

    root: Root
    exponent: int
    largest: int
    inverse_fraction: int

    @classmethod
    def of(cls, ranges: NormRanges, width: int) -> NormPlan:
        """Make the plan for given ranges and rows of E entries."""
        middles = [math.log2(low) + math.log2(high) for low, high in (ranges.first, ranges.rest)]
        exponent = round((middles[0] - middles[1]) / 4)
        first = tuple(end * 4.0**-exponent for end in ranges.first)
        low, high = min(first[0], ranges.rest[0]), max(first[1], ranges.rest[1])
        root = _affordable(lambda steps: variance_root(width, low, high, ERROR, steps))
        return cls(root, exponent, _bits(ranges.size), inverse_fraction(root))


@dataclass(frozen=True)
class Units:
    """A group of a layer's inner units that share one series for GeLU.

    Attributes:
        count: number of units.
        series: for the widest range in the group.
    """

    count: int
    series: Series


@dataclass(frozen=True)
class LayerPlan:
    """Plan of a layer.

    Attributes:
        projected, out, inner, outer: bits of the factors of weights: of queries, keys and values, of the projection,
            and of both linear layers. GeLU's result is shared modulo 2^inner. It must be right modulo 2^outer after
            its last fraction bits are dropped.
        unit: root for queries and keys.
        weights: reciprocal of mean attention weights, for every length.
        gelu: groups of inner units, from the narrowest range to the widest.
        norm1, norm2: plans of the norms.
    """

    projected: int
    out: int
    inner: int
    outer: int
    unit: Root
    weights: Root
    gelu: tuple[Units, ...]
    norm1: NormPlan
    norm2: NormPlan


@dataclass(frozen=True)
class FixedPointPlan(Stored):
    """Settings in which both servers must agree to the last digit: series' coefficients, and bits.

    The model owner makes the plan once and sends it. Two plans made at two places may differ in a last digit. The plan
    tells the servers the tower's form, and ranges of its states on public sentences.

    Attributes:
        heads: H of a layer.
        epsilon: of the norms.
        norm: plan of the norm on embeddings.
        entering: allowed variances of embeddings, of first tokens and of others.
        layers: plans of the layers.
    """

    heads: int
    epsilon: float
    norm: NormPlan
    entering: tuple[Range, Range]
    layers: tuple[LayerPlan, ...]

    @classmethod
    def of(cls, tower: PrivateTower, calibration: Calibration) -> FixedPointPlan:
        """Make the plan for a tower and its ranges.

        Raises:
            OutOfRange: a range is too wide.
        """
        width = tower.norm[0].shape[0]
        layers = tuple(
            _layer_plan(ranges, layer[FEATURES].shape[-1], width)
            for ranges, layer in zip(calibration.layers, tower.layers, strict=True)
        )
        norm = calibration.norm
        return cls(tower.heads, tower.epsilon, NormPlan.of(norm, width), (norm.first, norm.rest), layers)


def _layer_plan(ranges: LayerRanges, features: int, width: int) -> LayerPlan:
    ratios = [math.sqrt(high / low) for low, high in (*ranges.query, *ranges.key)]
    smallest_norm, largest_norm = SQUARED_NORM / max(ratios), SQUARED_NORM * max(ratios)
    unit = _affordable(lambda steps: calibrate(2, smallest_norm, largest_norm, ERROR, steps))
    # The protocol's mean is over powers of two: at least half, for some lengths, of the mean over keys.
    filled = features / 2.0 ** math.ceil(math.log2(features))
    low, high = ranges.weights[0] * filled / 2, ranges.weights[1] * filled
    weights = _affordable(lambda steps: calibrate(1, low, high, ERROR, steps))
    for name, size in (("value", ranges.value), ("attended", ranges.attended)):
        if _bits(size) > LARGEST:
            raise OutOfRange(f"{name}: sizes up to {size[1]:g}, margin included, must be below {2**LARGEST}")
    largest_query = math.sqrt(largest_norm)
    highs = sorted(high for _, high in ranges.inner)
    gelu = tuple(Units(len(list(units)), _gelu(high)) for high, units in groupby(highs))
    fraction = max(2 * GELU, ACTIVATION + WEIGHT + 1)  # of GeLU's result, of which ACTIVATION are kept
    outer = ACTIVATION + WEIGHT + _bits(ranges.outer) + 2
    longest_period = max(units.series.period for units in gelu)
    return LayerPlan(
        projected=ACTIVATION + WEIGHT + max(_bits(ranges.value), _bits((0, largest_query))) + 2,
        out=ACTIVATION + WEIGHT + _bits(ranges.out) + 2,
        inner=max(outer + fraction - ACTIVATION, ACTIVATION + WEIGHT + 3 + longest_period),
        outer=outer,
        unit=unit,
        weights=weights,
        gelu=gelu,
        norm1=NormPlan.of(ranges.norm1, width),
        norm2=NormPlan.of(ranges.norm2, width),
    )


@lru_cache(maxsize=256)
def _gelu(high: float) -> Series:
    """Find the series of fewest frequencies for GeLU's arguments up to `high`.

    Raises:
        OutOfRange: it would need more than 40 frequencies.
    """
    least = least_period(high)
    period = max(4, math.ceil(math.log2(least)))
    eighths = min(15, math.floor(8 * 2**period / least))
    for count in HARMONICS:
        series = gelu_series(period, high, count, eighths)
        if series.error <= GELU_ERROR:
            return series
    raise OutOfRange(f"arguments of GeLU up to {high:g}, margin included: more than its series can serve")


def _affordable(make: Callable[[int], Root]) -> Root:
    """Make a root with as few steps of Newton's method as possible, since each takes two rounds."""
    for steps in range(2):
        try:
            return make(steps)
        except OutOfRange:
            continue
    return make(2)


def inverse_fraction(root: Root) -> int:
    """Return the fraction bits of inverse roots that give the smallest of them `INVERSE` bits."""
    return max(0, math.ceil(math.log2(root.start.high) / root.power)) + INVERSE


def _bits(size: Range) -> int:
    """Return log2 of the least power of two above all sizes; at least 0."""
    return max(0, math.floor(math.log2(size[1])) + 1)
