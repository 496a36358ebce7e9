"""The data's own split into training and test: the same names for folders, tables and Hugging Face data sets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sordino.errors import DataError, shortened
from sordino.progress import log
from sordino.tasks.columns import listed
from sordino.tasks.images import Flags, ImageSet
from sordino.tasks.passed_over import PassedOver

# The names that `datasets` knows too. Of several test splits the first of these is used.
TRAIN = ("train", "training")
TEST = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")
SPLIT_COLUMN = "split"
SHOWN = 10  # values of a column in a message
KNOWN = ", ".join(map(repr, (*TRAIN, *TEST)))


@dataclass(frozen=True)
class OwnSplit:
    """Names of splits, as the source spells them.

    Attributes:
        train: those that train.
        test: the one that tests.
        unused: known ones beside these, such as a validation split where there is a test split.
    """

    train: tuple[str, ...]
    test: str
    unused: tuple[str, ...]


def word(name: object) -> str:
    """Return a split's name without case and outer spaces."""
    return str(name).strip().lower()


def says_train(name: object) -> bool:
    """Return true for a training split's name."""
    return word(name) in TRAIN


def says_test(name: object) -> bool:
    """Return true for the name of a split that may test."""
    return word(name) in TEST


def test_of(names: Sequence[str]) -> str | None:
    """Return the name of the split that tests, or None if none of the names is known to."""
    return min((name for name in names if says_test(name)), key=lambda name: TEST.index(word(name)), default=None)


def split_of_folders(names: Sequence[str], source: str) -> OwnSplit | None:
    """Return the split that sibling folders are, or None if they are domains.

    Raises:
        DataError: they are neither clearly. Test pictures would train if a test folder were taken for a domain.
    """
    train, test = tuple(name for name in names if says_train(name)), test_of(names)
    known = [name for name in names if says_train(name) or says_test(name)]
    others = [name for name in names if name not in known]
    if train and test is not None and not others:
        return OwnSplit(train, test, tuple(name for name in known if name not in (*train, test)))
    alike = [name for name in names if _resembles(name, TRAIN)], [name for name in names if _resembles(name, TEST)]
    if len(names) < 2 or not (known or all(alike)):
        return None
    if known and others:
        raise DataError(
            f"{source}: folder {known[0]!r} is named like a split of the data, and {_quoted(others)} beside it like "
            f"none that is known ({KNOWN}); name the folder that tests 'test', and move the others elsewhere; if the "
            f"folders are domains, rename {known[0]!r}"
        )
    raise DataError(
        f"{source}: folders {_quoted(names)} are named like splits of the data; name the one that trains 'train' and "
        "the one that tests 'test', or give them other names if they are domains"
    )


def require_no_splits(class_names: Sequence[str], source: str) -> None:
    """Check that class folders are no splits, whose pictures would be told apart by their split.

    Raises:
        DataError: a folder of training and one of test pictures are where class folders should be.
    """
    train, test = next((name for name in class_names if says_train(name)), None), test_of(class_names)
    if train is not None and test is not None:
        raise DataError(
            f"{source}: folders {train!r} and {test!r} are splits of the data, and lie where class folders should be; "
            f"lay them out as ROOT/{train}/CLASS/picture.jpg and ROOT/{test}/CLASS/picture.jpg"
        )


def split_column(columns: Sequence[str], source: str) -> str | None:
    """Return the column that says which split each row is of, or None without one.

    Raises:
        DataError: two columns are named so.
    """
    named = [name for name in columns if word(name) == SPLIT_COLUMN]
    if len(named) > 1:
        raise DataError(f"{source}: columns {_quoted(named)} both say the split; leave one")
    return named[0] if named else None


