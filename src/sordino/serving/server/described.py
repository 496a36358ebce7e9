"""The parts of `/openapi.json` that do not follow from types: refusals, keys, and content that is no JSON."""

from __future__ import annotations

from typing import Any

from fastapi import Security
from fastapi.params import Depends
from fastapi.security import HTTPBearer
from pydantic import BaseModel

REASONS = {
    400: "asked by a name that is not the server's own",
    401: "no key that holds",
    403: "a key without this scope, or a page of another site",
    404: "no such prompt, version or sample",
    408: "the body came too slowly",
    409: "not the next version of its name, or a prompt that sorts no pictures",
    410: "the version is withdrawn",
    413: "too many bytes or pixels",
    415: "no form, or no picture of an accepted type",
    422: "a value that is not allowed, or a parameter that is not known",
    429: "more than a minute's requests or a day's pictures; see Retry-After",
    500: "the server failed",
    503: "the server cannot answer now",
}
ANY = (400, 500, 503)
KEYED = (401, 403, 422, 429)
NAMED = (*KEYED, 404, 410)
LOADED = (*NAMED, 409)
SENT = (408, 413)  # of a body


class Refused(BaseModel):
    """An error: one line, which repeats nothing of the request."""

    error: str


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the refusals of an address, as FastAPI takes them."""
    return {status: {"model": Refused, "description": REASONS[status]} for status in sorted(statuses)}


def content(media_type: str) -> dict[int | str, dict[str, Any]]:
    """Return an answer that is no JSON."""
    binary = {} if media_type.startswith("text/") else {"format": "binary"}
    return {200: {"content": {media_type: {"schema": {"type": "string"} | binary}}}}


def key_needed(needs_key: bool) -> list[Depends]:
    """Return what says that an address takes a key; the key itself is looked at by `Service.admit`."""
    told = "a key of 'sordino keys create'"
    return [Security(HTTPBearer(scheme_name="key", description=told, auto_error=False))] if needs_key else []


def whole(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's schema that refers to nothing outside of it, to be put anywhere in a document."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return filled(parts[value["$ref"].rpartition("/")[2]])
        return {name: filled(each) for name, each in value.items()}

    filled_schema: dict[str, Any] = filled(schema)
    return filled_schema
