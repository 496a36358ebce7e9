"""Three owners with pictures of their own, and an experiment for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from sordino.experiments.config import Experiment, parse_config
from sordino.runtime.fleet import LocalFleet
from sordino.sites.settings import load_site
from sordino.sites.site import Site

COLORS = {"red apple": (200, 30, 30), "green leaf": (30, 180, 40), "blue sky": (40, 60, 210)}
NAMES = ("east", "north", "west")
MECHANISMS = ["none", "dp-sgd", "dp-fedavg", "statistics"]
NOISE = {"mechanism": "dp-sgd", "noise_multiplier": 1.0}


def write_pictures(folder: Path, seed: int, each: int, classes: tuple[str, ...] = tuple(COLORS)) -> Path:
    """Noisy pictures of one color each, in folders of classes."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name.replace(" ", "_")).mkdir(parents=True)
        for number in range(each):
            noisy = np.clip(np.array(COLORS[name]) + generator.integers(-25, 25, (24, 24, 3)), 0, 255)
            file = folder / name.replace(" ", "_") / f"{number}.png"
            Image.fromarray(noisy.astype(np.uint8)).save(file)
    return folder


def encoder_table(clip: Path | None) -> dict[str, str]:
    """The table of a CLIP folder, or of the bundled encoder."""
    return {"name": "bundled"} if clip is None else {"name": "clip", "checkpoint": str(clip)}


def write_site(folder: Path, name: str, clip: Path | None, policy: dict[str, Any] | None = None, **tables: Any) -> Path:
    """A site's file, beside its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "name": name,
        "device": "cpu",
        "data": {"source": "imagefolder:pictures", "test_fraction": 0.4},
        "encoder": encoder_table(clip),
        "policy": {"experiments": ["any"], "epsilon": float("inf"), "mechanisms": MECHANISMS} | (policy or {}),
    } | tables
    file = folder / "site.toml"
    file.write_text(tomli_w.dumps(document), encoding="utf-8")
    return file


def experiment(clip: Path | None, algorithm: str = "promptfl", **tables: Any) -> Experiment:
    """An experiment as its coordinator has it."""
    return parse_config(
        {
            "algorithm": algorithm,
            "rounds": 3,
            "device": "cpu",
            "data": {"source": "digits"},
            "partition": {"scheme": "iid", "clients": 1},
            "encoder": encoder_table(clip),
            "settings": {"context_length": 2, "batch_size": 4, "local_steps": 1, "dp-fpl": {"rank": 1}},
        }
        | tables
    )


def sites_at(files: dict[str, Path]) -> dict[str, Site]:
    """The sites of some files, as if they had just been started."""
    return {name: Site(load_site(file)) for name, file in files.items()}


def fleet(sites: dict[str, Site]) -> LocalFleet:
    return LocalFleet({name: site.turn for name, site in sites.items()})
