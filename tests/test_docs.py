"""The documents name what is there, and their examples work."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from PIL import Image

from commands import here
from pages.blocks import blocks, commands
from sordino.algorithms import METHODS, Method, algorithm
from sordino.algorithms.base import model_class
from sordino.cli.app import app
from sordino.encoders.generative.settings import GenerativeSettings
from sordino.encoders.prompt_model import PromptModel
from sordino.experiments.config import EncoderSettings, Experiment, load_config, parse_config
from sordino.experiments.privacy.plan import plan
from sordino.experiments.run import run
from sordino.experiments.tracking import TrackingSettings
from sordino.privacy.settings import PrivacySettings
from sordino.private_tuning.settings import load_private_config
from sordino.runtime.settings import RuntimeSettings
from sordino.tasks.settings import DataSettings, PartitionSettings, PoisoningSettings

ROOT = Path(__file__).parents[1]
OWN_METHODS = [name for name, method in METHODS.items() if "." not in method.module]  # not those of other packages


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    tables = [Experiment, DataSettings, PartitionSettings, EncoderSettings, RuntimeSettings, PoisoningSettings]
    tables += [PrivacySettings, TrackingSettings, GenerativeSettings]
    keys = {key for table in tables for key in table.model_fields}
    keys |= {field.name for name in METHODS for field in fields(algorithm(name).Settings)}
    assert not {key for key in keys if f"`{key}`" not in text and f"[{key}]" not in text}


def test_every_pitfall_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    section = page.split("## Pitfalls")[1].split("\n## ")[0]
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?` \|$", section, re.MULTILINE)
    assert len(named) == section.count("\n| ") - 1  # a line each, but for the heading
    for file, test in named:
        assert f"def {test or 'test_'}" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
PRIVATE = [path for path in EXAMPLES if path.name.startswith("private_")]


@pytest.mark.parametrize("example", PRIVATE, ids=lambda path: path.name)
def test_examples_of_private_tuning_are_valid(example: Path) -> None:
    load_private_config(example)


@pytest.mark.parametrize("example", [path for path in EXAMPLES if path not in PRIVATE], ids=lambda path: path.name)
def test_examples_are_valid_for_every_method(example: Path) -> None:
    tables = tomllib.loads(example.read_text(encoding="utf-8"))
    for name in METHODS:
        parse_config(tables | {"algorithm": name})


@pytest.fixture
def page_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method that docs/new-method.md writes, installed as a package's entry point would be."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "new-method.md").read_text("utf-8"), re.DOTALL)[0]
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mixture.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "mixture", Method("my_package.mixture"))
    return "mixture"


def test_the_new_method_of_the_page_runs(page_method: str, config_file: Path, tmp_path: Path) -> None:
    """With and without privacy: it learns, keeps its own, and its ledger says what left."""
    settings = ["settings.local_steps=2", "settings.optimizer.learning_rate=0.5", f"algorithm={page_method}"]
    summary = run(load_config(config_file, settings), tmp_path / "plain")
    assert not summary.privacy.private
    assert summary.communication.upload_bytes_per_client_round > 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[1]
    noised = [*settings, "privacy.mechanism=cotangent", "privacy.epsilon=8.0", "settings.batch_size=0"]
    summary = run(load_config(config_file, noised), tmp_path / "noised")
    assert summary.privacy.private
    assert summary.privacy.epsilon == pytest.approx(8.0, rel=1e-2)


def test_the_new_method_of_the_page_is_short() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "new-method.md").read_text("utf-8"), re.DOTALL)[0]
    parsed = ast.parse(code)
    assert sum(len(ast.unparse(node).splitlines()) for node in parsed.body) < 80


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
        for target, anchor in links:
            lands_on = page.parent / target if target else page
            assert lands_on.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(lands_on), f"{page.name} links to {target}#{anchor}"


def test_the_numbers_of_the_readme_are_those_of_the_pages() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    privacy = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    pitfalls = privacy.split("## Pitfalls")[1].split("\n## ")[0].count("\n| ") - 1
    assert f"lists {pitfalls} pitfalls" in text
    assert f"compares {len(OWN_METHODS)} methods, ablations and baselines" in text
    (faster,) = re.findall(r"\| ([\d.]+) \| [\d.]+ GB \|$", privacy, re.MULTILINE)
    assert f"{faster} times as fast as DP-SGD" in text


def test_the_overview_names_every_method() -> None:
    text = (ROOT / "docs" / "overview.md").read_text(encoding="utf-8")
    section = text.split("## Methods")[1].split("\n## ")[0]
    assert not [name for name in OWN_METHODS if f"`{name}`" not in section]


def test_the_page_on_choosing_says_what_each_mechanism_refuses() -> None:
    """Of the methods that learn; whether a run is then refused is in tests/privacy/test_sensitivity.py."""
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = page.split("## By the mechanism")[1].split("\n## ")[0].split("|---|---|---|\n")[1].split("\n\n")[0]
    written: dict[str, set[str]] = {}
    mechanism = ""
    for row in rows.splitlines():
        key, refused, _ = (cell.strip() for cell in row.strip("|").split(" | "))
        mechanism = key.strip("`") or mechanism
        written.setdefault(mechanism, set()).update(re.findall(r"`([\w-]+)`", refused))
    learning = [name for name in OWN_METHODS if algorithm(name).ABOUT.trains]
    models = {name: model_class(algorithm(name)) for name in learning}
    blind = {name for name in learning if algorithm(name).ABOUT.forward_only}
    assert written["cotangent"] == {name for name in learning if not models[name].linear} | blind
    one_feature = {name for name, model in models.items() if model.reads is PromptModel.reads}
    assert written["statistics"] == set(learning) - one_feature
    assert written["dp-fedavg"] == {name for name in learning if algorithm(name).ABOUT.server_uses != "mean"}


def test_the_page_on_the_command_line_names_every_command() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert not [name for name in known if f"| `sordino {name}" not in text]


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-demo.lock"])
def test_the_lock_files_have_hashes_and_no_index(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if re.match(r"^[a-z0-9]", line)]
    assert len(pins) > 50
    assert all("==" in pin and pin.rstrip().endswith("\\") for pin in pins)
    assert not re.search(r"https?://|index-url|find-links", text)


def layouts() -> dict[str, tuple[list[str], str, str]]:
    """Of each layout in docs/own-pictures.md: its files, its table as CSV, and its tables as TOML."""
    found = {}
    for section in (ROOT / "docs" / "own-pictures.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        blocks = {kind: re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("text", "csv", "toml")}
        if blocks["text"]:
            (files,), (config,) = blocks["text"], blocks["toml"]
            found[section.partition("\n")[0]] = (files.split(), "".join(blocks["csv"]), config)
    return found


@pytest.mark.parametrize("layout", layouts())
def test_a_layout_of_ones_own_pictures_is_read_as_the_page_says(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Twelve pictures for each that the page names, with its table and configuration, from where the page works."""
    files, table, config = layouts()[layout]
    monkeypatch.chdir(tmp_path)
    for file in files:
        for number in range(1, 13):
            path = Path(file.replace("01.", f"{number:02}."))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (len(file), number, 99)).save(path)
    if table:
        header, *rows = table.splitlines()
        lines = [row.replace("01", f"{number:02}") for row in rows for number in range(1, 13)]
        source = tomllib.loads(config)["data"]["source"].partition(":")[2]
        Path(source if source.endswith(".csv") else f"{source}/metadata.csv").write_text("\n".join([header, *lines]))
    page = (ROOT / "docs" / "own-pictures.md").read_text(encoding="utf-8")
    whole = tomllib.loads(re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0])
    with caplog.at_level("WARNING", logger="sordino"):
        chosen = plan(parse_config(whole | tomllib.loads(config)))
    assert [record.getMessage() for record in caplog.records] == []  # no doubt about classes
    sites = {"north": "north", "south": "south"} if "domain" in config else {"0": "", "1": "", "2": ""}
    assert re.findall(r"(\w+) \(\d+\)", chosen.data.partition("clients: ")[2]) == list(sites)
    persons = chosen.mechanism.inputs.whole_persons
    assert persons == ("patient" in table)


