"""`import sordino`: what a script or a notebook has, and that it says what the command line says."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sordino
from sordino.algorithms import METHODS, promptfl
from sordino.experiments.compare import to_csv
from sordino.experiments.config import load_config
from sordino.experiments.privacy.plan import as_text, plan
from sordino.experiments.run import run
from sordino.results import Summary

ROOT = Path(__file__).parents[1]
FEDERATION = {"scheme": "iid", "clients": 4}


@pytest.fixture
def methods() -> Iterator[None]:
    """The methods as they were before."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "datasets", "pandas")
    code = f"import sordino, sys; dir(sordino); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert dir(sordino) == sorted(sordino.__all__)
    for name in sordino.__all__:
        assert getattr(sordino, name) is not None
    with pytest.raises(AttributeError, match="module 'sordino' has no attribute 'trian'"):
        sordino.trian  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import sordino.audit.run", "sordino.audit", "from sordino import audit"])
def test_audit_is_a_function_whatever_was_imported_first(first: str) -> None:
    """A package of the same name is an attribute as soon as any part of it was imported."""
    code = f"""
import sordino
{first}
try:
    sordino.audit("nowhere")
except sordino.RunError as error:
    print(error)
import sordino.audit.statistics as part
print(part.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "nowhere holds no finished run (there is no such directory)",
        "sordino.audit.statistics",
    ]


def test_a_configuration_is_the_same_from_python_and_from_a_file(config_file: Path) -> None:
    read = load_config(config_file, ["rounds=3", "privacy.mechanism=dp-sgd", "privacy.epsilon=8.0"])
    overrides = {"rounds": 3, "privacy.mechanism": "dp-sgd", "privacy.epsilon": 8.0}
    assert sordino.load_config(str(config_file), overrides) == read
    assert sordino.Experiment.of(**read.model_dump()) == read


def test_a_configuration_means_the_same_folders_from_anywhere(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a run directory is run again from elsewhere; a name on the hub stays one."""
    (tmp_path / "here" / "earlier").mkdir(parents=True)
    (tmp_path / "here" / "clip").symlink_to(clip_folder)
    monkeypatch.chdir(tmp_path / "here")
    private = {"mechanism": "statistics", "release": "earlier"}
    tables = {"data": {"source": "digits"}, "partition": FEDERATION, "privacy": private}
    local = sordino.Experiment.of(encoder={"name": "clip", "checkpoint": "clip"}, **tables)
    monkeypatch.chdir(tmp_path)
    assert sordino.Experiment.of(**local.model_dump()) == local
    assert Path(local.encoder.checkpoint or "") == clip_folder.resolve()
    assert Path(local.privacy.release or "") == (tmp_path / "here" / "earlier").resolve()
    hub = sordino.Experiment.of(encoder={"name": "clip", "checkpoint": "owner/model"}, **tables)
    assert hub.encoder.checkpoint == "owner/model"


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "data"),
    ({"ruonds": 3}, "ruonds"),
    ({"rounds": 0}, "rounds"),
    ({"algorithm": "fedavg"}, "algorithm"),
    ({"data": {"source": "digits", "shots": 3}}, "data.shots"),
    ({"data": {"source": Path("photos")}}, "data.source"),
    ({"settings": {"context_length": 0}}, "settings.promptfl.context_length"),
    ({"settings": {"dp-fpl": {"rnk": 3}}}, "settings.dp-fpl.rnk"),
    ({"settings": {"dp-fpl": 3}}, "settings.dp-fpl"),
    ({"settings": {"context": "\0"}}, "settings.context"),
    ({"encoder": {"name": "clip"}}, "encoder.checkpoint"),
]


@pytest.mark.parametrize(("tables", "key"), BAD)
def test_what_is_wrong_is_named_by_its_key(tables: dict[str, Any], key: str) -> None:
    whole = {"algorithm": "promptfl", "data": {"source": "digits"}, "partition": FEDERATION}
    with pytest.raises(sordino.ConfigError) as caught:
        sordino.Experiment.of(**(whole | tables if tables else {}))
    assert caught.value.key == key


