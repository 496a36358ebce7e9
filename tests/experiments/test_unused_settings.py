"""A run warns of what its settings leave undone, and claims no more than it does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sordino.algorithms.descent import first_steps, untrained
from sordino.experiments.config import load_config
from sordino.experiments.run import run

PRIVATE = ["privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1.0"]
CASES = [
    ("pfedpt", [], "settings.pfedpt.local_steps = 1: the frame is never trained", "set local_steps to 2 or more"),
    ("pfedpt", ["settings.local_steps=2"], "", ""),
    ("pfedpt", ["settings.pfedpt.frame_share=0.0"], "", ""),
    ("pfedpt", ["settings.pfedpt.frame_share=1.0"], "", ""),
    ("sgpt", [], "settings.sgpt.local_steps = 1: the shared prompts are never trained", "or shared_share to 0 or 1"),
    ("sgpt", ["settings.local_steps=2"], "", ""),
    ("secfpp", [], "settings.secfpp.cluster_every = 10: in 2 rounds there is no clustering", "set it to 2 or less"),
    ("secfpp", ["settings.secfpp.cluster_every=2"], "", ""),
    ("secfpp", ["settings.secfpp.cluster_every=2", *PRIVATE], "settings.secfpp.balanced = true: ignored", "to false"),
    ("secfpp", ["settings.secfpp.cluster_every=2", "settings.secfpp.balanced=false", *PRIVATE], "", ""),
]


@pytest.mark.parametrize(("method", "changes", "key", "remedy"), CASES)
def test_a_run_warns_of_a_part_that_does_nothing(
    config_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    method: str,
    changes: list[str],
    key: str,
    remedy: str,
) -> None:
    federation = ["partition.clients=4", "data.novel_classes=0", "rounds=2", "settings.sgpt.groups=2"]
    with caplog.at_level(logging.WARNING):
        run(load_config(config_file, [f"algorithm={method}", *federation, *changes]), tmp_path / "run")
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("settings.")]
    if not key:
        assert told == []
        return
    (line,) = told
    assert line.startswith(key)
    assert remedy in line


@pytest.mark.parametrize("method", ["secfpp", "secfpp-plain"])
def test_without_a_clustering_no_distances_and_no_means_are_disclosed(
    config_file: Path, tmp_path: Path, method: str
) -> None:
    for every in (2, 3):
        changes = [f"algorithm={method}", "partition.clients=4", "rounds=2", f"settings.secfpp.cluster_every={every}"]
        statement = run(load_config(config_file, changes), tmp_path / str(every)).privacy.statement
        assert ("squared distances" in statement) == (every == 2 and method == "secfpp")
        assert ("mean domain-level context" in statement) == (every == 2)
        assert "where it is published" in statement


@pytest.mark.parametrize("share", [0.5, 0.25, 0.29, 1 / 3, 0.9, 1e-3])
def test_the_remedy_is_the_least_number_of_steps_that_trains_both_parts(share: float) -> None:
    enough = next(steps for steps in range(1, 2000) if first_steps(steps, share))
    assert untrained(enough, share, "settings.a", "b", "c is") == []
    if enough > 1:
        (line,) = untrained(enough - 1, share, "settings.a", "b", "c is")
        assert f"set local_steps to {enough} or more" in line
