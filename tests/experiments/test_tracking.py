"""`[tracking]`: TensorBoard and MLflow, the real ones, hold the numbers of metrics.jsonl."""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from sordino.algorithms import promptfl
from sordino.errors import ConfigError, MissingExtra
from sordino.experiments import tracking
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.experiments.run_folder import Metrics
from sordino.experiments.tracking import TrackingSettings, numbers, tracked

Curves = dict[str, dict[int, float]]  # by name, the value of each round


def expected(out: Path) -> Curves:
    curves: Curves = defaultdict(dict)
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        for name, value in numbers(json.loads(line)).items():
            curves[name][json.loads(line)["round"]] = value
    return curves


def of_tensorboard(where: Path) -> dict[str, Curves]:
    """By run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for folder in {path.parent for path in where.rglob("events.out.tfevents.*")}:
        events = accumulator.EventAccumulator(str(folder))
        events.Reload()
        curves = {}
        for tag in events.Tags()["scalars"]:
            steps = [(event.step, event.value) for event in events.Scalars(tag)]
            assert len(dict(steps)) == len(steps)  # no round twice
            curves[tag.replace("/", ".")] = dict(steps)
        found[folder.relative_to(where).as_posix()] = curves
    return found


def of_mlflow(where: Path) -> dict[str, list[tuple[str, Curves]]]:
    """By name, the status and curves of each run."""
    client = pytest.importorskip("mlflow").MlflowClient(tracking_uri=where.as_uri())
    found = defaultdict(list)
    experiment = client.get_experiment_by_name("sordino").experiment_id
    for each in client.search_runs([experiment]):
        history = {name: client.get_metric_history(each.info.run_id, name) for name in each.data.metrics}
        curves = {name: {metric.step: metric.value for metric in metrics} for name, metrics in history.items()}
        found[each.info.run_name].append((each.info.status, curves))
    return found


def same(found: Curves, out: Path) -> bool:
    wanted = expected(out)
    assert len(wanted["seconds"]) > 2
    return found.keys() == wanted.keys() and all(found[name] == pytest.approx(wanted[name]) for name in wanted)


def test_only_numbers_are_sent_by_dotted_name() -> None:
    line = {
        "round": 3,
        "loss": None,
        "participants": 2,
        "accuracy": {"local": 0.5, "novel": None},
        "clusters": [0, 1],
        "flag": True,
        "protocol": {"step": 0.25, "refused": []},
    }
    assert numbers(line) == {"participants": 2.0, "accuracy.local": 0.5, "protocol.step": 0.25}


def test_nothing_is_sent_unasked(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_file, ["rounds=1"])
    monkeypatch.setattr(tracking, "importlib", None)
    with tracked(config.tracking, tmp_path / "run", Metrics(tmp_path / "metrics.jsonl", 0)):
        pass
    assert config.tracking is None


@pytest.mark.parametrize("to", ["tensorboard", "mlflow"])
def test_an_interrupted_run_that_went_on_is_tracked_whole(
    to: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(to, reason=f"{to} is not installed: pip install 'sordino[tracking]'")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "a"
    config = load_config(config_file, [f"tracking.to={to}", "tracking.where=tracked"])
    rounds = 0
    trained = promptfl.client_round

    def dies_in_round_4(*arguments: Any) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds == 4:
            raise KeyboardInterrupt
        return trained(*arguments)

    config = config.model_copy(update={"algorithm": "promptfl"})
    with monkeypatch.context() as patch:
        patch.setattr(promptfl, "client_round", dies_in_round_4)
        with pytest.raises(KeyboardInterrupt):
            run(config, out)
    run(config, out, resume=True)
    if to == "tensorboard":
        assert list(of_tensorboard(tmp_path / "tracked")) == ["runs/a"]
        assert same(of_tensorboard(tmp_path / "tracked")["runs/a"], out)
    else:
        found = dict(of_mlflow(tmp_path / "tracked")["runs/a"])
        assert set(found) == {"KILLED", "FINISHED"}
        assert same(found["FINISHED"], out)


def test_where_metrics_go_may_change_between_a_run_and_its_resumption(config_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    summary = run(load_config(config_file, ["rounds=1"]), tmp_path / "run")
    options = ["rounds=1", "tracking.to=tensorboard", f"tracking.where={tmp_path}/tracked"]
    assert run(load_config(config_file, options), tmp_path / "run", resume=True) == summary


@pytest.mark.parametrize("to", ["tensorboard", "mlflow"])
def test_a_missing_library_is_told_with_its_extra(
    to: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, to, None)
    config = load_config(config_file, [f"tracking.to={to}", "tracking.where=tracked"])
    told = rf"^tracking.to = '{to}' needs {to}, which is not installed: pip install 'sordino\[tracking\]'$"
    with pytest.raises(MissingExtra, match=told):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # before pictures are encoded


@pytest.mark.parametrize("to", ["tensorboard", "mlflow"])
def test_a_place_that_cannot_be_written_ends_a_run_before_it_trains(to: str, config_file: Path, tmp_path: Path) -> None:
    pytest.importorskip(to)
    (tmp_path / "file").write_text("")
    config = load_config(config_file, [f"tracking.to={to}", f"tracking.where={tmp_path}/file"])
    with pytest.raises(ConfigError, match=f"^tracking.where = '.*file': {to} cannot write there: .+$"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_tracker_that_fails_later_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, and gets nothing any more."""
    sent = []

    class Lost:
        def send(self, line: Any) -> None:
            sent.append(line["round"])
            if line["round"] == 2:
                raise ConnectionError("the server\nis gone")

        def close(self, finished: bool) -> None:
            raise ConnectionError("gone")

    monkeypatch.setattr(tracking, "_mlflow", lambda *_: Lost())
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    with caplog.at_level(logging.WARNING), tracked(TrackingSettings(to="mlflow", where="x"), tmp_path, metrics):
        for number in range(1, 5):
            metrics.add({"round": number})
    assert sent == [1, 2]
    assert len(metrics.lines) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "mlflow gets nothing any more (the server is gone); metrics.jsonl has all metrics",
        "mlflow could not be closed: gone",
    ]
