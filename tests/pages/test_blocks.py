"""Every block of every page is covered: it is run, or read by the parser that a user's would be read by.

- Of `sh` every line is read: a command and its options must exist. Commands on a configuration in `examples/` also have
  their keys, values and methods checked, and their privacy planned. Most would take minutes, other machines or data
  that is not here, so not all are run; `RUN` names those that are.
- `toml` and `ini` are read as what they configure, here or by the test that `TESTED` names.
- `python`, `csv`, `text` and shown output have a test of their own in `TESTED`.
"""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from pages.blocks import NAMES, ROOT, Block, blocks, lines
from sordino.algorithms import METHODS
from sordino.cli.app import app
from sordino.errors import DataError, RunError
from sordino.experiments.config import Experiment, load_config, parse_config
from sordino.experiments.privacy.plan import plan
from sordino.experiments.toml_tables import toml_value
from sordino.experiments.variants import grid
from sordino.private_tuning.settings import load_private_config

# Tests that run commands of a page, or a part of them, at its own words.
RUN = {
    "README.md": "tests/test_face.py::test_the_readme_runs",
    "docs/deploy.md": "tests/flare/test_provision.py::test_the_commands_of_the_page_on_deployment_make_a_kit",
    "docs/overview.md": "tests/test_docs.py::test_the_commands_of_the_overview_run",
    "docs/quickstart.md": "tests/pages/test_quickstart.py::test_three_commands_lead_from_a_clone_to_an_answer",
    "docs/sites.md": "tests/pages/test_outputs.py::test_a_site_says_what_the_page_shows",
    "docs/tutorial.md": "tests/test_docs.py::test_the_commands_of_the_tutorial_run",
}

OWN_PICTURES = "tests/test_docs.py::test_a_layout_of_ones_own_pictures_is_read_as_the_page_says"
NOTEBOOK = "tests/test_face.py::test_the_page_runs_as_a_notebook"
OUTPUTS = "tests/pages/test_outputs.py::"
TUTORIAL = RUN["docs/tutorial.md"]

# Blocks of other languages: how many of a page, and the test that runs them or compares them with what is printed.
TESTED: dict[tuple[str, str], list[str]] = {
    ("README.md", "python"): [RUN["README.md"]],
    ("docs/api.md", "python"): [OUTPUTS + "test_the_reference_prints_a_docstring"],
    ("docs/dp-fpl-paper.md", "python"): [OUTPUTS + "test_the_noise_of_the_dp_fpl_paper_is_accounted_as_shown"] * 3,
    ("docs/dp-fpl-paper.md", ""): [OUTPUTS + "test_the_noise_of_the_dp_fpl_paper_is_accounted_as_shown"] * 3,
    ("docs/install.md", ""): [OUTPUTS + "test_a_missing_extra_is_told_as_on_the_page"],
    ("docs/new-method.md", "python"): [
        "tests/test_docs.py::test_the_new_method_of_the_page_runs",
        "tests/experiments/test_method_files.py",
    ],
    ("docs/overview.md", ""): [OUTPUTS + "test_the_overview_shows_the_figures_of_the_results"] * 2,
    ("docs/own-pictures.md", ""): ["tests/tasks/test_overview.py::test_data_is_announced_as_on_the_page"] * 2,
    ("docs/own-pictures.md", "text"): [OWN_PICTURES] * 4,
    ("docs/own-pictures.md", "csv"): [OWN_PICTURES] * 2,
    ("docs/python.md", "python"): [NOTEBOOK] * 11,
    ("docs/quickstart.md", ""): [RUN["docs/quickstart.md"]],
    ("docs/recipes.md", "python"): [
        "tests/serving/test_recipes.py::test_the_recipe_for_transformers_answers_as_sordino",
        "tests/serving/test_recipes.py::test_the_recipe_for_open_clip_answers_as_sordino",
    ],
    ("docs/runs.md", "python"): ["tests/experiments/test_documented_files.py"] * 2,
    ("docs/secure-sum.md", "python"): ["tests/test_docs.py::test_the_secure_sum_of_the_page_runs"],
    ("docs/serving.md", ""): ["tests/serving/test_refusals.py::test_prompts_are_refused_as_on_the_page"] * 2,
    ("docs/serving.md", "python"): ["tests/serving/test_classifier.py::test_the_example_of_the_page_runs"],
    ("docs/sites.md", ""): [RUN["docs/sites.md"]] * 2,
    ("docs/tutorial.md", ""): [TUTORIAL] * 7,
    ("docs/tutorial.md", "csv"): [TUTORIAL],
    ("docs/deploy.md", "toml"): [
        "tests/flare/test_provision.py::test_the_page_on_deployment_names_every_key_and_its_project_is_valid"
    ],
    ("docs/deploy-flower.md", "toml"): [
        "tests/flower/test_server_files.py::test_the_projects_file_of_the_page_is_valid"
    ],
    ("docs/sites.md", "toml"): ["tests/sites/test_commands.py"],
}
READ_HERE = {"sh", "ini", "toml", "{eval-rst}"}  # the last by Sphinx: `make docs`


