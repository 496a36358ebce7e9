"""TOML tables as dictionaries: read with overrides, checked, compared and written, whatever they configure."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from sordino.errors import ConfigError, config_error

Checked = TypeVar("Checked", bound=BaseModel)

LARGEST_INT, LARGEST = 2**63 - 1, 1e30  # of a configuration's numbers: tensors hold no larger ones
LARGEST_COUNT = 1_000_000  # of a method's whole numbers: more tokens, steps or pictures at once fit no machine


def read_tables(
    path: Path, overrides: Sequence[str] | Mapping[str, Any] = (), argument: str = "CONFIG"
) -> dict[str, Any]:
    """Read the tables of a TOML file and apply overrides; what keys mean is not checked.

    Args:
        path: of the file.
        overrides: `key=value` texts, or values by dotted key.
        argument: of the command line that names the file, for messages.

    Raises:
        ConfigError: the file is missing or malformed, or an override is.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a mark
    except FileNotFoundError:
        raise ConfigError(argument, str(path), "no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(argument, str(path), f"not a readable TOML file: {error}") from None
    if isinstance(overrides, str):
        raise ConfigError("overrides", overrides, f"must be a table, or a list of texts, such as [{overrides!r}]")
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            set_key(tables, key, value)
    else:
        for override in overrides:
            _set(tables, override)
    check_values(tables)
    return tables


def to_toml(tables: Mapping[str, Any]) -> str:
    """Return a configuration as TOML text."""
    return tomli_w.dumps(dict(tables))


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """Return the first dotted key in which two configurations differ, with both values; None if they are equal."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            inner = first_difference(before, after, f"{prefix}{key}.")
            if inner:
                return inner
        elif before != after:
            return f"{prefix}{key}", before, after
    return None


def read_model(path: Path, model: type[Checked], argument: str) -> Checked:
    """Read a TOML file that is one pydantic model.

    Args:
        path: of the file.
        model: its type.
        argument: of the command line that names the file, for messages.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value is not allowed.
    """
    try:
        return model.model_validate(read_tables(path, argument=argument))
    except ValidationError as error:
        raise config_error(error, model) from None


def _set(tables: dict[str, Any], override: str) -> None:
    """Apply one `a.b.c=value` in place; see `toml_value`."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError("--set", override, "write key=value, e.g. settings.dp-fpl.rank=4")
    set_key(tables, key.strip(), toml_value(text))


def toml_value(text: str) -> Any:
    """Read a value as TOML, or as plain text if it is not TOML."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def separated(text: str) -> list[tuple[str, Any]]:
    """Return the texts between commas, each with its value. A list, a table, or text in quotes may hold commas."""
    parts: list[str] = []
    open_part = ""
    for piece in text.split(","):
        open_part = f"{open_part},{piece}" if open_part else piece
        whole = not open_part.lstrip().startswith(("[", "{", '"', "'")) or toml_value(open_part) != open_part
        if whole:
            parts.append(open_part)
            open_part = ""
    parts += open_part.split(",") if open_part else []
    return [(part.strip(), toml_value(part.strip())) for part in parts]


def set_key(tables: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables, in place.

    Raises:
        ConfigError: a part of the key is a value, not a table.
    """
    *path, last = key.split(".")
    table = tables
    for step in path:
        table = table.setdefault(step, {})
        if not isinstance(table, dict):
            raise ConfigError(key, value, f"{step} is a value, not a table")
    table[last] = value


def check_values(value: Any, key: str = "") -> None:
    """Check that text in a value can be written into a run directory's `config.toml`, and numbers fit into tensors.

    Raises:
        ConfigError: text is not Unicode, as names of files may be, or holds a null character; or a number is too large.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            check_values(name, key or "CONFIG")
            check_values(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_values(inner, key)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            remedy = "is not UTF-8 text; where it is a path, rename the file or folder, or link to it by another name"
            raise ConfigError(key, value, remedy) from None
        if "\0" in value:
            raise ConfigError(key, value, "must not hold a null character")
    elif isinstance(value, int):
        largest = LARGEST_COUNT if key.startswith("settings.") else LARGEST_INT
        if abs(value) > largest:
            raise ConfigError(key, value, f"whole numbers go up to {largest:,} here")
    elif isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST and not key.startswith("privacy."):
        raise ConfigError(key, value, f"numbers go up to {LARGEST:g}")
