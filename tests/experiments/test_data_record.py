"""A run belongs to its data, encoder and version; what changed since is refused in one line that says what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import sordino
from sordino.audit.run import audit
from sordino.errors import RunError
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.data_digests import party_digests
from sordino.experiments.data_record import changes, sequence_digest, set_digest
from sordino.experiments.features import EncodedDataset
from sordino.experiments.run import run
from sordino.experiments.variants import grid
from sordino.progress import silent

Change = Callable[[Path, Path, pytest.MonkeyPatch], None]


def repainted(pictures: Path, rows: list[str]) -> None:
    for name in rows:
        Image.new("RGB", (24, 24), (1, 2, 3)).save(pictures / name)


def one_repainted(pictures: Path, _: Path, __: pytest.MonkeyPatch) -> None:
    repainted(pictures, [f"red_apple/{number}.png" for number in range(8)])


def one_added(pictures: Path, _: Path, __: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (24, 24), (1, 2, 3)).save(pictures / "red_apple" / "8.png")


def one_removed(pictures: Path, _: Path, __: pytest.MonkeyPatch) -> None:
    (pictures / "blue_sky" / "0.png").unlink()


def one_unreadable(pictures: Path, _: Path, __: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (pictures / "blue_sky" / f"{number}.png").write_bytes(b"")


def class_renamed(pictures: Path, _: Path, __: pytest.MonkeyPatch) -> None:
    (pictures / "blue_sky").rename(pictures / "blue_heaven")


def class_added(pictures: Path, _: Path, __: pytest.MonkeyPatch) -> None:
    shutil.copytree(pictures / "blue_sky", pictures / "violet")
    repainted(pictures, [f"violet/{number}.png" for number in range(8)])


def weights_changed(_: Path, checkpoint: Path, __: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    tensors["text_projection.weight"] = tensors["text_projection.weight"] + 0.1
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def version_changed(_: Path, __: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sordino, "__version__", "9.9.9")


CHANGES: list[tuple[Change, str]] = [
    (one_repainted, "the training pictures of client"),
    (one_added, "pictures"),
    (one_removed, "pictures"),
    (one_unreadable, "pictures"),
    (class_renamed, "pictures"),
    (class_added, "pictures"),
    (weights_changed, "the encoder was clip"),
    (version_changed, f"sordino was '{sordino.__version__}' and is '9.9.9'"),
]


@pytest.fixture
def own_config(config_file: Path, clip_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A configuration whose checkpoint may be changed, and that checkpoint."""
    shutil.copytree(clip_folder, tmp_path / "checkpoint")
    text = config_file.read_text().replace(str(clip_folder), str(tmp_path / "checkpoint"))
    config_file.write_text(text)
    return config_file, tmp_path / "checkpoint"


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda each: getattr(each, "__name__", ""))
def test_what_changed_since_the_start_is_refused(
    change: Change, message: str, own_config: tuple[Path, Path], pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    """By `--resume` of a run that is not over, and by an audit of one that is; nothing of it is touched."""
    config, out = load_config(own_config[0]), tmp_path / "run"
    run(config, out)
    shutil.copytree(out, tmp_path / "interrupted")
    (tmp_path / "interrupted" / "summary.json").unlink()
    change(pictures, own_config[1], monkeypatch)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*/metrics.jsonl")}
    for attempt in (
        lambda: run(config, tmp_path / "interrupted", resume=True),
        lambda: audit(out, ["stealing"]),
    ):
        with pytest.raises(RunError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
        assert "not the same as when" in str(error.value)
    assert {path: path.read_bytes() for path in kept} == kept


def test_what_did_not_change_is_no_obstacle(own_config: tuple[Path, Path], pictures: Path, tmp_path: Path) -> None:
    """Other dates, another place of the checkpoint's files, and files that are no pictures."""
    config, out = load_config(own_config[0]), tmp_path / "run"
    run(config, out)
    for file in [*pictures.rglob("*.png"), *own_config[1].iterdir()]:
        file.touch()
    (pictures / "red_apple" / "notes.txt").write_text("nothing")
    assert audit(out, ["stealing"])["attacks"]["stealing"]
    before = json.loads((out / "summary.json").read_bytes())["accuracy"]
    (out / "summary.json").unlink()
    assert run(config, out, resume=True).as_dict()["accuracy"] == before


def test_the_clients_whose_pictures_changed_are_named(config_file: Path, pictures: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["partition.clients=4"])  # a class each
    run(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    clients = json.loads((tmp_path / "run" / "data.json").read_bytes())["parties"]
    one_repainted(pictures, pictures, pytest.MonkeyPatch())
    with pytest.raises(RunError) as error:
        run(config, tmp_path / "run", resume=True)
    dataset = EncodedDataset.open(config)
    task, _ = dataset.task(config, silent)
    (changed,) = [number for number in range(4) if party_digests(dataset, task)[number] != clients[number]]
    assert f"the training pictures of client {changed} changed; the test pictures changed" in str(error.value)


def test_triggers_of_poisoned_runs_are_part_of_it(config_file: Path, tmp_path: Path) -> None:
    """An attacker holds other examples than the same client that is honest; others hold the same."""
    keys = ["poisoning.target=red apple", "partition.scheme=iid"]
    digests = []
    for extra in ([], ["poisoning.target=green leaf"]):
        config = load_config(config_file, [*keys, *extra])
        dataset = EncodedDataset.open(config)
        task, _ = dataset.task(config, silent)
        digests.append(party_digests(dataset, task))
    assert digests[0][0] != digests[1][0]
    assert digests[0][1:] == digests[1][1:]
    run(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "data.json").read_bytes())
    assert record["parties"] == digests[1]
    assert record["triggered"] != record["novel"] == record["domain"]  # these two are empty


def test_a_party_is_known_by_its_examples_alone(config_file: Path, pictures: Path) -> None:
    """Neither names nor places of files, nor the seed that orders them, nor other parties matter."""

    def digests(*overrides: str) -> list[str]:
        config = load_config(config_file, ["partition.clients=4", "partition.shuffle_classes=false", *overrides])
        dataset = EncodedDataset.open(config)
        return party_digests(dataset, dataset.task(config, silent)[0])

    before = digests("data.train_per_class=7")
    assert len(set(before)) == 4
    assert before == digests("data.train_per_class=7", "algorithm=promptfl", "rounds=2")
    together = digests("data.train_per_class=7", "partition.clients=2")
    assert not set(together) & set(before)
    repainted(pictures, ["red_apple/0.png", "red_apple/1.png"])
    assert sum(a != b for a, b in zip(before, digests("data.train_per_class=7"), strict=True)) == 1


def test_a_comparison_that_goes_on_mixes_no_data(config_file: Path, pictures: Path, tmp_path: Path) -> None:
    variants = grid(load_config(config_file), ["zero-shot", "promptfl"])
    compare(variants, 1, tmp_path / "all")
    again = compare(variants, 1, tmp_path / "all", resume=True)
    assert len(again) == 2
    shutil.rmtree(tmp_path / "all" / "promptfl")
    one_repainted(pictures, pictures, pytest.MonkeyPatch())
    with pytest.raises(RunError, match=r"zero-shot.* was started: the training pictures"):
        compare(variants, 1, tmp_path / "all", resume=True)
    assert not (tmp_path / "all" / "promptfl").exists()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b'"text"', b"{}"])
