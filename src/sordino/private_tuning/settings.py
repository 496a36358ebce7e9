"""Configuration of `sordino tune-private`: a TOML file and `--set` overrides, checked and resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sordino.errors import ConfigError, DataError, config_error
from sordino.experiments.toml_tables import check_values, read_tables
from sordino.files import absolute_path
from sordino.private_tuning.search_settings import Search
from sordino.tasks import places
from sordino.tasks.published import how_to_get
from sordino.tasks.settings import DataSettings

LONGEST = 64  # default of task.longest: tokens of a sentence
TEXT_NEEDS = ("train", "test", "label_names", "descriptions")
# Keys of a task of images that `[data]` has too, beside its source.
OF_DATA = ("image_column", "label_column", "person_column", "persons", "person_level", "class_names", "gray_range")


class TaskSettings(BaseModel):
    """The `[task]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["text", "images"] = Field(description="examples to classify: sentences or pictures")
    train: str | None = Field(default=None, description="text: a file with the header 'sentence<TAB>label'")
    test: str | None = Field(default=None, description="text: another such file, for the final accuracy")
    label_names: list[str] | None = Field(
        default=None, min_length=2, description="text: the classes' names; a label is an index into them"
    )
    descriptions: list[str] | None = Field(
        default=None,
        description="text: descriptions that sentences are compared with, one a class, e.g. 'it was great.'",
    )
    longest: int | None = Field(
        default=None,
        ge=4,
        description="text: tokens of a sentence with prompt, start and end, the rest is cut off; absent: 64",
    )
    source: str | None = Field(
        default=None,
        pattern="^(imagefolder|table):.+",
        description="images: 'imagefolder:PATH' (class folders, or domain folders of class folders) or 'table:PATH' (a "
        "CSV, TSV or Parquet file with a row a picture)",
    )
    image_column: str | None = Field(default=None, description="images: as data.image_column")
    label_column: str | None = Field(default=None, description="images: as data.label_column")
    person_column: str | None = Field(
        default=None,
        description="images: column that says whose each picture is; absent: 'person' or 'patient' where there is one",
    )
    persons: str | None = Field(
        default=None, description="images: CSV file with the columns file and person, which says whose each picture is"
    )
    person_level: int | None = Field(
        default=None, ge=1, description="images: level of the folders that are persons, 1 directly above the pictures"
    )
    class_names: list[str] | dict[str, str] | None = Field(
        default=None, description="images: names for labels that are numbers or codes, as data.class_names"
    )
    gray_range: list[float] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="images: values of black and white in gray pictures of more than 8 bits; absent: as each file says",
    )
    shots: int = Field(default=16, ge=1, description="training examples a class, drawn from the seed")
    test_limit: int | None = Field(default=None, ge=1, description="test examples a class, at most; absent: all")


class PromptSettings(BaseModel):
    """The `[prompt]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    length: int = Field(default=4, ge=1, description="M, tokens of the prompt; each costs bytes in every sentence")
    initial: str = Field(min_length=1, description="where the search starts; cut or repeated to `length` tokens")


