"""Pictures that a table lists: its columns, the same set as folders give, and what is refused."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sordino.errors import ConfigError, DataError
from sordino.tasks import DataSettings, PartitionSettings
from sordino.tasks.images import ImageSet
from sordino.tasks.sources import load_images
from sordino.tasks.splits import build_task
from sordino.tasks.tables import read_table

SITES = ("north_clinic", "south_clinic")
LABELS = ("healthy", "pneumonia")
ROWS = [
    (f"scans/{site[:5]}_{label[0]}{number}.png", label, site, f"p{number % 3}")
    for site in SITES
    for label in LABELS
    for number in range(4)
]
HEADER = ("file", "label", "site", "patient")


def load(source: str, **values: object) -> ImageSet:
    return load_images(DataSettings(source=source, **values))  # type: ignore[arg-type]


def pictures(root: Path, files: list[str]) -> None:
    """Small pictures at these paths, each of another shade."""
    for shade, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (shade, 0, 0)).save(root / name)


def written(path: Path, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A table with the ending that `path` has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = {name: [row[index] for row in rows] for index, name in enumerate(header)}
        parquet.write_table(arrow.table(columns), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([header, *rows])
    return f"table:{path}"


def told(images: ImageSet) -> set[tuple[str, ...]]:
    """What is known of each picture, in words, with the shade that is read of it."""
    found = set()
    for row, name in enumerate(images.names):
        site = images.domain_names[images.domains[row]] if images.domain_names is not None else ""  # type: ignore[index]
        person = images.person_names[images.persons[row]] if images.person_names is not None else ""  # type: ignore[index]
        shade = np.asarray(images.image(row))[0, 0, 0]
        found.add((name, images.class_names[images.labels[row]], site, person, str(shade)))
    return found


EXPECTED = {
    (file, label, site.replace("_", " "), patient, str(shade))
    for shade, (file, label, site, patient) in enumerate(ROWS)
}


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.parquet"])
def test_every_kind_of_table_tells_the_same(tmp_path: Path, name: str) -> None:
    """Paths start at the table's folder, wherever the process works."""
    pictures(tmp_path, [row[0] for row in ROWS])
    images = load(written(tmp_path / name, HEADER, [tuple(row) for row in ROWS]))
    assert told(images) == EXPECTED
    assert images.class_names == LABELS
    assert images.domain_names == ("north clinic", "south clinic")