def test_a_run_and_a_plan_are_those_of_the_command_line(config_file: Path, tmp_path: Path) -> None:
    config = sordino.load_config(config_file, {"rounds": 2})
    summary = sordino.run(config, str(tmp_path / "face"))
    again = run(load_config(config_file, ["rounds=2"]), tmp_path / "command")
    assert summary.accuracy == again.accuracy
    assert Summary.from_json((tmp_path / "face" / "summary.json").read_bytes()).accuracy == again.accuracy
    assert sordino.run(config, tmp_path / "face", resume=True) == summary
    assert str(sordino.privacy_plan(config)) == as_text(plan(config))


def test_a_comparison_makes_the_frame_of_its_csv(config_file: Path, tmp_path: Path) -> None:
    stages = []
    config = sordino.load_config(config_file, {"rounds": 1})
    rows = sordino.compare(
        config,
        ["zero-shot", "promptfl"],
        tmp_path / "both",
        seeds=2,
        vary={"rounds": [1, 2]},
        progress=lambda stage, *_: stages.append(stage),
    )
    assert to_csv(rows) == (tmp_path / "both" / "comparison.csv").read_text()
    frame = rows.frame()
    assert list(frame["algorithm"]) == [row.algorithm for row in rows]
    assert list(frame["variation"]) == [row.variation for row in rows]
    assert frame["local_mean"].tolist() == [row.accuracy["local"][0] for row in rows]  # type: ignore[index]
    assert math.isnan(frame["novel_mean"][0])
    assert frame["private"].dtype == bool
    assert any("promptfl" in stage for stage in stages)


def test_a_comparison_of_nothing_is_refused(config_file: Path, tmp_path: Path) -> None:
    config = sordino.load_config(config_file)
    for arguments, key in (((["promptfl"], 0), "seeds"), (([], 1), "algorithms"), (("promptfl", 1), "algorithms")):
        with pytest.raises(sordino.ConfigError) as caught:
            sordino.compare(config, arguments[0], tmp_path / "none", seeds=arguments[1])
        assert caught.value.key == key
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"config": {"rounds": 1}}, r"config = \{'rounds': 1\}: must come from sordino.load_config"),
        ({"config": "my.toml"}, "config = 'my.toml': must come from sordino.load_config"),
        ({"seeds": [0, 1]}, r"seeds = \[0, 1\]: must be how many"),
        ({"jobs": 0}, "jobs = 0: at least one is needed"),
        ({"vary": {"rounds": 2}}, "rounds = 2: give a list of the values"),
        ({"vary": {"algorithm": "local"}}, "algorithm = 'local': give a list of the values"),
    ],
)
def test_what_is_of_another_type_is_named(
    changed: dict[str, Any], told: str, config_file: Path, tmp_path: Path
) -> None:
    given = {"config": sordino.load_config(config_file, {"rounds": 1}), "algorithms": ["local"]} | changed
    with pytest.raises(sordino.ConfigError, match=told):
        sordino.compare(out=tmp_path / "out", **given)
    if "config" in changed:
        with pytest.raises(sordino.ConfigError, match=told):
            sordino.run(given["config"], tmp_path / "out")
        with pytest.raises(sordino.ConfigError, match=told):
            sordino.privacy_plan(given["config"])
    assert not (tmp_path / "out").exists()


