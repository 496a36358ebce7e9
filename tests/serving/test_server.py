"""A real server on the loopback: what it answers, whom it answers, and what it does with what it should not get."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from PIL import Image
from sqlalchemy import create_engine, text

from serving.uploads import PICTURES, huge_png, uploads
from sordino.cli.app import invoke
from sordino.errors import ConfigError, DataError, RunError
from sordino.pictures.decoding import decode
from sordino.prompt_file import SavedPrompt
from sordino.serving.classifier import PromptClassifier
from sordino.serving.folder import export
from sordino.serving.manifest import CARD
from sordino.serving.registry import Registry
from sordino.serving.server import shelf
from sordino.serving.server.app import build
from sordino.serving.server.guard import HEADERS
from sordino.serving.server.keys import Keys
from sordino.serving.server.listen import Address, configured
from sordino.serving.server.service import Log, Service
from sordino.serving.server.settings import ServerSettings
from sordino.serving.server.shelf import Shelf
from sordino.serving.sources import from_run
from sordino.serving.trust import Trusted

PNG = PICTURES["PNG"]
CLASSIFY = "/v1/prompts/fabric/classify"


@dataclass
class Running:
    """A server, and what it serves."""

    client: httpx.Client
    service: Service
    registry: Registry
    log: Path
    url: str

    def classify(self, *contents: bytes, path: str = CLASSIFY, **more: Any) -> httpx.Response:
        files = [("image", ("secret-name.png", content, "image/png")) for content in contents]
        return self.client.post(path, files=files, **more)


Start = Callable[..., Any]


@pytest.fixture(scope="module")
def published(
    shared_run: Path, key: Ed25519PrivateKey, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], str]:
    """Makes a registry with one prompt in a folder; its URL."""
    material = from_run(shared_run, key)

    def make(folder: Path) -> str:
        url = f"sqlite:///{folder}/prompts.db"
        with Registry(url, create=True) as registry:
            registry.publish("fabric", material.facts, material.files, key, accept_not_private=True)
        return url

    return make


@contextmanager
def running(url: str, trusted: Trusted, folder: Path, needs_key: bool = False, **limits: Any) -> Iterator[Running]:
    registry, log = Registry(url), folder / "log.jsonl"
    shelf = Shelf(registry, trusted, 4, lambda saved: saved.load_encoder())
    service = Service(shelf, ServerSettings(**limits), needs_key, Log(log))
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(configured(build(service, ["127.0.0.1"]), Address()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    base = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        with httpx.Client(base_url=base, timeout=60) as client:
            yield Running(client, service, registry, log, url)
    finally:
        server.should_exit = True
        thread.join()
        registry.close()


@pytest.fixture(scope="module")
def server(
    published: Callable[[Path], str], trusted: Trusted, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server without keys, that many tests share and none changes."""
    folder = tmp_path_factory.mktemp("server")
    limits = {"most_bytes": 100_000, "most_pixels": 10_000, "most_pictures": 4, "per_minute": 10**6, "per_day": 10**6}
    with running(published(folder), trusted, folder, **limits) as found:
        yield found


@pytest.fixture
def start(published: Callable[[Path], str], trusted: Trusted, tmp_path: Path) -> Iterator[Start]:
    """Starts a server of one's own."""
    with ExitStack() as stack:
        yield lambda url=None, **options: stack.enter_context(
            running(url or published(tmp_path), trusted, tmp_path, **options)
        )


def names(answer: Any) -> list[tuple[str, float]]:
    return [(each["name"], each["probability"]) for each in answer]


def test_answers_are_those_of_the_classifier_rounded(server: Running, trusted: Trusted) -> None:
    classifier = PromptClassifier.from_registry("fabric", None, server.url, trusted)
    wanted = classifier.classify(list(PICTURES.values()), top=3, digits=2, zero_shot=True)
    got = server.classify(*PICTURES.values(), params={"top": 3, "zero_shot": True}).json()
    assert (got["prompt"], got["version"], got["mark"]) == ("fabric", 1, "NOT PRIVATE")
    for answer, expected in zip(got["pictures"], wanted, strict=True):
        assert names(answer["classes"]) == list(expected.classes)
        assert names(answer["zero_shot"]) == list(expected.zero_shot or ())
    plain = server.classify(PNG, params={"version": "1"}).json()["pictures"][0]
    assert plain["zero_shot"] is None


