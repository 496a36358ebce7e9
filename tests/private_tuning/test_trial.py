"""`sordino mpc try`: what a trial cuts, the recipe that it prints, and real processes that end with it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mpc.small_bert import distilled
from ports import free_port
from sordino.cli.app import app
from sordino.errors import ConfigError, RunError
from sordino.mpc.parties.certificates import ROLES
from sordino.private_tuning.settings import load_private_config, parse_private_config
from sordino.private_tuning.trial import HOSTS, SENTENCES, TESTS, Parties, Trial, recipe, run_trial, trial_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "private_messages.toml"
LISTENING = ("dealer", "server-0", "server-1")


def text_task(folder: Path, count: int, **search: int) -> Path:
    """A configuration of two classes, each with `count` examples."""
    rows = [
        f"a {word} film {number}\t{label}" for number in range(count) for label, word in enumerate(("dull", "fine"))
    ]
    (folder / "data.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    file = folder / "private.toml"
    lines = [f"{key} = {value}" for key, value in search.items()]
    file.write_text(
        f'[task]\nkind = "text"\ntrain = "{folder}/data.tsv"\ntest = "{folder}/data.tsv"\n'
        'label_names = ["bad", "good"]\ndescriptions = ["a bad film", "a good film"]\n'
        f'shots = {min(count, 16)}\n[prompt]\nlength = 1\ninitial = "film"\n[search]\nkeep_norms = true\n'
        + "\n".join(lines)
    )
    return file


def cut(file: Path) -> tuple[Trial, dict[str, int]]:
    settings = load_private_config(file)
    trial = trial_of(file, settings, [], False, None, None)
    return trial, {key: int(value) for key, _, value in (side.partition("=") for side in trial.shorter)}


def test_a_trial_of_sentences_is_short(tmp_path: Path) -> None:
    trial, values = cut(text_task(tmp_path, 40, width=4, population=16, generations=300))
    assert values["task.test_limit"] == TESTS
    sentences = values["search.population"] * values["search.generations"] * 2 * (values["task.shots"] + 1)
    assert SENTENCES / 2 <= sentences <= SENTENCES
    assert values["search.generations"] >= 2
    assert "search.generations = " in " ".join(trial.cuts)
    assert "instead of 300" in " ".join(trial.cuts)
    assert trial.calibration


def test_what_is_short_is_not_cut(tmp_path: Path) -> None:
    """Nor is it made longer, and no more test examples are asked for than there are."""
    trial, values = cut(text_task(tmp_path, 4, width=2, population=5, generations=1))
    assert values == {"task.shots": 4, "search.population": 5, "search.generations": 1}
    assert [name for name in trial.cuts if " = " in name] == []
    load_private_config(trial.config, trial.shorter)


def test_whole_is_whole(tmp_path: Path) -> None:
    file = text_task(tmp_path, 40, generations=300)
    trial = trial_of(file, load_private_config(file), ["seed=3"], True, None, None)
    assert (trial.shorter, trial.calibration, trial.cuts, trial.overrides) == ((), None, (), ("seed=3",))
    few = trial_of(file, load_private_config(file), [], True, None, None, 300)
    assert (few.shorter, few.calibration, few.cuts) == ((), 300, ())


@pytest.mark.parametrize("classes", [2, 150])
def test_a_trial_of_pictures_is_short(tmp_path: Path, classes: int) -> None:
    """Its cost on shares is that of class names; with many classes, a generation has fewer candidates."""
    for name in range(classes):
        (tmp_path / "pictures" / f"class {name}").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / f"class {name}" / f"{number}.png")
    tables = {
        "task": {"kind": "images", "source": f"imagefolder:{tmp_path}/pictures", "shots": 2},
        "prompt": {"initial": "a"},
        "search": {"population": 16, "generations": 300},
    }
    trial = trial_of(Path("x.toml"), parse_private_config(tables), [], False, None, None)
    values = {key: int(value) for key, _, value in (side.partition("=") for side in trial.shorter)}
    assert "task.test_limit" not in values
    assert values["task.shots"] == 2
    assert values["search.generations"] >= 2
    sentences = values["search.population"] * values["search.generations"] * classes
    assert sentences <= max(SENTENCES, 2 * 4 * classes)


def test_the_owners_tower_is_provided(tmp_path: Path) -> None:
    file = text_task(tmp_path, 4)
    settings = load_private_config(file, ["model.tower=own.safetensors"])
    assert trial_of(file, settings, [], True, None, Path("m")).provide == ("--tower", "own.safetensors", "--model", "m")
    assert trial_of(file, settings, [], True, Path("t"), None).provide == ("--tower", "t")


@pytest.mark.slow
def test_the_recipe_runs_as_it_is_printed(tmp_path: Path) -> None:
    """With this machine's name filled in, at ports that are free: every command, in its order."""
    file = text_task(tmp_path, 4, width=2, population=4, generations=1)
    text = recipe(Trial(file, ("task.shots=1",), ("--sentences", "300")))
    for host in HOSTS.values():
        assert host in text
        text = text.replace(host, "127.0.0.1")
    for port, free in zip((7000, 7001, 7002), [free_port() for _ in range(3)], strict=True):
        text = text.replace(f":{port}", f":{free}")
    lines = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    assert [line[:3] for line in lines if line[1] == "mpc"][1:4] == [
        ["sordino", "mpc", "dealer"],
        ["sordino", "mpc", "server"],
        ["sordino", "mpc", "server"],
    ]
    running: list[subprocess.Popen[str]] = []
    try:
        for line in lines:
            words = [sys.executable, "-m", *line]
            if line[2] in ("dealer", "server"):
                process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
                running.append(process)
                assert process.stdout
                assert process.stdout.readline().startswith("listening at 0.0.0.0:")
            else:
                done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
                assert done.returncode == 0, done.stderr
        assert "accuracy on 8 test examples" in done.stdout
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model owner whose tower is small, so that trials that are to end early begin early."""
    return distilled(tmp_path_factory.mktemp("owner"))


def command(owner: Path, file: Path, out: Path, *words: str) -> list[str]:
    model = ["--model", str(owner / "model"), "--tower", str(owner / "tower.safetensors")]
    model += ["--set", f"model.embeddings={owner / 'owner'}", "--sentences", "300"]
    return [sys.executable, "-m", "sordino", "mpc", "try", str(file), "--out", str(out), *model, *words]


def parties_of(out: Path) -> list[int]:
    """Ids of processes that were started with a folder's certificates."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"{out}/parties" in words and "\0try\0" not in words and state != "Z":
                found.append(int(entry.name))
    return found


