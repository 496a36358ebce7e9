"""Real comparisons over the small CLIP, and run directories that are varied from one of their runs."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sordino.audit.run import audit
from sordino.experiments.compare import Row, compare
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.experiments.toml_tables import to_toml
from sordino.experiments.variants import grid
from sordino.report.runs import read_run
from sordino.results import MEASURES, Summary

COLORS = {
    "red apple": (190, 60, 60),
    "green leaf": (60, 160, 60),
    "blue sky": (60, 70, 180),
    "grey stone": (110, 110, 110),
    "yellow sun": (180, 170, 60),
    "black coal": (70, 70, 70),
}
CONFIG = """
rounds = 4
device = "cpu"
[data]
source = "imagefolder:{pictures}"
train_per_class = 4
novel_classes = 2
held_out_domain = "fog"
[partition]
scheme = "disjoint"
clients = 3
[encoder]
name = "clip"
checkpoint = "{checkpoint}"
[runtime]
evaluate_every = 2
[settings]
context_length = 4
batch_size = 2
optimizer = {{ name = "adam", learning_rate = 0.1 }}
[settings.dp-fpl]
rank = 2
"""
PRIVATE = ["privacy.mechanism=dp-sgd", "privacy.epsilon=8.0", "privacy.delta=0.01"]
ATTACKED = ["poisoning.target=red apple", "poisoning.trigger_size=0.5", "poisoning.clients=1", "poisoning.rate=1.0"]

WriteRun = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: its folder, and the rows that the terminal shows."""

    folder: Path
    rows: list[Row]

    def runs(self, algorithm: str) -> list[Path]:
        """Run directories of an algorithm, by seed."""
        return sorted((self.folder / algorithm).glob("seed-*"))


