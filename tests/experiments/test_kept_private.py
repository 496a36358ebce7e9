"""Digests, features and prompts are their owner's alone, in a run directory and in the cache."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from sordino.audit.run import audit
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.experiments.variants import grid

STATISTICS = ["rounds=2", "privacy.mechanism=statistics", "privacy.noise_multiplier=1.0", "privacy.delta=0.01"]
CLUSTERS = ["rounds=1", "algorithm=secfpp", "settings.cluster_every=1", "partition.clients=4", "partition.scheme=iid"]
READABLE = ["comparison.csv", "config.toml", "metrics.jsonl", "report.html", "summary.json"]


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def exposed(folder: Path) -> dict[Path, bytes]:
    """The files that others may read, once they are in the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def secrets(run_folder: Path) -> list[bytes]:
    """What no other user may read: digests of data, the name that salts others, and prompts without noise."""
    ledger = json.loads((run_folder / "ledger.json").read_bytes())
    data = json.loads((run_folder / "data.json").read_bytes())
    texts = [ledger["run"], *ledger["data"].values(), *data["parties"], data["test"], data["partition"]]
    tensors = [tensor for file in (run_folder / "prompts").iterdir() for tensor in load_file(file).values()]
    return [text.encode() for text in texts if text] + [tensor.tobytes() for tensor in tensors]


@pytest.mark.parametrize("options", [[], STATISTICS, CLUSTERS], ids=["plain", "statistics", "clusters"])
def test_no_other_user_reads_what_a_run_tells_of_pictures(
    options: list[str], config_file: Path, tmp_path: Path, no_umask: None
) -> None:
    out = tmp_path / "run"
    modes = set()
    run(load_config(config_file, options), out, progress=lambda *_: modes.add(out.exists() and out.stat().st_mode))
    audit(out, ["inversion"])
    assert {stat.S_IMODE(mode) for mode in modes if mode} == {0o700}, "while it trains, too"
    out.chmod(0o755)  # as an owner does who shows the report
    shown = exposed(out)
    assert {path.name for path in shown} == {*READABLE} - {"comparison.csv"}
    found = secrets(out)
    assert len(found) > 6
    assert not [(path, each) for path, content in shown.items() for each in found if each in content]
    cache = Path(os.environ["SORDINO_CACHE"])
    assert list(cache.rglob("*.safetensors"))
    assert exposed(cache) == {}
    assert stat.S_IMODE((cache / "features").stat().st_mode) == 0o700


def test_the_runs_of_a_comparison_are_closed_where_its_tables_are_shown(
    config_file: Path, tmp_path: Path, no_umask: None
) -> None:
    out = tmp_path / "comparison"
    compare(grid(load_config(config_file, ["rounds=1"]), ["promptfl", "dp-fpl"]), 1, out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    runs = [file.parent for file in out.rglob("summary.json")]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in runs} == {0o700}
    assert {path.name for path in exposed(out)} == {*READABLE, "comparison.json", "lines.json"}


def test_a_folder_that_was_there_stays_as_open_as_it_was(config_file: Path, tmp_path: Path, no_umask: None) -> None:
    out = tmp_path / "shared"
    out.mkdir(mode=0o775)
    run(load_config(config_file, ["rounds=1"]), out)
    run(load_config(config_file, ["rounds=1"]), out, resume=True)
    assert stat.S_IMODE(out.stat().st_mode) == 0o775
    assert {path.name for path in exposed(out)} == {*READABLE} - {"comparison.csv"}
