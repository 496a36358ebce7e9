"""The ring against Python's integers; packing; fixed point."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.arithmetic.ring import centered, decode, encode, lowest, share
from sordino.mpc.errors import OutOfRange

WORDS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**32]) | st.integers(-(2**63), 2**63 - 1)


def wrapped(value: int, bits: int = 64) -> int:
    """The representative of least size."""
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=9))
def test_arithmetic_is_that_of_integers_modulo_two_to_the_64(pairs: list[tuple[int, int]]) -> None:
    left, right = torch.tensor(pairs).T
    assert (left + right).tolist() == [wrapped(a + b) for a, b in pairs]
    assert (left * right).tolist() == [wrapped(a * b) for a, b in pairs]
    assert (left * right).sum().item() == wrapped(sum(a * b for a, b in pairs))
    first, second = share(left)
    assert ((first + second) == left).all()


@given(WORDS, st.integers(1, 64))
def test_representatives_modulo_fewer_bits(value: int, bits: int) -> None:
    integer = torch.tensor(value)
    assert centered(integer, bits).item() == wrapped(value, bits)
    assert lowest(integer, bits).item() == (wrapped(value) if bits == 64 else value % 2**bits)


@given(st.floats(-1e6, 1e6), st.integers(0, 24))
def test_fixed_point_is_off_by_half_of_the_last_bit_at_most(value: float, fraction: int) -> None:
    assert abs(decode(encode(value, fraction), fraction).item() - value) <= 2.0 ** -(fraction + 1)


@pytest.mark.parametrize("value", [2.0**46, -(2.0**46), float("nan"), float("inf")])
def test_a_number_too_large_for_fixed_point_is_refused(value: float) -> None:
    with pytest.raises(OutOfRange, match="fewer fraction bits"):
        encode(torch.tensor([1.0, value]), 16)


@pytest.mark.parametrize("value", [0, -1, 2**40])
def test_a_share_alone_is_uniform(value: int) -> None:
    for part in share(torch.full((40_000,), value)):
        octets = part.numpy().view("u1").reshape(-1, 8)
        for place in range(8):
            counts = torch.bincount(torch.from_numpy(octets[:, place].astype("i8")), minlength=256)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-8 / 48


def test_streams_of_a_generator_repeat_and_differ() -> None:
    one, other = Prg(bytes(32)), Prg(bytes(31) + b"x")
    assert (one.integers(7, (50,)) == one.integers(7, (5, 10)).reshape(-1)).all()
    for different in (one.integers(8, (50,)), other.integers(7, (50,)), Prg().integers(7, (50,))):
        assert not (one.integers(7, (50,)) == different).any()
    assert one.integers(7, (1000,), bits=5).unique().tolist() == list(range(32))


def test_a_stream_is_aes_256_in_counter_mode() -> None:
    """SP 800-38A, F.5.5: with a zero message the key stream is the cipher of the counter blocks."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key, stream = bytes(range(32)), 3
    block = (
        Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(stream.to_bytes(8, "big") + (1).to_bytes(8, "big"))
    )
    assert Prg(key).integers(stream, (4,))[2:].numpy().tobytes() == block
