"""The server of SecPC. It relays sealed shares, opens distances and sums, and clusters. It never sees a point or a
vector.

`cluster` and `average` are generators. They yield the messages for each client, `{client: bytes}`,
and receive the replies, `[(client, bytes), ...]`. The transport authenticates the senders. `run`
carries the messages in one process.

**Steps.**

1. Clients join.
2. Each client deals Lagrange shares of its point, with shares of random masks.
3. The server relays them; clients report whose shares they refused.
4. As often as the clustering asks, the server names sets of clients. Each client evaluates
   || |S| x_i - sum_{l in S} x_l ||^2 at its point for every client i and set S, and adds a mask. The server decodes.
5. The same happens with vectors, of which sums over clusters are opened once.

**What the server learns with `reveal = "distances"`.** It learns who took part, and the sets that
it asked about, which are its own. For every client i and set S asked about, it learns the squared
distance of x_i to the mean of S, in quantization steps, exactly. It learns nothing else, by any
computation: an answer's polynomial carries a mask that is uniform among all polynomials of its
degree whose sum over the blocks is zero, so that only the sum over the blocks is determined.
(Without masks, as in the paper, the server would see the distance within every block. If a block is
one number, that is every coordinate of x_i minus the center, up to sign.)

From enough distances much can be reconstructed. Distances to single clients are distances between
clients, and a full set of them gives all points up to a rotation and a shift. They are opened if
clients are first centers, and for two clients a split if the number of clusters adapts. `columns`
in the setup bounds how many distances are ever opened, and clients enforce it.

**What it learns with `reveal = "ratios"`.** Each row i comes multiplied by a factor r_i that only
client i knows, plus a whole number below r_i that differs by column: D becomes r_i D + e. So a row
gives the ratios of its distances, to one quantization step, hence assignments and silhouettes.
Exact ratios, without the remainder e, would give more, as the greatest common divisor of r_i D and
r_i D' is r_i more often than not. A row alone shows no absolute distance beyond the range that the
spread of the factors (2^factor_bits) leaves open. (A client's distance to itself, known to be zero,
is not answered, or its e would show the size of r_i.)

Rows together show more. D_il = D_li ties the factors of clients to whom distances were opened to
each other, and points in few dimensions tie all. So `ratios` hide the common scale, and make a
reconstruction harder; they do not make it impossible. If `spreads` is asked for, spreads are opened
as sums over the clusters of at least the minimum size of one partition; they fix the scale of those
clusters. The nearer of two centers is wrong only if two squared distances differ by less than a
squared quantization step.

**What clients learn.** Any T of them together learn nothing about others but the sets that the
server names. If they pass their shares to the server, it learns the whole polynomial of *their own*
rows, so the distances block by block between their own points and the centers. A sum over a set
then gives it the sum over the members that are not among them. The members of a set, who get its
mean, can compute the same without the server. So a set's sum is protected against all but two of
its members, and no set of fewer than T + 2 is opened (`fewest_members`). Members who vanish after
they dealt stay in the sum. Members who vanish before make the set smaller, and it is not opened if
that leaves too few. Sums of successive rounds are sums of different vectors. No client can prevent
the inference from two of them whose sets differ by one member.

**What is trusted.** Server and clients follow the protocol. For the effect of deviating clients on
results see `lagrange`; beyond that, a client can falsify its own row, whose masks it deals. The
server could name different sets to different clients. For this reason sums of vectors need more
than (N + T) / 2 answers, as T colluders may help it to two of them. Distances are protected alike
if 2 (B + T - 1) + 1 is more than that. Below it, such a server could open two distances behind one
mask, and learn the difference of their polynomials. The server must not be able to read the
messages that it relays: `cipher`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sordino.secure.clustering import Clusters
from sordino.secure.distances import Exchange, Integers, RevealedDistances, Set
from sordino.secure.encryption import is_key
from sordino.secure.errors import SecureError, TooFewAnswers
from sordino.secure.field import Elements
from sordino.secure.mailbox import Mailbox, Rejection
from sordino.secure.messages import (
    Answer,
    Deal,
    Delivery,
    Join,
    Message,
    Partition,
    Purpose,
    Query,
    Receipt,
    Shares,
    pack,
)
from sordino.secure.search import Start, search
from sordino.secure.setup import Setup

__all__ = ["Averages", "RevealedDistances", "Server"]

KEY_BYTES = 32  # of X25519; other ciphers' keys are not looked at


@dataclass(frozen=True)
class Averages:
    """Means of full vectors within clusters.

    Attributes:
        means: [L] for each cluster, or None if it was not opened.
        members: the clients of each cluster whose vectors were summed. Clusters below the minimum
            size are listed, and not summed.
    """

    means: tuple[NDArray[np.float64] | None, ...]
    members: tuple[Set, ...]


class Server:
    """One round's server.

    Args:
        setup: the round's numbers.

    Attributes:
        opened: every column of distances that was decoded.
        clients: the clients whose points are clustered.
    """

    def __init__(self, setup: Setup) -> None:
        setup.check()
        self.setup, self.comparable = setup, setup.reveal == "distances"
        self.opened: list[RevealedDistances] = []
        self.clients: tuple[int, ...] = ()
        self._joined: dict[int, bytes] = {}
        self._mailbox = Mailbox(setup.round, range(setup.clients))
        self._columns: dict[Set, Integers] = {}
        self._step = self._masks = 0

    def cluster(self, start: Start, iterations: int = 50) -> Exchange[Clusters]:
        """Cluster the clients' points.

        Args:
            start: the start of the search; see `search`.
            iterations: the largest number of computations of new centers.

        Returns:
            The clusters of the clients who dealt shares.

        Raises:
            SecureError: too few clients answered, answers contradict each other beyond correction,
                or a first center is a client who dealt no shares.
        """
        if not self.clients:
            self.clients = yield from self._share("point")
        return (yield from search(self, start, iterations))

    @property
    def rejected(self) -> list[Rejection]:
        """Return the rejected messages and their senders."""
        return self._mailbox.rejected

    def affords(self, sets: Sequence[Set]) -> bool:
        """Return true if the columns of these sets may still be opened."""
        return self._masks + len({*sets} - self._columns.keys()) <= self.setup.columns

    def columns(self, sets: Sequence[Set]) -> Exchange[Integers]:
        """Open the columns of sets that are not open yet; see `distances.Distances`.

        1. Name the sets, and the masks to use.
        2. Take answers of the right shape, with numbers in the field.
        3. Decode the sum over the blocks; name and exclude clients whose answers contradict the
           others'.
        """
        new = [members for members in dict.fromkeys(sets) if members not in self._columns]
        if new:
            if not self.affords(new):
                spent = f"{self.setup.columns} columns of distances were agreed and are spent; plan for more"
                raise SecureError(spent)
            rows = pack([self.clients], self.setup.clients)[0]
            columns = pack(new, self.setup.clients)
            query = Query(self.setup.round, self._next_step(), self._masks, rows, columns)
            self._masks += len(new)
            shape = (len(self.clients), len(new))
            values = yield from self._opened(query, shape, "distances")
            for number, members in enumerate(new):
                column = np.array(values[:, number].tolist(), object)
                self._columns[members] = column
                self.opened.append(
                    RevealedDistances(tuple(sorted(members)), self.clients, tuple(column)),
                )
        return np.stack([self._columns[members] for members in sets], axis=1)

    def spreads(self, sets: Sequence[Iterable[int]]) -> Exchange[list[float | None]]:
        """Open unbiased mean squared distances to the own center, in the points' units; None below the minimum.

        With "distances" they are already known from the distances. This is for "ratios", opens only
        sums, and may be asked once a round.
        """
        members = [frozenset(group) & {*self.clients} for group in sets]
        large = [group for group in members if len(group) >= self.setup.minimum]
        result: list[float | None] = [None] * len(members)
        if large:
            bits = pack(large, self.setup.clients)
            question = Partition(self.setup.round, self._next_step(), "point", bits)
            sums = yield from self._opened(question, (len(large), 1), "spreads")
            for group, total in zip(large, sums[:, 0].tolist(), strict=True):
                step, size = 2.0**-self.setup.bits, len(group)
                result[members.index(group)] = total / size**2 / (size - 1) * step**2
        return result

    def average(self, sets: Sequence[Iterable[int]]) -> Exchange[Averages]:
        """Open the means of the clients' full vectors within disjoint sets, once a round.

        Members who dealt no vector are left out; a set of fewer than the minimum is not opened.

        Raises:
            SecureError: too few clients answered, or answers contradict each other beyond
                correction.
        """
        dealt = {*(yield from self._share("vector"))}
        members = tuple(frozenset(group) & dealt for group in sets)
        large = [group for group in members if len(group) >= self.setup.minimum]
        means: list[NDArray[np.float64] | None] = [None] * len(members)
        if large:
            bits = pack(large, self.setup.clients)
            question = Partition(self.setup.round, self._next_step(), "vector", bits)
            sums = yield from self._summed_vectors(question, len(large))
            for group, total in zip(large, sums, strict=True):
                means[members.index(group)] = self.setup.vectors.decode(total) / len(group)
        return Averages(tuple(means), members)

    def _share(self, purpose: Purpose) -> Exchange[tuple[int, ...]]:
        """Let clients deal shares to each other; return the dealers whose shares are held by those who can answer.

        1. Let clients join, if they have not.
        2. Ask for sealed shares; relay them.
        3. Leave out dealers whose shares more than T clients refused. If fewer refused, the
           refusing clients are excluded instead: if the shares were wrong, more than T honest
           clients would have refused them too.
        """
        setup = self.setup
        if not self._joined:
            yield from self._join()
        joined, keys = tuple(self._joined), tuple(self._joined.values())
        public = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), len(keys[0]))
        deal = Deal(setup.round, purpose, np.array(joined, np.int64), public)
        dealt = yield from self._mailbox.ask(
            deal,
            Shares,
            "dealing",
            lambda shares: self._misdealt(shares, purpose),
        )
        self._mailbox.keep_common(dealt, "dealing", lambda shares: shares.payloads.shape[1])
        if len(dealt) < 2:
            raise TooFewAnswers("dealing", 2, len(dealt))
        dealers = np.array(sorted(dealt), np.int64)
        # [joined, dealers, bytes]
        payloads = np.stack([dealt.pop(dealer).payloads for dealer in sorted(dealt)], axis=1)
        deliveries: dict[int, Message] = {
            client: Delivery(setup.round, purpose, dealers, payloads[number]) for number, client in enumerate(joined)
        }
        receipts = yield from self._mailbox.ask(
            deliveries,
            Receipt,
            "delivery",
            lambda receipt: None if receipt.purpose == purpose else f"out of turn: a receipt of {receipt.purpose}s",
        )
        return self._accepted(dealers.tolist(), receipts)

    def _join(self) -> Exchange[None]:
        def wrong(join: Join) -> str | None:
            # A key of small order, passed on, would have every client refuse.
            weak = len(join.key) == KEY_BYTES and not is_key(join.key.tobytes())
            return "malformed: a public key that is not one" if weak else None

        joins = yield from self._mailbox.ask(self.setup, Join, "joining", wrong)
        self._mailbox.keep_common(joins, "joining", lambda join: len(join.key))
        if len(joins) < self.setup.needed:
            raise TooFewAnswers("joining", self.setup.needed, len(joins))
        self._joined = {sender: joins[sender].key.tobytes() for sender in sorted(joins)}
        self._mailbox.clients = tuple(self._joined)

    def _accepted(self, dealers: Sequence[int], receipts: dict[int, Receipt]) -> tuple[int, ...]:
        refusing: dict[int, set[int]] = {dealer: set() for dealer in dealers}
        for client, receipt in receipts.items():
            for dealer in refusing.keys() & {*receipt.refused.tolist()}:
                refusing[dealer].add(client)
        for dealer, clients in refusing.items():
            if len(clients) > self.setup.privacy:
                self._mailbox.exclude(
                    dealer,
                    "dealing",
                    f"its shares were refused by clients {sorted(clients)}",
                )
        accepted = tuple(dealer for dealer in dealers if len(refusing[dealer]) <= self.setup.privacy)
        for dealer in accepted:
            for client in sorted(refusing[dealer] - self._mailbox.excluded):
                self._mailbox.exclude(
                    client,
                    "delivery",
                    f"it refuses the shares of client {dealer}, which others took",
                )
        if len(accepted) < 2:
            raise TooFewAnswers("dealing", 2, len(accepted))
        return accepted

    def _opened(
        self,
        question: Query | Partition,
        shape: tuple[int, int],
        step: str,
    ) -> Exchange[Elements]:
        """Decode the sums over the blocks of the clients' answers about points, [*shape]."""
        clients, answers = yield from self._answers(question, shape, step)
        decoded = self.setup.point_code.decode(
            answers,
            clients,
            self.setup.needed - 1,
            step,
            total=True,
        )
        self._name(decoded.bad, step)
        return decoded.values

    def _summed_vectors(self, question: Partition, count: int) -> Exchange[Elements]:
        """Decode sums of vectors, [K, L]."""
        setup = self.setup
        clients, answers = yield from self._answers(
            question,
            (count, setup.vector_block),
            "averaging",
        )
        decoded = setup.vector_code.decode(answers, clients, setup.vector_code.degree, "averaging")
        self._name(decoded.bad, "averaging")
        by_set = decoded.values.transpose(1, 0, 2)  # from [B, K, block]
        return by_set.reshape(count, -1)[:, : setup.length]

    def _answers(
        self, question: Query | Partition, shape: tuple[int, int], step: str
    ) -> Exchange[tuple[list[int], Elements]]:
        def wrong(answer: Answer) -> str | None:
            if answer.step != question.step:
                return f"late: an answer to step {answer.step} at step {question.step}"
            if answer.values.shape != shape:
                return f"malformed: values of shape {answer.values.shape} where {shape} is due"
            if (answer.values >= self.setup.modulus).any():
                return "out of range: numbers that are not in the field"
            return None

        replies = yield from self._mailbox.ask(question, Answer, step, wrong)
        clients = sorted(replies)
        values = [replies[client].values for client in clients]
        return clients, np.stack(values) if values else np.zeros((0, *shape), np.uint64)

    def _misdealt(self, shares: Shares, purpose: Purpose) -> str | None:
        if shares.purpose != purpose:
            return f"out of turn: shares of a {shares.purpose} where those of a {purpose} are due"
        if len(shares.payloads) != len(self._joined):
            return f"malformed: {len(shares.payloads)} payloads for {len(self._joined)} clients"
        return None

    def _name(self, clients: Sequence[int], step: str) -> None:
        for client in clients:
            self._mailbox.exclude(client, step, "its answer contradicts the others'")

    def _next_step(self) -> int:
        self._step += 1
        return self._step
