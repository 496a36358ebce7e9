"""Streams are keyed by everything that they are for, in full."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sordino.randomness import KeyedRandomness, Streams, derive_key, generator

CPU = torch.device("cpu")
PARTS = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=8), min_size=1, max_size=4)


@given(PARTS, PARTS)
def test_keys_have_128_bits_and_differ_where_parts_do(one: list[int | str], other: list[int | str]) -> None:
    assert 0 <= derive_key(*one) < 2**128
    unambiguous = [[(type(x), x) for x in parts] for parts in (one, other)]
    if not any("\x1f" in str(x) for x in (*one, *other)):
        assert (derive_key(*one) == derive_key(*other)) == (unambiguous[0] == unambiguous[1])


def test_every_bit_of_a_key_counts() -> None:
    """torch's CPU generator would give equal numbers for keys that differ above their 32nd bit."""
    drawn = [np.random.Generator(np.random.Philox(key=1 << bit)).random() for bit in range(128)]
    assert len({0.0, *drawn}) == 129


def test_no_two_streams_of_a_long_run_are_equal() -> None:
    """Of 120,000 streams, seeds of 32 bits make two or more equal with probability 0.8; here none may be."""
    names = itertools.product(range(100), range(100), range(4), ("shared", "u", "v"))
    first = [
        generator(0, number, f"client {client}", f"{name}, {step}").random() for number, client, step, name in names
    ]
    assert len(set(first)) == 120_000
    assert stats.kstest(first, "uniform").pvalue > 1e-6


def test_a_stream_is_the_same_in_any_stack_and_no_other() -> None:
    whole, alone = Streams(7, 3, [0, 1, 2], CPU), Streams(7, 3, [2], CPU)
    assert torch.equal(whole.normal("x", 5)[2], alone.normal("x", 5)[0])
    assert torch.equal(whole.uniform("x", [1, 2, 4])[2], alone.uniform("x", [4])[0])
    others = [Streams(8, 3, [2], CPU), Streams(7, 4, [2], CPU), Streams(7, 3, [1], CPU)]
    assert all(not torch.equal(alone.normal("x", 5), each.normal("x", 5)) for each in others)
    assert not torch.equal(alone.normal("x", 5), alone.normal("y", 5))


def test_numbers_are_standard_normal() -> None:
    drawn = Streams(0, 1, range(10), CPU).normal("x", 1000).double().flatten().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-6


def keyed(key: bytes = bytes(32), clients: tuple[int, ...] = (0, 1)) -> KeyedRandomness:
    return KeyedRandomness(key, clients, CPU)


def test_keyed_noise_is_drawn_again_by_the_holder_of_the_key_alone() -> None:
    first, again, other = keyed(), keyed(), keyed(b"\1" + bytes(31))
    for draw in (
        lambda source: source.normal("noise", 5),
        lambda source: source.common_normal("noise", 5),
        lambda source: torch.stack(source.uniform("sample", [7, 7])),
        lambda source: torch.from_numpy(np.stack([words(3).view(np.int64) for words in source.words("bits")])),
    ):
        drawn = draw(first)
        assert torch.equal(drawn, draw(again))
        assert not torch.isin(drawn, draw(other)).any()


def test_keyed_noise_is_each_clients_own_and_each_purposes() -> None:
    """A client has the same numbers alone and in a stack, and no stream is used twice."""
    stack = keyed(clients=(0, 1, 2)).normal("noise", 100)
    assert torch.equal(keyed(clients=(2,)).normal("noise", 100)[0], stack[2])
    source = keyed(clients=(0, 1, 2))
    drawn = [stack, source.normal("other", 100), source.common_normal("noise", 100)]
    source.normal("noise", 100)
    drawn.append(source.normal("noise", 100))  # goes on, and does not begin again
    everything = torch.cat([part.flatten() for part in drawn])
    assert len(everything.unique()) > 0.999 * len(everything), "float32 has ties of its own, and few"


def test_keyed_noise_is_normal_and_uniform() -> None:
    source = keyed(clients=(0,))
    normal = source.normal("noise", 200_000)[0].double().numpy()
    assert stats.kstest(normal, "norm").pvalue > 1e-4
    assert stats.kstest(source.uniform("sample", [200_000])[0].numpy(), "uniform").pvalue > 1e-4
