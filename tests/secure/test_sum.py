"""Secure sums: exact with whoever drops out, and what clients and server must not take or give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino.errors import DataError
from sordino.secure import SecureError, Setup, TooFewAnswers, TooManyErrors, plan
from sordino.secure.messages import Message, read
from sordino.secure.sums.client import SumClient
from sordino.secure.sums.discrete_gaussian import Bits, discrete_gaussian
from sordino.secure.sums.local import STAGES, Stage, local_sum, noised_sum
from sordino.secure.sums.masks import from_limbs, keystream, pair_mask, self_mask, to_limbs
from sordino.secure.sums.messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Invitation,
    MaskedInput,
    Roster,
    SumDelivery,
    SumMessage,
    SumShares,
    Unmasking,
    UnmaskRequest,
)
from sordino.secure.sums.plan import plan_sum
from sordino.secure.sums.server import SecureSum, SumServer
from sordino.secure.sums.setup import SumSetup

SESSION, OTHER = "5e" * 16, "0c" * 16
IN_THE_SUM = ("confirm", "unmask")  # stages before which a client's vector has come
Letters = dict[int, bytes]
Replies = list[tuple[int, bytes]]


def a_setup(n: int = 5, d: int = 3, threshold: int | None = None, noise: float = 0.0, **others: Any) -> SumSetup:
    others = {"session": SESSION, "clip": 1.0, "colluders": 0 if n < 4 else 1} | others
    return plan_sum(clients=n, dimension=d, threshold=threshold, noise_multiplier=noise, **others)


def vectors_of(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def seeded(*seed: int) -> Bits:
    generator = np.random.default_rng(seed)
    return lambda count: generator.integers(0, 2**64, count, np.uint64)


def clients_of(setup: SumSetup, seed: int = 0) -> list[SumClient]:
    vectors = vectors_of(setup.clients, setup.dimension, seed)
    return [SumClient(setup, number, vector) for number, vector in enumerate(vectors)]


def expected(
    setup: SumSetup, vectors: np.ndarray, who: Sequence[int], bits: Mapping[int, Bits] | None = None
) -> np.ndarray:
    """The sum in the clear: of the same quantized vectors, and of the same noise."""
    total = sum(setup.quantize(vectors[client]) for client in who)
    for client in who if bits else ():
        total = total + discrete_gaussian(int(setup.deviations[client]), setup.dimension, bits[client])
    return np.asarray(total)


def questions(
    setup: SumSetup, clients: Sequence[SumClient], gone: Mapping[int, int] | None = None
) -> tuple[list[Letters], SecureSum]:
    """Play a sum; all that the server sent, by exchange. `gone`: as in `local_sum`, by number of the exchange."""
    exchange, every = SumServer(setup).sum(), []
    messages = next(exchange)
    try:
        while True:
            every.append(messages)
            present = [number for number in messages if (gone or {}).get(number, 9) > len(every)]
            messages = exchange.send([(number, clients[number].handle(messages[number])) for number in present])
    except StopIteration as end:
        return every, end.value


def at_stage(
    setup: SumSetup, stage: int, gone: Mapping[int, int] | None = None
) -> tuple[list[SumClient], list[Letters]]:
    """Clients who have answered `stage` exchanges, and what the server sends in these and the next."""
    clients, recorded = clients_of(setup), []
    exchange = SumServer(setup).sum()
    messages = next(exchange)
    for number in range(1, stage + 1):
        recorded.append(messages)
        present = [client for client in messages if (gone or {}).get(client, 9) > number]
        messages = exchange.send([(client, clients[client].handle(messages[client])) for client in present])
    return clients, [*recorded, messages]


def changed(content: bytes, **changes: Any) -> bytes:
    return replace(read(content), **changes).to_bytes()  # type: ignore[arg-type]


# Exact sums


@st.composite
def schedules(draw: st.DrawFn) -> tuple[SumSetup, dict[Stage, list[int]]]:
    """A size, a threshold that fits, and any clients dropping out at any stage, with t left."""
    n = draw(st.integers(2, 9))
    colluders = draw(st.integers(0, max(0, n - 2)))
    threshold = draw(st.integers(max((n + colluders) // 2 + 1, colluders + 2), n))
    noise = draw(st.sampled_from([0.0, 1.0]))
    setup = a_setup(n, draw(st.integers(1, 20)), threshold, noise, colluders=colluders, round=draw(st.integers(1, 9)))
    order = draw(st.permutations(range(n)))
    gone = order[: draw(st.integers(0, n - threshold))]
    dropped: dict[Stage, list[int]] = {}
    for client in gone:
        dropped.setdefault(draw(st.sampled_from(STAGES)), []).append(client)
    return setup, dropped


@given(schedules(), st.integers(0, 2**31))
@settings(max_examples=120, deadline=None)
def test_the_sum_is_exactly_that_of_the_survivors(plan: tuple[SumSetup, dict[Stage, list[int]]], seed: int) -> None:
    setup, dropped = plan
    vectors = vectors_of(setup.clients, setup.dimension, seed)
    found, traffic = local_sum(
        setup, vectors, dropped=dropped, bits=[seeded(seed, client) for client in range(setup.clients)]
    )
    absent = {client for stage, clients in dropped.items() if stage not in IN_THE_SUM for client in clients}
    who = [client for client in range(setup.clients) if client not in absent]
    assert found.survivors == tuple(who)
    total = expected(setup, vectors, who, {client: seeded(seed, client) for client in who})
    assert (found.total == total).all()
    assert (found.values == total * setup.step).all()
    assert not traffic.refusals


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_as_many_as_tolerated_may_drop_out_at_any_stage_and_no_more(stage: Stage, count: int) -> None:
    setup = a_setup(7, 4, 5)
    vectors = vectors_of(7, 4)
    if count <= setup.tolerated:
        found, _ = local_sum(setup, vectors, dropped={stage: range(count)})
        who = range(0 if stage in IN_THE_SUM else count, 7)
        assert (found.total == expected(setup, vectors, who)).all()
    else:
        with pytest.raises(TooFewAnswers, match="5 answers are needed and 4 came; nothing is opened"):
            local_sum(setup, vectors, dropped={stage: range(count)})


def test_two_clients_are_enough_for_a_sum_with_noise() -> None:
    setup = a_setup(2, 3, 2, 1.0, colluders=1)
    found, _ = local_sum(setup, vectors_of(2, 3), bits=[seeded(0), seeded(1)])
    assert (found.total == expected(setup, vectors_of(2, 3), [0, 1], {0: seeded(0), 1: seeded(1)})).all()


def test_values_of_any_shape_come_back_in_it_with_what_they_cost() -> None:
    setup = a_setup(6, 12, noise=2.0, threshold=5)
    values = vectors_of(6, 12).reshape(6, 3, 4).astype(np.float32)
    outcome = noised_sum(setup, values, dropped={"mask": [2]})
    assert outcome.values.shape == (3, 4)
    assert outcome.survivors == (0, 1, 3, 4, 5)
    assert outcome.charge == setup.charge(outcome.survivors)
    assert outcome.charge is not None
    assert outcome.charge.noise_multiplier >= 2.0
    assert all(count > 4 * 12 for count in outcome.bytes_by_client)
    assert noised_sum(a_setup(6, 12), values).charge is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("bits", [32, 64])
def test_the_largest_sums_do_not_wrap_and_larger_ones_are_refused(sign: float, bits: int) -> None:
    """n entries of the largest size, at the very end of the ring; with a step half as large it is refused."""
    n, d = 4, 3
    top = 2 ** (bits - 1) - 1
    largest = top // n  # in steps of 1
    largest = largest if bits == 32 else 2**52  # what float64 holds; the ring of 64 bits is wider
    setup = SumSetup(1, SESSION, n, 3, 1, d, 1.0, float(largest), "example", 0.0, bits, np.zeros(n, np.int64))
    found, _ = local_sum(setup, np.full((n, d), sign * 1e300))
    assert found.total.tolist() == [int(sign) * n * largest] * d
    if bits == 32:
        with pytest.raises(SecureError, match=r"does not hold; use 64 bits, a larger step or a smaller largest"):
            replace(setup, step=0.5).check()
        with pytest.raises(SecureError, match="does not hold"):
            replace(setup, largest=float(largest + 1)).check()
        with pytest.raises(SecureError, match="does not hold"):
            replace(setup, clip=1.0, deviations=np.full(n, 1)).check()  # not even the least noise fits any more
        replace(setup, step=0.5, ring_bits=64).check()


def test_the_noise_stays_within_the_bound_that_the_ring_was_chosen_by() -> None:
    """P(|X| > B) for one entry's sum is 2^-40 / d at most: so B is 7.7 deviations or more, and not 20."""
    setup = a_setup(9, 1, 7, 1.0)
    bound = setup.largest_sum - 9 * setup.largest_integer
    deviation = float(np.sqrt((setup.deviations.astype(float) ** 2).sum()))
    assert 7.4 < bound / deviation < 9


