"""The first messages between any two parties: versions, whose certificate is shown, and when it expires."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

import sordino
from mpc.small import batches, small_tower
from sordino.errors import ConfigError
from sordino.mpc.errors import PartyLost
from sordino.mpc.parties import certificates, transport, versions
from sordino.mpc.parties.certificates import DATA_OWNER, DEALER, MODEL_OWNER, ROLES, SERVERS, Identity
from sordino.mpc.parties.dealer_service import RemoteDealer, start_dealer
from sordino.mpc.parties.server import ServerService, _say, start_server
from sordino.mpc.parties.session import connect, provide
from sordino.mpc.parties.transport import SERVICE, ClientConnection, Stream, listen, packed, unpacked
from sordino.mpc.tower.calibration import Calibration

TIMEOUT = 6.0
Address = tuple[grpc.Server, str]


def make_parties(folder: Path, seconds: dict[str, float]) -> dict[str, Identity]:
    """Certificates of one authority, of which some expire after a few seconds; the others after 100 days."""
    authority = generate_private_key(SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    root = certificates._certificate(issuer, issuer, authority, authority, 100).public_bytes(Encoding.PEM)
    identities = {}
    for role in ROLES:
        key = generate_private_key(SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)])
        days = seconds.get(role, 100 * 86400) / 86400
        own = certificates._certificate(subject, issuer, key, authority, days)  # type: ignore[arg-type]
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / role).mkdir(parents=True)
        for name, content in (
            (certificates.KEY, secret),
            (certificates.CERTIFICATE, own.public_bytes(Encoding.PEM)),
            (certificates.AUTHORITY, root),
        ):
            (folder / role / name).write_bytes(content)
        (folder / role / certificates.KEY).chmod(0o600)
        identities[role] = Identity(role, secret, own.public_bytes(Encoding.PEM), root)
    return identities


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return make_parties(tmp_path / "parties", {})


@pytest.fixture
def started() -> Iterator[list[Address]]:
    """Servers that are stopped at the end."""
    servers: list[Address] = []
    yield servers
    for server, _ in servers:
        server.stop(grace=None)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The package's log, in which nothing was told yet."""
    certificates._warn_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("sordino"), "propagate", True)
    return caplog


# Every connection between two parties: who calls, who is called, and what the caller does.

Identities = dict[str, Identity]


def session(identities: Identities, addresses: list[str]) -> None:
    with connect(identities[DATA_OWNER], addresses, TIMEOUT):
        raise AssertionError("a session began")


def install(identities: Identities, addresses: list[str]) -> None:
    calibration = Calibration.measure(small_tower(), batches(1, 5))
    provide(identities[MODEL_OWNER], addresses, small_tower(), calibration, TIMEOUT)


def peer(identities: Identities, addresses: list[str]) -> None:
    stream, end = ServerService(identities[SERVERS[1]], "x:1", addresses[0], TIMEOUT).stream_to_peer("session")
    try:
        stream.receive()
    finally:
        end()


def deal(identities: Identities, addresses: list[str]) -> None:
    RemoteDealer(identities[SERVERS[0]], addresses[0], "session", TIMEOUT)


CALLS: dict[str, tuple[Callable[[Identities, list[str]], None], str, str]] = {
    "Session": (session, DATA_OWNER, SERVERS[0]),
    "Install": (install, MODEL_OWNER, SERVERS[0]),
    "Peer": (peer, SERVERS[1], SERVERS[0]),
    "Deal": (deal, SERVERS[0], DEALER),
}