def test_one_text_is_no_list_of_texts(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(sordino.ConfigError, match=r"overrides = 'rounds=3': must be a table, or a list of texts"):
        sordino.load_config(config_file, "rounds=3")
    with pytest.raises(sordino.ConfigError, match=r"attacks = 'inversion': must be a list of names"):
        sordino.audit(tmp_path, attacks="inversion")


def test_a_classifier_takes_any_collection_and_names_what_is_no_picture(config_file: Path, tmp_path: Path) -> None:
    sordino.run(sordino.load_config(config_file, {"algorithm": "promptfl", "rounds": 1}), tmp_path / "run")
    classifier = sordino.load_prompt(tmp_path / "run" / "prompts" / "shared.safetensors").model()
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    assert classifier.classify(each for each in pictures) == classifier.classify(pictures)
    array = np.zeros((8, 8, 3), np.uint8)
    for wrong, kind in ((array, "ndarray"), ([pictures[0], array], "ndarray"), (None, "NoneType"), ([3], "int")):
        with pytest.raises(sordino.DataError, match=f"is of type {kind}; give a file's path or a picture of Pillow"):
            classifier.classify(wrong)


def test_a_frame_without_pandas_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(sordino.SordinoError, match="pip install pandas"):
        sordino.Comparison().frame()


@pytest.mark.parametrize("kind", ["module", "object", "mapping"])
@pytest.mark.usefixtures("methods")
def test_an_added_method_runs_as_one_of_the_package(kind: str, config_file: Path, tmp_path: Path) -> None:
    """The same numbers as the same functions under their own name; its prompts load, and its run is audited."""
    given = {"module": promptfl, "object": SimpleNamespace(**vars(promptfl)), "mapping": dict(vars(promptfl))}[kind]
    sordino.add_method("my-method", given)
    own = sordino.load_config(config_file, {"algorithm": "my-method", "rounds": 2, "settings.my-method.local_steps": 2})
    known = sordino.load_config(config_file, {"algorithm": "promptfl", "rounds": 2, "settings.promptfl.local_steps": 2})
    summary = sordino.run(own, tmp_path / "own")
    assert summary.algorithm == "my-method"
    assert summary.accuracy == sordino.run(known, tmp_path / "known").accuracy
    prompt = sordino.load_prompt(tmp_path / "own" / "prompts" / "shared.safetensors")
    assert prompt.settings["local_steps"] == 2
    assert prompt.model().class_names == prompt.class_names
    assert "inversion" in sordino.audit(tmp_path / "own", attacks=["inversion"])["attacks"]
    del METHODS["my-method"]
    with pytest.raises(sordino.ConfigError, match=r"not a method; .* in Python add it with sordino.add_method"):
        sordino.run(own, tmp_path / "own", resume=True)
    with pytest.raises(sordino.PromptError, match="'my-method', which is not here; .*sordino.add_method"):
        prompt.model()


@pytest.mark.usefixtures("methods")
def test_a_method_is_replaced_by_a_later_one_of_its_name_only() -> None:
    sordino.add_method("mine", promptfl)
    sordino.add_method("mine", SimpleNamespace(**vars(promptfl), newer=True))
    assert METHODS["mine"].added.newer
    for name in ("promptfl", "context_length", "Mine", "a b", ""):
        with pytest.raises(sordino.ConfigError) as caught:
            sordino.add_method(name, promptfl)
        assert caught.value.key == "name"
    cut = {name: value for name, value in vars(promptfl).items() if name not in ("ABOUT", "server_round", "schedule")}
    with pytest.raises(sordino.ConfigError, match=r"lacks ABOUT, schedule\(\), server_round\(\); see docs"):
        sordino.add_method("cut", cut)
    assert "cut" not in METHODS


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.usefixtures("methods")
def test_the_page_runs_as_a_notebook(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks are cells of one notebook, which has a folder of pictures and defines the page of a new method."""
    pictures.rename(tmp_path / "photos")
    new = Image.fromarray(np.full((30, 30, 3), (200, 30, 30), dtype=np.uint8))
    new.save(tmp_path / "new.png")
    monkeypatch.chdir(tmp_path)
    notebook: dict[str, Any] = {"__name__": "__main__", "PIL_picture": new}
    first, *others = blocks("docs/python.md")
    assert len([line for line in first.splitlines() if line.strip()]) <= 15

    def run_cell(code: str) -> None:
        exec(compile(code, "a cell", "exec", dont_inherit=True), notebook)

    run_cell(first)
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("Differentially private: epsilon = 8 ")
    assert said[-1] in notebook["saved"].class_names
    *others, last = others
    method, *_ = blocks("docs/new-method.md")  # what follows there varies methods in files
    for cell in (*others, method, last):
        run_cell(cell)
    assert list(notebook["table"]["algorithm"]) == ["zero-shot", "zero-shot", "promptfl", "promptfl"]
    assert notebook["answer"].best in notebook["saved"].class_names
    assert notebook["logits"].shape == (1, 4)
    assert notebook["mine"].algorithm == "mixture"


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("README.md")
    exec(compile(block, "README.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    assert "Differentially private: epsilon = 4 " in capsys.readouterr().out
