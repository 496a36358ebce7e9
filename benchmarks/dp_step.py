"""Seconds of one training step at batch 64 with no privacy and with each mechanism that protects examples.

One client, ten classes, 16 context tokens, the bundled encoder; the features are random, as time does not depend on
them. A step is a gradient: sampling and the update are the same for all and left out. All take turns, so that other
work on the machine slows them alike; seconds are medians. Under `statistics` a step follows the release, whose seconds
are given by themselves: the sums of 64 images, the noise, the estimates, and examples drawn from them. Prints one JSON
object.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import resource
import statistics
import sys
import time
from dataclasses import replace

import torch

from sordino.encoders import load_encoder
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.cotangent import CotangentGradients, public_directions
from sordino.privacy.dp_sgd import DpSgdGradients, Group
from sordino.privacy.gradients import Batch, ExactGradients, Gradients, Sampling
from sordino.privacy.mechanism import MechanismInputs
from sordino.privacy.settings import PrivacySettings
from sordino.privacy.statistics.estimates import drawn
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.randomness import Streams, SystemRandomness
from sordino.runtime.release import ClientsRelease, collect

BATCH, LENGTH, SUBSPACE = 64, 16, 16
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def released(model: PromptModel, batch: Batch) -> Batch:
    """Release one client's statistics with a noise multiplier of 1, and draw as many examples as it has."""
    settings = PrivacySettings(mechanism="statistics", noise_multiplier=1.0, center_share=0.1, scatter_share=0.1)
    inputs = MechanismInputs(
        trains=True,
        pools_data=False,
        sizes=(BATCH,),
        weights=(1.0,),
        uniform=True,
        batch_size=None,
        steps=1,
        linear=True,
        rounds_participated=(1,),
        rounds=1,
        participation=1.0,
        shared={},
        personal=True,
        server_uses="mean",
        discloses=(),
        classes=len(NAMES),
    )
    mechanism = StatisticsMechanism(settings, inputs, model, 1e-3, 1.0)
    table = (batch.features[0], batch.labels[0], [torch.arange(BATCH)], [0])
    clients = ClientsRelease(mechanism, *table, SystemRandomness(1, batch.features.device))
    collect(mechanism, clients.handle, SystemRandomness(1, batch.features.device), "", batch.features.device)
    assert clients.released is not None
    estimates = mechanism.estimator.statistics(clients.released, [0])
    features, labels, _ = drawn(estimates, Streams(0, 0, [0], batch.features.device), 0.5)
    chosen = torch.arange(BATCH) % len(labels)
    return replace(batch, features=features[chosen][None].float(), labels=labels[chosen][None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    quick = parser.parse_args().quick
    encoder = load_encoder("bundled", None, "float32", torch.device("cpu"))
    model = PromptModel(encoder, encoder.class_tokens(NAMES))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, BATCH, encoder.feature_width, generator=generator)
    labels = torch.randint(0, len(NAMES), (1, BATCH), generator=generator)
    sampling = Sampling(torch.tensor([0.1]), torch.tensor([float(BATCH)]), 0)
    there = torch.ones(1, BATCH, dtype=torch.bool)
    batch = Batch(torch.nn.functional.normalize(features, dim=-1), labels, there, sampling)
    context = 0.02 * torch.randn(1, LENGTH, encoder.context_width, generator=generator)
    streams = Streams(0, 1, [0], encoder.device)
    group = Group(1.0, torch.ones(1))
    exact = ExactGradients(model)
    kinds: dict[str, Gradients] = {
        "none": exact,
        "statistics": exact,
        "dpsgd": DpSgdGradients(model, frozenset(), group, group, streams),
        "cotangent": CotangentGradients(model, public_directions(encoder, SUBSPACE), 1.0, 1.0, streams),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    releases = []
    for turn in range(1 + (5 if quick else 15)):
        began = time.perf_counter()
        drawn_batch = released(model, batch)
        if turn:
            releases.append(time.perf_counter() - began)
        for name, gradients in kinds.items():
            chosen = drawn_batch if name == "statistics" else batch
            began = time.perf_counter()
            gradients(lambda by: by["context"], {"context": context}, {}, chosen)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {f"{name}_seconds": value for name, value in median.items()} | {
        "dpsgd_over_cotangent": median["dpsgd"] / median["cotangent"],
        "dpsgd_over_none": median["dpsgd"] / median["none"],
        "cotangent_over_none": median["cotangent"] / median["none"],
        "statistics_over_none": median["statistics"] / median["none"],
        "statistics_release_seconds": statistics.median(releases),
        "peak_rss_gb": peak / 1e9,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "quick": quick,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
