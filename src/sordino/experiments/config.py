"""An experiment's configuration: a TOML file, `--set` overrides, and what they resolve to."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sordino.errors import ConfigError, config_error
from sordino.files import absolute_path, user_path
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.settings import RuntimeSettings
from sordino.tasks.settings import DataSettings, PartitionSettings, PoisoningSettings

LARGEST_INT, LARGEST = 2**63 - 1, 1e30  # of a configuration's numbers: tensors hold no larger ones
LARGEST_COUNT = 1_000_000  # of a method's whole numbers: more tokens, steps or pictures at once fit no machine


class EncoderSettings(BaseModel):
    """The `[encoder]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Literal["bundled", "clip"] = Field(default="bundled", description="which encoder")
    checkpoint: str | None = Field(
        default=None, description="clip: a directory or a hub name of a CLIP or SigLIP model"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="precision of the frozen towers")


class Experiment(BaseModel):
    """A whole configuration. `settings` holds the methods' tables; the method's own type checks them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    algorithm: str = Field(default="dp-fpl", description="the method that `sordino run` runs")
    rounds: int = Field(default=50, ge=1, le=100_000, description="rounds of training")
    seed: int = Field(default=0, ge=0, description="decides splits, partition, initial prompts, batches and noise")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where tensors live")
    data: DataSettings
    partition: PartitionSettings
    encoder: EncoderSettings = EncoderSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    privacy: PrivacySettings = PrivacySettings()
    poisoning: PoisoningSettings | None = Field(default=None, description="clients that attack; absent: nobody does")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="hyper-parameters; [settings.NAME] for one method"
    )

    @classmethod
    def of(cls, **tables: Any) -> Experiment:
        """Make a configuration in Python, of the keys and tables that a TOML file has.

        For example `Experiment.of(algorithm="promptfl", data={"source": "digits"}, partition={"scheme": "iid",
        "clients": 4}, settings={"context_length": 8})`. Like `load_config`, and unlike the class itself, it checks the
        method's settings too.

        Raises:
            ConfigError: a key or value is not allowed; it names the key with dots, such as `data.source`.
        """
        check_values(tables)
        return parse_config(tables)


def load_config(path: Path | str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Experiment:
    """Read a TOML file and override some of its keys.

    Args:
        path: of the file.
        overrides: `key=value` texts as on the command line, or dotted keys to values.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value is not allowed.
    """
    return parse_config(read_tables(Path(path), overrides))


def read_tables(path: Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> dict[str, Any]:
    """The tables of a TOML file with overrides, unchecked; see `load_config`.

    Raises:
        ConfigError: the file is missing or malformed, or an override is.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a mark
    except FileNotFoundError:
        raise ConfigError("CONFIG", str(path), "no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("CONFIG", str(path), f"not a readable TOML file: {error}") from None
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            set_key(tables, key, value)
    else:
        for override in overrides:
            _set(tables, override)
    check_values(tables)
    return tables


def parse_config(tables: Mapping[str, Any]) -> Experiment:
    """Check the content of a configuration, and of the tables of every method in it.

    Raises:
        ConfigError: a key or value is not allowed.
    """
    from sordino.algorithms import METHODS, algorithm, settings_for

    try:
        config = Experiment.model_validate(dict(tables))
    except ValidationError as error:
        raise config_error(error) from None
    algorithm(config.algorithm)
    for name in {config.algorithm, *(key for key in config.settings if key in METHODS)}:
        settings_for(name, config.settings)
    if config.encoder.name == "clip" and config.encoder.checkpoint is None:
        raise ConfigError("encoder.checkpoint", None, "encoder 'clip' needs a directory or a hub name of a checkpoint")
    return config.model_copy(update={"data": _absolute(config.data)})


def resolved(config: Experiment) -> dict[str, Any]:
    """The configuration with every default written out, for the method that runs; keys without a value are absent."""
    from dataclasses import asdict

    from sordino.algorithms import settings_for

    tables = config.model_dump(exclude_none=True)
    tables["settings"] = {config.algorithm: asdict(settings_for(config.algorithm, config.settings))}
    return tables


def to_toml(tables: Mapping[str, Any]) -> str:
    """A configuration as TOML text."""
    return tomli_w.dumps(dict(tables))


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first key, dotted, in which two configurations differ, with both values; None where they are equal."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found = first_difference(before, after, f"{prefix}{key}.")
            if found:
                return found
        elif before != after:
            return f"{prefix}{key}", before, after
    return None


def _set(tables: dict[str, Any], override: str) -> None:
    """Apply one `a.b.c=value`; the value is read as TOML, and as plain text where it is not TOML."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError("--set", override, "write key=value, e.g. settings.dp-fpl.rank=4")
    set_key(tables, key.strip(), toml_value(text))


def toml_value(text: str) -> Any:
    """A value as TOML reads it, or as plain text where it is not TOML."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


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


def _absolute(data: DataSettings) -> DataSettings:
    """The same data from anywhere: a relative folder is one from the working directory."""
    kind, colon, rest = data.source.partition(":")
    if colon and (kind == "imagefolder" or user_path(rest, "data.source").exists()):
        source = f"{kind}:{absolute_path(rest, 'data.source')}"
        check_values(source, "data.source")
        return data.model_copy(update={"source": source})
    return data


def check_values(value: Any, key: str = "") -> None:
    """See that text in a value can be written into a run directory's `config.toml`, and numbers fit into tensors.

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
    elif isinstance(value, int) and abs(value) > (
        most := LARGEST_COUNT if key.startswith("settings.") else LARGEST_INT
    ):
        raise ConfigError(key, value, f"whole numbers go up to {most:,} here")
    elif isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST and not key.startswith("privacy."):
        raise ConfigError(key, value, f"numbers go up to {LARGEST:g}")
