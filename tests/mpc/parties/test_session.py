"""Parties over gRPC with mutual TLS: what is computed, who may ask for what, and what becomes of a broken session."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch.nn.functional import cosine_similarity

from mpc.small import agree, batches, groups, sentences, small_tower
from sordino.mpc.dealing.correlations import CORRELATIONS, Harmonics, Lift, Mask, Powers, Product, TripleProduct
from sordino.mpc.errors import MpcError, OutOfRange, PartyLost
from sordino.mpc.parties import transport
from sordino.mpc.parties.certificates import DATA_OWNER, MODEL_OWNER, ROLES, SERVERS, Identity, make_certificates
from sordino.mpc.parties.dealer_service import RemoteDealer, correlation_from, correlation_to, start_dealer
from sordino.mpc.parties.server import start_server
from sordino.mpc.parties.session import connect, provide
from sordino.mpc.parties.transport import PATIENCE, PIECE, ClientConnection, Stream, listen, packed, unpacked
from sordino.mpc.tower.calibration import Calibration
from sordino.mpc.tower.sentences import Sentences, encoded, in_the_clear

TIMEOUT = 6.0


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("parties")
    make_certificates(folder)
    return {role: Identity.load(folder / role, role) for role in ROLES}


@dataclass
class Parties:
    """Running, each with its own gRPC server."""

    identities: dict[str, Identity]
    dealer: tuple[grpc.Server, str]
    servers: list[tuple[grpc.Server, str]]

    @property
    def addresses(self) -> list[str]:
        return [address for _, address in self.servers]


@pytest.fixture
def parties(identities: dict[str, Identity]) -> Iterator[Parties]:
    dealer = start_dealer(identities["dealer"], "127.0.0.1:0", TIMEOUT)
    first = start_server(identities["server-0"], "127.0.0.1:0", dealer[1], timeout=TIMEOUT)
    second = start_server(identities["server-1"], "127.0.0.1:0", dealer[1], first[1], TIMEOUT)
    running = Parties(identities, dealer, [first, second])
    yield running
    for server, _ in (*running.servers, dealer):
        server.stop(grace=None)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration.measure(small_tower(), batches(1))


def session_of(parties: Parties) -> Any:
    return connect(parties.identities[DATA_OWNER], parties.addresses, TIMEOUT)


def test_features_equal_those_in_the_clear(parties: Parties, calibration: Calibration) -> None:
    """Over several passes, batches and sessions, with costs that do not depend on the run."""
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    costs = []
    for _ in range(2):
        with session_of(parties) as session:
            set_up = session.costs.total
            assert set_up.rounds == 1
            assert agree(session.forward(groups()), groups())
            once = session.costs.total
            assert agree(session.forward(groups()), groups())
            twice = session.costs.total
            assert twice.rounds - once.rounds == once.rounds - set_up.rounds > 50
            assert twice.online - once.online == once.online - set_up.online
            assert twice.offline - once.offline == once.offline - set_up.offline > 0
        costs.append(twice)
    assert costs[0] == costs[1]


def test_rows_of_any_length_keep_their_order(parties: Parties, calibration: Calibration) -> None:
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    rows = [sentences(1, length, seed=length)[0] for length in (13, 2, 7, 32, 5, 8)]
    with session_of(parties) as session:
        found = encoded(session.forward, rows)
    assert cosine_similarity(found, encoded(in_the_clear(small_tower()), rows), dim=-1).min() > 0.9995


def test_two_sessions_at_once(parties: Parties, calibration: Calibration) -> None:
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    good: list[bool] = []

    def work() -> None:
        with session_of(parties) as session:
            good.append(agree(session.forward(groups()), groups()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True, True]


def test_embeddings_of_another_model(parties: Parties, calibration: Calibration) -> None:
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    wide = Sentences(torch.zeros(1, 4, 48), torch.tensor([4]))
    with session_of(parties) as session:
        with pytest.raises(MpcError, match=r"48 wide where the servers' model takes 32: set model\.embeddings"):
            session.forward([wide])
        assert agree(session.forward(groups()), groups())


@pytest.mark.parametrize("place", [0, 3])
def test_embeddings_that_were_not_calibrated_for(parties: Parties, calibration: Calibration, place: int) -> None:
    """On shares nothing could tell; padding may be what it likes."""
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    far, padded = (Sentences(sentences(2, 8, seed=5), torch.tensor([8, length])) for length in (8, 7))
    far.embeddings[1, place] *= 20
    padded.embeddings[1, 7] *= 20
    with session_of(parties) as session:
        with pytest.raises(OutOfRange, match=r"embeddings of a variance of .* calibrated for .* search\.keep_norms"):
            session.forward([far])
        assert agree(session.forward([padded]), [padded])


def test_a_session_that_is_begun_at_one_server_only_ends(parties: Parties, calibration: Calibration) -> None:
    """Server 1 does not wait for one that never comes, although server 0 is alive."""
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    connection = ClientConnection(parties.identities[DATA_OWNER], SERVERS[1], parties.addresses[1], TIMEOUT)
    stream, began = connection.stream("Session"), time.monotonic()
    stream.send(session="alone")
    with pytest.raises(PartyLost, match="data owner did not begin the session at server-0"):
        stream.receive()
    assert time.monotonic() - began < 2 * TIMEOUT
    connection.close()


def test_no_model(parties: Parties) -> None:
    with pytest.raises(PartyLost, match=r"server-\d .* holds no model yet; the model owner runs"), session_of(parties):
        pass


def test_different_models(parties: Parties, calibration: Calibration) -> None:
    """Each server has one, by two model owners that did not speak with each other; their masked weights fit."""
    owner = parties.identities[MODEL_OWNER]
    elsewhere = start_server(parties.identities["server-0"], "127.0.0.1:0", parties.dealer[1], timeout=TIMEOUT)
    try:
        provide(owner, [elsewhere[1], parties.addresses[1]], small_tower(), calibration, TIMEOUT)
        kept = parties.addresses
        other = start_server(parties.identities["server-1"], "127.0.0.1:0", parties.dealer[1], kept[0], TIMEOUT)
        try:
            provide(owner, [kept[0], other[1]], small_tower(), calibration, TIMEOUT)
            with pytest.raises(MpcError, match="shares of different models"), session_of(parties):
                pass
        finally:
            other[0].stop(grace=None)
    finally:
        elsewhere[0].stop(grace=None)


def test_shares_of_one_model_that_do_not_belong_together(parties: Parties, calibration: Calibration) -> None:
    """A model that was provided again keeps its name. Where only one server got the new shares, sums would be noise."""
    owner, other = parties.identities[MODEL_OWNER], parties.identities["server-1"]
    assert provide(owner, parties.addresses, small_tower(), calibration, TIMEOUT, name="model") == "model"
    elsewhere = start_server(other, "127.0.0.1:0", parties.dealer[1], parties.addresses[0], TIMEOUT)
    try:
        provide(owner, [parties.addresses[0], elsewhere[1]], small_tower(), calibration, TIMEOUT, name="model")
        with pytest.raises(MpcError, match="shares of one model that do not belong together"), session_of(parties):
            pass
    finally:
        elsewhere[0].stop(grace=None)
    provide(owner, parties.addresses, small_tower(), calibration, TIMEOUT, name="model")
    with session_of(parties) as session:
        assert session.model == "model"
        assert agree(session.forward(groups()), groups())


@pytest.mark.parametrize(
    ("role", "method", "listener"),
    [
        (MODEL_OWNER, "Session", 0),
        (DATA_OWNER, "Install", 1),
        (DATA_OWNER, "Peer", 0),
        (DATA_OWNER, "Deal", "dealer"),
    ],
)
def test_a_role_may_ask_for_its_own_things_only(parties: Parties, role: str, method: str, listener: Any) -> None:
    """A data owner that could speak to the dealer would get a server's key, and with it the other's share."""
    name, address = (
        ("dealer", parties.dealer[1]) if listener == "dealer" else (SERVERS[listener], parties.addresses[listener])
    )
    connection = ClientConnection(parties.identities[role], name, address, TIMEOUT)
    stream = connection.stream(method)
    stream.send(session="a")
    with pytest.raises(PartyLost, match=f"{name} .* refused: {role} may not ask for {method}"):
        stream.receive()
    connection.close()


def test_strangers_are_not_believed(parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a data owner nor a server with certificates of another authority; nor a server that is the other one.

    Not by the look at the certificate that comes first, and without it not by gRPC either.
    """
    make_certificates(tmp_path)
    stranger = Identity.load(tmp_path / DATA_OWNER, DATA_OWNER)
    believed = parties.identities[DATA_OWNER]
    swapped = list(reversed(parties.addresses))
    by_look = (r"another authority than that of data-owner", r"shows server-1's certificate")
    by_grpc = r"server-\d \(127.0.0.1:\d+\) is (not whom|gone or cannot be reached)"
    for messages in (by_look, (by_grpc, by_grpc)):
        for identity, addresses, message in (
            (stranger, parties.addresses, messages[0]),
            (believed, swapped, messages[1]),
        ):
            with pytest.raises(PartyLost, match=message), connect(identity, addresses, TIMEOUT):
                pass
        monkeypatch.setattr(transport, "check_shown", lambda *_: None)


