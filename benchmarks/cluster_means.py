"""What the means of a SecFPP cluster tell colluding members about another member's prompt.

Clients with handwritten digits (offline), all in one cluster of `size` members. They learn alone for ten rounds, so
that their first means are of prompts that differ most; from then on all start each round at their cluster's mean. T of
the members pool what they know. Their estimates of a further member's domain-level context are compared with the truth,
as cosine and relative error |estimate - truth| / |truth|:

- `first_mean`: of its whole change since the start, from the first mean that is opened: the mean of the members who do
  not collude.
- `later_mean`: the same of what it learned in one round, from the mean of that round and the one before.
- `successive`: the same, where the member is not there in the round after, and its cluster is opened without it: what
  the others learned in that round is taken for what they learned in the round before, and subtracted.

Colluders take their own part off exactly in all of these, so that with all but one colluding the error is zero: such
clusters are not opened (`sordino.secure.fewest_members`), nor is one that is too small without the member. Zero
colluders are the server alone. Values are means over every member who does not collude, rounds and seeds; the colluders
are those numbered behind the member. Prints one JSON object; its figures are not timings and do not depend on the
machine beyond rounding.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sordino.experiments.config import load_config
from sordino.experiments.features import EncodedDataset
from sordino.experiments.run import assemble
from sordino.progress import silent
from sordino.secure import fewest_members

ALONE = 10  # rounds before the first clustering
LATER = range(12, 16)  # rounds whose updates are attacked


def uploads_of(size: int, seed: int) -> dict[int, Tensor]:
    """Changes [size, M E] of the domain-level contexts since the start, as they are dealt, by round."""
    overrides = [
        "algorithm=secfpp-plain",
        f"seed={seed}",
        f"rounds={LATER.stop}",
        f"partition.clients={size}",
        "settings.local_steps=2",
        f"settings.secfpp.cluster_every={ALONE}",
        "settings.secfpp.clusters=1",
    ]
    config = load_config(Path(__file__).resolve().parents[1] / "examples" / "digits.toml", overrides)
    dataset = EncodedDataset.open(config)
    task, _ = dataset.task(config, silent)
    runtime, _ = assemble(config, dataset, task)
    method, seen = runtime.algorithm, {}

    def exchange(settings: Any, model: Any, server: Any, upload: Any, clients: Any, round_context: Any) -> Any:
        seen[round_context.round] = (upload.domain - server.start).flatten(1).double()
        return method.exchange(settings, model, server, upload, clients, round_context)  # type: ignore[attr-defined]

    members = {name: getattr(method, name) for name in dir(method)}
    runtime.algorithm = SimpleNamespace(**members | {"exchange": exchange})  # type: ignore[assignment]
    training = runtime.begun()
    while training.round < LATER.stop:
        training, _ = runtime.round(training)
    return seen


def estimates(changes: dict[int, Tensor], victim: int, colluders: list[int]) -> list[tuple[str, Tensor, Tensor]]:
    """(Which attack, what it says of the victim, the truth)."""
    size = len(changes[ALONE])
    unknown = [member for member in range(size) if member not in colluders]
    others = [member for member in unknown if member != victim]
    first = changes[ALONE]
    found = [("first_mean", first[unknown].mean(0), first[victim])]
    for number in LATER:
        # All members started this round, and would start the next, at the mean of the last.
        learned = changes[number] - changes[number - 1].mean(0)
        found.append(("later_mean", learned[unknown].mean(0), learned[victim]))
        # Without the victim, the cluster has to be one that is still opened.
        if number + 1 in changes and size - 1 >= fewest_members(len(colluders)):
            after = changes[number + 1] - changes[number].mean(0)
            found.append(("successive", learned[unknown].sum(0) - after[others].sum(0), learned[victim]))
    return found


def attacked(size: int, privacy: int, runs: list[dict[int, Tensor]]) -> dict[str, Any]:
    cosines, errors = defaultdict(list), defaultdict(list)
    for changes in runs:
        for victim in range(size):
            colluders = [(victim + 1 + number) % size for number in range(privacy)]
            for attack, estimate, truth in estimates(changes, victim, colluders):
                cosines[attack].append(float(torch.cosine_similarity(estimate, truth, dim=0)))
                errors[attack].append(float((estimate - truth).norm() / truth.norm()))
    result: dict[str, Any] = {"size": size, "colluders": privacy}
    for attack in cosines:
        result[attack] = {
            "cosine": round(sum(cosines[attack]) / len(cosines[attack]), 3),
            "relative_error": round(sum(errors[attack]) / len(errors[attack]), 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3, 4, 6, 10])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        runs = [uploads_of(size, seed) for seed in range(arguments.seeds)]
        rows += [attacked(size, privacy, runs) for privacy in sorted({0, 1, *range(size - 3, size - 1)} - {-1})]
    print(json.dumps({"seeds": arguments.seeds, "alone": ALONE, "attacks": rows}, indent=2))


if __name__ == "__main__":
    main()
