"""The data's own split: its test pictures never train, in folders, tables and data sets, and all the rest is told."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sordino.errors import DataError
from sordino.tasks import DataSettings, PartitionSettings
from sordino.tasks.images import ImageSet
from sordino.tasks.own_splits import TEST, TRAIN
from sordino.tasks.passed_over import told
from sordino.tasks.sources import load_images
from sordino.tasks.splits import build_task

CLASSES = ("cat", "dog")
TRAINING, TESTING = ("train", "Training", "train_set"), ("test", "Testing", "eval", "val", "VALID", "dev", "test_set")
SIBLINGS = (*TRAINING, *TESTING, "holdout", "unlabeled", "north", "train2", "validation")


def load(source: str, **values: object) -> ImageSet:
    return load_images(DataSettings(source=source, **values))  # type: ignore[arg-type]


def write(root: Path, names: list[str]) -> str:
    """Write files with a picture's ending; to list them nobody reads them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return f"imagefolder:{root}"


def below(folders: Sequence[str]) -> list[str]:
    """Name two pictures of each class below each folder."""
    return [f"{folder}/{name}/{letter}.png" for folder in folders for name in CLASSES for letter in "ab"]


def write_table(path: Path, header: str, rows: list[tuple[str, ...]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return f"table:{path}"


def trained_and_tested(images: ImageSet) -> tuple[set[str], set[str]]:
    """Return the names of the pictures that train, and of those that test."""
    data = DataSettings(source="digits")
    task = build_task(images, data, PartitionSettings(scheme="iid", clients=1), 0)
    return {images.names[row] for row in task.train[0]}, {images.names[row] for row in task.test}


@given(
    st.sampled_from(TRAINING), st.sampled_from(TESTING), st.sets(st.sampled_from(SIBLINGS)), st.sampled_from([None, 1])
)
def test_no_picture_of_a_test_folder_trains(
    tmp_path_factory: pytest.TempPathFactory, train: str, test: str, others: set[str], person_level: int | None
) -> None:
    """Whatever stands beside them: the folders are a split, or they are refused by name."""
    root, person = tmp_path_factory.mktemp("splits"), "" if person_level is None else "p{0}/"
    rest = [f"{name}/{person.format(number)}{number}.png" for name in CLASSES for number in range(3)]
    siblings = {train, test, *others}
    source = write(root, [f"{folder}/{name}" for folder in siblings for name in rest])
    unknown = [name for name in siblings if name.lower() not in (*TRAIN, *TEST)]
    if unknown:
        with pytest.raises(DataError, match="named like .*split.*of the data") as refused:
            load(source, person_level=person_level)
        assert all(repr(name) in str(refused.value) for name in unknown)
        return
    images = load(source, person_level=person_level)
    assert images.is_test is not None
    assert images.domains is None
    folders = [name.split("/")[0].lower() for name in images.names]
    for folder, tests in zip(folders, images.is_test.tolist(), strict=True):
        assert folder in (TEST if tests else TRAIN)
    assert len(images) + sum(part.files for part in images.passed_over) == len(siblings) * len(rest)


@pytest.mark.parametrize("test", TEST)
def test_every_name_of_a_test_split_is_one_alone(tmp_path: Path, test: str) -> None:
    source = write(tmp_path, below(("train", test)))
    trained, tested = trained_and_tested(load(source))
    assert {name.split("/")[0] for name in trained} == {"train"}
    assert {name.split("/")[0] for name in tested} == {test}


def test_a_split_that_is_not_used_is_told_as_such(tmp_path: Path) -> None:
    folders = ("train", "dev", "test")
    images = load(write(tmp_path, below(folders)))
    expected = "passed over 4 files: 4 of split 'dev' in 'dev/cat', 'dev/dog'"
    assert told(images.passed_over) == expected
    trained, tested = trained_and_tested(images)
    assert {name.split("/")[0] for name in trained | tested} == {"train", "test"}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "test", "holdout"), "folder 'test' is named like a split of the data, and 'holdout' beside it"),
        (("train", "holdout"), "folder 'train' is named like a split of the data, and 'holdout' beside it"),
        (("north", "south", "val"), "folder 'val' is named like a split of the data, and 'north', 'south' beside it"),
        (("train2017", "val2017"), "folders 'train2017', 'val2017' are named like splits of the data; name the one"),
        (("test", "val"), "folders 'test', 'val' are named like splits of the data; name the one that trains 'train'"),
    ],
)
def test_folders_that_are_neither_splits_nor_domains_clearly(
    tmp_path: Path, folders: tuple[str, ...], expected: str
) -> None:
    source = write(tmp_path, below(folders))
    with pytest.raises(DataError, match=expected):
        load(source)


@pytest.mark.parametrize("layout", ["{split}/{n}.png", "{label}/{split}/{n}.png"])
def test_splits_are_no_classes(tmp_path: Path, layout: str) -> None:
    names = [
        layout.format(split=split, label=label, n=n) for split in ("train", "test") for label in CLASSES for n in "ab"
    ]
    with pytest.raises(DataError, match=r"'train' and 'test' are splits .* as ROOT/train/CLASS/picture.jpg and"):
        load(write(tmp_path, names))


