"""Two runs of one configuration and seed write the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sordino.cli.app import app

SIMULATED = ("privacy.simulation=true", f"privacy.nonce={'0123456789abcdef' * 2}", "privacy.noise_multiplier=1.0")
CASES = {
    "no privacy": ("algorithm=dp-fpl",),
    "named tensors": ("algorithm=pfedpt",),  # in prompts and states, of which a hash would mix the order
    "simulated noise": ("algorithm=dp-fpl", "privacy.mechanism=dp-sgd", *SIMULATED),
}
# What two equal runs may differ in: seconds, and whether pictures came from the cache.
TIMES = ("seconds", "evaluate_seconds", "images", "encode", "train", "evaluate", "total")


def words(config_file: Path, out: Path, overrides: tuple[str, ...]) -> list[str]:
    """The command of a run, after `sordino`."""
    options = [argument for override in overrides for argument in ("--set", override)]
    return ["run", str(config_file), "--out", str(out), "--json", *options]


def run(config_file: Path, out: Path, overrides: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, words(config_file, out, overrides))
    assert done.exit_code == 0, done.output


def run_elsewhere(config_file: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """In a new process, whose hashes are seeded otherwise than those of this one."""
    seed = next(each for each in ("1", "2") if each != os.environ.get("PYTHONHASHSEED"))
    command = [sys.executable, "-m", "sordino", *words(config_file, out, overrides)]
    environment = os.environ | {"PYTHONHASHSEED": seed}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return value


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equal_runs_in_two_processes_write_equal_files(case: str, config_file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(config_file, first, CASES[case])
    run_elsewhere(config_file, second, CASES[case])
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert files == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert {path.parts[0] for path in files} >= {"prompts", "checkpoint"}
    different = {path.name for path in files if (first / path).read_bytes() != (second / path).read_bytes()}
    assert different <= {"metrics.jsonl", "summary.json", "report.html"}  # which tell seconds
    for name in ("metrics.jsonl", "summary.json"):
        texts = [(out / name).read_text(encoding="utf-8") for out in (first, second)]
        if name == "summary.json":
            texts = [text.replace("\n", "") for text in texts]
        before, after = ([without_times(json.loads(line)) for line in text.splitlines()] for text in texts)
        assert before == after


def test_another_seed_or_nonce_writes_other_files(config_file: Path, tmp_path: Path) -> None:
    """Or the test above could not fail."""
    simulated = CASES["simulated noise"]
    other_nonce = (*simulated, f"privacy.nonce={'fedcba9876543210' * 2}")
    for name, overrides in {"a": simulated, "b": other_nonce, "c": (*simulated, "seed=1")}.items():
        run(config_file, tmp_path / name, overrides)
    prompts = [(tmp_path / name / "prompts" / "client-0000.safetensors").read_bytes() for name in "abc"]
    assert len(set(prompts)) == 3
    names = {json.loads((tmp_path / name / "ledger.json").read_bytes())["run"] for name in "abc"}
    assert len(names) == 3
