"""Envelopes: what is packed comes out again, equal parts travel once, and nothing read is trusted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sordino.runtime import envelope
from sordino.runtime.envelope import MAGIC, Envelope
from sordino.runtime.messages import MessageError

ENDS = st.sampled_from([b"", b"x" * 63, b"x" * 64, b"tensors of a broadcast" * 10])
CONTENTS = st.builds(
    lambda heads, end: {client: head + end for client, head in heads.items()},
    st.dictionaries(st.integers(0, 10**6), st.binary(max_size=20), max_size=6),
    ENDS,
)


@given(CONTENTS, st.dictionaries(st.integers(0, 99), st.text(max_size=5), max_size=3))
def test_what_is_packed_comes_out_again(contents: dict[int, bytes], refused: dict[int, str]) -> None:
    packed = Envelope("round", "ab", {"a": [1, None]}, contents, refused)
    assert Envelope.decode(packed.encode()) == packed
    assert packed.encode() == Envelope.decode(packed.encode()).encode(), "equal envelopes are equal bytes"


def test_what_all_clients_of_a_site_get_is_sent_once() -> None:
    broadcast = bytes(range(256)) * 40
    contents = {client: f"place {client}".encode() + broadcast for client in range(500)}
    sent = Envelope("round", "ab", {}, contents).encode()
    assert Envelope.decode(sent).contents == contents
    assert len(sent) < len(broadcast) + 500 * 30
    personal = {client: bytes([client % 256]) + broadcast + bytes([client % 256]) for client in range(5)}
    assert len(Envelope("round", "ab", {}, personal).encode()) > 5 * len(broadcast)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(content: bytes) -> None:
    head = len(content).to_bytes(4, "little")
    for sent in (content, MAGIC + content, MAGIC + head + content):
        with pytest.raises(MessageError):
            Envelope.decode(sent)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shared": 71}, "entries of another type"),  # longer than a content
        ({"shared": -1}, "entries of another type"),
        ({"shared": True}, "entries of another type"),
        ({"shared": "64"}, "entries of another type"),
        ({"shared": 65}, "bytes where its head counts"),
        ({"contents": [[1, 70], [2, 71]]}, "bytes where its head counts"),
        ({"contents": []}, "entries of another type"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(change: dict[str, object], told: str) -> None:
    sent = Envelope("round", "ab", {}, {1: b"first " + b"x" * 64, 2: b"second" + b"x" * 64}).encode()
    length = int.from_bytes(sent[8:12], "little")
    head = json.loads(sent[12 : 12 + length])
    assert head["shared"] == 64
    changed = json.dumps(head | change).encode()
    with pytest.raises(MessageError, match=told):
        Envelope.decode(MAGIC + len(changed).to_bytes(4, "little") + changed + sent[12 + length :])


def test_a_small_message_does_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {client: bytes(1000) for client in range(50)}
    sent = Envelope("round", "ab", {}, contents).encode()
    assert len(sent) < 2500
    monkeypatch.setattr(envelope, "EXPANDED_BYTES", 49_999)
    with pytest.raises(MessageError, match="50,000 bytes where at most 49,999"):
        Envelope.decode(sent)
    monkeypatch.setattr(envelope, "EXPANDED_BYTES", 10)
    assert Envelope.decode(Envelope("round", "ab", {}, {1: bytes(1000)}).encode()).contents, "what was sent is read"
