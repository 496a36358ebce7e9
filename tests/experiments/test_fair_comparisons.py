"""What a comparison says about its fairness: steps, examples, ignored settings, and differences to its first line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from sordino.algorithms import METHODS, add_method, promptfl, zero_shot
from sordino.algorithms.base import Schedule
from sordino.algorithms.client_data import ClientData
from sordino.cli.app import app
from sordino.cli.terminal import print_table
from sordino.errors import ConfigError
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.experiments.toml_tables import separated
from sordino.experiments.variants import fairness_notes, grid, planned_steps
from sordino.experiments.yardsticks import effort
from sordino.report import finished_runs
from sordino.runtime.local import LocalRuntime

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(7)), list(range(7, 12)), list(range(12, 23))]  # 7, 5 and 11 examples


@pytest.fixture
def methods() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 3, 5, 6, 11, 20])
def test_examples_are_those_that_batches_hold(
    steps: int, size: int, make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where batches are drawn, over rounds in which not all clients take part."""
    seen, batches = [], ClientData.batches

    def counted(self: ClientData, *arguments: Any) -> Iterator[Any]:
        for batch in batches(self, *arguments):
            seen.append(int(batch.mask.sum()))
            yield batch

    monkeypatch.setattr(ClientData, "batches", counted)
    tables = {"context_length": 2, "local_steps": steps, "batch_size": size}
    runtime = make_runtime("promptfl", ROWS, tables, rounds=4, participation=0.7)
    training = runtime.start()
    assert runtime.schemas  # which are read off a round on stand-ins for examples
    seen.clear()
    for _ in range(3):
        training, _ = runtime.round(training)
    done = effort(runtime, 3)
    assert done.examples_seen * 3 == pytest.approx(sum(seen))
    assert (done.steps_a_round, done.gradient_steps) == (steps, pytest.approx(3 * steps * 2 / 3))


def test_sampled_batches_count_as_expected_and_tell_nothing_drawn(make_runtime: MakeRuntime) -> None:
    private = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "delta": 0.01}
    tables = {"context_length": 2, "local_steps": 2, "batch_size": 4}
    done = effort(make_runtime("promptfl", ROWS, tables, rounds=5, privacy=private, weighting="uniform"), 5)
    assert done.examples_seen == pytest.approx(5 * 2 * 4), "four of each client's examples are expected in each step"
    assert done.gradient_steps == 10


def test_a_release_of_statistics_sees_each_example_once(make_runtime: MakeRuntime) -> None:
    private = {"mechanism": "statistics", "epsilon": 8.0, "delta": 0.01}
    tables = {"context_length": 2, "local_steps": 2, "batch_size": 0}
    done = effort(make_runtime("promptfl", ROWS, tables, rounds=5, privacy=private, weighting="uniform"), 5)
    assert (done.gradient_steps, done.examples_seen) == (10, pytest.approx(23 / 3))
    nothing = effort(make_runtime("zero-shot", ROWS), 0)
    assert (nothing.steps_a_round, nothing.gradient_steps, nothing.examples_seen) == (0, 0, 0)


def test_equal_steps_are_taken_by_all(config_file: Path, tmp_path: Path) -> None:
    """As the runs' own record says, for methods of unequal defaults, one of them in other rounds, one pooled."""
    config = load_config(config_file, ["rounds=2", "settings.promptfl.local_steps=3"])
    names = ["zero-shot", "promptfl", "dp-fpl", "central"]
    plain, equal = grid(config, names), grid(config, names, equal_steps=True)
    assert [int(planned_steps(variant.config)[1]) for variant in plain] == [0, 6, 2, 2]
    rows = compare(equal, 1, tmp_path / "all")
    assert [row.gradient_steps for row in rows] == [0, 6, 6, 6]
    assert plain[0] == equal[0]
    assert not [note for note in fairness_notes(equal) if "a round" in note]
    rounds = grid(config, ["promptfl", "dp-fpl"], {"rounds": [2, 6]}, equal_steps=True)
    assert [planned_steps(variant.config) for variant in rounds] == [(3, 6), (1, 6)] * 2


