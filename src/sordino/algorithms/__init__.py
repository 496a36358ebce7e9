"""The methods, by name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from sordino.algorithms.base import Algorithm
from sordino.errors import ConfigError, config_error


@dataclass(frozen=True)
class Method:
    """A name under which a module runs.

    Attributes:
        module: in this package, or elsewhere with all its dots.
        parent: the method whose settings table also applies to this one, for ablations.
        defaults: settings that make the ablation.
    """

    module: str
    parent: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "zero-shot": Method("zero_shot"),
    "local": Method("local"),
    "central": Method("central"),
    "promptfl": Method("promptfl"),
    "fedprompt": Method("fedprompt"),
    "fedotp": Method("fedotp"),
    "fedpgp": Method("fedpgp"),
    "pfedprompt": Method("pfedprompt"),
    "pfedpt": Method("pfedpt"),
    "pfedpg": Method("pfedpg"),
    "fedperfix": Method("fedperfix"),
    "sgpt": Method("sgpt"),
    "secfpp": Method("secfpp"),
    "secfpp-plain": Method("secfpp_plain", "secfpp"),
    "dp-fpl": Method("dp_fpl"),
    "dplora": Method("dp_fpl", "dp-fpl", {"parameterization": "lora"}),
    "dp-fpl-full": Method("dp_fpl", "dp-fpl", {"parameterization": "full"}),
}


# Installed packages may bring methods of their own, as entry points.
METHODS |= {point.name: Method(point.value) for point in entry_points(group="sordino.methods")}


def algorithm(name: str) -> Algorithm:
    """The module of a method.

    Raises:
        ConfigError: there is no method of this name, or it does not say its schedule.
    """
    if name not in METHODS:
        raise ConfigError("algorithm", name, f"not a method; choose from {', '.join(METHODS)}")
    module = METHODS[name].module
    found = importlib.import_module(module if "." in module else f"sordino.algorithms.{module}")
    if not callable(getattr(found, "schedule", None)):
        needs = "schedule(settings) -> Schedule(steps, batch_size), which its epsilon is accounted by"
        raise ConfigError("algorithm", name, f"its module {module} lacks {needs}; see docs/new-method.md")
    return cast(Algorithm, found)


def settings_for(name: str, tables: Mapping[str, Any]) -> Any:
    """A method's settings from a configuration's `[settings]`.

    A key straight under `[settings]` goes to every method that knows it; `[settings.NAME]` goes to one method, and to
    its ablations.

    Raises:
        ConfigError: a key that no method knows, or a value out of range.
    """
    settings_type = algorithm(name).Settings
    known = {each.name for each in fields(settings_type)}
    common = {key: value for key, value in tables.items() if key not in METHODS}
    for key, value in common.items():
        if not any(key in _keys(other) for other in METHODS):
            raise ConfigError(f"settings.{key}", value, f"not a setting of any method; {name} has {', '.join(known)}")
    merged = {key: value for key, value in common.items() if key in known}
    for table in (METHODS[name].parent, name):
        if table is not None:
            merged = _merge(merged, tables.get(table, {}))
    try:
        # By way of JSON, as pydantic's strict mode takes a table for a dataclass only there.
        return TypeAdapter(settings_type).validate_json(json.dumps(_merge(METHODS[name].defaults, merged), default=str))
    except ValidationError as error:
        raise config_error(error, f"settings.{name}") from None
    except ConfigError as error:
        raise ConfigError(f"settings.{name}.{error.key}", error.value, error.allowed) from None


def _keys(name: str) -> set[str]:
    return {each.name for each in fields(algorithm(name).Settings)}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over` laid over it, tables within tables."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