def test_absolute_paths_and_those_of_another_system(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", [row[0] for row in ROWS])
    rows = [(str(tmp_path / "pictures" / file), *rest) for file, *rest in ROWS]
    rows[0] = ("..\\pictures\\" + ROWS[0][0].replace("/", "\\"), *rows[0][1:])
    images = load(written(tmp_path / "tables" / "labels.csv", HEADER, rows))
    assert {found[1:] for found in told(images)} == {found[1:] for found in EXPECTED}


def test_columns_by_name(tmp_path: Path) -> None:
    """Numbers as labels get names, and columns that nobody asked for mean nothing."""
    pictures(tmp_path, [row[0] for row in ROWS])
    rows = [(age, file, LABELS.index(label), patient) for age, (file, label, _, patient) in enumerate(ROWS)]
    source = written(tmp_path / "labels.csv", ("age", "scan", "finding", "mrn"), rows)
    chosen = {"image_column": "scan", "label_column": "finding", "person_column": "mrn"}
    images = load(source, class_names={"0": "healthy", "1": "pneumonia"}, **chosen)
    assert {found[:2] + found[3:] for found in told(images)} == {found[:2] + found[3:] for found in EXPECTED}
    assert images.domains is None
    with pytest.raises(ConfigError, match=r"data.label_column = None: must be given.*age, scan, finding, mrn"):
        load(source, image_column="scan")
    with pytest.raises(ConfigError, match=r"data.domain_column = 'ward': there is no such column; columns: age, scan"):
        load(source, domain_column="ward", **chosen)


def test_a_tables_own_split(tmp_path: Path) -> None:
    pictures(tmp_path, [row[0] for row in ROWS])
    splits = ["train", "Test", "train", "val"] * 4
    rows = [(*row, split) for row, split in zip(ROWS, splits, strict=True)]
    images = load(written(tmp_path / "labels.csv", (*HEADER, "split"), rows))
    assert images.is_test is not None
    trains = {name for name, test in zip(images.names, images.is_test, strict=True) if not test}
    tests = {name for name, test in zip(images.names, images.is_test, strict=True) if test}
    assert trains == {row[0] for row, split in zip(ROWS, splits, strict=True) if split == "train"}
    assert tests == {row[0] for row, split in zip(ROWS, splits, strict=True) if split == "Test"}
    rows = [(*row, "fold 1") for row in ROWS]
    with pytest.raises(DataError, match=r"column 'split' must say .* and holds fold 1; rename the column"):
        load(written(tmp_path / "labels.csv", (*HEADER, "split"), rows))


def test_a_folders_metadata_with_labels_is_a_table(tmp_path: Path) -> None:
    """Hugging Face's layout: `file_name` in metadata.csv. A picture that is in no row is told, and not used."""
    pictures(tmp_path, [*(row[0] for row in ROWS), "scans/unlabeled.png"])
    written(tmp_path / "metadata.csv", ("file_name", "label", "domain", "person"), [tuple(row) for row in ROWS])
    images = load(f"imagefolder:{tmp_path}")
    assert told(images) == EXPECTED
    assert [(part.kind, part.folder, part.files) for part in images.passed_over] == [("misplaced .png", "scans", 1)]


def test_a_folders_metadata_without_labels_describes_what_its_folders_hold(tmp_path: Path) -> None:
    files = [f"{label}/{site}{number}.png" for label in LABELS for site in "ns" for number in range(3)]
    pictures(tmp_path, files)
    rows = [(file, file.split("/")[1][0], f"p{file[-5]}") for file in files]
    written(tmp_path / "metadata.csv", ("file_name", "site", "patient"), [*rows, ("else/where.png", "x", "y")])
    images = load(f"imagefolder:{tmp_path}")
    expected = {(file, file.split("/")[0], site, person) for file, site, person in rows}
    assert {found[:4] for found in told(images)} == expected
    assert images.domain_names == ("n", "s")
    assert images.passed_over == ()
    written(tmp_path / "metadata.csv", ("file_name", "site"), [row[:2] for row in rows[1:]])
    with pytest.raises(DataError, match=r"metadata.csv has no row for 'healthy/n0.png'; add one, or remove"):
        load(f"imagefolder:{tmp_path}")


def test_a_metadata_file_that_names_no_files_changes_nothing(tmp_path: Path) -> None:
    pictures(tmp_path, [f"{label}/{number}.png" for label in LABELS for number in range(2)])
    written(tmp_path / "metadata.csv", ("made", "by"), [("2020", "x")])
    images = load(f"imagefolder:{tmp_path}")
    assert images.class_names == LABELS
    assert [part.kind for part in images.passed_over] == [".csv"]
    with pytest.raises(ConfigError, match=r"data.person_column = 'who': needs a table, and the folder has no metadata"):
        load(f"imagefolder:{tmp_path}", person_column="who")


def test_hugging_face_reads_the_same_metadata(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pictures(tmp_path, [row[0] for row in ROWS])
    written(tmp_path / "metadata.csv", ("file_name", "label", "domain", "person"), [tuple(row) for row in ROWS])
    images = load(f"hf:{tmp_path}", person_column="person")
    assert {found[1:] for found in told(images)} == {found[1:] for found in EXPECTED}


def test_persons_of_a_table_stay_whole(tmp_path: Path) -> None:
    """Nobody is on both sides, whom the table's column `patient` names without being asked."""
    rows = [(f"{n}.png", LABELS[n % 2], SITES[n // 2 % 2], f"p{n // 4}") for n in range(48)]
    pictures(tmp_path, [row[0] for row in rows])
    images = load(written(tmp_path / "labels.csv", HEADER, rows))
    task = build_task(images, DataSettings(source="table:x"), PartitionSettings(scheme="iid", clients=2), 0)
    assert images.persons is not None
    trains = set(images.persons[np.concatenate(task.train)].tolist())
    assert trains
    assert trains.isdisjoint(images.persons[task.test].tolist())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "labels.csv has no row"),
        ("file,label\n", "labels.csv has no row"),
        ("file,file\na,b\n", "has two columns 'file'; rename one"),
        ("file,label\na.png,cat,x\n", "line 2 of labels.csv has 3 values for 2 columns; quote"),
        ("file,label\na.png,cat\nb.png,\n", "column 'label' has no value in row 1; fill it or remove the row"),
        ("file,label\na.png,cat\n,dog\n", "column 'file' must name a file in each row, and holds None in row 1"),
        ("file,label\na.png,cat\n./a.png,dog\n", "'a.png' is in rows 0 and 1; leave one"),
        ("file,label\na.png,cat\nb.png,cat\n", "column 'label' holds only one class"),
        ("file,label\nz.png,cat\ny.png,dog\n", "there is no file 'z.png', nor any other of the table; its paths start"),
        ("file,label,patient\na.png,cat,\nb.png,dog,1\n", "column 'patient' must hold a word or a whole number"),
        ('file,label\n"a.png,cat\n', "labels.csv is not a table in UTF-8"),
        ("file,label\na.png,\xe9\n", "labels.csv is not a table in UTF-8"),
        ("file;label\r\na.png;cat\r\n", "one column with ';' in it; a table that ends with .csv is separated by ','"),
        ("file\tlabel\na.png\tcat\n", r"one column with '\\t' in it; a table that ends with .csv is separated by ','"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, content: str, expected: str) -> None:
    pictures(tmp_path, ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=expected):
        load(f"table:{tmp_path / 'labels.csv'}")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.xlsx").write_bytes(b"PK")
    (tmp_path / "labels.parquet").write_bytes(b"PAR1, and then nothing")
    with pytest.raises(DataError, match=r"\.xlsx is no table; tables end with \.csv, \.tsv, \.tab, \.parquet"):
        load(f"table:{tmp_path / 'labels.xlsx'}")
    with pytest.raises(DataError, match="cannot be read"):
        load(f"table:{tmp_path / 'labels.parquet'}")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load(f"table:{tmp_path / 'labels.csv'}")


def test_a_table_that_holds_pictures_itself_is_told_in_one_short_line(tmp_path: Path) -> None:
    """As Hugging Face writes them: bytes in place of a path."""
    rows = [({"bytes": bytes(range(256)) * 400, "path": None}, label) for label in LABELS]
    source = written(tmp_path / "labels.parquet", ("image", "label"), rows)
    with pytest.raises(DataError, match="must name a file in each row.* read a data set .* as 'hf:PATH'") as caught:
        load(source)
    assert len(str(caught.value)) < 1200  # of 100,000 bytes


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=12)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_a_cell_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    """Quotes, separators and line ends in a cell are no other cell; only spaces around it go."""
    path = tmp_path_factory.mktemp("table") / "any.csv"
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("a", "b"), *rows])
    path.write_bytes(text.getvalue().encode())
    table = read_table(path, "table:any.csv")
    assert list(zip(table["a"], table["b"], strict=True)) == [
        tuple(cell.strip() or None for cell in row) for row in rows
    ]
