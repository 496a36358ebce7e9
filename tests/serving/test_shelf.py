"""The prompts that a server holds do not change one another's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from sordino.encoders.base import DualEncoder
from sordino.prompt_file import SavedPrompt
from sordino.serving.classifier import Answer, PromptClassifier
from sordino.serving.registry import Registry
from sordino.serving.server.shelf import Shelf
from sordino.serving.sources import from_run
from sordino.serving.trust import Trusted

NOISE = np.random.default_rng(1).integers(0, 255, (4, 30, 40, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(picture) for picture in NOISE]


def test_a_version_answers_the_same_in_whatever_order_prompts_are_loaded(
    make_run: Callable[..., Path], shared_run: Path, key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path
) -> None:
    """Prompts of one encoder in two precisions: features of the one are not those of the other."""
    runs = {"full": shared_run, "half": make_run("encoder.dtype=bfloat16"), "other": make_run("rounds=2")}
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        for name, run in runs.items():
            material = from_run(run, key)
            registry.publish(name, material.facts, material.files, key, accept_not_private=True)

        def answers(order: Sequence[str]) -> dict[str, list[Answer]]:
            loaded = []

            def load(saved: SavedPrompt) -> DualEncoder:
                loaded.append(saved.encoder.dtype)
                return saved.load_encoder()

            shelf = Shelf(registry, trusted, 4, load)
            found = {name: shelf.take(name, None).classify(PICTURES, top=9, digits=6) for name in order}
            assert sorted(loaded) == ["bfloat16", "float32"]  # two prompts share one
            return found

        alone = {
            name: PromptClassifier.from_registry(name, None, registry, trusted).classify(PICTURES, top=9, digits=6)
            for name in runs
        }
        for order in permutations(runs):
            assert answers(order) == alone
