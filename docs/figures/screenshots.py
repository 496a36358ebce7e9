"""Make the pictures of docs/images anew: `python docs/figures/screenshots.py`, in seven minutes on two cores.

Runs the demo and the commands of docs/tutorial.md in a folder of its own, unless they are there already, and draws
their pages with the Chromium that is installed, through Playwright (`make install`). `--only NAME` draws some alone.
What the commands print is kept beside the runs, in `*.txt`: the pages show it, so copy it there with the pictures.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parents[1]
IMAGES = DOCS / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAWN = 2000  # milliseconds after which a page's figures stand still


@dataclass(frozen=True)
class Shot:
    """A picture of a page.

    Attributes:
        page: an HTML file in the working folder.
        width, height: in pixels.
        heading: the section that it starts with; "": the page's start.
    """

    page: str
    width: int
    height: int
    heading: str = ""


SHOTS = {
    "report.png": Shot("demo/report.html", 1280, 920),
    "rounds.png": Shot("demo/report.html", 1160, 1060, "Accuracy by round"),
    "tutorial-compared.png": Shot("runs/compared/report.html", 1100, 1000),
    "tutorial-private.png": Shot("runs/private/report.html", 1100, 1000),
    "tutorial-statement.png": Shot("statement.html", 1000, 1050),
}


def main() -> None:
    """Make all pictures, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sordino", help="of the runs")
    parser.add_argument("--out", type=Path, default=IMAGES, help="of the pictures")
    parser.add_argument("--only", nargs="+", choices=sorted(SHOTS), metavar="NAME", help=f"of {', '.join(SHOTS)}")
    chosen = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed; install one")
    wanted = {name: SHOTS[name] for name in chosen.only or SHOTS}
    chosen.folder.mkdir(parents=True, exist_ok=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    if any(shot.page.startswith("demo/") for shot in wanted.values()):
        sordino(chosen.folder, ["demo", "--out", "demo"], "demo/report.html")
    if any(not shot.page.startswith("demo/") for shot in wanted.values()):
        tutorial(chosen.folder)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, shot in wanted.items():
            page = chromium.new_page(viewport={"width": shot.width, "height": shot.height}, color_scheme="light")
            draw(page, chosen.folder / shot.page, shot, chosen.out / name)
            page.close()
        chromium.close()


def tutorial(folder: Path) -> None:
    """Run the commands of the tutorial in their order, each if what it makes is not there."""
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (folder / "fabric.toml").write_text(config, encoding="utf-8")
    if not (folder / "fabric").exists():
        subprocess.run([sys.executable, DOCS.parent / "examples" / "fabric.py", "fabric"], cwd=folder, check=True)
    for line in re.findall(r"^sordino (.*)$", text, re.MULTILINE):
        words = shlex.split(line)
        makes = words[words.index("--out") + 1] if "--out" in words else ""
        sordino(folder, words, makes)


def sordino(folder: Path, words: Sequence[str], makes: str) -> None:
    """Run a command in a folder, unless what it makes is there, and keep what it prints."""
    if makes and (folder / makes).exists():
        return
    print("sordino", shlex.join(words), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "sordino", *words],
        cwd=folder,
        env=os.environ | {"COLUMNS": "120"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    name = "-".join(word for word in words[:2] if not word.startswith("-")).replace("/", "-")
    (folder / f"{name}.txt").write_text(done.stdout, encoding="utf-8")


def draw(page: Page, file: Path, shot: Shot, picture: Path) -> None:
    """Write the picture of a page, in few colors, which suffice for text and lines and take a third of the bytes."""
    page.goto(file.resolve().as_uri())
    page.wait_for_timeout(DRAWN)
    if shot.heading:
        page.get_by_role("heading", name=shot.heading, exact=True).evaluate("heading => heading.scrollIntoView()")
    page.screenshot(path=picture, animations="disabled")
    with Image.open(picture) as drawn:
        few = drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(picture, optimize=True)


if __name__ == "__main__":
    main()
