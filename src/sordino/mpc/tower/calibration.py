"""Ranges of a tower's states. Protocols without comparison must know them beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import combinations, pairwise
from typing import Any, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sordino.mpc.errors import MpcError, OutOfRange
from sordino.mpc.protocols.fourier import least_period
from sordino.mpc.tower.tower import PrivateTower

Range = tuple[float, float]  # smallest and largest
GROUPS = 4  # most groups of inner units
T = TypeVar("T")


class Stored:
    """A dataclass that is stored and sent as JSON."""

    def to_json(self) -> str:
        """Return the JSON text."""
        return TypeAdapter(type(self)).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Invert `to_json`.

        Raises:
            MpcError: the text is malformed.
        """
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise MpcError(f"not a {cls.__name__}: {error}") from None


@dataclass(frozen=True)
class NormRanges:
    """Ranges of a LayerNorm's input and result.

    Attributes:
        first: variances of the first token's rows.
        rest: variances of the other rows.
        size: sizes of the result.
    """

    first: Range
    rest: Range
    size: Range


@dataclass(frozen=True)
class LayerRanges:
    """Ranges within a layer. Sizes are absolute values.

    Attributes:
        query, key: squared norms, for each head.
        weights: attention weights: the mean over a sentence's keys, for each query.
        value: sizes of values.
        attended: sizes of attention's results.
        out: sizes of their projection.
        norm1: of the norm after attention.
        inner: sizes of GeLU's arguments, for each unit. Units share ranges in groups, so few of these differ.
        outer: sizes of the second linear layer's results.
        norm2: of the norm after the second linear layer.
    """

    query: tuple[Range, ...]
    key: tuple[Range, ...]
    weights: Range
    value: Range
    attended: Range
    out: Range
    norm1: NormRanges
    inner: tuple[Range, ...]
    outer: Range
    norm2: NormRanges


@dataclass(frozen=True)
class Calibration(Stored):
    """Ranges that the protocols need, measured by running a tower in the clear on public sentences.

    Attributes:
        norm: of the norm on embeddings.
        layers: of each layer.
        margin: factor by which every range was widened, at both ends. It applies to squared norms and variances
            themselves, so vectors have a margin of its square root.
    """

    norm: NormRanges
    layers: tuple[LayerRanges, ...]
    margin: float

    @classmethod
    def measure(
        cls, tower: PrivateTower, sentences: Iterable[tuple[Tensor, Tensor]], margin: float = 1.5
    ) -> Calibration:
        """Run a tower on sentences of two tokens or more, and measure its ranges.

        Args:
            tower: in the clear.
            sentences: batches of embeddings [B, T, E], of tokens with their positions, and mask [B, T]. They should
                resemble later sentences: all lengths, and soft prompts if prompts will be tuned. Soft prompts widen
                some variances in MiniLM's tower 24 times.
            margin: a factor of at least 1.

        Raises:
            MpcError: no sentence has two tokens.
            OutOfRange: attention weights of a query add up to zero or less, so that no reciprocal can be taken.
        """
        measured = [_measured(tower, *batch) for batch in sentences]
        if not measured or not math.isfinite(_joined(measured).norm.rest[0]):
            raise MpcError("no sentence of two tokens to calibrate with: give some")
        joined = _joined(measured)
        for number, layer in enumerate(joined.layers):
            if layer.weights[0] <= 0:
                raise OutOfRange(f"mean attention weights of layer {number} go down to {layer.weights[0]:g}; train it")
        wide = _widened(joined, margin)
        return replace(wide, layers=tuple(_levelled(layer) for layer in wide.layers))

    def outside(self, tower: PrivateTower, sentences: Iterable[tuple[Tensor, Tensor]]) -> list[str]:
        """Return the names of ranges that sentences leave, such as `layers.0.norm1.rest`; an empty list if none.

        See `measure` for the arguments. Only a holder of the tower can check this. On shares nothing can be checked.
        """
        measured = _flat(_joined([_measured(tower, *batch) for batch in sentences]))
        allowed = _flat(self)
        return [name for name, (low, high) in measured.items() if low < allowed[name][0] or high > allowed[name][1]]


