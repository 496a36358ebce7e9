"""Bodies of requests: whatever is in the bytes that one may have, little is made of it before it is refused."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.formparsers import MultiPartParser

from serving.test_description import operations
from serving.test_hostile import asked, published  # noqa: F401
from serving.uploads import PICTURES
from sordino.errors import PromptError
from sordino.files import json_pieces
from sordino.privacy.signature import fingerprint, public_bytes, sign
from sordino.serving.folder import MANIFEST, SIGNATURE, export, read_files, read_folder
from sordino.serving.manifest import MAX_MANIFEST, MOST_PIECES, Manifest, Sealed, _signed
from sordino.serving.registry import Registry
from sordino.serving.server.keys import Keys
from sordino.serving.server.settings import ServerSettings
from sordino.serving.trust import Trusted

PNG = PICTURES["PNG"]
SETTINGS = ServerSettings(most_bytes=2 << 20)
ROOM = SETTINGS.most_bytes - 2000  # bytes that a body may be filled with
MOST = 4096  # values or parts that are made of a body
TENSOR = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(PNG).decode()]}
JSON, FORM = "application/json", "multipart/form-data; boundary=XX"


def filled(start: bytes, piece: bytes, end: bytes) -> bytes:
    return start + piece * (ROOM // len(piece)) + end


def body(**changes: Any) -> tuple[bytes, bytes]:
    """A request of the protocol, cut where "HERE" stands."""
    start, _, end = json.dumps({"inputs": [TENSOR]} | changes).encode().partition(b'"HERE"')
    return start, end


def in_json() -> Iterator[bytes]:
    places = [
        body(parameters={"top": ["HERE"]}),
        body(parameters={"top": 2, "other": ["HERE"]}),
        body(parameters=["HERE"]),
        body(inputs=[TENSOR | {"parameters": {"other": ["HERE"]}}]),
        body(inputs=[TENSOR | {"data": ["HERE"]}]),
        body(inputs=[TENSOR | {"other": ["HERE"]}]),
        body(outputs=[{"name": "classes", "parameters": {"classification": ["HERE"]}}]),
        body(id=["HERE"]),
        body(other=["HERE"]),
    ]
    for start, end in places:
        for piece in (b"[],", b"1,", b'{"a":1},', b'"",'):
            yield filled(start, piece, b"0" + end)
        yield start + b"[" * ROOM + end
        yield start + b"9" * ROOM + end
    for start, end in (body(parameters={"HERE": 1}), body(HERE=1)):
        yield start + b",".join(b'"%x":{}' % number for number in range(ROOM // 12)) + end.replace(b": 1", b"", 1)


def part(name: str, content: bytes, headers: bytes = b"") -> bytes:
    head = f'--XX\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n'.encode()
    return head + headers + b"\r\n" + content + b"\r\n"


def in_form(name: str) -> Iterator[bytes]:
    end = b"--XX--\r\n"
    yield part(name, PNG, filled(b"", b"a:b\r\n", b"")) + end
    yield part(name, PNG, filled(b"a:", b"b", b"\r\n")) + end
    yield filled(b"", part(name, b""), end)
    yield filled(b"", b"--XX\r\n\r\n\r\n", end)
    yield filled(b"", b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n', end)
    yield filled(b"", b"\r\n", end)


def in_folder() -> Iterator[bytes]:
    lists = filled(b"[", b"[],", b"[]]")
    stranger = Ed25519PrivateKey.generate()
    for piece in (lists, filled(b'{"signature":[', b"[],", b'[]],"public_key":""}'), b"[" * ROOM):
        yield part(MANIFEST, b"{}") + part(SIGNATURE, piece) + b"--XX--\r\n"
    yield part(MANIFEST, lists) + part(SIGNATURE, signature_of(lists, stranger)) + b"--XX--\r\n"


def signature_of(manifest: bytes, key: Ed25519PrivateKey) -> bytes:
    public = public_bytes(key)
    content = {
        "algorithm": "Ed25519",
        "public_key": public.hex(),
        "fingerprint": fingerprint(public),
        "signature": sign(key, _signed(manifest)),
    }
    return (json.dumps(content, indent=2) + "\n").encode()


BODIES: dict[str, tuple[str, Callable[[], Iterator[bytes]]]] = {
    "/v1/prompts/{name}/classify": (FORM, lambda: in_form("image")),
    "/v1/prompts": (FORM, lambda: (each for kind in (in_form(SIGNATURE), in_folder()) for each in kind)),
    "/v2/models/{name}/infer": (JSON, in_json),
    "/v2/models/{name}/versions/{version}/infer": (JSON, in_json),
}


@pytest.fixture
def client(published: str, trusted: Trusted) -> Iterator[TestClient]:  # noqa: F811
    """It has a key for everything."""
    with asked(published, trusted, needs_key=True, settings=SETTINGS) as opened:
        with Registry(published) as registry:
            secret = Keys(registry.database).create("kim", ["read", "classify", "publish"])
        opened.headers["Authorization"] = f"Bearer {secret}"
        yield opened


class Watched:
    """Counts what parsers of JSON and forms were given, and the threads that parsed JSON for the server."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.most, self.threads = 0, set[str]()
        loads, validate = json.loads, BaseModel.model_validate_json.__func__  # type: ignore[attr-defined]

        def see(text: Any) -> None:
            if isinstance(text, bytes) and threading.current_thread() is not threading.main_thread():
                self.most = max(self.most, json_pieces(text))
                self.threads.add(threading.current_thread().name.partition("_")[0])

        def watched_loads(text: Any, **options: Any) -> Any:
            see(text)
            return loads(text, **options)

        def watched_validate(model: Any, text: Any, **options: Any) -> Any:
            see(text)
            return validate(model, text, **options)

        patch.setattr(json, "loads", watched_loads)
        patch.setattr(BaseModel, "model_validate_json", classmethod(watched_validate))
        for name in ("on_part_begin", "on_header_end"):
            patch.setattr(MultiPartParser, name, self._counted(getattr(MultiPartParser, name)))
        self._parts = 0

    def _counted(self, method: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(parser: Any) -> None:
            self._parts += 1
            self.most = max(self.most, self._parts)
            method(parser)

        return counted

    def begin(self) -> None:
        self.most = self._parts = 0


def test_every_address_that_reads_a_body_is_known(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {path for _, path, operation in operations(document) if "requestBody" in operation} == BODIES.keys()


@pytest.mark.parametrize("path", BODIES)
def test_little_is_made_of_a_hostile_body(path: str, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of JSON is an object of some hundred bytes, made under the interpreter's lock."""
    kind, bodies = BODIES[path]
    address = path.format(name="fabric", version=1)
    watched = Watched(monkeypatch)
    for content in bodies():
        assert len(content) <= SETTINGS.most_bytes
        watched.begin()
        answer = client.post(address, content=content, headers={"Content-Type": kind})
        shown = content[:120], content[-60:]
        assert answer.status_code in (413, 415, 422), (shown, answer.text)
        assert len(answer.text) < 400, shown
        assert watched.most <= MOST, shown
    assert watched.threads <= {"pictures"}  # where requests of one key take turns


def test_what_clients_of_the_protocol_send_is_taken(client: TestClient) -> None:
    """Tensors may have parameters; those that would change the answer are refused."""
    address = "/v2/models/fabric/infer"
    given = TENSOR | {"parameters": {"content_type": "base64"}}
    outputs = [{"name": "classes", "parameters": {"binary_data": False}}]
    answer = client.post(address, json={"id": "a", "inputs": [given], "outputs": outputs, "parameters": {"top": 2}})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["outputs"][0]["data"]) == 2
    refused: list[dict[str, Any]] = [
        {"inputs": [TENSOR | {"parameters": {"binary_data_size": 3}}]},
        {"inputs": [TENSOR], "outputs": [{"name": "classes", "parameters": {"classification": 1}}]},
        {"inputs": [TENSOR], "secret": 1},
        {"inputs": [TENSOR], "parameters": {"secret": 1}},
        *({"inputs": [TENSOR], "parameters": {"top": top}} for top in ("2", True, 2.0, [2])),
    ]
    for wrong in refused:
        answer = client.post(address, json=wrong)
        assert answer.status_code == 422, wrong
        assert "secret" not in answer.text


def test_as_many_pictures_as_may_be_asked_about_are_no_hostile_body(client: TestClient) -> None:
    count = SETTINGS.most_pictures
    tensor = TENSOR | {"shape": [count], "data": TENSOR["data"] * count}  # type: ignore[operator]
    for indent in (None, 2):
        content = json.dumps({"inputs": [tensor]}, indent=indent)
        answer = client.post("/v2/models/fabric/infer", content=content)
        assert answer.status_code == 200, answer.text


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
    max_leaves=30,
)


def values(content: Any) -> int:
    if isinstance(content, dict):
        return 1 + sum(1 + values(each) for each in content.values())
    return 1 + sum(map(values, content)) if isinstance(content, list) else 1


@given(anything, st.sampled_from([None, 1]), st.sampled_from([(",", ":"), (", ", " : ")]), st.booleans())
def test_json_has_no_more_values_than_pieces(content: Any, indent: int | None, between: Any, ascii_alone: bool) -> None:
    text = json.dumps(content, indent=indent, separators=between, ensure_ascii=ascii_alone)
    assert values(content) <= json_pieces(text.encode("utf-8", "surrogatepass"))


def test_a_manifest_of_too_many_values_is_not_parsed(key: Ed25519PrivateKey, trusted: Trusted) -> None:
    """Even one that somebody trusted signed."""
    text = b'{"format":[' + b"0," * MOST_PIECES + b"0]}"
    assert len(text) < MAX_MANIFEST
    with pytest.raises(PromptError, match="its format is 'too large'"):
        Sealed(text, sign(key, _signed(text)), public_bytes(key)).open("here")
    with pytest.raises(PromptError, match="its format is 'too large'"):
        read_files({MANIFEST: text, SIGNATURE: signature_of(text, key)}, "here", trusted)


def test_a_folder_of_a_stranger_is_refused_before_its_manifest_is_parsed(
    published: str,  # noqa: F811
    trusted: Trusted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Registry(published) as registry:
        export(registry.load("fabric", trusted=trusted), tmp_path / "out")
        monkeypatch.setattr(Manifest, "model_validate_json", None)
        with pytest.raises(PromptError, match="not trusted"):
            registry.load("fabric", trusted=Trusted(frozenset()))
    with pytest.raises(PromptError, match="not trusted"):
        read_folder(tmp_path / "out", Trusted(frozenset()))
    (tmp_path / "out" / SIGNATURE).write_bytes(b" " * 2000)
    with pytest.raises(PromptError, match=rf"{SIGNATURE} cannot be read"):
        read_folder(tmp_path / "out", trusted)
