"""What examples at the hand-written prompt's features do for classes that a client lacks.

FedGC (Ye, Zhu, Chai, Chen, Wang, Federated Learning Empowered by Generative Content, 2023, arXiv 2312.05807) and
FewFedPIT (Zhang et al., 2024, arXiv 2403.06131) fill up a client's data with generated examples. Nothing is generated
here: a class that a client lacks gets `--copies` examples whose image feature is the text feature of the class, with
the words "a photo of a". It is public: everybody can make it. Clients' weights in averages, and tests, stay as they
are. Prints one JSON object: accuracy by method and copies.

    python benchmarks/filled_classes.py examples/dp_fpl_tradeoff.toml --set privacy.mechanism=none
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

import torch

from sordino.audit.subject import train
from sordino.experiments.config import load_config
from sordino.experiments.features import EncodedDataset
from sordino.experiments.run import assemble
from sordino.progress import silent
from sordino.runtime.local import LocalRuntime


def fill(runtime: LocalRuntime, copies: int) -> None:
    """Add examples of the classes that each client lacks to what it trains on."""
    data, encoder = runtime.data, runtime.model.encoder
    with torch.no_grad():
        text = encoder.text_features(encoder.zero_shot_context()[None].to(encoder.device), runtime.model.classes)[0]
    first, classes = len(data.features), torch.arange(len(text), device=data.labels.device)
    rows = []
    for row, count in zip(data.rows, data.counts, strict=True):
        own = row[: int(count)]
        lacking = classes[~torch.isin(classes, data.labels[own])]
        rows.append(torch.cat([own, first + lacking.repeat(copies)]))
    runtime.data = replace(
        data,
        features=torch.cat([data.features, text.to(data.features)]),
        labels=torch.cat([data.labels, classes]),
        rows=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        counts=torch.tensor([len(own) for own in rows], device=data.counts.device),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--algorithms", nargs="+", default=["local", "dp-fpl", "promptfl"])
    parser.add_argument("--copies", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    dataset: EncodedDataset | None = None
    lines = []
    for algorithm in arguments.algorithms:
        for copies in arguments.copies:
            scores = []
            for seed in arguments.seeds:
                chosen = [*arguments.overrides, f"algorithm={algorithm}", f"seed={seed}"]
                config = load_config(arguments.config, chosen)
                dataset = dataset or EncodedDataset.open(config)
                task, _ = dataset.task(config, silent)
                runtime, evaluation = assemble(config, dataset, task)
                if copies:
                    fill(runtime, copies)
                scores.append(evaluation.scores(runtime.prompts(train(runtime))).means())
            line: dict[str, object] = {"algorithm": algorithm, "copies": copies}
            for measure in ("local", "neighbor", "overall", "novel"):
                values = [100 * score for each in scores if (score := each[measure]) is not None]
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    line[measure] = f"{statistics.fmean(values):.1f} ± {spread:.1f}"
            lines.append(line)
            print(json.dumps(line), file=sys.stderr, flush=True)
    print(json.dumps({"lines": lines}))


if __name__ == "__main__":
    main()
