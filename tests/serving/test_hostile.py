"""What strangers, customers, publishers and owners of a database try, and do not get."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError
from starlette.responses import Response

from serving.conftest import some_facts, some_files
from serving.uploads import PICTURES, huge_png
from sordino.cli.app import invoke
from sordino.errors import ConfigError, PromptError, RunError
from sordino.privacy.signature import sign
from sordino.prompt_file import SavedPrompt
from sordino.serving.folder import export, read_folder
from sordino.serving.manifest import CARD, LEDGER, Manifest, Sealed, record
from sordino.serving.registry import Published, Registry
from sordino.serving.server import connections, service
from sordino.serving.server.app import build
from sordino.serving.server.inference import InferenceRequest
from sordino.serving.server.keys import Keys
from sordino.serving.server.listen import Address, configured, serve
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.service import Log, Service
from sordino.serving.server.settings import ServerSettings
from sordino.serving.server.shelf import Shelf
from sordino.serving.server.uploads import MOST_PARTS, MOST_SCANS, read_picture
from sordino.serving.sources import check_claim, from_run
from sordino.serving.trust import Trusted

PNG = PICTURES["PNG"]
SETTINGS = ServerSettings()
CLASSIFY = "/v1/prompts/fabric/classify"


@contextmanager
def asked(
    url: str,
    trusted: Trusted,
    log: Path | None = None,
    hosts: list[str] | None = None,
    needs_key: bool = False,
    settings: ServerSettings = SETTINGS,
) -> Iterator[TestClient]:
    """A server in this process."""
    with Registry(url) as registry:
        shelf = Shelf(registry, trusted, 4, lambda saved: saved.load_encoder())
        inside = Service(shelf, settings, needs_key, Log(log))
        with TestClient(build(inside, hosts), base_url="http://127.0.0.1:8000") as client:
            yield client


@pytest.fixture
def published(shared_run: Path, key: Ed25519PrivateKey, tmp_path: Path) -> str:
    """The URL of a registry with one prompt."""
    material = from_run(shared_run, key)
    url = f"sqlite:///{tmp_path}/prompts.db"
    with Registry(url, create=True) as registry:
        registry.publish("fabric", material.facts, material.files, key, accept_not_private=True)
    return url


def classified(client: TestClient, path: str = CLASSIFY, **headers: str) -> Any:
    return client.post(path, files={"image": ("a.png", PNG)}, headers=headers)


# Pictures


def saved_as(kind: str, size: int = 64, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("L", (size, size), 128).save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_scans(count: int) -> bytes:
    """A progressive JPEG of so many scans; its last one refines the picture, and may stand any number of times."""
    whole = saved_as("JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * (count - whole.count(b"\xff\xda")) + whole[-2:]


def with_parts(kind: str, count: int) -> bytes:
    """A picture with so many more chunks, segments, or bytes that fill, before its pixels."""
    if kind == "png":
        return PNG[:33] + chunk(b"prVt", b"") * count + PNG[33:]
    jpeg = saved_as("JPEG")
    return jpeg[:2] + {"comments": b"\xff\xfe\0\x02", "filled": b"\xff", "junk": b"\0"}[kind] * count + jpeg[2:]


def test_small_pictures_that_take_minutes_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of 42 bytes passes over all pixels; Pillow handles every chunk and segment in Python."""
    settings = ServerSettings()
    assert read_picture(with_scans(MOST_SCANS), settings, None).size == (64, 64)
    for kind in ("png", "comments"):
        assert read_picture(with_parts(kind, MOST_PARTS - 20), settings, None)
    hostile = [with_scans(MOST_SCANS + 1)]
    hostile += [with_parts(kind, MOST_PARTS) for kind in ("png", "comments", "filled")]
    hostile.append(b"\xff\xd8\xff\xe0\0\x02" + bytes(MOST_PARTS) + saved_as("JPEG")[2:])
    monkeypatch.setattr(Image, "open", None)
    for content in hostile:
        with pytest.raises(Refusal, match="too many parts"):
            read_picture(content, settings, None)


