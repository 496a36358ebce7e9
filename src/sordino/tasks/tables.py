"""Pictures that a table lists: a CSV, TSV or Parquet file, or the `metadata.csv` of an image folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from sordino.errors import ConfigError, DataError, require_extra, shortened
from sordino.files import read_regular
from sordino.pictures.decoding import MAX_BYTES
from sordino.tasks.columns import (
    DOMAIN_COLUMNS,
    LABEL_COLUMNS,
    PERSON_COLUMNS,
    chosen,
    existing,
    indexed,
    person_of,
    warn_of_persons,
)
from sordino.tasks.images import Flags, ImageSet
from sordino.tasks.own_splits import (
    SPLIT_COLUMN,
    folders_of_splits,
    rows_of_splits,
    split_column,
    warn_of_folders,
    with_splits,
)
from sordino.tasks.passed_over import PassedOver, files_passed_over
from sordino.tasks.persons import persons_of_folders, with_persons
from sordino.tasks.places import require_table
from sordino.tasks.settings import COLUMNS, DataSettings

FILE_COLUMNS = ("file", "file_name", "filename", "path", "image")
METADATA = "metadata.csv"
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
OTHERS = (";", "\t", "|", ",")  # what else programs separate columns by; a semicolon where the comma is for decimals
MOST_BYTES = 2**30  # of a table

Table = Mapping[str, Sequence[Any]]  # by name, each with a value a row; None where there is none


def table_of_pictures(path: Path, settings: DataSettings) -> ImageSet:
    """List the pictures of a table, which has a row for each.

    Rows say a picture's file (relative to the table's folder, or absolute), its label, and, if there are such, its
    domain and whose it is. A column `split` with the values train and test is the source's own test split. Rows of
    other known splits are passed over, and a picture of which there is no row is not used.

    Raises:
        ConfigError: a column does not exist, or the settings must choose between columns.
        DataError: the table cannot be read, a row lacks a value or is of an unknown split, a file is in two rows, or no
            file of it exists.
    """
    require_table(path, settings.source)
    table = read_table(path, settings.source)
    images = _pictures(path.parent, table, settings, _file_column(table, settings), path.name)
    if images.is_test is None:
        warn_of_folders(images.names, settings.source)
    return images


def metadata_of(root: Path, settings: DataSettings) -> Table | None:
    """Return the table `metadata.csv` of an image folder; None if there is none that names files.

    Raises:
        ConfigError: there is none, and the settings choose columns of it.
        DataError: it cannot be read.
    """
    path = root / METADATA
    table = read_table(path, settings.source) if path.is_file() else {}
    if any(name in table for name in (*FILE_COLUMNS, settings.image_column)):
        return table
    for key in COLUMNS:
        if (value := getattr(settings, key)) is not None:
            raise ConfigError(
                f"data.{key}",
                value,
                f"needs a table, and the folder has no {METADATA} with a column 'file_name'; add one, or use a source "
                "'table:PATH'",
            )
    return None


def has_labels(table: Table, settings: DataSettings) -> bool:
    """Return whether a folder's table says classes; otherwise its folders do."""
    return settings.label_column is not None or any(name in table for name in LABEL_COLUMNS)


def listed_in_folder(root: Path, table: Table, settings: DataSettings) -> ImageSet:
    """List the pictures of an image folder by its table, which has labels: the folders below it mean no classes.

    If no column says the split, folders 'train' and 'test' do.

    Raises:
        As `table_of_pictures`; and DataError if it is unclear which folders train and which test.
    """
    file = _file_column(table, settings)
    if split_column(list(table), settings.source) is None:
        folders = folders_of_splits(_files(table, file, settings), settings.source)
        table = table if folders is None else {**table, SPLIT_COLUMN: folders}
    images = _pictures(root, table, settings, file, METADATA)
    if settings.person_level is not None:
        images = persons_of_folders(images, settings.person_level)
    in_rows = {_path(name) for name in table[file] if isinstance(name, str)}  # also of rows that are passed over
    return replace(images, passed_over=(*images.passed_over, *files_passed_over(root, {*in_rows, METADATA})))


def described_by(images: ImageSet, table: Table, settings: DataSettings) -> ImageSet:
    """Return an image folder's pictures with the domains, persons and splits that its table says.

    Raises:
        ConfigError: a column does not exist.
        DataError: a picture is in no row or in two, a row lacks a value, or its split is not that of the folders.
    """
    rows = _rows_of(_files(table, _file_column(table, settings), settings), settings)
    missing = next((name for name in images.names if name not in rows), None)
    if missing is not None:
        raise DataError(f"{settings.source}: {METADATA} has no row for {missing!r}; add one, or remove the picture")
    order = [rows[name] for name in images.names]
    in_order = {name: [values[row] for row in order] for name, values in table.items()}
    split = _split_column(table, settings)
    images = _described(images, in_order, settings)
    return images if split is None else with_splits(images, in_order[split], split, METADATA)