def test_every_block_is_covered() -> None:
    for page in NAMES:
        for language in {block.language for block in blocks(page)}:
            found, known = blocks(page, language), TESTED.get((page, language))
            if known is None:
                assert language in READ_HERE, f"{page}: nothing covers {found[0].first!r}"
            else:
                assert len(found) == len(known), (
                    f"{page}: {len(found)} blocks of {language!r}, {len(known)} are covered"
                )


def test_the_tests_that_cover_blocks_are_there_and_read_the_page() -> None:
    assert {page for page, _ in TESTED} | set(RUN) <= set(NAMES)
    for page, tests in [*((page, tests) for (page, _), tests in TESTED.items()), *((p, [t]) for p, t in RUN.items())]:
        for test in tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {name}" in text, test
            assert Path(page).name in text, f"{file} does not read {page}"


def parsed(arguments: list[str]) -> click.Context:
    """Read the arguments of `sordino` down to the last subcommand, as it would itself."""
    command: Any = typer.main.get_command(app)
    given, path = list(arguments), "sordino"
    while hasattr(command, "commands"):
        assert given, f"{path} has no subcommand"
        if given[0].startswith("-"):  # of `sordino` itself
            return command.make_context(path, given)
        # `sordino methods NAME` is short for `sordino methods show NAME`.
        name = "show" if path == "sordino methods" and given[0] != "new" else given.pop(0)
        assert name in command.commands, f"{path} has no {name!r}"
        command, path = command.commands[name], f"{path} {name}"
    return command.make_context(path, given)


PLANNED: set[str] = set()  # configurations whose plan was made


def check_sordino(arguments: list[str]) -> None:
    """Every subcommand, option and method exists; so do the keys and values for a configuration that is here."""
    context = parsed(arguments)
    chosen = context.params
    named = (chosen.get("algorithms") or "").split(",")
    assert all(name == "" or name in METHODS for name in named), arguments
    file = ROOT / str(chosen.get("config", ""))
    if not file.is_file() or chosen.get("method"):
        return
    overrides = list(chosen.get("overrides") or ())
    if file.name.startswith("private_"):
        load_private_config(file, overrides)
        return
    pairs = [text.partition("=") for text in chosen.get("vary") or ()]
    vary = {key: [toml_value(value) for value in values.split(",")] for key, _, values in pairs}
    try:
        config = load_config(file, overrides)
        variants = grid(config, [name for name in named if name] or [config.algorithm], vary)
        if not vary:
            for variant in variants:
                plan_privacy(variant.config)
    except (DataError, RunError):
        return  # pictures or a release that are not here; keys and values were read before


def plan_privacy(config: Experiment) -> None:
    """Whether a mechanism applies to a method and federation is known by its plan, which is made once for each."""
    if config.privacy.mechanism != "none" and repr(config) not in PLANNED:
        PLANNED.add(repr(config))
        plan(config)


def check_make(arguments: list[str]) -> None:
    """The target exists, and hands on what it is given; `ARGS` are those of the demo."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in arguments:
        if word.startswith("ARGS="):
            check_sordino(["demo", *shlex.split(word.removeprefix("ARGS="))])
        else:
            assert word in targets


def check_python(arguments: list[str]) -> None:
    """The script or module is here, and has the options."""
    if arguments[0] == "-m" and arguments[1] in ("venv", "pip", "build"):
        return
    place = f"src/{arguments[1].replace('.', '/')}.py" if arguments[0] == "-m" else arguments[0]
    text = (ROOT / place).read_text(encoding="utf-8")
    for word in arguments:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in text, f"{place} has no {word}"


def check_curl(arguments: list[str]) -> None:
    """The address is one of those that docs/serving.md lists; tests of the server ask them."""
    (address,) = (word for word in arguments if "://" in word)
    path = re.sub(r"^\w+://[^/]+|\?.*$", "", address)
    listed = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert re.sub("/prompts/[^/]+", "/prompts/NAME", path) in re.findall(r"^\| `\w+ (/[^`]+)`", listed, re.MULTILINE)


def check_flwr(arguments: list[str]) -> None:
    """Flower's own command has the options."""
    cli = pytest.importorskip("flwr.cli.app", reason="make install")
    command: Any = typer.main.get_command(cli.app).commands[arguments[0]]  # type: ignore[attr-defined]
    command.make_context("flwr", [word for word in arguments[1:] if not word.startswith(("$(", "flower", "app)"))])


def check_model_signing(arguments: list[str]) -> None:
    """The tool has the options; tests/serving/test_openssf.py runs it. Files need not be there."""
    command: Any = pytest.importorskip("model_signing._cli", reason="make install").main
    for name in arguments[:2]:
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("--")} <= known