def other_party(identity: Identity, method: str, caller: str, first: bytes, heard: list[Any]) -> Address:
    """A party whose first message is `first`, and which notes the header that it is greeted with."""

    def handle(incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:
        header, _ = unpacked(next(incoming))
        heard.append(header)
        yield first
        time.sleep(TIMEOUT)

    handlers = {method: grpc.stream_stream_rpc_method_handler(handle)}
    server = grpc.server(ThreadPoolExecutor(4), options=transport.OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_secure_port("127.0.0.1:0", identity.server_credentials())
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({"versions": {"package": "9.8.7", "protocol": versions.PROTOCOL}}, r"sordino 9\.8\.7 with protocol \d+"),
        ({"versions": {"package": sordino.__version__, "protocol": 77}}, r"sordino \S+ with protocol 77"),
        ({"key": "as before"}, "an older sordino, which tells no version"),
        ({"error": "no model (KeyError: 'groups')"}, "an older sordino, which tells no version"),
    ],
)
def test_a_called_party_of_another_version_ends_with_both_named(
    identities: Identities,
    started: list[Address],
    method: str,
    theirs: dict[str, Any],
    named: str,
) -> None:
    """On every connection, and the caller has told its own versions first."""
    call, caller, called = CALLS[method]
    heard: list[Any] = []
    started.append(other_party(identities[called], method, caller, packed(**theirs), heard))
    if method in ("Session", "Install"):  # as both servers are dialed, the look at server 1's certificate comes first
        second = other_party(identities[SERVERS[1]], method, caller, packed(**theirs), heard)
        started.append(second)
    ours = rf"{caller} runs sordino {sordino.__version__} with protocol {versions.PROTOCOL}; install one version"
    addresses = [address for _, address in started]
    with pytest.raises(PartyLost, match=rf"(server-\d|dealer) \(127\S+\) runs {named}, and {ours}") as lost:
        call(identities, addresses)
    assert "\n" not in str(lost.value)
    assert heard[0]["versions"] == {"package": sordino.__version__, "protocol": versions.PROTOCOL}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("theirs", [None, {"package": "9.8.7", "protocol": 1}])
def test_a_caller_of_another_version_is_told_with_both_named(
    identities: Identities, started: list[Address], method: str, theirs: dict[str, Any] | None
) -> None:
    """Whatever its first message is. An older one, which knows of no versions, can read what it is told."""
    _, caller, called = CALLS[method]
    party = (
        start_dealer(identities[DEALER], "127.0.0.1:0", TIMEOUT)
        if called == DEALER
        else start_server(identities[called], "127.0.0.1:0", "x:1", timeout=TIMEOUT)
    )
    started.append(party)
    connection = ClientConnection(identities[caller], called, party[1], TIMEOUT)
    stream = connection.stream(method)
    stream._versions = theirs or {}
    stream.send(session="a")
    named = r"sordino 9\.8\.7 with protocol 1" if theirs else "an older sordino"
    with pytest.raises(PartyLost, match=rf"{called} .*: {caller} .* runs {named}.*, and {called} runs sordino"):
        stream.receive()
    connection.close()


def test_versions_are_told_once_and_first() -> None:
    stream = Stream("somebody", TIMEOUT)
    stream.send(bytes(transport.PIECE + 5), a=1)
    stream.send(b=2)
    headers = [unpacked(stream._outbox.get())[0] for _ in range(3)]  # type: ignore[arg-type]
    assert [versions.VERSIONS in header for header in headers] == [True, False, False]
    failing = Stream("somebody", TIMEOUT)
    failing.fail("it broke")
    header, _ = unpacked(failing._outbox.get())  # type: ignore[arg-type]
    assert header["error"] == "it broke"
    assert versions.VERSIONS in header


def test_a_sign_of_life_may_come_before_the_versions() -> None:
    stream = Stream("somebody", TIMEOUT)
    stream.pump(iter([packed(alive=True), packed(b"x", versions=versions.own_versions()), packed(b"y")]))
    assert [stream.receive()[1] for _ in range(2)] == [b"x", b"y"]
    other = Stream("somebody", TIMEOUT)
    other.pump(iter([packed(alive=True), packed(b"x"), packed(b"y")]))
    with pytest.raises(PartyLost, match="somebody runs an older sordino"):
        other.receive()


def test_another_partys_version_is_shown_as_one_line() -> None:
    header = {"versions": {"package": "1\n2" + "x" * 1000, "protocol": [1]}}
    told = versions.other_version(header, "a", "b")
    assert told
    assert "\n" not in told
    assert len(told) < 600


