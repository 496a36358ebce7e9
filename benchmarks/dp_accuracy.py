"""Accuracy of DP-SGD and of the cotangent mechanism at equal epsilon, one prompt learned on pooled data (`central`).

Both start at "a photo of a", use Adam with a cosine schedule and the default delta, and are given the better of two
learning rates (by the mean over seeds). DP-SGD samples batches of 64 on average; the cotangent mechanism takes all
examples in every step, since a batch costs it one backward pass however large it is. `zero_shot` is the start. Prints
one JSON object.

    python benchmarks/dp_accuracy.py digits
    python benchmarks/dp_accuracy.py imagefolder:../shared/data/pacs --train-per-class 16
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import statistics
import sys
import time
from typing import Any

from sordino.audit.subject import train
from sordino.experiments.config import parse_config
from sordino.experiments.features import EncodedDataset
from sordino.experiments.run import assemble

MECHANISMS: dict[str, dict[str, Any]] = {
    "dp-sgd": {"privacy": {"clip": 0.1}, "batch_size": 64, "rounds": 30},
    "cotangent": {"privacy": {"subspace": 16}, "batch_size": 0, "rounds": 40},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as data.source of a configuration")
    parser.add_argument("--train-per-class", type=int)
    parser.add_argument("--novel-classes", type=int, help="leave so many classes out, as data.novel_classes does")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 2.0])
    parser.add_argument("--learning-rates", type=float, nargs=2, default=[0.02, 0.05])
    parser.add_argument("--mechanisms", nargs="+", choices=list(MECHANISMS), default=list(MECHANISMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dp-sgd-steps", type=int, default=MECHANISMS["dp-sgd"]["rounds"])
    arguments = parser.parse_args()
    MECHANISMS["dp-sgd"]["rounds"] = arguments.dp_sgd_steps
    data = {"source": arguments.source}
    if arguments.train_per_class:
        data["train_per_class"] = arguments.train_per_class
    if arguments.novel_classes:
        data["novel_classes"] = arguments.novel_classes
    base = {"data": data, "partition": {"scheme": "iid", "clients": 1}, "algorithm": "central"}
    dataset: EncodedDataset | None = None

    def accuracy(tables: dict[str, Any], seed: int) -> tuple[float, float, float]:
        """Test accuracy, noise multiplier, and seconds of training a step."""
        nonlocal dataset
        config = parse_config(base | tables | {"seed": seed})
        dataset = dataset or EncodedDataset.open(config)
        task, _ = dataset.task(config, lambda *_: None)
        runtime, evaluation = assemble(config, dataset, task)
        began = time.perf_counter()
        training = train(runtime)
        seconds = (time.perf_counter() - began) / max(1, runtime.rounds)
        return (
            evaluation.scores(runtime.prompts(training)).means()["overall"] or 0.0,
            runtime.mechanism.noise_multiplier,
            seconds,
        )

    seeds = range(arguments.seeds)
    result: dict[str, Any] = vars(arguments) | {
        "zero_shot": statistics.fmean(accuracy({"algorithm": "zero-shot"}, seed)[0] for seed in seeds)
    }
    for epsilon in arguments.epsilon:
        for name in arguments.mechanisms:
            own, tried = MECHANISMS[name], {}
            for rate in arguments.learning_rates:
                settings = {
                    "context_length": 8,
                    "initial_context": "a photo of a",
                    "batch_size": own["batch_size"],
                    "optimizer": {"name": "adam", "learning_rate": rate, "schedule": "cosine"},
                }
                privacy = own["privacy"] | {"mechanism": name, "epsilon": epsilon}
                tables = {"privacy": privacy, "settings": settings, "rounds": own["rounds"]}
                tried[rate] = [accuracy(tables, seed) for seed in seeds]
                print(name, epsilon, rate, tried[rate], file=sys.stderr, flush=True)
            best = max(tried, key=lambda rate: statistics.fmean(each[0] for each in tried[rate]))
            values = [each[0] for each in tried[best]]
            result[f"{name}, epsilon {epsilon:g}"] = {
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "learning_rate": best,
                "noise_multiplier": tried[best][0][1],
                "steps": own["rounds"],
                "seconds_a_step": statistics.median(each[2] for each in tried[best]),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
