"""A table of settings that is given in part keeps the method's own defaults for the rest."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from sordino.algorithms import METHODS, Method, promptfl, settings_for
from sordino.algorithms.optimizer import Optimizer
from sordino.errors import ConfigError
from sordino.experiments.methods import card
from sordino.experiments.toml_tables import set_key

# A method, one of its tables, and the default of this.
PARTIAL = [
    ("fedprompt", "optimizer", Optimizer("adam", 0.002)),
    ("fedtpg", "optimizer", Optimizer("sgd", 0.003, momentum=0.9, weight_decay=1e-5, schedule="cosine")),
    ("sgpt", "optimizer", Optimizer("sgd", 0.01, momentum=0.9, weight_decay=1e-5)),
    ("feddpg", "optimizer", Optimizer("adamw", 0.001, weight_decay=0.01)),
    ("pfedpg", "server_optimizer", Optimizer("adam", 0.001)),
    ("pfedpt", "frame_optimizer", Optimizer("sgd", 1.0, momentum=0.5)),
]


@dataclass(frozen=True)
class Inner:
    first: int = 1
    second: int = 2


@dataclass(frozen=True)
class Mine:
    needed: int
    inner: Inner = Inner(3, 4)


@pytest.mark.parametrize("name", METHODS)
def test_writing_a_displayed_default_changes_nothing(name: str) -> None:
    """Each key that `sordino methods NAME` lists, for the method alone and, where it has that default, for all."""
    defaults = settings_for(name, {})
    for setting in card(name).settings:
        if setting.default in ("", "not set"):
            continue
        value = tomllib.loads(f"value = {setting.default}")["value"]
        shared: dict[str, Any] = {}
        own: dict[str, Any] = {}
        set_key(shared, setting.name, value)
        set_key(own, f"{name}.{setting.name}", value)
        assert settings_for(name, own) == defaults, setting.name
        assert settings_for(name, shared) == defaults, setting.name


@pytest.mark.parametrize(("name", "key", "default"), PARTIAL)
def test_a_rate_alone_leaves_the_rest_of_the_optimizer(name: str, key: str, default: Optimizer) -> None:
    settings = settings_for(name, {key: {"learning_rate": 0.7}})
    assert getattr(settings, key) == replace(default, learning_rate=0.7)
    # What is given for one method is laid over what is given for all.
    settings = settings_for(name, {key: {"learning_rate": 0.7}, name: {key: {"max_norm": 2.0}}})
    assert getattr(settings, key) == replace(default, learning_rate=0.7, max_norm=2.0)


@pytest.mark.parametrize(("name", "key", "default"), PARTIAL)
def test_another_optimizer_starts_from_its_own_defaults(name: str, key: str, default: Optimizer) -> None:
    """Momentum, decay, schedule and rate are those of the optimizer that is left."""
    other = "adam" if default.name != "adam" else "sgd"
    assert getattr(settings_for(name, {key: {"name": other}}), key) == Optimizer(other)
    both = {key: {"learning_rate": 0.7}, name: {key: {"name": other}}}
    assert getattr(settings_for(name, both), key) == Optimizer(other, 0.7)


def test_a_table_of_a_method_defined_in_python_is_completed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mine", Method("mine", added=SimpleNamespace(**vars(promptfl) | {"Settings": Mine})))
    assert settings_for("mine", {"needed": 5, "inner": {"second": 6}}) == Mine(5, Inner(3, 6))
    assert settings_for("mine", {"needed": 5}) == Mine(5, Inner(3, 4))
    with pytest.raises(ConfigError, match="settings.mine.needed"):
        settings_for("mine", {"inner": {"second": 6}})
    with pytest.raises(ConfigError, match="settings.mine.inner"):
        settings_for("mine", {"needed": 5, "inner": 7})
