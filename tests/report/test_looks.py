"""Pages in a real Chromium: on a phone, wide, dark and on paper, nothing is cut off, hidden or laid over other text."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report.conftest import Comparison, WriteRun
from report.test_clusters import WriteClustered, drawn, opened, singles, write_clustered
from sordino.report import finished_runs, write_report

pytestmark = pytest.mark.slow

__all__ = ["write_clustered"]  # a fixture

PHONE, WIDE, SHEET = 390, 1280, 690  # pixels; the last is A4 between margins of 14 mm
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
LONG = "a-method-of-a-rather-long-name-from-a-file"

# Elements that stick out of the page to the right, other than inside boxes that scroll by themselves.
STICKING_OUT = """() => [...document.querySelectorAll("body *")]
  .filter((it) => !it.closest(".scroll") && !it.closest("pre") && !it.closest(".plot svg, .modebar"))
  .filter((it) => it.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map((it) => `${it.tagName} ${it.id} ${it.className} ${it.getBoundingClientRect().right}`)"""

# Cells of tables whose text is wider than they are.
OVERFULL = """() => [...document.querySelectorAll("th, td")]
  .filter((it) => it.offsetParent && it.scrollWidth > it.clientWidth + 1).map((it) => it.textContent)"""

# Numbers in heat maps that are wider or higher than their cell, and labels of one axis that lie over each other.
CROWDED = """() => [...document.querySelectorAll(".plot")].filter((it) => it.offsetParent).flatMap((plot) => {
  const found = [], box = (it) => it.getBoundingClientRect();
  const map = plot.data.find((trace) => trace.type === "heatmap");
  if (map) {
    const area = box(plot.querySelector(".plot .nsewdrag"));
    const cell = [area.width / map.z[0].length, area.height / map.z.length];
    for (const text of plot.querySelectorAll(".textpoint text, .scatterlayer text")) {
      const { width, height } = box(text);
      if (width > cell[0] || height > cell[1]) found.push(`${plot.id}: ${text.textContent}`);
    }
  }
  for (const axis of ["xtick", "ytick"]) {
    const boxes = [...plot.querySelectorAll(`.${axis} text`)].map((it) => [it.textContent, box(it)]);
    for (const [at, [one, a]] of boxes.entries()) {
      for (const [two, b] of boxes.slice(at + 1)) {
        const apart = a.right < b.left + 1 || b.right < a.left + 1 || a.bottom < b.top + 2 || b.bottom < a.top + 2;
        if (!apart) found.push(`${plot.id} ${axis}: ${one} over ${two}`);
      }
    }
    for (const [text, a] of boxes) {
      const whole = box(plot);
      if (a.left < whole.left - 1 || a.right > whole.right + 1) found.push(`${plot.id} ${axis}: ${text} is cut`);
    }
  }
  return found;
})"""

# Tables and figures that are wider than a sheet.
BROAD = """() => [...document.querySelectorAll("table, .plot")]
  .filter((it) => it.getBoundingClientRect().right > 690.5)
  .map((it) => `${it.tagName} ${it.id} ${it.textContent.slice(0, 40)} ${it.getBoundingClientRect().right}`)"""

# Text of figures that is not dark.
PALE = """() => [...document.querySelectorAll(".plot .main-svg text")]
  .filter((it) => !it.closest(".scatterlayer"))
  .filter((it) => getComputedStyle(it).fill.match(/\\d+/g).slice(0, 3).some((part) => Number(part) > 80))
  .map((it) => `${it.textContent} ${getComputedStyle(it).fill}`)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium that is installed; without one the tests are skipped, or fail where the variable CI is set."""
    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium, or no Playwright, to look at pages with")
        pytest.skip("no Chromium, or no Playwright, to look at pages with")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def pages(
    tmp_path: Path,
    comparisons: dict[str, Comparison],
    audited: Path,
    write_run: WriteRun,
    write_clustered: WriteClustered,
) -> dict[str, Path]:
    """A comparison, an audited run, one that is not private, clusters, and runs with long names of everything."""
    points = drawn(8)
    names = [f"st-mary-hospital-of-the-north, ward {ward}, children and young people" for ward in range(8)]
    labels = {1: [0, 0, 1, 1, 2, 2, 2, 2], 10: [0, 0, 0, 1, 1, 2, 2, 2]}
    clusters = write_clustered(tmp_path / "clusters", labels, {20: opened(points, singles(8))})
    named = write_clustered(tmp_path / "named", labels, {20: opened(points, singles(8))}, names=names)
    for number, rank in enumerate((4, 8)):
        run = write_run(tmp_path / f"long-{number}", LONG, clients=8, names=names, settings={"a_rather_long_key": rank})
        for client, name in zip(run["per_client"], names, strict=True):
            client["name"] = name
        summary = tmp_path / f"long-{number}" / "summary.json"
        summary.write_text(json.dumps(run))
    of = {
        "comparison": finished_runs(comparisons["two seeds"].folder),
        "audited": [audited],
        "open": comparisons["one seed"].runs("promptfl"),
        "clusters": [clusters],
        "named clusters": [named],
        "long names": [tmp_path / "long-0", tmp_path / "long-1"],
    }
    return {name: write_report(runs, tmp_path / f"{name}.html", name) for name, runs in of.items()}


@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "light"), (WIDE, "dark")])
def test_nothing_sticks_out_or_lies_over_other_text(
    browser: Any, pages: dict[str, Path], width: int, scheme: str
) -> None:
    found = {}
    for name, file in pages.items():
        page, said = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme), []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.goto(file.as_uri())
        assert page.evaluate("document.querySelectorAll('.plot .main-svg').length") > 0, name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        found[name] = [flaw for script in (STICKING_OUT, OVERFULL, CROWDED) for flaw in page.evaluate(script)] + said
        page.close()
    assert found == {name: [] for name in pages}


def test_paper_is_white_and_figures_fit_on_it(browser: Any, pages: dict[str, Path]) -> None:
    """Also for a reader with a dark theme; every fold is open, and what scrolls on a screen is whole."""
    found = {}
    for name, file in pages.items():
        page = browser.new_page(viewport={"width": SHEET, "height": 900}, color_scheme="dark")
        page.goto(file.as_uri())
        closed = page.locator("details:not([open])")
        folds = closed.count()
        page.emulate_media(media="print", color_scheme="dark")
        closed.first.wait_for(state="detached")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
        found[name] = page.evaluate(PALE) + page.evaluate(CROWDED)
        if (wide := page.evaluate("document.documentElement.scrollWidth")) > SHEET:
            found[name] += [f"{wide} pixels wide", *page.evaluate(STICKING_OUT), *page.evaluate(BROAD)]
        page.emulate_media(media="screen")
        closed.nth(folds - 1).wait_for(state="attached")
        assert closed.count() == folds
        page.close()
    assert found == {name: [] for name in pages}
