"""What a configuration gets wrong is refused before anything heavy is imported, with the nearest name that is right."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError

from sordino.algorithms import METHODS, algorithm, settings_type
from sordino.cli.app import invoke
from sordino.cli.demo import variants
from sordino.errors import ConfigError, SordinoWarning, config_error, nearest
from sordino.experiments.config import check_places, load_config

HEAVY = ("torch", "dp_accounting", "transformers", "datasets", "sklearn", "PIL", "cma", "numba")

# Runs commands one after another; after each, says how it ended and what of HEAVY is imported by then.
RUNNER = f"""
import contextlib, io, json, sys
from sordino.cli.app import invoke
from sordino.cli.console import run_command
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run_command(lambda: invoke(arguments))
    print(json.dumps([code, said.getvalue(), [name for name in {HEAVY} if name in sys.modules]]))
"""

CONFIG = """
algorithm = "dp-fpl"
[data]
source = "digits"
[partition]
scheme = "iid"
clients = 2
"""
PRIVATE = """
[task]
kind = "images"
source = "imagefolder:pictures"
[prompt]
initial = "a photo of a"
"""

# Commands in a folder with c.toml, p.toml, table.csv, pictures/ and used/, and what they are told.
REFUSED: dict[str, str] = {
    # keys
    "run c.toml --set ruonds=3": "ruonds = 3: no such key; did you mean 'rounds'?",
    "run c.toml --set zz=3": "zz = 3: no such key; choose from algorithm, rounds, seed, device, data, ",
    "run c.toml --set privacy.epsilom=8": "privacy.epsilom = 8: no such key; did you mean 'epsilon'?",
    "run c.toml --set poisoning.tagret=x": "poisoning.tagret = 'x': no such key; did you mean 'target'?",
    "run c.toml --set settings.dp-fpl.rnak=3": "settings.dp-fpl.rnak = 3: no such key; did you mean 'rank'?",
    "run c.toml --set settings.dplora.rnak=3": "settings.dplora.rnak = 3: no such key; did you mean 'rank'?",
    "run c.toml --set settings.optimizer.lerning_rate=1": "no such key; did you mean 'learning_rate'?",
    "run c.toml --set settings.local_step=1": "not a setting of any method; dp-fpl has context_length, ",
    "run c.toml --set settings.dpfpl.rank=1": "did you mean 'dp-fpl'?",
    "compare c.toml --algorithms local --vary privcy.epsilon=1,2": "no such key; did you mean 'privacy'?",
    "run c.toml --set tracking.too=mlflow": "tracking.too = 'mlflow': no such key; did you mean 'to'?",
    "run c.toml --set methods.mine.fil=mine.py": "methods.mine.fil = 'mine.py': no such key; did you mean 'file'?",
    "compare c.toml --algorithms local,dp-fpl --vary settings.local_stpes=1,2 --equal-steps": "not a setting of any",
    "privacy plan c.toml --set data.sorce=digits": "data.sorce = 'digits': no such key; did you mean 'source'?",
    "demo --set settings.dp-fpl.rnak=3": "settings.dp-fpl.rnak = 3: no such key; did you mean 'rank'?",
    "tune-private p.toml --set search.wdith=3": "search.wdith = 3: no such key; did you mean 'width'?",
    # values
    "run c.toml --set rounds=0": "rounds = 0: input should be greater than or equal to 1",
    "run c.toml --set algorithm=dpfpl": "did you mean 'dp-fpl'?",
    "run c.toml --set settings.dp-fpl.rank=17": "rank = 17: must be at most context_length = 16",
    "run c.toml --set algorithm=secfpp --set settings.smallest_cluster=2": "= 2: must be 0, or 3 or more",
    # A budget is asked for, and nothing would keep it.
    "run c.toml --set privacy.epsilon=8": "privacy.epsilon = 8.0: needs privacy.mechanism, such as 'statistics'; ",
    "compare c.toml --algorithms local --vary privacy.epsilon=8,2": "privacy.epsilon = 8.0: needs privacy.mechanism",
    "run c.toml --set privacy.noise_multiplier=1": "privacy.noise_multiplier = 1.0: needs privacy.mechanism",
    "run c.toml --set privacy.mechanism=dp-sgd": "privacy.epsilon = None: mechanism 'dp-sgd' needs epsilon",
    "run c.toml --set tracking.to=wandb": "tracking.to = 'wandb': input should be 'tensorboard' or 'mlflow'",
    "compare c.toml --algorithms local,promptlf": "not a method; choose from zero-shot",
    "compare c.toml --algorithms local --vary rounds=1,0": "rounds = 0: input should be greater than or equal to 1",
    "compare c.toml --algorithms local --set privacy.mechanism=dp-sgd --vary privacy.epsilon=-1,8": "epsilon = -1: ",
    "privacy plan c.toml --set partition.clients=0": "partition.clients = 0: ",
    "tune-private p.toml --set search.population=1": "search.population = 1: ",
    # folders and files
    "run none.toml": "CONFIG = 'none.toml': no such file",
    "run c.toml --set data.source=imagefolder:pitcures": "pitcures'; did you mean 'pictures'?",
    "run c.toml --set data.source=imagefolder:x": "x'; give a folder laid out as ROOT/CLASS/picture.jpg",
    "run c.toml --set data.source=imagefolder:pacs": "pacs'; get PACS (Li et al., 2017), from https://domaingeneral",
    "run c.toml --set data.source=table:tabel.csv": "tabel.csv: cannot be read: No such file or directory; did you",
    "run c.toml --method mine.py": "mine.py': no such file; `sordino methods new NAME --from dp-fpl` writes one",
    "run c.toml --set data.source=hf:./x": "there is no such file or folder",
    "run c.toml --set data.persons=x.csv": "x.csv' cannot be read: No such file or directory",
    "run c.toml --set encoder.name=clip --set encoder.checkpoint=./x": "checkpoint './x': no such folder; give ",
    "run c.toml --set encoder.checkpoint=./x": "encoder.checkpoint = './x': encoder.name = 'bundled' has none; set it",
    "demo --set encoder.checkpoint=./x": "encoder.checkpoint = './x': encoder.name = 'bundled' has none; set it",
    # options that would do nothing
    "predict p.safetensors pictures --most-tokens 3": "--most-tokens = 3: goes with --generate",
    "predict p.safetensors pictures --generate --top 3": "--top = 3: is for classes",
    "transfer p.safetensors --to digits --seed 3": "--seed = 3: goes with --per-class",
    "run c.toml --out used": "used exists; go on with --resume, or choose another --out",
    "compare c.toml --algorithms local --out used": "used exists; go on with --resume, or choose another --out",
    "compare c.toml --algorithms local,dp-fpl --equal-steps --out used": "used exists; go on with --resume, or choose ",
    "compare c.toml --algorithms local --set data.source=imagefolder:x": "there is no folder",
    "privacy plan c.toml --set data.source=imagefolder:x": "there is no folder",
    "privacy plan c.toml --set data.source=table:x.csv": "x.csv: cannot be read: No such file or directory",
    "tune-private p.toml --set task.source=imagefolder:pitcures": "pitcures'; did you mean 'pictures'?",
    "run c.toml --out c.toml": "c.toml cannot be written, as it is no folder; choose another --out",
    "audit x": "x holds no finished run (there is no such directory)",
    "run c.toml --set data.source=x": "data.source = 'x': must be 'digits', 'textile', ",
}
STATISTICS = "run c.toml --set privacy.mechanism=statistics --set privacy.epsilon=8 "
REFUSED |= {
    STATISTICS + "--set privacy.release=x": "there is no folder",
    STATISTICS + "--set privacy.subspace=4 --set privacy.directions=images --set data.public=x": "there is no folder",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each command of REFUSED with its exit code, standard error, and what was imported by then."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "c.toml").write_text(CONFIG)
    (folder / "p.toml").write_text(PRIVATE)
    (folder / "table.csv").write_text("file,label\n")
    (folder / "pictures").mkdir()
    (folder / "used").mkdir()
    (folder / "used" / "file").touch()
    commands = json.dumps([command.split() for command in REFUSED])
    runner = [sys.executable, "-c", RUNNER]
    done = subprocess.run(runner, input=commands, cwd=folder, capture_output=True, text=True, check=True)
    assert {path.name for path in folder.iterdir()} == {"c.toml", "p.toml", "table.csv", "pictures", "used"}
    return dict(zip(REFUSED, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("command", "message"), REFUSED.items(), ids=list(REFUSED))
def test_a_wrong_configuration_is_refused_without_heavy_imports(
    command: str, message: str, answers: dict[str, Any]
) -> None:
    code, said, imported = answers[command]
    assert code == 2
    assert said.startswith("sordino: ")
    assert said.count("\n") == 1
    assert message in said
    assert imported == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("publish x.safetensors --ledger x.json --name a", "RUN = 'x.safetensors': no such file or directory; give a "),
        ("site check none.toml", "SITE.toml = 'none.toml': no such file"),
        ("flower up none.toml", "none.toml': no such file"),
        ("flare provision none.toml --out kits", "PROJECT.toml = 'none.toml': no such file"),
        ("flower node {site} --server fl.example.org:99999 --ca {site} --key {key}", "write host:port, e.g. "),
        ("flower node {site} --server https://fl.example.org:8443 --ca {site} --key {key}", "write host:port, e.g. "),
        ("flower node {site} --server fl.example.org:8443 --ca {site} --key {key}", "site.toml': holds no certificate"),
        ("methods new mine --from promptfl", "NAME = 'mine': mine.py is here already"),
    ],
)
def test_an_argument_is_named_as_the_command_has_it(
    command: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    assert invoke(["site", "init", "site.toml", "--name", "north", "--source", "digits"]) == 0
    assert invoke(["flower", "key", "node"]) == 0
    assert invoke(command.format(site="site.toml", key="node").split()) == 2
    assert message in capsys.readouterr().err


def test_a_command_that_is_told_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my site.toml"
    assert invoke(["site", "init", str(file), "--name", "north", "--source", "digits"]) == 0
    *_, command = capsys.readouterr().out.strip().partition("sordino ")
    assert shlex.split(command) == ["site", "check", str(file)]


def test_a_checkpoint_that_is_not_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    config = load_config(tmp_path / "c.toml", {"encoder.checkpoint": "my-clip"})
    with pytest.warns(SordinoWarning, match="'my-clip' is not used: encoder.name = 'bundled'; .* clip or generative"):
        check_places(config)


def test_a_key_is_told_without_the_types_that_its_value_may_have(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    with pytest.raises(ConfigError, match=r"^data\.class_names = 'a': "):
        load_config(tmp_path / "c.toml", {"data.class_names": "a"})


def test_a_table_that_is_missing_is_named_without_all_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('algorithm = "promptfl"\n[data]\nsource = "digits"\n')
    with pytest.raises(ConfigError, match=r"^partition = None: is needed; give it a value$"):
        load_config(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match=r"^data\.source = None: is needed; give it a value$"):
        load_config(tmp_path / "c.toml", {"data": {}, "partition": {"scheme": "iid", "clients": 2}})


@pytest.mark.slow
def test_what_is_right_is_not_refused_and_then_imports_what_it_needs(tmp_path: Path) -> None:
    """Or else the test above would hold for a command that does nothing."""
    (tmp_path / "c.toml").write_text(CONFIG)
    noise = ["privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1"]
    command = json.dumps([["privacy", "plan", "c.toml", *(part for each in noise for part in ("--set", each))]])
    runner = [sys.executable, "-c", RUNNER]
    done = subprocess.run(runner, input=command, cwd=tmp_path, capture_output=True, text=True, check=True)
    code, _, imported = json.loads(done.stdout)
    assert code == 0
    assert {"torch", "dp_accounting"} <= set(imported)


def test_a_finished_run_is_shown_when_its_pictures_are_gone(clip_folder: Path, tmp_path: Path, capsys) -> None:
    for name in ("red", "green"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (9, 9), (99, number, 99)).save(tmp_path / "pictures" / name / f"{number}.png")
    (tmp_path / "c.toml").write_text(CONFIG)
    settings = ["algorithm=zero-shot", f"data.source=imagefolder:{tmp_path}/pictures", "encoder.name=clip"]
    settings += [f"encoder.checkpoint={clip_folder}", "device=cpu"]
    command = ["run", str(tmp_path / "c.toml"), *(part for each in settings for part in ("--set", each)), "--json"]
    command += ["--out", str(tmp_path / "run")]
    assert invoke(command) == 0
    first = capsys.readouterr().out
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    assert invoke([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(first)
    assert invoke([*command[:-1], str(tmp_path / "new")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.own])
def test_a_method_takes_the_settings_that_a_configuration_is_checked_with(name: str) -> None:
    assert algorithm(name).Settings is settings_type(name)


def test_settings_of_all_methods_are_imported_without_torch() -> None:
    code = (
        "import sys\nfrom sordino.algorithms import METHODS, settings_for\n"
        "for name in [name for name, method in METHODS.items() if method.own]: settings_for(name, {})\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_nearest_name_is_one_that_is_known() -> None:
    assert nearest("rnak", ["clip", "rank", "rate"]) == "; did you mean 'rank'?"
    assert nearest("rank", []) == ""
    assert nearest("FedOTP", ["fedotp", "promptfl"]) == "; did you mean 'fedotp'?"
    assert nearest("xyz", ["clip", "rank", "rate"]) == ""


class Inner(BaseModel, extra="forbid"):
    """A table within a table, whose key is looked for there and not above."""

    width: int = 1


class Outer(BaseModel, extra="forbid"):
    """A table, with another one that may be absent."""

    widht: int = 1
    inner: Inner | None = None
    needed: int


def test_a_wrong_key_is_compared_with_the_keys_of_its_own_table() -> None:
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(Outer).validate_python({"inner": {"widthh": 1}})
    # The wrong key is told, not the one that is missing.
    assert str(config_error(raised.value, Outer, "table")) == (
        "table.inner.widthh = 1: no such key; did you mean 'width'?"
    )


class Named(BaseModel, extra="forbid", strict=True):
    """A value of two types, and a table under names of the user's own."""

    names: list[str] | dict[str, str] | None = None
    inner: dict[str, Inner] = {}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        # The type that the value comes nearest to is meant, and its name is no part of the key.
        ({"names": {"cat": 3}}, "table.names.cat = 3: input should be a valid string"),
        ({"names": ["cat", 3]}, "table.names.1 = 3: input should be a valid string"),
        ({"names": 3}, "table.names = 3: input should be a valid list or a valid table"),
        ({"names": {"a[1]": 3}}, "table.names.a[1] = 3: input should be a valid string"),
        ({"names": {4: "x"}}, "table.names.4 = 4: input should be a valid string"),
        # A user's key that looks like such a name is told.
        ({"inner": {"a]": {"widthh": 1}}}, "table.inner.a].widthh = 1: no such key; did you mean 'width'?"),
        ({"inner": {"list[str]": {"width": []}}}, "table.inner.list[str].width = []: input should be a valid integer"),
        ({"wrong)": 1}, "table.wrong) = 1: no such key; choose from names, inner"),
    ],
)
def test_the_key_of_an_error_is_the_whole_key_and_nothing_else(tables: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(Named).validate_python(tables)
    assert str(config_error(raised.value, Named, "table")) == said


def test_version(capsys) -> None:
    import sordino

    assert invoke(["--version"]) == 0
    assert capsys.readouterr().out == f"sordino {sordino.__version__}\n"


def test_the_quick_demo_tells_the_same_in_small() -> None:
    """The same lines, of less: rounds, clients and pictures; what a user sets goes before."""
    full, quick = variants(False, []), variants(True, [])
    assert [(line.folder, line.shadows) for line in full] == [(line.folder, line.shadows) for line in quick]
    for large, small in zip(full, quick, strict=True):
        assert small.config.rounds < large.config.rounds
        assert small.config.partition.clients < large.config.partition.clients
        assert small.config.data.train_per_class is not None
        assert large.config.privacy == small.config.privacy
    assert all(line.config.rounds == 3 for line in variants(True, ["rounds=3"]))
