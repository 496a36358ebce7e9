"""Forward-only tuning beside what needs gradients: accuracy on 16 examples a class of SST-2 and PACS, in the clear.

All methods of a seed have the same examples, and the same tests: SST-2's validation sentences, and a fixed half of
PACS's pictures. Tasks and searches are those of examples/private_sst2.toml and examples/private_pacs.toml; rates and
steps of the rest are in `sordino.private_tuning.baselines`. All were chosen on other training examples, with seeds from
10 on.
Prints one JSON object: for each task and method the accuracy by seed, their mean and standard deviation, and seconds.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sordino.mpc.tower.distill import teacher_of
from sordino.mpc.tower.sentences import in_the_clear
from sordino.mpc.tower.tower import PrivateTower, SoftmaxTower, bundled_tower
from sordino.private_tuning import baselines
from sordino.private_tuning.open_task import open_task
from sordino.private_tuning.settings import PrivateTuning, load_private_config
from sordino.private_tuning.tasks import ImageTask, TextTask

HERE = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SORDINO_DATA", HERE.parent / "shared" / "data"))
PATHS = {
    "sst2": [f"task.train={DATA}/sst2/train.tsv", f"task.test={DATA}/sst2/validation.tsv"],
    "pacs": [f"task.source=imagefolder:{DATA}/pacs"],
}
QUICK = ["task.shots=4", "task.test_limit=20", "search.generations=2"]


def methods(config: PrivateTuning, task: TextTask | ImageTask, private: PrivateTower) -> dict[str, Callable[[], float]]:
    """What is compared, by name; each gives an accuracy."""
    softmax, search = SoftmaxTower.of(teacher_of(None)), config.search.search(config.seed)
    found = {
        "zero-shot": lambda: baselines.zero_shot(task, softmax),
        "zero-shot, random features": lambda: baselines.zero_shot(task, private),
        "full fine-tuning": lambda: baselines.fine_tuning(task, softmax),
        "gradient prompt tuning": lambda: baselines.prompt_tuning(task, softmax),
        "gradient prompt tuning, random features": lambda: baselines.prompt_tuning(task, private),
        "forward-only": lambda: baselines.forward_only(task, in_the_clear(softmax), search),
        "forward-only, random features": lambda: baselines.forward_only(task, in_the_clear(private), search),
    }
    if isinstance(task, TextTask):
        found["logistic regression"] = lambda: baselines.logistic_regression(task, softmax)
        found["logistic regression, random features"] = lambda: baselines.logistic_regression(task, private)
    return found


def measured(name: str, seeds: range, quick: bool, only: str) -> dict[str, Any]:
    """Accuracies and seconds on one task, of every method whose name begins with `only`."""
    private, lines = bundled_tower(), dict[str, dict[str, list[float]]]()
    overrides = [*PATHS[name], *(QUICK if quick else [])]
    base = load_private_config(HERE / "examples" / f"private_{name}.toml", overrides)
    for seed in seeds:
        config = base.model_copy(update={"seed": seed})
        for method, accuracy in methods(config, open_task(config), private).items():
            if not method.startswith(only):
                continue
            began = time.perf_counter()
            line = lines.setdefault(method, {"accuracy": [], "seconds": []})
            line["accuracy"].append(accuracy())
            line["seconds"].append(time.perf_counter() - began)
            print(f"{name}, seed {seed}, {method}: {line['accuracy'][-1]:.4f}", file=sys.stderr, flush=True)
    return {method: _summary(line["accuracy"], line["seconds"]) for method, line in lines.items()}


def _summary(accuracy: list[float], seconds: list[float]) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "mean": statistics.fmean(accuracy),
        "deviation": statistics.stdev(accuracy) if len(accuracy) > 1 else None,
        "seconds": statistics.fmean(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, ...")
    parser.add_argument("--tasks", default="pacs,sst2", help="of pacs, sst2")
    parser.add_argument("--only", default="", help="methods whose names begin so, such as 'forward-only'")
    parser.add_argument("--quick", action="store_true", help="one seed, few examples, two generations")
    options = parser.parse_args()
    seeds = range(1 if options.quick else options.seeds)
    result = {name: measured(name, seeds, options.quick, options.only) for name in options.tasks.split(",")}
    print(json.dumps({"tasks": result, "threads": torch.get_num_threads(), "quick": options.quick}))


if __name__ == "__main__":
    main()