def test_a_servers_key_is_given_once(parties: Parties) -> None:
    """A second one would draw the same masks."""
    address, own = parties.dealer[1], parties.identities["server-1"]
    first = RemoteDealer(own, address, "session", TIMEOUT)
    with pytest.raises(PartyLost, match="had the key of this session before"):
        RemoteDealer(own, address, "session", TIMEOUT)
    assert RemoteDealer(own, address, "another", TIMEOUT).key != first.key
    other = RemoteDealer(parties.identities["server-0"], address, "session", TIMEOUT)
    assert other.key != first.key
    with pytest.raises(PartyLost, match="draws from its own key"):
        other.deal(0, Product(Mask(0, (2,), 64), Mask(1, (2,), 64), "multiply"))
    first.close()
    time.sleep(0.5)
    with pytest.raises(PartyLost, match="had the key of this session before"):
        RemoteDealer(own, address, "session", TIMEOUT)


@pytest.mark.parametrize(
    "correlation",
    [
        Product(Mask(3, (2, 5), 30), Mask(1, (5, 4), 41), "matmul", 30),
        TripleProduct((Mask(0, (2,), 9), Mask(1, (2,), 9), Mask(2, (1,), 9)), 9),
        Powers(Mask(0, (2,), 64), Mask(1, (2,), 64), 3),
        Lift(Mask(0, (7,), 31), 5),
        Harmonics(Mask(0, (3,), 16), 16, (1, 3, 5), 14, 40),
    ],
)
def test_correlations_survive_the_wire(correlation: Any) -> None:
    header, _ = unpacked(packed(correlation=correlation_to(correlation)))
    assert correlation_from(header["correlation"]) == correlation


