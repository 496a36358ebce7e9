"""Draw the web pages of `sordino serve`: the demo's prompt, and the demo's runs, with a Chromium that is installed.

python docs/figures/serve_pages.py docs/images

It runs the demo in full, attacks and publishes one of its private prompts, and serves it, all in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
RUN = "runs/demo/dp-fpl/privacy.epsilon=8.0/seed-0"
COMMANDS = (
    ["demo", "--out", "runs/demo"],
    ["audit", RUN, "--attacks", "canaries", "--canaries", "64"],
    ["publish", RUN, "--client", "0", "--name", "digits"],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write serve-prompt.png and serve-runs.png in")
    out = parser.parse_args().out.resolve()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed; install one")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"SORDINO_CONFIG": f"{folder}/config", "SORDINO_REGISTRY": ""}
        sordino = [sys.executable, "-m", "sordino"]
        for command in COMMANDS:
            subprocess.run([*sordino, *command], cwd=folder, env=environment, check=True)
        serve = [*sordino, "serve", "digits", "--port", "0", "--runs", "runs"]
        with subprocess.Popen(serve, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            address = server.stdout.readline().strip().removeprefix("Serving at ")
            try:
                draw(browser, address, out)
            finally:
                server.terminate()


def draw(browser: str, address: str, out: Path) -> None:
    """Ask the prompt about a sample, and take a picture of both pages."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = started.new_page(viewport={"width": 1200, "height": 1000})
        page.goto(address)
        page.locator("#sample-list button").nth(3).click()
        page.locator("#answer").wait_for()
        page.screenshot(path=out / "serve-prompt.png", full_page=True)
        page.goto(f"{address}/runs")
        page.locator("#rows tr").first.wait_for()
        page.screenshot(path=out / "serve-runs.png", full_page=True)
        started.close()


if __name__ == "__main__":
    main()
