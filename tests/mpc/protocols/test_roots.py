"""Reciprocals, inverse square roots, unit vectors and LayerNorm against torch."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpc.both import KEYS, computed, cost_of, held, held_integers, normal, root_cost
from sordino.mpc.arithmetic.packing import packed_size
from sordino.mpc.arithmetic.ring import WORD, decode, encode, lowest
from sordino.mpc.dealing.costs import Cost
from sordino.mpc.errors import OutOfRange
from sordino.mpc.protocols.linear import mask_and_open
from sordino.mpc.protocols.party import Party, Shared, run
from sordino.mpc.protocols.roots import (
    Norm,
    Root,
    calibrate,
    inverse_root,
    layer_norm,
    newton_step,
    unit_norm,
    variance_root,
)

CASES = [
    (2, 0.1, 3, 1e-3, 1),
    (2, 0.1, 3, 1e-4, 0),
    (2, 0.01, 3, 1e-3, 2),
    (2, 40, 900, 1e-3, 1),
    (1, 0.1, 1, 1e-4, 1),
    (1, 0.1, 1, 1e-4, 0),
    (1, 0.03, 1, 1e-4, 2),
    (1, 5, 50, 1e-4, 1),
]
WORDS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)
MASKS = 50  # that each number is tried under
KINDS = ["normal", "alternating", "one entry", "constant"]
root_of, root_of_variances = cache(calibrate), cache(variance_root)


def row(kind: str, width: int, seed: int) -> torch.Tensor:
    """A row of one of the `KINDS`, of any length but zero."""
    sign = 1 - 2 * (torch.arange(width, dtype=torch.float64) % 2)
    first = torch.nn.functional.one_hot(torch.tensor(seed % width), width).double()
    return {"alternating": sign, "one entry": first, "constant": sign.abs()}.get(kind, normal(width, seed=seed))


@pytest.mark.parametrize(("power", "low", "high", "error", "steps"), CASES)
def test_inverse_roots_within_the_stated_error(power: int, low: float, high: float, error: float, steps: int) -> None:
    root = calibrate(power, low, high, error, steps)
    assert root.error <= error
    values = torch.logspace(math.log10(low), math.log10(high), 3000, dtype=torch.float64)
    x = held(values, 30)
    found, costs = computed(lambda party: inverse_root(party, x(party), root, fraction=20))
    oracle = values ** (-1 / power)
    encoding = 2.0**-31 / low
    assert ((found / oracle - 1).abs() <= root.error + 2.0**-20 / oracle + encoding).all()
    assert cost_of(costs, "inverse_root") == root_cost(root, 3000, 20, 30)


@settings(max_examples=30)
@given(st.data(), st.sampled_from(CASES), st.integers(16, 40), st.integers(8, 24), st.booleans())
def test_inverse_roots_up_to_the_ends_of_their_range(
    data: st.DataObject, case: tuple[int, float, float, float, int], x_fraction: int, fraction: int, whole: bool
) -> None:
    """Of integers in fixed point, shared modulo 2^64 or as little as holds them."""
    root, low, high = root_of(*case), math.ceil(case[1] * 2**x_fraction), math.floor(case[2] * 2**x_fraction)
    values = MASKS * data.draw(st.lists(st.sampled_from([low, high]) | st.integers(low, high), min_size=1, max_size=8))
    bits = WORD if whole else max(high.bit_length(), x_fraction + root.start.period) + 2

    def program(party: Party) -> Shared:
        share = held_integers(torch.tensor(values), x_fraction)(party).share
        return inverse_root(party, Shared(lowest(share, bits), x_fraction, bits), root, fraction)

    found, _ = computed(program)
    oracle = decode(torch.tensor(values), x_fraction) ** (-1 / root.power)
    assert ((found - oracle).abs() <= root.error * oracle + 2.0**-fraction).all()


@settings(max_examples=25)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5), st.sampled_from([1, 2]))
def test_a_step_of_newtons_method_is_that_of_the_ring(pairs: list[tuple[int, int]], power: int) -> None:
    """Of any integers, and exactly."""
    bases, factors = torch.tensor(pairs).T

    def program(party: Party) -> Shared:
        own = held_integers(bases, 8)(party), held_integers(factors, 6, seed=1)(party)
        return newton_step(party, *mask_and_open(party, *own), power)

    first, second = run(program, KEYS).results
    assert first.fraction == (power + 1) * 8 + 6 + power - 1
    for (y, x), found in zip(pairs, (first.share + second.share).tolist(), strict=True):
        exact = (power + 1) * y * 2 ** (8 * power + 6) - x * y ** (power + 1)
        assert (found - exact) % 2**WORD == 0


@settings(max_examples=20)
@given(st.floats(0.1, 3), st.floats(-0.2, 0.2), st.sampled_from([1, 2]))
def test_a_step_of_newtons_method_squares_the_error(x: float, off: float, power: int) -> None:
    """As `calibrate` says of it: e becomes -e^2 for reciprocals, and -(3 e^2 + e^3) / 2 for inverse square roots."""
    own, near = (torch.tensor([value], dtype=torch.float64) for value in (x, x ** (-1 / power) * (1 + off)))
    found, _ = computed(lambda p: newton_step(p, *mask_and_open(p, held(near, 14)(p), held(own, 16, 1)(p)), power))
    x, y = (decode(encode(value, bits), bits).item() for value, bits in ((own, 16), (near, 14)))
    e = y * x ** (1 / power) - 1
    squared = e**2 if power == 1 else 1.5 * e**2 + 0.5 * e**3
    assert found.item() * x ** (1 / power) == pytest.approx(1 - squared, abs=1e-12)


def test_a_range_too_wide_says_what_to_do() -> None:
    with pytest.raises(OutOfRange, match="take more steps, or a narrower range"):
        calibrate(1, 1e-4, 1, 1e-4, 0)


def test_vectors_of_length_one() -> None:
    x = normal(40, 32) * torch.linspace(0.5, 2, 40, dtype=torch.float64)[:, None]
    norms = (x * x).sum(-1)
    root = calibrate(2, norms.min().item() * 0.9, norms.max().item() * 1.1)
    found, costs = computed(lambda party: unit_norm(party, held(x, 14)(party), root))
    inverse = root.error + 2.0**-16 * norms.sqrt().max().item()
    assert (found - x / norms.sqrt()[:, None]).abs().max() <= inverse + 2.0**-15 / norms.sqrt().min() * 2
    bits = math.floor(28 + math.log2(root.start.high)) + 3
    own = Cost(2, packed_size(1280, bits) + packed_size(40, bits), packed_size(40, bits) + packed_size(1280, bits))
    assert cost_of(costs, "unit_norm") == own + root_cost(root, 40, 16, 28, bits)


@settings(max_examples=25)
@given(st.data(), st.sampled_from([(0.5, 40.0), (4.0, 64.0)]), st.sampled_from([1, 2, 7, 32, 64]), st.integers(10, 18))
def test_vectors_of_any_kind_and_length_get_length_one(
    data: st.DataObject, ends: tuple[float, float], width: int, inverse_fraction: int
) -> None:
    """Off by the stated error of their inverse norms and nothing else."""
    (low, high), root = ends, root_of(2, *ends)
    sizes = st.sampled_from([1.001 * low, 0.999 * high]) | st.floats(1.001 * low, 0.999 * high)
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(KINDS), sizes, st.integers(0, 99)), min_size=1, max_size=6))
    rows = [(row(kind, width, seed), size) for kind, size, seed in drawn]
    x = encode(torch.stack([each * math.sqrt(size) / each.norm() for each, size in rows]), 14)
    exact = decode(x, 14)
    norms = exact.norm(dim=-1, keepdim=True)
    assert low <= norms.min() ** 2 <= norms.max() ** 2 <= high  # encoding leaves them in range
    found, _ = computed(lambda party: unit_norm(party, held_integers(x, 14)(party), root, inverse_fraction))
    bound = (root.error + 2.0**-inverse_fraction * norms) * (exact / norms).abs()
    assert ((found - exact / norms).abs() <= bound + 2**-40).all()


def norm_case(
    width: int, gain_fraction: int = 12, fraction: int = 14
) -> tuple[torch.Tensor, torch.Tensor, object, Root]:
    """Rows of standard deviations from 1/2 to 2, LayerNorm of them by torch, and a program for shares.

    All are what they are in fixed point, so that encoding does not err.
    """
    x = normal(48, width) * torch.linspace(0.5, 2, 48, dtype=torch.float64)[:, None] + 0.3
    x, beta = decode(encode(x, fraction), fraction), decode(encode(normal(width, seed=2), 14), 14)
    gains = decode(encode((1 + 0.2 * normal(width, seed=1)) * math.sqrt(width), gain_fraction), gain_fraction)
    root, gain, gamma = variance_root(width, 0.1, 8), held(gains, gain_fraction, 3), gains / math.sqrt(width)

    def program(party: Party) -> Shared:
        norm = Norm(mask_and_open(party, gain(party))[0], held(beta, 14, 4)(party), root, 1e-5)
        with party.costs.label("norm"):
            return layer_norm(party, held(x, fraction)(party), norm, fraction=14)

    return x, torch.nn.functional.layer_norm(x, (width,), gamma, beta, 1e-5), program, root


def norm_bound(
    root: Root, epsilon: float, x: torch.Tensor, gamma: torch.Tensor, fraction: int, kept: int = WORD
) -> torch.Tensor:
    """The stated error of `layer_norm`, for each entry of its result, with inverse norms of 18 fraction bits.

    x and gamma are what they are in fixed point.
    """
    width = x.shape[-1]
    deviation = (x.var(-1, correction=0, keepdim=True) + epsilon).sqrt()
    inverse = 2 ** math.ceil(math.log2(width)) / (width * math.sqrt(width) * deviation)
    off = 2.0**-kept * inverse * math.sqrt(width) if kept < WORD else 0.0  # in c, over its deviation
    relative = root.error + 2.0**-18 / inverse + off
    scaled = gamma * (x - x.mean(-1, keepdim=True)) / deviation
    return relative * scaled.abs() + off * gamma.abs() * (1 + relative) + 2.0**-fraction


@pytest.mark.parametrize("width", [384, 64, 100])
def test_layer_norm_within_the_stated_error(width: int) -> None:
    x, oracle, program, root = norm_case(width)
    found, costs = computed(program)  # type: ignore[arg-type]
    log_width = math.ceil(math.log2(width))
    gamma = decode(encode((1 + 0.2 * normal(width, seed=1)) * math.sqrt(width), 12), 12) / math.sqrt(width)
    bound = norm_bound(root, 1e-5, x, gamma, fraction=14)
    assert ((found - oracle).abs() <= bound).all()
    assert bound.max() < 8e-3
    bits = max(2 * (14 + log_width) + math.floor(math.log2(root.start.high)), 14 + log_width + 18 + 12 + 5) + 3
    count, rows = 48 * width, 48
    own = Cost(
        3,
        packed_size(count, bits) + packed_size(count, bits - (log_width + 18 + 12)) + packed_size(rows, bits),
        packed_size(rows, bits) + packed_size(4 * count, bits) + 16 * count,
    )
    assert costs.by_label()["norm"] == own + root_cost(root, rows, 18, 2 * (14 + log_width), bits)


@settings(max_examples=25)
@given(
    st.data(),
    st.sampled_from([2, 3, 64, 100, 384]),
    st.sampled_from([(0.1, 8.0, 0.0), (0.25, 10.0, 0.25)]),
    st.sampled_from([8, 14, WORD]),
    st.integers(8, 16),
)
def test_layer_norm_of_rows_of_any_kind(
    data: st.DataObject, width: int, ends: tuple[float, float, float], kept: int, fraction: int
) -> None:
    """Of variances up to the ends of the root's range, and of constant rows where epsilon is in it."""
    low, high, epsilon = ends
    root = root_of_variances(width, low, high)
    kinds = st.sampled_from([kind for kind in KINDS if epsilon or kind != "constant"])
    least, most = 1.02 * low - epsilon, 0.99 * high - epsilon
    variances = st.sampled_from([least, most]) | st.floats(least, most)
    means = st.sampled_from([0.0, 100.0, -100.0])
    drawn = data.draw(st.lists(st.tuples(kinds, variances, means, st.integers(0, 99)), min_size=1, max_size=4))
    deviations = [row(kind, width, seed) for kind, _, _, seed in drawn]
    deviations = [each - each.mean() for each in deviations]
    rows = [
        each * math.sqrt(variance / max(each.var(correction=0).item(), 1e-9)) + mean
        for each, (_, variance, mean, _) in zip(deviations, drawn, strict=True)
    ]
    x, gain, beta = encode(torch.stack(rows), 14), encode(normal(width, seed=1).clamp(-1.5, 1.5), 12), normal(width)
    gain[0] = 0
    exact, bias = decode(x, 14), encode(beta, 14)
    total = exact.var(-1, correction=0) + epsilon
    assert low <= total.min() <= total.max() <= high  # encoding leaves them in range

    def program(party: Party) -> Shared:
        norm = Norm(
            *mask_and_open(party, held_integers(gain, 12, 3)(party)), held_integers(bias, 14, 4)(party), root, epsilon
        )
        return layer_norm(party, held_integers(x, 14)(party), norm, fraction, kept)

    found, _ = computed(program)
    gamma = decode(gain, 12) / math.sqrt(width)
    oracle = torch.nn.functional.layer_norm(exact, (width,), gamma, decode(bias, 14), epsilon)
    assert ((found - oracle).abs() <= norm_bound(root, epsilon, exact, gamma, fraction, kept)).all()