def rows_of_splits(values: Sequence[Any], column: str, source: str) -> tuple[list[int], Flags, list[PassedOver]]:
    """Return the rows that train or test, which of these test, and the numbers of all others by split.

    Args:
        values: the cells of the column that says the split, a row each.
        column: its name.
        source: the source as in the settings, for messages.

    Raises:
        DataError: a row is of no split or of an unknown one, or no row trains, or none tests.
    """
    words = [word("" if value is None else value) for value in values]
    test = test_of(words)
    if any(map(says_train, words)) or test is not None:
        _require_known(words, values, column, source)
    if test is None or not any(map(says_train, words)):
        raise DataError(
            f"{source}: column {column!r} must say which rows are 'train' and which are 'test', and holds "
            f"{listed(sorted(set(words))[:SHOWN])}; rename the column if it means something else"
        )
    used = [row for row, split in enumerate(words) if split == test or says_train(split)]
    unused = Counter(split for split in words if split != test and not says_train(split))
    others = [PassedOver(of_split(split), ".", rows) for split, rows in sorted(unused.items())]
    return used, np.asarray([words[row] == test for row in used], dtype=np.bool_), others


def folders_of_splits(names: Sequence[str], source: str) -> list[str] | None:
    """Return the upper folder of each file [N] if these folders are a split, else None.

    Raises:
        DataError: as `split_of_folders`.
    """
    tops = [name.partition("/")[0] for name in names]
    if not all("/" in name for name in names) or split_of_folders(sorted(set(tops)), source) is None:
        return None
    return tops


def warn_of_folders(names: Sequence[str], source: str) -> None:
    """Warn of files in folders of training and of test pictures, where nothing says that these mean a split."""
    at_depth: dict[int, set[str]] = {}
    for name in names:
        for depth, folder in enumerate(name.split("/")[:-1]):
            at_depth.setdefault(depth, set()).add(folder)
    for folders in map(sorted, at_depth.values()):
        train, test = next((name for name in folders if says_train(name)), None), test_of(folders)
        if train is not None and test is not None:
            log.warning(
                "%s: files lie in folders %r and %r, and no column %r says the split, so pictures of both train and "
                "test; add one if the folders are the data's own split",
                source,
                train,
                test,
                SPLIT_COLUMN,
            )
            return


def with_splits(images: ImageSet, values: Sequence[Any], column: str, where: str) -> ImageSet:
    """Return the pictures that train or test by a column [N] of their table, with those that test marked.

    If the pictures already have a split, such as that of their folders, the column must agree with it.

    Raises:
        DataError: as `rows_of_splits`, or a picture trains by one of them and tests by the other.
    """
    if images.is_test is None:
        rows, flags, others = rows_of_splits(values, column, images.source)
        placed = tuple(replace(part, folder=where) for part in others)
        return replace(images.subset(rows), is_test=flags, passed_over=(*images.passed_over, *placed))
    words = [word("" if value is None else value) for value in values]
    _require_known(words, values, column, images.source)
    for name, split, flag in zip(images.names, words, images.is_test.tolist(), strict=True):
        if says_train(split) == flag:
            is_in, says = ("test", "train") if flag else ("train", "test")
            raise DataError(
                f"{images.source}: {name!r} is in the data's {is_in} split, and column {column!r} says {says!r} of "
                f"it ({split!r}); make them agree, or remove the column"
            )
    return images


def of_split(name: str) -> str:
    """Return the kind of `PassedOver` of a split that is not used."""
    return f"of split {name!r}"


def _require_known(words: Sequence[str], values: Sequence[Any], column: str, source: str) -> None:
    row = next((row for row, split in enumerate(words) if not (says_train(split) or says_test(split))), None)
    if row is None:
        return
    if not words[row]:
        raise DataError(f"{source}: column {column!r} has no value in row {row}; fill it or remove the row")
    raise DataError(
        f"{source}: column {column!r} holds {shortened(values[row])} in row {row}, which is no known split; correct it "
        f"to one of {KNOWN}, or remove the row"
    )


def _resembles(name: str, splits: Sequence[str]) -> bool:
    """Return true for names such as 'train_set', 'testset' and 'val2017'."""
    parts = re.findall("[a-z]+", name.lower())
    return any(part.removesuffix("set").removesuffix("data") in splits for part in parts)


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names])