def test_every_correlation_is_tried_above() -> None:
    tried = {Product, TripleProduct, Powers, Lift, Harmonics}
    assert set(CORRELATIONS) == tried


@pytest.mark.parametrize("content", [{}, {"kind": "Dealer"}, {"kind": "Lift", "mask": 3}, {"kind": "Lift"}])
def test_no_correlation(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"correlation|Lift"):
        correlation_from(content)


# What goes wrong. A party in the place of another, which behaves as told.


def astray(stream: Stream, behaviour: str) -> None:
    """In the place of a party, after its first message."""
    stream.receive()
    if behaviour == "garbage":
        stream._outbox.put(b"\x00\x00")
    elif behaviour == "short":
        stream.send(b"123")


WORDS = {"garbage": "sent garbage", "short": "sent garbage: 3 bytes where", "gone": "ended|is gone"}


@pytest.mark.parametrize("behaviour", ["garbage", "short", "gone"])
def test_a_dealer_astray_is_named(identities: dict[str, Identity], calibration: Calibration, behaviour: str) -> None:
    def deal(stream: Stream) -> None:
        stream.receive()
        stream.send(bytes(32))
        astray(stream, behaviour)

    dealer = listen(identities["dealer"], "127.0.0.1:0", TIMEOUT, {"Deal": dict.fromkeys(SERVERS, deal)})
    first = start_server(identities["server-0"], "127.0.0.1:0", dealer[1], timeout=TIMEOUT)
    second = start_server(identities["server-1"], "127.0.0.1:0", dealer[1], first[1], TIMEOUT)
    try:
        provide(identities[MODEL_OWNER], [first[1], second[1]], small_tower(), calibration, TIMEOUT)
        with (
            pytest.raises(PartyLost, match=f"dealer .*({WORDS[behaviour]})"),
            connect(identities[DATA_OWNER], [first[1], second[1]], TIMEOUT) as session,
        ):
            session.forward(groups())
    finally:
        for server, _ in (dealer, first, second):
            server.stop(grace=None)


