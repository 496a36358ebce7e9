"""Products, truncation and their secrecy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mpc.both import KEYS, computed, cost_of, held, held_integers, normal
from sordino.mpc.arithmetic.packing import packed_size
from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.arithmetic.ring import centered, lowest
from sordino.mpc.dealing.costs import Cost
from sordino.mpc.errors import OutOfRange
from sordino.mpc.protocols.linear import mask_and_open, multiply, product, reveal, triple_product, truncate
from sordino.mpc.protocols.party import Masked, Party, Shared, reconstruct, run

WORDS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)


def integers_of(program: object) -> torch.Tensor:
    """What a program's result is in the ring."""
    result = run(program, KEYS, timeout=60)  # type: ignore[arg-type]
    first, second = result.results
    return centered(first.share + second.share, first.bits)


@settings(max_examples=25)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), st.sampled_from([64, 48, 11]))
def test_products_are_those_of_the_ring(triples: list[tuple[int, int, int]], bits: int) -> None:
    a, b, c = torch.tensor(triples).T
    x, y, z = (held_integers(value, seed=seed) for seed, value in enumerate((a, b, c)))
    assert (integers_of(lambda p: multiply(p, x(p), y(p), bits)) == centered(a * b, bits)).all()

    def program(party: Party) -> Shared:
        return triple_product(party, *mask_and_open(party, x(party), y(party), z(party), bits=[bits, 64, 64]))

    assert (integers_of(program) == centered(a * b * c, bits)).all()


@pytest.mark.parametrize(
    ("form", "left", "right", "result"),
    [
        ("matmul", (2, 3, 4, 5), (5, 6), (2, 3, 4, 6)),
        ("matmul_nt", (2, 4, 5), (2, 6, 5), (2, 4, 6)),
        ("matmul_tn", (2, 5, 4), (2, 5, 6), (2, 4, 6)),
        ("multiply", (4, 1), (5,), (4, 5)),
        ("dot", (4, 5), (4, 5), (4,)),
    ],
)
def test_bilinear_maps_cost_what_they_say(form: str, left: tuple, right: tuple, result: tuple) -> None:
    x, y = normal(*left), normal(*right, seed=1)
    values, costs = computed(lambda p: multiply(p, held(x, 16)(p), held(y, 12, 1)(p), bits=44, form=form))
    oracle = {
        "matmul": lambda: x @ y,
        "matmul_nt": lambda: x @ y.mT,
        "matmul_tn": lambda: x.mT @ y,
        "multiply": lambda: x * y,
        "dot": lambda: (x * y).sum(-1),
    }[form]()
    # Only encoding errs: by 2^-17 |y| + 2^-13 |x| a term.
    assert (values - oracle).abs().max() < 5 * (2**-17 * y.abs().max() + 2**-13 * x.abs().max() + 2**-30)
    online = packed_size(x.numel(), 44) + packed_size(y.numel(), 44)
    assert values.shape == result
    assert costs.total == Cost(1, online, packed_size(math.prod(result), 44))


@pytest.mark.parametrize("fraction", [20, 28])
def test_a_bias_is_added_to_each_row_at_no_cost(fraction: int) -> None:
    x, y, bias = normal(2, 4, 5), normal(6, 5, seed=1), normal(6, seed=2)

    def program(party: Party) -> Shared:
        factors = mask_and_open(party, held(x, 16)(party), held(y, 12, 1)(party), bits=44)
        return product(party, *factors, "matmul_nt", held(bias, fraction, 2)(party))

    values, costs = computed(program)
    assert (values - (x @ y.mT + bias)).abs().max() < 5 * (2**-17 * y.abs().max() + 2**-13 * x.abs().max() + 2**-20)
    assert costs.total == Cost(1, packed_size(40, 44) + packed_size(30, 44), packed_size(48, 44))


