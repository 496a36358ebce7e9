"""What obfuscating the examples at most risk does to attacks and to accuracy; no guarantee of any kind.

SOFT (Zhang et al., Selective Data Obfuscation for Protecting LLM Fine-tuning against Membership Inference Attacks,
USENIX Security 2025, arXiv 2506.10424) warms a model up, selects the texts with the lowest loss, and paraphrases these
before training. Features have no paraphrase. Here each client selects by its own class means, which take the place of
the warm-up, and mixes a selected image's feature with its class's text feature, or with its own mean of the class. The
client does this before training, and every shadow federation does the same to what it trains on: the attacker knows
the defense. It knows images as they are.

Two attacks: LiRA by `--shadows` federations, against a method's published prompts; and the server's attack over rounds,
where the method uploads. With mixtures of text, which the attacker can make too, the attack over rounds is also made
with the candidates' obfuscated features, and the larger AUC counts. Prints one JSON object, a line for every seed.

    python benchmarks/soft.py examples/digits.toml --set algorithm=local --share 0.5
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sordino.audit import rounds
from sordino.audit.membership import infer_membership
from sordino.audit.subject import Subject, train
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.experiments.config import load_config
from sordino.experiments.features import EncodedDataset
from sordino.experiments.run import assemble
from sordino.progress import silent
from sordino.runtime.local import LocalRuntime


@dataclass(frozen=True)
class Soft:
    """The defense.

    Attributes:
        share: of a client's examples that are obfuscated.
        keep: weight of the image's own feature in the mixture.
        toward: "text" or "mean", the other part of it.
    """

    share: float
    keep: float
    toward: str

    @torch.no_grad()
    def obfuscated(self, features: Tensor, labels: Tensor, text: Tensor, scale: float) -> Tensor:
        """Return one client's examples [n, D], those with the lowest losses mixed.

        Args:
            features, labels: [n, D] and [n].
            text: [C, D], features of the hand-written prompt.
            scale: of logits.
        """
        held = labels.unique().tolist()
        means = text.clone()
        means[held] = normalize(torch.stack([features[labels == label].mean(0) for label in held]), dim=-1)
        losses = cross_entropy(scale * features @ means.T, labels, reduction="none")
        chosen = losses.argsort()[: round(self.share * len(labels))]
        return features.index_copy(0, chosen, self.mixed(features, labels, text, means)[chosen])

    def mixed(self, features: Tensor, labels: Tensor, text: Tensor, means: Tensor) -> Tensor:
        """Return all examples as they are if they are selected."""
        other = text if self.toward == "text" else means
        return normalize(self.keep * features + (1 - self.keep) * other[labels], dim=-1)

    def applied(self, runtime: LocalRuntime) -> LocalRuntime:
        """Obfuscate what the clients of a runtime train on; return the runtime."""
        data, text = runtime.data, written(runtime.model)
        features = data.features.clone()
        for row, count in zip(data.rows, data.counts, strict=True):
            own = row[: int(count)]
            scale = float(runtime.model.encoder.logit_scale)
            features[own] = self.obfuscated(features[own], data.labels[own], text, scale)
        runtime.data = replace(data, features=features)
        return runtime


@torch.no_grad()
def written(model: PromptModel) -> Tensor:
    """Return the class features [C, D] of the hand-written prompt."""
    encoder = model.encoder
    context = encoder.zero_shot_context()[None].to(encoder.device)
    return encoder.text_features(context, model.classes)[0]


@dataclass(frozen=True)
class Defended(Subject):
    """A run whose clients obfuscated their examples, as all its variations do."""

    soft: Soft = Soft(0.0, 1.0, "text")

    def variation(
        self, features: Tensor, labels: Tensor, rows: Sequence[Sequence[int]], seed: int, **privacy: Any
    ) -> LocalRuntime:
        return self.soft.applied(super().variation(features, labels, rows, seed, **privacy))


def measured(config: Any, dataset: EncodedDataset, soft: Soft, shadows: int, gradients: int) -> dict[str, Any]:
    """Return the accuracy of one run and the attacks' AUC."""
    task, _ = dataset.task(config, silent)
    runtime, evaluation = assemble(config, dataset, task)
    soft.applied(runtime)
    training = train(runtime)
    features = dataset.tables["image"].features
    labels = torch.from_numpy(task.labels)
    subject = Defended(config, runtime, training, training.ledger, task, features, labels, dataset=dataset, soft=soft)
    means = evaluation.scores(runtime.prompts(training)).means()
    found: dict[str, Any] = {"seed": config.seed, "local": means["local"], "overall": means["overall"]}
    if shadows:
        membership = infer_membership(subject, shadows)
        found |= {"lira": membership.lira.auc, "lira_found": membership.lira.found[1].true_positive_rate}
        found["rmia"] = membership.rmia.auc
    rounds.GRADIENTS = gradients
    try:
        if gradients:
            attack = rounds.infer_from_rounds(subject, 1).attack
            if soft.share and soft.toward == "text":
                text = written(runtime.model)
                seen = soft.mixed(features, labels.clamp(min=0), text, text)
                again = rounds.infer_from_rounds(replace(subject, features=seen), 1).attack
                attack = max(attack, again, key=lambda each: each.auc)
            found |= {"rounds": attack.auc, "rounds_found": attack.found[1].true_positive_rate}
    except ConfigError as refused:
        found["rounds"] = str(refused)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--share", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--toward", choices=["text", "mean"], default="text")
    parser.add_argument("--shadows", type=int, default=16, help="0 leaves LiRA out")
    parser.add_argument("--gradients", type=int, default=400, help="of the attack over rounds; 0 leaves it out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    dataset: EncodedDataset | None = None
    lines = []
    for share in arguments.share:
        for seed in arguments.seeds:
            config = load_config(arguments.config, [*arguments.overrides, f"seed={seed}"])
            dataset = dataset or EncodedDataset.open(config)
            soft = Soft(share, arguments.keep, arguments.toward)
            line = {"share": share} | measured(config, dataset, soft, arguments.shadows, arguments.gradients)
            lines.append(line)
            print(json.dumps(line), file=sys.stderr, flush=True)
    print(json.dumps({"keep": arguments.keep, "toward": arguments.toward, "lines": lines}))


if __name__ == "__main__":
    main()
