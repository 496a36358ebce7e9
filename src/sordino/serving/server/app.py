"""The addresses of a server."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

import sordino
from sordino.errors import RunError
from sordino.serving.folder import MANIFEST, SIGNATURE
from sordino.serving.manifest import FILES, Manifest
from sordino.serving.server import inference, web
from sordino.serving.server.compared import RunFolder
from sordino.serving.server.described import ANY, KEYED, LOADED, NAMED, SENT, content, key_needed, refusals
from sordino.serving.server.guard import Guard
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.samples import Samples
from sordino.serving.server.service import Service
from sordino.serving.server.shelf import Unusable

log = logging.getLogger("sordino.serving")

FIELD = "image"  # of a form
FILE = {"type": "string", "format": "binary"}


def _form(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "required": required, "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


UPLOAD = _form({FIELD: {"type": "array", "items": FILE}}, [FIELD])
FOLDER = _form(dict.fromkeys((MANIFEST, SIGNATURE, *FILES), FILE), [MANIFEST, SIGNATURE])


class Ranked(BaseModel):
    """A class with its rounded probability."""

    name: str
    probability: float


class PictureAnswer(BaseModel):
    """The classes of one picture, the most probable first; and what the hand-written prompt says, if it was asked."""

    classes: list[Ranked]
    zero_shot: list[Ranked] | None = None


class Classified(BaseModel):
    """The answer to a request: of one prompt, in the order of the pictures."""

    prompt: str
    version: int
    mark: str
    pictures: list[PictureAnswer]


def build(
    service: Service, hosts: list[str] | None = None, samples: Samples | None = None, runs: RunFolder | None = None
) -> FastAPI:
    """Make the application of a server.

    Args:
        service: its inside.
        hosts: names that it may be asked by; None: any. A page in a browser on the same machine could otherwise reach
            a server without keys under a name of its own.
        samples: pictures that the page offers; None: those of bundled data sets.
        runs: that the page of runs compares; None: there is no such page.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="Sordino",
        version=sordino.__version__,
        docs_url=None,  # the usual page of documentation would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(known_query)],
        responses=refusals(*ANY),
        redirect_slashes=False,  # behind a proxy with TLS it would send a key to the same address without
    )

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        """Tell that the registry can be read."""
        await service.apart(service.shelf.registry.ping)
        return {"status": "ready"}

    with_key = key_needed(service.needs_key)
    scrape = content("text/plain") | refusals(401, 403, 429)

    @app.get("/metrics", response_class=Response, dependencies=with_key, responses=scrape)
    async def metrics(request: Request) -> Response:
        """Counters for Prometheus."""
        await service.admit(request, "read")
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/prompts", dependencies=with_key, responses=refusals(*KEYED))
    async def prompts(request: Request) -> list[dict[str, Any]]:
        """List the versions that may be used."""
        await service.admit(request, "read")
        found = await service.apart(service.shelf.registry.listed, service.shelf.trusted)
        return [
            about(each.manifest)
            for each in found
            if each.manifest is not None and each.trusted and each.withdrawn is None
        ]

    @app.get("/v1/prompts/{name}", dependencies=with_key, responses=refusals(*NAMED))
    async def prompt(
        request: Request, name: str, version: Annotated[str | None, Query(max_length=20)] = None
    ) -> dict[str, Any]:
        """Describe a version: its manifest as it was signed, and its card."""
        await service.admit(request, "read")
        request.state.told["prompt"] = name[:100]
        found = await service.apart(service.shelf.describe, name, version)
        return {
            **about(found.manifest),
            "manifest": found.manifest.model_dump(mode="json"),
            "signature": found.sealed.signature,
            "card": found.card,
        }

    asked = refusals(*LOADED, *SENT, 415)

    @app.post("/v1/prompts/{name}/classify", openapi_extra=UPLOAD, dependencies=with_key, responses=asked)
    async def classify(
        request: Request,
        name: str,
        version: Annotated[str | None, Query(max_length=20)] = None,
        top: int | None = None,
        zero_shot: bool = False,
    ) -> Classified:
        """Classify pictures: JPEG, PNG or WebP files in a form, each in a field `image`."""
        key = await service.admit(request, "classify")
        most = service.top(top)
        parts = await uploaded(request, service.settings.most_pictures, service.settings.most_bytes)
        if any(field != FIELD for field, _ in parts):
            raise Refusal(422, f"a form has pictures in fields {FIELD!r} and nothing else")
        contents = [content for _, content in parts]
        classifier, answers = await service.classify(request, key, name, version, contents, zero_shot)
        manifest = classifier.manifest
        assert manifest is not None
        return Classified(
            prompt=manifest.name,
            version=manifest.version,
            mark=manifest.mark,
            pictures=[
                PictureAnswer(
                    classes=ranked(answer.classes[:most]),
                    zero_shot=None if answer.zero_shot is None else ranked(answer.zero_shot[:most]),
                )
                for answer in answers
            ],
        )

    sent = refusals(*KEYED, *SENT, 409, 415)

    @app.post("/v1/prompts", status_code=201, openapi_extra=FOLDER, dependencies=with_key, responses=sent)
    async def publish(request: Request) -> dict[str, Any]:
        """Publish a version that was signed elsewhere: the files of an exported folder, in fields of their names."""
        key = await service.admit(request, "publish")
        parts = await uploaded(request, len(FILES) + 2, service.settings.most_bytes)
        files = dict(parts)
        if len(files) != len(parts):
            raise Refusal(422, "a file stands twice in the form")
        manifest = await service.in_turn(key, service.shelf.put, files)
        request.state.told |= {"prompt": manifest.name, "version": manifest.version}
        return about(manifest)

    app.include_router(inference.routes(service))
    app.include_router(web.routes(service, samples or Samples(None, service.settings), runs))
    _tell_in_one_line(app)
    app.add_middleware(Guard, service=service, hosts=hosts)
    return app


