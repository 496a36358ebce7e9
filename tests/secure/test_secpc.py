"""The protocol between clients and server: the same clusters as in the clear, and what must not pass."""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from sordino.errors import DataError
from sordino.secure import (
    Adaptive,
    Averages,
    Client,
    PlainDistances,
    SecureError,
    Server,
    Setup,
    TooFewAnswers,
    TooManyErrors,
    Traffic,
    adaptive,
    fewest_members,
    finish,
    plan,
    run,
    run_average,
)
from sordino.secure.distances import Exchange
from sordino.secure.local import run_exchange
from sordino.secure.messages import Answer, Deal, Delivery, Join, Message, Partition, Query, Receipt, Shares, pack, read
from sordino.secure.shares import random_below, random_factor

Replies = list[tuple[int, bytes]]


def groups(clients: int, width: int = 8, count: int = 3, gap: float = 6.0, seed: int = 0) -> np.ndarray:
    """Points [N, d] within [-1, 1], in groups; client i is of group i modulo their number."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(count, width))[np.arange(clients) % count] * math.sqrt(gap)
    points += generator.normal(size=(clients, width))
    return points / np.abs(points).max()


def clients_of(points: np.ndarray, vectors: np.ndarray | None = None) -> list[Client]:
    return [Client(i, point, None if vectors is None else vectors[i]) for i, point in enumerate(points)]


def expected(setup: Setup, points: np.ndarray, who: Sequence[int], first: Sequence[int]) -> list[int]:
    """The labels of scikit-learn, on the same quantized points of those who took part."""
    integers = setup.points.integers(points)
    kmeans = KMeans(len(first), init=integers[list(first)].astype(float), n_init=1, algorithm="lloyd", tol=0)
    labels: list[int] = kmeans.fit(integers[list(who)].astype(float)).labels_.tolist()
    return labels


class Meddler(Client):
    """A client whose replies of a kind are changed before they leave."""

    def __init__(
        self, number: int, point: np.ndarray, kind: type[Message], change: Callable[..., Message | bytes]
    ) -> None:
        super().__init__(number, point, point)
        self.kind, self.change = kind, change

    def handle(self, content: bytes) -> bytes:
        reply = super().handle(content)
        message = read(reply)
        if not isinstance(message, self.kind):
            return reply
        changed = self.change(message)
        return changed if isinstance(changed, bytes) else changed.to_bytes()


def meddled(
    exchange: Exchange[object], clients: Sequence[Client], meddle: Callable[[int, Replies], Replies]
) -> list[Replies]:
    """Carry an exchange to its end, changing the replies to each question on their way; gives them all."""
    by_number = {client.number: client for client in clients}
    messages, every = next(exchange), []
    try:
        while True:
            every.append([(number, by_number[number].handle(content)) for number, content in messages.items()])
            messages = exchange.send(meddle(len(every), every[-1]))
    except StopIteration:
        return every


# The same clusters as in the clear


def trial(seed: int) -> None:
    """A random size, privacy, number of clusters and schedule of drop-outs within the limit."""
    generator = np.random.default_rng(seed)
    number = int(generator.integers(8, 65))
    privacy = [1, 2, number // 4][seed % 3]
    width, count = int(generator.integers(2, 65)), int(generator.integers(2, 6))
    points = groups(number, width, count, float(generator.uniform(0.1, 4)), seed)
    tolerance = float(generator.uniform(0, 0.4))
    while True:
        try:
            setup = plan(clients=number, width=width, largest=1.0, privacy=privacy, tolerance=tolerance, columns=300)
            break
        except SecureError:
            tolerance /= 2
    gone = generator.choice(number, int(generator.integers(0, number - setup.needed + 1)), replace=False)
    drop = {int(client): int(generator.integers(1, 8)) for client in gone}
    who = [client for client in range(number) if drop.get(client, 9) > 2]
    first = generator.choice(who, count, replace=False).tolist()
    outcome = run(clients_of(points), Server(setup), first, 300, drop)
    assert outcome.result.clients == tuple(who)
    assert outcome.result.labels.tolist() == expected(setup, points, who, first)
    assert outcome.result.converged
    assert outcome.rejected == ()


@pytest.mark.parametrize("seed", range(9))
def test_assignments_are_those_of_kmeans(seed: int) -> None:
    trial(seed)


@pytest.mark.slow
def test_assignments_are_those_of_kmeans_in_200_trials() -> None:
    for seed in range(200):
        trial(1000 + seed)


@pytest.mark.parametrize("reveal", ["distances", "ratios"])
def test_an_adaptive_clustering_is_that_of_the_clear(reveal: str) -> None:
    points = groups(24, 16, 4)
    setup = plan(clients=24, width=16, largest=1.0, privacy=3, reveal=reveal)  # type: ignore[arg-type]
    found = run(clients_of(points), Server(setup), Adaptive()).result
    assert found.labels.tolist() == (np.arange(24) % 4).tolist()
    if reveal == "distances":
        plain = finish(adaptive(PlainDistances(setup.points.integers(points)), Adaptive(), 50))
        assert (found.labels == plain.labels).all()
        assert (found.silhouette, found.spreads) == (plain.silhouette, plain.spreads)


def test_a_number_of_clusters_is_enough_to_start() -> None:
    points = groups(20, 16, 4)
    setup = plan(clients=20, width=16, largest=1.0)
    found = run(clients_of(points), Server(setup), 4).result
    assert adjusted_rand_score(np.arange(20) % 4, found.labels) == 1.0


def test_last_rounds_clusters_are_a_start() -> None:
    """And nothing about single clients is opened."""
    points = groups(20, 16, 4)
    setup = plan(clients=20, width=16, largest=1.0)
    outcome = run(clients_of(points), Server(setup), [set(range(k, 20, 4)) for k in range(4)])
    assert outcome.result.labels.tolist() == (np.arange(20) % 4).tolist()
    assert [len(column.members) for column in outcome.opened] == [5] * 4


# What the server learns


def test_the_server_sees_exactly_the_distances() -> None:
    points = groups(12, 5)
    setup = plan(clients=12, width=5, largest=1.0, privacy=2)
    outcome = run(clients_of(points), Server(setup), [0, 1, 2])
    integers = setup.points.integers(points).astype(object)
    for column in outcome.opened:
        total = integers[list(column.members)].sum(0)
        exact = ((len(column.members) * integers - total) ** 2).sum(1)
        assert list(column.values) == exact.tolist()
        center = points[list(column.members)].mean(0)
        step = 2.0**-setup.bits
        np.testing.assert_allclose(column.squared(step), ((points - center) ** 2).sum(1), rtol=1e-3, atol=1e3 * step)


def test_what_the_server_could_decode_of_a_single_block_is_noise() -> None:
    """From the answers that clients really send; the sum over the blocks alone means something."""
    points = groups(30, 12)
    setup = plan(clients=30, width=12, largest=1.0, privacy=3, blocks=4)
    server = Server(setup)
    every = meddled(server.cluster([0, 1, 2]), clients_of(points), lambda number, replies: replies)
    answers = np.stack([read(content).values for _, content in every[4]])  # type: ignore[attr-defined]
    decoded = setup.point_code.decode(answers, range(30), setup.needed - 1).values  # [B, rows, C]
    total = setup.field.sum(decoded, axis=0)
    assert total[:, 0].tolist() in [list(column.values) for column in server.opened]
    for values in (*decoded, *answers):
        assert stats.kstest(values.ravel() / setup.modulus, "uniform").pvalue > 1e-9


def test_ratios_have_no_common_divisor_and_no_scale() -> None:
    """The row's factor is gone, whole, and by greatest common divisors too; ratios of distances are left."""
    points = groups(24, 16, 4)
    setup = plan(clients=24, width=16, largest=1.0, reveal="ratios", factor_bits=20)
    outcome = run(clients_of(points), Server(setup), [0, 1, 2, 3])
    assert outcome.result.labels.tolist() == (np.arange(24) % 4).tolist()
    integers = setup.points.integers(points).astype(object)
    rows, exact = [], []
    for column in outcome.opened:
        total = integers[list(column.members)].sum(0)
        exact.append(((len(column.members) * integers - total) ** 2).sum(1))
        rows.append(column.values)
    values, distances = np.array(rows, object).T, np.array(exact, object).T  # [rows, columns]
    factors = []
    for i, (row, true) in enumerate(zip(values, distances, strict=True)):
        low = max(int(v) // (int(d) + 1) for v, d in zip(row, true, strict=True) if d)  # r D <= v < r (D + 1)
        high = min(int(v) / int(d) for v, d in zip(row, true, strict=True) if d)
        assert low <= high
        factors.append(high)
        if i < 4:
            assert row[i] == 0  # a first center's distance to itself
        else:
            assert math.gcd(*row.tolist()) < max(2, high / 2) or high < 8
    assert max(factors) / min(factors) > 100
    assert max(factors) < 2**20


def test_factors_are_spread_over_their_orders_of_magnitude() -> None:
    entropy = np.random.default_rng(0).bytes
    factors = np.array([random_factor(16, entropy) for _ in range(4000)])
    assert factors.min() >= 1
    assert factors.max() < 2**16
    counts = np.bincount(np.log2(factors).astype(int), minlength=16)
    assert np.abs(counts - 250).max() < 5 * math.sqrt(250)
    assert {random_below(3, entropy) for _ in range(200)} == {0, 1, 2}
    assert random_below(1, entropy) == 0


def test_spreads_of_ratios_are_opened_as_sums_once() -> None:
    points = groups(13, 6, 3)
    setup = plan(clients=13, width=6, largest=1.0, privacy=2, reveal="ratios")
    clients, server = clients_of(points), Server(setup)
    run(clients, server, [0, 1, 2])
    sets = [{0, 3, 6, 9}, {1, 4, 7, 10}, {2, 5, 8}]
    spreads = run_exchange(server.spreads(sets), clients, Traffic())
    assert spreads[2] is None  # three are below the minimum of four
    for found, members in zip(spreads[:2], sets[:2], strict=True):
        assert found == pytest.approx(points[list(members)].var(0, ddof=1).sum(), rel=0.02)
    traffic = Traffic()
    with pytest.raises(TooFewAnswers):
        run_exchange(server.spreads([{0, 3, 6, 9}]), clients, traffic)
    assert {reason for _, reason in traffic.refusals} == {
        f"client {number} answers for one partition of points a sharing" for number in range(13)
    }


# Drop-outs


def test_exactly_enough_answers_are_enough_and_one_less_is_not() -> None:
    points = groups(12)
    setup = plan(clients=12, width=8, largest=1.0, privacy=2, blocks=2)
    assert setup.needed == 2 * (2 + 2 - 1) + 1
    first, who = [0, 1, 2], range(12)
    drop = dict.fromkeys(range(7, 12), 4)  # after sharing: still clustered
    found = run(clients_of(points), Server(setup), first, drop=drop).result
    assert found.labels.tolist() == expected(setup, points, who, first)
    with pytest.raises(TooFewAnswers, match="distances: 7 answers are needed and 6 came") as caught:
        run(clients_of(points), Server(setup), first, drop=drop | {6: 5})
    assert (caught.value.needed, caught.value.had) == (7, 6)
    with pytest.raises(TooFewAnswers, match="joining: 7 answers are needed and 6 came"):
        run(clients_of(points)[:6], Server(setup), first)


def test_who_vanishes_before_sharing_is_left_out_and_after_it_is_not() -> None:
    points = groups(12)
    setup = plan(clients=12, width=8, largest=1.0, blocks=2)
    found = run(clients_of(points), Server(setup), [0, 1, 2], drop={3: 1, 4: 2, 5: 3, 6: 4, 7: 5}).result
    assert found.clients == (0, 1, 2, *range(5, 12))
    assert found.labels.tolist() == expected(setup, points, found.clients, [0, 1, 2])
    with pytest.raises(SecureError, match=r"first center \[3\]: dealt no shares"):
        run(clients_of(points), Server(setup), [0, 1, 3], drop={3: 2})


def test_clients_may_come_and_go() -> None:
    """A client who misses one question answers the next."""
    points = groups(12)
    setup = plan(clients=12, width=8, largest=1.0, blocks=2)
    traffic = run(clients_of(points), Server(setup), [0, 1, 2], drop=lambda c, e: e > 3 and c == e).traffic
    assert traffic.refusals == []
    assert traffic.exchanges > 4


# What is rejected


def wrong_shape(answer: Answer) -> Message:
    return replace(answer, values=answer.values[:-1])


CASES: list[tuple[type[Message], Callable[..., Message | bytes], str]] = [
    (Answer, lambda answer: b"\x00" * 50, "malformed: not a message"),
    (Answer, lambda answer: answer.to_bytes()[:-3], "malformed: not a message"),
    (Answer, wrong_shape, "malformed: values of shape"),
    (Answer, lambda answer: replace(answer, values=answer.values.T.copy()), "malformed: values of shape"),
    (Answer, lambda answer: replace(answer, values=answer.values | np.uint64(2**61)), "out of range"),
    (Answer, lambda answer: replace(answer, values=np.full_like(answer.values, 2**61 - 1)), "out of range"),
    (Answer, lambda answer: replace(answer, step=answer.step - 1), "late: an answer to step"),
    (Answer, lambda answer: replace(answer, round=answer.round - 1), "late: of round 0 in round 1"),
    (Answer, lambda answer: replace(answer, sender=1), "malformed: it speaks for client 1"),
    (Answer, lambda answer: Receipt(1, answer.sender, "point", np.zeros(0, np.int64)), "out of turn: Receipt"),
    (Join, lambda join: replace(join, key=np.zeros(4, np.uint8)), "malformed: 4 bytes where most sent 0"),
    (Shares, lambda shares: replace(shares, payloads=shares.payloads[:-1]), "malformed: 11 payloads for 12"),
    (Shares, lambda shares: replace(shares, payloads=shares.payloads[:, 8:].copy()), "bytes where most sent"),
    (Shares, lambda shares: replace(shares, purpose="vector"), "out of turn: shares of a vector"),
    (Receipt, lambda receipt: replace(receipt, purpose="vector"), "out of turn: a receipt of vectors"),
]


@pytest.mark.parametrize(("kind", "change", "reason"), CASES)
def test_a_bad_message_is_rejected_by_its_senders_name(
    kind: type[Message], change: Callable[..., Message | bytes], reason: str
) -> None:
    """And the others go on without it, to the right clusters."""
    points = groups(12)
    setup = plan(clients=12, width=8, largest=1.0, blocks=2)
    clients = clients_of(points)
    clients[7] = Meddler(7, points[7], kind, change)
    outcome = run(clients, Server(setup), [0, 1, 2])
    assert {each.client for each in outcome.rejected} == {7}
    assert reason in outcome.rejected[0].reason
    found = outcome.result
    assert (7 in found.clients) == (kind not in (Join, Shares))
    assert found.labels.tolist() == expected(setup, points, found.clients, [0, 1, 2])


def test_duplicates_and_late_answers_are_rejected_and_the_first_is_kept() -> None:
    points = groups(12)
    setup = plan(clients=12, width=8, largest=1.0, blocks=2)
    server, kept = Server(setup), list[Replies]()

    def meddle(number: int, replies: Replies) -> Replies:
        kept.append(replies)
        if number == 4:
            false = Answer(1, 5, 1, np.zeros_like(read(replies[5][1]).values))  # type: ignore[attr-defined]
            return [*replies, (5, false.to_bytes())]
        if number == 5:
            return [*kept[3][:1], *replies, (77, b"")]
        return replies

    meddled(server.cluster([0, 1, 2]), clients_of(points), meddle)
    reasons = [(each.client, each.step, each.reason) for each in server.rejected]
    assert reasons[0] == (5, "distances", "duplicated: it has answered this already")
    assert reasons[1] == (0, "distances", "late: an answer to step 1 at step 2")
    assert reasons[2][::2] == (77, "not asked: it does not take part, or does no more")


def out_of_range_for(recipients: Sequence[int]) -> Callable[[Shares], Message]:
    def change(shares: Shares) -> Message:
        payloads = shares.payloads.copy()
        payloads[list(recipients), :8] = 255
        return replace(shares, payloads=payloads)

    return change


def test_a_dealer_whose_shares_many_refuse_is_left_out_and_named() -> None:
    points = groups(12)
    setup = plan(clients=12, width=8, largest=1.0, privacy=2, blocks=2)
    clients = clients_of(points)
    clients[4] = Meddler(4, points[4], Shares, out_of_range_for([0, 5, 9]))
    outcome = run(clients, Server(setup), [0, 1, 2])
    assert 4 not in outcome.result.clients
    assert [(each.client, each.reason) for each in outcome.rejected] == [
        (4, "its shares were refused by clients [0, 5, 9]")
    ]
    assert clients[5].refused == [(4, "out of range: numbers that are not in the field")]


def test_of_a_dealer_whom_few_refuse_it_is_these_who_stop() -> None:
    """Up to T may lie about a dealer, or be lied to by one; either way they cannot answer, and the others can."""
    points = groups(12)
    setup = plan(clients=12, width=8, largest=1.0, privacy=2, blocks=2)
    clients = clients_of(points)
    clients[4] = Meddler(4, points[4], Shares, out_of_range_for([5, 9]))
    outcome = run(clients, Server(setup), [0, 1, 2])
    assert outcome.result.labels.tolist() == expected(setup, points, range(12), [0, 1, 2])
    assert sorted(each.client for each in outcome.rejected) == [5, 9]


def flipped(answer: Answer) -> Message:
    return replace(answer, values=answer.values ^ np.uint64(1))


def test_inconsistent_answers_are_located_named_and_not_asked_again() -> None:
    points = groups(14)
    setup = plan(clients=14, width=8, largest=1.0, privacy=2, blocks=2)  # 7 answers needed: 3 wrong ones are located
    clients = clients_of(points)
    for number in (3, 8, 13):
        clients[number] = Meddler(number, points[number], Answer, flipped)
    outcome = run(clients, Server(setup), [0, 1, 2])
    assert outcome.result.labels.tolist() == expected(setup, points, range(14), [0, 1, 2])
    assert [(each.client, each.step) for each in outcome.rejected] == [(n, "distances") for n in (3, 8, 13)]
    assert all("contradicts" in each.reason for each in outcome.rejected)


def test_more_wrong_answers_than_can_be_located_stop_the_step() -> None:
    points = groups(14)
    setup = plan(clients=14, width=8, largest=1.0, privacy=2, blocks=2)
    clients = clients_of(points)
    for number in (1, 3, 8, 13):
        clients[number] = Meddler(number, points[number], Answer, flipped)
    with pytest.raises(TooManyErrors, match="more than 3 of them are wrong"):
        run(clients, Server(setup), [0, 1, 2])


def test_shares_on_no_polynomial_stop_the_step() -> None:
    """A dealer who deals inconsistent points spoils all answers; that is noticed, and named nobody."""

    def scramble(shares: Shares) -> Message:
        payloads = shares.payloads.copy()
        # Of many bits: errors of a few come to lie on a polynomial, but for two, once in a thousand trials.
        payloads[:, :6] ^= np.random.default_rng(0).integers(0, 256, (len(payloads), 6), np.uint8)
        return replace(shares, payloads=payloads)

    points = groups(12)
    setup = plan(clients=12, width=8, largest=1.0, privacy=2, blocks=2)
    clients = clients_of(points)
    clients[4] = Meddler(4, points[4], Shares, scramble)
    with pytest.raises(TooManyErrors):
        run(clients, Server(setup), [0, 1, 2])


# What clients refuse


def ready() -> tuple[list[Client], Setup]:
    """Clients who hold shares of each other's points and vectors."""
    points = groups(6, 2)
    setup = plan(clients=6, width=2, largest=1.0, privacy=1, blocks=1, length=4, columns=3, minimum=3)
    clients = clients_of(points, np.ones((6, 4)))
    for purpose in ("point", "vector"):
        joins = [client.handle(setup.to_bytes()) for client in clients] if purpose == "point" else []
        assert all(isinstance(read(join), Join) for join in joins)
        deal = Deal(1, purpose, np.arange(6), np.zeros((6, 0), np.uint8))  # type: ignore[arg-type]
        dealt = [read(client.handle(deal.to_bytes())) for client in clients]
        for client in clients:
            payloads = np.stack([each.payloads[client.number] for each in dealt])  # type: ignore[attr-defined]
            client.handle(Delivery(1, purpose, np.arange(6), payloads).to_bytes())  # type: ignore[arg-type]
    return clients, setup


EVERYBODY = pack([range(6)], 6)[0]


def query(step: int, first: int, *columns: set[int], rows: object = EVERYBODY) -> bytes:
    return Query(1, step, first, rows, pack(columns, 6)).to_bytes()  # type: ignore[arg-type]


def partition(step: int, *sets: set[int], purpose: str = "vector") -> bytes:
    return Partition(1, step, purpose, pack(sets, 6)).to_bytes()  # type: ignore[arg-type]


def test_no_mask_is_used_twice_and_no_more_than_agreed() -> None:
    (client, *_), _ = ready()
    client.handle(query(1, 0, {0}, {1}))
    with pytest.raises(SecureError, match="has answered step 1"):
        client.handle(query(1, 2, {2}))
    with pytest.raises(SecureError, match="masks below 2 are used, and 3 were agreed"):
        client.handle(query(2, 1, {2}))
    with pytest.raises(SecureError, match="masks below 2 are used, and 3 were agreed"):
        client.handle(query(3, 2, {2}, {3}))
    with pytest.raises(SecureError, match="masks below"):
        client.handle(query(4, -1, {2}))
    client.handle(query(5, 2, {2}))


def test_sets_must_be_of_clients_who_dealt() -> None:
    (client, *_), _ = ready()
    with pytest.raises(SecureError, match="no share"):
        client.handle(query(1, 0, {0, 5}, rows=pack([range(5)], 6)[0]))
    with pytest.raises(SecureError, match="empty set"):
        client.handle(query(2, 0, set()))
    with pytest.raises(SecureError, match="malformed: sets of 2 bytes for 6 clients"):
        client.handle(Query(1, 3, 0, EVERYBODY, np.zeros((1, 2), np.uint8)).to_bytes())


@pytest.mark.parametrize("purpose", ["vector", "point"])
def test_one_partition_a_sharing_is_summed(purpose: str) -> None:
    """Two sums that differ by a client would give its vector: any second partition is refused, the same one too."""
    (client, *_), _ = ready()
    client.handle(partition(1, {0, 1, 2}, {3, 4, 5}, purpose=purpose))
    for step, sets in enumerate([[{0, 1, 2, 3}], [{0, 1, 2}], [{0, 1, 2}, {3, 4, 5}]], 2):
        with pytest.raises(SecureError, match=f"one partition of {purpose}s a sharing"):
            client.handle(partition(step, *sets, purpose=purpose))


@pytest.mark.parametrize("sets", [[{0, 1}], [{0, 1, 2}, {2, 3, 4}], [{0, 1, 2}, {3}], [set()]])
def test_sums_are_of_disjoint_sets_above_the_minimum(sets: list[set[int]]) -> None:
    (client, *_), _ = ready()
    with pytest.raises(SecureError, match="disjoint sets of 3 clients or more"):
        client.handle(partition(1, *sets))


def test_a_client_may_ask_for_more_protection_than_a_round_offers() -> None:
    setup = plan(clients=8, width=2, largest=1.0, privacy=2)
    for client in (Client(0, [0, 0], minimum=5), Client(0, [0, 0], privacy=3)):
        with pytest.raises(SecureError, match="client 0 requires minimum"):
            client.handle(setup.to_bytes())
    Client(0, [0, 0], minimum=4, privacy=2).handle(setup.to_bytes())


@pytest.mark.parametrize("privacy", [1, 2, 5])
def test_no_minimum_leaves_fewer_than_two_beside_the_colluders(privacy: int) -> None:
    """T members of a set take their vectors off its mean: at least two others are left, and never less than three."""
    least = max(3, privacy + 2)
    assert fewest_members(privacy) == least
    assert Client(0, [0, 0], privacy=privacy).minimum == least
    setup = plan(clients=16, width=2, largest=1.0, privacy=privacy, length=3)
    assert setup.minimum == least
    for minimum in (1, 2, least - 1):
        with pytest.raises(ValueError, match=f"minimum = {minimum}: must be {least} or more with privacy = {privacy}"):
            Client(0, [0, 0], minimum=minimum, privacy=privacy)
        with pytest.raises(SecureError, match=f"minimum = {minimum}: must be {least} or more"):
            plan(clients=16, width=2, largest=1.0, privacy=privacy, length=3, minimum=minimum)
        lower = replace(setup, minimum=minimum)  # a server that ignores its own rule
        with pytest.raises(SecureError, match=f"minimum = {minimum}: must be {least} or more"):
            Server(lower)
        with pytest.raises(SecureError, match=f"minimum = {minimum}: must be {least} or more"):
            Client(0, [0, 0]).handle(lower.to_bytes())


def test_a_round_is_joined_once_and_shared_once() -> None:
    (client, *_), setup = ready()
    with pytest.raises(SecureError, match="has been in round 1"):
        client.handle(setup.to_bytes())
    deal = Deal(1, "point", np.arange(6), np.zeros((6, 0), np.uint8))
    with pytest.raises(SecureError, match="deals its point once"):
        client.handle(deal.to_bytes())
    with pytest.raises(SecureError, match="one delivery a sharing"):
        client.handle(Delivery(1, "point", np.arange(6), np.zeros((6, 8), np.uint8)).to_bytes())
    with pytest.raises(SecureError, match="not in round 2"):
        client.handle(replace(deal, round=2).to_bytes())
    with pytest.raises(SecureError, match="does not take a Join"):
        client.handle(Join(1, 0, np.zeros(0, np.uint8)).to_bytes())
    client.handle(replace(setup, round=2).to_bytes())
    with pytest.raises(SecureError, match="no shares of points"):
        client.handle(Query(2, 1, 0, EVERYBODY, EVERYBODY[None]).to_bytes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 7}, "answers are needed"),
        ({"minimum": 3}, "minimum = 3: must be 4 or more with privacy = 2"),
        ({"minimum": 1, "privacy": 0}, "privacy = 0: must be 1 or more"),
        ({"blocks": 0}, "blocks = 0"),
        ({"largest": float("nan")}, "largest = nan: must be positive"),
        ({"largest": 0.0}, "largest = 0.0: must be positive"),
        ({"modulus": 2**62}, "no code for these sizes: modulus"),
        ({"modulus": 11}, "no code for these sizes"),
        ({"columns": 0}, "columns = 0"),
        ({"bits": 40}, "fewer bits"),
        ({"reveal": "everything"}, "reveal = 'everything'"),
        ({"factor_bits": 4}, "ratios need some"),
        ({"vector_bits": 62}, "sums of 8 clients"),
        ({"width": 3}, "does not fit a round"),
        ({"clients": 5, "blocks": 1}, "does not fit a round of 5"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused_by_clients_too(changes: dict[str, object], message: str) -> None:
    setup = plan(clients=8, width=2, largest=1.0, privacy=2, length=3)
    with pytest.raises(SecureError, match=message):
        Client(7, [0.0, 0.0]).handle(replace(setup, **changes).to_bytes())  # type: ignore[arg-type]


@pytest.mark.parametrize("purpose", ["point", "vector"])
def test_values_that_do_not_fit_what_was_agreed_are_not_shared(purpose: str) -> None:
    setup = plan(clients=6, width=2, largest=1.0, length=2)
    values = np.array([0.5, 1.5])
    client = Client(0, values if purpose == "point" else [0, 0], values)
    client.handle(setup.to_bytes())
    deal = Deal(1, purpose, np.arange(6), np.zeros((6, 0), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="above the largest"):
        client.handle(deal.to_bytes())
    client = Client(0, [0, 0], None)
    client.handle(setup.to_bytes())
    with pytest.raises(DataError, match="vector of shape"):
        client.handle(Deal(1, "vector", np.arange(6), np.zeros((6, 0), np.uint8)).to_bytes())


# Averages


def test_means_within_clusters_are_means() -> None:
    points = groups(13, 6, 3)
    vectors = np.random.default_rng(0).uniform(-0.5, 0.5, (13, 101))
    setup = plan(clients=13, width=6, largest=1.0, privacy=2, length=101, vector_largest=0.5)
    clients, server = clients_of(points, vectors), Server(setup)
    found = run(clients, server, [0, 1, 2]).result
    outcome = run_average(clients, server, [*found.sets, {12}][:3])
    for mean, members in zip(outcome.result.means, found.sets, strict=True):
        assert mean is not None
        np.testing.assert_allclose(mean, vectors[list(members)].mean(0), rtol=0, atol=2.0**-setup.vector_bits)
    assert outcome.result.members == found.sets


def test_averages_need_no_clustering_before() -> None:
    setup = plan(clients=6, width=1, largest=1.0, length=5)
    clients = clients_of(np.zeros((6, 1)), np.arange(30).reshape(6, 5) / 30)
    (mean,) = run_average(clients, Server(setup), [range(6)]).result.means
    np.testing.assert_allclose(mean, np.arange(30).reshape(6, 5).mean(0) / 30, atol=1e-9)


def test_a_cluster_below_the_minimum_is_never_opened() -> None:
    """As it was given, or as it is left when members vanish before sharing."""
    vectors = np.arange(12)[:, None] / 12 * np.ones((1, 4))
    setup = plan(clients=12, width=1, largest=1.0, privacy=2, length=4)
    assert setup.minimum == 4
    outcome = run_average(
        clients_of(np.zeros((12, 1)), vectors), Server(setup), [{0, 1, 2, 3}, {4, 5, 6}, {7, 8, 9, 10}], drop={8: 2}
    )
    means = outcome.result.means
    assert means[0] is not None
    np.testing.assert_allclose(means[0], 0.125, atol=1e-9)
    assert means[1:] == (None, None)
    assert outcome.result.members == (frozenset({0, 1, 2, 3}), frozenset({4, 5, 6}), frozenset({7, 9, 10}))


def test_members_who_vanish_after_they_dealt_stay_in_the_mean() -> None:
    """So those who are left learn the mean of as many as the minimum says, however few of them still answer."""
    vectors = np.arange(12)[:, None] / 12 * np.ones((1, 4))
    setup = plan(clients=12, width=1, largest=1.0, length=4)
    outcome = run_average(
        clients_of(np.zeros((12, 1)), vectors), Server(setup), [{0, 1, 2}, set(range(3, 12))], drop={0: 4, 1: 4}
    )
    assert outcome.result.members[0] == {0, 1, 2}
    assert outcome.result.means[0] is not None
    np.testing.assert_allclose(outcome.result.means[0], 1 / 12, atol=1e-9)


class Careless(Server):
    """A server that asks for the sums of all sets, however small."""

    def average(self, sets: Sequence[Iterable[int]]) -> Exchange[Averages]:
        yield from self._share("vector")
        question = Partition(1, self._next_step(), "vector", pack(sets, self.setup.clients))
        yield from self._summed_vectors(question, len(sets))
        raise AssertionError("clients helped to open it")


def test_clients_do_not_help_a_server_that_opens_too_small_a_cluster() -> None:
    """Nor one of the right size with a member who dealt nothing: that would be the sum of the others."""
    setup = plan(clients=8, width=1, largest=1.0, length=4)
    for sets, drop in (([{0, 1}, {2, 3, 4}], {}), ([{0, 1, 2}, {3, 4, 5}], {2: 2})):
        clients, traffic = clients_of(np.zeros((8, 1)), np.ones((8, 4))), Traffic()
        with pytest.raises(TooFewAnswers):
            run_exchange(Careless(setup).average(sets), clients, traffic, drop)
        assert {number for number, _ in traffic.refusals} == {*range(8)} - {*drop}


def test_two_partitions_cannot_both_have_the_answers_that_they_need() -> None:
    """A server that shows different partitions to different clients needs more answers than there are honest clients,
    and T who answer for both."""
    for clients in (4, 5, 12, 40, 1000):
        for privacy in (1, clients // 8 or 1, (clients - 1) // 2):
            setup = plan(clients=clients, width=3, largest=1.0, privacy=privacy, blocks=1, length=9)
            assert 2 * setup.vector_needed > clients - privacy + 2 * privacy
            assert setup.vector_needed <= clients
            assert setup.vector_code.degree + 1 == setup.vector_needed
            assert setup.vector_code.privacy >= privacy


def test_averages_survive_drop_outs_and_name_liars() -> None:
    vectors = np.random.default_rng(0).uniform(-1, 1, (14, 10))
    setup = plan(clients=14, width=1, largest=1.0, privacy=2, length=10)
    clients = clients_of(np.zeros((14, 1)), vectors)
    clients[3] = Meddler(3, vectors[3, :1], Answer, flipped)
    clients[3].vector = vectors[3]
    drop = {0: 2, 12: 3}  # one before sharing, one after
    assert 14 - len(drop) >= setup.vector_needed + 2
    outcome = run_average(clients, Server(setup), [range(7), range(7, 14)], drop=drop)
    assert [(each.client, each.step) for each in outcome.rejected] == [(3, "averaging")]
    first, second = outcome.result.means
    np.testing.assert_allclose(first, vectors[1:7].mean(0), atol=1e-9)
    np.testing.assert_allclose(second, vectors[7:].mean(0), atol=1e-9)
    few = dict.fromkeys(range(setup.vector_needed - 1, 14), 4)
    with pytest.raises(TooFewAnswers, match="averaging"):
        run_average(clients_of(np.zeros((14, 1)), vectors), Server(setup), [range(14)], drop=few)


# Sealed payloads


class TaggedSealer:
    """Stands in for a channel: a tag that only the two ends can make, and a content that others cannot read."""

    def __init__(self, number: int) -> None:
        self.number, self.public_key = number, bytes([number] * 4)
        self.met: dict[int, bytes] = {}

    def meet(self, keys: Mapping[int, bytes]) -> None:
        self.met = dict(keys)

    def _stream(self, one: int, other: int, context: bytes, length: int) -> bytes:
        key = b"".join(self.met[each] for each in sorted((one, other))) + context
        return hashlib.shake_256(key).digest(length)

    def seal(self, recipient: int, content: bytes, context: bytes) -> bytes:
        padded = content + hashlib.sha256(content + context).digest()
        stream = self._stream(self.number, recipient, context, len(padded))
        return bytes(a ^ b for a, b in zip(padded, stream, strict=True))

    def unseal(self, sender: int, content: bytes, context: bytes) -> bytes:
        stream = self._stream(sender, self.number, context, len(content))
        padded = bytes(a ^ b for a, b in zip(content, stream, strict=True))
        if hashlib.sha256(padded[:-32] + context).digest() != padded[-32:]:
            raise SecureError("not sealed for this")
        return padded[:-32]


def test_payloads_are_sealed_end_to_end() -> None:
    """Keys reach all, payloads are relayed as they are, and one that was sealed for another client is refused."""
    points = groups(8)
    setup = plan(clients=8, width=8, largest=1.0, blocks=1)
    clients = [Client(i, point, cipher=TaggedSealer(i)) for i, point in enumerate(points)]
    assert run(clients, Server(setup), [0, 1, 2]).result.labels.tolist() == expected(setup, points, range(8), [0, 1, 2])
    assert clients[0].cipher.met == {i: bytes([i] * 4) for i in range(8)}  # type: ignore[attr-defined]

    def swapped(shares: Shares) -> Message:
        return replace(shares, payloads=shares.payloads[::-1])

    clients = [Client(i, point, cipher=TaggedSealer(i)) for i, point in enumerate(points)]
    clients[5] = Meddler(5, points[5], Shares, swapped)
    clients[5].cipher = TaggedSealer(5)
    outcome = run(clients, Server(setup), [0, 1, 2])
    assert 5 not in outcome.result.clients
    assert outcome.rejected[0].client == 5
    assert clients[0].refused == [(5, "not sealed for this")]


# Sizes, bytes and the room


@pytest.mark.parametrize("reveal", ["distances", "ratios"])
def test_blocks_are_as_many_as_drop_outs_allow(reveal: str) -> None:
    degree = 2 if reveal == "distances" else 3
    for clients in range(8, 65, 7):
        for privacy in (1, 2, clients // 5):
            setup = plan(
                clients=clients,
                width=64,
                largest=1.0,
                privacy=privacy,
                tolerance=0.2,
                reveal=reveal,
                bits=4,  # type: ignore[arg-type]
            )
            assert setup.needed == degree * (setup.blocks + privacy - 1) + 1
            assert setup.needed <= clients - int(0.2 * clients)
            shorter = -(-64 // (setup.point_block - 1)) if setup.point_block > 1 else 10**9
            assert degree * (shorter + privacy - 1) + 1 > clients - int(0.2 * clients)
    with pytest.raises(SecureError, match="less privacy, less tolerance, or more clients"):
        plan(clients=8, width=64, largest=1.0, privacy=4, reveal=reveal)  # type: ignore[arg-type]


def test_all_bytes_are_counted() -> None:
    points = groups(12)
    setup = plan(clients=12, width=8, largest=1.0, blocks=2)
    server = Server(setup)
    every = meddled(server.cluster([0, 1, 2]), clients_of(points), lambda number, replies: replies)
    traffic = run(clients_of(points), Server(setup), [0, 1, 2]).traffic
    assert traffic.exchanges == len(every)
    for client in range(12):
        sent = sum(len(content) for replies in every for sender, content in replies if sender == client)
        assert sum(traffic.sent[client].values()) == sent
    assert {*traffic.sent[0]} == {"Join", "Shares", "Receipt", "Answer"}
    assert {*traffic.sent["server"]} == {"Setup", "Deal", "Delivery", "Query"}
    assert sum(traffic.sent["server"].values()) == sum(traffic.received.values())


def test_the_room_knows_nothing_of_the_others() -> None:
    """Only errors of the package, and no PyTorch."""
    allowed = {"sordino.errors", "sordino.files", "sordino.secure", "sordino.randomness"}
    for file in sorted((Path(__file__).parents[2] / "src" / "sordino" / "secure").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith("torch"), file.name
                assert not name.startswith("sordino") or any(name.startswith(each) for each in allowed), file.name