# What a client refuses


def test_living_and_dead_must_not_overlap_and_a_refusal_costs_nothing() -> None:
    setup = a_setup(7, 3, 5)
    clients, messages = at_stage(setup, 3, {6: 3})
    good = messages[3][0]
    request = read(good)
    assert isinstance(request, UnmaskRequest)
    assert request.dead.tolist() == [6]
    for living, dead, match in (
        ([0, 1, 2, 3, 4, 5], [5, 6], r"clients \[5\] are named living and dead"),
        ([0, 1, 2, 3, 4, 5, 6], [6], r"clients \[6\] are named living and dead"),
        ([0, 1, 2, 3], [4, 5, 6], "has 4 clients where at least 5 are due"),
        ([], [0, 1, 2, 3, 4, 5, 6], "does not name clients"),
        ([0, 1, 2, 3, 4, 5], [], "6 clients are named living or dead where exactly the 7"),
        ([0, 1, 2, 3, 4], [6], "6 clients are named living or dead where exactly the 7"),
        ([0, 1, 2, 3, 4, 5], [6, 7], "8 clients are named"),
        ([0, 1, 2, 3, 4, 5], [6, 6], "8 clients are named"),
        ([0, 1, 2, 3, 4, 4, 5], [6], "does not name clients once each"),
        ([5, 4, 3, 2, 1, 0], [6], "in order"),
        ([1, 2, 3, 4, 5], [0, 6], "client 0 is asked to unmask a sum that it is not named in"),
        ([-1, 0, 1, 2, 3, 4, 5], [6], "does not name clients"),
    ):
        with pytest.raises(SecureError, match=match):
            clients[0].handle(changed(good, living=np.array(living, np.int64), dead=np.array(dead, np.int64)))
    assert isinstance(read(clients[0].handle(good)), Confirmation)


