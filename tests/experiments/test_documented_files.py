"""docs/runs.md names every file of a run directory and every column, no more, and its lines of pandas work."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import sordino
from private_tuning.small_task import write_private_config
from sordino.algorithms.variation import variation
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.mpc.dealing.costs import Costs
from sordino.mpc.tower.sentences import in_the_clear
from sordino.private_tuning.open_task import open_task
from sordino.private_tuning.settings import load_private_config
from sordino.private_tuning.tuning import _figures, tower_of, tune_private

PAGE = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
pandas = pytest.importorskip("pandas")


@dataclass(frozen=True)
class Row:
    """A line of a table: the names in its first cell, its text, and its last cell's code."""

    names: tuple[str, ...]
    text: str
    code: str


def section(heading: str) -> str:
    """The page's text under a heading; "" is the text before the first."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))[heading]


def table(heading: str, title: str) -> list[Row]:
    """The table of a section whose first column has a title."""
    lines = section(heading).split(f"| {title} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [Row(tuple(re.findall(r"`([^`]+)`", row[0])), row[1], row[-1].strip(" |`")) for row in cells]


def inside(row: Row) -> set[str]:
    """The keys of the object that a line describes."""
    return set(re.findall(r"`([^`]+)`", row.text))


def pattern(name: str) -> str:
    """What a documented name stands for: its digits are any, and NAME is any name."""
    return re.sub(r"\d+", r"\\d+", re.escape(name)).replace("NAME", r"[\w-]+")


def evaluate(code: str, documented: str, folder: Path) -> Any:
    """The value of a line of the page, of which `runs/a` or such is a folder."""
    known = {"pandas": pandas, "json": json, "tomllib": tomllib, "Path": Path, "load_file": load_file}
    return eval(code.replace(documented, str(folder)), known)


@pytest.fixture
def runs(config_file: Path, tmp_path: Path) -> dict[str, Path]:
    """Run directories that together hold every kind of file."""
    file = tmp_path / "mine.py"
    file.write_text(variation("mine", "promptfl"), encoding="utf-8")
    four = ["partition.scheme=classes", "partition.clients=4", "partition.classes_per_client=2"]
    statistics = ["privacy.mechanism=statistics", "privacy.noise_multiplier=1.0", "privacy.delta=0.01"]
    overrides = {
        "personal": ["rounds=4"],
        "file": ["rounds=4", f"methods.mine={file}", "algorithm=mine"],
        "clusters": ["rounds=1", "algorithm=secfpp", "settings.cluster_every=1", *four],
        "statistics": ["algorithm=head", *statistics],
    }
    for name, chosen in overrides.items():
        run(load_config(config_file, chosen), tmp_path / "runs" / name)
    sordino.audit(tmp_path / "runs" / "personal", attacks=["inversion"])
    return {name: tmp_path / "runs" / name for name in overrides}


def test_every_file_is_documented_and_read_by_its_line(runs: dict[str, Path]) -> None:
    rows = table("", "file")
    read: set[str] = set()
    for folder in runs.values():
        for path in sorted(folder.rglob("*")):
            if path.is_dir():
                continue
            name = path.relative_to(folder).as_posix()
            (row,) = (row for row in rows if re.fullmatch(pattern(row.names[0]), name))
            read.add(row.names[0])
            if row.code and path.stat().st_size:
                code = row.code.replace(row.names[0], name)
                assert len(evaluate(code, "runs/a", folder).index) or name == "ledger.json", code
    assert read == {row.names[0] for row in rows}


def test_every_key_of_the_metrics_is_documented(runs: dict[str, Path]) -> None:
    rows = table("Metrics by round", "key")
    documented = {name: row for row in rows for name in row.names}
    lines = [
        json.loads(line)
        for folder in runs.values()
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {key for line in lines for key in line} == set(documented)
    assert lines[0]["round"] == 0
    for key in ("accuracy", "protocol"):
        (keys,) = {tuple(sorted(line[key])) for line in lines if line.get(key)}
        assert set(keys) == inside(documented[key])
    (example,) = re.findall(r"```python\n(.*?)```", section("Metrics by round"), re.DOTALL)
    without_plot = example.replace("accuracies.plot(", "chosen = dict(")
    known: dict[str, Any] = {"pandas": pandas}
    exec(without_plot.replace("runs/a", str(runs["personal"])), known)
    assert {known["chosen"]["x"], *known["chosen"]["y"]} <= set(known["accuracies"].columns)
    assert len(known["accuracies"]) == 3  # rounds 0, 2 and 4 of 4


def test_every_column_of_a_comparison_is_documented(config_file: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    sordino.compare(load_config(config_file, ["rounds=1"]), ["zero-shot", "promptfl"], both, seeds=1)
    with (both / "comparison.csv").open(encoding="utf-8") as file:
        columns = next(csv.reader(file))
    assert [name for row in table("Comparisons", "column") for name in row.names] == columns
    files = table("Comparisons", "file")
    assert {path.name for path in both.iterdir() if path.is_file()} == {row.names[0] for row in files} | {"report.html"}
    for row in files:
        assert len(evaluate(row.code, "runs/both", both)) == 2


def test_every_key_of_private_tunings_metrics_is_documented(tmp_path: Path) -> None:
    config = load_private_config(write_private_config(tmp_path, generations=1))
    out = tmp_path / "run"
    tune_private(config, out, open_task(config), in_the_clear(tower_of(config)), True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    written = {key for line in lines for key in line} | set(_figures(Costs().total))
    assert {name for row in table("Private tuning", "key") for name in row.names} == written
    named = set(re.findall(r"`([\w./]+\.\w+)`", section("Private tuning")))
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == named
