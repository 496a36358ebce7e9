"""An experiment's configuration: a TOML file, `--set` overrides, and what they resolve to."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from sordino.algorithms import METHODS, add_method, settings_for
from sordino.algorithms.method_file import MethodFile
from sordino.encoders.checkpoint_place import checkpoint_folder
from sordino.encoders.generative.settings import GenerativeSettings
from sordino.errors import ConfigError, SordinoWarning, config_error
from sordino.experiments.toml_tables import check_values, read_tables
from sordino.experiments.tracking import TrackingSettings
from sordino.files import absolute_path, require_folder, user_path
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.settings import RuntimeSettings
from sordino.tasks.places import check_places as check_data
from sordino.tasks.settings import DataSettings, PartitionSettings, PoisoningSettings

WITH_CHECKPOINT = ("clip", "generative")  # the encoders that are loaded from a checkpoint
KEPT_METHODS = "method"  # the folder of a run directory with a copy of its method's file


class EncoderSettings(BaseModel):
    """The `[encoder]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Literal["bundled", "clip", "generative"] = Field(default="bundled", description="which encoder")
    checkpoint: str | None = Field(
        default=None,
        description="a directory or a hub name: clip, of a CLIP or SigLIP model; generative, of a vision-language one",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="precision of the frozen towers")
    generative: GenerativeSettings | None = Field(
        default=None, description="generative: the text around picture and prompt; other encoders have none"
    )


class MethodSource(BaseModel):
    """An entry of the `[methods]` table.

    Attributes:
        file: the path of a method's file.
        sha256: hex digest that its content must have; None: any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: str
    sha256: str | None = None


def _of_path(value: Any) -> Any:
    """An entry of `[methods]` that is a path alone, as a table."""
    return {"file": value} if isinstance(value, str) else value


Methods = dict[str, Annotated[MethodSource, BeforeValidator(_of_path)]]


class Experiment(BaseModel):
    """A whole configuration. `settings` holds the methods' tables; the method's own type checks them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    algorithm: str = Field(default="dp-fpl", description="the method that `sordino run` runs")
    rounds: int = Field(default=50, ge=1, le=100_000, description="rounds of training")
    seed: int = Field(
        default=0, ge=0, description="decides splits, partition, initial prompts and, without a mechanism, batches"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where tensors live")
    data: DataSettings
    partition: PartitionSettings
    encoder: EncoderSettings = EncoderSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    privacy: PrivacySettings = PrivacySettings()
    poisoning: PoisoningSettings | None = Field(default=None, description="clients that attack; absent: nobody does")
    tracking: TrackingSettings | None = Field(default=None, description="who is sent metrics; absent: nobody is")
    methods: Methods = Field(default_factory=dict, description="methods in files: name to path; the files are executed")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="hyper-parameters; [settings.NAME] for one method"
    )

    @classmethod
    def of(cls, **tables: Any) -> Experiment:
        """Make a configuration in Python, of the keys and tables that a TOML file has.

        For example `Experiment.of(algorithm="promptfl", data={"source": "digits"}, partition={"scheme": "iid",
        "clients": 4}, settings={"context_length": 8})`. Like `load_config`, and unlike the class itself, it checks the
        method's settings too, and executes the files of `methods`, relative ones from the working directory.

        Raises:
            ConfigError: a key or value is not allowed; it names the key with dots, such as `data.source`.
        """
        check_values(tables)
        return parse_config(with_methods(tables, Path()))


def load_config(path: Path | str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Experiment:
    """Read a TOML file and override some of its keys. The files of methods that it names are executed.

    Args:
        path: of the file.
        overrides: `key=value` texts as on the command line, or dotted keys to values.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value is not allowed.
    """
    tables = read_tables(Path(path), overrides)
    check_overrides(tables, overrides)
    return parse_config(with_methods(tables, Path(path).parent))


def check_overrides(tables: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> None:
    """Refuse an override that promises what the file turns off, as the `config.toml` of a run without privacy does.

    What a file turns off itself may stay in it. An override was meant.

    Args:
        tables: of the configuration, with the overrides.
        overrides: `key=value` texts, or dotted keys to values.

    Raises:
        ConfigError: a value of a mechanism or of an aggregation, and no override names one.
    """
    keys = {str(override).partition("=")[0].strip() for override in overrides}
    switches: tuple[tuple[str, str, type[BaseModel]], ...] = (
        ("privacy", "mechanism", PrivacySettings),
        ("runtime", "aggregation", RuntimeSettings),
    )
    for table, switch, model in switches:
        own = {key.removeprefix(f"{table}.") for key in keys if key.startswith(f"{table}.")}
        inside = tables.get(table)
        if own and isinstance(inside, Mapping) and inside.get(switch) == model.model_fields[switch].default:
            # Without a switch among them; any other fault is told by who reads the whole table.
            with suppress(ValidationError):
                model.model_validate({key: inside[key] for key in own if key in inside})


def with_methods(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Execute the files under `[methods]` and add their methods; return the tables with their paths and digests.

    Args:
        tables: of a configuration.
        folder: from which relative paths are taken.

    Raises:
        ConfigError: a file is missing, fails, or is not the one that its digest asks for; or a name is taken.
    """
    found = {}
    for name, source in method_sources(tables).items():
        key = f"methods.{name}"
        file = MethodFile.read(absolute_path(str(folder / user_path(source.file, key)), key), key)
        if source.sha256 not in (None, file.sha256):
            raise ConfigError(f"{key}.sha256", source.sha256, f"{file.path} has {file.sha256}; put the file back")
        add_method(name, file, key)
        found[name] = {"file": str(file.path), "sha256": file.sha256}
    return dict(tables) | ({"methods": found} if found else {})


def method_sources(tables: Mapping[str, Any]) -> dict[str, MethodSource]:
    """Return the entries under `[methods]`; nothing is read.

    Raises:
        ConfigError: an entry is neither a path nor a table with a path.
    """
    try:
        return TypeAdapter(Methods).validate_python(tables.get("methods", {}))
    except ValidationError as error:
        raise config_error(error, Methods, "methods") from None


def parse_config(tables: Mapping[str, Any]) -> Experiment:
    """Check the content of a configuration, and of the tables of every method in it; nothing is executed.

    Raises:
        ConfigError: a key or value is not allowed.
    """
    try:
        config = Experiment.model_validate(dict(tables))
    except ValidationError as error:
        raise config_error(error, Experiment) from None
    for name in dict.fromkeys([config.algorithm, *(key for key in config.settings if key in METHODS)]):
        settings_for(name, config.settings)
    if (needs := config.encoder.name) in WITH_CHECKPOINT and config.encoder.checkpoint is None:
        raise ConfigError(
            "encoder.checkpoint", None, f"encoder {needs!r} needs a directory or a hub name of a checkpoint"
        )
    config = _with_dialog(config)
    if (config.data.public is not None) != (config.privacy.directions == "images"):
        raise ConfigError(
            "data.public", config.data.public, "goes together with privacy.directions = 'images'; set both or none"
        )
    return _placed(config).model_copy(update={"data": _absolute(config.data)})


def check_places(config: Experiment) -> None:
    """Check that the folders and files that a configuration names are there, before what reads them is imported.

    Warns:
        SordinoWarning: the checkpoint is not used.

    Raises:
        SordinoError: one is missing.
    """
    check_data(config.data)
    name, checkpoint = config.encoder.name, config.encoder.checkpoint
    if checkpoint is not None and name in WITH_CHECKPOINT:
        checkpoint_folder(checkpoint)
    elif checkpoint is not None:  # where a command line overrides the name alone, it is left from the file
        names = " or ".join(WITH_CHECKPOINT)
        warnings.warn(
            f"encoder.checkpoint = {checkpoint!r} is not used: encoder.name = {name!r}; for it, set {names}",
            SordinoWarning,
            stacklevel=2,
        )
    if config.privacy.release is not None:
        folder = absolute_path(config.privacy.release, "privacy.release")
        require_folder(folder, "privacy.release", "; give the directory of a run with mechanism 'statistics'")


def resolved(config: Experiment) -> dict[str, Any]:
    """The configuration with every default written out, for the method that runs; keys without a value are absent."""
    tables = config.model_dump(exclude_none=True)
    tables["settings"] = {config.algorithm: asdict(settings_for(config.algorithm, config.settings))}
    del tables["methods"]
    for path, content in kept_methods(config).items():
        tables["methods"] = {config.algorithm: {"file": path, "sha256": hashlib.sha256(content).hexdigest()}}
    return tables


def kept_methods(config: Experiment) -> dict[str, bytes]:
    """Return the file of the method that runs, by its path in the run directory; none if it is installed."""
    file = METHODS[config.algorithm].file
    return {} if file is None else {f"{KEPT_METHODS}/{config.algorithm}.py": file.content}


def _with_dialog(config: Experiment) -> Experiment:
    """The configuration with the settings of the encoder `generative` written out, where it is the one.

    Raises:
        ConfigError: another encoder has them, or the privacy mechanism needs features.
    """
    own, given = config.encoder.name, config.encoder.generative
    if own != "generative":
        if given is not None:
            raise ConfigError(
                "encoder.generative", f"with encoder {own!r}", "set encoder.name = 'generative', or remove it"
            )
        return config
    if config.privacy.mechanism in ("cotangent", "statistics"):
        raise ConfigError(
            "privacy.mechanism",
            config.privacy.mechanism,
            "it works on features of images and class names, and encoder 'generative' has likelihoods instead; use "
            "'dp-sgd' or 'dp-fedavg', or an encoder with features",
        )
    encoder = config.encoder.model_copy(update={"generative": given or GenerativeSettings()})
    return config.model_copy(update={"encoder": encoder})


def _placed(config: Experiment) -> Experiment:
    """The same checkpoint and release from anywhere, as `config.toml` of a run directory may be run again elsewhere."""
    checkpoint, release = config.encoder.checkpoint, config.privacy.release
    if checkpoint is not None and user_path(checkpoint, "encoder.checkpoint").is_dir():  # else it is a name on the hub
        place = str(absolute_path(checkpoint, "encoder.checkpoint"))
        check_values(place, "encoder.checkpoint")
        config = config.model_copy(update={"encoder": config.encoder.model_copy(update={"checkpoint": place})})
    if release is not None:
        place = str(absolute_path(release, "privacy.release"))
        check_values(place, "privacy.release")
        config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"release": place})})
    return config


def _absolute(data: DataSettings) -> DataSettings:
    """The same data from anywhere: a relative folder is one from the working directory."""
    if data.persons is not None:
        data = data.model_copy(update={"persons": str(absolute_path(data.persons, "data.persons"))})
    if data.public is not None:
        folder = str(absolute_path(data.public, "data.public"))
        check_values(folder, "data.public")
        data = data.model_copy(update={"public": folder})
    kind, colon, rest = data.source.partition(":")
    if colon and (kind in ("imagefolder", "table") or user_path(rest, "data.source").exists()):
        source = f"{kind}:{absolute_path(rest, 'data.source')}"
        check_values(source, "data.source")
        return data.model_copy(update={"source": source})
    return data
