"""A method before it is run: its paper, its choices, its settings with their defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from sordino.algorithms import METHODS, algorithm, settings_for
from sordino.algorithms.base import MethodInfo

COLUMNS = ("paper", "personal", "shared", "privacy", "needs")
ATTRIBUTES = re.compile(r"Attributes?:\s*\n?(.*)", re.DOTALL)


@dataclass(frozen=True)
class Setting:
    """A hyper-parameter.

    Attributes:
        name: as under `[settings]`; keys of a table within are joined by dots.
        default: as it would be written in a configuration.
        meaning: what it is; empty for keys within a table.
    """

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Card:
    """A method.

    Attributes:
        name: under which it is run.
        about: what is personal, what is shared, what it needs.
        text: its module's docstring: the idea, the source, and the choices made where that is silent.
        settings: its hyper-parameters.
        discloses: what leaves a client where nothing is noised.
    """

    name: str
    about: MethodInfo
    text: str
    settings: tuple[Setting, ...]
    discloses: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        row = {"name": self.name} | {column: getattr(self.about, column) for column in COLUMNS}
        return row | {
            "text": self.text,
            "discloses": list(self.discloses),
            "settings": [vars(setting) for setting in self.settings],
        }


def rows() -> list[dict[str, str]]:
    """Every method's line in the list of methods."""
    return [{"name": name} | {column: getattr(algorithm(name).ABOUT, column) for column in COLUMNS} for name in METHODS]


def card(name: str) -> Card:
    """The description of a method.

    Raises:
        ConfigError: there is no method of this name.
    """
    module = algorithm(name)
    meanings = _meanings(inspect.getdoc(module.Settings) or "")
    defaults = settings_for(name, {})
    flat = [entry for setting in fields(defaults) for entry in _flat(setting.name, defaults)]
    settings = tuple(Setting(key, value, meanings.get(key, "")) for key, value in flat)
    discloses = tuple(disclosure.content for disclosure in module.ABOUT.discloses)
    return Card(name, module.ABOUT, inspect.getdoc(module) or "", settings, discloses)


def _flat(name: str, holder: Any) -> Iterator[tuple[str, str]]:
    """A setting as (key, value in TOML); a table of settings as its entries, after itself."""
    value = getattr(holder, name.rpartition(".")[2])
    if not is_dataclass(value):
        yield name, _toml(value)
        return
    yield name, ""
    for part in fields(value):
        yield from _flat(f"{name}.{part.name}", value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else "not set" if value is None else str(value)


def _meanings(docstring: str) -> dict[str, str]:
    """Return the text of each name in a docstring's section `Attributes:`."""
    section = ATTRIBUTES.search(docstring)
    if section is None:
        return {}
    lines = inspect.cleandoc(section[1]).split("\n")
    entries = re.split(r"\n(?=\S)", "\n".join(lines))
    meanings: dict[str, str] = {}
    for entry in entries:
        names, _, meaning = entry.partition(":")
        meanings.update(dict.fromkeys((name.strip() for name in names.split(",")), " ".join(meaning.split())))
    return meanings