def test_a_client_gives_one_kind_of_share_about_each_and_answers_once() -> None:
    """A second question, however it is put, gets no answer: not the same, and not with another client named dead."""
    setup = a_setup(7, 3, 5)
    clients, messages = at_stage(setup, 4, {6: 3})
    good = messages[3][0]
    answer = read(clients[0].handle(messages[4][0]))
    assert isinstance(answer, Unmasking)
    held = clients[0]._held
    assert (answer.shares == np.stack([held[client][1 if client == 6 else 0] for client in range(7)])).all()
    other = changed(good, living=np.arange(5), dead=np.array([5, 6]))
    for content in (good, other, *(each[0] for each in messages)):
        with pytest.raises(SecureError, match="out of turn"):
            clients[0].handle(content)


def test_messages_are_taken_in_their_order_each_once() -> None:
    setup = a_setup(5, 3)
    _, messages = at_stage(setup, 4)
    for stage in range(5):
        clients, own = at_stage(setup, stage)
        for number in range(5):
            if number != stage:
                content = own[number][0] if number < len(own) else messages[number][0]
                with pytest.raises(SecureError, match="out of turn"):
                    clients[0].handle(content)
        clients[0].handle(own[stage][0])


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"round": 2}, "late: of round 2 in round 1"),
        ({"session": OTHER}, "foreign: of another session"),
        ({"threshold": 5}, "foreign: of another session"),
        ({"step": 2.0**-20}, "foreign"),
        ({"colluders": 0}, "foreign"),
        ({"largest": 2.0}, "foreign"),
    ],
)
@pytest.mark.parametrize("stage", range(5))
def test_messages_of_another_session_round_or_setup_are_refused(stage: int, other: dict[str, Any], match: str) -> None:
    """By clients at every stage, and by the server."""
    setup, elsewhere = a_setup(5, 3, 4), replace(a_setup(5, 3, 4), **other)
    clients, messages = at_stage(setup, stage)
    others, foreign = at_stage(elsewhere, stage)
    with pytest.raises(SecureError, match=match):
        clients[0].handle(foreign[stage][0])
    replies = [(client.number, client.handle(foreign[stage][client.number])) for client in others]
    server = SumServer(setup)
    exchange = server.sum()
    next(exchange)
    if stage == 0:
        with pytest.raises(TooFewAnswers):
            exchange.send(replies)
        assert all(match in each.reason for each in server.rejected)
        assert len(server.rejected) == 5
    clients[0].handle(messages[stage][0])