@pytest.mark.parametrize("told", ["\x1b[2Jgone", "two\nlines", "x" * 10**6, ["a", 1], "a\u202eb"])
def test_another_partys_error_is_shown_as_one_plain_line(told: object) -> None:
    """It goes to a terminal and to logs: no escapes, no second line, no end of it."""
    stream = Stream("server-0", TIMEOUT)
    stream.pump(iter([packed(error=told, versions=versions.own_versions())]))
    with pytest.raises(PartyLost, match="server-0: ") as caught:
        stream.receive()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= transport.LONGEST_ERROR


def test_a_server_logs_others_names_as_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    _say("session \x1b[2J\n begins")
    logged = capsys.readouterr().err
    assert logged.count("\n") == 1
    assert logged.strip().isprintable()


@pytest.mark.parametrize("before", [[], [packed(b"x", versions=versions.own_versions())]], ids=["first", "later"])
def test_a_header_nested_deeper_than_a_parser_goes_is_garbage_at_once(before: list[bytes]) -> None:
    deep = b"[" * 200_000
    stream = Stream("server-0", TIMEOUT)
    stream.pump(iter([*before, len(deep).to_bytes(4, "big") + deep]))
    for _ in before:
        stream.receive()
    with pytest.raises(PartyLost, match="server-0 sent garbage: its header is nested too deeply"):
        stream.receive()


# Whose certificate an address shows.

PAIRS = [
    ("Session", SERVERS[0], SERVERS[1], r"server-0 comes first in session\.servers, then server-1"),
    ("Session", SERVERS[1], SERVERS[0], r"server-0 comes first in session\.servers, then server-1"),
    ("Install", SERVERS[0], SERVERS[1], "server-0 comes first in --servers, then server-1"),
    ("Install", SERVERS[0], DEALER, "server-0 comes first in --servers, then server-1"),
    ("Peer", SERVERS[0], SERVERS[1], "give server-1's --peer the address of server-0"),
    ("Peer", SERVERS[0], DEALER, "give server-1's --peer the address of server-0"),
    ("Deal", DEALER, SERVERS[0], "give server-[01]'s --dealer the address of the dealer"),
    ("Deal", DEALER, SERVERS[1], "give server-[01]'s --dealer the address of the dealer"),
]


@pytest.mark.parametrize(("method", "meant", "shown", "remedy"), PAIRS)
def test_a_party_at_anothers_address_is_named(
    identities: Identities, started: list[Address], method: str, meant: str, shown: str, remedy: str
) -> None:
    """For every pair of parties that connect, and before anything is sent."""
    started.append(listen(identities[shown], "127.0.0.1:0", TIMEOUT, {}))
    addresses = [started[0][1]]
    if method in ("Session", "Install"):  # the other one is where it should be
        other = SERVERS[1 - SERVERS.index(meant)]
        started.append(listen(identities[other], "127.0.0.1:0", TIMEOUT, {}))
        addresses.insert(SERVERS.index(other), started[1][1])
    call, _, _ = CALLS[method]
    told = f"{started[0][1]} shows {shown}'s certificate; it should be that of {meant}: {remedy}"
    with pytest.raises(PartyLost, match=told):
        call(identities, addresses)


def test_a_server_with_a_wrong_dealer_tells_the_data_owner(identities: Identities, started: list[Address]) -> None:
    """What only the server can notice reaches the person who waits."""
    first = start_server(identities[SERVERS[0]], "127.0.0.1:0", "127.0.0.1:9", timeout=TIMEOUT)
    second = start_server(identities[SERVERS[1]], "127.0.0.1:0", first[1], first[1], TIMEOUT)
    started += [first, second]
    calibration = Calibration.measure(small_tower(), batches(1, 5))
    provide(identities[MODEL_OWNER], [first[1], second[1]], small_tower(), calibration, TIMEOUT)
    connection = ClientConnection(identities[DATA_OWNER], SERVERS[1], second[1], TIMEOUT)
    stream = connection.stream("Session")
    stream.send(session="a")
    with pytest.raises(PartyLost, match=rf"server-1 .*: {first[1]} shows server-0's certificate; .*--dealer"):
        stream.receive()
    connection.close()


