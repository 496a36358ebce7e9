"""Fixtures that many tests share: a small frozen model, and a task that it can learn."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
import typer.testing
from hypothesis import settings
from PIL import Image

from encoders.checkpoints import save_clip
from sordino.encoders.cache import Kind
from sordino.encoders.clip import ClipEncoder
from sordino.encoders.encode import forward
from sordino.encoders.prompt_model import PromptModel
from sordino.memory import collect_seldom
from sordino.privacy.gradients import ExactGradients
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings

collect_seldom()

# A shell has its background commands ignore interruptions, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("sordino", deadline=None, derandomize=True)
settings.load_profile("sordino")

# Files that take minutes come first, so that no process is left with one of them when all others are done. Those over
# real engines, which mostly wait, do not come together: beside them others compute.
LONGEST = (
    *("engines/test_over_flare.py", "mpc/parties/test_processes.py", "private_tuning/test_trial.py"),
    *("engines/test_over_flower.py", "test_docs.py", "audit/test_broken.py", "mpc/tower/test_public_text.py"),
    *("serving/test_page.py", "privacy/test_sensitivity.py", "flare/test_processes.py", "flower/test_processes.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, then those with slow tests; the order within a file stays."""
    here = Path(__file__).parent
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.relative_to(here).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), item.path not in slow

    items.sort(key=place)


COLORS = {
    "red apple": (200, 30, 30),
    "green leaf": (30, 180, 40),
    "blue sky": (40, 60, 210),
    "grey stone": (90, 90, 90),
}
CLASS_NAMES = ["cat", "dog", "sunflower", "grand piano"]


@pytest.fixture(scope="session", autouse=True)
def made_once() -> Iterator[None]:
    """What every test would make anew, and what nobody could tell apart.

    They are the tree of all commands, encoders of the same unchanged files, and files that outlast a failure of power
    (a killed process loses none either way).
    """
    load, known = ClipEncoder.load, {}

    def load_once(checkpoint: str, device: torch.device, dtype: torch.dtype = torch.float32) -> ClipEncoder:
        files = sorted(Path(checkpoint).glob("*")) if device.type == "cpu" else []
        key = (checkpoint, dtype, *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
        if not files:
            return load(checkpoint, device, dtype)
        if key not in known:
            known[key] = load(checkpoint, device, dtype)
        return copy.copy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((typer.main, "get_command"), (typer.testing, "_get_command")):
            patch.setattr(module, name, cache(getattr(module, name)))
        patch.setattr(ClipEncoder, "load", load_once)
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP checkpoint in a folder, randomly initialized."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def model(clip_folder: Path) -> PromptModel:
    """The small CLIP with four classes, in float64, so that identities hold to many digits."""
    encoder = ClipEncoder.load(str(clip_folder), torch.device("cpu"), torch.float64)
    encoder.logit_scale = 10.0
    return PromptModel(encoder, encoder.class_tokens(CLASS_NAMES))


@pytest.fixture(scope="session")
def gradients(model: PromptModel) -> ExactGradients:
    return ExactGradients(model)


@pytest.fixture(scope="session")
def table(model: PromptModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Forty unit-norm image features [40, D] around a direction for each class, and their labels [40]."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % len(CLASS_NAMES)
    width = model.encoder.feature_width
    directions = torch.randn(len(CLASS_NAMES), width, generator=generator, dtype=torch.float64)
    features = directions[labels] + 0.3 * torch.randn(40, width, generator=generator, dtype=torch.float64)
    return features / features.norm(dim=-1, keepdim=True), labels


@pytest.fixture(scope="session")
def read(model: PromptModel, table: tuple[torch.Tensor, torch.Tensor]) -> Callable[[Kind], torch.Tensor]:
    """The same forty images as a method's model reads them: [40, ...] of a kind."""

    @cache
    def as_kind(kind: Kind) -> torch.Tensor:
        features, labels = table
        generator = torch.Generator().manual_seed(2)
        if kind == "image":
            return features
        if kind == "patch":  # five patches, two of which show the class
            patches = torch.randn(40, 5, features.shape[1], generator=generator, dtype=torch.float64)
            patches[:, :2] = 5 * features[:, None] + 0.1 * patches[:, :2]
            return torch.nn.functional.normalize(patches, dim=-1)
        size = model.encoder.transform(Image.new("RGB", (8, 8))).shape[-1]
        colors = torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2], [1, 1, 1]], dtype=torch.float64)
        noise = torch.randn(40, 3, size, size, generator=generator, dtype=torch.float64)
        return forward(model.encoder, kind, colors[labels, :, None, None] + 0.3 * noise)

    return as_kind


@pytest.fixture
def make_runtime(
    model: PromptModel, table: tuple[torch.Tensor, torch.Tensor], read: Callable[[Kind], torch.Tensor]
) -> Callable[..., LocalRuntime]:
    """Builds a runtime of a method over clients that hold the given rows."""
    from sordino.algorithms import algorithm, settings_for
    from sordino.algorithms.base import model_class

    def make(
        name: str,
        rows: list[list[int]],
        tables: dict[str, object] | None = None,
        rounds: int = 6,
        seed: int = 0,
        privacy: dict[str, object] | None = None,
        boosts: dict[int, float] | None = None,
        public: torch.Tensor | None = None,
        **runtime: object,
    ) -> LocalRuntime:
        method, settings = algorithm(name), settings_for(name, tables or {})
        own = model_class(method).of(settings, model.encoder, model.classes)
        return LocalRuntime(
            method,
            settings,
            own,
            read(own.reads),
            table[1],
            rows,
            rounds,
            RuntimeSettings(**runtime),  # type: ignore[arg-type]
            seed,
            PrivacySettings(**(privacy or {})),  # type: ignore[arg-type]
            boosts,
            public=public,
        )

    return make


@pytest.fixture(scope="session", autouse=True)
def common_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that several tests share do not read or fill the user's feature cache either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SORDINO_CACHE", str(tmp_path_factory.mktemp("common-cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's feature cache."""
    monkeypatch.setenv("SORDINO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Folders of real data beside the project; a test that asks for one is skipped where it is absent."""
    root = Path(os.environ.get("SORDINO_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"no {name}/ in {root}; set SORDINO_DATA")
        return root / name

    return find


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four classes of eight noisy pictures of one color each."""
    generator = np.random.default_rng(0)
    for name, color in COLORS.items():
        folder = tmp_path / "pictures" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for number in range(8):
            noise = generator.integers(-25, 25, (24, 24, 3))
            Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def config_file(pictures: Path, clip_folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(f"""
        algorithm = "dp-fpl"
        rounds = 6
        device = "cpu"
        [data]
        source = "imagefolder:{pictures}"
        train_per_class = 4
        [partition]
        scheme = "disjoint"
        clients = 2
        [encoder]
        name = "clip"
        checkpoint = "{clip_folder}"
        [runtime]
        evaluate_every = 2
        checkpoint_every = 2
        [settings]
        context_length = 4
        batch_size = 2
        local_steps = 1
        [settings.dp-fpl]
        rank = 2
    """)
    return file
