"""Whatever is typed, configured or found in a folder: an exit code of 0, 1 or 2, one line that helps, no traceback."""

from __future__ import annotations

import io
import json
import os
import pwd
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from private_tuning.small_task import write_private_config
from sordino.algorithms import METHODS, algorithm
from sordino.cli.app import invoke
from sordino.cli.console import run_command
from sordino.encoders import cache
from sordino.errors import SordinoWarning
from sordino.experiments.config import EncoderSettings, Experiment, load_config
from sordino.experiments.run import run
from sordino.experiments.started import Line, begin_lines
from sordino.privacy.settings import PrivacySettings
from sordino.private_tuning import settings as private
from sordino.runtime.settings import RuntimeSettings
from sordino.tasks.settings import DataSettings, PartitionSettings, PoisoningSettings

ODD = [
    *("0", "-1", "1", "2147483648", str(10**18), str(10**30), "1e300", "1e-300", "-0.0", "inf", "-inf", "nan", "true"),
    *("''", "'x'", "[]", "[1, 'a']", "{}", "{a = 1}", "1979-05-27", "'\\u0000'", "\udcff", "\U0001f3bb"),
    *("x" * 5000, "9" * 5000, "[" * 5000),
]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As they were: a command takes them over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def sordino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: its exit code, standard output, and the last line of standard error."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("stdout", "stderr")}
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            code = run_command(lambda: invoke([str(argument) for argument in arguments]))
        out, said = (os.fsdecode(stream.buffer.getvalue()) for stream in streams.values())
        assert code in (0, 1, 2)
        lines = said.strip().splitlines()
        assert lines or out or not code
        assert not (code and lines) or len(lines[-1]) < 2000
        return code, out, lines[-1] if lines else ""

    return command


TABLES: dict[str, type[BaseModel]] = {
    "": Experiment,
    "data.": DataSettings,
    "partition.": PartitionSettings,
    "encoder.": EncoderSettings,
    "runtime.": RuntimeSettings,
    "privacy.": PrivacySettings,
    "poisoning.": PoisoningSettings,
}
KEYS = [prefix + name for prefix, table in TABLES.items() for name in table.model_fields]


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_no_value_of_a_key_makes_a_plan_crash(key: str, config_file: Path, sordino) -> None:
    """And what is printed as JSON is JSON: strict readers know neither Infinity nor NaN."""
    base = ["--set", "privacy.mechanism='dp-sgd'"] if key.startswith("privacy.") else []
    base += ["--set", "privacy.noise_multiplier=1.0"] if key.startswith("privacy.") else []
    base += ["--set", "poisoning.target='red apple'"] if key.startswith("poisoning.") else []
    for value in ODD:
        code, out, said = sordino("privacy", "plan", config_file, *base, "--set", f"{key}={value}", "--json")
        if code:
            assert said.startswith("sordino: "), (value, said)
            assert out == ""
        else:
            json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            assert sordino("privacy", "plan", config_file, *base, "--set", f"{key}={value}")[0] == 0


PRIVATE_TABLES = {"seed": private.PrivateTuning, "task.": private.TaskSettings, "prompt.": private.PromptSettings}
PRIVATE_TABLES |= {"search.": private.SearchSettings, "model.": private.ModelSettings}
PRIVATE_KEYS = ["seed", *(p + name for p, t in PRIVATE_TABLES.items() if p != "seed" for name in t.model_fields)]


@pytest.fixture
def private_file(tmp_path: Path) -> Path:
    """A configuration of `tune-private` whose search takes no time."""
    return write_private_config(tmp_path, generations=0)


