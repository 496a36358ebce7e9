"""Read finished run directories, and refuse what is missing or malformed in one line."""

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sordino.errors import RunError

T = TypeVar("T")
Measure = Literal["local", "neighbor", "overall", "novel", "domain"]

Fraction = Annotated[float, Field(ge=0, le=1)]  # refuses NaN too
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Label = Annotated[int, Field(ge=-(2**31), lt=2**31)]

_DISTANCES = re.compile(r"round-([0-9]{1,9})\.json")


class _Record(BaseModel):
    # Newer runs may hold more than this page shows; what it shows must be right.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Accuracy(_Record):
    """Fractions in [0, 1]; None where a measure does not apply."""

    local: Fraction | None = None
    neighbor: Fraction | None = None
    overall: Fraction | None = None
    novel: Fraction | None = None
    domain: Fraction | None = None

    def of(self, measure: Measure) -> float | None:
        value: float | None = getattr(self, measure)
        return value


class Client(_Record):
    """One client's accuracy, and what it holds."""

    client: Count
    local: Fraction | None = None
    neighbor: Fraction | None = None
    overall: Fraction | None = None
    attack_success: Fraction | None = None
    examples: Count = 0
    classes: tuple[str, ...] = ()
    domains: tuple[str, ...] | None = None

    def of(self, measure: Measure) -> float | None:
        value: float | None = getattr(self, measure, None)  # novel and domain are not measured by client
        return value


class Privacy(_Record):
    """What was spent, and the statement in words that goes with it."""

    private: bool
    simulated: bool = False
    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    statement: str


class Communication(_Record):
    """Bytes that crossed the wire."""

    upload_bytes_per_client_round: Count
    broadcast_bytes_per_client_round: Count
    total_upload_bytes: Count
    total_broadcast_bytes: Count


class Durations(_Record):
    """Seconds; `total` is what the page shows."""

    encode: Seconds | None = None
    train: Seconds | None = None
    evaluate: Seconds | None = None
    total: Seconds


class Skipped(_Record):
    """An image that was passed over."""

    name: str
    reason: str


class Images(_Record):
    """How many images were encoded, came from the cache, or were skipped."""

    encoded: Count = 0
    cached: Count = 0
    skipped: tuple[Skipped, ...] = ()


class Summary(_Record):
    """`summary.json`."""

    algorithm: str
    encoder: str
    dataset: str
    clients: Count
    rounds: Count
    seed: int
    accuracy: Accuracy
    attack_success: Fraction | None = None
    per_client: tuple[Client, ...]
    privacy: Privacy
    communication: Communication
    seconds: Durations
    images: Images = Images()
    version: str = ""


class Protocol(_Record):
    """What a round's protocol on shares came to."""

    columns: Count = 0  # sets of clients to whose means distances were opened; 0 in rounds without clustering


class Round(_Record):
    """One line of `metrics.jsonl`; `accuracy` is None on rounds without evaluation."""

    round: Count
    accuracy: Accuracy | None = None
    clusters: tuple[Label, ...] | None = None  # the number of each client's cluster, negative for none
    protocol: Protocol | None = None


class Column(_Record):
    """Distances to the mean of the set S of `members`: |S|^2 times the squared distance of each of `clients`.

    They are in squared quantization steps, and times a factor of the client's own where only ratios were revealed.
    """

    members: tuple[Count, ...] = Field(min_length=1)
    clients: tuple[Count, ...]
    values: tuple[Annotated[int, Field(ge=0, lt=2**64)], ...]

    @model_validator(mode="after")
    def _a_value_each(self) -> Self:
        if len(self.values) != len(self.clients):
            raise ValueError(f"{len(self.values)} values for {len(self.clients)} clients")
        return self


class Distances(_Record):
    """`distances/round-000010.json`: all distances between reduced prompts that the server saw in a round."""

    step: Annotated[float, Field(gt=0, le=1)]  # a quantization step, in the points' units
    columns: tuple[Column, ...]
    round: Count = 0