def test_a_sealed_payload_is_good_for_one_sender_receiver_and_sum() -> None:
    setup = a_setup(5, 3)
    clients, messages = at_stage(setup, 2)
    delivery = read(messages[2][0])
    assert isinstance(delivery, SumDelivery)
    swapped = delivery.payloads[[1, 0, *range(2, len(delivery.payloads))]]
    for_another = read(messages[2][1])
    assert isinstance(for_another, SumDelivery)
    damaged = delivery.payloads.copy()
    damaged[2, 7] ^= 1
    _, again = at_stage(setup, 2)  # the same sum with fresh keys: as a replay after a restart
    replayed = read(again[2][0])
    assert isinstance(replayed, SumDelivery)
    for payloads in (swapped, for_another.payloads, damaged, replayed.payloads):
        with pytest.raises(SecureError, match="was not sealed by it"):
            clients[0].handle(changed(messages[2][0], payloads=payloads))
    assert isinstance(read(clients[0].handle(messages[2][0])), MaskedInput)


def test_rosters_that_are_not_in_order_are_refused() -> None:
    setup = a_setup(5, 3)
    clients, messages = at_stage(setup, 1)
    good = messages[1][0]
    roster = read(good)
    assert isinstance(roster, Roster)
    own_changed, twice = roster.mask_keys.copy(), roster.mask_keys.copy()
    own_changed[0, 0] ^= 1
    twice[2] = twice[1]
    crossed = roster.mask_keys.copy()
    crossed[2] = roster.sealing_keys[1]
    few = {"members": roster.members[:3], "sealing_keys": roster.sealing_keys[:3], "mask_keys": roster.mask_keys[:3]}
    without = {
        "members": roster.members[1:],
        "sealing_keys": roster.sealing_keys[1:],
        "mask_keys": roster.mask_keys[1:],
    }
    for changes, match in (
        ({"mask_keys": own_changed}, "with the keys that it advertised"),
        (without, "with the keys that it advertised"),
        ({"mask_keys": twice}, "one key twice"),
        ({"mask_keys": crossed}, "one key twice"),
        (few, "has 3 clients where at least 4 are due"),
        ({"members": roster.members[::-1]}, "once each, in order"),
        ({"members": roster.members + 1}, "once each, in order"),
        ({"members": np.zeros(5, np.int64)}, "once each, in order"),
        ({"mask_keys": roster.mask_keys[:, :31]}, "keys of shapes"),
        ({"sealing_keys": roster.sealing_keys[:4]}, "keys of shapes"),
    ):
        with pytest.raises(SecureError, match=match):
            clients[0].handle(changed(good, **changes))
    assert isinstance(read(clients[0].handle(good)), SumShares)


def test_deliveries_that_are_not_in_order_are_refused() -> None:
    setup = a_setup(6, 3, 4)
    clients, messages = at_stage(setup, 2, {5: 1})  # client 5 is not on the roster
    good = messages[2][0]
    delivery = read(good)
    assert isinstance(delivery, SumDelivery)
    assert delivery.dealers.tolist() == [1, 2, 3, 4]
    for changes, match in (
        (
            {"dealers": delivery.dealers[:2], "payloads": delivery.payloads[:2]},
            "has 3 clients where at least 4 are due",
        ),
        ({"dealers": np.array([0, 1, 2, 3])}, "once each"),
        ({"dealers": np.array([1, 2, 3, 5])}, "not on its roster"),
        ({"dealers": np.array([1, 2, 3, 6])}, "once each, in order"),
        ({"payloads": delivery.payloads[:3]}, "payloads of shape"),
        ({"payloads": delivery.payloads[:, :-1]}, "payloads of shape"),
    ):
        with pytest.raises(SecureError, match=match):
            clients[0].handle(changed(good, **changes))
    assert isinstance(read(clients[0].handle(good)), MaskedInput)


def test_a_weak_key_is_refused_by_name() -> None:
    """An X25519 key of small order gives a secret that everybody knows."""
    setup = a_setup(5, 3)
    private = X25519PrivateKey.generate()
    with pytest.raises(SecureError, match="the mask key of client 3 is not one"):
        pair_mask(setup, private, 0, 3, bytes(32))