@torch.no_grad()
def _measured(tower: PrivateTower, embeddings: Tensor, mask: Tensor) -> Calibration:
    """Measure the ranges of one batch, without a margin."""
    is_token, width = mask > 0, embeddings.shape[-1]
    x = F.layer_norm(embeddings, (width,), *tower.norm, tower.epsilon)
    norm = _norm_ranges(embeddings, x, is_token)
    layers = []
    for layer in tower.layers:
        query, key, value = tower.projected(x, layer)
        attended, weights = tower.attend_to(query, key, value, layer, mask)
        out = F.linear(attended, layer["out.weight"], layer["out.bias"])
        middle = F.layer_norm(x + out, (width,), layer["norm1.weight"], layer["norm1.bias"], tower.epsilon)
        inner = F.linear(middle, layer["inner.weight"], layer["inner.bias"])
        outer = F.linear(F.gelu(inner), layer["outer.weight"], layer["outer.bias"])
        state = F.layer_norm(middle + outer, (width,), layer["norm2.weight"], layer["norm2.bias"], tower.epsilon)
        head_tokens = is_token[:, None].expand(-1, tower.heads, -1)  # [B, H, T]
        layers.append(
            LayerRanges(
                query=tuple(_range((part**2).sum(-1)[is_token]) for part in query.unbind(1)),
                key=tuple(_range((part**2).sum(-1)[is_token]) for part in key.unbind(1)),
                weights=_range(weights[head_tokens]),
                value=_size(value[head_tokens]),
                attended=_size(attended[is_token]),
                out=_size(out[is_token]),
                norm1=_norm_ranges(x + out, middle, is_token),
                inner=tuple((0.0, size) for size in inner[is_token].abs().amax(0).tolist()),
                outer=_size(outer[is_token]),
                norm2=_norm_ranges(middle + outer, state, is_token),
            )
        )
        x = state
    return Calibration(norm, tuple(layers), 1.0)


def _norm_ranges(x: Tensor, result: Tensor, is_token: Tensor) -> NormRanges:
    variances = x.var(-1, correction=0)
    rest = variances[:, 1:][is_token[:, 1:]]
    return NormRanges(_range(variances[:, 0]), _range(rest), _size(result[is_token]))


def _range(values: Tensor) -> Range:
    """Return the range of all values; from infinity to minus infinity if there are none."""
    if values.numel() == 0:
        return math.inf, -math.inf
    low, high = values.aminmax()
    return low.item(), high.item()


def _size(values: Tensor) -> Range:
    return 0.0, values.abs().max().item()


def _joined(calibrations: Sequence[Calibration]) -> Calibration:
    """Join calibrations to the smallest ranges that contain all of theirs."""

    def hull(*ranges: Range) -> Range:
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    return _each_range(hull, *calibrations)


def _levelled(layer: LayerRanges) -> LayerRanges:
    """Put the inner units in groups, and give each unit the widest range of its group.

    A group has one series for GeLU. The series' frequencies, and with them the values dealt for a unit, grow with its
    period. Units are ordered by their ranges. Groups may end where 1, 2, 3, 4, 6, 8, 12 .. units are left. The cheapest
    of these partitions is taken.
    """
    order = sorted(range(len(layer.inner)), key=lambda unit: layer.inner[unit][1])
    ends = [layer.inner[unit][1] for unit in order]
    counts = {1} | {step << power for step in (2, 3) for power in range(len(ends).bit_length())}
    marks = sorted(len(ends) - count for count in counts if count < len(ends))

    def dealt(cuts: Iterable[int]) -> float:
        return sum((end - start) * least_period(ends[end - 1]) for start, end in pairwise(cuts))

    partitions = ((0, *inner, len(ends)) for number in range(GROUPS) for inner in combinations(marks, number))
    cheapest = min(partitions, key=dealt)
    highs = {order[at]: ends[end - 1] for start, end in pairwise(cheapest) for at in range(start, end)}
    return replace(layer, inner=tuple((0.0, highs[unit]) for unit in range(len(ends))))


def _widened(calibration: Calibration, margin: float) -> Calibration:
    wider = _each_range(lambda ends: (ends[0] / margin, ends[1] * margin), calibration)
    return replace(wider, margin=margin)


def _each_range(change: Callable[..., Range], *trees: T) -> T:
    """Join trees of dataclasses and tuples range by range. Other values are copied from the first tree."""
    first: Any = trees[0]
    if is_dataclass(first) and not isinstance(first, type):
        parts = {entry.name: [getattr(tree, entry.name) for tree in trees] for entry in fields(first)}
        return cast(T, replace(first, **{name: _each_range(change, *part) for name, part in parts.items()}))
    if not isinstance(first, tuple):
        return cast(T, first)
    if isinstance(first[0], float):
        return cast(T, change(*trees))
    return cast(T, tuple(_each_range(change, *part) for part in zip(*cast(Any, trees), strict=True)))


def _flat(tree: object, name: str = "") -> dict[str, Range]:
    """Return a tree's ranges by names such as `layers.0.norm1.first`."""
    if is_dataclass(tree):
        parts = {entry.name: getattr(tree, entry.name) for entry in fields(tree)}
    elif isinstance(tree, tuple):
        if isinstance(tree[0], float):
            return {name: (tree[0], tree[1])}
        parts = {str(index): part for index, part in enumerate(tree)}
    else:
        return {}
    return {
        full: ends
        for key, part in parts.items()
        for full, ends in _flat(part, f"{name}.{key}" if name else key).items()
    }


def heads_of(x: Tensor, heads: int) -> Tensor:
    """Split heads, [B, T, H d] to [B, H, T, d]."""
    split: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split
