"""The web pages of a server, and the addresses that they alone need.

The pages are files of the package: no build step, no script or style inside the HTML, nothing from elsewhere. The
policy that is sent with them lets a browser run nothing else, and forbids scripts to turn text into markup.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

import sordino
from sordino.report.frame import asset
from sordino.serving.registry import Published
from sordino.serving.server.compared import RunFolder
from sordino.serving.server.described import KEYED, NAMED, content, key_needed, refusals
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.samples import Samples
from sordino.serving.server.service import Service
from sordino.serving.server.settings import ACCEPTED

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
TYPES: Final = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
ASSETS: Final = ("page.css", "shared.js", "prompts.js", "runs.js", "icon.svg")
KEY: Final = "key.html"  # the question for a key, in both pages
HOUSE: Final = "house.css"  # the report's own style, under the pages'


def routes(service: Service, samples: Samples, runs: RunFolder | None) -> APIRouter:
    """Make the pages' addresses.

    Args:
        service: the server's inside.
        samples: pictures that the page offers.
        runs: that the second page compares; None: there is no second page.
    """
    router = APIRouter()
    for address, name in {"/": "prompts.html", "/favicon.ico": "icon.svg", "/runs": "runs.html"}.items():
        if address != "/runs" or runs is not None:
            router.get(address, include_in_schema=False)(_file(name, _own(name)))
    for name in ASSETS:
        router.get(f"/assets/{name}", include_in_schema=False)(_file(name, _own(name)))
    router.get(f"/assets/{HOUSE}", include_in_schema=False)(_file(HOUSE, asset("page.css")))

    with_key = key_needed(service.needs_key)

    @router.get("/v1/server", responses=refusals(422))
    async def server() -> dict[str, Any]:
        """Describe the server: whether it asks for a key, and its limits. Everybody may ask."""
        limits = service.settings
        return {
            "version": sordino.__version__,
            "needs_key": service.needs_key,
            "runs": runs is not None,
            "accepted": list(ACCEPTED),
            "most_bytes": limits.most_bytes,
            "most_pixels": limits.most_pixels,
            "most_top": limits.most_top,
            "digits": limits.digits,
        }

    @router.get("/v1/key", dependencies=with_key, responses=refusals(*KEYED))
    async def key(request: Request) -> dict[str, Any]:
        """Describe the key that asks: what it may do, and what is left of today's pictures."""
        found = await service.identify(request)
        most = found.per_day or service.settings.per_day
        used = await service.apart(service.keys.used, found.name)
        return {
            "name": found.name,
            "scopes": list(found.scopes),
            "per_minute": found.per_minute or service.settings.per_minute,
            "per_day": most,
            "left_today": max(0, most - used),
        }

    async def offered(request: Request, name: str, version: str | None) -> Published:
        await service.admit(request, "read")
        request.state.told["prompt"] = name[:100]
        return await service.apart(service.shelf.describe, name, version)

    @router.get("/v1/prompts/{name}/samples", dependencies=with_key, responses=refusals(*NAMED))
    async def listed(
        request: Request, name: str, version: Annotated[str | None, Query(max_length=20)] = None
    ) -> dict[str, Any]:
        """List sample pictures for a prompt, with where they are from."""
        found = await offered(request, name, version)
        origin, pictures = await service.apart(samples.of, found.manifest)
        return {"origin": origin, "samples": [each.as_dict() for each in pictures]}

    file = content("application/octet-stream") | refusals(*NAMED)

    @router.get("/v1/prompts/{name}/samples/{number}", response_class=Response, dependencies=with_key, responses=file)
    async def sample(
        request: Request, name: str, number: int, version: Annotated[str | None, Query(max_length=20)] = None
    ) -> Response:
        """Return a sample picture, by its place in the list from 0."""
        found = await offered(request, name, version)
        _, pictures = await service.apart(samples.of, found.manifest)
        if not 0 <= number < len(pictures):
            raise Refusal(404, "there is no such sample")
        return Response(pictures[number].content, media_type="application/octet-stream")

    if runs is not None:

        @router.get("/v1/runs", dependencies=with_key, responses=refusals(*KEYED))
        async def compared(request: Request) -> dict[str, Any]:
            """Compare the runs in the operator's folder."""
            await service.admit(request, "read")
            return await service.alone(runs.compared)

    return router


def _own(name: str) -> str:
    """Return a file of the pages; what they share stands in one, and a comment says where it goes."""
    text = (files("sordino.serving.server") / "assets" / name).read_text(encoding="utf-8")
    return text if name == KEY else text.replace(f"  <!-- {KEY} -->\n", _own(KEY) if name.endswith(".html") else "")


def _file(name: str, text: str) -> Callable[[], Any]:
    """Return an address that answers with a text, which is read once."""
    kind, content = TYPES[name.rpartition(".")[2]], text.encode()
    headers = {"Content-Security-Policy": POLICY} if kind == "text/html" else {}
    answer = partial(Response, content, media_type=kind, headers=headers)

    async def page() -> Response:
        return answer()

    return page
