"""Runs of a comparison at once are the runs one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sordino.errors import RunError
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.variants import Variant, grid
from sordino.results import FILE
from sordino.runtime import local

METHODS = ["local", "dp-fpl"]
TIMES = ("seconds", "images", "version")  # what is measured, and where pictures came from


@pytest.fixture
def variants(config_file: Path) -> list[Variant]:
    overrides = [
        "rounds=2",
        "privacy.mechanism=cotangent",
        "privacy.noise_multiplier=1.0",
        "privacy.simulation=true",
        "privacy.nonce=" + "0" * 32,
    ]
    return grid(load_config(config_file, overrides), METHODS, {"privacy.noise_multiplier": [1.0, 4.0]})


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted(folder.rglob(FILE)):
        values = json.loads(file.read_text())
        found[str(file.parent.relative_to(folder))] = {key: values[key] for key in values if key not in TIMES}
    return found


def prompts(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = sorted(folder.rglob("prompts/*.safetensors"))
    return {str(file.relative_to(folder)): safetensors.torch.load(file.read_bytes()) for file in files}


def test_runs_at_once_are_those_one_after_the_other(variants: list[Variant], tmp_path: Path) -> None:
    told: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels divide work among threads, and round in another order
    try:
        compare(variants, 1, tmp_path / "one")
        compare(variants, 1, tmp_path / "more", progress=lambda stage, *_: told.append(stage), jobs=3)
    finally:
        torch.set_num_threads(threads)
    assert len(summaries(tmp_path / "one")) == 4
    assert summaries(tmp_path / "one") == summaries(tmp_path / "more")
    ours, theirs = prompts(tmp_path / "one"), prompts(tmp_path / "more")
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        assert all(tensor.equal(theirs[name][key]) for key, tensor in tensors.items()), name
    order = [json.loads((tmp_path / name / "comparison.json").read_text())["folders"] for name in ("one", "more")]
    assert order[0] == order[1]
    assert {"local (seed 0), privacy.noise_multiplier=1.0", "local (seed 0), privacy.noise_multiplier=4.0"} <= set(told)
    assert not list(tmp_path.rglob(".lock"))
    encoded = [json.loads(file.read_text())["images"]["encoded"] for file in (tmp_path / "more").rglob(FILE)]
    cached = [json.loads(file.read_text())["images"]["cached"] for file in (tmp_path / "more").rglob(FILE)]
    assert sorted(encoded)[:-1] == sorted(cached)[:-1] == [0] * 3, "the first one counts them all"
    assert max(encoded) + max(cached) > 0


def test_a_comparison_goes_on_after_one_of_its_runs_failed(
    variants: list[Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = local.LocalRuntime.round

    def failing(runtime: local.LocalRuntime, training: local.Training) -> object:
        if runtime.algorithm.__name__.endswith("dp_fpl") and training.round == 1:
            raise RunError("a disk is full")
        return whole(runtime, training)

    monkeypatch.setattr(local.LocalRuntime, "round", failing)
    with pytest.raises(RunError, match="a disk is full"):
        compare(variants, 1, tmp_path / "all", jobs=2)
    monkeypatch.undo()
    assert not list(tmp_path.rglob(".lock"))
    assert not (tmp_path / "all" / "comparison.json").exists()
    compare(variants, 1, tmp_path / "all", resume=True, jobs=2)
    compare(variants, 1, tmp_path / "other")
    for name, summary in summaries(tmp_path / "other").items():
        again = json.loads((tmp_path / "all" / name / FILE).read_text())
        assert again["accuracy"]["local"] == pytest.approx(summary["accuracy"]["local"]), name
