from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.mpc.arithmetic.packing import MaskedShare, pack, packed_size, unpack, unpack_each
from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.arithmetic.ring import lowest
from sordino.mpc.errors import PartyLost

WORDS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**32]) | st.integers(-(2**63), 2**63 - 1)


@given(st.lists(WORDS, max_size=20), st.integers(1, 64))
def test_packing_keeps_the_low_bits_and_takes_no_more_bytes_than_they_need(values: list[int], bits: int) -> None:
    integers = torch.tensor(values, dtype=torch.int64)
    content = pack(integers, bits)
    assert len(content) == packed_size(len(values), bits) == -(-len(values) * bits // 8)
    assert int.from_bytes(content, "little") == sum(value % 2**bits << bits * i for i, value in enumerate(values))
    assert (unpack(content, (len(values),), bits) == lowest(integers, bits)).all()
    with pytest.raises(PartyLost, match="were due"):
        unpack(bytes(content) + b"x", (len(values),), bits)


def test_tensors_one_after_the_other() -> None:
    shapes, bits = [(3, 5), (), (0, 2), (7,)], [13, 64, 9, 8]
    values = [Prg(bytes(32)).integers(0, shape, width) for shape, width in zip(shapes, bits, strict=True)]
    content = b"".join(pack(value, width) for value, width in zip(values, bits, strict=True))
    for found, value in zip(unpack_each(content, shapes, bits), values, strict=True):
        assert torch.equal(found, value)
    for wrong in (content + b"0", content[:-1]):
        with pytest.raises(PartyLost, match="were due"):
            unpack_each(wrong, shapes, bits)


@pytest.mark.parametrize("bits", [1, 13, 46, 63])
@pytest.mark.parametrize("count", [8, 2**16, 2**16 + 8, 2**17 + 13])
def test_packing_of_many_goes_by_pieces(count: int, bits: int) -> None:
    integers = Prg(bytes(32)).integers(0, (count,))
    content = pack(integers, bits)
    assert len(content) == packed_size(count, bits)
    assert torch.equal(unpack(content, (count,), bits), lowest(integers, bits))


def wrapped(value: int) -> int:
    """As int64 has it."""
    return (value + 2**63) % 2**64 - 2**63


@given(
    st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS), max_size=20),
    st.integers(1, 64),
    st.sampled_from([1, 11]),
    st.sampled_from([0, 7]),
)
def test_covered_shares_open_to_their_sum(
    rows: list[tuple[int, int, int, int]], bits: int, times: int, shift: int
) -> None:
    """Against Python's integers: what is sent, and what comes out of both."""
    columns = torch.tensor(rows, dtype=torch.int64).view(-1, 4).T.contiguous()
    first = MaskedShare(columns[0], columns[1], bits, times, shift, up=True)
    second = MaskedShare(columns[2], columns[3], bits, times, shift)
    sent = [(wrapped(wrapped(a * times) + 2**shift - 1) >> shift) - b for a, b, _, _ in rows]
    other = [(wrapped(a * times) >> shift) - b for _, _, a, b in rows]
    assert first.packed() == pack(torch.tensor([wrapped(each) for each in sent], dtype=torch.int64), bits)
    sums = [wrapped((a + b) % 2**bits) for a, b in zip(sent, other, strict=True)]
    assert first.opened(second.packed()).tolist() == second.opened(memoryview(first.packed())).tolist() == sums
    with pytest.raises(PartyLost, match="astray"):
        first.opened(bytes(second.packed()) + b"0")