class SearchSettings(BaseModel):
    """The `[search]` table: `search.Search` without its seed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    width: int = Field(default=Search.width, ge=1, description="width of z, which CMA-ES searches")
    population: int = Field(default=Search.population, ge=4, le=100_000, description="candidates a generation")
    generations: int = Field(
        default=Search.generations, ge=0, description="number of generations; 0 keeps the initial prompt"
    )
    deviation: float = Field(
        default=Search.deviation,
        gt=0,
        allow_inf_nan=False,
        description="standard deviation of z's entries at the start",
    )
    scale: float = Field(
        default=Search.scale,
        gt=0,
        allow_inf_nan=False,
        description="standard deviation of the prompt's entries per unit of z's entries",
    )
    keep_norms: bool = Field(
        default=Search.keep_norms,
        description="give each token of a prompt the norm that it has in the initial one, which keeps it in the ranges "
        "that a tower on shares is calibrated for",
    )

    def search(self, seed: int) -> Search:
        """Return the settings for `search.tune`."""
        return Search(**self.model_dump(), seed=seed)


class ModelSettings(BaseModel):
    """The `[model]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tower: str | None = Field(
        default=None, description="with --clear: file of the private tower; absent: the bundled one"
    )
    embeddings: str | None = Field(
        default=None,
        description="folder of the checkpoint whose tokenizer and embeddings the owner uses; absent: the bundled one",
    )


class SessionSettings(BaseModel):
    """The `[session]` table: addresses and credentials for the servers. Not used with --clear."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    servers: list[str] | None = Field(default=None, description="the two servers, each 'host:port'")
    certificates: str | None = Field(default=None, description="folder of the owner's certificates")
    timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False, description="seconds to wait for an answer")


class PrivateTuning(BaseModel):
    """A whole configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # CMA-ES takes seed + 1, in 32 bits.
    seed: int = Field(default=0, ge=0, le=2**32 - 2, description="decides the split, the projection and the candidates")
    task: TaskSettings
    prompt: PromptSettings
    search: SearchSettings = SearchSettings()
    model: ModelSettings = ModelSettings()
    session: SessionSettings = SessionSettings()


def load_private_config(path: Path, overrides: Sequence[str] = ()) -> PrivateTuning:
    """Read a TOML file and apply `key=value` overrides. Relative paths start at the working directory.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value is not allowed.
    """
    return parse_private_config(read_tables(path, overrides))


def parse_private_config(tables: Mapping[str, Any]) -> PrivateTuning:
    """Check the content of a configuration.

    Raises:
        ConfigError: a key or value is not allowed.
    """
    try:
        config = PrivateTuning.model_validate(dict(tables))
    except ValidationError as error:
        raise config_error(error, PrivateTuning) from None
    _check(config)
    given = {key: value for key in ("train", "test", "persons") if (value := getattr(config.task, key)) is not None}
    task = {key: str(absolute_path(value, f"task.{key}")) for key, value in given.items()}
    if config.task.source is not None:
        kind, _, place = config.task.source.partition(":")
        task["source"] = f"{kind}:{absolute_path(place, 'task.source')}"
    check_values({"task": task})
    return config.model_copy(update={"task": config.task.model_copy(update=task)})


def check_places(config: PrivateTuning) -> None:
    """Check that the folders and files that a configuration names are there, before what reads them is imported.

    Raises:
        SordinoError: one is missing.
    """
    for key in ("train", "test"):
        file = getattr(config.task, key)
        if file is not None and not Path(file).exists():
            raise ConfigError(f"task.{key}", file, no_sentences(Path(file)))
    if config.task.source is not None:
        with task_keys_named():
            places.check_places(data_of(config.task))


def data_of(task: TaskSettings) -> DataSettings:
    """Return the settings of a task of images by which all commands read pictures.

    Raises:
        ConfigError: they do not fit each other.
    """
    values = {key: getattr(task, key) for key in OF_DATA}
    try:
        return DataSettings(source=str(task.source), **values)
    except ValidationError as error:
        raised = config_error(error, DataSettings, "task")
        if raised.key != "task":
            raise raised from None
        # Keys that do not fit each other; the message begins with the first of them.
        key = next((key for key in OF_DATA if raised.allowed.startswith(key)), "source")
        raise ConfigError(f"task.{key}", getattr(task, key), raised.allowed) from None


@contextmanager
def task_keys_named() -> Iterator[None]:
    """Let errors in reading pictures name keys of `[task]` in place of those of `[data]`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(in_task_keys(error.key), error.value, in_task_keys(error.allowed)) from error
    except DataError as error:
        raise DataError(in_task_keys(str(error))) from error


def in_task_keys(text: str) -> str:
    """Return a message about a key of `[data]` as one about the same key of `[task]`."""
    return re.sub(rf"\bdata\.(source|{'|'.join(OF_DATA)})\b", r"task.\1", text)


def no_sentences(file: Path) -> str:
    """Return what to do about a file of sentences that is missing."""
    return f"no such file; give one with the header 'sentence<TAB>label'{how_to_get(file)}"


def _check(config: PrivateTuning) -> None:
    """Check constraints between keys."""
    task = config.task
    needed = TEXT_NEEDS if task.kind == "text" else ("source",)
    of_images = ("source", *OF_DATA)
    for key in (*TEXT_NEEDS, "longest", *of_images):
        value = getattr(task, key)
        if value is not None and (key in of_images) == (task.kind == "text"):
            raise ConfigError(f"task.{key}", value, f"does not apply to kind {task.kind!r}; remove it")
        if value is None and key in needed:
            raise ConfigError(f"task.{key}", None, f"is needed with kind {task.kind!r}")
    if task.kind == "images":
        data_of(task)
    if task.kind == "images" and config.model.embeddings is not None:
        raise ConfigError("model.embeddings", config.model.embeddings, "images go with the bundled ones; remove it")
    if task.kind == "text":
        _check_values(task, config.prompt.length)
    servers = config.session.servers
    if servers is not None and not (len(servers) == 2 and all(is_address(server) for server in servers)):
        raise ConfigError("session.servers", servers, "must be two, each as 'host:port'")


def _check_values(task: TaskSettings, length: int) -> None:
    names, descriptions = task.label_names or [], task.descriptions or []
    for key, texts in (("label_names", names), ("descriptions", descriptions)):
        if any(not text.strip() for text in texts):
            raise ConfigError(f"task.{key}", texts, "must not be empty texts")
    if len(descriptions) != len(names):
        raise ConfigError("task.descriptions", descriptions, f"must be as many as task.label_names: {len(names)}")
    least = length + 3  # with start, end and one token of the sentence
    if longest_of(task) < least:
        raise ConfigError("task.longest", task.longest, f"must be at least {least} with a prompt of {length} tokens")


def longest_of(task: TaskSettings) -> int:
    """Return the most tokens of a sentence."""
    return LONGEST if task.longest is None else task.longest


def is_address(text: str, least_port: int = 1) -> bool:
    """Return true if a text is HOST:PORT."""
    host, _, port = text.rpartition(":")
    plain = bool(host) and not any(mark.isspace() or mark in "/," for mark in host)
    return plain and port.isdecimal() and least_port <= int(port) < 65536