@pytest.mark.filterwarnings("ignore::sordino.errors.SordinoWarning")  # of words that the tower does not know
@pytest.mark.slow
@pytest.mark.parametrize("key", PRIVATE_KEYS)
def test_no_value_of_a_key_makes_private_tuning_crash(key: str, private_file: Path, tmp_path: Path, sordino) -> None:
    for number, value in enumerate(ODD):
        if key == "search.generations" and value in ("2147483648", str(10**18)):
            continue  # as long as was asked for
        code, _, said = sordino(
            "tune-private", private_file, "--clear", "--set", f"{key}={value}", "--out", tmp_path / str(number)
        )
        assert code == 0 or said.startswith("sordino: "), (value, said)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_setting_of_a_method_makes_a_run_crash(name: str, config_file: Path, tmp_path: Path, sordino) -> None:
    """Numbers that are far too large or small, in a round of training."""
    numbers = [each.name for each in fields(algorithm(name).Settings) if re.search(r"\b(int|float)\b", str(each.type))]
    for key in [*numbers, "optimizer.learning_rate", "optimizer.momentum"]:
        if key == "local_steps":
            continue  # as long as was asked for
        for value in ("0", "-1", "1e300", "1e-300", "2147483647", str(10**18), "inf", "nan", "'x'"):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            overrides = ["--set", f"algorithm={name}", "--set", "rounds=1", "--set", f"settings.{name}.{key}={value}"]
            code, _, said = sordino("run", config_file, *overrides, "--out", tmp_path / "out")
            assert code == 0 or said.startswith("sordino: "), (key, value, said)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    # UTF-16 by its first bytes, and an odd number of them: an error whose `repr` has all of them.
    "not text": lambda content: b"\xff\xfe" + content[: len(content) // 2 * 2] + b"x",
    "null": lambda content: b"null\n",
    "list": lambda content: b"[]\n",
    "object": lambda content: b"{}\n",
    "text": lambda content: b'"x"\n',
    "deep": lambda content: b"[" * 20000,
    "odd line": lambda content: b'{"round": "x"}\n' + content,
    "directory": lambda content: b"",
}
FILES = ["config.toml", "data.json", "metrics.jsonl", "ledger.json", "summary.json", "checkpoint/latest.json"]
FILES += ["audit.json", "report.html", "prompts/shared.safetensors", ".lock"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A folder with a configuration and a finished run of it, which was audited."""
    folder = tmp_path_factory.mktemp("finished")
    for shade, name in enumerate(("red", "green", "blue")):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (9, 9), (80 * shade, number, 99)).save(folder / "pictures" / name / f"{number}.png")
    (folder / "config.toml").write_text(f"""
        algorithm = "promptfl"
        rounds = 2
        device = "cpu"
        [data]
        source = "imagefolder:{folder}/pictures"
        [partition]
        scheme = "iid"
        clients = 2
        [encoder]
        name = "clip"
        checkpoint = "{clip_folder}"
        [settings]
        context_length = 2
    """)
    run(load_config(folder / "config.toml"), folder / "run")
    from sordino.audit.run import audit

    audit(folder / "run", ["inversion"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_run_costs_no_traceback_and_no_other_file(
    name: str, finished: Path, tmp_path: Path, sordino: Any
) -> None:
    """Whatever became of one file; what a command refuses, it leaves as it is."""
    for title, damage in DAMAGES.items():
        for command in ("run", "compare", "audit", "report", "ledger"):
            folder = tmp_path / "copy"
            shutil.rmtree(folder, ignore_errors=True)
            place = folder / "promptfl" / "seed-0" if command == "compare" else folder
            shutil.copytree(finished / "run", place)
            if command == "compare":
                begin_lines(folder, [Line("promptfl", "promptfl", (0,))])
            file = place / name
            content = file.read_bytes() if file.exists() else b""
            file.unlink(missing_ok=True)
            file.mkdir() if title == "directory" else file.write_bytes(damage(content))
            if command in ("run", "compare") and name != "summary.json":
                (place / "summary.json").unlink()
            kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
            arguments: dict[str, list[object]] = {
                "run": ["run", finished / "config.toml", "--resume", "--out", folder],
                "compare": [
                    *("compare", finished / "config.toml", "--algorithms", "promptfl", "--seeds", 1),
                    *("--resume", "--out", folder, "--json"),
                ],
                "audit": ["audit", folder, "--attacks", "inversion"],
                "report": ["report", folder],
                "ledger": ["privacy", "ledger", folder, "--json"],
            }
            code, _, said = sordino(*arguments[command])
            assert code in (0, 2), (title, command)
            if code == 2:
                assert said.startswith("sordino: "), (title, command, said)
                for path, before in kept.items():
                    if path.parent.name == "prompts":
                        continue  # written again with the same tensors, where only the report could not be
                    assert path.read_bytes() == before, (title, command, path)


def test_a_summary_that_was_cut_is_made_again(finished: Path, tmp_path: Path, sordino: Any) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    whole = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    prompt = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "summary.json").write_bytes((tmp_path / "run" / "summary.json").read_bytes()[:99])
    assert sordino("run", finished / "config.toml", "--resume", "--out", tmp_path / "run")[0] == 0
    again = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    for key in ("accuracy", "per_client", "privacy", "communication", "rounds"):
        assert again[key] == whole[key]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == prompt


@pytest.mark.parametrize("round_lost", [0, 1, 2])
def test_a_line_that_is_missing_from_the_metrics_is_told(
    round_lost: int, finished: Path, tmp_path: Path, sordino: Any
) -> None:
    """What crossed the wire, and the seconds, would be stated too low."""
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    left = b"".join(lines[:round_lost] + lines[round_lost + 1 :])
    file.write_bytes(left)
    code, _, said = sordino("run", finished / "config.toml", "--resume", "--out", tmp_path / "run")
    assert (code, f"lacks round {round_lost}" in said) == (2, True)
    assert file.read_bytes() == left


COMMANDS = ["run CONFIG", "compare CONFIG --algorithms local --seeds 1", "privacy plan CONFIG", "tune-private CONFIG"]
PLACES = ["directory", "empty", "missing", "n" * 300, "file/below", "binary", "~nobody/x", "\udcff"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", PLACES)
def test_files_that_are_none(command: str, place: str, finished: Path, tmp_path: Path, sordino: Any) -> None:
    """As a configuration, as an output, and as a source."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "file").touch()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    code, _, said = sordino(*(place if word == "CONFIG" else word for word in command.split()))
    assert code == 2
    assert said
    words = [finished / "config.toml" if word == "CONFIG" else word for word in command.split()]
    if "tune-private" not in command:
        for source in (f"imagefolder:{place}", f"hf:./{place}"):
            code, _, said = sordino(*words, "--set", f"data.source={source}", "--out", tmp_path / "o")
            assert code == 2
            assert said.startswith("sordino: ")
    for other in ("audit", "report", "privacy ledger"):
        code, _, said = sordino(*other.split(), place)
        assert code == 2, (other, said)
    if "tune-private" not in command:
        code, _, said = sordino(*words, "--set", "rounds=1", "--out", tmp_path / place)
        assert code == 0 or said.startswith("sordino: ")


BYTES = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf8(finished: Path, tmp_path: Path, sordino: Any) -> None:
    """Of pictures and outputs: the run finishes. Of a class's or the source's folder: a line says what to rename."""
    source = tmp_path / "pictures"
    shutil.copytree(finished / "pictures", source)
    try:
        (source / "red" / "0.png").rename(source / "red" / f"{BYTES}.png")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such names")
    (source / "red" / f"{BYTES} broken.png").write_bytes(b"x")
    base = ["run", finished / "config.toml", "--set", "rounds=1"]
    out = tmp_path / BYTES / "run"
    assert sordino(*base, "--set", f"data.source=imagefolder:{source}", "--out", out)[0] == 0
    assert (out / "report.html").exists()
    assert sordino("audit", out, "--attacks", "inversion")[0] == 0
    (skipped,) = json.loads((out / "summary.json").read_bytes())["images"]["skipped"]
    assert skipped["name"] == f"red/{BYTES} broken.png"
    code, _, said = sordino("report", tmp_path / BYTES)
    assert code == 0, said
    (source / "red").rename(source / BYTES)
    code, _, said = sordino(*base, "--set", f"data.source=imagefolder:{source}", "--out", tmp_path / "b")
    assert (code, "is not UTF-8 text; rename the folder" in said) == (2, True)
    (source / BYTES).rename(source / "red")
    source.rename(tmp_path / f"p{BYTES}")
    code, _, said = sordino(*base, "--set", f"data.source=imagefolder:{tmp_path}/p{BYTES}", "--out", tmp_path / "b")
    assert (code, said.startswith("sordino: data.source = ")) == (2, True)
    assert not (tmp_path / "b").exists()


def test_a_user_without_a_home_goes_on_without_a_cache(
    finished: Path, tmp_path: Path, sordino: Any, monkeypatch
) -> None:
    def unknown(_: object) -> None:
        raise KeyError

    for name in ("HOME", "SORDINO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    cache._warn_homeless.cache_clear()
    commands = [("run", finished / "config.toml", "--out", tmp_path / str(number)) for number in range(2)]
    with pytest.warns(SordinoWarning, match="no home directory.*set SORDINO_CACHE") as warned:
        assert [sordino(*words)[0] for words in commands] == [0, 0]
    assert len([each for each in warned if each.category is SordinoWarning]) == 1
    assert sordino("doctor")[0] in (0, 1)
    for key in ("data.source=imagefolder:~/x", "encoder.checkpoint=~/x"):
        code, _, said = sordino("run", finished / "config.toml", "--set", key, "--out", tmp_path / "new")
        assert (code, "no such home directory" in said) == (2, True)


SPEAKING = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "latin-1"},
]