@dataclass(frozen=True)
class Run:
    """A finished run, as its directory tells it."""

    directory: Path
    summary: Summary
    rounds: tuple[Round, ...]  # in order of the round, each round once
    config: dict[str, Any]
    config_text: str
    audit: dict[str, Any] | None = None  # what `sordino audit` found, where the run was attacked
    distances: Distances | None = None  # those of the last round in which the server saw any


def read_run(directory: Path) -> Run:
    """Read a finished run directory.

    Raises:
        RunError: the directory or one of its files is missing, unreadable or malformed.
    """
    if not directory.is_dir():
        raise RunError(f"{directory}: no such run directory; give the directory that `sordino run` wrote")
    config_text = _text(directory, "config.toml")
    summary = _parse(directory, "summary.json", _text(directory, "summary.json"), _summary)
    return Run(
        directory=directory,
        summary=summary,
        rounds=_rounds(directory, summary.clients),
        config=_parse(directory, "config.toml", config_text, tomllib.loads),
        config_text=config_text,
        audit=_audit(directory),
        distances=_distances(directory, summary.clients),
    )


def _audit(directory: Path) -> dict[str, Any] | None:
    if not (directory / "audit.json").exists():
        return None
    return _parse(directory, "audit.json", _text(directory, "audit.json"), _json_object)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _text(directory: Path, name: str) -> str:
    try:
        return (directory / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(
            f"{directory}: {name} is missing; finish the run with --resume, or leave this directory out"
        ) from None
    except OSError as error:
        raise RunError(
            f"{directory}: {name} cannot be read ({error.strerror}); mend its permissions, or leave this directory out"
        ) from None
    except UnicodeDecodeError:
        raise _malformed(directory, name, "it is not UTF-8 text") from None


def _parse(directory: Path, name: str, text: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(text)
    except ValidationError as error:  # a ValueError too, so it comes first
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise _malformed(directory, name, f"{place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _malformed(directory, name, str(error)) from None


def _malformed(directory: Path, name: str, reason: str) -> RunError:
    return RunError(f"{directory}: {name} is malformed ({reason}); repeat the run, or leave this directory out")


def _json(text: str) -> Any:
    # json.loads and not pydantic's parser: Python writes NaN and Infinity. And a class name may hold a lone surrogate
    # (a folder whose name is not UTF-8), which no page can hold: it becomes a question mark.
    return json.loads(json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8", "replace"))


def _summary(text: str) -> Summary:
    return Summary.model_validate(_json(text))


def _round(text: str) -> Round:
    return Round.model_validate(_json(text))


def _rounds(directory: Path, clients: int) -> tuple[Round, ...]:
    name = "metrics.jsonl"
    by_round: dict[int, Round] = {}
    # Not splitlines(), which also splits at characters that may stand inside a JSON string.
    for number, line in enumerate(_text(directory, name).split("\n"), start=1):
        if line.strip():
            entry = _parse(directory, f"{name} line {number}", line, _round)
            if entry.clusters is not None and len(entry.clusters) != clients:
                reason = f"clusters: {len(entry.clusters)} labels for {clients} clients"
                raise _malformed(directory, f"{name} line {number}", reason)
            by_round[entry.round] = entry  # a resumed run may have repeated a round; its last word counts
    if not by_round:
        raise _malformed(directory, name, "it holds no round")
    return tuple(by_round[number] for number in sorted(by_round))


def _distances(directory: Path, clients: int) -> Distances | None:
    """The last round's; earlier ones are not on the page, and not read."""
    numbered = [
        (int(found[1]), found[0]) for found in map(_DISTANCES.fullmatch, _names(directory / "distances")) if found
    ]
    if not numbered:
        return None
    number, file = max(numbered)
    name = f"distances/{file}"
    entry = _parse(directory, name, _text(directory, name), lambda text: Distances.model_validate(_json(text)))
    for column in entry.columns:
        unknown = [client for client in (*column.members, *column.clients) if client >= clients]
        if unknown:
            raise _malformed(directory, name, f"client {unknown[0]} in a federation of {clients}")
    return entry.model_copy(update={"round": number})


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