def test_no_party_at_all(identities: Identities) -> None:
    """A program that speaks no TLS, and one that says nothing, are told from one that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as plain:
        address = f"127.0.0.1:{plain.getsockname()[1]}"

        def speak() -> None:
            caller, _ = plain.accept()
            with caller:
                caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                caller.recv(4096)

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(PartyLost, match=rf"{address} speaks no TLS 1\.3, so dealer is not there"):
            deal(identities, [address])
        thread.join()
        connection = ClientConnection(identities[SERVERS[0]], DEALER, address, 1.0)
        with pytest.raises(PartyLost, match=r"dealer \(127\S+\) sent nothing for 1 s"):
            connection.stream("Deal")
    with pytest.raises(PartyLost, match=r"dealer \(127\S+\) is gone or cannot be reached"):
        deal(identities, [address])


# When certificates expire.


def test_a_folder_with_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    make_parties(tmp_path, {DEALER: 1.0})
    time.sleep(1.1)
    with pytest.raises(ConfigError, match=r"the certificate of dealer expired on \d{4}-\d\d-\d\d; renew") as expired:
        Identity.load(tmp_path / DEALER, DEALER, key="--certificates")
    assert expired.value.key == "--certificates"
    assert "'sordino mpc certificates --out NEW_FOLDER'" in expired.value.allowed
    Identity.load(tmp_path / SERVERS[0], SERVERS[0])


def test_a_peers_expired_certificate_and_ones_own_are_named(
    tmp_path: Path, started: list[Address], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that expire while a process runs."""
    identities = make_parties(tmp_path, {DEALER: 2.0, SERVERS[1]: 2.0})
    started.append(start_dealer(identities[DEALER], "127.0.0.1:0", TIMEOUT))
    time.sleep(2.1)
    with pytest.raises(PartyLost, match=r"the certificate of dealer \(127\S+\) expired on .*sordino mpc certificates"):
        deal(identities, [started[0][1]])
    with pytest.raises(PartyLost, match=r"^the certificate of server-1 expired on .*sordino mpc certificates"):
        peer(identities, [started[0][1]])


def test_expiry_is_told_in_time_and_once_a_day(
    tmp_path: Path, started: list[Address], log: pytest.LogCaptureFixture
) -> None:
    """By a party of its own certificate, by a caller of the called party's, and by the called party of the caller's."""
    soon, later = 29.5 * 86400, 30.5 * 86400
    identities = make_parties(tmp_path, {DEALER: soon, SERVERS[0]: soon, SERVERS[1]: later})
    Identity.load(tmp_path / SERVERS[1], SERVERS[1])
    assert log.messages == []
    Identity.load(tmp_path / DEALER, DEALER)
    assert [message.split(";")[0][:44] for message in log.messages] == ["the certificate of dealer expires in 29 days"]
    assert "'sordino mpc certificates --out NEW_FOLDER'" in log.messages[0]
    started.append(start_dealer(identities[DEALER], "127.0.0.1:0", TIMEOUT))
    for number in range(3):
        RemoteDealer(identities[SERVERS[0]], started[0][1], f"session {number}", TIMEOUT).close()
    told = sorted(message.split(" expires")[0] for message in log.messages)
    address = started[0][1]
    assert told == [
        "the certificate of dealer",
        f"the certificate of dealer ({address})",
        "the certificate of server-0",
    ]


def test_a_clock_that_is_behind_is_named(identities: Identities) -> None:
    (own, _) = identities[DEALER].chain
    early = own.not_valid_before_utc - timedelta(hours=1)

    class Early(certificates.datetime):  # type: ignore[misc]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return early

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "datetime", Early)
        told = certificates.dates_problem([own], "the certificate of dealer")
    assert told
    assert "is valid from" in told
    assert "set the clock" in told


def test_files_of_two_authorities_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_parties(tmp_path / name, {})
    for file in (certificates.KEY, certificates.AUTHORITY):
        good = (tmp_path / "a" / DEALER / file).read_bytes()
        (tmp_path / "a" / DEALER / file).write_bytes((tmp_path / "b" / DEALER / file).read_bytes())
        with pytest.raises(
            ConfigError, match="are not of one 'sordino mpc certificates'; take the whole folder of dealer"
        ):
            Identity.load(tmp_path / "a" / DEALER, DEALER)
        (tmp_path / "a" / DEALER / file).write_bytes(good)
    Identity.load(tmp_path / "a" / DEALER, DEALER)
