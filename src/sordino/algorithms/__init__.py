"""The methods, by name.

Importing this, and checking the settings of Sordino's own methods, imports no torch: a method's module does.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter, ValidationError

from sordino.algorithms.method_file import MethodFile, is_name
from sordino.errors import ConfigError, config_error, nearest

if TYPE_CHECKING:
    from sordino.algorithms.base import Algorithm


@dataclass(frozen=True)
class Method:
    """A name under which a module runs.

    Attributes:
        module: in this package, or elsewhere with all its dots.
        parent: the method that this one descends from: its settings table also applies here.
        defaults: settings that make the ablation.
        added: what `add_method` was given in place of a module to import.
        file: that `added` was read from; None if it was defined in Python.
    """

    module: str
    parent: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    added: Any = None
    file: MethodFile | None = None

    @property
    def own(self) -> bool:
        """True if it is one of Sordino's, whose module and settings are in this package."""
        return self.added is None and "." not in self.module


METHODS: dict[str, Method] = {
    "zero-shot": Method("zero_shot"),
    "random-prompt": Method("random_prompt"),
    "class-prior": Method("class_prior"),
    "head": Method("head"),
    "local": Method("local"),
    "central": Method("central"),
    "promptfl": Method("promptfl"),
    "fedprompt": Method("fedprompt"),
    "kgcoop": Method("kgcoop"),
    "prograd": Method("prograd"),
    "proda": Method("proda"),
    "fedtpg": Method("fedtpg"),
    "cocoop": Method("cocoop"),
    "plot": Method("plot"),
    "fedbpt": Method("fedbpt"),
    "fed-bbpt": Method("fed_bbpt"),
    "feddtpt": Method("feddtpt"),
    "feddtpt-votes": Method("feddtpt_votes", "feddtpt"),
    "feddpg": Method("feddpg"),
    "fedotp": Method("fedotp"),
    "fedpgp": Method("fedpgp"),
    "promptfolio": Method("promptfolio"),
    "pfedprompt": Method("pfedprompt"),
    "pfedmoap": Method("pfedmoap"),
    "pfedpt": Method("pfedpt"),
    "pfedpg": Method("pfedpg"),
    "fedperfix": Method("fedperfix"),
    "sgpt": Method("sgpt"),
    "maple": Method("maple"),
    "promptsrc": Method("promptsrc"),
    "secfpp": Method("secfpp"),
    "secfpp-plain": Method("secfpp_plain", "secfpp"),
    "tofa": Method("tofa"),
    "dp-residual": Method("dp_residual"),
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
    found = _named(name)
    module, method = found.module, found.added
    if method is None:
        method = importlib.import_module(f"sordino.algorithms.{module}" if found.own else module)
    if not callable(getattr(method, "schedule", None)):
        needs = "schedule(settings) -> Schedule(steps, batch_size), which its epsilon is accounted by"
        raise ConfigError("algorithm", name, f"its module {module} lacks {needs}; see docs/new-method.md")
    return cast("Algorithm", method)


def settings_type(name: str) -> Any:
    """The dataclass of a method's settings. That of one of Sordino's own methods is imported without the method.

    Raises:
        ConfigError: as `algorithm`.
    """
    method = _named(name)
    if not method.own:
        return algorithm(name).Settings
    owner = _named(method.parent) if method.parent else method  # an ablation has its parent's settings
    return importlib.import_module(f"sordino.algorithms.settings.{owner.module}").Settings


def _named(name: str) -> Method:
    if name not in METHODS:
        here = f"not a method; choose from {', '.join(METHODS)}"
        remedy = "or give its file with --method FILE, or in Python add it with sordino.add_method"
        raise ConfigError("algorithm", name, f"{here}, {remedy}{nearest(name, METHODS)}")
    return METHODS[name]


# What a method must define, see `sordino.algorithms.base`.
FUNCTIONS = ("schedule", "server_init", "client_init", "broadcast", "client_round", "server_round", "prompt")
TYPES = ("ABOUT", "Settings", "Upload")


def add_method(name: str, method: Any, key: str = "name") -> None:
    """Give a name to a method that is defined in Python, in a file or in a notebook for example.

    From then on the name works in this process as that of any other method: in a configuration, in `compare`, in an
    audit, and for prompts that it learned. Adding the name once more replaces the method. A method whose `PARENT` names
    another one shares that one's settings table.

    Args:
        name: in lower case, with hyphens, as in `algorithm = "my-method"`.
        method: what docs/new-method.md asks for: the path of a file, which is executed; a module, an object with these
            attributes, or a mapping of their names, such as `globals()` of a notebook.
        key: for messages, where the name comes from.

    Raises:
        ConfigError: the name is one of Sordino's own or of an installed package, or the method lacks something, or its
            file cannot be run.
    """
    if isinstance(method, MethodFile | Path | str):
        file = method if isinstance(method, MethodFile) else MethodFile.read(Path(method), key)
        _check_name(name, key)  # before anything is executed
        added = METHODS.get(name)
        if added is None or added.file != file:
            _add(name, file.run(key), key, file)
        return
    _check_name(name, key)
    # A copy, as a notebook goes on to define other things under these names.
    _add(name, SimpleNamespace(**method) if isinstance(method, Mapping) else method, key, None)


def _check_name(name: str, key: str) -> None:
    if not is_name(name):
        raise ConfigError(key, name, "give lower-case letters and digits, joined by hyphens")
    if name in METHODS and METHODS[name].added is None:
        raise ConfigError(key, name, "a method of this name is here already; choose another")
    if _is_setting(name):
        raise ConfigError(key, name, "a setting has this name; choose another")


def _add(name: str, module: Any, key: str, file: MethodFile | None) -> None:
    missing = [name for name in TYPES if not hasattr(module, name)]
    missing += [f"{name}()" for name in FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        key, value = ("method", name) if file is None else (key, str(file.path))
        raise ConfigError(key, value, f"lacks {', '.join(missing)}; see docs/new-method.md")
    parent = getattr(module, "PARENT", None)
    if parent is not None and (parent not in METHODS or METHODS[parent].added is not None):
        known = ", ".join(own for own, method in METHODS.items() if method.added is None)
        raise ConfigError("PARENT", parent, f"method {name} may descend from {known}")
    METHODS[name] = Method(getattr(module, "__name__", type(module).__name__), parent, added=module, file=file)


def lineage(name: str) -> list[str]:
    """Return a method with those that it descends from, the first ancestor first."""
    names = [name]
    while (parent := METHODS[names[0]].parent) is not None:
        names.insert(0, parent)
    return names


def settings_for(name: str, tables: Mapping[str, Any]) -> Any:
    """A method's settings from a configuration's `[settings]`.

    A key straight under `[settings]` goes to every method that knows it; `[settings.NAME]` goes to one method, and to
    those that descend from it and know the key. Of a table such as `optimizer`, keys that are not given keep the
    method's own default. If it names another optimizer than that default, they take the defaults of `Optimizer`, as
    a momentum of SGD means nothing to Adam.

    Raises:
        ConfigError: a key that no method knows, or a value out of range.
    """
    own_type, known = settings_type(name), _known(name)
    common = {key: value for key, value in tables.items() if key not in METHODS}
    for key, value in common.items():
        if not _is_setting(key):
            near = nearest(key, [*known, *METHODS] if isinstance(value, Mapping) else known)
            here = f"not a setting of any method; {name} has {', '.join(known)}"
            raise ConfigError(f"settings.{key}", value, here + near)
    merged: dict[str, Any] = {}
    for ancestor in lineage(name):
        merged = _merge(merged, METHODS[ancestor].defaults)
    merged = _merge(merged, {key: value for key, value in common.items() if key in known})
    for ancestor in lineage(name):
        method_table = tables.get(ancestor, {})
        if not isinstance(method_table, Mapping):
            raise ConfigError(f"settings.{ancestor}", method_table, "must be a table of this method's settings")
        foreign = _known(ancestor).keys() - known.keys()  # of a descendant with settings of its own
        merged = _merge(merged, {key: value for key, value in method_table.items() if key not in foreign})
    merged = _completed(own_type, merged)
    try:
        # By way of JSON, as pydantic's strict mode takes a table for a dataclass only there.
        return TypeAdapter(own_type).validate_json(json.dumps(merged, default=str))
    except ValidationError as error:
        raise config_error(error, own_type, f"settings.{name}") from None
    except ConfigError as error:
        raise ConfigError(f"settings.{name}.{error.key}", error.value, error.allowed) from None


def _completed(own_type: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings with each of their tables laid over the default of its field."""
    completed = dict(given)
    for setting in fields(own_type):
        table, default = given.get(setting.name), setting.default
        if setting.default_factory is not MISSING:
            default = setting.default_factory()
        if not isinstance(table, Mapping) or not is_dataclass(default) or isinstance(default, type):
            continue
        kind = getattr(default, "name", None)
        if table.get("name", kind) == kind:
            completed[setting.name] = _merge(asdict(default), table)
    return completed


def _known(name: str) -> dict[str, None]:
    """Return the names of a method's settings, in order, as a set that keeps it."""
    return dict.fromkeys(setting.name for setting in fields(settings_type(name)))


def _is_setting(key: str) -> bool:
    """Return whether any method has a setting of this name."""
    return any(key in _known(name) for name in METHODS)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over` laid over it, tables within tables."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