@pytest.mark.slow
def test_the_commands_of_the_overview_run(tmp_path: Path) -> None:
    """On a folder of small pictures, with the configuration that stands there, one round each."""
    page = ROOT / "docs" / "overview.md"
    text = page.read_text(encoding="utf-8")
    (tmp_path / "my.toml").write_text(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[0])
    for shade in range(10):
        folder = tmp_path / "photos" / f"shade_{shade}"
        folder.mkdir(parents=True)
        for number in range(18):
            Image.new("RGB", (9, 9), (25 * shade, number, 99)).save(folder / f"{number}.png")
    runs = [arguments for arguments in commands("docs/overview.md") if arguments[0] in ("run", "compare")]
    assert len(runs) == 2
    for number, arguments in enumerate(runs):
        done = here(tmp_path, *arguments, "--set", "rounds=1", "--out", str(number), "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)
        assert (tmp_path / str(number) / "report.html").exists()


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(tmp_path: Path) -> None:
    """All of them, in their order, one round each.

    What the pictures and the plan are is compared whole, and of results the headings, names and order: one round has
    other figures than forty.
    """
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "fabric.toml").write_text(config)
    script = [sys.executable, str(ROOT / "examples" / "fabric.py"), "fabric"]
    assert "python examples/fabric.py fabric" in text
    printed = {"fabric": subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True).stdout}
    (table,) = blocks("docs/tutorial.md", "csv")
    assert (tmp_path / "fabric" / "labels.csv").read_text(encoding="utf-8").startswith(table.text)
    for arguments in commands("docs/tutorial.md"):
        short = ["--set", "rounds=1"] if arguments[0] in ("run", "compare") else []
        done = here(tmp_path, *arguments, *short)
        assert done.exit_code == 0, done.output
        printed[" ".join(arguments[:2])] = done.stdout
    assert (tmp_path / "runs" / "compared" / "report.html").exists()
    assert (tmp_path / "runs" / "private" / "report.html").exists()
    made, plan_text, compared, gains, ran, private, predicted = blocks("docs/tutorial.md", "")
    assert printed["fabric"] == made.text
    assert plan_text.text in printed["privacy plan"].replace(f"{tmp_path}/", "")
    for found, page in ((printed["compare fabric.toml"], compared), (printed["run fabric.toml"], ran)):
        heading, *rows = page.text.splitlines()
        first, *others = found.splitlines()
        assert first.split() == heading.split()
        assert [line.split()[0] for line in others[: len(rows)]] == [line.split()[0] for line in rows]
    for line in gains.text.splitlines():
        assert f"\n{line.partition(': local accuracy')[0]}: local accuracy " in printed["compare fabric.toml"]
    said = " ".join(printed["run fabric.toml"].split())
    assert " ".join(private.text.split()).partition("Differentially private: ")[2] in said
    names = {line.rpartition("%")[2].strip() for line in predicted.text.splitlines()[1:]}
    first, *ranked = next(value for name, value in printed.items() if name.startswith("predict")).splitlines()
    assert (first, len(ranked)) == (predicted.text.splitlines()[0], len(names))


def test_the_secure_sum_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "secure-sum.md").read_text("utf-8"), re.DOTALL)
    exec(compile(code, "docs/secure-sum.md", "exec"), {})
    shape, survivors, multiplier = re.findall(r"\(.*?\)|[\d.]+", capsys.readouterr().out)
    assert shape == "(3, 4)"
    assert ast.literal_eval(survivors) == (0, 1, 2, 4, 5, 6, 7, 8, 9)
    assert float(multiplier) >= 2.0