def test_a_fixed_operand_is_sent_once() -> None:
    weight, inputs = normal(7, 3), [normal(5, 7, seed=seed) for seed in range(1, 4)]

    def program(party: Party) -> list[Shared]:
        with party.costs.label("set-up"):
            (masked,) = mask_and_open(party, held(weight, 12)(party))
        results = []
        for x in inputs:
            with party.costs.label("product"):
                results.append(product(party, *mask_and_open(party, held(x, 16)(party)), masked))
        return results

    result = run(program, KEYS)
    assert result.costs.by_label() == {"set-up": Cost(1, 8 * 21), "product": Cost(3, 3 * 8 * 35, 3 * 8 * 15)}
    for x, *shares in zip(inputs, *result.results, strict=True):
        values = reconstruct((shares[0], shares[1]))
        assert (values - x @ weight).abs().max() < 7 * (2**-17 * weight.abs().max() + 2**-13 * x.abs().max())


def test_a_value_masked_once_serves_many_products() -> None:
    x, y = normal(6, 4), normal(6, 1, seed=1)

    def program(party: Party) -> Shared:
        masked, other = mask_and_open(party, held(x, 16)(party), held(y, 16, 1)(party))
        squares = product(party, masked, masked, "dot")
        return product(party, masked, other, "multiply").view(lambda share: share.sum(-1)) + squares

    values, costs = computed(program)
    assert (values - (x * x).sum(-1) - (x * y).sum(-1)).abs().max() < 1e-3
    assert costs.total == Cost(1, 8 * 30, 8 * (6 + 24))


@settings(max_examples=60)
@given(st.data(), st.integers(4, 64))
def test_truncation_is_off_by_less_than_the_last_bit(data: st.DataObject, bits: int) -> None:
    shift = data.draw(st.integers(0, bits - 2))
    limit = 2 ** (bits - 2) - 2**shift
    extremes = st.sampled_from([-limit, limit, 0, 1, -1])
    values = data.draw(st.lists(extremes | st.integers(-limit, limit), min_size=1, max_size=8))
    x = held_integers(torch.tensor(values), fraction=shift)
    result = integers_of(lambda party: truncate(party, x(party), fraction=0, bits=bits)[0]).tolist()
    for value, found in zip(values, result, strict=True):
        assert abs((found << shift) - value) < 2**shift


def test_truncation_errs_to_neither_side_and_costs_what_it_says() -> None:
    x = torch.full((40_000,), 1000 * 2**16 + 2**14)
    held_x = held_integers(x, fraction=20)
    values, costs = computed(lambda party: truncate(party, held_x(party), fraction=4, bits=37)[0])
    error = values * 16 - 1000.25
    assert error.abs().max() < 1
    assert abs(error.mean()) < 4 * math.sqrt(0.25 * 0.75 / 40_000)  # it is -1/4 or 3/4, by chance of 3/4 and 1/4
    assert costs.total == Cost(1, packed_size(40_000, 37 - 16), 16 * 40_000)


@settings(max_examples=60)
@given(st.data(), st.integers(2, 64), st.integers(0, 40))
def test_what_is_masked_without_its_last_bits_is_right_modulo_as_much_less(
    data: st.DataObject, bits: int, dropped: int
) -> None:
    """Of any integers of the ring, however they are shared: off by less than one of the last bits that are kept."""
    dropped = min(dropped, bits - 1)
    values = data.draw(st.lists(WORDS, min_size=1, max_size=8))
    x = held_integers(torch.tensor(values), fraction=dropped)

    def program(party: Party) -> Shared:
        share = Shared(lowest(x(party).share, bits), dropped, bits)  # nothing is known above
        (masked,) = mask_and_open(party, share, bits=bits - dropped, fraction=0)
        return Shared(masked.share + party.only(0, masked.opened), masked.fraction, masked.bits)

    for value, found in zip(values, integers_of(program).tolist(), strict=True):
        away = ((found << dropped) - value) % 2**bits
        assert min(away, 2**bits - away) < 2**dropped


def test_whole_numbers_lose_nothing_with_fraction_bits_that_they_do_not_have() -> None:
    x = held_integers(torch.arange(-500, 500) << 12, fraction=12)
    found, _ = computed(lambda party: truncate(party, x(party), fraction=0, bits=30)[0])
    assert found.tolist() == list(range(-500, 500))


