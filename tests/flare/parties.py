"""A server and sites of FLARE's in processes of their own, which end with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """Of every process: this Python first, and one thread."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join([*filter(None, [more.pop("PYTHONPATH", "")]), str(ROOT / "src")])
    return os.environ | {"PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"} | more


def processes_of(kit: Path) -> dict[int, list[str]]:
    """The processes that run from a kit by id, with their arguments: FLARE puts a job's into a session of its own."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended
            continue
        if any(argument == str(kit) or argument.startswith(f"{kit}/") for argument in arguments):
            found[int(folder.name)] = arguments
    return found


def until(what: str, true: Callable[[], object], seconds: float = 120) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not after {seconds:g} s: {what}"
        time.sleep(0.2)


def end_all(living: Callable[[], Iterable[int]], started: subprocess.Popen[bytes]) -> None:
    """Kill a command's processes, and those that they start meanwhile, until none is left."""
    while found := list(living()):
        for number in found:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        started.poll()
        time.sleep(0.05)
    started.wait()


class Party:
    """A server or a site, started from its kit.

    Args:
        kit: its startup kit.
        more: variables of its environment; a PYTHONPATH comes before Sordino's own.
    """

    def __init__(self, kit: Path, **more: str) -> None:
        self.kit, self.log = kit, kit.parent / f"{kit.name}.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["bash", str(kit / "startup" / "sub_start.sh"), "--once"],
                cwd=kit,
                env=environment(**more),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def says(self, text: str) -> bool:
        return text in self.log.read_text(errors="replace")

    def job_process(self) -> int | None:
        """The process of a job at this site."""
        found = processes_of(self.kit)
        jobs = (number for number, arguments in found.items() if any("worker_process" in each for each in arguments))
        return next(jobs, None)

    def end(self) -> None:
        """End everything that it started, at once."""
        end_all(lambda: processes_of(self.kit), self._process)
