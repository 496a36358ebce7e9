"""Seconds of a DP-FPL round with the bundled encoder, alone and beside two processes that compute without a pause.

Each figure is the median of rounds in a process of its own, which waits as `sordino` does: the wait policy is what the
package chooses, unless the environment says otherwise. `spinning` repeats both with OpenMP's own default. With two
cores and two competitors a fair share is half of each core, so the ratio is 2 at best where a round uses both cores.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMPETITORS = 2
POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
SPINNING = {"OMP_WAIT_POLICY": "active"}
COMPETE = "x = 1\nwhile True:\n    x = (x * 48271) % 2147483647"


def measure(quick: bool) -> dict[str, float]:
    """Seconds of a round in this process, and how many threads it uses."""
    import sordino  # noqa: F401  settles the wait policy, so it comes before torch

    # isort: split
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))
    from text_tower import CLASS_NAMES

    from sordino.algorithms import algorithm, settings_for
    from sordino.encoders import load_encoder
    from sordino.encoders.prompt_model import PromptModel
    from sordino.runtime.local import LocalRuntime
    from sordino.runtime.settings import RuntimeSettings

    logging.disable(logging.WARNING)
    encoder = load_encoder("bundled", None, "float32", torch.device("cpu"))
    names = [each.strip() for each in CLASS_NAMES.replace("\n", " ").split(",")][: 10 if quick else 100]
    model = PromptModel(encoder, encoder.class_tokens(names))
    clients, images = 10, 160
    features = torch.nn.functional.normalize(torch.randn(clients * images, encoder.feature_width), dim=-1)
    labels = torch.arange(clients * images) % len(names)
    rows = [range(k * images, (k + 1) * images) for k in range(clients)]
    settings = settings_for("dp-fpl", {"context_length": 16, "rank": 8, "batch_size": 32})
    runtime = LocalRuntime(
        algorithm("dp-fpl"), settings, model, features, labels, rows, 1000, RuntimeSettings(), seed=0
    )
    training, _ = runtime.round(runtime.begun())
    seconds = []
    for _ in range(3 if quick else 5):
        began = time.perf_counter()
        training, _ = runtime.round(training)
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "threads": torch.get_num_threads()}


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """So many processes that compute for as long as the block lasts."""
    started = [subprocess.Popen([sys.executable, "-c", COMPETE]) for _ in range(count)]
    try:
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


def seconds_of(quick: bool, busy: bool, policy: dict[str, str] | None) -> dict[str, float]:
    """`measure` in a process of its own.

    Args:
        quick: a smaller size.
        busy: beside competitors.
        policy: variables that say how OpenMP waits; None leaves it to the package, or to the environment.
    """
    environment = dict(os.environ)
    if policy is not None:
        environment = {name: value for name, value in environment.items() if name not in POLICIES} | policy
    command = [sys.executable, __file__, "--one", *(["--quick"] if quick else [])]
    with competitors(COMPETITORS if busy else 0):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def both(quick: bool, policy: dict[str, str] | None = None) -> dict[str, float]:
    """Quiet and busy, and their ratio."""
    quiet, busy = (seconds_of(quick, each, policy) for each in (False, True))
    ratio = busy["seconds"] / quiet["seconds"]
    return {"quiet_seconds": quiet["seconds"], "busy_seconds": busy["seconds"], "busy_over_quiet": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 classes, fewer repeats")
    parser.add_argument("--one", action="store_true", help="measure in this process, and nothing else")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.quick)))
        return
    load = os.getloadavg()[0]  # of the machine before: a figure that is to be quiet needs one near 0
    result = both(arguments.quick)
    if not arguments.quick:
        result |= {"spinning": both(arguments.quick, SPINNING)}
    print(json.dumps(result | {"competitors": COMPETITORS, "load_before": load, "quick": arguments.quick}))


if __name__ == "__main__":
    main()