def test_truncation_refuses_more_bits_than_there_are() -> None:
    with pytest.raises(OutOfRange, match="fraction = 5"):
        computed(lambda party: truncate(party, party.public(1.0, 4), fraction=5)[0])
    with pytest.raises(OutOfRange, match="no bit would be left"):
        computed(lambda party: truncate(party, party.public(1.0, 20), fraction=0, bits=20)[0])
    with pytest.raises(OutOfRange, match="lift it first"):
        computed(lambda party: multiply(party, *[multiply(party, *[party.public(1.0, 4)] * 2, bits=20)] * 2))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "shift"), [(64, 32), (40, 16)])
def test_no_truncation_of_a_hundred_million_fails(bits: int, shift: int) -> None:
    """Half of the values are of the largest size; shifting shares modulo 2^bits would fail for a quarter of those."""
    count, limit = 10**6, 2 ** (bits - 2) - 2**shift
    generator = Prg(bytes(32))

    def block(number: int) -> torch.Tensor:
        small = centered(generator.integers(2 * number, (count // 2,)), bits - 10)
        return torch.cat([small, torch.full((count // 4,), limit), torch.full((count // 4,), -limit)])

    def program(party: Party) -> int:
        failures = 0
        for number in range(50):
            x = block(number)
            mine = generator.integers(2 * number + 1, (count,))
            share = mine if party.number else x - mine
            (result,) = truncate(party, Shared(share, shift), fraction=0, bits=bits)
            (other,) = party.exchange([result.share], [64])
            failures += int((((result.share + other) - (x >> shift)) & -2).ne(0).sum())
        return failures

    assert run(program, KEYS).results == (0, 0)


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_party_receives_does_not_depend_on_the_input(number: int) -> None:
    """All messages of a program of products and truncations, by byte: uniform, and alike for two inputs."""
    count = 30_000

    def transcript(value: float) -> list[bytes]:
        x = held(torch.full((count,), value, dtype=torch.float64), 16)

        def program(party: Party) -> None:
            (masked,) = mask_and_open(party, x(party), bits=48)
            square = product(party, masked, masked, "multiply")
            truncate(party, square, fraction=16, bits=48)

        return run(program, KEYS).received[number]

    for nothing, much in zip(transcript(0.0), transcript(-123.456), strict=True):
        for place in range(len(nothing) // count):  # six bytes, then four, as sixteen bits are dropped
            first, second = (
                np.bincount(np.frombuffer(message, np.uint8).reshape(count, -1)[:, place], minlength=256)
                for message in (nothing, much)
            )
            assert stats.chisquare(first).pvalue > 1e-4
            assert stats.chisquare(second).pvalue > 1e-4
            assert stats.chi2_contingency([first, second]).pvalue > 1e-4


@pytest.mark.parametrize("number", [0, 1])
def test_shares_and_openings_of_any_width_are_uniform(number: int) -> None:
    """The highest bits of a value masked modulo 2^19, its mask's share, and the share of a product."""
    x = held(torch.full((60_000,), 3.25, dtype=torch.float64), 12)

    def program(party: Party) -> tuple[Masked, Shared]:
        (masked,) = mask_and_open(party, x(party), bits=19)
        return masked, product(party, masked, masked, "multiply")

    masked, square = run(program, KEYS).results[number]
    for part in (masked.opened, masked.share, square.share):
        for place in (0, 11):
            counts = torch.bincount(lowest(part >> place, 8), minlength=256).numpy()
            assert stats.chisquare(counts).pvalue > 1e-4


def test_revealing_gives_both_the_numbers() -> None:
    x = normal(4)
    result = run(lambda party: reveal(party, held(x, 16)(party)), KEYS)
    assert (result.results[0][0] - x).abs().max() <= 2**-17
    assert (result.results[0][0] == result.results[1][0]).all()
    assert cost_of(result.costs, "reveal") == Cost(1, 32)
