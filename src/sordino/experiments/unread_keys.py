"""The condition under which a run reads each key of `[runtime]` and `[privacy]`, and the keys that do nothing in a run.

A key that does nothing may promise a protection that is not there, such as a bound on uploads that no aggregation
applies. So each that has another value than its default is warned of, once a run. Where nothing else can be meant, the
tables refuse it themselves: a key of `[privacy]` without a mechanism, a bound on uploads without an aggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel

from sordino.algorithms import algorithm
from sordino.experiments.config import Experiment
from sordino.privacy.settings import OF_A_RELEASE, Mechanism, PrivacySettings
from sordino.progress import log
from sordino.runtime.settings import READ_BY, RuntimeSettings

if TYPE_CHECKING:  # it brings torch
    from sordino.algorithms.base import MethodInfo


@dataclass(frozen=True)
class Uses:
    """All that decides which keys a run reads.

    Attributes:
        privacy, runtime: the tables.
        about: the method.
    """

    privacy: PrivacySettings
    runtime: RuntimeSettings
    about: MethodInfo

    @property
    def protects(self) -> bool:
        """Tell whether there is a mechanism, and something that it protects."""
        return self.privacy.on and (self.about.trains or self.about.statistics)

    @property
    def two_groups(self) -> bool:
        """Tell whether parameters have two clips and two parts of the budget, the personal and the shared ones."""
        return bool(self.about.averages) and self._personal and not self.about.forward_only

    @property
    def two_sums(self) -> bool:
        """Tell whether a release of statistics has two parts, of each client and of all together."""
        return self._personal and self.privacy.noise_by != "client"

    @property
    def _personal(self) -> bool:
        return self.about.personal != "nothing"


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        needs: the condition in words, after "it needs"; empty where every run reads it.
        read: whether such a run reads it.
    """

    needs: str = ""
    read: Callable[[Uses], bool] = lambda uses: True


def _of(*mechanisms: Mechanism, more: str = "", read: Callable[[Uses], bool] = lambda uses: True) -> Key:
    """Return a key that some mechanisms read, if all else that it needs is there."""
    needs = f"privacy.mechanism = {' or '.join(map(repr, mechanisms))}"
    return Key(
        f"{needs} and {more}" if more else needs, lambda uses: uses.privacy.mechanism in mechanisms and read(uses)
    )


RUNTIME: dict[str, Key] = {
    "participation": Key(),
    "weighting": Key(),
    "aggregation": Key(),
    "trim": Key("runtime.aggregation = 'trimmed-mean'", lambda uses: uses.runtime.aggregation == READ_BY["trim"]),
    "norm_bound": Key(
        "runtime.aggregation = 'norm-bound'", lambda uses: uses.runtime.aggregation == READ_BY["norm_bound"]
    ),
    "evaluate_every": Key(),
    "checkpoint_every": Key(),
}

PRIVACY: dict[str, Key] = {
    "mechanism": Key(),
    "unit": Key(),
    "person_images": _of(
        *("dp-sgd", "cotangent"), more="privacy.unit = 'person'", read=lambda uses: uses.privacy.by_person
    ),
    "epsilon": Key(),
    "delta": Key(),
    "noise_multiplier": Key(),
    "clip": Key(
        "privacy.unit = 'person' under 'statistics', or another privacy.mechanism",
        lambda uses: uses.privacy.mechanism != "statistics" or uses.privacy.by_person,
    ),
    "personal_clip": _of(
        "dp-sgd",
        more="a method with personal and shared parameters, such as 'dp-fpl'",
        read=lambda uses: uses.two_groups,
    ),
    "shared_budget": Key(
        "a method with personal and shared parts, such as 'dp-fpl', and privacy.mechanism = 'dp-sgd', or 'statistics' "
        "with a privacy.noise_by other than 'client'",
        lambda uses: {"dp-sgd": uses.two_groups, "statistics": uses.two_sums}.get(uses.privacy.mechanism, False),
    ),
    "noise_by": _of("statistics", "dp-sgd", "dp-fedavg"),
    "subspace": _of("cotangent", "statistics"),
    "count_share": _of("statistics"),
    "center_share": _of(
        "statistics",
        more="a method that uses more than counts, in all directions of features (no privacy.subspace)",
        read=lambda uses: not uses.about.counts_only,
    ),
    "scatter_share": _of(
        "statistics",
        more="a method that joins what clients release, and uses more than counts",
        read=lambda uses: uses.about.server_uses != "nothing" and not uses.about.counts_only,
    ),
    "sampling_rate": _of("statistics"),
    "held_error": _of("statistics", more="a method that trains", read=lambda uses: uses.about.trains),
    "release": _of("statistics"),
    "directions": _of("cotangent", "statistics"),
    "clip_quantile": _of("dp-fedavg"),
    "clip_learning_rate": _of(
        "dp-fedavg", more="privacy.clip_quantile", read=lambda uses: uses.privacy.clip_quantile is not None
    ),
    "compress": _of(
        "dp-fedavg", more="privacy.noise_by = 'server'", read=lambda uses: uses.privacy.noise_by == "server"
    ),
    "colluders": Key(
        "privacy.noise_by = 'shares', or privacy.compress = true",
        lambda uses: uses.privacy.noise_by == "shares" or uses.privacy.compress,
    ),
    "dropouts": Key("privacy.noise_by = 'shares'", lambda uses: uses.privacy.noise_by == "shares"),
    "simulation": Key(),
    "nonce": Key("privacy.simulation = true", lambda uses: uses.privacy.simulation),
}


def unread_keys(uses: Uses) -> dict[str, str]:
    """Return the keys, with dots, that have another value than their default and do nothing, each with a warning.

    Nothing is said of `[privacy]` where mechanism = 'none' was chosen, which turns the whole table off, nor where
    nothing is learned from images.
    """
    tables: list[tuple[str, BaseModel, dict[str, Key]]] = [("runtime", uses.runtime, RUNTIME)]
    if uses.protects:
        tables.append(("privacy", uses.privacy, PRIVACY))
    found = {}
    for table, settings, keys in tables:
        for name, key in keys.items():
            of_release = table == "privacy" and uses.privacy.release is not None and name in OF_A_RELEASE
            field = type(settings).model_fields[name]
            default = field.get_default(call_default_factory=True, validated_data=settings.__dict__)
            if of_release or key.read(uses) or (value := getattr(settings, name)) == default:
                continue
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            remedy = f"does nothing in this run, as it needs {key.needs}; set that, or leave it out"
            found[f"{table}.{name}"] = f"{table}.{name} = {shown}: {remedy}"
    return found


def unread_notes(configs: Sequence[Experiment]) -> list[str]:
    """Return a line for each key that does nothing in any of several runs.

    Runs without a mechanism, or in which nothing is learned, do not count for a key of `[privacy]`.
    """
    all_uses = [Uses(config.privacy, config.runtime, algorithm(config.algorithm).ABOUT) for config in configs]
    found = [unread_keys(uses) for uses in all_uses]
    protecting = [unread for unread, uses in zip(found, all_uses, strict=True) if uses.protects]
    notes: dict[str, str] = {}
    for unread in found:
        for key, line in unread.items():
            if all(key in other for other in (protecting if key.startswith("privacy.") else found)):
                notes.setdefault(key, line)
    return list(notes.values())


def warn_of_unread(config: Experiment) -> None:
    """Log a warning for each key that does nothing in a run."""
    for line in unread_notes([config]):
        log.warning("%s", line)