@pytest.mark.usefixtures("methods")
def test_what_cannot_be_made_equal_is_refused_by_name(config_file: Path) -> None:
    config = load_config(config_file, ["rounds=2", "settings.promptfl.local_steps=3"])
    with pytest.raises(
        ConfigError, match=r"--equal-steps = True: promptfl rounds=4 would need 1.5 local steps a round"
    ):
        grid(config, ["promptfl"], {"rounds": [2, 4]}, equal_steps=True)
    with pytest.raises(ConfigError, match="makes dp-fpl local_steps=1 and dp-fpl local_steps=2 the same"):
        grid(config, ["dp-fpl"], {"settings.dp-fpl.local_steps": [1, 2]}, equal_steps=True)
    given = dict(vars(promptfl))
    add_method("fixed", SimpleNamespace(**given | {"schedule": lambda settings: Schedule(5, None)}))
    with pytest.raises(ConfigError, match="fixed takes other steps than its local_steps say"):
        grid(config, ["promptfl", "fixed"], equal_steps=True)
    bare = SimpleNamespace(**given | {"Settings": zero_shot.Settings, "schedule": lambda settings: Schedule(5, None)})
    add_method("bare", bare)
    with pytest.raises(ConfigError, match="bare takes 5 gradient steps a round and has no setting local_steps"):
        grid(config, ["promptfl", "bare"], equal_steps=True)


