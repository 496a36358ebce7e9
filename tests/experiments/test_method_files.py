"""Methods in files: they run like the package's own, and only where somebody asks for it."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
import tomllib
from pathlib import Path

import pytest
import safetensors.torch

import sordino
from sordino.algorithms import METHODS, algorithm, settings_for
from sordino.algorithms.variation import variation
from sordino.audit.subject import Subject
from sordino.cli.app import invoke
from sordino.errors import ConfigError, PromptError, RunError
from sordino.experiments.config import load_config, resolved
from sordino.experiments.features import EncodedDataset
from sordino.experiments.methods import card
from sordino.experiments.run import assemble, run
from sordino.progress import silent

BUILT_IN = list(METHODS)
PAGE = (Path(__file__).parents[2] / "docs" / "new-method.md").read_text(encoding="utf-8")
OWN_SETTINGS = textwrap.dedent(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A variation of DP-FPL."""
    path = tmp_path / "mine.py"
    path.write_text(variation("mine", "dp-fpl"), encoding="utf-8")
    return path


def named(file: Path, *overrides: str) -> list[str]:
    return [*overrides, f"methods.mine={file}", "algorithm=mine"]


def prompts(folder: Path) -> dict[str, object]:
    files = sorted((folder / "prompts").iterdir())
    return {f"{file.name} {name}": part for file in files for name, part in safetensors.torch.load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("parent", BUILT_IN)
def test_a_variation_of_every_method_runs_at_once_and_is_its_parent(
    parent: str, config_file: Path, tmp_path: Path
) -> None:
    """The same prompts to the bit, until its function is changed."""
    file = tmp_path / "mine.py"
    text = variation("mine", parent)
    assert len(text.splitlines()) <= 30
    file.write_text(text, encoding="utf-8")
    federation = ["partition.scheme=classes", "partition.clients=4", "partition.classes_per_client=2"]  # for SecFPP
    overrides = ["rounds=2", *federation]
    run(load_config(config_file, [*overrides, f"algorithm={parent}"]), tmp_path / "parent")
    run(load_config(config_file, named(file, *overrides)), tmp_path / "mine")
    before, after = prompts(tmp_path / "parent"), prompts(tmp_path / "mine")
    assert before.keys() == after.keys()
    assert all(part.equal(after[name]) for name, part in before.items())  # type: ignore[attr-defined]
    ours, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("mine", "parent"))
    for key in ("accuracy", "per_client", "communication"):
        assert ours[key] == theirs[key]
    assert ours["privacy"]["statement"] == theirs["privacy"]["statement"]


def test_what_a_file_changes_is_what_runs(file: Path, config_file: Path, tmp_path: Path) -> None:
    still = "    return upload, broadcast_state\n"
    text = file.read_text().replace("    return upload, state\n", still)
    text = text.replace("    upload, state = parent", "    broadcast_state = state\n    upload, _ = parent")
    file.write_text(text)
    run(load_config(config_file, named(file, "rounds=2")), tmp_path / "run")
    states = safetensors.torch.load_file(tmp_path / "run/checkpoint/round-000002.clients.safetensors")
    start = run(load_config(config_file, ["rounds=1", "settings.local_learning_rate=0.0"]), tmp_path / "start")
    assert start.rounds == 1
    kept = safetensors.torch.load_file(tmp_path / "start/checkpoint/round-000001.clients.safetensors")
    # Factors and residual put together again are the prompt but for rounding.
    assert (states["clients.context"] - kept["clients.context"]).abs().max() < 1e-6


def test_a_parents_settings_reach_its_descendants(file: Path, tmp_path: Path) -> None:
    tables = {"rank": 3, "dp-fpl": {"rank": 4, "local_steps": 2}, "mine": {"rank": 5}, "dplora": {"rank": 6}}
    sordino.add_method("mine", file)
    assert (settings_for("mine", tables).rank, settings_for("mine", tables).local_steps) == (5, 2)
    assert settings_for("mine", {"dp-fpl": {"rank": 4}}).rank == 4
    assert settings_for("dp-fpl", tables).rank == 4
    grandchild = tmp_path / "lora.py"
    grandchild.write_text(variation("lora", "dplora"))
    sordino.add_method("lora", grandchild)
    assert settings_for("lora", {}).parameterization == "lora"
    assert (settings_for("lora", tables).rank, settings_for("lora", tables).local_steps) == (6, 2)
    with pytest.raises(ConfigError, match=r"settings.mine.rnak = 3: no such key"):
        settings_for("mine", {"dp-fpl": {"rnak": 3}})


