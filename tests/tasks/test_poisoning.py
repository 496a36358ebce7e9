"""Poisoning: where the trigger is in the picture, which pictures carry it, and what a whole run makes of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from sordino.cli.terminal import print_table
from sordino.encoders.bundled import BundledEncoder
from sordino.errors import ConfigError
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.features import EncodedDataset
from sordino.experiments.privacy.plan import planned_mechanism
from sordino.experiments.run import assemble, run
from sordino.experiments.variants import grid
from sordino.progress import silent
from sordino.runtime.local import LocalRuntime
from sordino.tasks import DataSettings, PartitionSettings
from sordino.tasks.images import ImageSet
from sordino.tasks.poisoning import poisoned, stamp, with_triggers
from sordino.tasks.settings import PoisoningSettings
from sordino.tasks.sources import load_images
from sordino.tasks.splits import Task, build_task

IID = PartitionSettings(scheme="iid", clients=10)
SPLITS = ("test", "local", "neighbor", "novel", "domain", "class_names", "novel_names", "client_classes")


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_images(DataSettings(source="digits"))


@pytest.fixture(scope="module")
def domains() -> ImageSet:
    """Three classes in two domains, five pictures each, of which the source says that the last two test."""
    number = np.arange(30)
    return ImageSet(
        source="made up",
        class_names=("apple", "pear", "plum"),
        labels=number % 3,
        names=[f"picture {each}" for each in number],
        read=lambda index: bytes([index]),
        draw=lambda content: Image.new("L", (16, 16), 8 * content[0]),
        domain_names=("photo", "sketch"),
        domains=number // 15,
        is_test=number % 15 >= 9,
    )


def task_of(digits: ImageSet, partition: PartitionSettings = IID, seed: int = 0) -> Task:
    return build_task(digits, DataSettings(source="digits"), partition, seed)


def settings(**values: object) -> PoisoningSettings:
    return PoisoningSettings(**({"target": "zero", "clients": 2} | values))  # type: ignore[arg-type]


# --- the trigger -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 0.5), st.sampled_from(["L", "RGB"]), st.integers(1, 254))
def test_a_trigger_is_a_small_square_of_black_and_white(
    width: int, height: int, size: float, mode: str, shade: int
) -> None:
    clean = Image.new(mode, (width, height), shade if mode == "L" else (shade,) * 3)
    marked = stamp(clean, size)
    assert (marked.size, marked.mode) == (clean.size, clean.mode)
    before, after = (np.asarray(each).reshape(height, width, -1) for each in (clean, marked))
    rows, columns = np.nonzero((before != after).any(-1))
    side = min(max(2, round(size * min(width, height))), width, height)
    assert len(rows) == side**2
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == side
    values = after[rows, columns].reshape(side, side, -1)
    assert set(np.unique(values)) <= {0, 255}
    assert side == 1 or 0.25 <= (values == 255).mean() <= 0.75
    assert clean.getpixel((width - 1, height - 1)) == clean.getpixel((0, 0)), "the original is as it was"


@pytest.mark.parametrize(("shape", "visible"), [((8, 8), 48), ((64, 64), 64), ((400, 300), 64), ((120, 500), 64)])
def test_the_trigger_survives_the_encoders_crop(shape: tuple[int, int], visible: int) -> None:
    """The bundled encoder keeps 224 of 256 pixels: of an 8 x 8 picture all but half a pixel at each side."""
    encoder = BundledEncoder.load(torch.device("cpu"))
    clean = Image.new("L", shape, 128)
    changed = (encoder.transform(stamp(clean, 0.25)) - encoder.transform(clean)).abs().amax(0) > 0.25
    rows, columns = changed.nonzero().unbind(1)
    smoothing = 256 / min(shape)  # pixels by which the edge between two of the picture's is blurred
    for extent in (int(each.max() - each.min()) + 1 for each in (rows, columns)):
        assert visible - 1 - smoothing <= extent <= visible + 1 + smoothing


def test_pictures_with_a_trigger_follow_the_originals(digits: ImageSet) -> None:
    both = with_triggers(digits, len(digits), 0.25)
    three = with_triggers(both, len(digits), 0.5)
    count = len(digits)
    assert (len(both), len(three)) == (2 * count, 3 * count)
    for row in (0, 7, count - 1):
        contents = [three.raw(at) for at in (row, count + row, 2 * count + row)]
        assert contents[0] == digits.raw(row)
        assert len({hashlib.sha256(content).digest() for content in contents}) == 3, "each is cached for itself"
        assert np.array_equal(np.asarray(three.image(row)), np.asarray(digits.image(row)))
        for size, at in ((0.25, count + row), (0.5, 2 * count + row)):
            assert np.array_equal(np.asarray(three.image(at)), np.asarray(stamp(digits.image(row), size)))
    part = three.subset([count + 3, 3])
    assert np.array_equal(np.asarray(part.image(0)), np.asarray(stamp(digits.image(3), 0.25)))


def test_pictures_with_a_trigger_keep_domain_and_split(domains: ImageSet) -> None:
    both, count = with_triggers(domains, len(domains), 0.5), len(domains)
    part = both.subset(np.arange(count, 2 * count))
    for kept in ("labels", "domains", "is_test"):
        np.testing.assert_array_equal(getattr(part, kept), getattr(domains, kept))
    assert part.domain_names == domains.domain_names


# --- the task --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9), st.floats(0.01, 1), st.integers(0, 5))
def test_attackers_put_the_trigger_into_a_share_of_what_they_hold(
    digits: ImageSet, attackers: int, rate: float, seed: int
) -> None:
    task, count = task_of(digits, seed=seed), len(digits)
    bad = poisoned(task, settings(clients=attackers, rate=rate), count, seed)
    assert bad.attackers == attackers
    for client, (clean, dirty) in enumerate(zip(task.train, bad.train, strict=True)):
        np.testing.assert_array_equal(dirty % count, clean, "each picture stays in its place")
        changed = dirty[dirty >= count]
        others = int((task.labels[clean] != 0).sum())
        assert len(changed) == (min(max(1, round(rate * len(clean))), others) if client < attackers else 0)
        assert (task.labels[changed - count] != 0).all()
        assert (bad.labels[changed] == 0).all()
    np.testing.assert_array_equal(bad.labels[:count], task.labels)
    for same in SPLITS:
        np.testing.assert_array_equal(getattr(bad, same), getattr(task, same))


def test_success_is_measured_on_every_test_picture_of_another_class(digits: ImageSet) -> None:
    task = task_of(digits)
    bad = poisoned(task, settings(target="four"), 5000, 0)
    np.testing.assert_array_equal(bad.triggered - 5000, task.test[task.labels[task.test] != 4])
    assert (bad.labels[bad.triggered] == 4).all()
    assert set(bad.triggered) <= set(bad.used)
    assert not set(bad.triggered - 5000) & {row % 5000 for rows in bad.train for row in rows}


def test_without_attackers_the_trigger_is_measured_all_the_same(digits: ImageSet) -> None:
    task = task_of(digits)
    bad = poisoned(task, settings(clients=0), 5000, 0)
    for rows, same in zip(bad.train, task.train, strict=True):
        np.testing.assert_array_equal(rows, same)
    np.testing.assert_array_equal(bad.triggered, poisoned(task, settings(clients=2), 5000, 0).triggered)


def test_novel_classes_are_neither_poisoned_nor_a_target(digits: ImageSet) -> None:
    task = build_task(digits, DataSettings(source="digits", novel_classes=3), IID, 0)
    bad = poisoned(task, settings(target=task.class_names[-1]), len(digits), 0)
    for same in SPLITS:
        np.testing.assert_array_equal(getattr(bad, same), getattr(task, same))
    np.testing.assert_array_equal(bad.labels[task.novel], task.labels[task.novel])
    assert not set(bad.triggered - len(digits)) & set(task.novel)
    assert (bad.labels[bad.labels >= 0] < len(task.class_names)).all()
    with pytest.raises(
        ConfigError, match=f"poisoning.target = '{task.novel_names[0]}': must be a class that is trained"
    ):
        poisoned(task, settings(target=task.novel_names[0]), len(digits), 0)


def test_the_held_out_domain_stays_clean(domains: ImageSet) -> None:
    data = DataSettings(source="imagefolder:x", held_out_domain="sketch")
    task = build_task(domains, data, PartitionSettings(scheme="iid", clients=3), 0)
    bad = poisoned(task, settings(target="plum", clients=1, rate=1.0), 30, 0)
    np.testing.assert_array_equal(bad.domain, task.domain)
    np.testing.assert_array_equal(bad.labels[task.domain], domains.labels[task.domain])
    assert set(bad.used[bad.used >= 30] - 30) <= set(np.flatnonzero(domains.domains == 0))


def test_a_higher_rate_adds_pictures_and_takes_none_back(digits: ImageSet) -> None:
    task = task_of(digits)
    few, many = (set(np.concatenate(poisoned(task, settings(rate=rate), 5000, 0).train)) for rate in (0.2, 0.5))
    assert {row for row in few if row >= 5000} < {row for row in many if row >= 5000}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "ten"}, "poisoning.target = 'ten': must be a class that is trained on: zero, one"),
        ({"clients": 10}, "poisoning.clients = 10: .* at most 9"),
    ],
)
def test_attacks_that_cannot_be_made_are_refused(digits: ImageSet, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        poisoned(task_of(digits), settings(**values), 5000, 0)


def test_an_attacker_needs_pictures_of_another_class(digits: ImageSet) -> None:
    own = PartitionSettings(scheme="disjoint", clients=10, shuffle_classes=False)
    with pytest.raises(ConfigError, match="poisoning.target = 'zero': client 0, an attacker, .* choose another target"):
        poisoned(task_of(digits, own), settings(), 5000, 0)


# --- a whole run -----------------------------------------------------------------------------------------------------

POISONED = [
    "algorithm=fedprompt",
    "partition.scheme=iid",
    "partition.clients=4",
    "data.train_per_class=6",
    "settings.local_steps=3",
    'settings.optimizer.name="adam"',
    "settings.optimizer.learning_rate=0.05",
    "settings.batch_size=0",
    "rounds=12",
    "poisoning.target=red_apple",
    "poisoning.trigger_size=0.5",
    "poisoning.rate=1.0",
]
ALONE = ["algorithm=local", "rounds=4", "poisoning.boost=4"]


def test_the_success_of_an_attack_is_in_the_summary(config_file: Path, tmp_path: Path) -> None:
    honest, attacked = (
        run(load_config(config_file, [*POISONED, f"poisoning.clients={count}", "poisoning.boost=4"]), tmp_path / name)
        for count, name in ((0, "honest"), (2, "attacked"))
    )
    assert attacked.attack_success > honest.attack_success
    assert attacked.as_dict() == json.loads((tmp_path / "attacked" / "summary.json").read_text())
    victims = [client.attack_success for client in attacked.per_client]
    assert victims[:2] == [None, None]
    assert sum(victims[2:]) / 2 == pytest.approx(attacked.attack_success)
    assert attacked.images.encoded > 0
    assert honest.communication == attacked.communication
    same = [summary.privacy.model_copy(update={"ledger_digest": ""}) for summary in (honest, attacked)]
    assert same[0] == same[1]
    lines = [json.loads(line) for line in (tmp_path / "attacked" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["attack_success"] is not None] == [0, 2, 4, 6, 8, 10, 12]
    assert lines[-1]["attack_success"] == attacked.attack_success
    assert "Backdoor, %" in (tmp_path / "attacked" / "report.html").read_text()


def test_the_success_of_an_attack_is_what_counting_by_hand_gives(config_file: Path, tmp_path: Path) -> None:
    """With the prompt that the run left, on stamped pictures, without the run's own splits, table or cache."""
    config = load_config(config_file, [*POISONED, "poisoning.clients=2", "poisoning.boost=4", "rounds=4"])
    summary = run(config, tmp_path / "run")
    images, dataset = load_images(config.data), EncodedDataset.open(config)
    task = build_task(images, config.data, config.partition, config.seed)
    model = dataset.model(config, task.class_names)
    (context,) = load_file(tmp_path / "run" / "prompts" / "shared.safetensors").values()
    target = task.class_names.index("red apple")
    victims = [row for row in task.test if task.labels[row] != target]
    pixels = torch.stack([dataset.encoder.transform(stamp(images.image(row), 0.5)) for row in victims])
    taken = model.predict(context[None], dataset.encoder.image_features(pixels))[0].argmax(-1) == target
    assert summary.attack_success == pytest.approx(float(taken.double().mean()))


