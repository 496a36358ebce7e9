"""One process at a time in a run directory, and what a dead one leaves behind is no obstacle."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from private_tuning.small_task import write_private_config
from sordino.cli.app import app
from sordino.errors import RunError, SordinoError
from sordino.experiments import run_lock
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.experiments.run_lock import InUse, all_held, held, held_in_turn, is_empty
from sordino.experiments.variants import grid
from sordino.files import ANOTHER_OUT, replace_file
from sordino.report.statement import write as write_statement

HOLDER = """
import sys
from pathlib import Path
from sordino.experiments.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holders() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test starts; they end with it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def hold(folder: Path, holders: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """A process that holds a directory until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holders.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def refusal(*arguments: object) -> str:
    """What a command of this process says; it is told in one line and with exit code 2, as all such errors are."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(done.exception, SordinoError), done.output
    return str(done.exception)


@pytest.mark.slow
def test_a_second_process_is_refused_and_told_which_is_the_first(
    config_file: Path, tmp_path: Path, holders: list[subprocess.Popen[str]]
) -> None:
    """Whatever it wants of the directory; when the first is gone it may."""
    finished, fresh = tmp_path / "finished", tmp_path / "new" / "run"
    run(load_config(config_file, ["rounds=1", "algorithm=promptfl"]), finished)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    first, second = hold(finished, holders), hold(fresh, holders)
    words = f"is in use by process {first.pid}; wait until it ends"
    assert words in refusal("audit", finished, "--attacks", "stealing")
    assert words in refusal("report", finished)
    assert words in refusal("run", config_file, "--resume", "--out", finished)
    assert f"{fresh} is in use by process {second.pid}" in refusal("run", config_file, "--out", fresh)
    assert f"{fresh} is" in refusal("compare", config_file, "--algorithms", "local", "--seeds", 1, "--out", fresh)
    private = write_private_config(tmp_path)
    assert f"{fresh} is" in refusal("tune-private", private, "--clear", "--out", fresh)
    first.communicate("")
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with held(finished):
        pass


@pytest.mark.slow
def test_two_runs_at_once_leave_one_whole_directory(config_file: Path, tmp_path: Path) -> None:
    """Once both went on, and wrote every round twice. Which of them is first is no matter."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sordino", "run", str(config_file), "--resume", "--set", "rounds=40"]
    both = [
        subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    codes = sorted(process.returncode for process in both)
    # The loser is refused, or, where it started after the winner's end, finds a finished run.
    assert codes in ([0, 2], [0, 0]), said
    if codes == [0, 2]:
        winner = next(process for process in both if process.returncode == 0)
        # The other one may come between the winner's lock and its name in the file.
        assert any(f"in use by {who}" in each for who in (f"process {winner.pid}", "another process") for each in said)
    lines = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(41))


@pytest.mark.slow
def test_a_killed_holder_is_no_obstacle(tmp_path: Path, holders: list[subprocess.Popen[str]]) -> None:
    process = hold(tmp_path / "run", holders)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / ".lock").read_text() == str(process.pid)  # left behind
    assert is_empty(tmp_path / "run")
    with held(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / "run").exists() or is_empty(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"1", b"\xff\x00", b"9" * 500])
def test_what_stands_in_the_file_decides_nothing(content: bytes, tmp_path: Path) -> None:
    """Process 1 is alive wherever there are processes: a number that is in use again fools nobody."""
    (tmp_path / ".lock").write_bytes(content)
    with held(tmp_path):
        assert (tmp_path / ".lock").read_bytes() == str(os.getpid()).encode()
    assert tmp_path.exists()


def test_one_thread_may_nest_and_others_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever path the directory is named."""
    found: list[str] = []

    def other() -> None:
        try:
            with held(tmp_path / "run"):
                found.append("held")
        except RunError as error:
            found.append(str(error))

    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with held(tmp_path / "run"), held(Path("run")), held(tmp_path / "link" / "run"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [f"{tmp_path / 'run'} is in use by another thread of this process ({os.getpid()}); "
                     "wait until it ends, or choose another --out"]  # fmt: skip
    other()
    assert found[1:] == ["held"]


def test_a_directory_in_which_nothing_came_to_be_is_removed(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b"):
            1 / 0  # noqa: B018
        assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    with held(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").exists()  # which was there before


def test_several_are_held_or_none(tmp_path: Path, holders: list[subprocess.Popen[str]]) -> None:
    hold(tmp_path / "b", holders)
    with pytest.raises(RunError, match="b is in use"), all_held([tmp_path / name for name in "abc"]):
        pass
    assert not (tmp_path / "a").exists()
    with all_held([tmp_path / name for name in "acdc"]):
        pass


def test_a_comparison_holds_its_runs(config_file: Path, tmp_path: Path, holders: list[subprocess.Popen[str]]) -> None:
    variants = grid(load_config(config_file, ["rounds=1"]), ["zero-shot", "local"])
    compare(variants, 1, tmp_path / "all")
    holder = hold(tmp_path / "all" / "local" / "seed-1", holders)
    with pytest.raises(RunError, match=r"all exists; go on with --resume"):
        compare(variants, 2, tmp_path / "all")
    with pytest.raises(RunError, match=rf"local/seed-1 is in use by process {holder.pid}"):
        compare(variants, 2, tmp_path / "all", resume=True)
    holder.communicate("")
    assert len(compare(variants, 2, tmp_path / "all", resume=True)) == 2
    assert not list((tmp_path / "all").rglob(".lock"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_a_file_system_without_locks_is_told(number: int | None, tmp_path: Path, monkeypatch, caplog) -> None:
    if number is None:
        monkeypatch.setattr(run_lock, "fcntl", None)
    else:

        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with held(tmp_path / "run"):
        assert "has no locks; see yourself that no other process writes there" in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["n" * 300, "d/" * 3000 + "x", "null\0byte", "file/run", "file"])
def test_a_path_that_cannot_be_is_told_in_one_short_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="choose another --out") as error, held(tmp_path / name):
        pass
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


def test_no_option_is_named_that_a_command_does_not_have(tmp_path: Path) -> None:
    """`report`, `audit`, sites and servers write where they were told to, and have no --out for it."""
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="as it is no folder; mend that$"), held(tmp_path / "file", instead=False):
        pass
    with held(tmp_path / "run"), ThreadPoolExecutor(1) as pool:

        def hold() -> None:
            with held(tmp_path / "run", instead=False):
                raise AssertionError

        with pytest.raises(RunError, match="wait until it ends$"):
            pool.submit(hold).result()
    with pytest.raises(RunError, match=f"{ANOTHER_OUT}$"):
        write_statement({}, tmp_path / "file" / "statement.json")


@pytest.mark.slow
def test_holders_that_come_and_go_never_hold_together(tmp_path: Path) -> None:
    """Processes that take and leave the lock quickly, so that one opens the file while another removes it."""
    code = """
import os, sys, time
from pathlib import Path
from sordino.errors import RunError
from sordino.experiments.run_lock import held
folder, mark = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "mark"
taken = 0
while taken < 60:
    try:
        with held(folder):
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails where another one is inside
            mark.unlink()
            taken += 1
    except RunError:
        pass
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "run"])  # empty, where its maker left before another did


def test_a_secret_is_at_no_moment_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    rename = Path.replace

    def watched(self: Path, target: Path) -> Path:
        modes.append(stat.S_IMODE(self.stat().st_mode))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    before = os.umask(0)
    try:
        for private in (True, False):
            replace_file(tmp_path / "file", b"secret", private)
            modes.append(stat.S_IMODE((tmp_path / "file").stat().st_mode))
    finally:
        os.umask(before)
    assert modes == [0o600, 0o600, 0o666, 0o666]


def test_a_file_in_the_place_of_a_folder_is_something(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_empty(tmp_path / "none")
    assert not is_empty(tmp_path / "file")


def test_who_waits_for_a_directory_is_next(tmp_path: Path) -> None:
    """Whoever had it may not have it again before: with short gaps between, it would have it always."""
    order: list[str] = []

    def wait() -> None:
        with held_in_turn(tmp_path, 60):
            order.append("who waited")

    other = threading.Thread(target=wait)
    with held_in_turn(tmp_path, 60):
        other.start()
        while not (tmp_path / run_lock.DOOR / run_lock.FILE).exists():
            time.sleep(0.001)
    with held_in_turn(tmp_path, 60):
        order.append("who had it")
    other.join()
    assert order == ["who waited", "who had it"]


@pytest.mark.slow
def test_a_directory_is_waited_for_until_time_is_up(tmp_path: Path, holders: list[subprocess.Popen[str]]) -> None:
    """Another process holds it; what its waiter left behind is no obstacle, either."""
    process = hold(tmp_path / "run", holders)
    for _ in range(2):
        with pytest.raises(InUse, match="in use by"), held_in_turn(tmp_path / "run", 0.05):
            raise AssertionError
    process.communicate("")
    with held_in_turn(tmp_path / "run", 60):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