def test_domains_may_have_any_other_names(tmp_path: Path) -> None:
    folders = ("north", "train station", "valley", "contest")
    images = load(write(tmp_path, [f"{folder}/{name}/a.png" for folder in folders for name in CLASSES]))
    assert images.domain_names == tuple(sorted(folders))


@given(st.lists(st.sampled_from(["train", "Training ", "test", "VAL", "dev", "eval"]), min_size=4, max_size=12))
def test_every_row_of_a_table_is_used_or_told(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    root = tmp_path_factory.mktemp("table")
    known = ["train", "train", "test", "test", *words]
    rows = [(f"{row}.png", CLASSES[row % 2], word) for row, word in enumerate(known)]
    write(root, [row[0] for row in rows])
    images = load(write_table(root / "t.csv", "file,label,split", rows))
    counted = Counter(word.strip().lower() for word in known)
    assert images.is_test is not None
    assert (~images.is_test).sum() == counted["train"] + counted["training"]
    assert images.is_test.sum() == counted["test"]
    unused = {f"of split {word!r}": counted[word] for word in ("val", "dev", "eval") if counted[word]}
    assert {part.kind: part.files for part in images.passed_over} == unused
    assert {part.folder for part in images.passed_over} <= {"t.csv"}
    assert len(images) + sum(part.files for part in images.passed_over) == len(known)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("", "column '[Ss]plit' has no value in row 3; fill it or remove the row"),
        ("trian", "column '[Ss]plit' holds 'trian' in row 3, which is no known split; correct it to one of 'train'"),
    ],
)
@pytest.mark.parametrize("header", ["file,label,split", "file,label,Split"])
def test_a_row_of_no_known_split_is_refused(tmp_path: Path, word: str, expected: str, header: str) -> None:
    words = ["train", "test", "train", word, "train", "test"]
    rows = [(f"{row}.png", CLASSES[row % 2], word) for row, word in enumerate(words)]
    write(tmp_path, [row[0] for row in rows])
    with pytest.raises(DataError, match=expected):
        load(write_table(tmp_path / "t.csv", header, rows))


@pytest.mark.parametrize("labels", [False, True])
def test_a_folders_list_says_the_split(tmp_path: Path, labels: bool) -> None:
    """With labels in the list and without; before, a list without labels had its split ignored."""
    words = ["train", "test", "val"] * 4
    names = [f"{CLASSES[number % 2]}/{number}.png" for number in range(12)]
    write(tmp_path, names)
    rows = [(name, *([name.split("/")[0]] if labels else []), word) for name, word in zip(names, words, strict=True)]
    write_table(tmp_path / "metadata.csv", f"file_name,{'label,' if labels else ''}split", rows)
    images = load(f"imagefolder:{tmp_path}")
    trained, tested = trained_and_tested(images)
    assert trained == {name for name, word in zip(names, words, strict=True) if word == "train"}
    assert tested == {name for name, word in zip(names, words, strict=True) if word == "test"}
    assert told(images.passed_over) == "passed over 4 files: 4 of split 'val' in 'metadata.csv'"


def test_a_list_must_agree_with_the_folders_splits(tmp_path: Path) -> None:
    names = below(("train", "test"))
    write(tmp_path, names)
    rows = [(name, name.split("/")[0]) for name in names]
    write_table(tmp_path / "metadata.csv", "file_name,split", rows)
    images = load(f"imagefolder:{tmp_path}")
    assert images.is_test is not None
    assert images.is_test.tolist() == [name.startswith("test") for name in images.names]
    rows[1] = (names[1], "test")
    write_table(tmp_path / "metadata.csv", "file_name,split", rows)
    with pytest.raises(
        DataError, match=r"'train/cat/b.png' is in the data's train split, and column 'split' says 'test'"
    ):
        load(f"imagefolder:{tmp_path}")


def test_folders_are_the_split_where_a_list_has_labels_and_no_split(tmp_path: Path) -> None:
    names = [f"{folder}/{number}.png" for folder in ("train", "val", "test") for number in range(4)]
    write(tmp_path, names)
    rows = [(name, CLASSES[row % 2]) for row, name in enumerate(names)]
    write_table(tmp_path / "metadata.csv", "file_name,label", rows)
    trained, tested = trained_and_tested(load(f"imagefolder:{tmp_path}"))
    assert trained == set(names[:4])
    assert tested == set(names[8:])
    (tmp_path / "val").rename(tmp_path / "holdout")
    rows = [(name.replace("val/", "holdout/"), label) for name, label in rows]
    write_table(tmp_path / "metadata.csv", "file_name,label", rows)
    with pytest.raises(DataError, match="named like a split of the data, and 'holdout' beside it like none"):
        load(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("above", ["", "pictures/", "/no/such/"])
def test_a_table_whose_files_lie_in_folders_of_splits_is_doubted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, above: str
) -> None:
    names = [f"{above}{folder}/{number}.png" for folder in ("train", "test", "other") for number in range(4)]
    names.append("here.png")
    write(tmp_path, [name for name in names if not name.startswith("/")])
    rows = [(name, CLASSES[row % 2]) for row, name in enumerate(names)]
    with caplog.at_level(logging.WARNING, logger="sordino"):
        load(write_table(tmp_path / "t.csv", "file,label", rows))
        assert "files lie in folders 'train' and 'test', and no column 'split' says the split" in caplog.text
        caplog.clear()
        splits = ["train" if "train" in name else "test" for name in names]
        with_split = [(*row, split) for row, split in zip(rows, splits, strict=True)]
        load(write_table(tmp_path / "t.csv", "file,label,split", with_split))
        assert caplog.text == ""