def check_docker(arguments: list[str]) -> None:
    """A party's compose file has the service, and what is run in it is understood."""
    assert arguments[0] == "compose"
    words = [word for word in arguments[2:] if word not in ("--rm", "--detach")]
    assert arguments[1] in ("up", "run", "exec")
    assert (words == []) == (arguments[1] == "up"), "a party's file has one service"
    if words:
        assert list((ROOT / "deploy").glob(f"*/{words[0]}/compose.yaml"))
        check_line(words[1:])


def check_chmod(arguments: list[str]) -> None:
    """A mode and what it is for; tests/experiments/test_kept_private.py looks at what a run then shows."""
    mode, *_ = arguments
    assert re.fullmatch(r"[0-7]{3}", mode)
    assert int(mode, 8) & 0o700 == 0o700, "its owner keeps it"
    assert int(mode, 8) & 0o022 == 0, "nobody else writes it"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "sordino": check_sordino,
    "make": check_make,
    "python": check_python,
    "curl": check_curl,
    "flwr": check_flwr,
    "model_signing": check_model_signing,
    "docker": check_docker,
    "chown": lambda arguments: None,  # tests/engines/test_containers.py compares the user with the image's
    "chmod": check_chmod,
    "export": lambda arguments: None,
    "cd": lambda arguments: check_after(arguments[1:]),
}


def check_after(words: list[str]) -> None:
    """What follows `cd FOLDER`."""
    assert words[:1] in ([], ["&&"])
    if words:
        check_line(words[1:])


def check_line(words: list[str]) -> None:
    program = Path(words[0]).name
    assert program in CHECKS, f"nothing checks {shlex.join(words)!r}"
    CHECKS[program](words[1:])


@pytest.mark.parametrize("page", NAMES)
def test_commands_of_a_page_are_understood(page: str) -> None:
    for block in blocks(page, "sh"):
        for words in lines(block):
            check_line(words)


def test_commands_in_the_comments_of_examples_are_understood() -> None:
    told = 0
    for example in sorted((ROOT / "examples").glob("*.toml")):
        comments = [line[2:] for line in example.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        for line in "\n".join(comments).replace("\\\n", "").splitlines():
            if line.startswith("  sordino "):
                # A pair of brackets says what else could stand there.
                check_line(shlex.split(re.sub(r"\s+\(.*\)$", "", line)))
                told += 1
    assert told >= 7


def test_a_command_with_a_wrong_name_is_not_understood() -> None:
    for line in ("sordino privacy plan my.toml --oot x", "sordino prompts lst", "make demon", "python benchmarks/x.py"):
        with pytest.raises((click.UsageError, AssertionError, OSError)):
            check_line(shlex.split(line))
    with pytest.raises(Exception, match="settings.dp-fpl.rnk"):
        check_line(shlex.split("sordino run examples/digits.toml --set settings.dp-fpl.rnk=2"))


@pytest.mark.parametrize("page", [page for page in NAMES if blocks(page, "ini")])
def test_services_of_a_page_start_what_there_is(page: str) -> None:
    for block in blocks(page, "ini"):
        service = configparser.ConfigParser(interpolation=None)
        service.optionxform = str  # type: ignore[assignment,method-assign]
        service.read_string(block.text)
        assert service["Install"]["WantedBy"] == "multi-user.target", "else it cannot be enabled"
        assert service["Service"]["ReadWritePaths"] in service["Service"]["WorkingDirectory"], "the rest is read only"
        words = shlex.split(service["Service"]["ExecStart"])
        if Path(words[0]).name == "sordino":
            check_sordino(words[1:])
        else:
            assert words == ["/bin/bash", "startup/sub_start.sh", "--once"]  # of a kit; its own test runs it


BASE = {"algorithm": "dp-fpl", "data": {"source": "digits"}, "partition": {"scheme": "iid", "clients": 2}}


@pytest.mark.parametrize(
    "block",
    [block for page in NAMES if (page, "toml") not in TESTED for block in blocks(page, "toml")],
    ids=lambda block: f"{block.page} {block.first}",
)
def test_tables_of_a_page_are_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole configuration, or a part that is laid over a small one."""
    tables = tomllib.loads(block.text)
    if "project" in tables:
        assert list(tables["project"]["entry-points"]) == ["sordino.methods"]
        return
    monkeypatch.chdir(tmp_path)
    if "methods" in tables:
        (tmp_path / "variants").mkdir()
        target = tmp_path / tables["methods"]["mine"]
        made = [sys.executable, "-m", "sordino", "methods", "new", "mine", "--from", "dp-fpl"]
        subprocess.run(made, cwd=tmp_path / "variants", check=True, capture_output=True)
        assert target.is_file()
        monkeypatch.setattr("sordino.algorithms.METHODS", dict(METHODS))
        (tmp_path / "mine.toml").write_text(
            block.text + '[data]\nsource = "digits"\n[partition]\nscheme = "iid"\nclients = 2\n'
        )
        assert load_config(tmp_path / "mine.toml").algorithm == "mine"
        return
    parse_config(BASE | tables)