def test_requests_at_once_share_batches_and_get_their_own_answers(server: Running) -> None:
    contents = []
    for shade in range(0, 240, 8):
        out = io.BytesIO()
        Image.new("RGB", (20, 20), (shade, 255 - shade, 90)).save(out, "PNG")
        contents.append(out.getvalue())
    alone = [server.classify(content).json()["pictures"] for content in contents]
    with ThreadPoolExecutor(16) as pool:
        together = [response.json()["pictures"] for response in pool.map(server.classify, contents)]
    assert [[names(each["classes"])[0][0] for each in answer] for answer in together] == [
        [names(each["classes"])[0][0] for each in answer] for answer in alone
    ]
    for one, other in zip(alone, together, strict=True):
        for (_, before), (_, after) in zip(names(one[0]["classes"]), names(other[0]["classes"]), strict=True):
            assert after == pytest.approx(before, abs=0.0101)  # batches differ in the last bit, which rounding may show
    batches = server.service.metrics.registry.get_sample_value
    assert (batches("sordino_batch_pictures_bucket", {"le": "1.0"}) or 0) < (
        batches("sordino_batch_pictures_count") or 0
    )


def test_prompts_are_listed_and_described(server: Running) -> None:
    (listed,) = server.client.get("/v1/prompts").json()
    assert (listed["name"], listed["version"], listed["mark"]) == ("fabric", 1, "NOT PRIVATE")
    shown = server.client.get("/v1/prompts/fabric").json()
    assert "**NOT PRIVATE.**" in shown["card"]
    assert shown["manifest"]["class_names"] == listed["class_names"]
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v1/prompts/{name}/classify", "/v2/models/{name}/infer"} <= paths.keys()


def test_it_is_live_ready_and_counted(server: Running) -> None:
    for path in ("/health/live", "/health/ready", "/v2", "/v2/health/live", "/v2/health/ready"):
        assert server.client.get(path).status_code == 200
    server.classify(PNG)
    lines = server.client.get("/metrics").text.splitlines()
    assert any(line.startswith('sordino_pictures_total{prompt="fabric",version="1"}') for line in lines)


def infer(server: Running, *contents: bytes, path: str = "/v2/models/fabric/infer", **changes: Any) -> httpx.Response:
    data = [base64.b64encode(content).decode() for content in contents]
    tensor = {"name": "image", "shape": [len(data)], "datatype": "BYTES", "data": data} | changes
    return server.client.post(path, json={"id": "7", "inputs": [tensor], "parameters": {"top": 2}})


def test_the_inference_protocol_gives_the_same_answers(server: Running) -> None:
    contents = list(PICTURES.values())
    own = server.classify(*contents, params={"top": 2}).json()["pictures"]
    got = infer(server, *contents).json()
    assert (got["model_name"], got["model_version"], got["id"]) == ("fabric", "1", "7")
    classes, probabilities = got["outputs"]
    assert classes["shape"] == probabilities["shape"] == [3, 2]
    pairs = list(zip(classes["data"], probabilities["data"], strict=True))
    assert pairs == [pair for answer in own for pair in names(answer["classes"])]
    assert infer(server, PNG, path="/v2/models/fabric/versions/1/infer").status_code == 200
    assert server.client.get("/v2/models/fabric/versions/1/ready").json()["ready"]
    assert server.client.get("/v2/models/fabric").json()["versions"] == ["1"]
    for wrong in ({"datatype": "FP32"}, {"shape": [2]}, {"data": ["%"]}, {"data": "x"}, {"name": "y"}):
        assert infer(server, PNG, **wrong).status_code == 422
    assert server.client.post("/v2/models/fabric/infer", content=b"[" * 5000).status_code == 422
    assert server.client.post("/v2/models/fabric/infer", content=b" " * 100_001).status_code == 413


def noise(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, height)).save(out, "PNG")
    return out.getvalue()


FORM = {"content-type": "multipart/form-data; boundary=x"}


def post(server: Running, **request: Any) -> httpx.Response:
    return server.client.post(CLASSIFY, **request)