@pytest.fixture(scope="session")
def comparisons(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> dict[str, Comparison]:
    """Real comparisons of four methods with one seed and with two, and of two methods that are attacked.

    Prompts are evaluated on novel classes and a held-out domain too; DP-FPL is private, and `local` simulates noise.
    """
    root = tmp_path_factory.mktemp("comparisons")
    generator = np.random.default_rng(0)
    for domain, shade in (("day", 30), ("dusk", 0), ("fog", -30)):
        for name, color in COLORS.items():
            folder = root / "pictures" / domain / name
            folder.mkdir(parents=True)
            for number in range(6):
                noise = generator.integers(-90, 90, (24, 24, 3)) + shade
                picture = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / f"{number}.png")
    file = root / "config.toml"
    file.write_text(CONFIG.format(pictures=root / "pictures", checkpoint=clip_folder))
    private, simulated = load_config(file, PRIVATE), load_config(file, [*PRIVATE, "privacy.simulation=true"])
    variants = (
        grid(load_config(file), ["zero-shot", "promptfl"]) + grid(private, ["dp-fpl"]) + grid(simulated, ["local"])
    )
    attacked = grid(load_config(file, [*ATTACKED, "partition.scheme=iid"]), ["promptfl", "local"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SORDINO_CACHE", str(root / "cache"))
        return {
            "one seed": Comparison(root / "one", compare(variants, 1, root / "one")),
            "two seeds": Comparison(root / "two", compare(variants, 2, root / "two")),
            "attacked": Comparison(root / "attacked", compare(attacked, 1, root / "attacked")),
        }


@pytest.fixture(scope="session")
def audited(comparisons: dict[str, Comparison], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a real private run that was attacked."""
    (run_folder,) = comparisons["one seed"].runs("dp-fpl")
    folder = tmp_path_factory.mktemp("audited") / "run"
    shutil.copytree(run_folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SORDINO_CACHE", str(comparisons["one seed"].folder.parent / "cache"))
        audit(folder, ["membership", "rounds", "canaries"], shadows=4, canaries=16)
    return folder


@pytest.fixture(scope="session")
def released(comparisons: dict[str, Comparison], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real private run that releases class statistics once, before its first round."""
    root = comparisons["one seed"].folder.parent
    private = ["privacy.mechanism=statistics", "privacy.epsilon=4.0", "privacy.delta=0.01", "algorithm=dp-fpl"]
    folder = tmp_path_factory.mktemp("released") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SORDINO_CACHE", str(root / "cache"))
        run(load_config(root / "config.toml", private), folder)
    return folder


@pytest.fixture
def write_run(comparisons: dict[str, Comparison]) -> WriteRun:
    """A function that writes a run directory which is varied from a real one; it returns the summary's content."""
    both = comparisons["two seeds"]
    (plain, *_), (private, *_) = both.runs("promptfl"), both.runs("dp-fpl")

    def write(
        directory: Path,
        algorithm: str = "promptfl",
        seed: int = 0,
        *,
        clients: int = 10,
        rounds: int = 20,
        every: int = 5,
        noised: bool = False,
        names: list[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """Write a run of `clients` with drawn accuracies; `changes` replace other parts of its summary."""
        real = read_run(private if noised else plain)
        tables = real.config | {"algorithm": algorithm, "seed": seed, "settings": {algorithm: settings or {"rank": 4}}}
        summary = Summary.model_validate(
            real.summary.as_dict()
            | {"algorithm": algorithm, "seed": seed, "dataset": "digits", "clients": clients, "rounds": rounds}
            | drawn_accuracies(real.summary, f"{algorithm}-{seed}", clients, names)
            | ({} if rounds else {"communication": dict.fromkeys(real.summary.as_dict()["communication"], 0)})
            | changes
        )
        directory.mkdir(parents=True)
        summary.write(directory)
        (directory / "config.toml").write_text(to_toml(tables), encoding="utf-8")
        lines = [json.loads(line) for line in ((real.directory / "metrics.jsonl").read_text()).splitlines()]
        write_metrics(directory, lines[-1], summary, rounds, every)
        return summary.as_dict()

    return write


def drawn_accuracies(real: Summary, seed: str, clients: int, names: list[str] | None) -> dict[str, Any]:
    """Draw `accuracy` and `per_client` of a summary; what else a real client's result holds stays."""
    draw = random.Random(seed)
    names = names or [f"digit {digit}" for digit in range(10)]
    level = 0.3 + 0.5 * draw.random()

    def near(value: float) -> float:
        return min(1.0, max(0.0, value + draw.gauss(0, 0.06)))

    per_client = []
    for client in range(clients):
        template = real.per_client[client % len(real.per_client)].model_dump()
        varied = {
            "client": client,
            "local": near(level + 0.15),
            "neighbor": near(level - 0.1),
            "overall": near(level),
            "novel": None,
            "domain": None,
            "examples": 20 + client % 7,
            "classes": [names[client % len(names)], names[(client + 1) % len(names)]],
            "domains": None,
        }
        per_client.append(template | varied)
    accuracy: dict[str, float | None] = dict.fromkeys(MEASURES)
    for measure in ("local", "neighbor", "overall"):
        accuracy[measure] = statistics.fmean(result[measure] for result in per_client)
    return {"accuracy": accuracy, "per_client": per_client}


def write_metrics(directory: Path, real_line: dict[str, Any], summary: Summary, rounds: int, every: int) -> None:
    """Write `metrics.jsonl` with accuracies that rise to the summary's, each other line's content as in a real run."""
    draw = random.Random(directory.name)
    final = summary.accuracy.model_dump()
    lines = []
    for number in range(rounds + 1):
        share = 1 - math.exp(-number / 6) if rounds else 1.0
        accuracy = None
        if number % every == 0 or number == rounds:
            accuracy = {
                name: None if value is None else min(1, max(0, (0.1 + (value - 0.1) * share) * draw.uniform(0.97, 1)))
                for name, value in final.items()
            }
        lines.append(real_line | {"round": number, "participants": summary.clients, "accuracy": accuracy})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