def test_a_persons_folder_counts_where_a_list_has_the_labels(tmp_path: Path) -> None:
    names = [f"scans/p{number // 4}/{number}.png" for number in range(16)]
    write(tmp_path, names)
    rows = [(name, CLASSES[row % 2]) for row, name in enumerate(names)]
    write_table(tmp_path / "metadata.csv", "file_name,label", rows)
    images = load(f"imagefolder:{tmp_path}", person_level=1)
    assert images.person_names == ("p0", "p1", "p2", "p3")
    trained, tested = trained_and_tested(images)
    assert {name.split("/")[1] for name in trained}.isdisjoint(name.split("/")[1] for name in tested)
    with pytest.raises(DataError, match="'scans/p0/0.png' has no folder at level 3 above it"):
        load(f"imagefolder:{tmp_path}", person_level=3)


@pytest.mark.parametrize("column", ["patient_id", "PatientID", "Patient", "subject"])
def test_a_column_that_may_say_whose_pictures_are_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, column: str
) -> None:
    rows = [(f"{row}.png", CLASSES[row % 2], f"p{row}") for row in range(8)]
    write(tmp_path, [row[0] for row in rows])
    source = write_table(tmp_path / "t.csv", f"file,label,{column}", rows)
    with caplog.at_level(logging.WARNING, logger="sordino"):
        assert load(source).persons is None
        assert f"column {column!r} is not used; if it says whose each picture is" in caplog.text
        caplog.clear()
        assert load(source, person_column=column).persons is not None
        assert caplog.text == ""


@pytest.mark.parametrize("name", ["train/metadata.csv", "metadata.jsonl"])
def test_a_list_that_is_not_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    source = write(tmp_path, [*below(("train", "test")), name])
    with caplog.at_level(logging.WARNING, logger="sordino"):
        load(source)
    assert f"{name} is not read; what it says of labels, persons and splits must be in metadata.csv" in caplog.text


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in range(count)]


def test_splits_of_a_data_set(tmp_path: Path) -> None:
    """The same names as for folders; those that are not used are told."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})

    def split(count: int) -> object:
        content = {"image": pictures(count), "label": [row % 2 for row in range(count)]}
        return datasets.Dataset.from_dict(content, features=features)

    splits = datasets.DatasetDict({"train": split(6), "extra": split(3), "validation": split(2), "eval": split(4)})
    splits.save_to_disk(str(tmp_path / "set"))
    images = load(f"hf:{tmp_path / 'set'}")
    assert images.is_test is not None
    assert [name.split("[")[0] for name in images.names] == ["train"] * 6 + ["eval"] * 4
    assert images.is_test.tolist() == [False] * 6 + [True] * 4
    assert told(images.passed_over) == (
        "passed over 5 files: 3 of split 'extra' in 'set'; 2 of split 'validation' in 'set'"
    )


@pytest.mark.parametrize(
    ("words", "tests"),
    [
        (["train", "test", "val"] * 4, [False, True] * 4),
        (["train"] * 12, None),
        (["fold 1", "fold 2"] * 6, None),
    ],
)
def test_a_data_sets_column_says_the_split_where_nothing_else_does(
    tmp_path: Path, words: list[str], tests: list[bool] | None
) -> None:
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.Value("string"), "split": datasets.Value("string")}
    content = {"image": pictures(12), "label": list(CLASSES) * 6, "split": words}
    whole = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    whole.save_to_disk(str(tmp_path / "set"))
    images = load(f"hf:{tmp_path / 'set'}")
    assert (None if images.is_test is None else images.is_test.tolist()) == tests
    assert len(images) + sum(part.files for part in images.passed_over) == 12
    content["split"] = ["train", "test", "trian"] * 4
    datasets.Dataset.from_dict(content, features=datasets.Features(features)).save_to_disk(str(tmp_path / "typo"))
    with pytest.raises(DataError, match="column 'split' holds 'trian' in row 2, which is no known split"):
        load(f"hf:{tmp_path / 'typo'}")


def test_a_person_of_both_splits_trains(tmp_path: Path) -> None:
    rows = [
        (f"{row}.png", CLASSES[row % 2], "test" if row >= 16 else "train", f"p{row % 18 // 2}") for row in range(24)
    ]
    write(tmp_path, [row[0] for row in rows])
    images = load(write_table(tmp_path / "t.csv", "file,label,split,patient", rows))
    trained, tested = trained_and_tested(images)
    whose = {row[0]: row[3] for row in rows}
    assert {whose[name] for name in trained}.isdisjoint({whose[name] for name in tested})
    assert np.sum(images.is_test) == 8