def test_a_whole_picture_is_not_called_damaged() -> None:
    """A dark one of 16 bits is refused for what it lacks."""
    dark, light = (np.full((32, 32), value, np.uint16) for value in (900, 60_000))
    files = []
    for pixels in (dark, light):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        files.append(out.getvalue())
    assert read_picture(files[1], SETTINGS, None).size == (32, 32)
    assert read_picture(files[0], SETTINGS, (0, 1000)).size == (32, 32)
    with pytest.raises(Refusal, match="more than 8 bits a pixel, and is too dark.*save it with 8 bits"):
        read_picture(files[0], SETTINGS, None)
    with pytest.raises(Refusal, match="the picture is damaged"):
        read_picture(files[1][:60], SETTINGS, None)


@pytest.mark.parametrize("created", ["9999-99-99T99:99:99Z", "2026-02-30T00:00:00Z", "2026-01-31T24:00:00Z"])
def test_a_version_is_of_a_day_that_there_is(
    created: str, published: str, key: Ed25519PrivateKey, trusted: Trusted
) -> None:
    with Registry(published) as registry:
        found = registry.inspect("fabric", 1)
        text = found.sealed.text.replace(found.manifest.created.encode(), created.encode())
    signature = sign(key, b"sordino published prompt " + hashlib.sha256(text).hexdigest().encode())
    sealed = replace(found.sealed, text=text, signature=signature)
    with pytest.raises(PromptError, match="malformed"):
        sealed.open("the upload")


def dicom_in_jpeg(width: int, height: int) -> bytes:
    """One file that is a JPEG of 64 x 64 to one reader, and a DICOM of any size to another."""

    def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
        head = struct.pack("<HH", group, number) + kind
        return (
            head + (b"\0\0" + struct.pack("<I", len(value)) if kind == b"OB" else struct.pack("<H", len(value))) + value
        )

    syntax = element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1\0")
    numbers = {2: 1, 0x10: height, 0x11: width, 0x100: 8, 0x101: 8, 0x102: 7, 0x103: 0}
    parts = {number: element(0x28, number, b"US", struct.pack("<H", value)) for number, value in numbers.items()}
    parts[4] = element(0x28, 4, b"CS", b"MONOCHROME2 ")
    data = b"".join(part for _, part in sorted(parts.items())) + element(0x7FE0, 0x10, b"OB", bytes(width * height))
    comment = bytes(122) + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(syntax))) + syntax + data
    return b"\xff\xd8\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + saved_as("JPEG")[2:]


def test_a_file_of_two_formats_is_read_as_the_one_that_was_checked() -> None:
    """Its other one has sides that no picture may have here."""
    both = dicom_in_jpeg(30, 2000)
    assert both[128:132] == b"DICM"
    assert read_picture(both, ServerSettings(), None).size == (64, 64)


# Requests


@pytest.mark.parametrize("name", ["inputs", "data", "shape"])
def test_a_list_of_wrong_elements_costs_one_error(name: str) -> None:
    """Each error takes a kilobyte and 10 us, and a request has room for millions."""
    wrong = ["x", *[1.5] * 500] if name == "shape" else [1] * 500
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AA=="]}
    body = {"inputs": wrong if name == "inputs" else [tensor | {name: wrong}]}
    with pytest.raises(ValidationError) as error:
        InferenceRequest.model_validate_json(json.dumps(body))
    assert error.value.error_count() == 1


def test_a_query_that_is_not_understood_is_refused(published: str, trusted: Trusted) -> None:
    with asked(published, trusted) as client:
        assert classified(client, f"{CLASSIFY}?top=1&zero_shot=true&version=1").status_code == 200
        for query in ("zeroshot=true", "top=1&top=2", "digits=6", "Top=1"):
            response = classified(client, f"{CLASSIFY}?{query}")
            assert response.status_code == 422, query
            assert "digits" not in response.json()["error"]
        assert client.get("/v1/prompts?limit=1").status_code == 422
        assert client.get("/v2/models/fabric?top=1").status_code == 422
        assert client.get("/?from=elsewhere").status_code == client.get("/health/live?now=1").status_code == 200


