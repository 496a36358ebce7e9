"""Reciprocals, inverse square roots, unit vectors and LayerNorm against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mpc.both import KEYS, computed, cost_of, held, normal, root_cost
from scipy import stats

from sordino.mpc.costs import Cost
from sordino.mpc.errors import OutOfRange
from sordino.mpc.linear import hide
from sordino.mpc.packing import packed_size
from sordino.mpc.party import Party, Shared, run
from sordino.mpc.roots import Norm, Root, calibrate, inverse_root, layer_norm, unit_norm, variance_root

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


def norm_case(
    width: int, gain_fraction: int = 12, fraction: int = 14
) -> tuple[torch.Tensor, torch.Tensor, object, Root]:
    """Rows of standard deviations from 1/2 to 2, LayerNorm of them by torch, and a program for shares."""
    x = normal(48, width) * torch.linspace(0.5, 2, 48, dtype=torch.float64)[:, None] + 0.3
    gamma, beta = 1 + 0.2 * normal(width, seed=1), normal(width, seed=2)
    root = variance_root(width, 0.1, 8)
    gain = held(gamma * math.sqrt(width), gain_fraction, 3)

    def program(party: Party) -> Shared:
        norm = Norm(hide(party, gain(party))[0], held(beta, 14, 4)(party), root, 1e-5)
        with party.costs.label("norm"):
            return layer_norm(party, held(x, fraction)(party), norm, fraction=14)

    return x, torch.nn.functional.layer_norm(x, (width,), gamma, beta, 1e-5), program, root


@pytest.mark.parametrize("width", [384, 64, 100])
def test_layer_norm_within_the_stated_error(width: int) -> None:
    x, oracle, program, root = norm_case(width)
    found, costs = computed(program)  # type: ignore[arg-type]
    log_width = math.ceil(math.log2(width))
    inverse_norm = 2**log_width / (width * (width * x.var(-1, correction=0)).sqrt())  # [T]
    relative = root.error + 2.0**-18 / inverse_norm.min() + 2.0**-13 / math.sqrt(width) + 2.0**-14
    bound = relative * oracle.abs().max() * 1.5 + 3 * 2.0**-14 * 2 + 2.0**-15 / 0.5
    assert (found - oracle).abs().max() < bound
    assert bound < 8e-3
    bits = max(2 * (14 + log_width) + math.floor(math.log2(root.start.high)), 14 + log_width + 18 + 12 + 5) + 3
    count, rows = 48 * width, 48
    own = Cost(
        3,
        packed_size(count, bits) + packed_size(count, bits - (log_width + 18 + 12)) + packed_size(rows, bits),
        packed_size(rows, bits) + packed_size(4 * count, bits) + 16 * count,
    )
    assert costs.by_label()["norm"] == own + root_cost(root, rows, 18, 2 * (14 + log_width), bits)


def test_a_norm_of_fewer_bits_is_off_by_as_much_and_costs_less() -> None:
    """By the last bit that is kept of what is divided, over its deviation."""
    x, _, _, root = norm_case(64)
    gain = held(torch.full((64,), 8.0), 12, 3)

    def program(party: Party) -> Shared:
        norm = Norm(hide(party, gain(party))[0], party.public(0.0, 14), root, 1e-5)
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
            (gain,) = hide(party, held(torch.ones(width), 12)(party))
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