@pytest.mark.slow
@pytest.mark.parametrize("environment", SPEAKING, ids=lambda each: next(iter(each)))
def test_a_finished_run_is_told_in_any_encoding(environment: dict[str, str], finished: Path, tmp_path: Path) -> None:
    """When it ends. ASCII alone is asked for what is told of it later, too, where fewest letters can be written."""
    command = [sys.executable, "-m", "sordino", "run", str(finished / "config.toml")]
    command += ["--set", "privacy.mechanism='dp-sgd'", "--set", "privacy.epsilon=8.0", "--set", "privacy.delta=0.01"]
    command += ["--out", str(tmp_path / "run")]
    later = [["--resume"], ["--resume", "--json"]] if environment == SPEAKING[0] else []
    for more in ([], *later):
        done = subprocess.run([*command, *more], env=os.environ | environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        if "--json" in more:
            assert json.loads(done.stdout)["rounds"] == 2
        else:
            assert (b"+-" in done.stdout) == (environment != SPEAKING[2])  # latin-1 has the sign
            assert b"epsilon = " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("output", ["closed pipe", "closed", "full"])
def test_output_that_nobody_takes(output: str, tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m sordino methods"
    redirected = {"closed pipe": "| head -c 1", "closed": ">&-", "full": "> /dev/full"}[output]
    if output == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    script = f"{command} {redirected}; echo ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    *said, code = done.stderr.strip().splitlines()
    assert (int(code), said) in [(1, []), (0, []), (2, ["sordino: No space left on device"])]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 100, 3000, 20000])
def test_a_full_disk_is_told_and_costs_nothing(limit: int, finished: Path, tmp_path: Path, sordino: Any) -> None:
    """A limit on the size of files stands for it: each write fails as on a full disk. Afterwards, the run goes on."""

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ["run", str(finished / "config.toml"), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "sordino", *words]
    done = subprocess.run(command, preexec_fn=full, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr.splitlines()[-1] or limit == 0  # then not even the libraries start
    code, _, said = sordino(*words, "--resume")
    assert code == 0, said


WORDS = [
    *(
        "run",
        "compare",
        "predict",
        "transfer",
        "report",
        "audit",
        "methods",
        "encoders",
        "privacy",
        "plan",
        "ledger",
        "mpc",
    ),
    *("tune-private", "provide", "server", "--out", "--set", "--json", "--resume", "--seeds", "--help", "--clear"),
    *("--vary", "--top", "--encoder", "-", "--"),
    *("c.toml", "rounds=1", "=", "a.b.c=1", "promptfl", "0", "-1", "1e9", ".", "/", "/dev/null", "\udcff", "\0"),
]


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=6))
def test_no_command_line_makes_a_traceback(arguments: list[str], tmp_path: Path, sordino: Any) -> None:
    sordino(*arguments)