def test_other_protocols_messages_and_clients_that_are_not_there() -> None:
    setup = a_setup(5, 3)
    secpc: Setup = plan(clients=5, width=4, largest=1.0)
    with pytest.raises(SecureError, match="does not take a Setup"):
        SumClient(setup, 0).handle(secpc.to_bytes())
    with pytest.raises(SecureError, match="client 5 is not one of the 5"):
        SumClient(setup, 5)
    with pytest.raises(SecureError, match=r"stage 'share it'"):
        local_sum(setup, vectors_of(5, 3), dropped={"share it": [1]})  # type: ignore[dict-item]
    with pytest.raises(DataError, match="vectors of shape"):
        local_sum(setup, vectors_of(4, 3))
    with pytest.raises(SecureError, match="give one each"):
        local_sum(setup, vectors_of(5, 3), bits=[seeded(0)])


def test_a_client_without_a_vector_says_so() -> None:
    setup = a_setup(5, 3)
    clients, messages = at_stage(setup, 2)
    vector, clients[0].vector = clients[0].vector, None
    with pytest.raises(DataError, match="client 0 has no vector"):
        clients[0].handle(messages[2][0])
    clients[0].vector = vector
    clients[0].handle(messages[2][0])


def test_a_refused_roster_leaves_no_key_behind() -> None:
    """A bad key of one peer is refused, and then the right one is taken."""
    setup = a_setup(5, 3)
    clients, messages = at_stage(setup, 1)
    roster = read(messages[1][0])
    assert isinstance(roster, Roster)
    keys = roster.sealing_keys.copy()
    keys[2] = 0
    with pytest.raises(SecureError, match="the public key of client 2 is not one"):
        clients[0].handle(replace(roster, sealing_keys=keys).to_bytes())
    assert isinstance(read(clients[0].handle(messages[1][0])), SumShares)


# What a server that lies gets


def lying_requests(setup: SumSetup, dead: Sequence[int]) -> dict[int, UnmaskRequest]:
    """Requests in each of which t clients are living, and yet t clients are asked for the key of each of `dead`."""
    most = setup.clients - setup.threshold
    named: dict[int, list[int]] = {client: [] for client in range(setup.clients)}
    for victim in dead:
        asked = sorted((client for client in named if client != victim), key=lambda client: len(named[client]))
        for client in asked[: setup.threshold]:
            named[client].append(victim)
    assert max(map(len, named.values())) <= most
    requests = {}
    for client, victims in named.items():
        living = [other for other in range(setup.clients) if other not in victims]
        requests[client] = UnmaskRequest(*head(setup), np.array(living), np.array(sorted(victims), np.int64))
    return requests


@pytest.mark.parametrize(("n", "t", "colluders", "left"), [(11, 6, 0, 2), (10, 7, 1, 6), (8, 5, 1, 4)])
def test_a_server_that_tells_each_client_of_other_dead_opens_nothing(n: int, t: int, colluders: int, left: int) -> None:
    """It would have t shares of everything that it needs for the sum of `left` clients, fewer than t.

    It may show a client any confirmations that there are. None is of the same request, so no share leaves.
    """
    setup = a_setup(n, 3, t, 1.0, colluders=colluders)
    clients, _ = at_stage(setup, 3)
    requests = lying_requests(setup, range(n - left))
    asked = {kind: [0] * n for kind in ("living", "dead")}
    for request in requests.values():
        for kind in asked:
            for client in getattr(request, kind).tolist():
                asked[kind][client] += 1
    assert min(asked["dead"][: n - left]) >= t
    assert min(asked["living"][n - left :]) >= t
    words = {client: read(clients[client].handle(requests[client].to_bytes())) for client in range(n)}
    for client, request in requests.items():
        living = request.living.tolist()
        members, tags = [], []
        for other in living:
            seen = requests[other].living.tolist()
            if other != client and client in seen:
                word = words[other]
                assert isinstance(word, Confirmation)
                members.append(other)
                tags.append(word.tags[[each for each in seen if each != other].index(client)])
        shown = Confirmations(*head(setup), np.array(members), np.stack(tags))
        alike = sum(requests[each].to_bytes() == request.to_bytes() for each in living)
        assert alike < t
        with pytest.raises(SecureError, match=f"{alike} clients confirm who is living and dead where at least {t}"):
            clients[client].handle(shown.to_bytes())


def test_one_clients_bad_confirmations_keep_nobody_from_the_sum() -> None:
    setup = a_setup(7, 3, 5)
    server = meddled(setup, {2: (Confirmation, lambda m: replace(m, tags=m.tags ^ np.uint8(1)))})
    assert not server.rejected


