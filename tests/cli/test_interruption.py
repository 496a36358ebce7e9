"""Ctrl-C and SIGTERM at any moment: one line that says how to go on, the signal's exit code, and a whole folder."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from private_tuning.small_task import write_private_config
from sordino.cli import console
from sordino.cli.app import app
from sordino.cli.console import run_command

pytestmark = pytest.mark.slow
UNTIL = 120.0  # seconds within which a process must come to a certain point, on however busy a machine


class Command:
    """A `sordino` command in a process of its own, whose standard error is read as it comes."""

    def __init__(self, *arguments: object, cwd: Path | None = None, first: str = "") -> None:
        code = f"import sys; sys.argv[0] = 'sordino'\n{first}\nfrom sordino.__main__ import main; main()"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd)
        assert self.process.stderr is not None
        self._stream, self.said = self.process.stderr, ""

    def wait_for(self, text: str) -> None:
        """Read until standard error says this."""
        end = time.monotonic() + UNTIL
        while text not in self.said:
            ready, _, _ = select.select([self._stream], [], [], max(0.0, end - time.monotonic()))
            content = os.read(self._stream.fileno(), 65536) if ready else b""
            assert content, f"it ended, or fell silent, before it said {text!r}: {self.said}"
            self.said += content.decode()

    def stop(self, number: int) -> str:
        """Send a signal; the last line of what it said."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=UNTIL)
        self.said += rest.decode()
        assert "Traceback" not in self.said
        return self.said.strip().splitlines()[-1]


@pytest.fixture
def started() -> Iterator[list[Command]]:
    """Commands that a test starts; they end with it."""
    commands: list[Command] = []
    yield commands
    for each in commands:
        each.process.kill()
        each.process.communicate()


# How a process tells where it is. Each is a module that says so, and then takes its time.
MOMENTS = {
    "imports": "import sordino.cli.console as c, sys, time\n"
    "class Slow:\n"
    "    def find_spec(self, name, *_):\n"
    "        if name == 'torch': print('here', file=sys.stderr, flush=True); time.sleep(60)\n"
    "sys.meta_path.insert(0, Slow())",
    "encoding": "import sordino.encoders.encode as e, sys, time\n"
    "whole = e._forward\n"
    "def slow(*a): print('here', file=sys.stderr, flush=True); time.sleep(60); return whole(*a)\n"
    "e._forward = slow",
    "training": "import sordino.runtime.local as l, sys, time\n"
    "whole = l.LocalRuntime.round\n"
    "def slow(self, training):\n"
    "    if training.round == 3: print('here', file=sys.stderr, flush=True); time.sleep(60)\n"
    "    return whole(self, training)\n"
    "l.LocalRuntime.round = slow",
}
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_says_how_to_go_on_and_does(
    moment: str,
    number: int,
    code: int,
    config_file: Path,
    tmp_path: Path,
    started: list[Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without --out the name of the folder is known from what is printed alone."""
    command = Command("run", config_file, cwd=tmp_path, first=MOMENTS[moment])
    started.append(command)
    command.wait_for("here\n")
    last = command.stop(number)
    assert command.process.returncode == code
    (named,) = [line for line in command.said.splitlines() if line.startswith("Run directory: ")]
    folder = named.removeprefix("Run directory: ")
    assert folder.startswith("runs/")
    assert last == f"sordino: interrupted; go on with --resume --out {folder}"
    assert not (tmp_path / folder / ".lock").exists()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", str(config_file), *last.partition("with ")[2].split()])
    assert "Report: " in done.stdout
    assert json.loads((tmp_path / folder / "summary.json").read_bytes())["rounds"] == 6


@pytest.mark.parametrize("name", ["compare", "audit", "tune-private"])
def test_other_commands_say_what_holds(name: str, config_file: Path, tmp_path: Path, started: list[Command]) -> None:
    arguments: dict[str, list[object]] = {
        "compare": [config_file, "--algorithms", "promptfl", "--seeds", "1", "--out", tmp_path / "my runs"],
        "audit": [tmp_path / "finished", "--attacks", "membership"],
        "tune-private": [tmp_path / "private.toml", "--clear", "--out", tmp_path / "tuned"],
    }
    words = {
        "compare": f"go on with --resume --out '{tmp_path / 'my runs'}'",
        "audit": "nothing was changed, as an audit is written at its end; repeat the command",
        "tune-private": f"go on with --resume --out {tmp_path / 'tuned'}",
    }
    moment = MOMENTS["training"]
    if name == "audit":
        from sordino.experiments.config import load_config
        from sordino.experiments.run import run

        run(load_config(config_file), tmp_path / "finished")
    if name == "tune-private":
        write_private_config(tmp_path)
        moment = (
            "import sordino.private_tuning.search as s, sys, time\nwhole = s.prompts\n"
            "def slow(*a): print('here', file=sys.stderr, flush=True); time.sleep(60); return whole(*a)\n"
            "s.prompts = slow"
        )
    command = Command(name, *arguments[name], first=moment)
    started.append(command)
    command.wait_for("here\n")
    assert command.stop(signal.SIGINT) == f"sordino: interrupted; {words[name]}"
    assert command.process.returncode == 130


def test_a_real_ctrl_c_in_the_middle_of_rounds(config_file: Path, tmp_path: Path, started: list[Command]) -> None:
    """No slowed part: the signal comes wherever it comes; and, as by a shell, to the whole group of processes."""
    command = Command("run", config_file, "--set", "rounds=100000", "--out", tmp_path / "run")
    started.append(command)
    end = time.monotonic() + UNTIL
    while not (tmp_path / "run" / "checkpoint" / "latest.json").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert command.stop(signal.SIGINT) == f"sordino: interrupted; go on with --resume --out {tmp_path / 'run'}"
    assert command.process.returncode == 130


def test_an_interruption_that_a_library_turned_into_its_own_error_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """As an import does that is written in C; and one that was swallowed altogether."""

    def turned() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None
        return 0

    def swallowed() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            return 0
        return 1

    before = {number: signal.getsignal(number) for number, _ in SIGNALS}
    try:
        assert run_command(turned) == 130
        assert run_command(swallowed) == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "sordino: interrupted; nothing was written\n" * 2
    console.at_work("nothing was written")
