"""`sordino mpc try`: all five parties on this machine, as the processes that they are on five machines.

Dealer and servers listen at free ports. Model owner and data owner are processes that run to their end. If any party
fails, all are stopped, and the error names it. All end with this process, even if it is killed: their standard input is
a pipe from it, and a thread of theirs ends them when the pipe closes.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from sordino.errors import RunError
from sordino.experiments.run_lock import held, require_unused
from sordino.experiments.started import TRIAL, was_begun
from sordino.mpc.parties.certificates import (
    AUTHORITY,
    DATA_OWNER,
    DEALER,
    MODEL_OWNER,
    ROLES,
    SERVERS,
    make_certificates,
)
from sordino.mpc.tower.public_text import SENTENCES as WHOLE_CALIBRATION
from sordino.private_tuning.open_task import pictures_of, split_images
from sordino.private_tuning.settings import PrivateTuning
from sordino.private_tuning.tasks import read_sentences

LOCAL = "127.0.0.1:0"
SENTENCES = 600  # of all candidates of a trial's search: one to two minutes on two cores
SHOTS, TESTS = 4, 16  # examples a class: sentences are costly on shares, pictures are not
CALIBRATION = 1000  # public sentences
FEWEST = 4  # candidates a generation
START = 120.0  # seconds until a party listens
STOP = 10.0  # seconds until it has stopped
POLL = 0.2
# The command line, in a process that ends with its parent. `os.read` holds no lock that an ordinary end waits for.
WITH_PARENT = """
import os, threading
def watch():
    while os.read(0, 1):
        pass
    os._exit(143)
threading.Thread(target=watch, daemon=True).start()
from sordino.__main__ import main
main()
"""
PORTS = {DEALER: 7000, SERVERS[0]: 7001, SERVERS[1]: 7002}
HOSTS = {DEALER: "DEALER_HOST", SERVERS[0]: "SERVER_0_HOST", SERVERS[1]: "SERVER_1_HOST"}  # to fill in


@dataclass(frozen=True)
class Trial:
    """The settings and shortenings of a trial.

    Attributes:
        config: file of the configuration.
        overrides: of its keys, as `KEY=VALUE`.
        provide: more words for `sordino mpc provide`.
        shorter: values of keys for the trial alone.
        calibration: public sentences for the trial alone.
        cuts: in words, what is shorter than in the configuration.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    provide: tuple[str, ...] = ()
    shorter: tuple[str, ...] = ()
    calibration: int | None = None
    cuts: tuple[str, ...] = ()


def trial_of(
    config: Path,
    settings: PrivateTuning,
    overrides: Sequence[str],
    whole: bool,
    tower: Path | None,
    model: Path | None,
    sentences: int | None = None,
) -> Trial:
    """Return a trial of a configuration, cut to a few minutes unless it should be whole.

    Args:
        config: the file.
        settings: its content, with `overrides`.
        overrides: as `KEY=VALUE`.
        whole: leave the configuration as it is.
        tower, model, sentences: of the model owner, see `sordino mpc provide`.

    Raises:
        ConfigError, DataError: the examples of the configuration cannot be read.
    """
    chosen = Path(settings.model.tower) if tower is None and settings.model.tower else tower
    options = (("--tower", chosen), ("--model", model))
    provide = [word for name, path in options if path for word in (name, str(path))]
    if whole:
        return Trial(config, tuple(overrides), tuple(provide), calibration=sentences)
    values = _cut(settings)
    tables = {"task": settings.task, "search": settings.search}
    before = {key: getattr(tables[key.partition(".")[0]], key.partition(".")[2]) for key in values}
    cuts = [
        f"{key} = {value} instead of {'all' if before[key] is None else before[key]}"
        for key, value in values.items()
        if before[key] != value
    ]
    measured = sentences or CALIBRATION
    cuts.append(f"ranges measured on {measured:,} public sentences instead of {WHOLE_CALIBRATION:,}")
    shorter = tuple(f"{key}={value}" for key, value in values.items())
    return Trial(config, tuple(overrides), tuple(provide), shorter, measured, tuple(cuts))


