"""`/openapi.json` describes the server: all that it refers to is there, and answers are those that it declares."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi.testclient import TestClient

from serving.test_hostile import PNG, asked, published  # noqa: F401  # a fixture
from sordino.serving.folder import export
from sordino.serving.registry import Registry
from sordino.serving.server.keys import Keys
from sordino.serving.server.settings import ServerSettings
from sordino.serving.sources import from_run
from sordino.serving.trust import Trusted

PICTURE = {"files": {"image": ("a.png", PNG)}}
TENSOR = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PNG).decode()]}


@pytest.fixture
def client(published: str, trusted: Trusted) -> Iterator[TestClient]:  # noqa: F811
    with asked(published, trusted, needs_key=True, settings=ServerSettings(most_bytes=50_000)) as found:
        yield found


@pytest.fixture
def bearer(published: str) -> Callable[..., dict[str, str]]:  # noqa: F811
    """Makes a key; the header with it."""

    def make(name: str, scopes: str = "read,classify,publish", **limits: int) -> dict[str, str]:
        with Registry(published) as registry:
            return {"Authorization": f"Bearer {Keys(registry.database).create(name, scopes.split(','), **limits)}"}

    return make


def described(client: TestClient) -> dict[str, Any]:
    document: dict[str, Any] = client.get("/openapi.json").json()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def target(document: dict[str, Any], reference: str) -> Any:
    assert reference.startswith("#/")
    found: Any = document
    for part in reference[2:].split("/"):
        found = found[part]
    return found


def test_whatever_it_refers_to_is_in_it(client: TestClient) -> None:
    document = described(client)
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    assert references
    for reference in references:
        assert target(document, reference)
    assert "HTTPValidationError" not in json.dumps(document)  # which is never sent


def filled(path: str) -> str:
    return path.format(name="fabric", version="1", number="0")


def test_what_needs_a_key_says_so(client: TestClient, published: str, trusted: Trusted) -> None:  # noqa: F811
    document = described(client)
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for method, path, operation in operations(document):
        status = client.request(method, filled(path)).status_code
        assert (status == 401) == ("security" in operation), path
        assert str(status) in operation["responses"], path
    with asked(published, trusted) as without_keys:
        assert "securitySchemes" not in described(without_keys)["components"]


def test_an_answer_is_of_the_type_that_is_declared(client: TestClient, bearer: Callable[..., dict[str, str]]) -> None:
    document, key = described(client), bearer("kim")
    for method, path, operation in operations(document):
        if method == "get" and "number" not in path:  # this prompt has no samples
            answer = client.get(filled(path), headers=key)
            assert answer.status_code == 200, path
            (declared,) = operation["responses"]["200"]["content"]
            assert answer.headers["content-type"].startswith(declared), path
    (sample,) = document["paths"]["/v1/prompts/{name}/samples/{number}"]["get"]["responses"]["200"]["content"]
    assert sample == "application/octet-stream"


CLASSIFY, INFER = "/v1/prompts/{name}/classify", "/v2/models/{name}/infer"
REFUSED: list[tuple[int, str, str, dict[str, Any]]] = [
    (400, "get", "/v1/prompts", {"headers": {"host": "evil.example"}}),
    (401, "post", CLASSIFY, PICTURE | {"headers": {"Authorization": "Bearer no"}}),
    (401, "get", "/metrics", {"headers": {"Authorization": "Bearer no"}}),
    (403, "post", "/v1/prompts", {"scopes": "read"}),
    (403, "get", "/metrics", {"scopes": "classify"}),
    (404, "post", CLASSIFY, PICTURE | {"name": "glass"}),
    (404, "get", "/v2/models/{name}/versions/{version}", {"version": "7"}),
    (404, "get", "/v1/prompts/{name}/samples/{number}", {}),
    (409, "post", "/v1/prompts", {"publish": True}),
    (410, "get", "/v1/prompts/{name}", {"withdrawn": True}),
    (410, "get", "/v2/models/{name}", {"withdrawn": True}),
    (413, "post", CLASSIFY, {"files": {"image": ("a.png", PNG + bytes(50_000))}}),
    (415, "post", CLASSIFY, {"content": PNG}),
    (415, "post", INFER, {"json": {"inputs": [TENSOR | {"data": ["aGVsbG8="]}]}}),
    (422, "get", "/v1/server", {"params": {"x": "1"}}),
    (422, "get", "/v1/prompts/{name}/samples/{number}", {"number": "x"}),
    (422, "post", INFER, {"json": {"inputs": [TENSOR], "parameters": {"zero_shot": True}}}),
    (429, "post", CLASSIFY, PICTURE | {"limits": {"per_day": 1}, "before": 1}),
    (429, "get", "/v1/key", {"limits": {"per_minute": 1}, "before": 1}),
    (503, "get", "/health/ready", {"gone": True}),
]


@pytest.mark.parametrize(("status", "method", "path", "how"), REFUSED)
def test_a_refusal_is_one_that_is_declared(
    status: int,
    method: str,
    path: str,
    how: dict[str, Any],
    client: TestClient,
    bearer: Callable[..., dict[str, str]],
    published: str,  # noqa: F811
    trusted: Trusted,
    tmp_path: Path,
) -> None:
    operation = described(client)["paths"][path][method]
    request = dict(how)
    parts = {"name": "fabric", "version": "1", "number": "0"}
    address = path.format(**{name: request.pop(name, value) for name, value in parts.items()})
    headers = bearer("kim", request.pop("scopes", "read,classify,publish"), **request.pop("limits", {}))
    with Registry(published) as registry:
        if request.pop("withdrawn", False):
            registry.withdraw("fabric", 1, "a test")
        if request.pop("publish", False):
            request["files"] = exported(registry, trusted, tmp_path)
        if request.pop("gone", False):
            Path(published.removeprefix("sqlite:///")).write_bytes(b"no database at all" * 500)
    if path == "/v1/prompts" and status == 400:
        with asked(published, trusted, hosts=["localhost"]) as other:
            answer = other.get(address, **request)
    else:
        headers |= request.pop("headers", {})
        for _ in range(request.pop("before", 0)):
            assert client.request(method, address, headers=headers, **request).status_code == 200
        answer = client.request(method, address, headers=headers, **request)
    require_declared(answer, status, operation)


def exported(registry: Registry, trusted: Trusted, folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    export(registry.load("fabric", trusted=trusted), folder / "out")
    return [(file.name, (file.name, file.read_bytes())) for file in (folder / "out").iterdir()]


def require_declared(answer: httpx.Response, status: int, operation: dict[str, Any]) -> None:
    assert answer.status_code == status, answer.text
    declared = operation["responses"][str(status)]["content"]["application/json"]["schema"]
    assert declared == {"$ref": "#/components/schemas/Refused"}
    assert list(answer.json()) == ["error"]
    assert "\n" not in answer.json()["error"]


def test_outputs_are_those_that_are_asked_for(published: str, trusted: Trusted) -> None:  # noqa: F811
    with asked(published, trusted) as client:

        def told(*names: str) -> list[str] | int:
            body = {"inputs": [TENSOR], "outputs": [{"name": name} for name in names]}
            answer = client.post("/v2/models/fabric/infer", json=body)
            return [each["name"] for each in answer.json()["outputs"]] if answer.status_code == 200 else 422

        assert told("classes") == ["classes"]
        assert told("probabilities", "classes") == ["probabilities", "classes"]
        assert told() == ["classes", "probabilities"]
        assert told("logits") == told("classes", "logits") == told("classes", "classes") == 422
        for parameters in ({"zero_shot": True}, {"top": 2, "x": None}):
            body = {"inputs": [TENSOR], "parameters": parameters}
            assert client.post("/v2/models/fabric/infer", json=body).status_code == 422


def test_a_models_versions_are_all_that_can_be_asked_for(
    published: str,  # noqa: F811
    trusted: Trusted,
    shared_run: Path,
    key: Ed25519PrivateKey,
) -> None:
    material = from_run(shared_run, key)
    with Registry(published) as registry:
        for signer in (key, key, Ed25519PrivateKey.generate()):
            registry.publish("fabric", material.facts, material.files, signer, accept_not_private=True)
        registry.withdraw("fabric", 2, "a test")
    with asked(published, trusted) as client:
        for address in ("/v2/models/fabric/versions/3", "/v2/models/fabric/versions/1"):
            found = client.get(address).json()["versions"]
            assert found == ["1", "3"]
        for version in found:
            assert client.get(f"/v2/models/fabric/versions/{version}").status_code == 200