def test_a_norm_of_fewer_bits_is_off_by_as_much_and_costs_less() -> None:
    """By the last bit that is kept of what is divided, over its deviation."""
    x, _, _, root = norm_case(64)
    gain = held(torch.full((64,), 8.0), 12, 3)

    def program(party: Party) -> Shared:
        norm = Norm(mask_and_open(party, gain(party))[0], party.public(0.0, 14), root, 1e-5)
        with party.costs.label("norm"):
            return layer_norm(party, held(x, 14)(party), norm, fraction=14, kept=kept)

    exact = torch.nn.functional.layer_norm(x, (64,), eps=1e-5)
    found = {}
    for kept in (8, 14, 64):
        values, costs = computed(program)
        found[kept] = ((values - exact) * x.std(-1, correction=0, keepdim=True)).std().item(), costs.by_label()["norm"]
    assert 2.0**-8 / 4 < found[8][0] < 2.0**-8 / 2  # rounded to either side at random
    assert found[14][0] < 2.0**-8 / 8
    assert found[8][1].online < found[14][1].online < found[64][1].online


def test_layer_norm_of_too_many_bits_is_refused() -> None:
    with pytest.raises(OutOfRange, match="take fewer"):
        computed(norm_case(384, fraction=18)[2])  # type: ignore[arg-type]
    with pytest.raises(OutOfRange, match="take fewer"):
        computed(norm_case(384, gain_fraction=24)[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 1])
def test_no_message_of_a_layer_norm_tells_its_input(number: int) -> None:
    """Every message's bytes are uniform, and those for two inputs are alike."""
    root, width = variance_root(64, 0.1, 8), 64

    def transcript(x: torch.Tensor) -> list[bytes]:
        def program(party: Party) -> None:
            (gain,) = mask_and_open(party, held(torch.ones(width), 12)(party))
            layer_norm(party, held(x, 14)(party), Norm(gain, party.public(0.0, 14), root), fraction=14)

        return run(program, KEYS).received[number]

    flat = torch.ones(7000, width, dtype=torch.float64) * torch.tensor([0.5, -0.5]).repeat(width // 2)
    messages = zip(transcript(flat), transcript(2 * normal(7000, width)), strict=True)
    for one, other in list(messages)[1:]:  # after the gain, which is short
        counts = [np.bincount(np.frombuffer(message, np.uint8), minlength=256) for message in (one, other)]
        assert len(one) > 20_000
        for each in counts:
            assert stats.chisquare(each).pvalue > 1e-4
        assert stats.chi2_contingency(counts).pvalue > 1e-4
