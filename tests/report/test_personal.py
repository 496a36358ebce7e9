"""Personal beside shared prompts, against real comparisons."""

from __future__ import annotations

import statistics

import pytest

from report.conftest import Comparison
from report.test_real_runs import page_of, summaries
from sordino.report.groups import group_runs
from sordino.report.runs import read_run
from sordino.report.sections.personal import prompts_of

TABLE = "Personal and shared prompts by algorithm"
KINDS = {"zero-shot": "shared", "promptfl": "shared", "dp-fpl": "one each", "local": "one each"}


@pytest.mark.parametrize("name", ["one seed", "two seeds"])
def test_each_method_has_its_accuracies_and_the_kind_of_its_prompt(
    name: str, comparisons: dict[str, Comparison]
) -> None:
    comparison = comparisons[name]
    page = page_of(comparison)
    assert page.column("Prompt", TABLE) == KINDS
    marks = {trace["name"]: trace for trace in page.figures["personal"]["data"] if trace["meta"]["role"] == "mark"}
    assert marks.keys() == KINDS.keys()
    for algorithm, mark in marks.items():
        of_runs = [run["accuracy"] for run in summaries(comparison, algorithm)]
        local, neighbor = (statistics.fmean(run[measure] for run in of_runs) for measure in ("local", "neighbor"))
        assert (mark["x"], mark["y"]) == (pytest.approx([neighbor]), pytest.approx([local]))
        assert mark["marker"]["symbol"].endswith("-open") == (KINDS[algorithm] == "shared")
        over = float(page.column("Local over neighbor", TABLE)[algorithm])
        assert over == pytest.approx(100 * (local - neighbor), abs=0.051)


def test_the_sentence_claims_no_difference_of_one_seed(comparisons: dict[str, Comparison]) -> None:
    """DP-FPL is the personal prompt of the comparison, and PromptFL the shared one."""
    for name, comparison in comparisons.items():
        text = page_of(comparison).text.get("Personal or shared prompt", "")
        assert ("too few seeds to claim a difference" in text) == (name != "two seeds")
        if name != "attacked":
            assert "highest local accuracy, dp-fpl, against the shared one, promptfl" in text
    two = comparisons["two seeds"]
    groups = group_runs([read_run(folder) for name in ("promptfl", "dp-fpl") for folder in two.runs(name)])
    assert [prompts_of(group) for group in groups] == ["shared", "personal"]
    change = groups[1].results.difference(groups[0].results, "local")
    assert change is not None
    assert f"(95% interval {change.percent()})" in page_of(two).text["Personal or shared prompt"]
