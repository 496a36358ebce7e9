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
        meaning: what it is.
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
        parent: the method whose settings table also applies to it; None if it descends from none.
        discloses: what leaves a client where nothing is noised.
    """

    name: str
    about: MethodInfo
    text: str
    settings: tuple[Setting, ...]
    discloses: tuple[str, ...]
    parent: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        row = {"name": self.name} | {column: getattr(self.about, column) for column in COLUMNS}
        return row | {
            "text": self.text,
            "parent": self.parent,
            "discloses": list(self.discloses),
            "settings": [vars(setting) for setting in self.settings],
        }


def rows() -> list[dict[str, str]]:
    """Every method's line in the list of methods, with what it releases where nothing is noised."""
    return [_row(name) for name in METHODS]


def _row(name: str) -> dict[str, str]:
    about = algorithm(name).ABOUT
    releases = "; ".join(disclosure.content for disclosure in about.discloses) or "nothing"
    return {"name": name} | {column: getattr(about, column) for column in COLUMNS} | {"releases": releases}


def card(name: str) -> Card:
    """The description of a method.

    Raises:
        ConfigError: there is no method of this name.
    """
    module = algorithm(name)
    settings = tuple(_settings(settings_for(name, {})))
    discloses = tuple(disclosure.content for disclosure in module.ABOUT.discloses)
    return Card(name, module.ABOUT, inspect.getdoc(module) or "", settings, discloses, METHODS[name].parent)


def _settings(holder: Any, prefix: str = "") -> Iterator[Setting]:
    """Describe the fields of a dataclass; a table of settings is followed by its entries."""
    meanings = _meanings(type(holder))
    for entry in fields(holder):
        value, meaning = getattr(holder, entry.name), meanings.get(entry.name, "")
        if is_dataclass(value):
            yield Setting(prefix + entry.name, "", meaning)
            yield from _settings(value, f"{prefix}{entry.name}.")
        else:
            yield Setting(prefix + entry.name, _toml(value), meaning)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else "not set" if value is None else str(value)


def _meanings(settings_type: type) -> dict[str, str]:
    """Return the meaning of each setting, its own or inherited from the settings of a parent."""
    meanings: dict[str, str] = {}
    for ancestor in reversed(settings_type.__mro__):
        meanings |= _attributes(inspect.cleandoc(ancestor.__dict__.get("__doc__") or ""))
    return meanings


def _attributes(docstring: str) -> dict[str, str]:
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