def _cut(settings: PrivateTuning) -> dict[str, int]:
    """Return the values of keys in a trial: few sentences on shares, and at least two generations of a search."""
    task, search = settings.task, settings.search
    shots = task.shots
    if task.kind == "text":
        classes = len(task.label_names or ())
        _, labels = read_sentences(Path(str(task.test)), "task.test", classes)
        shots = min(shots, SHOTS)
        candidate = classes * (shots + 1)  # sentences: the examples and the classes' descriptions
    else:
        images = pictures_of(settings)
        all_tests = settings.model_copy(update={"task": task.model_copy(update={"test_limit": None})})
        _, tests = split_images(images, np.ones(len(images), dtype=np.bool_), all_tests, "test")
        labels, candidate = images.labels[tests], len(images.class_names)
    population = min(search.population, max(FEWEST, SENTENCES // (2 * candidate)))
    generations = min(search.generations, max(2, SENTENCES // (population * candidate)))
    values = {"task.shots": shots, "search.population": population, "search.generations": generations}
    if (task.test_limit or int(np.bincount(labels).min())) > TESTS:
        values["task.test_limit"] = TESTS
    return values


def run_trial(
    trial: Trial, folder: Path, resume: bool, as_json: bool = False, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Start the parties, provide the model, tune the prompt, and stop the parties.

    Args:
        trial: what to run.
        folder: where `parties` (certificates), `logs` and `run` (the data owner's run directory) are written.
        resume: go on with an interrupted trial, under its certificates and with its model.
        as_json: let the data owner print its summary as JSON.
        say: is told what happens.

    Returns:
        The run directory.

    Raises:
        RunError: the folder is in use or not empty, or a party failed; the message names it and its log.
    """
    if resume:  # before the lock is written
        was_begun(folder, TRIAL)
    with held(folder):
        if not resume:
            require_unused(folder)
        parties, run = folder / "parties", folder / "run"
        if not (parties / ROLES[-1] / AUTHORITY).exists():  # the last file of theirs
            shutil.rmtree(parties, ignore_errors=True)  # of a trial that was stopped while it made them
            make_certificates(parties)
        with Parties(parties, folder / "logs") as running:
            say(f"dealer and servers are at {', '.join(running.addresses[role] for role in PORTS)}")
            servers = [running.addresses[role] for role in SERVERS]
            own = ["--certificates", str(parties / MODEL_OWNER)]
            words = ["mpc", "provide", "--servers", ",".join(servers), *own, *trial.provide]
            if trial.calibration:
                words += ["--sentences", str(trial.calibration)]
            running.owner(MODEL_OWNER, words, sys.stderr)
            session = [f"session.servers={json.dumps(servers)}", f"session.certificates={parties / DATA_OWNER}"]
            sides = [word for side in (*trial.overrides, *trial.shorter, *session) for word in ("--set", side)]
            words = ["tune-private", str(trial.config), "--out", str(run), *sides]
            words += ["--resume"] * (resume and run.exists()) + ["--json"] * as_json
            running.owner(DATA_OWNER, words, sys.stdout)
        return run


@dataclass
class Parties:
    """A context with a dealer and two servers, each a process that listens at a free port.

    Attributes:
        certificates: folder of the parties' folders.
        logs: folder of a log for each party.
        addresses: by role, once the context is entered.
    """

    certificates: Path
    logs: Path
    addresses: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Parties:
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._stack = ExitStack()
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            self._start(DEALER, ["dealer"])
            dealer = ["--dealer", self.addresses[DEALER]]
            self._start(SERVERS[0], ["server", *dealer])
            self._start(SERVERS[1], ["server", *dealer, "--peer", self.addresses[SERVERS[0]]])
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def owner(self, role: str, words: Sequence[str], output: IO[str]) -> None:
        """Run an owner's command to its end, and see that the other parties live as long.

        Args:
            role: of the owner, for errors.
            words: of the command.
            output: takes its standard output. Progress and errors go to standard error.

        Raises:
            RunError: the command or another party failed.
        """
        process = subprocess.Popen(
            _command(*words), stdin=subprocess.PIPE, stdout=output, start_new_session=True, text=True
        )
        try:
            while process.poll() is None:
                time.sleep(POLL)
                lost = self._lost()
                if lost:  # which the owner notices, too, and tells in its own words
                    self._wait(process)
                    raise RunError(lost)
        finally:
            if process.poll() is None:
                process.kill()  # what is in a run directory is whole at any moment
                process.wait()
            if process.stdin:
                process.stdin.close()
        if process.returncode:
            lost = self._lost()
            raise RunError(lost or f"{role} failed, as said above; logs of the other parties are in {self.logs}")

    def _start(self, role: str, words: list[str]) -> None:
        """Start a party, and wait until it says where it listens."""
        log = self._stack.enter_context((self.logs / f"{role}.log").open("a", encoding="utf-8"))
        words = [*words, "--listen", LOCAL, "--certificates", str(self.certificates / role)]
        process = subprocess.Popen(
            _command("mpc", *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            text=True,
        )
        self._processes[role] = process
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(process.stdout.readline() if process.stdout else ""))
        reader.daemon = True
        reader.start()
        reader.join(START)
        if not said or not said[0].startswith("listening at "):
            if said:  # its output is closed, so it is about to end
                self._wait(process)
            raise RunError(self._lost() or f"{role} does not listen after {START:g} s; see {self.logs / role}.log")
        self.addresses[role] = said[0].split()[-1]

    def _lost(self) -> str | None:
        """Name a party that ended, with the last line of its log."""
        for role, process in self._processes.items():
            if process.poll() is not None:
                log = self.logs / f"{role}.log"
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                last = f": {lines[-1].removeprefix('sordino: ')}" if lines else ""
                return f"{role} ended with code {process.returncode}{last} (log: {log}); go on with --resume"
        return None

    def _wait(self, process: subprocess.Popen[str]) -> None:
        try:
            process.wait(STOP)
        except subprocess.TimeoutExpired:
            process.kill()

    def _stop(self) -> None:
        """Stop all parties, those that listen to the others last."""
        for process in reversed(self._processes.values()):
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            self._wait(process)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()
        self._stack.close()


def recipe(trial: Trial) -> str:
    """Return the commands that run a trial's whole configuration on five machines, with hosts' names to fill in."""
    address = {role: f"{HOSTS[role]}:{PORTS[role]}" for role in PORTS}
    servers = ",".join(address[role] for role in SERVERS)
    session = [f"session.servers={json.dumps([address[role] for role in SERVERS])}"]
    session.append(f"session.certificates=parties/{DATA_OWNER}")
    sides = [word for side in (*trial.overrides, *session) for word in ("--set", side)]

    def listening(role: str, *words: str) -> str:
        where = ["--listen", f"0.0.0.0:{PORTS[role]}", "--certificates", f"parties/{role}"]
        return _line("mpc", "dealer" if role == DEALER else "server", *where, *words)

    dealer = ["--dealer", address[DEALER]]
    return "\n".join(
        [
            "# anywhere, once; hand each party its folder of 'parties' by a way that nobody else reads",
            _line("mpc", "certificates", "--out", "parties"),
            f"# on {HOSTS[DEALER]}",
            listening(DEALER),
            f"# on {HOSTS[SERVERS[0]]}",
            listening(SERVERS[0], *dealer),
            f"# on {HOSTS[SERVERS[1]]}",
            listening(SERVERS[1], *dealer, "--peer", address[SERVERS[0]]),
            "# the model owner, and again whenever a server was restarted",
            _line("mpc", "provide", "--servers", servers, "--certificates", f"parties/{MODEL_OWNER}", *trial.provide),
            "# the data owner",
            _line("tune-private", str(trial.config), *sides),
        ]
    )


def _line(*words: str) -> str:
    return shlex.join(["sordino", *words])


def _command(*words: str) -> list[str]:
    return [sys.executable, "-c", WITH_PARENT, *words]
