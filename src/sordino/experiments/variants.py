"""The lines of a comparison before they are run: methods with settings, equal steps, and ignored settings.

Only counting steps imports the methods, and torch with them; so bad lines are refused at once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from sordino.algorithms import METHODS, algorithm, settings_for, settings_type
from sordino.errors import ConfigError
from sordino.experiments.config import Experiment, parse_config, resolved
from sordino.experiments.toml_tables import set_key
from sordino.experiments.unread_keys import unread_notes
from sordino.results import listed, unequal_steps
from sordino.runtime.settings import participant_count

EQUAL_STEPS = "--equal-steps"


@dataclass(frozen=True)
class Variant:
    """One line of a comparison: an algorithm with its settings.

    Attributes:
        config: the experiment, with the first seed.
        variation: the settings that differ from other lines of the algorithm, as `key=value, ...`; may be empty.
        shadows: shadow federations for membership inference against its first run; 0 does not attack it.
    """

    config: Experiment
    variation: str = ""
    shadows: int = 0

    @property
    def label(self) -> str:
        """The algorithm, and what varies by the last part of its name."""
        return label(self.config.algorithm, self.variation)

    @property
    def folder(self) -> Path:
        """The folder of its runs, relative to the comparison's."""
        return Path(self.config.algorithm, re.sub(r"[^\w.=-]+", "_", self.variation))


def label(name: str, variation: str) -> str:
    """Return an algorithm's name, and what varies by the last part of its name."""
    varied = re.sub(r"[\w.-]*\.([\w-]+=)", r"\1", variation)
    return f"{name} {varied}".strip()


def grid(
    config: Experiment,
    algorithms: Sequence[str],
    vary: Mapping[str, Sequence[Any]] | None = None,
    equal_steps: bool = False,
) -> list[Variant]:
    """Return every algorithm with every combination of the varied keys.

    A key that an algorithm ignores makes no new line.

    Args:
        config: the experiment that all have in common.
        algorithms: their names.
        vary: values by dotted key.
        equal_steps: give all of them the gradient steps of the first one that takes any; see `at_equal_steps`.

    Raises:
        ConfigError: an algorithm, key or value is not allowed, or steps cannot be made equal.
    """
    if not algorithms:
        raise ConfigError("--algorithms", "", "name one method at least; 'sordino methods' lists them")
    vary = vary or {}
    keys = list(vary)
    for key, given in vary.items():
        if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
            raise ConfigError(key, given, "give a list of the values that it is varied over")
    variants: list[Variant] = []
    for name in dict.fromkeys(algorithms):
        seen: list[dict[str, Any]] = []
        for values in itertools.product(*vary.values()):
            tables = config.model_dump(exclude_none=True) | {"algorithm": name}
            for key, value in zip(keys, values, strict=True):
                set_key(tables, key, value)
            varied = parse_config(tables)
            settings = resolved(varied)
            if not varied.privacy.on:  # without a mechanism, nothing else in the table matters
                settings["privacy"] = {}
            if settings not in seen:
                seen.append(settings)
                words = ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
                variants.append(Variant(varied, words))
        if len(seen) == 1:  # nothing that varies matters to this algorithm
            variants[-1] = replace(variants[-1], variation="")
    return at_equal_steps(variants) if equal_steps else variants


def planned_steps(config: Experiment) -> tuple[int, Fraction]:
    """Return the gradient steps of a client in a round, and in the whole run as the mean over clients."""
    method = algorithm(config.algorithm)
    steps = method.schedule(settings_for(config.algorithm, config.settings)).steps if method.ABOUT.trains else 0
    clients = 1 if method.ABOUT.pools_data else config.partition.clients
    taking_part = Fraction(participant_count(clients, config.runtime.participation), clients)
    return steps, steps * config.rounds * taking_part


