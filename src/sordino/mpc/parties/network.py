"""Time of a computation on shares on a network: a model, and a channel that imitates a network to check the model.

Both servers send at once. So a round takes the delay of one message, and only the bytes of one direction count. The
model has no processor time. That is measured, and comes on top.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sordino.errors import ConfigError
from sordino.mpc.arithmetic.packing import Octets
from sordino.mpc.dealing.costs import Cost
from sordino.mpc.protocols.party import Channel


@dataclass(frozen=True)
class Network:
    """A network between two parties.

    Attributes:
        name: for tables.
        rate: bits a second, each way.
        delay: seconds that the shortest message needs one way.
    """

    name: str
    rate: float
    delay: float

    def online(self, cost: Cost) -> float:
        """Return the seconds that messages between the servers need."""
        return cost.rounds * self.delay + 8 * cost.online / self.rate

    def offline(self, cost: Cost) -> float:
        """Return the seconds that the dealer's bytes need, as one stream. They can be sent beforehand."""
        return (self.delay if cost.offline else 0.0) + 8 * cost.offline / self.rate


LAN = Network("LAN (10 Gbit/s, 0.5 ms)", 10e9, 0.5e-3)
WAN = Network("WAN (100 Mbit/s, 40 ms)", 100e6, 40e-3)


def network_of(text: str) -> Network:
    """Parse "lan", "wan", or "RATE,DELAY" in Mbit/s and ms.

    Raises:
        ConfigError: the text is none of these.
    """
    known = {"lan": LAN, "wan": WAN}
    if text.lower() in known:
        return known[text.lower()]
    try:
        rate, delay = (float(part) for part in text.split(","))
        if rate > 0 and delay >= 0:
            return Network(f"{rate:g} Mbit/s, {delay:g} ms", rate * 1e6, delay * 1e-3)
    except ValueError:
        pass
    raise ConfigError("--imitate", text, "must be lan, wan, or RATE,DELAY in Mbit/s and ms, e.g. 100,40")


class Throttled:
    """A channel as slow as a network: messages are delivered when they would have arrived there.

    Args:
        channel: carries the messages.
        network: to imitate.
    """

    def __init__(self, channel: Channel, network: Network) -> None:
        self._channel, self._network = channel, network

    def exchange(self, content: Octets) -> Octets:
        """See `Channel`."""
        time.sleep(8 * len(content) / self._network.rate)  # the last bit leaves
        reply = self._channel.exchange(content)
        time.sleep(self._network.delay)
        return reply
