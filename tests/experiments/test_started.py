"""`--resume` goes on in a folder of the same command's, starts in one that is new, and leaves all others alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from private_tuning.small_task import write_private_config
from sordino.cli.app import invoke
from sordino.errors import RunError
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.experiments.started import PARTIES, TRIAL, TUNING, was_begun
from sordino.experiments.tracking import LINES
from sordino.experiments.variants import grid
from sordino.mpc.parties.certificates import ROLES, make_certificates

SHORT = ["rounds=1", "algorithm=promptfl"]


def content(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    """Everything in a folder, with its times."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
    }


@pytest.fixture
def private_file(tmp_path: Path) -> Path:
    return write_private_config(tmp_path, generations=0)


@pytest.fixture
def folders(config_file: Path, private_file: Path, pictures: Path, tmp_path: Path) -> dict[str, Path]:
    """A folder of each kind, made by the real command, and one of pictures."""
    made = {name: tmp_path / "made" / name for name in ("run", "comparison", "tuning", "trial", "pictures", "metrics")}
    run(load_config(config_file, SHORT), made["run"])
    compare(grid(load_config(config_file, SHORT), ["zero-shot"]), 1, made["comparison"])
    assert invoke(["tune-private", str(private_file), "--clear", "--out", str(made["tuning"])]) == 0
    make_certificates(made["trial"] / "parties")
    shutil.copytree(pictures, made["pictures"])
    made["metrics"].mkdir()
    (made["metrics"] / "metrics.jsonl").write_text('{"loss": 1}\n')
    return made


WORDS = {
    "run": "holds a run, not ",
    "comparison": "holds a comparison, not ",
    "tuning": "holds a search for a private prompt, not ",
    "trial": "holds a trial of private tuning, not ",
    "metrics": "holds metrics.jsonl, and not ",
}