def test_confirmations_are_of_the_living_once_each_and_for_their_receiver() -> None:
    setup = a_setup(7, 3, 5)
    clients, messages = at_stage(setup, 4, {6: 3})
    good = read(messages[4][0])
    assert isinstance(good, Confirmations)
    assert good.members.tolist() == [1, 2, 3, 4, 5]
    twice = good.members.copy()
    twice[1] = 1
    for changes, match in (
        ({"members": twice}, "once each, in order"),
        ({"members": good.members[::-1]}, "once each, in order"),
        ({"members": np.array([0, 2, 3, 4, 5])}, "of living clients"),
        ({"members": np.array([1, 2, 3, 4, 6])}, "of living clients"),
        ({"tags": good.tags[1:]}, "malformed"),
        ({"tags": good.tags[:, :15]}, "1 clients confirm"),
        ({"members": good.members[:3], "tags": good.tags[:3]}, "4 clients confirm .* at least 5 are due"),
        ({"tags": good.tags[[1, 0, 2, 4, 3]]}, "2 clients confirm"),
        ({"tags": read(messages[4][1]).tags}, "1 clients confirm"),  # type: ignore[attr-defined]
    ):
        with pytest.raises(SecureError, match=match):
            clients[0].handle(replace(good, **changes).to_bytes())
    assert isinstance(read(clients[0].handle(messages[4][0])), Unmasking)


# What the server refuses


# A header that is nested deeper than a parser goes.
DEEP = safetensors.numpy.save({"header": np.frombuffer(b"[" * 2500, np.uint8)})


class Meddler(SumClient):
    """A client whose replies of a kind are changed before they leave."""

    kind: type[SumMessage] = SumMessage
    change: Callable[[Any], SumMessage | bytes]

    def handle(self, content: bytes) -> bytes:
        reply = super().handle(content)
        message = read(reply)
        if not isinstance(message, self.kind):
            return reply
        other = self.change(message)
        return other if isinstance(other, bytes) else other.to_bytes()


def meddled(
    setup: SumSetup, changes: Mapping[int, tuple[type[SumMessage], Callable[[Any], SumMessage | bytes]]]
) -> SumServer:
    """A server that was sent what some clients changed; it opened the sum of those whose vectors it took."""
    vectors = vectors_of(setup.clients, setup.dimension)
    clients: list[SumClient] = []
    for number, vector in enumerate(vectors):
        client = Meddler(setup, number, vector) if number in changes else SumClient(setup, number, vector)
        if isinstance(client, Meddler):
            client.kind, client.change = changes[number]
        clients.append(client)
    server = SumServer(setup)
    exchange = server.sum()
    messages = next(exchange)
    try:
        while True:
            messages = exchange.send(
                [(number, clients[number].handle(content)) for number, content in messages.items()]
            )
    except StopIteration as end:
        found: SecureSum = end.value
    assert (found.total == expected(setup, vectors, found.survivors)).all()
    return server


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        (Advertisement, lambda m: replace(m, mask_key=m.mask_key[:5]), "malformed: keys of"),
        (Advertisement, lambda m: replace(m, mask_key=m.sealing_key), "advertised twice"),
        (SumShares, lambda m: replace(m, payloads=m.payloads[:-1]), "malformed: payloads"),
        (MaskedInput, lambda m: replace(m, values=m.values[:-4]), "malformed: 8 bytes where 12 are due"),
        (MaskedInput, lambda m: replace(m, sender=3), "malformed: it speaks for client 3"),
        (MaskedInput, lambda m: replace(m, round=3), "late: of round 3"),
        (MaskedInput, lambda m: replace(m, setup=m.setup[:31]), "foreign"),
        (MaskedInput, lambda m: Invitation(m.round, m.setup), "out of turn: Invitation where MaskedInput was due"),
        (MaskedInput, lambda m: m.to_bytes() + bytes(10**5), "malformed: .* bytes where at most"),
        (MaskedInput, lambda m: b"", "malformed"),
        (Advertisement, lambda m: replace(m, sealing_key=np.zeros(32, np.uint8)), "a public key that is not one"),
        (
            Advertisement,
            lambda m: replace(m, mask_key=np.zeros(32, np.uint8)),
            "a public key that is not one",
        ),
        (MaskedInput, lambda m: DEEP, "malformed: not a message"),
        (Confirmation, lambda m: replace(m, tags=m.tags[1:]), "malformed: tags of"),
        (Unmasking, lambda m: replace(m, shares=m.shares[1:]), "malformed: shares of shape"),
        (Unmasking, lambda m: replace(m, shares=m.shares + np.uint64(2**61)), "out of range"),
        (Unmasking, lambda m: replace(m, shares=m.shares ^ np.uint64(1)), "contradict"),
    ],
)
def test_the_server_names_who_sends_what_is_not_in_order_and_goes_on(
    kind: type[SumMessage], change: Callable[[Any], SumMessage | bytes], match: str
) -> None:
    server = meddled(a_setup(7, 3, 5), {2: (kind, change)})
    assert [each.client for each in server.rejected] == [2]
    with pytest.raises(SecureError, match=match):
        raise SecureError(server.rejected[0].reason)


