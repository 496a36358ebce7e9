"""Sealed payloads: only their recipient reads them, only in their context."""

from __future__ import annotations

import pytest

from secure.test_secpc import groups
from sordino.secure import Client, EncryptingCipher, Pairs, SecureError, Server, plan, run
from sordino.secure.messages import Shares, read


def met(count: int = 3) -> list[EncryptingCipher]:
    sealers = [EncryptingCipher() for _ in range(count)]
    for cipher in sealers:
        cipher.meet({number: each.public_key for number, each in enumerate(sealers)})
    return sealers


def test_the_recipient_reads_what_was_sealed_for_it() -> None:
    sealers = met()
    for sender in range(3):
        for recipient in range(3):
            sealed = sealers[sender].seal(recipient, b"share", b"round 1")
            assert sealers[recipient].unseal(sender, sealed, b"round 1") == b"share"
            assert len(sealed) == len(b"share") + 16


@pytest.mark.parametrize("what", ["sender", "recipient", "context", "content", "direction", "round"])
def test_nothing_else_opens(what: str) -> None:
    sealers = met()
    sealed = sealers[0].seal(1, b"share", b"round 1")
    reader, sender, context = sealers[1], 0, b"round 1"
    if what == "sender":
        sender = 2
    elif what == "recipient":
        reader = sealers[2]
    elif what == "context":
        context = b"round 2"
    elif what == "content":
        sealed = bytes([sealed[0] ^ 1]) + sealed[1:]
    elif what == "direction":  # a payload sent back to who sealed it
        reader, sender = sealers[0], 1
    else:  # the next round's keys
        reader = met()[1]
    with pytest.raises(SecureError, match=f"client {sender}"):
        reader.unseal(sender, sealed, context)


def test_keys_that_are_none_or_that_change_are_refused() -> None:
    one, other = EncryptingCipher(), EncryptingCipher()
    with pytest.raises(SecureError, match="client 1 .* 32"):
        one.meet({1: b"short"})
    one.meet({1: other.public_key})
    with pytest.raises(SecureError, match="client 1 changed"):
        one.meet({1: EncryptingCipher().public_key})
    with pytest.raises(SecureError, match="no public key of client 5"):
        one.seal(5, b"", b"")
    weak = EncryptingCipher()
    with pytest.raises(SecureError, match="client 1 is not one"):  # of small order: everybody has the same secret
        weak.meet({2: other.public_key, 1: bytes(32)})
    with pytest.raises(SecureError, match="no public key of client 2"):  # all keys are taken, or none
        weak.seal(2, b"", b"")
    weak.meet({1: other.public_key})


def test_a_round_with_sealed_shares_finds_what_one_without_finds() -> None:
    points = groups(12)
    setup = plan(clients=12, width=points.shape[1], largest=1.0)
    dealt: list[bytes] = []

    class Watched(Client):
        """A client whose dealt payloads the test sees, as the server does."""

        def handle(self, content: bytes) -> bytes:
            reply = super().handle(content)
            message = read(reply)
            if isinstance(message, Shares):
                dealt.append(message.payloads.tobytes())
            return reply

    sealed = [Watched(number, point, cipher=EncryptingCipher()) for number, point in enumerate(points)]
    plain = [Client(number, point) for number, point in enumerate(points)]
    with_seals, without = (run(each, Server(setup), Pairs()).result for each in (sealed, plain))
    assert with_seals.labels.tolist() == without.labels.tolist() == [0, 1, 2] * 4
    held = sealed[1]._held["point"]
    assert dealt
    assert not any(held.values[0].tobytes() in payload for payload in dealt)