@pytest.mark.parametrize(
    ("algorithms", "vary", "seeds", "told"),
    [
        (["local"], {"seed": [1, 2]}, 2, "has the run of 'local seed=1' with seed 2 again; name each once"),
        (["local", "zero-shot"], {"algorithm": ["local", "zero-shot"]}, 1, "again; name each once"),
        (
            ["local"],
            {"settings.initial_context": ["a b", "a_b"]},
            1,
            "folder of .*compare the two apart",
        ),
        ([], {}, 1, "name one method at least"),
    ],
)
def test_lines_that_share_a_run_or_its_folder_are_refused_before_any_is_trained(
    algorithms: list[str], vary: dict[str, Any], seeds: int, told: str, config_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        compare(grid(load_config(config_file), algorithms, vary), seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_is_named_twice_is_one_line(config_file: Path) -> None:
    assert len(grid(load_config(config_file), ["local", "zero-shot", "local"])) == 2


def test_a_budget_that_no_mechanism_keeps_makes_no_line_of_its_own(config_file: Path) -> None:
    """Two lines of different epsilon, trained without noise, would look private."""
    config = load_config(config_file, ["privacy.mechanism=none"])
    (line,) = grid(config, ["local"], {"privacy.epsilon": [8.0, 2.0]})
    assert line.label == "local"
    both = grid(config, ["local"], {"privacy.mechanism": ["none", "dp-sgd"], "privacy.epsilon": [8.0, 2.0]})
    assert [(each.config.privacy.mechanism, each.config.privacy.epsilon) for each in both][1:] == [
        ("dp-sgd", 8.0),
        ("dp-sgd", 2.0),
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("inf,8,2", [math.inf, 8, 2]),
        ("photo, art_painting", ["photo", "art_painting"]),
        ('["a","b"],["c", "d"]', [["a", "b"], ["c", "d"]]),
        ('{name="sgd", learning_rate=0.1},x', [{"name": "sgd", "learning_rate": 0.1}, "x"]),
        ('"a, photo",a', ["a, photo", "a"]),
        ("[1,2", ["[1", 2]),
    ],
)
def test_varied_values_may_be_lists_and_tables(text: str, values: list[Any]) -> None:
    assert [value for _, value in separated(text)] == values


def test_steps_and_ignored_settings_are_told_in_a_line_each(config_file: Path) -> None:
    config = load_config(config_file, ["settings.rank=2", "settings.promptfl.local_steps=4"])
    assert fairness_notes(grid(config, ["promptfl", "dp-fpl", "local"])) == [
        "promptfl takes 4 local steps a round, dp-fpl and local 1; compare --equal-steps gives all the same number",
        "settings.rank: ignored by promptfl and local",
    ]
    varied = grid(load_config(config_file), ["promptfl", "dp-fpl"], {"settings.rank": [1, 2]})
    assert fairness_notes(varied) == ["settings.rank: ignored by promptfl"]
    assert fairness_notes(grid(load_config(config_file), ["dp-fpl"])) == []


def test_a_comparison_writes_what_it_is_held_against(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CSV against summaries, the printed lines against both."""
    names = ["promptfl", "zero-shot", "dp-fpl"]
    config = load_config(config_file, ["rounds=2", "settings.promptfl.local_steps=4", "settings.rank=2"])
    rows = compare(grid(config, names), 2, tmp_path / "all")
    content = json.loads((tmp_path / "all" / "comparison.json").read_text())
    runs = {name: [one for one in content["runs"] if one["algorithm"] == name] for name in names}
    lines = list(csv.DictReader((tmp_path / "all" / "comparison.csv").read_text().splitlines()))
    zero = runs["zero-shot"]
    for line in lines:
        of_line = runs[line["algorithm"]]
        for measure in ("local", "neighbor", "overall"):
            given = sum(one["accuracy"][measure] for one in zero) / 2
            assert float(line[f"{measure}_hand_written"]) == pytest.approx(given)
            if line["algorithm"] != "zero-shot":
                before = sum(one["before"][measure] for one in of_line) / 2
                assert float(line[f"{measure}_before"]) == pytest.approx(before)
        assert line["novel_hand_written"] == line["domain_before"] == ""
        assert line["compared_by"] == "local"
    local = {name: [one["accuracy"]["local"] for one in runs[name]] for name in names}
    for name in ("zero-shot", "dp-fpl"):
        (line,) = [line for line in lines if line["algorithm"] == name]
        expected = ttest_rel(local[name], local["promptfl"]).confidence_interval(0.95)
        assert float(line["difference_to_first_low"]) == pytest.approx(max(-1, expected.low), nan_ok=True)
        assert float(line["difference_to_first_high"]) == pytest.approx(min(1, expected.high), nan_ok=True)
    assert lines[0]["difference_to_first_mean"] == lines[1]["gain_mean"] == lines[1]["best_mean"] == ""
    assert [float(line["gradient_steps"]) for line in lines] == [8, 0, 2]
    assert [float(line["examples_seen"]) for line in lines] == [16, 0, 4]
    assert content["notes"] == fairness_notes(grid(config, names))
    assert len(content["notes"]) == 2

    monkeypatch.setenv("COLUMNS", "200")
    print_table(rows)
    printed = capsys.readouterr().out
    for row, verdict in zip(rows, content["verdicts"], strict=True):
        assert (verdict["line"], verdict["verdict"]) == (row.label, row.verdict)
        assert f"{row.label}: {row.verdict}" in printed or row.algorithm == "zero-shot"
    assert "promptfl takes 4 local steps a round, dp-fpl 1" in printed
    assert "settings.rank: ignored by promptfl and zero-shot" in printed
    assert "No best round" not in printed


def test_a_report_written_anew_keeps_the_first_line(config_file: Path, tmp_path: Path) -> None:
    """By name `dp-fpl` would be before `promptfl`, to which differences are taken."""
    out = tmp_path / "all"
    compare(grid(load_config(config_file, ["rounds=1"]), ["promptfl", "dp-fpl"]), 2, out)
    assert [folder.relative_to(out).parts[0] for folder in finished_runs(out)] == ["promptfl"] * 2 + ["dp-fpl"] * 2
    before = (out / "report.html").read_text().replace("Sordino: comparison", "Sordino: all")
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    assert (out / "report.html").read_text() == before
    (out / "comparison.json").write_text("{}")
    assert [folder.relative_to(out).parts[0] for folder in finished_runs(out)] == ["dp-fpl"] * 2 + ["promptfl"] * 2


def test_the_terminal_of_one_run_says_whether_it_was_worth_it(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sordino.experiments.compare import row_of

    monkeypatch.setenv("COLUMNS", "200")
    private = ["privacy.mechanism=dp-sgd", "privacy.epsilon=8.0", "privacy.delta=0.01", "rounds=2"]
    print_table([row_of([run(load_config(config_file, private), tmp_path / "run")])])
    printed = capsys.readouterr().out
    assert "No best round is offered for runs with a privacy mechanism" in printed
    assert "than the hand-written prompt: " in printed
    head = next(line for line in printed.splitlines() if line.startswith("local accuracy"))
    assert head.split() == ["local", "accuracy", "hand-written", "before", "last", "steps", "examples"]