def test_more_wrong_shares_than_can_be_located_open_nothing() -> None:
    """Seven answers where five are needed locate one wrong one, and detect two."""
    wrong = (Unmasking, lambda m: replace(m, shares=m.shares ^ np.uint64(1)))
    with pytest.raises(TooManyErrors, match="nothing was decoded"):
        meddled(a_setup(7, 3, 5), {2: wrong, 3: wrong})


def test_shares_of_another_key_than_was_advertised_open_nothing() -> None:
    """A client that deals shares of something else, and drops out, is named; its masks cannot be taken off."""
    setup = a_setup(5, 3, 4)
    clients = clients_of(setup)
    clients[4]._mask_secret = bytes(32)
    with pytest.raises(SecureError, match="the shares that client 4 dealt are not of the key"):
        questions(setup, clients, {4: 3})


def test_replies_of_nobody_and_twice_are_not_taken() -> None:
    setup = a_setup(5, 3)
    clients = clients_of(setup)
    server = SumServer(setup)
    exchange = server.sum()
    messages = next(exchange)
    replies = [(number, clients[number].handle(content)) for number, content in messages.items()]
    exchange.send([*replies, replies[0], (77, replies[1][1])])
    assert [(each.client, each.reason.split(":")[0]) for each in server.rejected] == [
        (0, "duplicated"),
        (77, "not asked"),
    ]


def test_a_late_vector_is_not_in_the_sum_and_its_client_gives_no_shares() -> None:
    """The double mask is for this: the server has the vector and the key of a client it named dead, not its seed."""
    setup = a_setup(5, 3, 4)
    clients = clients_of(setup)
    every, found = questions(setup, clients, {4: 3})
    assert found.survivors == (0, 1, 2, 3)
    late = read(clients[4].handle(every[2][4]))
    assert isinstance(late, MaskedInput)
    with pytest.raises(SecureError, match="client 4 is asked to unmask a sum that it is not named in"):
        clients[4].handle(every[3][0])


# Bytes


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=60)
def test_garbage_is_malformed_for_clients_and_server(content: bytes) -> None:
    setup = GARBAGE
    with pytest.raises(SecureError, match="malformed"):
        SumClient(setup, 0).handle(content)
    server = SumServer(setup)
    exchange = server.sum()
    next(exchange)
    with pytest.raises(TooFewAnswers):
        exchange.send([(client, content) for client in range(5)])
    assert len(server.rejected) == 5


GARBAGE = a_setup(5, 3)


@pytest.mark.parametrize("stage", range(5))
def test_any_changed_byte_is_refused_or_changes_nothing_but_what_it_says(stage: int) -> None:
    """No byte of a question makes a client fail otherwise than by a refusal; so too with replies and the server."""
    setup = a_setup(5, 3, 4)
    clients, messages = at_stage(setup, stage)
    content = messages[stage][0]
    generator = np.random.default_rng(stage)
    refused = 0
    for place in generator.choice(len(content), 150, replace=len(content) < 150):
        broken = bytearray(content)
        broken[place] ^= int(generator.integers(1, 256))
        try:
            clients[0].handle(bytes(broken))
        except SecureError:
            refused += 1
        else:  # a changed key of a peer, or padding: the client went on
            clients, messages = at_stage(setup, stage)
            content = messages[stage][0]
    assert refused > 100 if stage != 1 else refused


def test_over_long_messages_are_refused_unread() -> None:
    setup = a_setup(5, 3)
    with pytest.raises(SecureError, match=f"bytes where at most {setup.largest_message} are due"):
        SumClient(setup, 0).handle(bytes(setup.largest_message + 1))


@pytest.mark.parametrize(("n", "d"), [(2, 1), (5, 3), (30, 1), (4, 5000)])
def test_no_message_of_the_protocol_is_longer_than_is_read(n: int, d: int) -> None:
    setup = a_setup(n, d, noise=1.0 if n == 2 else 0.0, colluders=0)
    every, _ = questions(setup, clients_of(setup))
    assert max(len(content) for messages in every for content in messages.values()) <= setup.largest_message


