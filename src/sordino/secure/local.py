"""A round of SecPC in one process: every message is made into bytes and read back, as on a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from sordino.secure.client import Client
from sordino.secure.clustering import Clusters, Exchange
from sordino.secure.errors import SecureError
from sordino.secure.mailbox import Rejection
from sordino.secure.messages import kind_of
from sordino.secure.search import Start
from sordino.secure.server import Averages, RevealedDistances, Server
from sordino.secure.setup import Setup

Result = TypeVar("Result")
ITERATIONS = 50  # of k-means, at most
Drop = Mapping[int, int] | Callable[[int, int], bool]


class Party(Protocol):
    """A client's end of a protocol, as far as its carrier knows it."""

    @property
    def number(self) -> int:
        """Which of the clients it is, from 0."""
        ...

    def handle(self, content: bytes) -> bytes:
        """The reply to a message of the server.

        Raises:
            SecureError: it refuses.
        """
        ...


@dataclass
class Traffic:
    """Bytes on the wire, and how many exchanges of messages there were.

    Attributes:
        sent: bytes by sender ("server", or the client's number) and kind of message.
        received: bytes by client.
        exchanges: rounds of messages; all clients are asked at once.
        refusals: clients' reasons for not answering, (client, reason).
    """

    sent: dict[str | int, Counter[str]] = field(default_factory=dict)
    received: Counter[int] = field(default_factory=Counter)
    exchanges: int = 0
    refusals: list[tuple[int, str]] = field(default_factory=list)

    def of_client(self, client: int) -> int:
        """All bytes that a client sent and received."""
        return sum(self.sent.get(client, Counter()).values()) + self.received[client]


@dataclass(frozen=True)
class Refusal:
    """A client does not answer a message.

    Attributes:
        reason: in words.
    """

    reason: str


# Brings a message to each of some clients and returns the replies that came.
Carrier = Callable[[Mapping[int, bytes]], Iterable[tuple[int, bytes | Refusal]]]


class SharedExchange:
    """The server's end of a round with its clients, who are some of a federation's.

    Args:
        setup: the round's numbers.
        clients: their numbers in the federation, ascending.
        carrier: brings messages to them, by their place among `clients`.

    Attributes:
        server: the protocol's server, with all that it saw.
        clients, traffic: of this round.
    """

    def __init__(self, setup: Setup, clients: Sequence[int], carrier: Carrier) -> None:
        self.server, self.clients, self.traffic = Server(setup), tuple(clients), Traffic()
        self._carrier = carrier

    def cluster(self, start: Start) -> Clusters:
        """Cluster the clients' points; see `Server.cluster`."""
        return carry_exchange(self.server.cluster(start, ITERATIONS), self._carrier, self.traffic)

    def average(self, sets: Sequence[Iterable[int]]) -> Averages:
        """Return the means of the clients' vectors within disjoint sets; see `Server.average`."""
        return carry_exchange(self.server.average(sets), self._carrier, self.traffic)


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """The outcome of a round.

    Attributes:
        result: what the server's exchange gave.
        opened: all distances that the server saw.
        rejected: what the server did not take, and from whom.
        traffic: bytes, exchanges, refusals.
    """

    result: Result
    opened: tuple[RevealedDistances, ...]
    rejected: tuple[Rejection, ...]
    traffic: Traffic


def run(
    clients: Sequence[Client],
    server: Server,
    start: Start,
    iterations: int = 50,
    drop: Drop | None = None,
) -> Outcome[Clusters]:
    """Cluster the clients' points; see `Server.cluster`.

    Args:
        clients: those of the N who are there.
        server: a server that has not clustered yet.
        start: first centers, or their number, or how it adapts.
        iterations: at most so many times are new centers computed.
        drop: for clients who vanish, the exchange from which on they are not there any more (1 is joining, 2 dealing, 3
            delivery, further ones questions); or whether a client misses an exchange, by (client, exchange).

    Raises:
        SecureError: too few clients answered, or answers contradict each other beyond correction.
        DataError: a client's point does not fit what was agreed.
    """
    traffic = Traffic()
    result = run_exchange(server.cluster(start, iterations), clients, traffic, drop)
    return Outcome(result, tuple(server.opened), tuple(server.rejected), traffic)


def run_average(
    clients: Sequence[Client], server: Server, sets: Sequence[Iterable[int]], drop: Drop | None = None
) -> Outcome[Averages]:
    """The means of the clients' vectors within clusters; see `Server.average` and `run`.

    Exchanges are counted anew: after a clustering 1 is dealing, 2 delivery, 3 the sums.
    """
    traffic = Traffic()
    result = run_exchange(server.average(sets), clients, traffic, drop)
    return Outcome(result, tuple(server.opened), tuple(server.rejected), traffic)


def run_exchange(
    exchange: Exchange[Result], clients: Sequence[Party], traffic: Traffic, drop: Drop | None = None
) -> Result:
    """Carry an exchange of a server's to its end in one process, counting bytes; see `run` for `drop`."""
    return carry_exchange(exchange, in_process(clients, drop, traffic.exchanges), traffic)


def carry_exchange(exchange: Exchange[Result], carrier: Carrier, traffic: Traffic) -> Result:
    """Carry an exchange of a server's to its end, counting bytes."""
    replies: list[tuple[int, bytes]] | None = None
    while True:
        try:
            messages = next(exchange) if replies is None else exchange.send(replies)
        except StopIteration as end:
            result: Result = end.value
            return result
        traffic.exchanges += 1
        replies = []
        for client, reply in carrier(messages):
            _count(traffic, "server", messages[client])
            traffic.received[client] += len(messages[client])
            if isinstance(reply, Refusal):
                traffic.refusals.append((client, reply.reason))
                continue
            _count(traffic, client, reply)
            replies.append((client, reply))


def in_process(clients: Sequence[Party], drop: Drop | None = None, exchanges: int = 0) -> Carrier:
    """Return a carrier to clients in this process.

    Args:
        clients: their ends.
        drop: see `run`.
        exchanges: how many there were before, for `drop`.
    """
    by_number = {client.number: client for client in clients}
    count = exchanges

    def carry(messages: Mapping[int, bytes]) -> list[tuple[int, bytes | Refusal]]:
        nonlocal count
        count += 1
        reached = [n for n in messages if n in by_number and not _missing(drop, n, count)]
        return [(number, answered(by_number[number], messages[number])) for number in reached]

    return carry


def answered(client: Party, content: bytes) -> bytes | Refusal:
    """Return a client's reply to a message, or why it refuses."""
    try:
        return client.handle(content)
    except SecureError as error:
        return Refusal(str(error))


def _missing(drop: Drop | None, client: int, exchange: int) -> bool:
    if drop is None:
        return False
    return exchange >= drop.get(client, exchange + 1) if isinstance(drop, Mapping) else drop(client, exchange)


def _count(traffic: Traffic, sender: str | int, content: bytes) -> None:
    traffic.sent.setdefault(sender, Counter())[kind_of(content)] += len(content)
