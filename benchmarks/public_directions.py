"""Accuracy of the cotangent mechanism by the origin of its public directions, at equal epsilon.

For every seed, `--public` test images are set apart as public ones: nobody trains on them, and no accuracy counts them.
The run of the configuration is then trained with directions of ImageNet's class names, and of the public images. Prints
one JSON object: accuracies by epsilon and directions, one for each seed. It also has the share of the training images'
energy (their features' squared norm), and of the energy between their class means, that r directions capture. There the
rows of the image tower's own classifier are a third origin, and the training images themselves are the bound.

    python benchmarks/public_directions.py examples/dp_fpl_tradeoff.toml --set algorithm=central
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sordino.audit.subject import train
from sordino.experiments.config import Experiment, load_config
from sordino.experiments.features import EncodedDataset
from sordino.experiments.run import assemble
from sordino.privacy.cotangent import image_directions, public_directions
from sordino.progress import silent
from sordino.tasks.splits import Task

RANKS = (16, 32, 64, 128)


def set_apart(task: Task, count: int, seed: int) -> tuple[Task, Tensor]:
    """Return the task without `count` of its test images, and the rows of these."""
    chosen = np.random.default_rng(seed).permutation(len(task.test))
    public, kept = chosen[:count], np.sort(chosen[count:])

    def weights(of_all: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rows' weights over the kept images; rows still sum to 1, or are zero as before."""
        part = of_all[:, kept]
        return part / np.where(part.any(1, keepdims=True), part.sum(1, keepdims=True), 1.0)

    less = replace(task, test=task.test[kept], local=weights(task.local), neighbor=weights(task.neighbor))
    return less, torch.from_numpy(task.test[public])


def captured(features: Tensor, labels: Tensor, directions: Tensor) -> tuple[float, float]:
    """Return the shares of the features' energy, and of their class means' energy less the mean, in directions."""
    means = torch.stack([features[labels == label].mean(0) for label in labels.unique()])
    between = means - means.mean(0)
    shares = [((part @ directions).square().sum() / part.square().sum()).item() for part in (features, between)]
    return shares[0], shares[1]


def energies(dataset: EncodedDataset, task: Task, public: Tensor) -> dict[str, Any]:
    """Return the captured shares by origin, one pair for each of RANKS."""
    table = dataset.tables["image"].features
    held = torch.from_numpy(np.concatenate(task.train))
    features, labels = table[held], torch.from_numpy(task.labels)[held]
    rows = dataset.encoder.classifier_rows()
    origins = {"names": public_directions(dataset.encoder, max(RANKS)).cpu(), "images": _of(table[public])}
    origins |= {} if rows is None else {"classifier": _of(rows.cpu())}
    origins["training images"] = _of(features)
    return {
        name: [[round(share, 3) for share in captured(features, labels, basis[:, :rank])] for rank in RANKS]
        for name, basis in origins.items()
    }


def _of(features: Tensor) -> Tensor:
    return image_directions(features, max(RANKS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0])
    parser.add_argument("--public", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--directions", nargs="+", choices=["names", "images"], default=["names", "images"])
    arguments = parser.parse_args()
    dataset: EncodedDataset | None = None
    shares: dict[str, Any] = {}

    def accuracy(config: Experiment, directions: str) -> dict[str, float | None]:
        nonlocal dataset
        dataset = dataset or EncodedDataset.open(config)
        whole, _ = dataset.task(config, silent)
        task, public = set_apart(whole, arguments.public, config.seed)
        if not shares:
            shares.update(energies(dataset, task, public))
        runtime, evaluation = assemble(config, dataset, task)
        mechanism = runtime.mechanism
        settings = mechanism.settings.model_copy(update={"directions": directions})
        features = dataset.tables["image"].features[public].to(dataset.encoder.device)
        runtime.mechanism = replace(mechanism, settings=settings, public=features)
        return evaluation.scores(runtime.prompts(train(runtime))).means()

    results: list[dict[str, Any]] = []
    for epsilon in arguments.epsilon:
        for directions in arguments.directions:
            overrides = [*arguments.overrides, f"privacy.epsilon={epsilon}"]
            configs = [load_config(arguments.config, [*overrides, f"seed={seed}"]) for seed in arguments.seeds]
            scores = [accuracy(config, directions) for config in configs]
            result: dict[str, Any] = {"epsilon": epsilon, "directions": directions}
            for name in ("local", "neighbor", "overall"):
                values = [100 * (each[name] or 0.0) for each in scores]
                spread = statistics.stdev(values) if len(values) > 1 else None
                result[name] = {"mean": statistics.fmean(values), "deviation": spread, "values": values}
            results.append(result)
            print(json.dumps(result), file=sys.stderr, flush=True)
    print(json.dumps({"captured": shares, "ranks": RANKS, "accuracy": results}))


if __name__ == "__main__":
    main()