def test_a_record_that_is_lost_or_damaged_is_told(content: bytes | None, config_file: Path, tmp_path: Path) -> None:
    config, out = load_config(config_file), tmp_path / "run"
    run(config, out)
    (out / "summary.json").unlink()
    (out / "data.json").unlink()
    if content is not None:
        (out / "data.json").write_bytes(content)
    with pytest.raises(RunError, match="run") as error:
        run(config, out, resume=True)
    assert "\n" not in str(error.value)


def test_digests_of_sets_and_sequences() -> None:
    examples = [(b"a", "x"), (b"b", "x"), (b"b", "y")]
    assert set_digest(examples) == set_digest(examples[::-1])
    assert sequence_digest(examples) != sequence_digest(examples[::-1])
    assert set_digest(examples) != set_digest(examples[:2])  # labels count
    assert set_digest([*examples, examples[0]]) != set_digest(examples)  # and so do copies
    assert sequence_digest([(b"ab", "c")]) != sequence_digest([(b"a", "bc")])


def test_many_parties_make_no_long_line() -> None:
    before, after = {"parties": ["a"] * 1000}, {"parties": ["b"] * 1000}
    assert changes(before, after) == ["the training pictures of clients 0, 1, 2, 3 and 996 more changed"]
    assert changes(before, {"parties": ["a"]}) == ["there were 1000 clients and are 1"]
    assert changes({"parties": ["a"], "tower": "t"}, {"parties": ["a"], "tower": "u"}) == ["the private tower changed"]
