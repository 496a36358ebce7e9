"""Whose each picture is: from a table of files and persons, from a column's values, or from the names of folders."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sordino.errors import DataError
from sordino.files import read_regular
from sordino.tasks.images import ImageSet

HEADER = ("file", "person")
MAX_BYTES = 2**30  # of the table


def with_persons(images: ImageSet, named: Sequence[str]) -> ImageSet:
    """Return the same pictures, with the names [N] of the persons whose they are."""
    known = sorted(set(named))
    place = {name: number for number, name in enumerate(known)}
    numbers = np.asarray([place[name] for name in named], dtype=np.int64)
    return replace(images, persons=numbers, person_names=tuple(known))


def persons_of_table(images: ImageSet, path: Path) -> ImageSet:
    """Return the same pictures, with persons from a CSV file with the columns `file` and `person`.

    `file` is a picture's name in its source, such as its path relative to the folder. Lines of other files are passed
    over, and so are other columns.

    Raises:
        DataError: the file cannot be read or has no such columns, a line has no person, a file has two persons, or a
            picture is in no line. The message names the first one.
    """
    person_of = _read(path)
    missing = next((name for name in images.names if name not in person_of), None)
    if missing is not None:
        raise DataError(
            f"data.persons: {str(path)!r} has no line for {missing!r}; add one, with the name as {images.source} has "
            "it, or remove the picture"
        )
    return with_persons(images, [person_of[name] for name in images.names])


def persons_of_folders(images: ImageSet, level: int) -> ImageSet:
    """Return the same pictures, with the folders at a level as persons; 1 is the folder directly above a file.

    Folders of one name are one person, wherever they lie.

    Raises:
        DataError: a picture lies in fewer folders.
    """
    shallow = next((name for name in images.names if name.count("/") < level), None)
    if shallow is not None:
        raise DataError(
            f"{images.source}: {shallow!r} has no folder at level {level} above it, which data.person_level says is a "
            "person's; correct the level, or name a column of persons with data.person_column"
        )
    return with_persons(images, [name.split("/")[-1 - level] for name in images.names])


def _read(path: Path) -> dict[str, str]:
    """Return the person of each file."""
    person_of: dict[str, str] = {}
    where = f"data.persons: {str(path)!r}"
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
        lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        absent = [name for name in HEADER if name not in (lines.fieldnames or ())]
        if absent:
            raise DataError(f"{where} has no column {absent[0]!r}; its first line must be file,person")
        for line in lines:
            name, person = line["file"], (line["person"] or "").strip()
            if not (name and person):
                raise DataError(f"{where} has no {'person' if name else 'file'} in line {lines.line_num}; fill it")
            if person_of.setdefault(name, person) != person:
                raise DataError(f"{where} has two persons for {name!r}; leave one")
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is not a CSV file in UTF-8: {error}") from error
    return person_of