def test_nobody_is_sent_elsewhere_with_a_key(published: str, trusted: Trusted) -> None:
    """A redirect would name the host that was asked, and plain HTTP behind a proxy that has TLS."""
    with asked(published, trusted) as client:
        for path in ("/v1/prompts/", f"{CLASSIFY}/"):
            response = client.get(path, follow_redirects=False)
            assert (response.status_code, response.json()) == (404, {"error": "there is no such address"})


def test_a_page_of_another_site_cannot_ask_in_a_users_name(published: str, trusted: Trusted, tmp_path: Path) -> None:
    """It needs no answer to spend the day's budget of a server without keys."""
    with asked(published, trusted) as client, Registry(published) as registry:
        for headers in (
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:9"},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:9"},
        ):
            assert classified(client, **headers).status_code == 403
        assert Keys(registry.database).used("anybody") == 0
        for headers in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://127.0.0.1:8000"}):
            assert classified(client, **headers).status_code == 200
        assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link to it
    with asked(published, trusted, needs_key=True) as client, Registry(published) as registry:
        secret = Keys(registry.database).create("kim")  # no page has it but one's own program
        assert classified(client, Authorization=f"Bearer {secret}", Origin="https://own.example").status_code == 200


def test_a_server_of_this_machine_is_asked_by_its_own_names_alone(published: str, trusted: Trusted) -> None:
    names = ["localhost", "127.0.0.1", "[::1]"]
    with asked(published, trusted, hosts=names) as client:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
            assert client.get("/v1/prompts", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example:80", "[::1", "", "localhost:80:80", "127.0.0.1@evil"):
            response = client.get("/v1/prompts", headers={"Host": host})
            assert (response.status_code, set(response.json())) == (400, {"error"}), host


@pytest.mark.parametrize(
    ("address", "by", "status"),
    [
        (Address("127.0.0.2"), "127.0.0.2:8000", 200),
        (Address("127.0.0.2"), "localhost:8000", 200),
        (Address("0:0::1"), "[::1]:8000", 200),
        (Address("0:0::1"), "[0:0::1]:8000", 200),
        (Address("LocalHost"), "localhost", 200),
        (Address("127.0.0.2"), "127.0.0.3:8000", 400),
        (Address("127.0.0.2"), "evil.example", 400),
        (Address("127.0.0.1", open_to_all=True), "prompts.example", 200),  # a proxy that keeps the name
        (Address("0.0.0.0", open_to_all=True, without_tls=True), "prompts.example", 200),
    ],
)
def test_the_address_that_a_server_listens_on_is_a_name_of_it(
    address: Address, by: str, status: int, published: str, trusted: Trusted, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []

    def answer(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        with TestClient(server.config.app, base_url="http://127.0.0.1:8000") as client:  # type: ignore[arg-type]
            answers.append(client.get("/v1/prompts", headers={"Host": by}).status_code)

    monkeypatch.setattr(uvicorn.Server, "run", answer)
    with Registry(published) as registry:
        serve(registry, trusted, replace(address, port=0), SETTINGS, None, [], None, lambda _: None)
    assert answers == [status]


@pytest.mark.parametrize("host", ["é..b", "a" * 70 + ".b", "a\0b"])
def test_a_host_that_cannot_be_one_is_refused(host: str, published: str, trusted: Trusted) -> None:
    address = Address(host, 0, open_to_all=True, without_tls=True)
    with Registry(published) as registry, pytest.raises(ConfigError, match=r"--host|--port"):
        serve(registry, trusted, address, SETTINGS, None, [], None, lambda _: None)


@contextmanager
def listening(**more: Any) -> Iterator[tuple[tuple[str, int], uvicorn.Server]]:
    """A server on the loopback, with an address that answers late, and one whose answer is long."""
    app = FastAPI()

    @app.get("/late")
    def late() -> str:
        time.sleep(1.5)
        return "late"

    @app.get("/long")
    def long() -> Response:
        return Response(bytes(40 << 20))

    @app.post("/unread")
    async def unread() -> Response:
        return Response("no", 401)

    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(configured(app, Address()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield bound.getsockname(), server
    finally:
        server.should_exit = True
        thread.join()


def test_who_asks_nothing_holds_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor who never ends a head or a body, or never reads an answer; who waits or reads slowly, does."""
    monkeypatch.setattr(connections, "PATIENCE", 0.5)
    with listening() as (address, server):

        def connected(content: bytes) -> socket.socket:
            connection = socket.create_connection(address, timeout=30)
            connection.sendall(content)
            return connection

        head = b" HTTP/1.1\r\nHost: a\r\n"
        patient = connected(b"GET /late" + head + b"\r\n")
        reader = connected(b"GET /long" + head + b"\r\n")
        held = [
            connected(b""),
            connected(b"GET / HTTP/1.1\r\nHo"),
            connected(b"GET /long" + head + b"\r\n"),
            connected(b"POST /unread" + head + b"Content-Length: 99999\r\n\r\n"),
        ]
        read = 0
        while part := reader.recv(1 << 20):
            read += len(part)
            if read < 40 << 20:
                time.sleep(0.05)
            else:
                break
        assert read > 40 << 20
        assert b"late" in patient.recv(1000) + patient.recv(1000)
        deadline = time.monotonic() + 20
        while server.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for each in (*held, patient, reader):
            each.close()


def test_one_customers_pictures_keep_no_other_customer_waiting(
    published: str, trusted: Trusted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of 25 million pixels has 46 bytes as WebP, takes most of a second, and 16 fit into a request."""
    read, going, blocked, most = threading.Event(), threading.Event(), [0], [0]

    def slowly(content: bytes, *more: Any) -> Image.Image:
        blocked[0] += 1
        most[0] = max(most[0], blocked[0])
        going.set()
        assert read.wait(60)
        blocked[0] -= 1
        return read_picture(content, *more)

    with asked(published, trusted, needs_key=True) as client, Registry(published) as registry:
        keys = Keys(registry.database)
        hostile, honest = ({"Authorization": f"Bearer {keys.create(name)}"} for name in ("kim", "lee"))
        assert classified(client, **honest).status_code == 200  # the prompt is in memory
        monkeypatch.setattr(service, "read_picture", slowly)
        with ThreadPoolExecutor(13) as pool:
            sent = [pool.submit(classified, client, **hostile) for _ in range(12)]
            assert going.wait(60)
            time.sleep(0.5)  # for all twelve to arrive
            try:
                listed = pool.submit(client.get, "/v1/prompts", headers=honest).result(20)
            finally:
                read.set()
            assert listed.status_code == 200
            assert {each.result().status_code for each in sent} == {200}
        assert most[0] <= service.DECODERS


def test_a_full_queue_spends_no_budget(published: str, trusted: Trusted) -> None:
    with asked(published, trusted, settings=ServerSettings(queue=0)) as client, Registry(published) as registry:
        assert classified(client).status_code == 503
        assert Keys(registry.database).used("anybody") == 0


# Who asked


def test_no_answer_is_given_that_the_log_cannot_tell(
    published: str, trusted: Trusted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk loses no line: one that could not be written is kept, and nobody is answered until it is."""
    file, full, write = tmp_path / "log.jsonl", [False], service.os.write

    def limited(descriptor: int, content: bytes) -> int:
        if full[0]:
            raise OSError(28, "No space left on device")
        return write(descriptor, bytes(content)[:7])  # the system may write less than all

    monkeypatch.setattr(service.os, "write", limited)
    with asked(published, trusted, log=file) as client:
        assert classified(client).status_code == 200
        full[0] = True
        assert classified(client).status_code == 200  # its line is written after the answer
        for _ in range(2):
            refused = classified(client)
            assert (refused.status_code, set(refused.json())) == (503, {"error"})
            assert "log" in refused.json()["error"]
        assert client.get("/health/live").status_code == 200
        full[0] = False
        assert classified(client).status_code == 200
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 503, 503, 200]


def test_the_last_key_that_is_revoked_opens_nothing(published: str) -> None:
    """A server behind a proxy listens on this machine alone, and would be open to all after its next start."""
    with Registry(published) as registry:
        keys = Keys(registry.database)
        assert not Address().check(keys)
        keys.create("kim")
        keys.revoke("kim")
        assert Address().check(keys)
        assert not Address(open_to_all=True).check(keys)


# Publishers, and owners of a database


def resigned(
    registry: Registry, key: Ed25519PrivateKey, version: int = 1, files: dict[str, bytes] | None = None, **changes: Any
) -> Published:
    """A version as its own publisher can sign it with a program of their own."""
    found = registry.inspect("fabric", 1)
    content = {**found.files, **(files or {})}
    told = found.manifest.model_dump() | changes | {"version": version}
    manifest = Manifest.model_validate(told | {"files": {name: record(part) for name, part in content.items()}})
    return Published(manifest, Sealed.of(manifest, key), content, None, "the upload")


def test_a_terminal_obeys_nothing_of_a_registry(
    key: Ed25519PrivateKey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A card, reasons and names may hold escape sequences, marks of another writing direction, and markup."""
    url = f"sqlite:///{tmp_path}/prompts.db"
    erase = "\x1b[1A\x1b[2K\x1b]0;t\x07\u202e\x9b2J"
    with Registry(url, create=True) as registry:
        registry.publish("fabric", some_facts(method="[/red]x"), some_files(), key, accept_not_private=True)
        changed = resigned(registry, key, 2, {CARD: f"# Fine\n{erase}\xff".encode("latin-1", "ignore") + b"\xff"})
        registry.accept(changed)
        registry.withdraw("fabric", 1, "[/bold] [link=http://evil.example]gone[/link]")
        Keys(registry.database).create("[/kim]")
        assert registry.inspect("fabric", 2).card.startswith("# Fine\n")
    for command in (
        ["prompts", "show", "fabric:2"],
        ["prompts", "list"],
        ["keys", "list"],
        ["prompts", "show", "a\x1b[2J"],
    ):
        invoke([*command, "--registry", url])
        told = capsys.readouterr()
        text = told.out + told.err
        assert text.isascii() or "\u202e" not in text
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text), command
        if command[-1] == "fabric:2":
            assert text.startswith("SIGNED BY A KEY THAT IS NOT TRUSTED HERE")
            assert "MARKED NOT PRIVATE" in text
            assert "\\x1b[1A" in text
        if command == ["prompts", "list"]:
            assert "[link=http://evil.example]gone[/link]" in " ".join(text.split())
        if command == ["keys", "list"]:
            assert "[/kim]" in text


def test_a_card_that_is_no_text_is_described_all_the_same(
    published: str, key: Ed25519PrivateKey, trusted: Trusted
) -> None:
    with Registry(published) as registry:
        registry.accept(resigned(registry, key, 2, {CARD: b"\xff\xfe"}))
    with asked(published, trusted) as client:
        assert client.get("/v1/prompts/fabric").json()["card"] == "\ufffd\ufffd"


def test_a_version_from_elsewhere_is_held_against_its_ledger(
    published: str, key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path, shared_run: Path
) -> None:
    """Its signature is right, and its prompt says the same: only the ledger does not."""
    with Registry(published) as registry:
        honest = registry.inspect("fabric", 1)
        check_claim(honest)
        saved = SavedPrompt.from_bytes(honest.files["prompt.safetensors"])
        lying = replace(saved, privacy=saved.privacy.model_copy(update={"private": True}))
        privacy = {"private": True, "epsilon": 1.0, "delta": 1e-5, "unit": "example"}
        said = honest.manifest.privacy.model_dump() | privacy
        files = {"prompt.safetensors": lying.to_bytes()}
        forged = resigned(registry, key, 2, files, privacy=said)
        for wrong in (said, honest.manifest.privacy.model_dump() | {"unit": "galaxy"}):
            with pytest.raises(PromptError, match=r"claims another privacy .*(private = True|unit = galaxy)"):
                check_claim(resigned(registry, key, 2, files, privacy=wrong))
        with pytest.raises(PromptError, match="cannot be counted"):
            check_claim(resigned(registry, key, 2, {LEDGER: b"[]"}))
        secret = Keys(registry.database).create("kim", ["publish"])
    export(forged, tmp_path / "out")
    read_folder(tmp_path / "out", trusted)
    with asked(published, trusted, needs_key=True) as client:
        parts = [(file.name, (file.name, file.read_bytes())) for file in sorted((tmp_path / "out").iterdir())]
        response = client.post("/v1/prompts", files=parts, headers={"Authorization": f"Bearer {secret}"})
        assert response.status_code == 422
        assert "claims another privacy than ledger.json: private = True" in response.json()["error"]


def test_a_mark_is_in_every_answer(published: str, trusted: Trusted) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PNG).decode()]}
    with asked(published, trusted) as client:
        answers = [
            client.get("/v1/prompts").json()[0],
            client.get("/v1/prompts/fabric").json(),
            classified(client).json(),
            client.get("/v2/models/fabric").json()["parameters"],
            client.post("/v2/models/fabric/infer", json={"inputs": [tensor]}).json()["parameters"],
        ]
    assert {answer["mark"] for answer in answers} == {"NOT PRIVATE"}


def test_nothing_is_added_to_an_exported_folder(published: str, trusted: Trusted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Registry(published) as registry:
        export(registry.load("fabric", trusted=trusted), out)
    (out / ".gitattributes").write_text("* text")
    read_folder(out, trusted)
    for name in ("prompt.pkl", "modeling.py", "prompt.safetensors "):
        (out / name).write_text("import os")
        with pytest.raises(PromptError, match="nobody signed it"):
            read_folder(out, trusted)
        (out / name).unlink()
    (out / "prompts").mkdir()
    with pytest.raises(PromptError, match="nobody signed it"):
        read_folder(out, trusted)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://kim:SECRET@127.0.0.1:1/prompts",
        "postgresql://kim@127.0.0.1:1/prompts?password=SECRET",
        "postgresql://kim@127.0.0.1:1/prompts?sslpassword=SECRET&sslmode=disable",
    ],
)
def test_no_message_has_a_databases_password(url: str) -> None:
    with pytest.raises(RunError) as error:
        Registry(url)
    assert "SECRET" not in str(error.value)
    assert "kim" in str(error.value)


@pytest.mark.parametrize(
    "arguments", [["--per-day", str(2**31)], ["--per-minute", str(10**30)], ["--per-day", "-1"]], ids=str
)
def test_limits_of_a_key_fit_the_database(arguments: list[str], published: str) -> None:
    assert invoke(["keys", "create", "--name", "kim", *arguments, "--registry", published]) == 2


def test_a_keys_name_looks_like_no_other(published: str, make_key: Callable[[str], int]) -> None:
    assert make_key("ward-3") == 0
    for name in ("ward-3 ", " ward-3", "ward-3\u200b", "ward-3\n", "ward\x1b-3", ""):
        assert make_key(name) == 2


@pytest.fixture
def make_key(published: str) -> Callable[[str], int]:
    return lambda name: invoke(["keys", "create", "--name", name, "--registry", published])


def test_a_huge_picture_in_a_batch_counts_for_nobody(published: str, trusted: Trusted) -> None:
    with asked(published, trusted) as client, Registry(published) as registry:
        files = [("image", ("a.png", part)) for part in (PNG, huge_png(60000, 60000, b""))]
        assert client.post(CLASSIFY, files=files).status_code in (413, 422)
        assert Keys(registry.database).used("anybody") == 0