@pytest.mark.parametrize("behaviour", ["garbage", "short", "gone"])
def test_a_server_astray_is_named(parties: Parties, behaviour: str, calibration: Calibration) -> None:
    """Server 0, as server 1 and the data owner see it: it says that it is ready, and what it sends then is wrong."""

    def peer(stream: Stream) -> None:
        astray(stream, behaviour)

    identities = parties.identities
    honest = parties.servers[0]
    provide(identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    first = listen(identities["server-0"], "127.0.0.1:0", TIMEOUT, {"Peer": {"server-1": peer}})
    second = start_server(identities["server-1"], "127.0.0.1:0", parties.dealer[1], first[1], TIMEOUT)
    try:
        provide(identities[MODEL_OWNER], [honest[1], second[1]], small_tower(), calibration, TIMEOUT)
        connection = ClientConnection(identities[DATA_OWNER], "server-1", second[1], TIMEOUT)
        stream = connection.stream("Session")
        stream.send(session="one")
        with pytest.raises(PartyLost, match=f"server-1 .*: server-0 .*({WORDS[behaviour]})"):
            stream.receive()
        connection.close()
    finally:
        for server, _ in (first, second):
            server.stop(grace=None)


REPLIES = {
    "no costs": {"fraction": 4, "bits": 64, "seconds": {"online": 1, "offline": 1}},
    "no seconds": {"fraction": 4, "bits": 64, "seconds": [1], "costs": []},
    "no form": {"fraction": 64, "bits": 64, "seconds": {"online": 1, "offline": 1}, "costs": []},
}


@pytest.mark.parametrize("reply", REPLIES)
def test_a_server_that_answers_garbage_is_named(parties: Parties, calibration: Calibration, reply: str) -> None:
    """In place of features, of the right length."""
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    group = groups()[0]
    with session_of(parties) as session:
        stream = session._streams[1]
        stream.receive = lambda: (REPLIES[reply], bytes(8 * group.embeddings[:, 0].numel()))
        with pytest.raises(PartyLost, match=r"server-1 .* sent garbage"):
            session.forward([group])
        del stream.receive


def test_features_that_no_sentence_has_name_the_servers(parties: Parties, calibration: Calibration) -> None:
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    with session_of(parties) as session:
        stream = session._streams[0]
        honest = stream.receive

        def noise() -> Any:
            header, payload = honest()
            return header, torch.randint(-(2**62), 2**62, (len(payload) // 8,)).numpy().tobytes()

        stream.receive = noise
        with pytest.raises(PartyLost, match=r"no sentence has: server-0 .* or server-1 .* is astray"):
            session.forward(groups())
        stream.receive = honest


@pytest.mark.parametrize(
    "header",
    [{}, {"name": "a", "plan": 3, "weights": []}, {"name": "a", "plan": "{}", "weights": {"w": {"shape": [2]}}}],
)
def test_what_is_no_model_is_refused(parties: Parties, calibration: Calibration, header: dict[str, Any]) -> None:
    """And the model before it stays."""
    owner = parties.identities[MODEL_OWNER]
    provide(owner, parties.addresses, small_tower(), calibration, TIMEOUT)
    connection = ClientConnection(owner, SERVERS[1], parties.addresses[1], TIMEOUT)
    stream = connection.stream("Install")
    stream.send(b"12345", **header)
    with pytest.raises(PartyLost, match=r"model-owner .* sent garbage: no model"):
        stream.receive()
    connection.close()
    with session_of(parties) as session:
        assert agree(session.forward(groups()), groups())


def test_a_message_without_an_end_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LARGEST", 2 * PIECE)
    for parts, taken in ((3, True), (4, False)):
        stream = Stream("somebody", TIMEOUT)
        for _ in range(parts):
            stream._inbox.put(packed(bytes(PIECE), part=True))
        stream._inbox.put(packed(b"end"))
        if taken:
            assert stream.receive()[1] == bytes(parts * PIECE) + b"end"
        else:
            with pytest.raises(PartyLost, match="a message without an end"):
                stream.receive()
    for piece in (b"", b"123", bytes(PIECE + 1)):
        stream = Stream("somebody", TIMEOUT)
        stream._inbox.put(packed(piece, part=True))
        with pytest.raises(PartyLost, match="somebody sent garbage: a message without an end"):
            stream.receive()


def test_who_lives_and_does_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not who gets on: patience is with each message anew."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = Stream("somebody", 1.0)
    for _ in range(5):
        stream._inbox.put(packed(alive=True))
        stream._inbox.put(packed(b"x"))
        assert stream.receive()[1] == b"x"
        now += PATIENCE - 1

    def later() -> bytes:
        nonlocal now
        now += 1
        return packed(alive=True)

    stream._inbox = type("Inbox", (), {"get": staticmethod(lambda timeout: later())})()  # type: ignore[assignment]
    with pytest.raises(PartyLost, match=r"somebody lives, but sent nothing for 10 s.*session\.timeout"):
        stream.receive()


def test_each_batch_is_answered_when_it_is_done(parties: Parties, calibration: Calibration) -> None:
    """So that a long message is no long silence."""
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    with session_of(parties) as session:
        answers, stream = [], session._streams[1]
        honest = stream.receive

        def counted() -> Any:
            answers.append(honest())
            return answers[-1]

        stream.receive = counted
        assert agree(session.forward([*groups(), *groups()]), [*groups(), *groups()])
        stream.receive = honest
    assert len(answers) == 2 * len(groups())


def test_a_data_owner_that_sends_garbage_ends_its_own_session_only(parties: Parties, calibration: Calibration) -> None:
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    with session_of(parties) as session:
        for stream in session._streams:
            stream.send(b"", batches=[{"shape": [1, -2], "lengths": []}])
        with pytest.raises(PartyLost, match="data-owner .* sent garbage: no sentences"):
            session._answers()
    with session_of(parties) as session:
        assert agree(session.forward(groups()), groups())


def test_a_server_that_is_gone_is_named_at_once(parties: Parties, calibration: Calibration) -> None:
    provide(parties.identities[MODEL_OWNER], parties.addresses, small_tower(), calibration, TIMEOUT)
    with session_of(parties) as session:
        session.forward(groups())
        parties.servers[1][0].stop(grace=None).wait()
        with pytest.raises(PartyLost, match="server-1"):
            session.forward(groups())


def test_messages() -> None:
    assert unpacked(packed(b"\x00\xff", a=[1], b="x")) == ({"a": [1], "b": "x"}, b"\x00\xff")
    for content in (b"", b"\x00\x00\x00\x01", b"\x00\x00\x00\x02[]", b"\xff\xff\xff\xff{}"):
        with pytest.raises(ValueError, match=r"shorter|cut off|JSON"):
            unpacked(content)
