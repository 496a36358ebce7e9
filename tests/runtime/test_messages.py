"""What is not as agreed is refused by name, before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.algorithms.dp_fpl import Broadcast, Upload
from sordino.runtime import messages
from sordino.runtime.local import Diverged, LocalRuntime, RoundError, Training
from sordino.runtime.messages import MessageError, NotFinite, RoundHeader, UploadHeader, decode, encode
from sordino.secure import Refusal

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
TABLES: dict[str, Any] = {"context_length": 3, "batch_size": 5, "dp-fpl": {"rank": 2}}
LIKE = Upload(torch.zeros(1, 3, 4), torch.zeros(1))
SENT = Upload(torch.arange(12.0).view(1, 3, 4), torch.ones(1))


def content_of(tensors: dict[str, torch.Tensor], **entries: object) -> bytes:
    metadata = {name: json.dumps(value) for name, value in ({"round": 1} | entries).items()}
    return safetensors.torch.save(tensors, metadata=metadata)


def test_an_upload_comes_back_with_its_rates() -> None:
    content = encode(SENT, UploadHeader(7, (0.25, 1 / 3)))
    assert messages.upload_header(content) == UploadHeader(7, (0.25, 1 / 3))
    assert torch.equal(decode(content, LIKE).gradient, SENT.gradient)
    assert not messages.opens_round(b"\x00" * 40)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"gradient": SENT.gradient}, "lacks tensors: weight"),
        ({"gradient": SENT.gradient, "weight": SENT.weight, "image": torch.ones(9)}, "not agreed: image"),
        ({"gradient": SENT.gradient.double(), "weight": SENT.weight}, "'gradient' is of type torch.float64"),
        ({"gradient": SENT.gradient.view(1, 4, 3), "weight": SENT.weight}, r"\[1, 4, 3\] where \[1, 3, 4\]"),
        ({"gradient": SENT.gradient.repeat(2, 1, 1), "weight": SENT.weight}, r"\[2, 3, 4\] where \[1, 3, 4\]"),
        ({"gradient": torch.full((1, 3, 4), torch.nan), "weight": SENT.weight}, "'gradient' has a number"),
        ({"gradient": SENT.gradient, "weight": torch.tensor([torch.inf])}, "'weight' has a number"),
        ({"gradient": torch.zeros(1, 300, 400), "weight": SENT.weight}, r"bytes where at most [\d,]+ were agreed"),
    ],
)
def test_other_tensors_are_refused_by_name(tensors: dict[str, torch.Tensor], why: str) -> None:
    with pytest.raises(MessageError, match=why):
        decode(content_of(tensors), LIKE)


@pytest.mark.parametrize(
    "entries",
    [
        {"round": "1"},
        {"round": -1},
        {"round": True},
        {"rates": 0.5},
        {"rates": [1.5]},
        {"rates": ["0.5"]},
        {"rates": [float("nan")]},
        {"name": "Mallory"},
    ],
)
def test_other_headers_are_refused(entries: dict[str, object]) -> None:
    with pytest.raises(MessageError):
        messages.upload_header(content_of({"gradient": SENT.gradient, "weight": SENT.weight}, **entries))


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else_happens(content: bytes) -> None:
    with pytest.raises(MessageError):
        messages.upload_header(content)
    with pytest.raises(MessageError):
        decode(content, LIKE)


@given(st.data())
def test_no_flipped_byte_crashes_the_reader(data: st.DataObject) -> None:
    """It is refused, or read as numbers that are finite."""
    content = bytearray(encode(SENT, UploadHeader(1)))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        messages.upload_header(bytes(content))
        received = decode(bytes(content), LIKE)
    except MessageError:
        return
    assert received.gradient.shape == (1, 3, 4)
    assert received.gradient.isfinite().all()


def played(
    runtime: LocalRuntime, training: Training, change: Callable[[int, bytes | Refusal], bytes | Refusal | None]
) -> Any:
    """Play a round in which replies are changed on their way; None loses one."""
    clients = runtime.clients.round(training.at_clients)

    def link(contents: Any) -> Any:
        replies = [(client, change(client, reply)) for client, reply in clients.handle(contents)]
        return [(client, reply) for client, reply in replies if reply is not None]

    return runtime.server.round(training.at_server, link)


PRIVATE = {"mechanism": "dp-sgd", "noise_multiplier": 1.0}


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        (lambda upload: None, RoundError, "client 1 did not answer"),
        (lambda upload: b"x" * 30, RoundError, "client 1's upload is refused"),
        (lambda upload: upload[:-9], RoundError, "client 1's upload is refused: it is no message"),
        (lambda upload: upload.replace(rb"round\":1", rb"round\":2"), RoundError, "it is of round 2"),
        (lambda upload: upload[:-12] + b"\xff" * 12, Diverged, "client 1's tensor .* is not finite"),
        (lambda upload: upload.replace(b"[0.4", b"[0.9", 1), RoundError, "does not keep to its schedule"),
    ],
)
def test_a_server_names_the_sender_and_counts_what_was_released(
    change: Callable[[bytes], bytes], error: type[RoundError], why: str, make_runtime: MakeRuntime
) -> None:
    """The uploads left their clients, so the ledger has them, though nothing comes of the round."""
    rows = [list(range(0, 12)), list(range(12, 24)), list(range(24, 36))]  # rates of 5/12, 0.41666
    runtime = make_runtime("dp-fpl", rows, TABLES, privacy=PRIVATE)
    training = runtime.start()

    def on_its_way(client: int, reply: bytes | Refusal) -> Any:
        assert isinstance(reply, bytes)
        return change(reply) if client == 1 else reply

    with pytest.raises(error, match=why) as caught:
        played(runtime, training, on_its_way)
    parties = {release.party for release in caught.value.ledger.releases}
    assert parties == {"client 0", "client 1", "client 2"}


def test_a_client_takes_part_in_a_round_once(make_runtime: MakeRuntime) -> None:
    """A second upload of one round would be a second release; so would one of a round that is over."""
    runtime = make_runtime("dp-fpl", ROWS, TABLES)
    training = runtime.start()
    told = dict.fromkeys(range(3), b"")

    def remember(contents: dict[int, bytes]) -> Any:
        told.update(contents)
        return clients.handle(contents)

    clients = runtime.clients.round(training.at_clients)
    runtime.server.round(training.at_server, remember)
    for again in (clients, runtime.clients.round(clients.training)):
        with pytest.raises(MessageError, match="a broadcast of round 1 after round 1"):
            again.handle(told)


def test_clients_refuse_broadcasts_that_were_not_agreed(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("dp-fpl", ROWS, TABLES)
    training = runtime.start()
    context = runtime.algorithm.broadcast(training.server).context
    wrong = [
        (Broadcast(context[:2]), MessageError, "shape"),
        (Broadcast(context.double()), MessageError, "type"),
        (Broadcast(context * torch.nan), NotFinite, "not finite"),
        (replace(SENT, gradient=context), MessageError, "not agreed"),
    ]
    for message, error, why in wrong:
        content = encode(message, RoundHeader(1, 0, 1))
        with pytest.raises(error, match=why):
            runtime.clients.round(training.at_clients).handle({0: content})
    contents = {client: encode(Broadcast(context), RoundHeader(client + 1, 0, 1)) for client in range(2)}
    with pytest.raises(MessageError, match="several rounds"):
        runtime.clients.round(training.at_clients).handle(contents)


ADAPTIVE = {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "noise_by": "shares", "clip_quantile": 0.5}


@pytest.mark.parametrize("header", [RoundHeader(1, 0, 4, "ab" * 16), RoundHeader(1, 1, 3, "ab" * 16)])
def test_a_client_joins_no_sum_of_more_clients_than_there_are(header: RoundHeader, make_runtime: MakeRuntime) -> None:
    """Its share of the noise would be too small."""
    runtime = make_runtime("dp-fpl", ROWS, TABLES, privacy=ADAPTIVE, weighting="uniform")
    training = runtime.start()
    clip = training.mechanism["clip"]
    message = runtime.federation.broadcast_message(runtime.algorithm.broadcast(training.server), clip)
    clients = runtime.clients.round(training.at_clients)
    with pytest.raises(MessageError, match="it has place 0 of the 3 that take part"):
        clients.handle({0: encode(message, header)})
    assert clients.handle({0: encode(message, replace(header, place=0, clients=3))})


def test_a_client_that_is_elsewhere_is_named(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("dp-fpl", ROWS, TABLES)
    training = runtime.start()
    content = encode(runtime.algorithm.broadcast(training.server), RoundHeader(1, 0, 9))
    with pytest.raises(MessageError, match="client 8, who is not one of these"):
        runtime.clients.round(training.at_clients).handle({8: content})


def test_a_sum_that_was_opened_counts_though_the_next_one_fails(make_runtime: MakeRuntime) -> None:
    """The uploads' sum is known by then; only the count behind the adaptive clip is missing."""
    runtime = make_runtime("dp-fpl", ROWS, TABLES, privacy=ADAPTIVE, weighting="uniform")
    training = runtime.start()
    clients = runtime.clients.round(training.at_clients)
    exchanges = 0

    def link(contents: Any) -> Any:
        nonlocal exchanges
        exchanges += 1
        return clients.handle(contents) if exchanges <= 6 else []  # the broadcast, and five of the first sum

    with pytest.raises(RoundError, match="answers are needed") as caught:
        runtime.server.round(training.at_server, link)
    assert [release.unit for release in caught.value.ledger.releases] == ["client"]
