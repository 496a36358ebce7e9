"""Public images of `data.public`, from the folder to the directions of the noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sordino.audit.subject import Subject
from sordino.errors import ConfigError, DataError, RunError
from sordino.experiments.config import Experiment, load_config
from sordino.experiments.features import EncodedDataset
from sordino.experiments.privacy.plan import plan
from sordino.experiments.run import assemble, run
from sordino.privacy.example_level import IMAGES_PUBLIC
from sordino.privacy.ledger import Ledger
from sordino.progress import silent

COTANGENT = ["privacy.mechanism=cotangent", "privacy.epsilon=8.0", "privacy.delta=0.01", "privacy.subspace=3"]
SIMULATED = ["privacy.simulation=true", "privacy.nonce=" + "a5" * 16]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Twelve pictures at three depths, among other files."""
    generator = np.random.default_rng(7)
    for number in range(12):
        folder = tmp_path / "public" / "/".join("ab"[: number % 3])
        folder.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 255, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    (tmp_path / "public" / "notes.txt").write_text("not a picture")
    return tmp_path / "public"


@pytest.fixture
def configured(config_file: Path, public: Path) -> Callable[..., Experiment]:
    def of(*overrides: str) -> Experiment:
        keys = [f"data.public={public}", "privacy.directions=images", *COTANGENT, *overrides]
        return load_config(config_file, keys)

    return of


def directions(config: Experiment) -> torch.Tensor:
    dataset = EncodedDataset.open(config)
    task, _ = dataset.task(config, silent)
    mechanism = assemble(config, dataset, task)[0].mechanism
    return mechanism._directions  # type: ignore[attr-defined, no-any-return]


def test_directions_follow_the_public_images_alone(
    configured: Callable[..., Experiment], public: Path, pictures: Path
) -> None:
    config = configured()
    before = directions(config)
    assert before.shape[1] == 3
    for file in pictures.rglob("*.png"):  # all private pictures become others
        Image.effect_noise((24, 24), 90).convert("RGB").save(file)
    torch.testing.assert_close(directions(config), before, rtol=0, atol=0)
    Image.new("RGB", (24, 24), (250, 0, 250)).save(public / "a" / "1.png")
    assert not torch.allclose(directions(config), before)


@pytest.mark.slow
def test_a_run_says_what_it_takes_as_public(
    configured: Callable[..., Experiment], public: Path, tmp_path: Path
) -> None:
    config = configured()
    summary = run(config, tmp_path / "run")
    ledger = Ledger.from_json((tmp_path / "run" / "ledger.json").read_bytes())
    assert IMAGES_PUBLIC in ledger.assumptions
    assert IMAGES_PUBLIC in summary.privacy.statement
    assert plan(config).ledger.assumptions == ledger.assumptions
    # An audit varies the run with the same directions.
    subject = Subject.open(tmp_path / "run")
    varied = subject.variation(subject.features, subject.labels, [[0, 1], [2, 3]], seed=3)
    assert subject.runtime.mechanism.public is not None
    assert varied.mechanism.public is subject.runtime.mechanism.public


def test_a_run_belongs_to_its_public_images(
    configured: Callable[..., Experiment], public: Path, tmp_path: Path
) -> None:
    config = configured()
    run(config, tmp_path / "run")
    assert "public" in json.loads((tmp_path / "run" / "data.json").read_bytes())
    (tmp_path / "run" / "summary.json").unlink()
    (public / "0.png").unlink()
    with pytest.raises(RunError, match=r"the pictures in data\.public changed"):
        run(config, tmp_path / "run", resume=True)


def test_other_public_images_draw_other_simulated_noise(configured: Callable[..., Experiment], public: Path) -> None:
    """Noise that could be subtracted between two runs would reveal the difference of what they released."""

    def identity() -> str:
        config = configured(*SIMULATED)
        dataset = EncodedDataset.open(config)
        return assemble(config, dataset, dataset.task(config, silent)[0])[0].identity

    before = identity()
    assert identity() == before
    (public / "0.png").unlink()
    assert identity() != before


def test_a_copy_of_a_private_picture_is_refused(
    configured: Callable[..., Experiment], public: Path, pictures: Path, tmp_path: Path
) -> None:
    for file in pictures.glob("red_apple/*.png"):  # all, so that some train
        shutil.copy(file, public / f"copy-{file.name}")
    with pytest.raises(DataError, match=r"data\.public holds a copy of 'red_apple/\d\.png', which this run uses"):
        run(configured(), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_folder_and_directions_go_together(config_file: Path, public: Path) -> None:
    for keys in ([f"data.public={public}"], ["privacy.directions=images"]):
        with pytest.raises(ConfigError, match=r"data\.public.*goes together with privacy\.directions = 'images'"):
            load_config(config_file, [*COTANGENT, *keys])


@pytest.mark.parametrize("left", [0, 3])
def test_too_few_public_images_are_refused(left: int, configured: Callable[..., Experiment], public: Path) -> None:
    for file in sorted(public.rglob("*.png"))[left:]:
        file.unlink()
    expected = r"holds no picture" if left == 0 else r"3 directions need more than as many public images"
    with pytest.raises((DataError, ConfigError), match=expected):
        directions(configured())


def test_a_missing_folder_is_named(configured: Callable[..., Experiment], public: Path) -> None:
    config = configured()
    shutil.rmtree(public)
    with pytest.raises(DataError, match=r"data\.public: there is no folder"):
        directions(config)
