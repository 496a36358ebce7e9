"""Epsilon by round, against the ledgers of real private runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from report.conftest import Comparison
from report.test_report import page_of
from sordino.errors import RunError
from sordino.privacy import accounting
from sordino.privacy.ledger import OBSERVERS, Ledger
from sordino.report.groups import group_runs
from sordino.report.runs import read_run
from sordino.report.sections.budget import budget_figure, spending

TABLE = "Privacy budget by algorithm"


@pytest.fixture
def private(comparisons: dict[str, Comparison]) -> Path:
    """A real run with noise in every round."""
    (folder,) = comparisons["one seed"].runs("dp-fpl")
    return folder


def ledger_of(folder: Path) -> Ledger:
    return Ledger.from_json((folder / "ledger.json").read_text())


def worst(ledger: Ledger) -> float:
    return max(accounting.spent(ledger, observer, "example").epsilon for observer in OBSERVERS)


def test_it_never_falls_and_ends_at_the_ledger(private: Path) -> None:
    of = spending(read_run(private))
    assert of is not None
    assert of.points[0] == (0, 0.0)
    assert all(early[0] < late[0] and early[1] <= late[1] for early, late in pairwise(of.points))
    assert of.points[-1][0] == read_run(private).summary.rounds
    assert of.spent == pytest.approx(worst(ledger_of(private)), rel=1e-12)
    assert of.asked == 8.0
    assert of.left == pytest.approx(8.0 - of.spent)
    assert not of.once
    assert not of.spread


def test_each_point_bounds_what_the_rounds_so_far_released(private: Path) -> None:
    """From above, and by no more than the coarser grid adds: the exact epsilon of that many releases."""
    of, ledger = spending(read_run(private)), ledger_of(private)
    assert of is not None
    rounds = read_run(private).summary.rounds
    for number, epsilon in of.points[1:]:
        shares = [replace(release, steps=release.steps * number // rounds) for release in ledger.releases]
        assert all(release.steps * number % rounds == 0 for release in ledger.releases), "the same in every round"
        exact = worst(replace(ledger, releases=tuple(shares)))
        assert exact <= epsilon * (1 + 1e-9)
        assert epsilon <= exact * 1.01


def test_clients_that_sit_out_rounds_are_said_to_be_spread(private: Path, tmp_path: Path) -> None:
    run = read_run(private)
    sitting = replace(run, config=run.config | {"runtime": run.config["runtime"] | {"participation": 0.5}})
    of = spending(sitting)
    assert of is not None
    assert of.spread


def test_noise_that_is_released_once_is_said_to_be(released: Path, tmp_path: Path) -> None:
    of = spending(read_run(released))
    assert of is not None
    assert of.once
    assert [number for number, _ in of.points] == [0]
    assert of.spent == pytest.approx(worst(ledger_of(released)), rel=1e-12)
    page = page_of(tmp_path, released)
    assert page.column("Released with noise", TABLE) == {"dp-fpl": "once, before the first round"}
    assert "cost nothing" in page.text["Epsilon by round"]
    assert "budget-figure" not in page.figures, "there is no curve to draw"


def test_the_page_shows_budget_spent_and_left(private: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, private)
    run = read_run(private)
    of = spending(run)
    assert of is not None
    assert of.left is not None
    assert page.column("Budget, ε", TABLE) == {"dp-fpl": "8"}
    spent = float(page.column("Spent, ε", TABLE)["dp-fpl"])
    assert of.spent <= spent <= of.spent * 1.01, "rounded up"
    (line,) = page.figures["budget-figure"]["data"]
    assert list(zip(line["x"], line["y"], strict=True)) == list(of.points)
    (budget,) = page.figures["budget-figure"]["layout"]["shapes"]
    assert budget["y0"] == budget["y1"] == 8.0


def test_more_than_the_budget_is_shown_as_such(private: Path, tmp_path: Path) -> None:
    shutil.copytree(private, tmp_path / "run")
    config = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(config.replace("epsilon = 8.0", "epsilon = 1.0"))
    assert "over the budget" in page_of(tmp_path, tmp_path / "run").column("Left, ε", TABLE)["dp-fpl"]


def test_runs_without_an_epsilon_have_no_curve(comparisons: dict[str, Comparison], tmp_path: Path) -> None:
    (folder,) = comparisons["one seed"].runs("promptfl")
    assert spending(read_run(folder)) is None
    assert "Epsilon by round" not in page_of(tmp_path, folder).text
    assert budget_figure([])["data"] == []
    assert group_runs([read_run(folder)])[0].results.claim.epsilon is None


@pytest.mark.parametrize("change", ["another ledger", "no ledger of any version", None])
def test_a_ledger_that_is_not_the_summary_s_is_refused(private: Path, tmp_path: Path, change: str | None) -> None:
    shutil.copytree(private, tmp_path / "run")
    file = tmp_path / "run" / "ledger.json"
    content: dict[str, Any] = json.loads(file.read_text())
    if change is None:
        file.unlink()
        assert spending(read_run(tmp_path / "run")) is None, "as of an earlier version"
        return
    if change == "another ledger":
        content["releases"][0]["steps"] -= 1
    file.write_text(json.dumps(content if change == "another ledger" else []))
    with pytest.raises(RunError, match=r"ledger\.json is malformed .*leave this directory out") as caught:
        page_of(tmp_path, tmp_path / "run")
    assert "\n" not in str(caught.value)
