"""The time model, and the channel that imitates a network, against each other and by hand."""

from __future__ import annotations

import time

import pytest

from sordino.errors import ConfigError
from sordino.mpc.dealing.costs import Cost
from sordino.mpc.parties.network import LAN, WAN, Network, Throttled, network_of


def test_seconds_by_hand() -> None:
    cost = Cost(rounds=10, online=125_000, offline=1_250_000)
    assert WAN.online(cost) == pytest.approx(10 * 0.040 + 1e6 / 100e6)
    assert WAN.offline(cost) == pytest.approx(0.040 + 1e7 / 100e6)
    assert LAN.online(cost) == pytest.approx(10 * 0.0005 + 1e6 / 10e9)
    assert LAN.offline(Cost(rounds=3, online=5)) == 0


@pytest.mark.parametrize(("text", "network"), [("lan", LAN), ("WAN", WAN)])
def test_named(text: str, network: Network) -> None:
    assert network_of(text) == network


def test_given_in_numbers() -> None:
    found = network_of("100,40")
    assert (found.rate, found.delay) == (WAN.rate, WAN.delay)


@pytest.mark.parametrize("text", ["", "wifi", "100", "0,1", "10,-1", "1,2,3", "nan,1"])
def test_no_network(text: str) -> None:
    with pytest.raises(ConfigError, match="--imitate = .*lan, wan, or RATE,DELAY"):
        network_of(text)


def test_the_imitation_is_never_faster_than_the_model() -> None:
    """It may be slower, as the machine is busy: that is no property of it."""

    class Echo:
        def exchange(self, content: bytes) -> bytes:
            return content[::-1]

    network, messages = Network("slow", 1e6, 0.02), [b"a" * 5000, b"", b"bc" * 2500]
    channel, began = Throttled(Echo(), network), time.monotonic()
    assert [channel.exchange(content) for content in messages] == [content[::-1] for content in messages]
    assert time.monotonic() - began >= network.online(Cost(rounds=3, online=10000))
