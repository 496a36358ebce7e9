"""What a user types, and what comes back: standard output, standard error, exit code."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sordino.cli import app as cli
from sordino.errors import SordinoError
from sordino.experiments.doctor import examine

CONFIG = """
rounds = 2
device = "cpu"
[data]
source = "{source}"
[partition]
scheme = "iid"
clients = 2
[encoder]
name = "clip"
checkpoint = "{checkpoint}"
"""


@pytest.fixture
def config(tmp_path: Path, clip_folder: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(source="digits", checkpoint=clip_folder))
    return file


def sordino(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sordino", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_run_prints_a_table_or_one_json_object(config: Path, tmp_path: Path) -> None:
    done = sordino(
        "run", config, "--set", "settings.context_length=4", "--set", "settings.rank=2", "--out", tmp_path / "a"
    )
    assert done.returncode == 0, done.stderr
    assert "dp-fpl" in done.stdout
    assert str(tmp_path / "a" / "report.html") in done.stdout.replace("\n", "")
    assert "images encoded" in done.stderr
    done = sordino("run", config, "--set", "algorithm=zero-shot", "--out", tmp_path / "b", "--json")
    assert json.loads(done.stdout)["algorithm"] == "zero-shot"
    assert done.stdout.count("\n") == 1


BAD = [
    (["--set", "rounds=0"], "rounds = 0: input should be greater than or equal to 1"),
    (["--set", "ruonds=3"], "ruonds = 3: no such key"),
    (["--set", "data.shots=3"], "data.shots = 3: no such key"),
    (["--set", "rounds"], "--set = 'rounds': write key=value"),
    (["--set", "algorithm=fedavg"], "algorithm = 'fedavg': not a method; choose from zero-shot"),
    (["--set", "settings.dp-fpl.rnk=3"], "settings.dp-fpl.rnk = 3: no such key"),
    (["--set", "partition.scheme=random"], "partition.scheme = 'random': input should be 'disjoint'"),
    (["--set", "data.source=imagefolder:/no/such/folder"], "/no/such/folder"),
    (["--set", "data.source=imagenet"], "data.source = 'imagenet'"),
    (["--set", "encoder.name=blip"], "encoder.name = 'blip': input should be 'bundled', 'clip' or 'generative'"),
    (["--set", "encoder.checkpoint=/no/such/model"], "/no/such/model"),
    (["--set", "partition.clients=5000"], "client"),
    (["--set", "device=cuda"], "device = 'cuda': not available on this machine"),
    (["--set", "data.train_per_class=5000"], "5000"),
    (["--resume"], "--resume = True: say which run with --out DIR"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_that_names_key_and_value(
    arguments: list[str], message: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import torch

    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has cuda")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sordino", "run", str(config), *arguments])
    with pytest.raises(SystemExit) as exit_code:
        cli.main()
    output = capsys.readouterr()
    assert exit_code.value.code == 2
    last = output.err.strip().splitlines()[-1]
    assert message in last
    assert last.startswith("sordino: ")
    assert "Traceback" not in output.err
    assert output.out == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [None, "rounds = ", "rounds = 3"])
def test_a_missing_or_broken_configuration_is_told(content: str | None, tmp_path: Path) -> None:
    from sordino.experiments.config import load_config

    if content is not None:
        (tmp_path / "c.toml").write_text(content)
    with pytest.raises(SordinoError) as error:
        load_config(tmp_path / "c.toml")
    assert "\n" not in str(error.value)


def test_the_list_of_methods_says_what_each_needs_and_releases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sordino.algorithms import METHODS, algorithm

    monkeypatch.setattr(sys, "argv", ["sordino", "methods", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert list(listed) == list(METHODS)
    for name, row in listed.items():
        about = algorithm(name).ABOUT
        assert row["needs"] == about.needs
        assert all(disclosure.content in row["releases"] for disclosure in about.discloses)
    assert listed["zero-shot"]["releases"] == "nothing"


def test_every_method_tells_all_about_itself(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Every setting comes with a meaning, and its default is what the method really takes."""
    from dataclasses import fields

    from sordino.algorithms import METHODS, algorithm, settings_for

    for name in METHODS:
        monkeypatch.setattr(sys, "argv", ["sordino", "methods", name, "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        card = json.loads(capsys.readouterr().out)
        top = {each["name"]: each for each in card["settings"] if "." not in each["name"]}
        defaults = settings_for(name, {})
        assert list(top) == [each.name for each in fields(defaults)]
        assert all(each["meaning"] for each in top.values()), name
        for key, setting in top.items():
            if isinstance(getattr(defaults, key), int | float) and not isinstance(getattr(defaults, key), bool):
                assert float(setting["default"]) == getattr(defaults, key)
        assert card["text"] == inspect.getdoc(algorithm(name))
        assert card["paper"]


def test_a_method_is_described_in_80_columns(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["sordino", "methods", "fedotp"])
    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "regularization" in printed
    assert "0.01" in printed


def test_methods_and_encoders_as_json(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["sordino", "methods", "--json"])
    with pytest.raises(SystemExit) as exit_code:
        cli.main()
    assert exit_code.value.code == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert {"zero-shot", "local", "central", "promptfl", "dp-fpl", "dplora"} <= {method["name"] for method in methods}
    told = {"name", "paper", "personal", "shared", "privacy", "needs", "releases"}
    assert all(set(method) == told for method in methods)
    monkeypatch.setattr(sys, "argv", ["sordino", "encoders", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    bundled, clip, generative = json.loads(capsys.readouterr().out)["encoders"]
    assert bundled["ready"]
    assert bundled["megabytes"] > 50
    assert "patches" in clip["capabilities"]
    assert (generative["capabilities"], generative["feature_width"]) == (["likelihoods"], 0)


@pytest.mark.slow
def test_doctor_finds_what_is_there() -> None:
    done = sordino("doctor")
    assert done.returncode == 0, done.stdout
    assert "bundled encoder's weights: installed" in done.stdout


def test_doctor_finds_a_folder_of_features_that_others_may_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORDINO_CACHE", str(tmp_path))
    (tmp_path / "features").mkdir()
    (tmp_path / "features").chmod(0o750)
    (found,) = (check.finding for check in examine() if check.name == "feature cache")
    assert found.endswith(f"others than its owner (mode 750): run 'chmod 700 {tmp_path / 'features'}'")


def test_a_warning_is_one_line_once_without_its_place_in_the_program() -> None:
    code = """
import sys, warnings
from sordino.cli.console import run_command
from sordino.errors import SordinoWarning
def command():
    for _ in range(2):
        warnings.simplefilter("always")  # as libraries do, after which Python tells all anew
        warnings.warn("some words are\\nunknown", SordinoWarning)
    return 0
sys.exit(run_command(command))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "sordino: warning: some words are unknown\n"
