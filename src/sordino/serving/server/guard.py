"""The guard before every address: size and time of a request, headers, errors in one line, log and counters."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sordino.serving.server.refusal import Refusal
from sordino.serving.server.service import Service

log = logging.getLogger("sordino.serving")

PORT = re.compile(r":[0-9]+\Z")  # of a host; an address of IPv6 has brackets
HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
TLS_HEADER = (b"strict-transport-security", b"max-age=31536000")


class Guard:
    """An ASGI application around another one.

    Args:
        app: the other one.
        service: the server's inside.
        hosts: names that it may be asked by; None: any.
    """

    def __init__(self, app: ASGIApp, service: Service, hosts: Sequence[str] | None = None) -> None:
        self._app, self._service, self._hosts = app, service, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer to one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, receive, send, self._service.settings.most_bytes)
        self._service.metrics.open.inc()
        try:
            request.check_length()
            if self._hosts is not None:
                request.check_host(self._hosts)
            async with asyncio.timeout(self._service.settings.seconds):
                await self._app(scope, request.receive, request.send)
        except Refusal as refusal:
            await request.refuse(refusal)
        except TimeoutError:
            await request.refuse(Refusal(408 if not request.read else 503, "this took too long"))
        except Exception:  # told to the operator, not to the client
            log.exception("a request failed")
            await request.refuse(Refusal(500, "the server failed; its operator can read why"))
        finally:
            self._service.metrics.open.dec()
            self._tell(scope, request)

    def _tell(self, scope: Scope, request: _Request) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._service.metrics.requests.labels(route, request.status).inc()
        self._service.metrics.seconds.labels(route).observe(time.monotonic() - request.since)
        told = scope["state"]["told"]
        if told:  # somebody asked with a key, or asked a prompt
            self._service.log.write(route=route, status=request.status, **told)


class _Request:
    """One request: what was read of it and sent for it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        self._scope, self._receive, self._send, self._most = scope, receive, send, most
        scope.setdefault("state", {})["told"] = {}
        self.since, self.status, self.read = time.monotonic(), 0, False
        self._size = 0

    def check_length(self) -> None:
        """Refuse a body that is announced as too large, before any of it is read."""
        for name, value in self._scope["headers"]:
            if name == b"content-length" and not (value.isdigit() and len(value) < 16 and int(value) <= self._most):
                raise self._too_large()

    def check_host(self, known: Sequence[str]) -> None:
        """Refuse who asks by a name that is not this server's: a page in a browser, under a name of its own."""
        hosts = [value.decode("latin-1").lower() for name, value in self._scope["headers"] if name == b"host"]
        if len(hosts) != 1 or PORT.sub("", hosts[0]) not in known:
            raise Refusal(400, f"this server is asked by one of these names alone: {', '.join(known)}")

    async def receive(self) -> Message:
        """Count the bytes of the body as they come: what is announced may be a lie, or nothing."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._most:
                raise self._too_large()
            self.read = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Add headers to an answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name.lower() for name, _ in message["headers"]}
            added = [*HEADERS, *([TLS_HEADER] if self._scope.get("scheme") == "https" else [])]
            message["headers"] = [*message["headers"], *(each for each in added if each[0] not in present)]
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal, if no answer has begun."""
        if self.status:
            return
        body = json.dumps({"error": refusal.reason}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
        if not self.read:  # of a body that nobody will read
            headers["connection"] = "close"
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})

    def _too_large(self) -> Refusal:
        return Refusal(413, f"more than {self._most:,} bytes")
