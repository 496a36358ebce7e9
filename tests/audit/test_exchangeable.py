"""The premise of bounds by pairs: a fair coin of its own decided which image of a pair was trained on."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from audit.test_membership import make_task
from sordino.algorithms import algorithm, settings_for
from sordino.audit.findings.strength import judge
from sordino.audit.findings.words import as_text
from sordino.audit.release import attack_release
from sordino.audit.run import audit
from sordino.audit.subject import OWN_SPLIT, WHOLE_PERSONS, Subject, train
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.experiments.config import Experiment, load_config
from sordino.experiments.run import run
from sordino.privacy.ledger import Ledger
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings
from sordino.tasks.images import ImageSet
from sordino.tasks.settings import DataSettings, PartitionSettings
from sordino.tasks.splits import build_task

COTANGENT = ["privacy.mechanism=cotangent", "privacy.epsilon=4.0", "privacy.delta=0.01", "privacy.subspace=4"]
STATISTICS = ["privacy.mechanism=statistics", "privacy.epsilon=2.0", "privacy.delta=0.01"]
WHY = f"no bound on epsilon: {WHOLE_PERSONS}"
PICTURES, SEEDS = 48, 400


@pytest.fixture
def persons(pictures: Path, tmp_path: Path) -> Path:
    """A table that gives each person two pictures of one class: four persons a class."""
    names = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))
    lines = [f"{name},{Path(name).parent.name} {int(Path(name).stem) // 2}" for name in names]
    path = tmp_path / "persons.csv"
    path.write_text("\n".join(["file,person", *lines]) + "\n")
    return path


# --- splits


def tossed(scheme: str, domains: bool, size: int, **data: Any) -> tuple[float, float]:
    """Return how far coins are from fair, and pairs of coins from independent, in deviations of fair coins.

    Picture i and picture i + 12 are of one class, in one domain or in two. A coin was tossed if one of them trains and
    the other one tests.
    """
    rows = np.arange(PICTURES)
    kinds = rows // 2 % 2 if scheme == "domain" else rows // 12 % 2
    images = ImageSet(
        source="made here",
        class_names=("cat", "dog"),
        labels=rows % 2,
        names=[str(row) for row in rows],
        read=lambda index: b"",
        domains=kinds if domains else None,
        domain_names=("photo", "sketch") if domains else None,
        persons=rows // (2 * size) * 2 + rows % 2 if size else None,  # `size` pictures of a person, all of one class
    )
    beta = {"beta": 1.0} if scheme == "dirichlet" else {}
    partition = PartitionSettings(scheme=scheme, clients=2, **beta)  # type: ignore[arg-type]
    first = rows[rows % 24 < 12]
    coins = []
    for seed in range(SEEDS):
        task = build_task(images, DataSettings(source="digits", **data), partition, seed)
        side = np.zeros(PICTURES, dtype=np.int64)
        side[np.concatenate(task.train)], side[task.test] = 1, -1
        opposite = side[first] * side[first + 12] == -1
        coins.append(np.where(opposite, side[first], 0))
    drawn = np.stack(coins)
    return biased(drawn), biased(drawn[:, :-2:4] * drawn[:, 2::4])


def biased(coins: NDArray[np.int64]) -> float:
    return float(abs(coins.sum()) / math.sqrt(np.abs(coins).sum()))


@pytest.mark.parametrize(
    ("scheme", "domains", "size", "data"),
    [
        ("iid", False, 0, {}),
        ("iid", True, 0, {}),
        ("dirichlet", True, 0, {}),
        ("domain", True, 0, {}),
        ("iid", False, 0, {"train_per_class": 7, "test_per_class": 9}),
        ("iid", False, 1, {"test_fraction": 0.5}),
    ],
)
def test_a_coin_of_its_own_decides_over_each_pair(scheme: str, domains: bool, size: int, data: dict[str, Any]) -> None:
    fair, independent = tossed(scheme, domains, size, **data)
    assert fair < 4
    assert independent < 4


def test_one_coin_decides_over_all_pictures_of_a_person() -> None:
    fair, independent = tossed("iid", False, 3, test_fraction=0.5)
    assert fair < 12  # deviations of coins that go by threes are larger
    assert independent > 10


# --- what a subject says of them


def test_a_subject_says_why_pairs_bound_nothing(
    config_file: Path, pictures: Path, persons: Path, tmp_path: Path
) -> None:
    def opened(name: str, *keys: str) -> str | None:
        run(load_config(config_file, ["rounds=1", *keys]), tmp_path / name)
        return Subject.open(tmp_path / name).not_exchangeable

    assert opened("plain") is None
    assert opened("persons", f"data.persons={persons}") == WHOLE_PERSONS
    lines = persons.read_text().splitlines()
    persons.write_text("\n".join([lines[0], *(f"{line} {number}" for number, line in enumerate(lines[1:]))]))
    assert opened("one picture each", f"data.persons={persons}") is None
    poisoned = ["poisoning.clients=1", "poisoning.target=blue sky"]
    assert opened("copies with a trigger", f"data.persons={persons}", *poisoned) is None
    for number, folder in enumerate(("train", "test")):
        for path in pictures.rglob("*.png"):
            if int(path.stem) % 2 == number:
                place = tmp_path / "split" / folder / path.parent.name
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
    assert opened("own split", f"data.source=imagefolder:{tmp_path / 'split'}", "data.train_per_class=2") == OWN_SPLIT
    (tmp_path / "split" / "train").rename(tmp_path / "split" / "photo")
    (tmp_path / "split" / "test").rename(tmp_path / "split" / "sketch")
    assert opened("domains", f"data.source=imagefolder:{tmp_path / 'split'}") is None


def test_pictures_of_whole_persons_refute_nothing_and_the_page_says_why(
    config_file: Path, persons: Path, tmp_path: Path
) -> None:
    for name, keys, attacks in (
        ("uploads", COTANGENT, ["membership", "rounds", "label-only"]),
        ("statistics", STATISTICS, ["release"]),
    ):
        folder = tmp_path / name
        run(load_config(config_file, [*keys, "rounds=2", f"data.persons={persons}"]), folder)
        found = audit(folder, attacks, shadows=4 if "membership" in attacks else None)
        results = [
            part
            for attack in attacks
            for part in found["attacks"][attack].values()
            if isinstance(part, dict) and "auc" in part
        ]
        assert len(results) == {"uploads": 8, "statistics": 2}[name]
        for result in results:
            assert (result["epsilon"], result["refuted"], result["no_bound"]) == (None, False, WHOLE_PERSONS)
        said = as_text(found)
        assert said.count(WHY) == len(attacks)
        assert "epsilon is at least" not in said
        assert WHOLE_PERSONS in (folder / "report.html").read_text(encoding="utf-8")
        ledger = Ledger.from_json((folder / "ledger.json").read_bytes(), folder / "ledger.json")
        data, _, refuted = judge(found, ledger, "example")
        assert not refuted
        assert all(WHY in data["attacks"][attack] for attack in attacks)


def test_the_attack_over_rounds_is_refused_where_the_person_is_the_unit(
    config_file: Path, persons: Path, tmp_path: Path
) -> None:
    keys = ["privacy.unit=person", "privacy.mechanism=cotangent", "privacy.noise_multiplier=1.5", "privacy.delta=0.01"]
    run(load_config(config_file, [*keys, "rounds=2", f"data.persons={persons}"]), tmp_path / "run")
    for attack in ("rounds", "label-only", "membership"):
        with pytest.raises(ConfigError, match="^privacy.unit = 'person': .*not persons"):
            audit(tmp_path / "run", [attack])


def test_many_pictures_of_a_person_show_more_than_is_claimed_for_one(model: PromptModel) -> None:
    """Taken for independent coins, they call an honest release false; intervals of pictures are too short."""
    clients, classes, copies = 3, 4, 20
    cells = clients * classes
    generator = torch.Generator().manual_seed(2)
    of_persons = torch.randn(2 * cells, model.encoder.feature_width, generator=generator, dtype=torch.float64)
    rows = np.arange(2 * cells * copies)
    person = rows // copies  # one of each client and class trains, and one tests
    features = F.normalize(of_persons[person], dim=-1)
    labels = person % classes
    half = len(rows) // 2
    held = [np.flatnonzero((person[:half] // classes) == client) for client in range(clients)]
    task = make_task(labels, [part.tolist() for part in held], range(half, len(rows)))
    runtime = LocalRuntime(
        algorithm("promptfl"),
        settings_for("promptfl", {"context_length": 2}),
        model,
        features[:half],
        torch.from_numpy(labels[:half]),
        [part.tolist() for part in held],
        1,
        RuntimeSettings(),
        0,
        PrivacySettings(mechanism="statistics", epsilon=0.5, delta=1e-3, simulation=True, nonce="a5" * 16),
    )
    config = Experiment(data=DataSettings(source="digits"), partition=PartitionSettings(scheme="iid", clients=clients))
    training = train(runtime)
    naive = Subject(config, runtime, training, training.ledger, task, features, torch.from_numpy(labels))
    assert attack_release(naive, 1).regression.refuted
    found = attack_release(replace(naive, not_exchangeable=WHOLE_PERSONS, persons=person), 1).regression
    assert (found.epsilon, found.refuted, found.no_bound) == (None, False, WHOLE_PERSONS)
    short = attack_release(naive, 1).regression
    assert found.auc == short.auc
    assert found.auc_interval[0] < short.auc_interval[0]
    assert found.found[1].low < short.found[1].low
