"""Messages are bytes: they come back as they were, and nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from sordino.secure.errors import SecureError
from sordino.secure.messages import (
    Answer,
    Deal,
    Delivery,
    Join,
    Message,
    Partition,
    Query,
    Receipt,
    Shares,
    expect,
    kind_of,
    pack,
    read,
    unpack,
)
from sordino.secure.setup import plan
from sordino.secure.sums.messages import SumMessage
from sordino.secure.sums.setup import SumSetup

BITS = pack([{0, 3}, {9}], 10)
MESSAGES: list[Message] = [
    plan(clients=12, width=5, largest=0.3, privacy=2, length=7, reveal="ratios"),
    Join(1, 3, np.frombuffer(b"key", np.uint8)),
    Join(1, 3, np.zeros(0, np.uint8)),
    Deal(2, "point", np.arange(3), np.zeros((3, 0), np.uint8)),
    Shares(2, 1, "vector", np.arange(12, dtype=np.uint8).reshape(3, 4)),
    Delivery(3, "point", np.array([0, 2]), np.arange(8, dtype=np.uint8).reshape(4, 2).T),
    Receipt(3, 1, "point", np.zeros(0, np.int64)),
    Query(3, 1, 0, BITS[0], BITS),
    Partition(3, 2, "vector", BITS),
    Answer(3, 0, 2, np.array([[0, 2**61 - 2]], np.uint64)),
]


def fields_of(message: Message) -> dict[str, object]:
    values = {each.name: getattr(message, each.name) for each in fields(message)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: type(each).__name__)
def test_every_message_comes_back(message: Message) -> None:
    content = message.to_bytes()
    again = read(content)
    assert type(again) is type(message)
    assert fields_of(again) == fields_of(message)
    assert again.to_bytes() == content
    assert kind_of(content) == type(message).__name__


def test_no_kind_of_message_is_forgotten_here() -> None:
    of_sums = {*SumMessage.__subclasses__(), SumSetup}  # these are in test_sum.py
    assert {type(each) for each in MESSAGES} == {*Message.KINDS.values()} - of_sums


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: type(each).__name__)
def test_a_message_that_was_cut_is_malformed(message: Message) -> None:
    content = message.to_bytes()
    for length in (0, 4, 8, len(content) // 2, len(content) - 1):
        with pytest.raises(SecureError, match="malformed"):
            read(content[:length])
    with pytest.raises(SecureError, match="malformed"):
        read(content + b"x")


@given(st.binary(max_size=200))
def test_noise_is_malformed_and_nothing_worse(content: bytes) -> None:
    with pytest.raises(SecureError, match="malformed"):
        read(content)
    assert kind_of(content) == "malformed"


@pytest.mark.parametrize(
    ("header", "arrays"),
    [
        ({"kind": "Answer", "round": 1, "sender": 0}, {"values": np.zeros((1, 1), np.uint64)}),
        ({"kind": "Answer", "round": 1, "sender": 0, "step": 1}, {}),
        ({"kind": "Answer", "round": 1, "sender": 0, "step": 1}, {"values": np.zeros((1, 1), np.int64)}),
        ({"kind": "Answer", "round": 1, "sender": 0, "step": 1}, {"values": np.zeros(1, np.uint64)}),
        ({"kind": "Answer", "round": 1, "sender": True, "step": 1}, {"values": np.zeros((1, 1), np.uint64)}),
        ({"kind": "Answer", "round": 1, "sender": 0, "step": "1"}, {"values": np.zeros((1, 1), np.uint64)}),
        ({"kind": "Answer", "round": 1, "sender": 0, "step": 1, "x": 1}, {"values": np.zeros((1, 1), np.uint64)}),
        ({"kind": "Message", "round": 1}, {}),
        ({"kind": "Nonsense", "round": 1}, {}),
        ({"kind": ["Answer"], "round": 1}, {}),
        ([1, 2], {}),
        ("Answer", {}),
    ],
)
def test_fields_that_are_missing_wrong_or_too_many_are_malformed(header: object, arrays: dict[str, np.ndarray]) -> None:
    arrays = arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    with pytest.raises(SecureError, match="malformed"):
        read(safetensors.numpy.save(arrays))


def test_a_message_of_another_kind_is_out_of_turn() -> None:
    with pytest.raises(SecureError, match="out of turn: Join where Answer was due"):
        expect(MESSAGES[1].to_bytes(), Answer)


@given(st.integers(1, 40), st.data())
def test_sets_are_packed_and_unpacked(clients: int, data: st.DataObject) -> None:
    sets = data.draw(st.lists(st.frozensets(st.integers(0, clients - 1)), max_size=5))
    bits = unpack(pack(sets, clients), clients)
    assert [frozenset(np.flatnonzero(row).tolist()) for row in bits] == sets
    with pytest.raises(SecureError, match="malformed"):
        unpack(np.zeros((1, -(-clients // 8) + 1), np.uint8), clients)


@pytest.mark.parametrize("where", ["header", "outside"])
def test_a_header_nested_deeper_than_a_parser_goes_is_malformed(where: str) -> None:
    """One such message would otherwise end the server's round for everybody."""
    deep = b"[" * 200_000
    content = len(deep).to_bytes(8, "little") + deep
    if where == "header":
        content = safetensors.numpy.save({"header": np.frombuffer(deep, np.uint8)})
    assert kind_of(content) == "malformed"
    with pytest.raises(SecureError, match="malformed"):
        read(content)


def test_a_kind_that_there_is_not_is_not_repeated() -> None:
    """Bytes are counted by kind, so another party's words would be in the counts."""
    content = safetensors.numpy.save({"header": np.frombuffer(json.dumps({"kind": "x" * 999}).encode(), np.uint8)})
    assert kind_of(content) == "malformed"