def read_table(path: Path, source: str) -> dict[str, list[Any]]:
    """Return a table's columns by name; a cell that is empty, or only spaces, is None.

    Raises:
        DataError: it cannot be read, has no row, or two columns of one name.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        columns = _parquet(path, source)
    elif suffix in SEPARATORS:
        columns = _separated(path, SEPARATORS[suffix], source)
    else:
        endings = ", ".join((*SEPARATORS, ".parquet"))
        raise DataError(f"{source}: {path.suffix or 'a file without ending'} is no table; tables end with {endings}")
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{source}: {path.name} has no row")
    return columns


def _separated(path: Path, separator: str, source: str) -> dict[str, list[Any]]:
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8-sig")
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header = [name.strip() for name in next(lines, [])]
        if len(header) == 1 and (other := next((mark for mark in OTHERS if mark in header[0]), None)):
            raise DataError(
                f"{source}: the first line of {path.name} is one column with {other!r} in it; a table that ends with "
                f"{path.suffix.lower()} is separated by {separator!r}: save it so"
            )
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{source}: {path.name} has two columns {twice!r}; rename one")
        columns: dict[str, list[Any]] = {name: [] for name in header}
        for line in lines:
            if not line:
                continue
            if len(line) != len(header):
                raise DataError(
                    f"{source}: line {lines.line_num} of {path.name} has {len(line)} values for {len(header)} columns; "
                    "quote values that hold the separator"
                )
            for name, value in zip(header, line, strict=True):
                columns[name].append(value.strip() or None)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source}: {path.name} is not a table in UTF-8: {error}") from error
    return columns


def _parquet(path: Path, source: str) -> dict[str, list[Any]]:
    require_extra("hub", f"data.source = {source}")
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{source}: cannot be read: {str(error).splitlines()[0]}") from error
    return {name: [_cell(value) for value in columns[name]] for name in names}


def _cell(value: Any) -> Any:
    return (value.strip() or None) if isinstance(value, str) else value


def _file_column(table: Table, settings: DataSettings) -> str:
    return chosen("image_column", settings.image_column, list(table), [], FILE_COLUMNS)


def _split_column(table: Table, settings: DataSettings) -> str | None:
    """Return the column that says the split of each row; None without one, or if it is set as another."""
    split = split_column(list(table), settings.source)
    return None if split in (getattr(settings, key) for key in COLUMNS) else split


def _pictures(root: Path, table: Table, settings: DataSettings, file: str, where: str) -> ImageSet:
    """List the pictures of a table that has labels."""
    is_test: Flags | None = None
    others: tuple[PassedOver, ...] = ()
    split = _split_column(table, settings)
    if split is not None:
        rows, is_test, unused = rows_of_splits(table[split], split, settings.source)
        table = {name: [values[row] for row in rows] for name, values in table.items()}
        others = tuple(replace(part, folder=where) for part in unused)
    label = chosen("label_column", settings.label_column, list(table), [], LABEL_COLUMNS)
    names = _files(table, file, settings)
    _rows_of(names, settings)
    if not any((root / name).exists() for name in names):
        raise DataError(
            f"{settings.source}: there is no file {names[0]!r}, nor any other of the table; its paths start at "
            f"{str(root)!r}"
        )
    labels, class_names = indexed(table[label], label, None, settings, "label_column")
    if len(class_names) < 2:
        raise DataError(f"{settings.source}: column {label!r} holds only one class; at least two are needed")
    images = ImageSet(
        source=settings.source,
        class_names=class_names,
        labels=labels,
        names=names,
        read=lambda index: read_regular(root / names[index], MAX_BYTES),
        is_test=is_test,
        passed_over=others,
    )
    return _described(images, {name: values for name, values in table.items() if name != label}, settings)


def _described(images: ImageSet, table: Table, settings: DataSettings) -> ImageSet:
    """Return the pictures with the domains and persons of a table that has a row for each, in their order."""
    domain = _optional("domain_column", settings.domain_column, table, DOMAIN_COLUMNS)
    if domain is not None:
        domains, domain_names = indexed(table[domain], domain, None, settings, "domain_column")
        images = replace(images, domains=domains, domain_names=domain_names)
    person = _optional("person_column", settings.person_column, table, PERSON_COLUMNS)
    if settings.person_column is None and (settings.persons is not None or settings.person_level is not None):
        person = None
    if person is None:
        warn_of_persons([name for name in table if name not in (domain, settings.label_column)], settings)
        return images
    return with_persons(images, [person_of(v, person, settings) for v in table[person]])


def _optional(key: str, given: str | None, table: Table, usual: Sequence[str]) -> str | None:
    """Return the given column, or the first with a usual name; None if there is none."""
    if given is not None:
        return existing(key, given, list(table))
    return next((name for name in usual if name in table), None)


def _files(table: Table, file: str, settings: DataSettings) -> list[str]:
    """Return each row's file, as a path with forward slashes."""
    for row, name in enumerate(table[file]):
        if not isinstance(name, str):
            raise DataError(
                f"{settings.source}: column {file!r} must name a file in each row, and holds {shortened(name)} in row "
                f"{row}; fill it, remove the row, or read a data set that holds pictures itself as 'hf:PATH'"
            )
    return [_path(name) for name in table[file]]


def _path(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def _rows_of(names: Sequence[str], settings: DataSettings) -> dict[str, int]:
    """Return each file's row, from 0.

    Raises:
        DataError: a file is in two rows, which would test and train on it.
    """
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        if rows.setdefault(name, row) != row:
            raise DataError(f"{settings.source}: {name!r} is in rows {rows[name]} and {row}; leave one")
    return rows