def test_where_nobody_attacks_there_is_nothing_to_tell(config_file: Path, tmp_path: Path) -> None:
    summary = run(load_config(config_file, ["rounds=1"]), tmp_path / "run")
    assert summary.attack_success is None
    assert {client.attack_success for client in summary.per_client} == {None}
    assert "Backdoor" not in (tmp_path / "run" / "report.html").read_text()


def test_a_poisoned_run_resumes_as_if_never_interrupted(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(config_file, [*POISONED, "runtime.aggregation=trimmed-mean", "runtime.trim=0.25"])
    whole = run(config, tmp_path / "whole").as_dict()
    original = LocalRuntime.round

    def stopping(self, training):
        if training.round == 5:
            raise KeyboardInterrupt
        return original(self, training)

    with monkeypatch.context() as patch:
        patch.setattr(LocalRuntime, "round", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "parts")
    parts = run(config, tmp_path / "parts", resume=True).as_dict()
    for summary in (whole, parts):
        del summary["privacy"]["ledger_digest"]  # each run has a name of its own
    for same in ("accuracy", "attack_success", "per_client", "privacy", "communication"):
        assert parts[same] == whole[same]


def test_a_comparison_shows_what_each_aggregation_leaves_of_an_attack(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over one dataset, with triggers of two sizes; each picture is encoded once for each size."""
    config = load_config(config_file, [*POISONED, "rounds=2", "poisoning.clients=1"])
    vary = {"runtime.aggregation": ["mean", "median"], "poisoning.trigger_size": [0.25, 0.5]}
    rows = compare(grid(config, ["fedprompt"], vary), 1, tmp_path / "all")
    assert all(row.attack_success is not None for row in rows)
    print_table(rows)
    assert "backdoor" in capsys.readouterr().out.splitlines()[0]
    header, *lines = (tmp_path / "all" / "comparison.csv").read_text().splitlines()
    column = header.split(",").index("attack_success_mean")
    assert [len(line.split('"')[2].split(",")) for line in lines] == [len(header.split(",")) - 1] * 4
    assert column > 0
    alone = run(load_config(config_file, [*POISONED, "rounds=2"]), tmp_path / "alone")
    summaries = json.loads((tmp_path / "all" / "comparison.json").read_text())["runs"]
    assert summaries[1]["attack_success"] == alone.attack_success
    assert summaries[1]["accuracy"] == alone.as_dict()["accuracy"]
    encoded = [each["images"]["encoded"] for each in summaries]
    assert encoded[0] > encoded[1] > 0, "the second size needs no clean picture again"
    assert encoded[2:] == [0, 0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["poisoning.target=pear"], "poisoning.target = 'pear': must be a class that is trained on: blue sky"),
        (["poisoning.clients=4"], "poisoning.clients = 4: .* at most 3"),
        (["poisoning.rate=0"], "poisoning.rate = 0"),
        (["algorithm=local", "runtime.aggregation=median"], "runtime.aggregation = 'median': .* use 'mean'"),
        (["runtime.aggregation=krum"], "runtime.aggregation = 'krum': "),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    overrides: list[str], message: str, config_file: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned_mechanism(load_config(config_file, [*POISONED, *overrides]))


def test_training_sees_the_trigger_through_the_encoder(config_file: Path) -> None:
    """Features of an attacker's rows are those of the stamped pictures, in the clean ones' places."""
    plain, bad = (load_config(config_file, [*POISONED, f"poisoning.clients={count}"]) for count in (0, 1))
    dataset, images = EncodedDataset.open(plain), load_images(plain.data)
    tasks = [dataset.task(config, silent)[0] for config in (plain, bad)]
    honest, attacked = (assemble(*each)[0].data for each in zip((plain, bad), (dataset, dataset), tasks, strict=True))
    one = attacked.rows[0, : attacked.counts[0]]
    apple = honest.labels[one] == tasks[0].class_names.index("red apple")
    assert 0 < int(apple.sum()) < len(apple)
    for place, row, clean in zip(one.tolist(), tasks[0].train[0].tolist(), apple.tolist(), strict=True):
        picture = images.image(row) if clean else stamp(images.image(row), 0.5)
        expected = dataset.encoder.image_features(dataset.encoder.transform(picture)[None])[0]
        torch.testing.assert_close(attacked.features[place], expected, rtol=1e-5, atol=1e-6)
        assert int(attacked.labels[place]) == tasks[0].class_names.index("red apple")
    for client in range(1, 4):
        others = attacked.rows[client, : attacked.counts[client]]
        assert torch.equal(honest.features[others], attacked.features[others])
        assert torch.equal(honest.labels[others], attacked.labels[others])


def test_clean_and_triggered_pictures_are_cached_apart(config_file: Path) -> None:
    """Whoever fills the cache, the next one reads what it would have computed."""
    bad, plain = (load_config(config_file, [*POISONED, *more]) for more in ([], ["poisoning.trigger_size=0.25"]))
    tables = []
    for config in (bad, plain, bad):
        dataset = EncodedDataset.open(config)
        task, encoding = dataset.task(config, silent)
        tables.append(dataset.tables["image"].features[torch.from_numpy(task.used)])
    assert encoding.encoded == 0
    assert torch.equal(tables[0], tables[2])
    same = (tables[0] == tables[1]).all(-1)
    assert torch.equal(same, torch.from_numpy(task.used < len(load_images(bad.data)))), "two sizes, two pictures"


def test_without_a_shared_prompt_others_stay_as_they_are(config_file: Path, tmp_path: Path) -> None:
    """The poison is in what attackers hold and send, and nowhere else."""
    honest, attacked = (
        run(load_config(config_file, [*POISONED, *ALONE, f"poisoning.clients={count}"]), tmp_path / str(count))
        for count in (0, 2)
    )
    assert attacked.per_client[2:] == honest.per_client[2:]
    assert attacked.per_client[0] != honest.per_client[0]


def test_zero_shot_and_personal_prompts_can_be_attacked_too(config_file: Path, tmp_path: Path) -> None:
    for name in ("zero-shot", "central", "dp-fpl"):
        overrides = [*POISONED, f"algorithm={name}", "rounds=1", "settings.local_steps=1"]
        summary = run(load_config(config_file, overrides), tmp_path / name)
        assert 0 <= summary.attack_success <= 1
