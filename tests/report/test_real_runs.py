"""Real comparisons: the terminal's table, the page and the CSV show the same numbers, those of the summaries."""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from report.conftest import Comparison
from report.test_report import Page, metrics
from sordino.cli.terminal import print_table
from sordino.results import MEASURES

COLUMNS = {  # the terminal's heading, and the page's
    "local": "Local, %",
    "neighbor": "Neighbor, %",
    "overall": "Overall, %",
    "novel": "Novel, %",
    "domain": "Domain, %",
    "backdoor": "Backdoor, %",
    "sent up": "Up",
    "down": "Down",
    "seconds": "Seconds",
}
NAMES = ("one seed", "two seeds", "attacked")


def page_of(comparison: Comparison) -> Page:
    return Page((comparison.folder / "report.html").read_text(encoding="utf-8"))


def terminal_table(
    comparison: Comparison, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, str]]:
    """The printed cells by heading, a dictionary a row; headings and numbers end at the same column."""
    monkeypatch.setenv("COLUMNS", "200")
    print_table(comparison.rows)
    head, *lines = capsys.readouterr().out.splitlines()
    headings = [heading for heading in COLUMNS if re.search(rf"\b{heading}\b", head)]
    ends = [head.index(heading) + len(heading) for heading in headings]
    starts = [max(len(row.algorithm) for row in comparison.rows), *ends]
    table = []
    for line in lines[: len(comparison.rows)]:
        cells = {heading: line[start:end].strip() for heading, start, end in zip(headings, starts, ends, strict=False)}
        table.append({"algorithm": line.split()[0], "private": line[ends[-1] :].strip()} | cells)
    return table


def summaries(comparison: Comparison, algorithm: str) -> list[dict[str, Any]]:
    return [json.loads((folder / "summary.json").read_bytes()) for folder in comparison.runs(algorithm)]


