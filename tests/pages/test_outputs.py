"""What pages show as printed is what is printed."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from pages.blocks import ROOT, blocks, commands, shown
from sordino.cli.app import app
from sordino.errors import MissingExtra, require_extra


def test_the_reference_prints_a_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("docs/api.md", "python")
    exec(compile(block.text, "docs/api.md", "exec"), {})
    assert "Train a method" in capsys.readouterr().out


def test_the_noise_of_the_dp_fpl_paper_is_accounted_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    page = "docs/dp-fpl-paper.md"
    names: dict[str, Any] = {}
    for code, printed in zip(blocks(page, "python"), shown(page), strict=True):
        exec(compile(code.text, page, "exec"), names)
        assert " ".join(capsys.readouterr().out.split()) == printed
    # An oracle without grids: all releases are one Gaussian mechanism, whose profile is known (Balle and Wang, 2018).
    for claimed in names["LEVELS"]:
        for sensitivity in (10.0, 20.0, 10.0 / 32):
            shift = math.sqrt(3 * 100) * sensitivity / names["deviation"](claimed)
            found = names["spent"](claimed, sensitivity)
            above, below = (normal_tail(found / shift + sign * shift / 2) for sign in (-1, 1))
            assert above - math.exp(found) * below == pytest.approx(1e-5, rel=1e-3)


def normal_tail(x: float) -> float:
    return math.erfc(x / math.sqrt(2)) / 2


def test_a_missing_extra_is_told_as_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra) as refused:
        require_extra("hub", "data.source = 'hf:somebody/pictures'")
    assert shown("docs/install.md") == [f"sordino: {refused.value}"]


def test_the_overview_shows_the_figures_of_the_results() -> None:
    """The demo takes minutes, and its noise is new each time; its figures are recorded, in one run for both pages."""
    table, verdict = (block.text for block in blocks("docs/overview.md", ""))
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = results.split("## Digits: ten clients with two digits each")[1].split("\n## ")[0]
    for row in table.splitlines()[1:]:
        name, figures = re.match(r"(\S+(?: epsilon=\S+)?)\s+(.*)", row).groups()  # type: ignore[union-attr]
        three = re.findall(r"[\d.]+ ± [\d.]+", figures)
        label = re.sub(
            r"^(\S+?)( epsilon=(\d).0)?$", lambda m: f"`{m[1]}`" + (f", epsilon {m[3]}" if m[3] else ""), name
        )
        assert f"| {label} | {' | '.join(three)} |" in section, row
        if "epsilon" not in name:
            assert re.search(rf"^{name} .*{three[0].split()[0]}", verdict, re.MULTILINE)


def test_a_site_says_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/sites.md, on as many pictures as it has; fingerprints depend on the version."""
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "elephant", "horse"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(40):
            Image.new("RGB", (9, 9), (len(name), number, 99)).save(tmp_path / "photos" / name / f"{number}.png")
    (block,) = blocks("docs/sites.md", "toml")
    (tmp_path / "experiment.toml").write_text(block.text)
    init, check, ask, ledger = commands("docs/sites.md")
    assert CliRunner().invoke(app, init).exit_code == 0
    expected = [re.sub(r"\b[0-9a-f]{12,}(\.\.\.)?", "HEX", text) for text in shown("docs/sites.md")]
    for arguments, code, text in ((check, 0, expected[0]), (ask, 1, expected[1])):
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == code, done.output
        printed = " ".join(done.stdout.split()).replace(str(tmp_path) + "/", "")
        assert re.sub(r"\b[0-9a-f]{12,}(\.\.\.)?", "HEX", printed).endswith(text)  # after what the page shows already
    assert CliRunner().invoke(app, ledger, catch_exceptions=False).exit_code == 0