REFUSED: dict[str, tuple[int, Callable[[Running], httpx.Response]]] = {
    "no form at all": (415, lambda server: post(server)),
    "no picture": (422, lambda server: post(server, content=b"--x--\r\n", headers=FORM)),
    "five pictures": (422, lambda server: server.classify(*[PNG] * 5)),
    "text": (415, lambda server: server.classify(b"hello")),
    "empty": (415, lambda server: server.classify(b"")),
    "a GIF named PNG": (415, lambda server: server.classify(b"GIF89a" + PNG)),
    "half a picture": (422, lambda server: server.classify(PNG[:200])),
    "one of two broken": (422, lambda server: server.classify(PNG, PNG[:200])),
    "too many pixels": (413, lambda server: server.classify(noise(101, 100))),
    "a promise of many": (413, lambda server: server.classify(huge_png(60000, 60000, b""))),
    "too long": (422, lambda server: server.classify(noise(400, 19))),
    "too many bytes": (413, lambda server: server.classify(PNG + bytes(100_000))),
    "another field": (422, lambda server: post(server, files={"file": PNG})),
    "a field of text": (422, lambda server: post(server, data={"image": "x"}, files={"image": PNG})),
    "no multipart": (415, lambda server: post(server, content=PNG)),
    "no boundary": (422, lambda server: post(server, headers={"content-type": "multipart/form-data"})),
    "too many classes": (422, lambda server: server.classify(PNG, params={"top": 6})),
    "no class": (422, lambda server: server.classify(PNG, params={"top": 0})),
    "no number": (422, lambda server: server.classify(PNG, params={"top": "<b>"})),
    "no prompt": (404, lambda server: server.classify(PNG, path="/v1/prompts/glass/classify")),
    "no name": (404, lambda server: server.classify(PNG, path="/v1/prompts/..%2f..%2fetc/classify")),
    "no version": (404, lambda server: server.classify(PNG, params={"version": "2"})),
    "no version at all": (404, lambda server: server.classify(PNG, params={"version": "-1"})),
    "no address": (404, lambda server: server.client.get("/etc/passwd")),
    "another method": (405, lambda server: server.client.delete("/v1/prompts")),
    "another host": (400, lambda server: server.client.get("/v1/prompts", headers={"host": "evil.example"})),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_told_in_one_line_with_all_headers(what: str, server: Running) -> None:
    status, ask = REFUSED[what]
    response = ask(server)
    assert response.status_code == status, response.text
    assert {name.decode() for name, _ in HEADERS} <= response.headers.keys()
    assert "Traceback" not in response.text
    if what != "another host":
        assert list(response.json()) == ["error"]
        assert "\n" not in response.json()["error"]
    assert server.client.get("/health/live").status_code == 200


def test_a_body_that_is_too_large_is_not_read_to_its_end(server: Running) -> None:
    """Whether its length is announced, and then nothing of it is read, or comes in chunks without an end."""
    head = f"POST {CLASSIFY} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    announced = f"{head}Content-Length: 100001\r\n\r\n".encode()
    in_chunks = f"{head}Transfer-Encoding: chunked\r\n\r\n{100_001:x}\r\n".encode() + bytes(100_001)
    for sent in (announced, in_chunks):
        with socket.create_connection(("127.0.0.1", server.client.base_url.port or 0), timeout=60) as connection:
            connection.sendall(sent)
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_failure_inside_tells_the_client_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("/home/kim/secret")

    monkeypatch.setattr(PromptClassifier, "answer", fail)
    response = server.classify(PNG)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "ZeroDivision" not in response.text
    monkeypatch.undo()
    assert server.classify(PNG).status_code == 200


def bearer(secret: str) -> dict[str, dict[str, str]]:
    return {"headers": {"Authorization": f"Bearer {secret}"}}


def test_keys_open_what_their_scopes_say_until_they_are_revoked(start: Start, tmp_path: Path) -> None:
    server = start(needs_key=True)
    keys = Keys(server.registry.database)
    whole, reader = keys.create("kim"), keys.create("lee", ["read"])
    for more in ({}, bearer("sordino_x"), bearer(whole[:-1]), bearer("x y"), {"headers": {"Authorization": whole}}):
        for response in (server.classify(PNG, **more), server.client.get("/metrics", **more), infer(server, PNG)):
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
    assert server.client.get("/health/live").status_code == 200
    assert server.classify(PNG, **bearer(whole)).status_code == 200
    assert server.client.get("/v1/prompts", **bearer(reader)).status_code == 200
    assert server.classify(PNG, **bearer(reader)).status_code == 403
    keys.revoke("kim")
    assert server.classify(PNG, **bearer(whole)).status_code == 401
    stored = b"".join(file.read_bytes() for file in tmp_path.glob("prompts.db*"))
    for secret in (whole, reader):
        assert secret.encode() not in stored
        assert secret.removeprefix("sordino_").encode() not in stored
    with pytest.raises(ConfigError, match="no key of this name holds"):
        keys.revoke("kim")
    with pytest.raises(ConfigError, match="there is a key of this name"):
        keys.create("kim")
    with pytest.raises(ConfigError, match="no such scope"):
        keys.create("max", ["write"])


def test_a_version_that_was_signed_elsewhere_is_published_with_a_key_for_it(
    start: Start, shared_run: Path, key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path
) -> None:
    """Its next version, from a registry that is nobody else's; whole, and signed by somebody trusted."""
    server = start(needs_key=True)
    keys = Keys(server.registry.database)
    publisher, other = bearer(keys.create("kim", ["publish"])), bearer(keys.create("lee"))
    (tmp_path / "own").mkdir()
    material, stranger = from_run(shared_run, key), Ed25519PrivateKey.generate()

    def folder(signer: Ed25519PrivateKey) -> list[dict[str, bytes]]:
        """Two versions, as files of exported folders."""
        name = tmp_path / f"own/{len(list(tmp_path.iterdir()))}-{id(signer)}"
        versions = []
        with Registry(f"sqlite:///{name}.db", create=True) as registry:
            for _ in range(2):
                made = registry.publish("fabric", material.facts, material.files, signer, accept_not_private=True)
                out = Path(f"{name}-{made.version}")
                export(registry.inspect("fabric", made.version), out)
                versions.append({file.name: file.read_bytes() for file in out.iterdir()})
        return versions

    first, second = folder(key)

    def send(files: dict[str, bytes], who: dict[str, Any]) -> httpx.Response:
        return server.client.post("/v1/prompts", files=[(name, (name, part)) for name, part in files.items()], **who)

    assert send(second, other).status_code == 403
    assert send(second, {}).status_code == 401
    for wrong in (
        second | {CARD: b"changed"},
        second | {"audit.json": b"{}"},
        {name: part for name, part in second.items() if name != CARD},
        {name: part for name, part in second.items() if name != "signature.json"},
        folder(stranger)[1],
    ):
        assert send(wrong, publisher).status_code == 422
    assert send(first, publisher).status_code == 409  # there is a version 1 already
    made = send(second, publisher)
    assert (made.status_code, made.json()["version"]) == (201, 2)
    assert send(second, publisher).status_code == 409
    assert server.registry.load("fabric", trusted=trusted).files[CARD] == second[CARD]


def test_too_many_requests_a_minute_are_turned_away_by_key(start: Start) -> None:
    server = start(needs_key=True)
    keys = Keys(server.registry.database)
    slow, fast = keys.create("slow", per_minute=3), keys.create("fast")
    answers = [server.client.get("/v1/prompts", **bearer(slow)) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["retry-after"] == "60"
    assert server.client.get("/v1/prompts", **bearer(fast)).status_code == 200


def test_a_days_pictures_are_counted_over_restarts_and_broken_ones_are_not(
    published: Callable[[Path], str], trusted: Trusted, tmp_path: Path
) -> None:
    url = published(tmp_path)
    with running(url, trusted, tmp_path, needs_key=True) as server:
        secret = Keys(server.registry.database).create("kim", per_day=5)
        assert server.classify(PNG, PNG, PNG, **bearer(secret)).status_code == 200
        assert server.classify(b"broken", **bearer(secret)).status_code == 415
    with running(url, trusted, tmp_path, needs_key=True) as server:
        refused = server.classify(PNG, PNG, PNG, **bearer(secret))
        assert refused.status_code == 429
        assert 0 < int(refused.headers["retry-after"]) <= 86401
        assert infer(server, PNG).status_code == 401
        assert server.classify(PNG, PNG, **bearer(secret)).status_code == 200
        assert server.classify(PNG, **bearer(secret)).status_code == 429


def test_a_budget_is_not_overdrawn_by_requests_at_once(url: str, key: Ed25519PrivateKey) -> None:
    """In both databases: of thirty that ask at once for three of fifty, sixteen get them."""
    with Registry(url, create=True) as registry, ThreadPoolExecutor(8) as pool:
        keys = Keys(registry.database)
        spent = list(pool.map(lambda _: keys.spend("kim", 3, 50), range(30)))
        assert sum(spent) == 16
        assert keys.spend("kim", 2, 50)
        assert not keys.spend("kim", 1, 50)
        assert keys.spend("lee", 50, 50)
        assert not keys.spend("max", 51, 50)


def test_a_budget_outlives_a_kill(url: str) -> None:
    Registry(url, create=True).close()
    code = f"""
import os, signal
from sordino.serving.registry import Registry
from sordino.serving.server.keys import Keys
assert Keys(Registry({url!r}).database).spend("kim", 3, 50)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    with Registry(url) as registry:
        assert Keys(registry.database).used("kim") == 3


def test_a_withdrawn_prompt_is_gone_at_once(start: Start) -> None:
    server = start()
    assert server.classify(PNG).status_code == 200
    reason = "a hospital left (two; it is withdrawn); take no other"
    made = server.registry.withdraw("fabric", 1, reason)
    for response in (server.classify(PNG), infer(server, PNG), server.client.get("/v1/prompts/fabric")):
        assert response.status_code == 410
        assert response.json()["error"] == f"this version is withdrawn since {made.at} ({reason})"
    assert server.client.get("/v1/prompts").json() == []


def test_a_prompt_of_a_method_in_a_file_is_refused_with_what_a_server_can_do(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The general remedy is an option that `serve` does not have: it runs nobody's file."""
    server = start()
    monkeypatch.setattr(shelf, "METHODS", {})
    at = server.registry.current("fabric", None)
    with pytest.raises(shelf.Unusable) as refused:
        Shelf(server.registry, server.service.shelf.trusted, 1, SavedPrompt.load_encoder).load(at)
    assert "which is not here" in refused.value.why
    assert "a server runs no file" in refused.value.why
    assert "--method" not in refused.value.why


def test_while_one_prompt_is_loaded_others_are_answered(
    start: Start, shared_run: Path, key: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for a prompt that takes long to load, and however many do."""
    server = start()
    assert server.classify(PNG).status_code == 200
    material, go = from_run(shared_run, key), threading.Event()
    server.registry.publish("glass", material.facts, material.files, key, accept_not_private=True)
    load = PromptClassifier.from_published

    def slowly(*arguments: Any, **options: Any) -> PromptClassifier:
        assert go.wait(60)
        return load(*arguments, **options)

    monkeypatch.setattr(PromptClassifier, "from_published", slowly)
    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(server.classify, PNG, path="/v1/prompts/glass/classify") for _ in range(12)]
        try:
            for _ in range(3):
                assert server.classify(PNG).status_code == 200
            assert not any(each.done() for each in waiting)
        finally:
            go.set()
        assert [each.result().status_code for each in waiting] == [200] * 12


def test_the_first_picture_is_not_a_clients(
    published: Callable[[Path], str],
    shared_run: Path,
    key: Ed25519PrivateKey,
    trusted: Trusted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An image tower may be loaded with its first picture: a prompt's loading gives one, once for an encoder."""
    classify, seen = PromptClassifier.classify, []

    def noted(self: PromptClassifier, pictures: Any, **options: Any) -> Any:
        seen.append(len(pictures))
        return classify(self, pictures, **options)

    monkeypatch.setattr(PromptClassifier, "classify", noted)
    material = from_run(shared_run, key)
    with Registry(published(tmp_path)) as registry:
        registry.publish("glass", material.facts, material.files, key, accept_not_private=True)
        shelf = Shelf(registry, trusted, 4, lambda saved: saved.load_encoder())
        for name in ("fabric", "glass", "fabric"):
            shelf.take(name, None)
    assert seen == [1]


def test_a_registry_that_is_gone_is_told_without_its_place(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()

    def gone(*_: object) -> None:
        raise RunError("the registry postgresql://kim@db.example cannot be used")

    for name in ("current", "ping"):
        monkeypatch.setattr(server.registry, name, gone)
    for response in (server.classify(PNG), server.client.get("/health/ready"), infer(server, PNG)):
        assert response.status_code == 503
        assert "db.example" not in response.text
    assert server.client.get("/health/live").status_code == 200


def test_a_changed_row_is_not_served_though_the_prompt_is_in_memory(start: Start) -> None:
    server = start()
    assert server.classify(PNG).status_code == 200
    engine = create_engine(server.url)
    with engine.begin() as connection:
        connection.execute(text("DROP TRIGGER prompts_no_update"))
        connection.execute(text("UPDATE prompts SET signature = 'x'"))
    engine.dispose()
    response = server.classify(PNG)
    assert response.status_code == 503
    assert "sqlite" not in response.text
    assert server.client.get("/v1/prompts").json() == []


def test_the_log_tells_who_asked_what_when_and_never_a_picture(start: Start) -> None:
    server = start(needs_key=True)
    secret = Keys(server.registry.database).create("kim")
    server.classify(PNG, PNG, **bearer(secret))
    server.classify(PNG)
    server.client.get("/health/live")
    (line,) = server.log.read_text().splitlines()  # nobody asked in the other two
    first = json.loads(line)
    told = {
        "key": "kim",
        "prompt": "fabric",
        "version": 1,
        "pictures": 2,
        "status": 200,
        "route": "/v1/prompts/{name}/classify",
    }
    assert {name: value for name, value in first.items() if name != "at"} == told
    assert abs(datetime.fromisoformat(first["at"]) - datetime.now(UTC)) < timedelta(minutes=5)
    assert secret not in server.log.read_text()
    assert stat.S_IMODE(server.log.stat().st_mode) == 0o600


def test_who_sends_too_slowly_is_not_waited_for(start: Start) -> None:
    server = start(seconds=0.5)
    address = (server.client.base_url.host, server.client.base_url.port or 0)
    with socket.create_connection(address, timeout=60) as connection:
        head = f"POST {CLASSIFY} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def require_refused(server: Running, content: bytes) -> None:
    response = server.classify(content)
    if response.status_code == 200:  # then it must be a picture
        try:
            decode(content)
        except DataError as error:
            raise AssertionError(f"no picture, but answered to: {error}") from None
        assert content[:4] in (b"\x89PNG", b"RIFF") or content.startswith(b"\xff\xd8\xff")
    else:
        assert 400 <= response.status_code < 500, response.text
        assert list(response.json()) == ["error"]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=uploads)
def test_whatever_is_uploaded_is_refused_or_a_picture(server: Running, content: bytes) -> None:
    require_refused(server, content)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=uploads)
def test_whatever_is_sent_as_a_form_is_refused(server: Running, body: bytes) -> None:
    """The bytes between boundaries, and around them, are anything."""
    for content in (body, b"--x\r\n" + body, b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + body):
        response = server.client.post(
            CLASSIFY, content=content, headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert 400 <= response.status_code < 500, response.text
        assert infer(server, body, data=[body.decode("latin-1")]).status_code in (413, 415, 422, 200)


def test_an_address_that_others_reach_needs_keys_and_tls_or_words(
    tmp_path: Path, key: Ed25519PrivateKey, published: Callable[[Path], str]
) -> None:
    with Registry(published(tmp_path)) as registry:
        keys = Keys(registry.database)
        for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
            assert Address(host).check(keys) is False
        for host in ("0.0.0.0", "::", "192.0.2.7", "example.org", ""):
            with pytest.raises(ConfigError, match=r"there is no key.*--open-to-all"):
                Address(host, without_tls=True).check(keys)
            with pytest.raises(ConfigError, match="--without-tls"):
                Address(host, open_to_all=True).check(keys)
            assert Address(host, open_to_all=True, without_tls=True).check(keys) is False
        keys.create("kim")
        assert Address("127.0.0.1").check(keys) is True
        with pytest.raises(ConfigError, match="--without-tls"):
            Address("0.0.0.0").check(keys)
        assert Address("0.0.0.0", without_tls=True).check(keys) is True
        keys.revoke("kim")
        with pytest.raises(ConfigError, match="there is no key"):
            Address("0.0.0.0", without_tls=True).check(keys)
        with pytest.raises(ConfigError, match="--tls-certificate"):
            Address("0.0.0.0", certificate=tmp_path / "absent", private_key=tmp_path / "absent").check(keys)


def test_files_of_tls_that_cannot_serve_are_refused_by_name(
    tmp_path: Path, key: Ed25519PrivateKey, published: Callable[[Path], str]
) -> None:
    for name, days in (("new", 1.0), ("other", 1.0), ("old", -1.0)):
        (tmp_path / name).mkdir()
        certificate(tmp_path / name, days)
    (new, own), (_, foreign), (old, olds) = (
        (tmp_path / name / "certificate.pem", tmp_path / name / "key.pem") for name in ("new", "other", "old")
    )
    locked = tmp_path / "locked.pem"
    private = serialization.load_pem_private_key(own.read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))
    cases: dict[tuple[Path | None, Path | None], str] = {
        (new, None): f"--tls-certificate = '{new}': give --tls-key too",
        (None, own): f"--tls-key = '{own}': give --tls-certificate too",
        (new, tmp_path / "no"): f"--tls-key = '{tmp_path / 'no'}': cannot be read .No such file or directory",
        (tmp_path / "no", own): f"--tls-certificate = '{tmp_path / 'no'}': cannot be read .No such file",
        (new, foreign): "cannot be used with its key .*belong together",
        (new, locked): "cannot be used with its key .*the key unencrypted",
        (own, own): "cannot be used with its key",
        (old, olds): "expired on .*give a new one",
    }
    with Registry(published(tmp_path)) as registry:
        for (shown, kept), told in cases.items():
            with pytest.raises(ConfigError, match=told):
                Address(certificate=shown, private_key=kept).check(Keys(registry.database))
        Address(certificate=new, private_key=own).check(Keys(registry.database))


def test_the_commands_of_keys(
    tmp_path: Path, published: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    url = published(tmp_path)
    assert invoke(["keys", "create", "--name", "kim", "--per-day", "9", "--registry", url]) == 0
    secret = capsys.readouterr().out.strip()
    with Registry(url) as registry:
        found = Keys(registry.database).find(secret)
    assert found is not None
    assert (found.name, found.per_day, found.scopes) == ("kim", 9, ("read", "classify"))
    assert invoke(["keys", "revoke", "kim", "--registry", url]) == 0
    capsys.readouterr()
    assert invoke(["keys", "list", "--json", "--registry", url]) == 0
    told = capsys.readouterr().out
    assert json.loads(told)["keys"][0]["revoked"]
    assert secret not in told
    assert invoke(["keys", "list", "--registry", url]) == 0
    assert invoke(["serve", "--host", "0.0.0.0", "--registry", url]) == 2
    assert "sordino keys create" in capsys.readouterr().err
    assert invoke(["serve", "glass", "--port", "0", "--registry", url]) == 2
    assert "no such prompt" in capsys.readouterr().err


def certificate(folder: Path, days: float = 1.0) -> tuple[Path, Path]:
    """A certificate of this machine for itself, valid until some days from now, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    first, last = now - timedelta(days=2), now + timedelta(days=days)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), first, last)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return files


def peak(process: subprocess.Popen[str]) -> int:
    """The most memory that a process had, in kB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
def test_the_command_serves_over_tls_and_survives_two_thousand_bad_uploads(
    tmp_path: Path, shared_run: Path, own_config: Path
) -> None:
    """A process of its own, with the user's key: alive at the end, its memory bounded, and ended by a signal."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "sordino"]
    publish = [*command, "publish", str(shared_run), "--name", "fabric", "--accept-not-private"]
    subprocess.run(publish, cwd=tmp_path, env=environment, check=True, capture_output=True)
    create = [*command, "keys", "create", "--name", "kim", "--per-day", "99999", "--per-minute", "99999"]
    secret = subprocess.run(create, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    files = certificate(tmp_path)
    options = ["--port", "0", "--host", "0.0.0.0", "--tls-certificate", str(files[0]), "--tls-key", str(files[1])]
    process = subprocess.Popen(
        [*command, "serve", "fabric", *options], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip().rpartition(":")[2]
        headers = {"Authorization": f"Bearer {secret.strip()}"}
        context = ssl.create_default_context(cafile=str(files[0]))
        client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, headers=headers, timeout=60)
        with client:
            server = Running(client, None, None, tmp_path, "")  # type: ignore[arg-type]
            answer = server.classify(PNG)
            assert answer.status_code == 200
            assert "strict-transport-security" in answer.headers
            before = peak(process)

            @settings(max_examples=2000, suppress_health_check=list(HealthCheck))
            @given(content=uploads)
            def bombard(content: bytes) -> None:
                require_refused(server, content)

            bombard()
            assert process.poll() is None
            assert peak(process) - before < 300_000
            assert server.classify(PNG).json() == answer.json()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.communicate()
    assert "Traceback" not in (tmp_path / "sordino-serve.jsonl").read_text()
