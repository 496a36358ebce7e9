"""The server of SecPC: it relays sealed shares, opens distances and sums, clusters, and never sees a point or a vector.

`cluster` and `average` are generators. They yield the messages for each client, `{client: bytes}`, and are sent the
replies, `[(client, bytes), ...]`, where the transport vouches for who sent what. `run` drives them in one process.

**Steps.** (1) Clients join. (2) Each deals Lagrange shares of its point, with shares of random masks. (3) The server
relays them; clients say whose were in order. (4) As often as the clustering asks: the server names sets of clients,
each client evaluates || |S| x_i - sum_{l in S} x_l ||^2 at its point for every client i and set S and adds a mask,
and the server decodes. (5) The same with vectors, of which sums over clusters are opened once.

**What the server learns with `reveal = "distances"`.** Who took part; the sets that it asked about, which are its
own; and for every client i and set S asked about, the squared distance of x_i to the mean of S, in quantization
steps, exactly. Nothing else, whatever it computes: an answer's polynomial carries a mask that is uniform among all
polynomials of its degree whose sum over the blocks is zero, so that only the sum over the blocks is determined.
(Without masks, as in the paper, the server would see the distance within every block; where a block is one number,
that is every coordinate of x_i minus the center, up to sign.) From enough distances much can be reconstructed: those
to single clients, which are opened where clients are first centers and for two clients a split where the number of
clusters adapts, are distances between clients, and a full set of them gives all points up to a rotation and a shift.
`columns` in the setup bounds how many are ever opened, and clients enforce it.

**What it learns with `reveal = "ratios"`.** Each row i comes multiplied by a factor r_i that only client i knows,
plus a whole number below r_i that differs by column: D becomes r_i D + e. So a row gives the ratios of its distances,
to one quantization step, hence assignments and silhouettes; a whole number divided by another would give more, as the
greatest common divisor of r_i D and r_i D' is r_i more often than not. A row alone shows no absolute distance beyond
what the spread of the factors (2^factor_bits) leaves open (a client's distance to itself, known to be zero, is not
answered, or its e would show the size of r_i). Rows together show more: D_il = D_li ties the factors of clients to
whom distances were opened to each other, and points in few dimensions tie all. So `ratios` hide the common scale, and
make a reconstruction harder; they do not make it impossible. Spreads are opened as sums over the clusters of at least
the minimum size of one partition, if `spreads` is asked for, and fix the scale of those clusters. Nearer is decided
wrongly only where two squared distances differ by less than a squared quantization step.

**What clients learn.** Any T of them together nothing about others but the sets that the server names. If they pass
what they hold to the server, it learns of *their own* rows the whole polynomial, so distances block by block between
their own points and the centers; and a sum over a set gives it the sum over the members that are not among them. The
members of a set, who are told its mean, can do the same without the server. So a set's sum is protected against all
but two of its members, and no set of fewer than T + 2 is opened (`fewest_members`). Members who vanish after they
dealt stay in the sum; members who vanish before make the set smaller, and it is not opened if that leaves too few.
Sums of successive rounds are sums of different vectors; what two of them tell, whose sets differ by one member, no
client can prevent.

**What is trusted.** Server and clients follow the protocol; for what deviating clients can do to results see
`lagrange`; beyond that, a client can falsify its own row, whose masks it deals. The server could name different sets
to different clients. Sums of vectors need more than (N + T) / 2 answers for this reason, as T colluders may help it to
two of them. Distances are protected alike where 2 (B + T - 1) + 1 is more than that; below it, such a server could
open two distances behind one mask, and learn the difference of their polynomials. It must not be able to read what it
relays: `cipher`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sordino.secure.clustering import Clusters, Exchange, Floats, Integers, Set
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


@dataclass(frozen=True)
class RevealedDistances:
    """One column of distances that the server saw.

    Attributes:
        members: the set to whose center the distances are.
        clients: whose distances, [rows].
        values: as they were decoded, whole numbers: |S|^2 times the squared distance in quantization steps, times the
            row's factor (and plus a remainder below it) with "ratios".
    """

    members: tuple[int, ...]
    clients: tuple[int, ...]
    values: tuple[int, ...]

    def squared(self, step: float) -> Floats:
        """Squared distances [rows] in the points' units, where a quantization step is `step`."""
        return np.array([value / len(self.members) ** 2 for value in self.values]) * step**2


@dataclass(frozen=True)
class Averages:
    """Means of full vectors within clusters.

    Attributes:
        means: [L] for each cluster, or None where it was not opened.
        members: whose vectors were summed, for each cluster; those below the minimum size are listed, and not summed.
    """

    means: tuple[NDArray[np.float64] | None, ...]
    members: tuple[Set, ...]


