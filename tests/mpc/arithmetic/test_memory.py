"""What is freed is used again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.dispatcher import Dispatcher

from sordino.mpc.arithmetic import kernels

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import resource, sys
import torch
from sordino.memory import keep_freed

if "keep" in sys.argv:
    assert keep_freed()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def tensors():
    for size in range(5):
        torch.ones(16_000_000 + size)
for _ in range(8):  # until each has its place
    tensors()
before = faults()
tensors()
print(faults() - before)
"""


def faults(*arguments: str) -> int:
    """Pages that a process had the system clear for tensors of sizes that it had before."""
    found = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_process_that_keeps_what_it_frees_has_no_page_cleared_twice() -> None:
    assert faults("keep") < 100
    if HUGE.is_file() and "[always]" in HUGE.read_text():
        pytest.skip("this system clears pages of 2 MB, however a process frees memory")
    assert faults() > 10_000  # 5 tensors of 64 MB, in pages of 4 kB


def test_kernels_are_compiled_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(Dispatcher, "enable_caching", nowhere)
    doubled = kernels.compiled(lambda number: 2 * number)
    assert doubled(21) == 42