async def known_query(request: Request) -> None:
    """Refuse a query that an address does not take: a `zero-shot` that is ignored looks like an answer without one."""
    route = request.scope["route"]
    if not route.path.startswith(("/v1/", "/v2/")):
        return
    known = sorted(parameter.alias for parameter in route.dependant.query_params)
    given = [name for name, _ in request.query_params.multi_items()]
    if not set(given) <= set(known):
        raise Refusal(422, f"the query has a parameter that is not known here; there is {', '.join(known) or 'none'}")
    if len(set(given)) < len(given):
        raise Refusal(422, "the query has a parameter twice")


def about(manifest: Manifest) -> dict[str, Any]:
    """Return what a list tells of a version."""
    return {
        "name": manifest.name,
        "version": manifest.version,
        "method": manifest.method,
        "encoder": manifest.encoder.name,
        "class_names": list(manifest.class_names),
        "privacy": manifest.promise,
        "mark": manifest.mark,
        "attacks": manifest.attacks,
        "created": manifest.created,
    }


def ranked(classes: tuple[tuple[str, float], ...]) -> list[Ranked]:
    """Return classes as an answer tells them."""
    return [Ranked(name=name, probability=probability) for name, probability in classes]


async def uploaded(request: Request, most: int, size: int) -> list[tuple[str, bytes]]:
    """Return the files of a form with the names of their fields; they are never on the disk.

    Raises:
        Refusal: it is no form, or holds something else.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(415, "send a form, multipart/form-data, with files")
    parser = MultiPartParser(request.headers, request.stream(), max_files=most, max_fields=0)
    parser.spool_max_size = size + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(422, f"the form is damaged, or has more than {most} files: {error.message[:100]}") from None
    except (ValueError, KeyError, UnicodeError, LookupError):
        raise Refusal(422, "the form is damaged") from None
    try:
        return [(name, await part.read()) for name, part in form.multi_items() if not isinstance(part, str)]
    finally:
        await form.close()


def _tell_in_one_line(app: FastAPI) -> None:
    """Turn every error into one line that repeats nothing of the request."""

    def told(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": reason}, status, headers)

    @app.exception_handler(Refusal)
    async def refusal(_: Request, error: Refusal) -> JSONResponse:
        if isinstance(error, Unusable):
            _operator(error.why)
        return told(error.status, error.reason, error.headers)

    @app.exception_handler(RunError)
    async def registry(_: Request, error: RunError) -> JSONResponse:
        _operator(str(error))
        return told(503, "the registry cannot be read now", {"Retry-After": "5"})

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        words = {404: "there is no such address", 405: "this address takes another method"}
        return told(error.status_code, words.get(error.status_code, "the request is malformed"))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:3])
        return told(422, f"{place[:100]}: {first['msg'][:100]}")


def _operator(line: str) -> None:
    log.warning("%s", line)
