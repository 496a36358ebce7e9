"""A server, or a client, of SecPC that does not keep to the protocol: other numbers, and other keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sordino.secure import Client, EncryptingCipher, SecureError, Server, Setup, plan, run
from sordino.secure.messages import Deal, Delivery, Join, Receipt, Shares, read

N, WIDTH = 8, 4


def agreed(clients: int = N) -> Setup:
    return plan(
        clients=clients, width=WIDTH, largest=1.0, reveal="ratios", columns=20, privacy=2, length=6, tolerance=0
    )


AGREED = agreed()


def client_of(number: int = 0, agree: Setup | None = AGREED) -> Client:
    return Client(number, np.zeros(WIDTH), np.zeros(6), cipher=EncryptingCipher(), privacy=2, agreed=agree)


@pytest.mark.parametrize(
    "changes",
    [
        {"reveal": "distances", "factor_bits": 0},
        {"columns": 21},
        {"bits": 5},
        {"bits": 10**4},  # at which a float overflows
        {"privacy": 3, "minimum": 5},
        {"minimum": 5},
        {"privacy": 1, "minimum": 3},
        {"round": 2},
        {"clients": N + 9},
        {"largest": 0.5},
        {"vector_bits": 3},
        {"vector_largest": 2.0},
        {"modulus": 4_294_967_291},
    ],
)
def test_a_client_joins_only_with_the_numbers_that_it_computes(changes: dict[str, Any]) -> None:
    """A server that names others would have more opened: exact distances, say, where ratios were agreed."""
    offered = replace(agreed(N), **changes)
    client = client_of()
    with pytest.raises(SecureError, match="client 0 agreed on"):
        client.handle(offered.to_bytes())
    assert isinstance(read(client.handle(agreed(N).to_bytes())), Join)


def joined(setups: list[Setup]) -> tuple[list[Client], Deal]:
    clients = [client_of(number, None) for number in range(len(setups))]
    joins = [read(client.handle(setup.to_bytes())) for client, setup in zip(clients, setups, strict=True)]
    keys = [join.key for join in joins if isinstance(join, Join)]
    return clients, Deal(1, "point", np.arange(len(setups)), np.stack(keys))


def test_shares_dealt_in_a_round_of_other_numbers_are_not_opened() -> None:
    """A server that tells clients different numbers has them share nothing with each other."""
    setup = agreed(N)
    other = replace(setup, bits=setup.bits - 1)
    clients, deal = joined([setup, setup, other, *[setup] * (N - 3)])
    dealt = [read(client.handle(deal.to_bytes())) for client in clients]
    payloads = np.stack([each.payloads[0] for each in dealt if isinstance(each, Shares)])
    receipt = read(clients[0].handle(Delivery(1, "point", np.arange(N), payloads).to_bytes()))
    assert isinstance(receipt, Receipt)
    assert receipt.refused.tolist() == [2]


def test_a_refused_request_to_deal_changes_nothing() -> None:
    """Keys of small order, another key for oneself, and one key for two: refused, and then the right ones are taken."""
    clients, deal = joined([agreed(N)] * N)
    for number, key, match in (
        (3, np.zeros(32, np.uint8), "the public key of client 3 is not one"),
        (0, np.frombuffer(EncryptingCipher().public_key, np.uint8), "another key of client 0 than it joined with"),
        (3, deal.keys[4], "one key twice"),
        (3, deal.keys[0], "one key twice"),
    ):
        keys = deal.keys.copy()
        keys[number] = key
        with pytest.raises(SecureError, match=match):
            clients[0].handle(replace(deal, keys=keys).to_bytes())
    assert isinstance(read(clients[0].handle(deal.to_bytes())), Shares)


class WeakCipher(EncryptingCipher):
    """Tells a public key of small order."""

    public_key = bytes(32)  # type: ignore[assignment]


def test_a_client_with_a_weak_key_is_named_and_the_others_go_on() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (N, WIDTH))
    ciphers = [EncryptingCipher() for _ in range(N - 1)] + [WeakCipher()]
    clients = [
        Client(number, point, cipher=cipher) for number, (point, cipher) in enumerate(zip(points, ciphers, strict=True))
    ]
    outcome = run(clients, Server(plan(clients=N, width=WIDTH, largest=1.0)), [0, 1])
    assert outcome.result.clients == tuple(range(N - 1))
    assert [(each.client, each.reason) for each in outcome.rejected] == [
        (N - 1, "malformed: a public key that is not one")
    ]
