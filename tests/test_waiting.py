"""Threads that wait are asleep: the policy is settled before torch loads its OpenMP, unless the user did so."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from sordino import WAITING_CHOICES as CHOICES

MODULES = (
    "sordino",
    "sordino.cli.app",
    "sordino.mpc",
    "sordino.mpc.parties.server",
    "sordino.experiments.run",
    "sordino.__main__",
)


def spins(module: str, **given: str) -> int:
    """How long threads spin before they sleep, as the loaded runtime tells, in a process that imports a module first.

    The policy that libgomp prints is no evidence: it reads "passive" where none is set, and threads spin all the same.
    """
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "2"} | given
    code = f"import {module}; import torch; torch.ones(300, 300) @ torch.ones(300, 300)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = re.findall(r"(?:GOMP_SPINCOUNT|KMP_BLOCKTIME) *= *'?(\d+)", done.stderr)
    if not found:
        pytest.skip("this torch's OpenMP does not tell how it waits")
    return int(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_torch_waits_asleep(module: str) -> None:
    assert spins(module) == 0


@pytest.mark.slow
def test_what_the_user_chose_holds() -> None:
    """And where nobody chooses, as before this was settled, threads spin."""
    assert spins("sordino", OMP_WAIT_POLICY="active") > 0
    assert spins("sordino", GOMP_SPINCOUNT="7", KMP_BLOCKTIME="7") == 7
    assert spins("sys") > 0


@pytest.mark.parametrize("name", CHOICES)
def test_each_of_the_variables_is_a_choice(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in CHOICES} | {name: "1"}
    code = "import os, sordino; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("1" if name == "OMP_WAIT_POLICY" else "None")