def until(condition: object, seconds: float = 120.0) -> None:
    """Wait until a condition holds."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A folder, whose parties are gone after the test whatever happened."""
    yield tmp_path / "out"
    for process in parties_of(tmp_path / "out"):
        os.kill(process, signal.SIGKILL)


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("end", [signal.SIGHUP, signal.SIGKILL])  # test_interruption sends the others
def test_nobody_is_left_when_it_is_stopped(owner: Path, tmp_path: Path, out: Path, end: signal.Signals) -> None:
    """By a terminal that closes, and even where it cannot do anything itself."""
    file = text_task(tmp_path, 4, width=2, population=4, generations=50)
    words = command(owner, file, out, "--whole")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until(lambda: len(parties_of(out)) >= 4)  # three that listen, and the model owner
    process.send_signal(end)
    _, told = process.communicate(timeout=60)
    if end == signal.SIGKILL:
        until(lambda: not parties_of(out), 60)
        return
    assert parties_of(out) == []
    assert process.returncode == 128 + end
    assert told.strip().splitlines()[-1] == f"sordino: interrupted; go on with --resume --out {out}"


@pytest.mark.slow
@needs_proc
def test_one_command_starts_and_stops_all_parties_and_goes_on_after_one_failed(
    owner: Path, tmp_path: Path, out: Path
) -> None:
    """Server 0 is killed in the search; the trial goes on with its model, and measures nothing again."""
    file = text_task(tmp_path, 1, width=2, population=4, generations=12)
    words = command(owner, file, out)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until(lambda: (out / "run" / "search.json").exists(), 300)
    server = [each for each in parties_of(out) if b"parties/server-0" in Path(f"/proc/{each}/cmdline").read_bytes()]
    os.kill(server[0], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "sordino: server-0 ended with code -9" in told.strip().splitlines()[-1]
    assert told.strip().endswith("go on with --resume")
    assert parties_of(out) == []
    done = subprocess.run([*words, "--resume", "--json"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "with the ranges measured before" in done.stderr
    assert "calibrate" not in done.stderr
    summary = json.loads(done.stdout)
    assert summary["clear"] is False
    assert summary["costs"]["rounds"] > 1000
    assert re.fullmatch("[0-9a-f]{16}", summary["model"])
    assert parties_of(out) == []
    assert sorted(path.name for path in (out / "parties").iterdir()) == sorted(ROLES)
    assert {path.stem for path in (out / "logs").iterdir()} == set(LISTENING)
    page = (out / "run" / "report.html").read_text(encoding="utf-8")
    for text in ("Was it worth it", "Hand-written prompt", "DEALER_HOST:7000", "sordino mpc provide"):
        assert text in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    again = CliRunner().invoke(app, [*words, "--json"][3:])
    assert f"{out} exists; go on with --resume, or choose another --out" in str(again.exception)


@pytest.mark.slow
@needs_proc
def test_a_party_that_cannot_start_is_named_with_what_it_says(tmp_path: Path, out: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "sordino", "mpc", "certificates", "--out", str(out / "parties")], check=False
    )
    assert made.returncode == 0
    (out / "parties" / "server-1" / "key.pem").write_bytes((out / "parties" / "dealer" / "key.pem").read_bytes())
    with pytest.raises(RunError, match=r"server-1 ended with code 2: --certificates = .*are not of one") as failed:
        run_trial(Trial(text_task(tmp_path, 4)), out, resume=True)
    assert str(out / "logs" / "server-1.log") in str(failed.value)
    assert parties_of(out) == []


@pytest.mark.slow
@needs_proc
def test_a_failing_start_leaves_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while parties are being started, here an interruption at the second."""
    out = tmp_path / "out"
    from sordino.mpc.parties.certificates import make_certificates

    make_certificates(out / "parties")
    whole = Parties._start

    def start(self: Parties, role: str, words: list[str]) -> None:
        if role == "server-0":
            assert len(parties_of(out)) == 1
            raise KeyboardInterrupt
        whole(self, role, words)

    monkeypatch.setattr(Parties, "_start", start)
    with pytest.raises(KeyboardInterrupt), Parties(out / "parties", out / "logs"):
        pass
    assert parties_of(out) == []


def test_bad_input_is_refused_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    file = text_task(tmp_path, 4)
    (tmp_path / "data.tsv").unlink()
    for words in ([str(tmp_path / "nothing.toml")], [str(file)], [str(file), "--set", "search.width=0"]):
        result = CliRunner().invoke(app, ["mpc", "try", *words, "--out", str(tmp_path / "out")])
        assert isinstance(result.exception, ConfigError), words
    assert not (tmp_path / "out").exists()


def test_the_example_runs_whole_in_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the calibration: newcomers see the search that its file says."""
    monkeypatch.chdir(EXAMPLE.parents[1])
    trial, _ = cut(EXAMPLE)
    assert len(trial.cuts) == 1
    assert "public sentences" in trial.cuts[0]