class Server:
    """One round's server.

    Args:
        setup: the round's numbers.

    Attributes:
        opened: every column of distances that was decoded.
        clients: whose points are clustered.
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
            start: where to search; see `search`.
            iterations: at most so many times are new centers computed.

        Returns:
            The clusters of those who dealt shares.

        Raises:
            SecureError: too few clients answered, answers contradict each other beyond correction, or a first center
                is a client who dealt no shares.
        """
        if not self.clients:
            self.clients = yield from self._share("point")
        return (yield from search(self, start, iterations))

    @property
    def rejected(self) -> list[Rejection]:
        """What was not taken, and from whom."""
        return self._mailbox.rejected

    def affords(self, sets: Sequence[Set]) -> bool:
        """Whether so many columns may still be opened."""
        return self._masks + len({*sets} - self._columns.keys()) <= self.setup.columns

    def columns(self, sets: Sequence[Set]) -> Exchange[Integers]:
        """Open the columns of sets that are not open yet; see `clustering.Distances`.

        1. Name the sets, and the masks to use.
        2. Take answers of the right shape, with numbers in the field.
        3. Decode the sum over the blocks; name and exclude who contradicts.
        """
        new = [members for members in dict.fromkeys(sets) if members not in self._columns]
        if new:
            if not self.affords(new):
                raise SecureError(f"{self.setup.columns} columns of distances were agreed and are spent; plan for more")
            rows = pack([self.clients], self.setup.clients)[0]
            query = Query(self.setup.round, self._next_step(), self._masks, rows, pack(new, self.setup.clients))
            self._masks += len(new)
            shape = (len(self.clients), len(new))
            values = yield from self._opened(query, shape, "distances")
            for number, members in enumerate(new):
                column = np.array(values[:, number].tolist(), object)
                self._columns[members] = column
                self.opened.append(RevealedDistances(tuple(sorted(members)), self.clients, tuple(column)))
        return np.stack([self._columns[members] for members in sets], axis=1)

    def spreads(self, sets: Sequence[Iterable[int]]) -> Exchange[list[float | None]]:
        """Unbiased mean squared distances to the own center, in the points' units; None below the minimum.

        They are known from the distances already with "distances"; this is for "ratios", opens sums alone, and may be
        asked once a round.
        """
        members = [frozenset(each) & {*self.clients} for each in sets]
        large = [each for each in members if len(each) >= self.setup.minimum]
        result: list[float | None] = [None] * len(members)
        if large:
            question = Partition(self.setup.round, self._next_step(), "point", pack(large, self.setup.clients))
            sums = yield from self._opened(question, (len(large), 1), "spreads")
            for each, total in zip(large, sums[:, 0].tolist(), strict=True):
                step = 2.0**-self.setup.bits
                result[members.index(each)] = total / len(each) ** 2 / (len(each) - 1) * step**2
        return result

    def average(self, sets: Sequence[Iterable[int]]) -> Exchange[Averages]:
        """The means of the clients' full vectors within disjoint sets, once a round.

        Members who dealt no vector are left out; a set of fewer than the minimum is not opened.

        Raises:
            SecureError: too few clients answered, or answers contradict each other beyond correction.
        """
        dealt = {*(yield from self._share("vector"))}
        members = tuple(frozenset(each) & dealt for each in sets)
        large = [each for each in members if len(each) >= self.setup.minimum]
        means: list[NDArray[np.float64] | None] = [None] * len(members)
        if large:
            question = Partition(self.setup.round, self._next_step(), "vector", pack(large, self.setup.clients))
            sums = yield from self._summed_vectors(question, len(large))
            for each, total in zip(large, sums, strict=True):
                means[members.index(each)] = self.setup.vectors.decode(total) / len(each)
        return Averages(tuple(means), members)

    def _share(self, purpose: Purpose) -> Exchange[tuple[int, ...]]:
        """Let clients deal shares to each other; whose are held by those who can answer.

        1. Let clients join, if they have not.
        2. Ask for sealed shares; relay them.
        3. Leave out who dealt what more than T clients refused. Of those that fewer refused, it is the refusing client
           who cannot go on: more than T honest clients would have had to agree with it.
        """
        setup = self.setup
        if not self._joined:
            yield from self._join()
        joined, keys = tuple(self._joined), tuple(self._joined.values())
        public = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), len(keys[0]))
        deal = Deal(setup.round, purpose, np.array(joined, np.int64), public)
        dealt = yield from self._mailbox.ask(deal, Shares, "dealing", lambda shares: self._misdealt(shares, purpose))
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
        joins = yield from self._mailbox.ask(self.setup, Join, "joining")
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
                self._mailbox.exclude(dealer, "dealing", f"its shares were refused by clients {sorted(clients)}")
        accepted = tuple(dealer for dealer in dealers if len(refusing[dealer]) <= self.setup.privacy)
        for dealer in accepted:
            for client in sorted(refusing[dealer] - self._mailbox.excluded):
                self._mailbox.exclude(
                    client, "delivery", f"it refuses the shares of client {dealer}, which others took"
                )
        if len(accepted) < 2:
            raise TooFewAnswers("dealing", 2, len(accepted))
        return accepted

    def _opened(self, question: Query | Partition, shape: tuple[int, int], step: str) -> Exchange[Elements]:
        """The sums over the blocks of what clients answered about points, [*shape]."""
        clients, answers = yield from self._answers(question, shape, step)
        decoded = self.setup.point_code.decode(answers, clients, self.setup.needed - 1, step, total=True)
        self._name(decoded.bad, step)
        return decoded.values

    def _summed_vectors(self, question: Partition, count: int) -> Exchange[Elements]:
        """Sums of vectors, [K, L]."""
        setup = self.setup
        clients, answers = yield from self._answers(question, (count, setup.vector_block), "averaging")
        decoded = setup.vector_code.decode(answers, clients, setup.vector_code.degree, "averaging")
        self._name(decoded.bad, "averaging")
        return decoded.values.transpose(1, 0, 2).reshape(count, -1)[:, : setup.length]  # from [B, K, block]

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
