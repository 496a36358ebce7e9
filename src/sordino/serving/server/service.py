"""The inside of a server, which all its addresses share: who may ask, prompts, batches, counters, log."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from limits import RateLimitItemPerMinute
from limits.strategies import MovingWindowRateLimiter
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import Request
from torch import Tensor

from sordino.encoders import choose_device
from sordino.errors import RunError
from sordino.serving.classifier import Answer, PromptClassifier
from sordino.serving.server.batching import Batcher
from sordino.serving.server.keys import ANYBODY, USUAL, ApiKey, Keys, seconds_left
from sordino.serving.server.rates import Window
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.settings import ServerSettings
from sordino.serving.server.shelf import Shelf
from sordino.serving.server.uploads import read_picture

log = logging.getLogger("sordino.serving")

T = TypeVar("T")
DECODERS = 2  # pictures that are unpacked at once, which bounds memory
TURNS = 4  # requests of one key whose bodies are read and pictures unpacked, or wait for that in a thread


class Log:
    """Who asked what model when, a line of JSON each; never a picture, its name or an answer.

    Where the disk is full, lines are kept, and nobody who has to be in the log is answered until they are written.

    Args:
        file: it is appended to, and its owner's alone where it is new; None: nothing is kept.

    Raises:
        RunError: it cannot be written.
    """

    def __init__(self, file: Path | None) -> None:
        self._lock, self._descriptor = threading.Lock(), None
        self._unwritten = bytearray()
        if file is not None:
            try:
                self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            except OSError as error:
                raise RunError(f"the log {file} cannot be written ({error.strerror}); give another --log") from None

    def write(self, **entry: Any) -> None:
        """Append an entry."""
        if self._descriptor is not None:
            at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            line = json.dumps({"at": at, **entry}) + "\n"
            with self._lock:
                fresh = not self._unwritten
                self._unwritten += line.encode()
                self._flush(tell=fresh)

    def check(self) -> None:
        """See that the log has all that happened.

        Raises:
            Refusal: it cannot be written.
        """
        with self._lock:
            if self._unwritten and not self._flush():
                reason = "the server cannot keep its log now; ask its operator"
                raise Refusal(503, reason, {"Retry-After": "5"})

    def _flush(self, tell: bool = False) -> bool:
        """Write all lines that are not written; whether that went well. Of a piece of a line the rest follows."""
        assert self._descriptor is not None
        try:
            while self._unwritten:
                del self._unwritten[: os.write(self._descriptor, self._unwritten)]
        except OSError as error:
            if tell:
                log.error("the log cannot be written (%s); nobody is answered until it can", error.strerror or error)
            return False
        return True


class Metrics:
    """Counters for Prometheus, of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sordino_requests", "Requests by address and status.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "sordino_request_seconds", "Duration of requests by address.", ("route",), registry=self.registry
        )
        self.pictures = Counter(
            "sordino_pictures", "Pictures that were answered to.", ("prompt", "version"), registry=self.registry
        )
        self.batch = Histogram(
            "sordino_batch_pictures", "Pictures in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.open = Gauge("sordino_open_requests", "Requests that are not answered yet.", registry=self.registry)


class Service:
    """A server's inside.

    Args:
        shelf: the prompts.
        settings: limits.
        needs_key: nobody may ask without a key.
        log: see `Log`.
    """

    def __init__(self, shelf: Shelf, settings: ServerSettings, needs_key: bool, log: Log) -> None:
        self.shelf, self.settings, self.needs_key, self.log = shelf, settings, needs_key, log
        self.metrics = Metrics()
        self.keys = Keys(shelf.registry.database)
        self._limiter = MovingWindowRateLimiter(Window())
        self._decoding = threading.Semaphore(DECODERS)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._alone = ThreadPoolExecutor(1, thread_name_prefix="alone")
        self._others = ThreadPoolExecutor(8, thread_name_prefix="request")
        self._readers = ThreadPoolExecutor(2 * TURNS, thread_name_prefix="pictures")
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(TURNS))
        self._batcher = Batcher(
            settings.batch,
            settings.wait,
            settings.queue,
            settings.digits,
            lambda size: self.metrics.batch.observe(size),
            workers=settings.workers or (0 if choose_device("auto").type == "cpu" else 1),
        )

    def start(self) -> None:
        """Begin to work, in the running loop."""
        self._batcher.start()

    async def stop(self) -> None:
        """End the work."""
        await self._batcher.stop()
        for pool in (self._loader, self._alone, self._others, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def apart(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call what waits for the database or takes time, while others are answered."""
        return await asyncio.get_running_loop().run_in_executor(self._others, functools.partial(call, *arguments))

    async def alone(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call what may take long, after all that was to be called so: one thread is enough for it.

        A lock would not do: who gives up lets it go, and the thread goes on.
        """
        return await asyncio.get_running_loop().run_in_executor(self._alone, functools.partial(call, *arguments))

    async def take(self, name: str, version: str | None) -> PromptClassifier:
        """Return the classifier of a version; one that must be loaded keeps nobody waiting who asks another.

        Raises:
            Refusal: see `Shelf`.
        """
        at, held = await self.apart(self.shelf.look, name, version)
        if held is not None:
            return held
        return await asyncio.get_running_loop().run_in_executor(self._loader, self.shelf.load, at)

    async def admit(self, request: Request, scope: str) -> ApiKey:
        """Find out who asks, and count the request.

        Raises:
            Refusal: there is no key, it does not hold or lacks the scope, or it asks too often.
        """
        key = await self._who(request)
        request.state.told["key"] = key.name
        if scope not in key.scopes:
            raise Refusal(403, f"this key has no scope {scope!r}")
        return self._counted(key)

    async def identify(self, request: Request) -> ApiKey:
        """Find out who asks, whatever the key may do, and count the request.

        Raises:
            Refusal: there is no key, it does not hold, or it asks too often.
        """
        key = await self._who(request)
        request.state.told["key"] = key.name
        return self._counted(key)

    def _counted(self, key: ApiKey) -> ApiKey:
        self.log.check()
        rate = RateLimitItemPerMinute(key.per_minute or self.settings.per_minute)
        if not self._limiter.hit(rate, key.name):
            raise Refusal(429, f"more than {rate.amount} requests a minute", {"Retry-After": "60"})
        return key

    async def _who(self, request: Request) -> ApiKey:
        if not self.needs_key:
            if _from_another_site(request):
                raise Refusal(403, "a page of another site asks in your name; open this server's own page")
            return ApiKey(ANYBODY, USUAL)
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        key = await self.apart(self.keys.find, secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise Refusal(401, "give a key that holds: 'Authorization: Bearer KEY'", {"WWW-Authenticate": "Bearer"})
        return key

    async def classify(
        self, request: Request, key: ApiKey, name: str, version: str | None, contents: Sequence[bytes], zero_shot: bool
    ) -> tuple[PromptClassifier, list[Answer]]:
        """Answer to uploaded pictures, with all classes.

        Raises:
            Refusal: a picture, the prompt or the day's budget does not allow it.
        """
        told = request.state.told
        told |= {"prompt": name[:100], "pictures": len(contents)}
        if not 1 <= len(contents) <= self.settings.most_pictures:
            raise Refusal(422, f"give 1 to {self.settings.most_pictures} pictures")
        self._batcher.require_room(len(contents))  # before they are counted
        with self._batcher.announced():
            ready = await self._ready_in_turn(told, key, name, version, contents)
        if ready is None:
            await self.take(name, version)
            ready = await self._ready_in_turn(told, key, name, version, contents)
        if ready is None:
            raise Refusal(503, "more prompts are asked for at once than are held", {"Retry-After": "1"})
        classifier, pixels = ready
        assert classifier.manifest is not None
        answers = await self._batcher.ask(classifier, pixels, zero_shot)
        self.metrics.pictures.labels(classifier.manifest.name, classifier.manifest.version).inc(len(contents))
        return classifier, answers

    def top(self, asked: int | None) -> int:
        """Return how many classes are told.

        Raises:
            Refusal: more are asked for than the server tells.
        """
        most = self.settings.most_top
        if asked is not None and not 1 <= asked <= most:
            raise Refusal(422, f"top must be 1 to {most}")
        return most if asked is None else asked

    async def in_turn(self, key: ApiKey, call: Callable[..., T], *arguments: Any) -> T:
        """Call what reads a body, for some requests of a key at once: no customer takes all threads from others."""
        async with self._turns[key.name]:
            read = functools.partial(call, *arguments)
            return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    async def _ready_in_turn(
        self, told: dict[str, Any], key: ApiKey, *asked: Any
    ) -> tuple[PromptClassifier, list[Tensor]] | None:
        """Call `_ready` in the key's turn."""
        gone = threading.Event()
        try:
            return await self.in_turn(key, self._ready, gone, told, key, *asked)
        finally:
            gone.set()  # a thread is not interrupted: it looks whether somebody still waits

    def _ready(
        self,
        gone: threading.Event,
        told: dict[str, Any],
        key: ApiKey,
        name: str,
        version: str | None,
        contents: Sequence[bytes],
    ) -> tuple[PromptClassifier, list[Tensor]] | None:
        """Find the prompt, unpack the pictures, and count them, in one visit to a thread: each visit costs.

        Returns:
            The classifier and the pixels of each picture; None if the prompt is not in memory.

        Raises:
            Refusal: see `classify`.
        """
        _, classifier = self.shelf.look(name, version)
        if classifier is None:
            return None
        assert classifier.manifest is not None
        told["version"] = classifier.manifest.version
        pixels = []
        for content in contents:
            if gone.is_set():
                raise Refusal(503, "nobody waits for this any more")
            pixels.append(self._pixels(classifier, content))
        # Pictures that could not be read are not counted: they tell nothing of the prompt.
        most = key.per_day or self.settings.per_day
        if not self.keys.spend(key.name, len(contents), most):
            retry = {"Retry-After": str(seconds_left())}
            raise Refusal(429, f"more than {most} pictures a day", retry)
        return classifier, pixels

    def _pixels(self, classifier: PromptClassifier, content: bytes) -> Tensor:
        with self._decoding:
            return classifier.pixels(read_picture(content, self.settings, classifier.saved.gray_range))


def _from_another_site(request: Request) -> bool:
    """Tell whether a browser asks for a page from elsewhere: it could not read the answer, but spend the budget."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")  # of browsers that do not say more, and where a page came without TLS
    return origin is not None and origin.partition("://")[2] != request.headers.get("host")