def at_equal_steps(variants: Sequence[Variant]) -> list[Variant]:
    """Return the same lines with as many gradient steps of a client in a run as the first one that takes any.

    Their `local_steps` are changed for it. Methods that take no gradient step stay as they are.

    Raises:
        ConfigError: it cannot be done with whole steps, a method has no such setting, or two lines become the same.
    """
    counted = [variant for variant in variants if planned_steps(variant.config)[1]]
    if not counted:
        return list(variants)
    first, wanted = counted[0], planned_steps(counted[0].config)[1]
    equal = [variant if variant not in counted else _with_steps(variant, wanted, first) for variant in variants]
    seen: dict[str, Variant] = {}
    for variant in equal:
        same = seen.setdefault(repr(resolved(variant.config)), variant)
        if same is not variant:
            raise ConfigError(
                EQUAL_STEPS, True, f"makes {same.label} and {variant.label} the same; do not vary local_steps with it"
            )
    return equal


def _with_steps(variant: Variant, wanted: Fraction, first: Variant) -> Variant:
    """Return a line with local steps that make its gradient steps in a run those that are wanted."""
    config = variant.config
    a_round, whole = planned_steps(config)
    needed = wanted / (whole / a_round)
    if needed == a_round:
        return variant
    goal = f"{float(wanted):g} gradient steps of {first.label}"
    if needed.denominator != 1:
        raise ConfigError(
            EQUAL_STEPS,
            True,
            f"{variant.label} would need {float(needed):.3g} local steps a round for the {goal}, which is no whole "
            "number; choose other rounds or local_steps, or leave it out",
        )
    if "local_steps" not in {setting.name for setting in fields(settings_type(config.algorithm))}:
        raise ConfigError(
            EQUAL_STEPS,
            True,
            f"{variant.label} takes {a_round} gradient steps a round and has no setting local_steps, so it cannot take "
            f"the {goal}; leave it out",
        )
    tables = config.model_dump(exclude_none=True)
    set_key(tables, f"settings.{config.algorithm}.local_steps", int(needed))
    changed = parse_config(tables)
    if planned_steps(changed)[1] != wanted:
        raise ConfigError(
            EQUAL_STEPS, True, f"{variant.label} takes other steps than its local_steps say; leave it out"
        )
    return replace(variant, config=changed)


def ignored_settings(config: Experiment) -> tuple[str, ...]:
    """Return the keys straight under `[settings]` that a configuration's method does not have."""
    known = {setting.name for setting in fields(settings_type(config.algorithm))}
    return tuple(key for key in config.settings if key not in METHODS and key not in known)


def ignored_words(ignored: Mapping[str, Sequence[str]]) -> str | None:
    """Return in one line which settings are ignored by which method: `settings.rank: ignored by promptfl`.

    Args:
        ignored: keys straight under `[settings]`, by method.
    """
    by_methods: dict[tuple[str, ...], list[str]] = {}
    for key in dict.fromkeys(key for keys in ignored.values() for key in keys):
        methods = tuple(name for name, keys in ignored.items() if key in keys)
        by_methods.setdefault(methods, []).append(f"settings.{key}")
    lines = [f"{listed(keys)}: ignored by {listed(methods)}" for methods, keys in by_methods.items()]
    return "; ".join(lines) or None


def fairness_notes(variants: Sequence[Variant]) -> list[str]:
    """Return what to know of a comparison before it is trained, a line each: unequal steps, and what is ignored."""
    steps = {variant.label: planned_steps(variant.config) for variant in variants}
    unequal = unequal_steps({name: (a_round, float(whole)) for name, (a_round, whole) in steps.items()})
    ignored: dict[str, tuple[str, ...]] = {}
    for variant in variants:
        name = variant.config.algorithm
        ignored[name] = tuple(dict.fromkeys((*ignored.get(name, ()), *ignored_settings(variant.config))))
    unread = unread_notes([variant.config for variant in variants])
    return [line for line in (unequal, ignored_words(ignored), *unread) if line]
