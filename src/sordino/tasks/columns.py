"""Columns of tables of pictures: which one holds what, and from its values to classes, domains and persons."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from sordino.errors import ConfigError, DataError, shortened
from sordino.progress import log
from sordino.tasks.images import Indices
from sordino.tasks.settings import DataSettings, spoken

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
DOMAIN_COLUMNS = ("domain", "site")
PERSON_COLUMNS = ("person", "patient")
_WHOSE = re.compile(
    r"(person|patient|subject|participant|volunteer|donor|case)s?[\s_.-]*(u?id|identifier|no|nr|number|name|code|key)?"
)


def chosen(key: str, given: str | None, columns: Sequence[str], likely: Sequence[str], usual: Sequence[str]) -> str:
    """Choose a column: the given one, or the only likely one, or the first with a usual name.

    Among columns with a usual name, likely ones come before others.

    Raises:
        ConfigError: there is no column of the given name, or none was given and none stands out.
    """
    if given is not None:
        return existing(key, given, columns)
    if len(likely) == 1:
        return likely[0]
    candidates = [name for name in usual if name in likely] or [name for name in usual if name in columns]
    if not candidates:
        raise ConfigError(f"data.{key}", None, f"must be given, as none stands out; columns: {listed(columns)}")
    return candidates[0]


def existing(key: str, given: str, columns: Sequence[str]) -> str:
    """Return the given column.

    Raises:
        ConfigError: there is none of this name.
    """
    if given not in columns:
        raise ConfigError(f"data.{key}", given, f"there is no such column; columns: {listed(columns)}")
    return given


def indexed(
    values: Sequence[Any], column: str, order: Sequence[str] | None, settings: DataSettings, key: str
) -> tuple[Indices, tuple[str, ...]]:
    """Return indices into the names that occur, and those names as spoken.

    Args:
        values: the column's values in all rows.
        column: its name.
        order: of the values; None sorts them.
        settings: for messages, and for `class_names` of the column of labels.
        key: the setting that chooses this column.

    Raises:
        ConfigError: the values are neither words nor whole numbers, or `class_names` does not fit them.
        DataError: a row has no value, a value is empty, or two values read alike.
    """
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise DataError(
            f"{settings.source}: column {column!r} has no value in row {missing}; fill it or remove the row"
        )
    kinds = {type(value) for value in values}
    if not kinds <= {str} and not kinds <= {int, bool}:
        named = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ConfigError(f"data.{key}", column, f"it must hold words or whole numbers, and holds {named}")
    occurring = set(values)
    known = sorted(occurring) if order is None else [name for name in order if name in occurring]
    given = settings.class_names if key == "label_column" else None
    names = tuple(spoken(str(value)) for value in known) if given is None else _given_names(known, given, column)
    if "" in names:
        raise DataError(f"{settings.source}: column {column!r} has an empty value {known[names.index('')]!r}; name it")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{settings.source}: several values of column {column!r} read {twice!r}; rename them")
    place = {value: index for index, value in enumerate(known)}
    return np.asarray([place[value] for value in values], dtype=np.int64), names


def _given_names(known: Sequence[Any], given: list[str] | dict[str, str], column: str) -> tuple[str, ...]:
    """Return the names from the settings for the labels that occur."""
    labels = listed([str(value) for value in known])
    if isinstance(given, list):
        if len(given) != len(known):
            raise ConfigError(
                "data.class_names",
                given,
                f"has {len(given)} names, and column {column!r} has {len(known)} labels ({labels}): name each, or give "
                "a table from label to name",
            )
        return tuple(spoken(name) for name in given)
    nameless = next((str(value) for value in known if str(value) not in given), None)
    if nameless is not None:
        raise ConfigError(
            "data.class_names",
            given,
            f"has no name for label {nameless!r}; column {column!r} has labels {labels}",
        )
    return tuple(spoken(given[str(value)]) for value in known)


def person_of(value: Any, column: str, settings: DataSettings) -> str:
    """Return the name of a person from a cell, which holds a word or a whole number.

    Raises:
        DataError: it holds nothing, or something else.
    """
    if not isinstance(value, str | int) or not str(value).strip():
        raise DataError(
            f"{settings.source}: column {column!r} must hold a word or a whole number for each picture, and holds "
            f"{shortened(value)}; fill it, or remove the row"
        )
    return str(value).strip()


def warn_of_persons(columns: Sequence[str], settings: DataSettings) -> None:
    """Warn of a column that may say whose each picture is, if nothing says so: a person might train and test."""
    if settings.persons is not None or settings.person_level is not None:
        return
    likely = next((name for name in columns if _WHOSE.fullmatch(name.strip().lower())), None)
    if likely is not None:
        log.warning(
            "%s: column %r is not used; if it says whose each picture is, name it as person_column, so that nobody "
            "both trains and tests",
            settings.source,
            likely,
        )


def listed(names: Sequence[str]) -> str:
    """Return names in one line."""
    return ", ".join(names) or "none"
