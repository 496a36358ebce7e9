"""Lagrange coding: what decodes, what stays hidden, and which wrong answers are found."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sordino.secure.errors import TooFewAnswers, TooManyErrors
from sordino.secure.field import MERSENNE_61, PrimeField
from sordino.secure.lagrange import LagrangeCode, basis

LARGE, SMALL = PrimeField(), PrimeField(97)


@st.composite
def codes(draw: st.DrawFn, power: int = 1) -> LagrangeCode:
    """A code whose clients are at least as many as it takes to decode a polynomial of shares of that power."""
    blocks, privacy = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    needed = power * (blocks + privacy - 1) + 1
    clients = draw(st.integers(needed, needed + 8))
    return LagrangeCode(draw(st.sampled_from([LARGE, SMALL])), blocks, privacy, clients)


# Decoding


@given(codes(), st.randoms(use_true_random=False))
def test_any_shares_enough_give_the_blocks(code: LagrangeCode, random: object) -> None:
    blocks = code.field.random((code.blocks, 3, 2))
    shares = code.encode(blocks)
    assert shares.shape == (code.clients, 3, 2)
    some = random.sample(range(code.clients), code.degree + 1)  # type: ignore[attr-defined]
    decoded = code.decode(shares[some], some, code.degree)
    assert decoded.values.tolist() == blocks.tolist()
    assert decoded.bad == ()


@given(codes(power=3), st.sampled_from([2, 3]), st.randoms(use_true_random=False))
def test_what_is_computed_on_shares_is_computed_on_blocks(code: LagrangeCode, power: int, random: object) -> None:
    field = code.field
    one, other = field.random((code.blocks, 2)), field.random((code.blocks, 2))

    def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return field.add(field.power(x, power), field.sub(field.mul(x, y), y))

    answers = polynomial(code.encode(one), code.encode(other))
    some = random.sample(range(code.clients), power * code.degree + 1)  # type: ignore[attr-defined]
    expected = polynomial(one, other)
    assert code.decode(answers[some], some, power * code.degree).values.tolist() == expected.tolist()
    total = code.decode(answers[some], some, power * code.degree, total=True).values
    assert total.tolist() == field.sum(expected, axis=0).tolist()


def test_too_few_answers_are_counted() -> None:
    code = LagrangeCode(LARGE, 2, 3, 12)
    shares = code.encode(LARGE.random((2, 1)))
    with pytest.raises(TooFewAnswers, match="a step: 9 answers are needed and 8 came") as caught:
        code.decode(shares[:8], range(8), 2 * code.degree, "a step")
    assert (caught.value.needed, caught.value.had) == (9, 8)


def test_points_are_distinct_and_must_fit_the_field() -> None:
    code = LagrangeCode(PrimeField(11), 2, 2, 6)
    assert not {*code.betas} & {*code.alphas}
    assert len({*code.betas, *code.alphas}) == 10
    assert 0 not in code.alphas
    with pytest.raises(ValueError, match="more than blocks"):
        LagrangeCode(PrimeField(11), 2, 2, 7)


def test_the_basis_takes_powers_to_powers() -> None:
    nodes, targets = (3, 5, 9, 14), (1, 20)
    matrix = basis(SMALL, nodes, targets)
    for power in range(4):
        values = SMALL.power(SMALL.elements(nodes), power)
        assert SMALL.matmul(matrix, values[:, None])[:, 0].tolist() == [t**power % 97 for t in targets]


# Privacy


@pytest.mark.parametrize(("blocks", "privacy", "clients"), [(1, 1, 8), (2, 1, 7), (1, 2, 6), (2, 2, 6)])
def test_any_t_shares_are_distributed_alike_whatever_is_shared(blocks: int, privacy: int, clients: int) -> None:
    """All random blocks of the field of 11, all sets of T clients: every tuple of shares comes once, for any input."""
    code = LagrangeCode(PrimeField(11), blocks, privacy, clients)
    noise = np.array(list(product(range(11), repeat=privacy)), np.uint64).T  # [T, 11^T]
    seen = []
    for secret in ([0] * blocks, [3, 10][:blocks]):
        values = np.concatenate([np.repeat(np.array(secret, np.uint64)[:, None], noise.shape[1], axis=1), noise])
        shares = code.evaluate(values)  # [N, 11^T]
        seen.append([Counter(map(tuple, shares[list(some)].T)) for some in combinations(range(clients), privacy)])
    assert seen[0] == seen[1]
    assert all({*counter.values()} == {1} and len(counter) == 11**privacy for counter in seen[0])


def test_shares_up_to_the_threshold_decode_nothing() -> None:
    """With B = 2 and T = 1, T + 1 shares are consistent with 11 secrets each; B + T shares with one."""
    code = LagrangeCode(PrimeField(11), 2, 1, 6)
    everything = np.array(list(product(range(11), repeat=3)), np.uint64)  # two blocks and one random, [1331, 3]
    shares = code.evaluate(everything.T)
    for some in combinations(range(6), 2):
        secrets: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for row, values in zip(shares[list(some)].T.tolist(), everything.tolist(), strict=True):
            secrets.setdefault(tuple(row), set()).add(tuple(values[:2]))
        assert {len(each) for each in secrets.values()} == {11}
    for some in combinations(range(6), 3):
        assert len({tuple(row) for row in shares[list(some)].T.tolist()}) == 11**3


@pytest.mark.parametrize("secret", [0, 50])
def test_shares_are_uniform_by_chi_square(secret: int) -> None:
    """As drawn from the operating system, over the field of 97, in pairs of T = 2 clients."""
    code = LagrangeCode(SMALL, 2, 2, 5)
    shares = code.encode(np.full((2, 200_000), secret, np.uint64))
    for one, other in combinations(range(5), 2):
        pairs = np.bincount((97 * shares[one] + shares[other]).astype(int), minlength=97**2)
        assert stats.chisquare(pairs).pvalue > 1e-9


@given(codes(power=2), st.integers(0, 96))
def test_masks_are_polynomials_with_the_given_sums(code: LagrangeCode, total: int) -> None:
    degree = 2 * code.degree
    totals = np.array([0, total], np.uint64)
    shares = code.masks(totals, degree)
    assert shares.shape == (code.clients, 2)
    decoded = code.decode(shares, range(code.clients), degree, total=True)
    assert decoded.values.tolist() == totals.tolist()
    assert decoded.bad == ()


@pytest.mark.parametrize("point", [0, 5])
def test_a_masked_answer_hides_its_blocks(point: int) -> None:
    """What the server decodes of a square at each block alone is uniform; only the sum is what it was."""
    code = LagrangeCode(SMALL, 2, 1, 7)
    blocks = np.full((2, 100_000), point, np.uint64)
    blocks[1] = 1
    shares = code.encode(blocks)
    answers = SMALL.add(SMALL.mul(shares, shares), code.masks(np.zeros(100_000, np.uint64), 2 * code.degree))
    decoded = code.decode(answers, range(7), 2 * code.degree).values
    assert {*SMALL.sum(decoded, axis=0).tolist()} == {point**2 + 1}
    for values in (*decoded, *answers):
        assert stats.chisquare(np.bincount(values.astype(int), minlength=97)).pvalue > 1e-9
    pairs = np.bincount((97 * decoded[0] + answers[3]).astype(int), minlength=97**2)
    assert stats.chisquare(pairs).pvalue > 1e-9  # nor does a block together with one client's point


# Errors


@given(codes(power=2), st.data())
def test_wrong_answers_are_located(code: LagrangeCode, data: st.DataObject) -> None:
    """Any up to half of the surplus, wrong in any of their values, with any clients missing."""
    field, degree = code.field, 2 * code.degree
    blocks = field.random((code.blocks, 3))
    shares = code.encode(blocks)
    answers = field.mul(shares, shares)
    clients = data.draw(st.permutations(range(code.clients)))[: data.draw(st.integers(degree + 1, code.clients))]
    count = data.draw(st.integers(0, (len(clients) - degree - 1) // 2))
    bad = data.draw(st.permutations(clients))[:count]
    for client in bad:
        place, offset = data.draw(st.integers(0, 2)), data.draw(st.integers(1, field.modulus - 1))
        answers[client, place] = field.add(answers[client, place], np.uint64(offset))
    decoded = code.decode(answers[clients], clients, degree)
    assert {*decoded.bad} == {*bad}
    assert decoded.values.tolist() == field.mul(blocks, blocks).tolist()


@pytest.mark.parametrize("modulus", [4294967291, MERSENNE_61])
@pytest.mark.parametrize("wrong", [3, 4, 5])
def test_more_wrong_answers_than_can_be_located_are_reported(modulus: int, wrong: int) -> None:
    field = PrimeField(modulus)
    code = LagrangeCode(field, 2, 2, 12)  # degree 6, surplus 5: two can be located
    shares = code.encode(field.random((2, 4)))
    answers = field.mul(shares, shares)
    answers[2 : 2 + wrong] = field.random((wrong, 4))
    with pytest.raises(TooManyErrors, match="more than 2 of them are wrong") as caught:
        code.decode(answers, range(12), 6)
    assert caught.value.correctable == 2


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_garbage_is_never_decoded_beyond_what_can_be_located(surplus: int, seed: int) -> None:
    """Over the field of 11, where a polynomial through much of the garbage is likely: it has to go through enough."""
    code = LagrangeCode(PrimeField(11), 1, 1, 3 + surplus)
    answers = np.random.default_rng(seed).integers(0, 11, (3 + surplus, 1)).astype(np.uint64)
    try:
        decoded = code.decode(answers, range(3 + surplus), 2)
    except TooManyErrors:
        return
    assert len(decoded.bad) <= surplus // 2
    good = [client for client in range(3 + surplus) if client not in decoded.bad]
    for some in combinations(good, 3):
        assert code.decode(answers[list(some)], some, 2).values.tolist() == decoded.values.tolist()


def test_one_surplus_answer_detects_and_none_does_not() -> None:
    """As documented: to locate takes two surplus answers for each wrong one, to detect takes one."""
    code = LagrangeCode(LARGE, 2, 2, 8)
    blocks = LARGE.random((2, 1))
    shares = code.encode(blocks)
    answers = LARGE.mul(shares, shares)
    answers[1] = LARGE.add(answers[1], np.uint64(1))
    with pytest.raises(TooManyErrors):
        code.decode(answers, range(8), 6)
    unseen = code.decode(answers[:7], range(7), 6)
    assert unseen.bad == ()
    assert unseen.values.tolist() != LARGE.mul(blocks, blocks).tolist()


def test_liars_in_agreement_can_pass_for_the_honest() -> None:
    """The documented limit: more than half of the surplus on one polynomial, and it is the others who are named."""
    code = LagrangeCode(LARGE, 1, 1, 7)  # degree 2: two of seven can be located
    honest, false = (LARGE.power(code.encode(LARGE.random((1, 1))), 2) for _ in range(2))
    answers = np.concatenate([honest[:2], false[2:]])
    assert code.decode(answers, range(7), 2).bad == (0, 1)


def test_a_thousand_clients_are_decoded_with_a_third_of_them_wrong() -> None:
    code = LagrangeCode(LARGE, 64, 100, 1000)
    blocks = LARGE.random((64, 2))
    shares = code.encode(blocks)
    answers = LARGE.mul(shares, shares)
    bad = np.random.default_rng(0).choice(1000, (1000 - 327) // 2, replace=False)
    answers[bad, 1] = LARGE.random(len(bad))
    decoded = code.decode(answers, range(1000), 326, total=True)
    assert {*decoded.bad} == {*bad.tolist()}
    assert decoded.values.tolist() == LARGE.sum(LARGE.mul(blocks, blocks), axis=0).tolist()
