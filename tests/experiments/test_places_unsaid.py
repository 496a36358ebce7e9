"""Files for others name data and runs by the last folder's name, and no folder above: it may be a user or a ward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sordino.audit.findings.strength import judge
from sordino.cli.app import invoke
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.privacy.plan import plan
from sordino.experiments.privacy.plan_page import write_page
from sordino.experiments.privacy.statement import statement_of
from sordino.experiments.run import run
from sordino.experiments.tracking import run_name
from sordino.experiments.variants import grid
from sordino.report.statement import as_page, sealed
from sordino.results import dataset_name, without_places
from sordino.serving.server.compared import RunFolder

STATISTICS = ["rounds=2", "privacy.mechanism=statistics", "privacy.noise_multiplier=1.0", "privacy.delta=0.01"]


def test_files_for_others_name_no_folder_above_the_data(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither as the owner wrote them nor as they were resolved: these are names of users and wards."""
    monkeypatch.chdir(tmp_path)
    config_file.write_text(config_file.read_text().replace(f"imagefolder:{tmp_path}/", "imagefolder:"))
    config = load_config(config_file, STATISTICS)
    assert config.data.source == f"imagefolder:{tmp_path}/pictures"
    write_page(plan(config), tmp_path / "plan.html")
    for name in ("first", "second"):
        summary = run(config, tmp_path / "released" / name)
        release = f"privacy.release=released/{name}"
        run(load_config(config_file, ["rounds=2", "privacy.mechanism=statistics", release]), tmp_path / "runs" / name)
    assert summary.dataset == config.data.source, "the owner's own files have it"
    capsys.readouterr()
    for suffix in ("html", "json"):
        words = ["privacy", "statement", "runs/first", "--out", f"statement.{suffix}"]
        assert invoke(words) == 0
    statement = statement_of(tmp_path / "runs" / "first", judge)
    compared = RunFolder(tmp_path / "runs").compared()
    assert {run["dataset"] for run in compared["runs"]} == {"imagefolder:pictures"}
    assert {run["label"] for run in compared["runs"]} == {f"dp-fpl, release\xa0{name}" for name in ("first", "second")}
    files = {path.name: path.read_text() for path in tmp_path.glob("*.[hj]*") if path.suffix in (".html", ".json")}
    assert set(files) == {"plan.html", "statement.html", "statement.json"}
    files |= {"page": as_page(sealed(statement, None)), "runs": json.dumps(compared)}
    for name, text in files.items():
        assert "pictures" in text, name
        assert str(tmp_path) not in text, name


def test_a_tracked_run_is_not_named_after_the_folders_above(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = [tmp_path / ward / "run" for ward in ("ward-7", "ward-8")]
    inside = tmp_path / "here" / "runs" / "a"
    comparison = tmp_path / "comparison"
    compare(grid(load_config(config_file, ["rounds=1"]), ["promptfl"]), 1, comparison)
    (line,) = (file.parent for file in comparison.rglob("summary.json"))
    for folder in (*outside, inside):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert run_name(inside) == "runs/a"
    names = [run_name(folder) for folder in outside]
    assert [name.partition("-")[0] for name in names] == ["run", "run"]
    assert names[0] != names[1], "or one's curves would be added to the other's"
    top, _, below = run_name(line).partition("/")
    assert top.startswith("comparison-")
    assert below == line.relative_to(comparison).as_posix()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("imagefolder:/home/kim/photos/", "imagefolder:photos"),
        ("table:C:\\data\\x.csv", "table:x.csv"),
        ("hf:a/b", "hf:a/b"),
        ("hf:/home/kim/set", "hf:set"),
        ("hf:C:\\Users\\kim\\set", "hf:set"),
    ],
)
def test_a_data_set_is_named_without_its_place(source: str, name: str) -> None:
    assert dataset_name(source) == name


def test_a_text_keeps_what_is_no_place() -> None:
    values = ["/home/kim", "/home/kim/a", "and/or", 4, None]
    assert without_places("release /home/kim/a, /home/kim, and/or 4", values) == "release a, kim, and/or 4"