@pytest.mark.parametrize("name", NAMES)
def test_terminal_and_page_show_the_same_numbers(
    name: str,
    comparisons: dict[str, Comparison],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Means, deviations, bytes, seconds and privacy, of every method; each simulated seed has a nonce of its own."""
    comparison = comparisons[name]
    table = terminal_table(comparison, capsys, monkeypatch)
    head, *rows = page_of(comparison).tables["Results by algorithm"]
    assert len(rows) == len(table) == len(comparison.rows)
    for row, cells in zip(table, rows, strict=True):
        assert cells[0].split(" (")[0] == row["algorithm"]
        shown = {heading: column for heading, column in COLUMNS.items() if heading in row}
        assert {"local", "neighbor", "overall", "novel", "domain", "seconds"} <= shown.keys()
        for heading, column in shown.items():
            assert row[heading] == cells[head.index(column)], (row["algorithm"], heading)
        privacy = cells[head.index("Privacy")]
        if row["private"] == "no":
            assert privacy == "not private"
        elif row["private"] == "yes":
            assert privacy.startswith("private: ε = 0")
        else:
            epsilon = row["private"].split("ε = ")[1]
            assert f"ε = {epsilon}," in privacy
            assert ("simulated" in row["private"]) == ("simulated" in privacy)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_what_the_summaries_hold(name: str, comparisons: dict[str, Comparison]) -> None:
    """Recomputed without the package: over seeds where there are two, else over the clients that do not attack."""
    comparison = comparisons[name]
    head, *rows = page_of(comparison).tables["Results by algorithm"]
    varied = set()
    for row, cells in zip(comparison.rows, rows, strict=True):
        of_runs = summaries(comparison, row.algorithm)
        honest = of_runs[0]["per_client"][1 if name == "attacked" else 0 :]
        assert len(of_runs) == (2 if name == "two seeds" else 1)
        for measure in MEASURES:
            means = [run["accuracy"][measure] for run in of_runs]
            values = means if len(means) > 1 else [client[measure] for client in honest]
            values = [value for value in values if value is not None]
            text = f"{100 * statistics.fmean(means):.1f} ± {100 * statistics.stdev(values):.1f}"
            assert cells[head.index(COLUMNS[measure])] == text, (row.algorithm, measure)
            varied |= {measure} if statistics.stdev(values) > 0 else set()
        seconds = statistics.fmean(run["seconds"]["train"] for run in of_runs)
        assert cells[head.index("Seconds")] == f"{seconds:,.1f}"
    assert "local" in varied, "else it would show nothing"


def test_the_csv_holds_the_same_numbers(comparisons: dict[str, Comparison]) -> None:
    for comparison in comparisons.values():
        lines = list(csv.DictReader((comparison.folder / "comparison.csv").read_text().splitlines()))
        for row, line in zip(comparison.rows, lines, strict=True):
            for measure in MEASURES:
                spread = row.accuracy[measure]
                assert spread is not None
                assert (float(line[f"{measure}_mean"]), float(line[f"{measure}_spread"])) == spread
            assert float(line["train_seconds"]) == row.seconds
            assert float(line["upload_bytes"]) == row.upload_bytes
        assert len(lines) == len(comparison.rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_was_gained_as_the_terminal_does(name: str, comparisons: dict[str, Comparison]) -> None:
    """The rows that the terminal prints, and their verdicts; the best round only where no mechanism is on."""
    comparison = comparisons[name]
    page = page_of(comparison)
    head, *lines = page.tables["What was gained by algorithm"]
    assert [line[0].split(" (")[0] for line in lines] == [row.algorithm for row in comparison.rows]

    def shown(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.1f}"

    for row, line in zip(comparison.rows, lines, strict=True):
        cells = dict(zip(head, line, strict=True))
        runs = summaries(comparison, row.algorithm)
        assert row.measure == "local"
        given = statistics.fmean(run["hand_written"]["accuracy"]["local"] for run in runs)
        assert cells["Hand-written, %"] == shown(given) == shown(row.hand_written["local"])
        assert cells["Before, %"] == shown(row.before["local"])
        assert cells["Last, %"] == shown(statistics.fmean(run["accuracy"]["local"] for run in runs))
        offered = row.algorithm != "zero-shot" and row.epsilon is None
        assert cells["Best (round), %"] == (str(row.best) if offered else "n/a")
        assert cells["Steps"] == str(round(row.gradient_steps or 0))
        assert cells["Examples"] == str(round(row.examples_seen or 0))
        if row.algorithm == "zero-shot":
            assert (cells["Gain (95%)"], row.verdict) == ("n/a", None)
        else:
            assert row.gain is not None
            # The mean of differences: the difference of means may fall on the other side of a half.
            each = [run["accuracy"]["local"] - run["hand_written"]["accuracy"]["local"] for run in runs]
            gained = shown(statistics.fmean(each))
            assert cells["Gain (95%)"] == f"{gained} ({row.gain.percent()})".replace("-0.0", "0.0")
            assert f": {row.verdict}." in page.text["Was it worth it?"]
        if row is comparison.rows[0]:
            assert cells["To the first row (95%)"] == "n/a"
        elif name == "two seeds":
            assert row.difference is not None
            assert cells["To the first row (95%)"].endswith(f"({row.difference.percent()})")
    assert ("No best round is offered" in page.text["Was it worth it?"]) == (name != "attacked")


def test_a_page_of_earlier_runs_has_no_such_section(comparisons: dict[str, Comparison], tmp_path: Path) -> None:
    from sordino.report import write_report

    (run, *_) = comparisons["one seed"].runs("promptfl")
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "summary.json").read_bytes())
    for key in ("before", "hand_written", "best", "effort"):
        del content[key]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(content))
    page = Page(write_report([tmp_path / "run"], tmp_path / "page.html", "Earlier").read_text(encoding="utf-8"))
    assert "Was it worth it?" not in page.text
    assert page.column("Local, %")


def test_curves_end_at_the_results(comparisons: dict[str, Comparison]) -> None:
    """A line of the page is the mean over seeds of `metrics.jsonl`, and its last point stands in the table."""
    comparison = comparisons["two seeds"]
    page = page_of(comparison)
    for measure in MEASURES:
        for label, line in page.lines(f"round-{measure}").items():
            algorithm = label.split(" (")[0]
            recorded = [[entry for entry in metrics(run) if entry["accuracy"]] for run in comparison.runs(algorithm)]
            means = [
                statistics.fmean(entry["accuracy"][measure] for entry in entries)
                for entries in zip(*recorded, strict=True)
            ]
            assert line["y"][: len(means)] == pytest.approx(means)
            shown = page.column(COLUMNS[measure])[label]
            assert shown.split(" ± ")[0] == f"{100 * line['y'][-1]:.1f}"


def test_a_report_written_anew_is_the_same(comparisons: dict[str, Comparison], tmp_path: Path) -> None:
    from sordino.report import write_report

    comparison = comparisons["two seeds"]
    folders = [folder for row in comparison.rows for folder in comparison.runs(row.algorithm)]
    write_report(folders, tmp_path / "report.html", "Sordino: comparison")
    assert (tmp_path / "report.html").read_bytes() == (comparison.folder / "report.html").read_bytes()