def test_settings_of_its_own_are_described_with_those_that_it_inherits(file: Path) -> None:
    file.write_text(file.read_text().replace("Settings, ", "") + OWN_SETTINGS)
    sordino.add_method("mine", file)
    meanings = {setting.name: setting.meaning for setting in card("mine").settings}
    parents = {setting.name: setting.meaning for setting in card("dp-fpl").settings}
    assert meanings == parents | {"strength": "of the change."}
    assert all(parents.values())
    assert card("mine").parent == "dp-fpl"
    assert settings_for("mine", {"dp-fpl": {"rank": 4}, "mine": {"strength": 0.25}}).strength == 0.25


def test_a_parents_setting_that_a_descendant_dropped_is_no_error(file: Path) -> None:
    dropped = file.read_text().replace("Settings, ", "") + "from sordino.algorithms.promptfl import Settings\n"
    file.write_text(dropped)
    sordino.add_method("mine", file)
    assert settings_for("mine", {"dp-fpl": {"rank": 4, "local_steps": 3}}).local_steps == 3
    with pytest.raises(ConfigError, match="settings.mine.rank"):
        settings_for("mine", {"mine": {"rank": 4}})


def test_a_configuration_names_files_from_its_own_folder(
    file: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "variants").mkdir()
    file.rename(tmp_path / "variants" / "any.py")
    text = config_file.read_text().replace('algorithm = "dp-fpl"', 'algorithm = "mine"')
    config_file.write_text(text + '[methods]\nmine = "variants/any.py"\n')
    monkeypatch.chdir(tmp_path / "variants")
    config = load_config(config_file)
    assert config.methods["mine"].file == str(tmp_path / "variants" / "any.py")
    assert settings_for("mine", config.settings).rank == 2  # of [settings.dp-fpl]


