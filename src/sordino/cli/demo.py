"""The lines of `sordino demo`, in full and in small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sordino.cli.options import loaded_experiment
from sordino.experiments.variants import Variant, grid

ALGORITHMS = ("zero-shot", "local", "promptfl", "dp-fpl")
EPSILONS = (8.0, 2.0, 1.0)
SHADOWS = 4  # few, so that the demo is short; `sordino audit` takes 64

# `--quick`: five clients with two of five digits each, and no client with the others. Text features are most of the
# work, and are those of half the clients and half the classes. Fewer rounds need larger steps.
QUICK = (
    *("rounds=20", "partition.clients=5", "data.novel_classes=5", "data.train_per_class=60", "data.test_per_class=16"),
    *("settings.optimizer.learning_rate=0.035", "settings.promptfl.server_optimizer.learning_rate=0.035"),
)


def variants(quick: bool, overrides: Sequence[str]) -> list[Variant]:
    """Return the demo's lines: methods without privacy, and one of them at several epsilons.

    Raises:
        ConfigError: an override is not allowed.
    """
    here, changes = Path(__file__).parent, [*(QUICK if quick else ()), *overrides]
    # Named, as overrides of `[privacy]` are for the private lines, and refused where no mechanism is.
    plain = grid(loaded_experiment(here / "demo.toml", ["privacy.mechanism=none", *changes]), ALGORITHMS)
    # Only DP-FPL without privacy is attacked: a shadow costs a run.
    plain[-1] = replace(plain[-1], shadows=SHADOWS)
    return plain + grid(
        loaded_experiment(here / "demo_private.toml", changes), ["dp-fpl"], {"privacy.epsilon": EPSILONS}
    )
