"""The site has every page, and loads nothing from elsewhere; what pages say of epsilon and other software is true."""

from __future__ import annotations

import importlib.util
import math
import re
from types import ModuleType

import pytest

from pages.blocks import ROOT
from sordino.experiments.config import Experiment
from sordino.privacy.settings import PrivacySettings


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """docs/conf.py, as Sphinx reads it; `make docs` builds with it."""
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_made_by_a_script_and_shown() -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "figures").glob("*.py"))
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    pictures = {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert pictures == set(re.findall(r"[\w-]+\.png", scripts))
    assert pictures == set(re.findall(r"\]\(images/([\w-]+\.png)\)", pages))


def test_the_navigation_has_every_page_once(site: ModuleType) -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    named = re.findall(r" <([\w-]+)>$", site.navigation(index), re.MULTILINE)
    assert sorted([*named, "index"]) == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    headings = re.findall(r"^## (.*)", index, re.MULTILINE)
    assert re.findall(r"^:caption: (.*)", site.navigation(index), re.MULTILINE) == headings


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<script src="https://cdn.example/a.js"></script>', ["https://cdn.example/a.js"]),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', ["//fonts.example/a.css"]),
        ('<img alt="x" srcset="http://img.example/a.png 2x">', ["http://img.example/a.png"]),
        ('<a href="https://example.org">elsewhere</a><img src="_images/a.png"><script src="a.js"></script>', []),
    ],
)
def test_what_a_page_would_load_from_elsewhere_is_found(site: ModuleType, page: str, found: list[str]) -> None:
    assert site.foreign(page) == found


def test_code_in_docstrings_is_marked_and_sections_are_not(site: ModuleType) -> None:
    lines = [
        "Do it.",
        "",
        "    first = 1",
        "    second = 2",
        "",
        "Args:",
        "    first: one.",
        "",
        "Raises:",
        "    X: no.",
    ]
    site.mark_code(None, "function", "x", None, None, lines)
    assert lines[:6] == ["Do it.", "", "::", "", "    first = 1", "    second = 2"]
    assert lines.count("::") == 1


def test_the_page_for_officers_rounds_epsilon_up() -> None:
    """The bound of Kairouz, Oh and Viswanath without delta, in percent, rounded against the run."""
    page = (ROOT / "docs" / "officer.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([\d.]+)[^|]*\| ([\d.]+)% of the time \|$|^\| ([\d.]+) \| ([\d.]+)% \|$", page, re.MULTILINE
    )
    pairs = [(float(a or c), float(b or d)) for a, b, c, d in rows]
    assert [epsilon for epsilon, _ in pairs] == [0, 0.5, 1, 2, 4, 8]
    for epsilon, percent in pairs:
        exact = 100 / (1 + math.exp(-epsilon))
        assert exact <= percent < exact + 0.1


def test_the_names_of_other_packages_are_theirs() -> None:
    """Of docs/coming-from.md: what stands in the left columns for Opacus and Flower exists there."""
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    opacus = pytest.importorskip("opacus")
    engine = opacus.PrivacyEngine
    for name in ("target_epsilon", "target_delta", "max_grad_norm", "epochs"):
        assert f"`{name}" in page
        assert name in engine.make_private_with_epsilon.__code__.co_varnames
    assert engine().secure_mode is False
    strategies = pytest.importorskip("flwr.serverapp.strategy")
    named = re.findall(r"`(Fed\w+|DifferentialPrivacy\w+)`", page)
    assert len(named) >= 6
    assert not [name for name in named if not hasattr(strategies, name)]
    mods, workflows = pytest.importorskip("flwr.clientapp.mod"), pytest.importorskip("flwr.server.workflow")
    assert hasattr(mods, "LocalDpMod")
    assert hasattr(workflows, "SecAggPlusWorkflow")


def test_the_keys_that_correspond_exist() -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    tables = {name: field.annotation for name, field in Experiment.model_fields.items()}
    for table, key in re.findall(r"`(data|encoder|runtime|privacy)\.(\w+)", page):
        known = PrivacySettings if table == "privacy" else tables[table]
        assert key in known.model_fields, f"{table}.{key}"