def test_bytes_per_client_grow_by_the_vector_and_by_the_clients_and_not_by_their_product() -> None:
    def traffic(n: int, d: int) -> int:
        return local_sum(a_setup(n, d, colluders=0), np.zeros((n, d)))[1].of_client(0)

    assert traffic(5, 5000) - traffic(5, 1000) == pytest.approx(4 * 4000, abs=16)  # lengths in headers have digits
    per_peer = (traffic(45, 8) - traffic(5, 8)) / 40
    due = 2 * 96 + 64 + 2 * 16  # payloads, keys and confirmations, without numbers and shares
    assert due < per_peer < due + 100


# Masks


def test_limbs_hold_a_secret() -> None:
    for secret in (bytes(32), bytes([255]) * 32, bytes(range(32))):
        assert from_limbs(to_limbs(secret)) == secret
        assert (to_limbs(secret) < 2**60).all()
    for limbs in ([2**60, 0, 0, 0, 0], [0, 0, 0, 0, 2**16]):
        with pytest.raises(SecureError, match="do not belong to a secret"):
            from_limbs(np.array(limbs, np.uint64))


def test_the_keystream_is_that_of_the_standard() -> None:
    """AES-256 in counter mode from a zero block: NIST SP 800-38A's key, against the block cipher itself."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    count = 2**17 // 4 + 5
    stream = b"".join(block.update(number.to_bytes(16, "big")) for number in range(count))
    for word in (np.dtype("<u4"), np.dtype("<u8")):
        words = keystream(key, count, word)
        assert words.tobytes() == stream[: words.nbytes]


def test_pairwise_masks_cancel_and_differ_by_everything_that_names_them() -> None:
    setup = a_setup(5, 64)
    one, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    keys = [each.public_key().public_bytes_raw() for each in (one, other)]
    mask = pair_mask(setup, one, 0, 1, keys[1])
    assert not (mask + pair_mask(setup, other, 1, 0, keys[0])).any()
    elsewhere = [replace(setup, round=2), replace(setup, session=OTHER)]
    others = [
        *(pair_mask(each, one, 0, 1, keys[1]) for each in elsewhere),
        pair_mask(setup, one, 0, 2, keys[1]),
        pair_mask(setup, one, 3, 1, keys[1]),
        self_mask(setup, 0, bytes(32)),
        self_mask(setup, 1, bytes(32)),
        *(self_mask(each, 0, bytes(32)) for each in elsewhere),
    ]
    every = [mask, *others]
    assert len({each.tobytes() for each in every}) == len(every)


def test_messages_come_back_as_they_were() -> None:
    """With the fields that each kind has, from a real sum."""
    setup = a_setup(5, 3)
    clients = clients_of(setup)
    every, _ = questions(setup, clients)
    contents = [messages[0] for messages in every]
    fresh = clients_of(setup)
    exchange = SumServer(setup).sum()
    messages = next(exchange)
    for _ in range(5):
        replies = [(number, fresh[number].handle(content)) for number, content in messages.items()]
        contents.append(replies[0][1])
        try:
            messages = exchange.send(replies)
        except StopIteration:
            break
    kinds = set()
    for content in [*contents, setup.to_bytes()]:
        message = read(content)
        kinds.add(type(message))
        assert message.to_bytes() == content
        assert {each.name for each in fields(message)} >= {"round"}
    assert kinds == {*SumMessage.__subclasses__(), SumSetup}
    assert "SumMessage" not in Message.KINDS


def test_clients_draw_fresh_secrets() -> None:
    setup = a_setup(5, 3)
    keys = [read(SumClient(setup, 0).handle(Invitation(*head(setup)).to_bytes())) for _ in range(2)]
    assert all(isinstance(each, Advertisement) for each in keys)
    assert keys[0].mask_key.tobytes() != keys[1].mask_key.tobytes()  # type: ignore[attr-defined]
    assert keys[0].sealing_key.tobytes() != keys[1].sealing_key.tobytes()  # type: ignore[attr-defined]
    assert keys[0].sealing_key.tobytes() != keys[0].mask_key.tobytes()  # type: ignore[attr-defined]


def head(setup: SumSetup) -> tuple[int, np.ndarray]:
    return setup.round, np.frombuffer(setup.digest, np.uint8)