def test_a_command_goes_on_in_its_own_kind_of_folder_only(
    folders: dict[str, Path], config_file: Path, private_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: dict[str, Sequence[str]] = {
        "run": ["run", str(config_file), "--set", "rounds=1"],
        "comparison": ["compare", str(config_file), "--algorithms", "local", "--seeds", "1", "--set", "rounds=1"],
        "demo": ["demo", "--quick"],
        "tuning": ["tune-private", str(private_file), "--clear"],
        "trial": ["mpc", "try", str(private_file)],
    }
    before = {name: content(folder) for name, folder in folders.items()}
    for own, command in commands.items():
        for name, folder in folders.items():
            if name == own or (own, name) == ("demo", "comparison"):
                continue
            capsys.readouterr()
            assert invoke([*command, "--resume", "--out", str(folder)]) == 2, (own, name)
            said = capsys.readouterr().err
            assert f"{folder} {WORDS.get(name, 'holds ')}" in said, (own, name, said)
            assert "choose another --out" in said
            assert content(folder) == before[name], (own, name)


def test_python_refuses_them_too(folders: dict[str, Path], config_file: Path) -> None:
    config = load_config(config_file, SHORT)
    before = {name: content(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        if name != "run":
            with pytest.raises(RunError, match="not a run"):
                run(config, folder, resume=True)
        if name != "comparison":
            with pytest.raises(RunError, match="not a comparison"):
                compare(grid(config, ["local"]), 1, folder, resume=True)
        assert content(folder) == before[name]


@pytest.mark.parametrize("there", ["nothing", "lock"])
def test_where_there_is_nothing_a_new_run_starts_and_says_so(
    there: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if there == "lock":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").touch()
    command = ["run", str(config_file), "--set", "rounds=1", "--resume", "--out", str(tmp_path / "run")]
    assert invoke(command) == 0
    said = capsys.readouterr()
    assert f"Nothing was started in {tmp_path / 'run'} before" in said.err
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in said.out
    assert invoke(command) == 0
    said = capsys.readouterr()
    assert "Nothing was started" not in said.err
    assert "Report: " not in said.out, "this call wrote none"


def test_a_report_of_something_else_is_not_a_runs_own(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is trained to its end writes its report, whatever lies there under this name."""
    out = tmp_path / "run"
    run(load_config(config_file, SHORT), out)
    (out / "summary.json").unlink()
    (out / "report.html").write_text("of a comparison")
    command = ["run", str(config_file), *(word for each in SHORT for word in ("--set", each))]
    assert invoke([*command, "--resume", "--out", str(out)]) == 0
    assert f"Report: {out / 'report.html'}" in capsys.readouterr().out
    assert "of a comparison" not in (out / "report.html").read_text()


def test_a_run_that_was_stopped_before_its_configuration_was_written_goes_on(config_file: Path, tmp_path: Path) -> None:
    """`data.json` comes first; a killed process may leave it alone, with the beginning of the next file."""
    config, out = load_config(config_file, SHORT), tmp_path / "run"
    whole = run(config, out)
    for path in out.iterdir():
        if path.name != "data.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / f".{'0' * 32}.tmp").write_text("algor")
    assert run(config, out, resume=True).accuracy == whole.accuracy


def test_a_trial_that_was_stopped_while_it_made_certificates_goes_on(tmp_path: Path) -> None:
    assert set(ROLES) == PARTIES
    assert not was_begun(tmp_path / "trial", TRIAL)
    (tmp_path / "trial" / "parties").mkdir(parents=True)
    assert was_begun(tmp_path / "trial", TRIAL)
    (tmp_path / "trial" / "parties" / ROLES[0]).mkdir()
    assert was_begun(tmp_path / "trial", TRIAL)
    (tmp_path / "pictures" / "parties" / "weddings").mkdir(parents=True)
    for kind in (TRIAL, TUNING):
        with pytest.raises(RunError, match="pictures holds parties, and not "):
            was_begun(tmp_path / "pictures", kind)


def test_a_comparison_is_known_before_its_first_run_ends(config_file: Path, tmp_path: Path) -> None:
    variants, out = grid(load_config(config_file, ["rounds=2"]), ["promptfl", "local"]), tmp_path / "all"

    def stop(stage: str, done: int, *_: object) -> None:
        if stage.startswith("promptfl"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(variants, 2, out, progress=stop)
    assert not (out / "comparison.json").exists()
    assert json.loads((out / LINES).read_bytes()) == {
        "kind": "comparison",
        "lines": [{"name": name, "folder": name, "seeds": [0, 1]} for name in ("promptfl", "local")],
    }
    before = content(out)
    with pytest.raises(RunError, match="holds a comparison, not a run"):
        run(load_config(config_file), out, resume=True)
    assert content(out) == before
    assert len(compare(variants, 2, out, resume=True)) == 2


def test_a_comparison_that_is_refused_leaves_nothing(config_file: Path, tmp_path: Path) -> None:
    """So that the command can be mended and repeated."""
    variants = grid(load_config(config_file, ["rounds=1"]), ["promptfl"])

    def refuse(*_: object) -> None:
        raise RunError("refused")

    for _ in range(2):
        with pytest.raises(RunError, match="refused"):
            compare(variants, 1, tmp_path / "all", progress=refuse)
        assert not (tmp_path / "all").exists()


def files(folder: Path) -> dict[Path, bytes]:
    """All files; a folder's own time tells of the lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(out: Path) -> list[str]:
    return json.loads((out / "comparison.json").read_bytes())["folders"]


@pytest.mark.parametrize("version", ["this", "earlier"])
def test_no_finished_result_is_dropped(version: str, config_file: Path, tmp_path: Path) -> None:
    config, out = load_config(config_file, ["rounds=1"]), tmp_path / "all"
    vary = {"settings.promptfl.context_length": [2, 4]}
    compare(grid(config, ["zero-shot", "promptfl"], vary), 2, out)
    if version == "earlier":  # which left no marker
        (out / LINES).unlink()
    before = files(out)
    for methods, seeds, missing in (
        (["zero-shot"], 2, r"promptfl.*context_length=2.* \(seed 0, 1\), promptfl.*context_length=4.* \(seed 0, 1\)"),
        (["zero-shot", "promptfl"], 1, r"zero-shot.* \(seed 1\), promptfl.*context_length=2.* \(seed 1\)"),
    ):
        pattern = rf"all was started with lines that are missing now: {missing}.*; repeat them, .*another --out"
        if version == "earlier":  # a line of `comparison.json` is a run
            pattern = r"missing now: .*promptfl/settings.promptfl.context_length=2 \(seed .*another --out"
        with pytest.raises(RunError, match=pattern):
            compare(grid(config, methods, vary), seeds, out, resume=True)
        assert files(out) == before
    with pytest.raises(RunError, match="rounds was 1 and is 2"):  # and the lines stay those that were started
        compare(
            grid(load_config(config_file, ["rounds=2"]), ["zero-shot", "promptfl", "local"], vary), 2, out, resume=True
        )
    assert files(out) == before
    compare(grid(config, ["zero-shot", "promptfl", "local"], vary), 3, out, resume=True)
    assert len(table(out)) == 3 * 4


def test_a_line_of_which_no_run_started_may_be_left_out(config_file: Path, tmp_path: Path) -> None:
    """A line that cannot be trained is no trap: the others go on without it."""
    config, out = load_config(config_file, ["rounds=1"]), tmp_path / "all"

    def stop(stage: str, *_: object) -> None:
        if stage.startswith("local"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(grid(config, ["zero-shot", "local", "promptfl"]), 1, out, progress=stop)
    with pytest.raises(RunError, match=r"missing now: local \(seed 0\);"):
        compare(grid(config, ["zero-shot"]), 1, out, resume=True)
    compare(grid(config, ["zero-shot", "local"]), 1, out, resume=True)
    assert table(out) == ["zero-shot/seed-0", "local/seed-0"]


def test_damaged_lines_are_told(config_file: Path, tmp_path: Path) -> None:
    variants, out = grid(load_config(config_file, ["rounds=1"]), ["zero-shot"]), tmp_path / "all"
    compare(variants, 1, out)
    (out / LINES).write_text("{")
    with pytest.raises(RunError, match=r"lines\.json cannot be read .*put it back, or choose another --out"):
        compare(variants, 1, out, resume=True)
