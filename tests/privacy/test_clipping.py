"""Clipping: bounds at every size, exactness below the bound, and rows that know nothing of each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sordino.privacy.clipping import clip_jointly, clipped_sum
from sordino.privacy.settings import LEAST_CLIP, MOST_CLIP

EPSILON = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
KINDS = st.sampled_from(list(EPSILON))


def rows(count: int, scales: list[float], kind: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Two tensors with rows of very different sizes, as far as the type goes."""
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(kind).max / 8  # of which eight normal numbers of at most eight deviations stay finite
    factors = torch.tensor([min(scale, largest) for scale in scales], dtype=torch.float64)
    made = {}
    for name, shape in {"u": (count, 3, 2), "v": (count, 4)}.items():
        normal = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-8, 8)
        made[name] = (normal * factors.view(-1, *[1] * (len(shape) - 1))).to(kind)
    return made


def norms(tensors: dict[str, Tensor]) -> list[float]:
    """Of each row, by a computation that neither overflows nor rounds much."""
    flat = torch.cat([tensor.flatten(1).double() for tensor in tensors.values()], 1)
    return [math.hypot(*row) for row in flat.tolist()]


@given(KINDS, st.lists(st.floats(-300, 300), min_size=1, max_size=6), st.floats(-6, 6), st.integers(0, 999))
def test_rows_of_any_size_keep_the_bound(kind: torch.dtype, powers: list[float], clip_power: float, seed: int) -> None:
    """A longer row has norm `clip`, a shorter one stays as it is, to the bit, whatever squares of entries overflow."""
    clip, count = 10.0**clip_power, len(powers)
    tensors = rows(count, [10.0**power for power in powers], kind, seed)
    clipped, below = clip_jointly(tensors, clip)
    slack = 16 * EPSILON[kind]  # ten squares, a root, a quotient and a product, each rounded once
    for row, (before, after) in enumerate(zip(norms(tensors), norms(clipped), strict=True)):
        assert after <= clip * (1 + slack)
        if before <= clip * (1 - slack):
            assert bool(below[row])
            assert all(torch.equal(clipped[name][row], tensors[name][row]) for name in tensors)
        elif before >= clip * (1 + slack):
            assert not bool(below[row])
            assert after == pytest.approx(clip, rel=slack)


@pytest.mark.parametrize("clip", [LEAST_CLIP, 1.0, MOST_CLIP])
@pytest.mark.parametrize("share", [0.51, 1.0, 1.49])
def test_every_clip_that_may_be_set_is_kept_by_rows_of_equal_entries(clip: float, share: float) -> None:
    """Near the least float each entry would be rounded up, and the row be twice as long as the clip."""
    width = 3072
    row = {"row": torch.ones(1, width)}
    for clipped in (clip_jointly(row, clip)[0], clipped_sum(row, clip)):
        assert float(clipped["row"].double().norm()) <= clip * (1 + 1e-5)
    least = 2.0**-149  # of float32
    too_small = share * least * math.sqrt(width)
    assert too_small < LEAST_CLIP
    longest = float(clip_jointly(row, too_small)[0]["row"].double().norm())
    assert (longest > 1.9 * too_small) == (share == 0.51)


@given(KINDS, st.lists(st.floats(-300, 300), min_size=2, max_size=6), st.integers(0, 999), st.data())
def test_a_row_knows_nothing_of_the_others(
    kind: torch.dtype, powers: list[float], seed: int, data: st.DataObject
) -> None:
    tensors = rows(len(powers), [10.0**power for power in powers], kind, seed)
    bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))
    place = data.draw(st.integers(0, len(powers) - 1))
    tensors["v"][place, 1] = bad
    clipped, below = clip_jointly(tensors, 0.1)
    for row in range(len(powers)):
        alone, mine = clip_jointly({name: tensor[[row]] for name, tensor in tensors.items()}, 0.1)
        for name in tensors:  # kernels fuse a product and a sum or not, by the stack's size: one rounding more or less
            torch.testing.assert_close(clipped[name][[row]], alone[name], rtol=4 * EPSILON[kind], atol=0)
        assert torch.equal(below[[row]], mine)
    if not math.isfinite(bad):
        assert not bool(below[place])
        assert not any(tensor[place].any() for tensor in clipped.values())


@given(KINDS, st.lists(st.floats(-300, 300), min_size=1, max_size=6), st.integers(0, 999))
def test_a_clipped_sum_is_the_sum_of_clipped_rows(kind: torch.dtype, powers: list[float], seed: int) -> None:
    tensors = rows(len(powers), [10.0**power for power in powers], kind, seed)
    tensors["u"][0, 0, 0] = math.nan
    clipped, _ = clip_jointly(tensors, 0.1)
    for name, total in clipped_sum(tensors, 0.1).items():
        expected = clipped[name].sum(0)
        torch.testing.assert_close(total, expected, rtol=0, atol=0.1 * len(powers) * 8 * EPSILON[kind])


def test_long_rows_are_not_too_long() -> None:
    """In float32 one sum of two million squares is wrong by more than the clip may be."""
    entries = 2_000_000
    tensors = {"adapter": torch.randn(2, entries, generator=torch.Generator().manual_seed(0))}
    clipped, _ = clip_jointly(tensors, 0.5)
    assert clipped["adapter"].double().norm(dim=1).tolist() == pytest.approx([0.5, 0.5], rel=2e-6)


def test_tensors_without_entries_and_stacks_without_rows_have_norm_zero() -> None:
    """A low-rank part of rank zero, and a sample of nobody."""
    tensors = {"u": torch.zeros(2, 3, 0), "v": torch.ones(2, 4), "bit": torch.ones(2)}
    clipped, below = clip_jointly(tensors, 1.0)
    assert clipped["u"].shape == (2, 3, 0)
    assert norms({"v": clipped["v"], "bit": clipped["bit"][:, None]}) == pytest.approx([1.0, 1.0])
    assert below.tolist() == [False, False]
    assert clipped_sum({"v": torch.zeros(0, 4)}, 1.0)["v"].tolist() == [0.0] * 4
