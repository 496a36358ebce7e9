"""A real browser for tests: the distribution's Chromium, and pages whose console and network are watched."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

expect.set_options(timeout=60_000)  # milliseconds; what is expected comes when a busy machine gets to it

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]
SIZES = {"wide": (1280, 900), "phone": (360, 780)}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; where there is none the test is skipped, or fails in CI."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"none of {', '.join(BROWSERS)} is here: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


def artifacts(otherwise: Path) -> Path:
    """The folder that screenshots are kept in: $SORDINO_ARTIFACTS, or a temporary one."""
    folder = Path(os.environ.get("SORDINO_ARTIFACTS") or otherwise) / "page"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def watched(
    browser: Browser,
    base: str,
    size: str = "wide",
    scheme: str = "light",
    refused: tuple[int, ...] = (),
    cut_off: int = 0,
) -> Iterator[Page]:
    """Open a page, and check at its end that nothing failed and that no other host was asked.

    Args:
        browser: it.
        base: the server's address.
        size: of the window, see SIZES.
        scheme: light or dark.
        refused: statuses of HTTP that the test provokes; the browser tells each on its console.
        cut_off: requests that the test lets fail.
    """
    width, height = SIZES[size]
    context = browser.new_context(
        base_url=base,
        viewport={"width": width, "height": height},
        color_scheme=scheme,  # type: ignore[arg-type]
        permissions=["clipboard-read", "clipboard-write"],
    )
    page, faults, failed, under_way = context.new_page(), [], [], set()
    left_behind: set[Request] = set()  # by a page that gave way to another, which is no failure

    def console(message: ConsoleMessage) -> None:
        expected = any(f"a status of {status} " in message.text for status in refused) or "ERR_FAILED" in message.text
        if message.type in ("error", "warning") and not expected:
            faults.append(f"{message.type}: {message.text}")

    def request(sent: Request) -> None:
        if sent.is_navigation_request():
            left_behind.update(under_way)
        under_way.add(sent)
        if urlsplit(sent.url).scheme not in ("data", "blob") and not sent.url.startswith(base):
            faults.append(f"another host: {sent.url}")

    page.on("console", console)
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))

    def request_failed(sent: Request) -> None:
        under_way.discard(sent)
        if sent not in left_behind:
            failed.append(f"{sent.url} {sent.failure}")

    page.on("requestfailed", request_failed)
    page.on("requestfinished", lambda sent: under_way.discard(sent))  # a function, which Playwright can mark
    page.on("request", request)
    try:
        yield page
        require_quiet(page, under_way)
    finally:
        context.close()
    assert faults == [], faults
    assert len(failed) == cut_off, failed


def require_quiet(page: Page, under_way: set[Request], seconds: float = 30.0) -> None:
    """Wait until no request is under way: closing a page cuts off what is, and that would look like a failure.

    The browser's own state "networkidle" does not tell: a document reaches it once; what is asked later is not seen.
    """
    ends = time.monotonic() + seconds
    while under_way:
        assert time.monotonic() < ends, [sent.url for sent in under_way]
        page.wait_for_timeout(20)


def require_accessible(page: Page) -> None:
    """Require that axe-core finds nothing against its rules."""
    found = Axe().run(page).response["violations"]
    told = [(rule["id"], node["target"], node["failureSummary"]) for rule in found for node in rule["nodes"]]
    assert told == [], told


def require_no_sideways_scrolling(page: Page) -> None:
    """Require that the page is no wider than the window."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