def test_a_run_keeps_its_method_and_goes_on_with_no_other(file: Path, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    content = file.read_bytes()
    summary = run(load_config(config_file, named(file)), out)
    assert (out / "method" / "mine.py").read_bytes() == content
    assert str(tmp_path) not in str(tomllib.loads((out / "config.toml").read_text())["methods"])
    file.rename(tmp_path / "elsewhere.py")  # the content counts, not the place
    assert run(load_config(config_file, named(tmp_path / "elsewhere.py")), out, resume=True) == summary
    file.write_bytes(content + b"# changed\n")
    (out / "summary.json").unlink()
    for _ in ("interrupted", "finished"):
        with pytest.raises(RunError, match=r"method's file changed since .*run/method/mine.py is its copy"):
            run(load_config(config_file, named(file)), out, resume=True)
        (out / "summary.json").write_text("{}")
    assert (out / "method" / "mine.py").read_bytes() == content


def test_a_run_directory_is_enough_to_run_it_again(file: Path, config_file: Path, tmp_path: Path) -> None:
    summary = run(load_config(config_file, named(file)), tmp_path / "run")
    file.unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    del METHODS["mine"]
    again = run(load_config(tmp_path / "moved" / "config.toml"), tmp_path / "again")
    assert again.accuracy == summary.accuracy
    (tmp_path / "moved" / "method" / "mine.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ConfigError, match=r"methods.mine.sha256 = '[0-9a-f]{64}': .*put the file back"):
        load_config(tmp_path / "moved" / "config.toml")


def test_nothing_in_a_run_directory_is_executed_unasked(file: Path, config_file: Path, tmp_path: Path) -> None:
    """An audit names the copy, runs it where it is told to, and refuses another one."""
    out, marker = tmp_path / "run", tmp_path / "executed"
    file.write_text(file.read_text() + f"open({str(marker)!r}, 'w').close()\n")
    run(load_config(config_file, named(file, "rounds=1")), out)
    marker.unlink()
    del METHODS["mine"]
    prompt = sordino.load_prompt(out / "prompts" / "client-0000.safetensors")
    assert prompt.method == "mine"
    with pytest.raises(RunError, match=r"run/method/mine.py, which nobody runs unasked; .*--method \S+run/method"):
        Subject.open(out)
    with pytest.raises(PromptError, match=r"'mine', which is not here; .*--method FILE"):
        prompt.model()
    sordino.load_prompt(out / "prompts" / "client-0001.safetensors")
    assert not marker.exists()
    sordino.add_method("mine", out / "method" / "mine.py")
    assert marker.exists()
    assert Subject.open(out).training.round == 1
    assert prompt.model().class_names == prompt.class_names
    file.write_text(file.read_text() + "# changed\n")
    sordino.add_method("mine", file)
    with pytest.raises(RunError, match=r"mine.py is not the method that trained .*; give the copy"):
        Subject.open(out)


def test_two_versions_of_a_file_share_no_simulated_noise(file: Path, config_file: Path) -> None:
    noise = ["privacy.mechanism=cotangent", "privacy.noise_multiplier=1.0", "privacy.simulation=true"]
    names = set()
    for version in range(2):
        file.write_text(file.read_text() + f"# version {version}\n")
        config = load_config(config_file, named(file, *noise))
        dataset = EncodedDataset.open(config)
        runtime, _ = assemble(config, dataset, dataset.task(config, silent)[0])
        names.add(runtime.identity)
        assert resolved(config)["methods"]["mine"]["sha256"] == config.methods["mine"].sha256
    assert len(names) == 2


BROKEN = {
    "no such file": (None, "no such file; `sordino methods new"),
    "syntax": ("def f(:\n", "not valid Python, line 1: "),
    "null": ("a = 1\0", "not valid Python"),
    "raises": ("\n\n1 / 0\n", "fails when it is imported, in line 3: ZeroDivisionError: division by zero"),
    "exits": ("import sys\nsys.exit('done')", "fails when it is imported, in line 2: SystemExit: done"),
    "imports": ("import no_such_module_1\n", "in line 1: ModuleNotFoundError: No module named 'no_such_module_1'"),
    "lines": ("raise ValueError('one\\ntwo')", "ValueError: one two"),
    "nothing": ("", "lacks ABOUT, Settings, Upload, schedule(), server_init()"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told_in_one_line(
    case: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = BROKEN[case]
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    for command in (["run"], ["privacy", "plan"], ["compare", "--algorithms", "promptfl"]):
        assert invoke([*command, str(config_file), "--method", str(file)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert expected in said
        assert str(file) in said


def test_a_function_that_is_missing_and_a_parent_that_is_none_are_named(file: Path) -> None:
    whole = file.read_text()
    file.write_text(whole.replace("prompt, schedule,", "schedule,"))
    with pytest.raises(ConfigError, match=r"mine.py': lacks prompt\(\); see docs/new-method.md"):
        sordino.add_method("mine", file)
    file.write_text(whole.replace('PARENT = "dp-fpl"', 'PARENT = "dpfpl"'))
    with pytest.raises(ConfigError, match="PARENT = 'dpfpl': method mine may descend from zero-shot"):
        sordino.add_method("mine", file)
    assert "mine" not in METHODS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("promptfl.py", "methods.promptfl = 'promptfl': a method of this name is here already"),
        ("rank.py", "a setting has this name"),
        ("two words.py", "rename the file to lower-case letters"),
        ("mine.txt", "give a Python file"),
        ("My.py", "rename the file to lower-case letters"),
    ],
)
def test_names_that_a_file_cannot_have(
    name: str, expected: str, file: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are refused before anything is executed."""
    bad = file.with_name(name)
    bad.write_text("raise RuntimeError('executed')")
    assert invoke(["run", str(config_file), "--method", str(bad)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert expected in said
    assert "executed" not in said


def test_new_writes_a_file_that_every_command_takes(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(["methods", "new", "my-way", "--from", "promptfl"]) == 0
    assert "sordino run CONFIG.toml --method my-way.py" in capsys.readouterr().out
    rounds = ["--set", "rounds=1"]
    assert invoke(["run", str(config_file), "--method", "my-way.py", *rounds, "--out", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["algorithm"] == "my-way"
    assert invoke(["privacy", "plan", str(config_file), "--method", "my-way.py", "--json"]) == 0
    capsys.readouterr()
    arguments = ["--algorithms", "promptfl", "--method", "my-way.py", *rounds, "--seeds", "1"]
    assert invoke(["compare", str(config_file), *arguments, "--out", "both", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [line["algorithm"] for line in runs] == ["promptfl", "my-way"]
    assert runs[0]["accuracy"] == runs[1]["accuracy"]
    copy = "run/method/my-way.py"
    picture = next((tmp_path / "pictures").rglob("*.png"))
    for command in (
        ["methods", copy, "--json"],
        ["predict", "run/prompts/shared.safetensors", str(picture), "--method", copy, "--json"],
        ["audit", "run", "--attacks", "inversion", "--method", copy, "--json"],
    ):
        METHODS.pop("my-way")
        assert invoke(command) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)


def test_new_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("mine")
    for name, parent, expected in (
        ("mine", "dp-fpl", "mine.py is here already"),
        ("promptfl", "dp-fpl", "a method of this name is here already"),
        ("My_Way", "dp-fpl", "give lower-case letters"),
        ("other", "dpfpl", "not a method; choose from"),
    ):
        assert invoke(["methods", "new", name, "--from", parent]) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert said.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]
    assert (tmp_path / "mine.py").read_text() == "mine"


def test_a_file_is_run_once_for_all_runs_of_a_comparison(file: Path, config_file: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    file.write_text(file.read_text() + f"with open({str(count)!r}, 'a') as log:\n    log.write('.')\n")
    sordino.compare(load_config(config_file, named(file, "rounds=1")), ["mine"], tmp_path / "both", seeds=2)
    assert count.read_text() == "."
    assert algorithm("mine").__name__.startswith("sordino_method_")  # type: ignore[attr-defined]
