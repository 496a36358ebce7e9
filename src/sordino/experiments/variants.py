"""The lines of a comparison, before anything is run. This imports nothing heavy, so bad ones are refused at once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sordino.experiments.config import Experiment, parse_config, resolved
from sordino.experiments.toml_tables import set_key


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
    def folder(self) -> Path:
        """The folder of its runs, relative to the comparison's."""
        return Path(self.config.algorithm, re.sub(r"[^\w.=-]+", "_", self.variation))


def grid(
    config: Experiment, algorithms: Sequence[str], vary: Mapping[str, Sequence[Any]] | None = None
) -> list[Variant]:
    """Return every algorithm with every combination of the varied keys.

    A key that an algorithm ignores makes no new line.

    Args:
        config: the experiment that all have in common.
        algorithms: their names.
        vary: values by dotted key.

    Raises:
        ConfigError: an algorithm, key or value is not allowed.
    """
    keys = list(vary or {})
    variants: list[Variant] = []
    for name in algorithms:
        seen: list[dict[str, Any]] = []
        for values in itertools.product(*(vary[key] for key in keys) if vary else ()):
            tables = config.model_dump(exclude_none=True) | {"algorithm": name}
            for key, value in zip(keys, values, strict=True):
                set_key(tables, key, value)
            varied = parse_config(tables)
            settings = resolved(varied)
            if settings not in seen:
                seen.append(settings)
                words = ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
                variants.append(Variant(varied, words))
        if len(seen) == 1:  # nothing that varies matters to this algorithm
            variants[-1] = replace(variants[-1], variation="")
    return variants
