"""Read finished run directories, and refuse what is missing or malformed in one line."""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sordino.errors import RunError
from sordino.privacy.ledger import Ledger
from sordino.results import FILE, Accuracy, Count, Summary, complaint

LEDGER = "ledger.json"

T = TypeVar("T")

Label = Annotated[int, Field(ge=-(2**31), lt=2**31)]

_DISTANCES = re.compile(r"round-([0-9]{1,9})\.json")


class _Record(BaseModel):
    # Newer runs may hold more than this page shows; what it shows must be right.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Protocol(_Record):
    """The part of a round's protocol on shares that the page needs.

    Attributes:
        columns: sets of clients to whose means distances were opened; 0 in a round without clustering.
    """

    columns: Count = 0


class Round(_Record):
    """One line of `metrics.jsonl`.

    Attributes:
        round: its number; 0 is before training.
        accuracy: None in a round without evaluation.
        clusters: the number of each client's cluster, negative for none.
        protocol: None if the method has none.
    """

    round: Count
    accuracy: Accuracy | None = None
    clusters: tuple[Label, ...] | None = None
    protocol: Protocol | None = None


class Column(_Record):
    """Distances to the mean of the set S of `members`.

    A value is |S|^2 times the squared distance of one of `clients`, in squared quantization steps. If only ratios were
    revealed, it is also multiplied by a factor of the client's own.
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
    """`distances/round-000010.json`: all distances between reduced prompts that the server saw in a round.

    Attributes:
        step: a quantization step, in the points' units.
        columns: one for each set of clients to whose mean distances were opened.
        round: the number in the file's name.
    """

    step: Annotated[float, Field(gt=0, le=1)]
    columns: tuple[Column, ...]
    round: Count = 0


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: that it was read from.
        summary: its results.
        rounds: in order, each round once.
        config: its configuration.
        config_text: the configuration as TOML.
        audit: the content of `audit.json`; None if the run was not attacked.
        distances: of the last round in which the server saw any.
        prompts: whether each client kept a prompt of its own, or all of them one; None if no prompt was kept.
    """

    directory: Path
    summary: Summary
    rounds: tuple[Round, ...]
    config: dict[str, Any]
    config_text: str
    audit: dict[str, Any] | None = None
    distances: Distances | None = None
    prompts: Literal["personal", "shared"] | None = None

    def ledger(self) -> Ledger | None:
        """Read the run's ledger, which may be large; None if the directory has none.

        Raises:
            RunError: it is malformed, or not the one that the summary names.
        """
        if not (self.directory / LEDGER).exists():
            return None
        text = _text(self.directory, LEDGER)
        named = self.summary.privacy.ledger_digest
        if named and hashlib.sha256(text.encode()).hexdigest() != named:
            raise _malformed(self.directory, LEDGER, "it is not the one whose digest summary.json has")
        try:
            return Ledger.from_json(text)
        except RunError as error:
            raise _malformed(self.directory, LEDGER, str(error)) from None


def read_run(directory: Path) -> Run:
    """Read a finished run directory.

    Raises:
        RunError: the directory or one of its files is missing, unreadable or malformed.
    """
    if not directory.is_dir():
        raise RunError(f"{directory}: no such run directory; give the directory that `sordino run` wrote")
    config_text = _text(directory, "config.toml")
    summary = _parse(directory, FILE, _text(directory, FILE), _summary)
    return Run(
        directory=directory,
        summary=summary,
        rounds=_rounds(directory, summary.clients),
        config=_parse(directory, "config.toml", config_text, tomllib.loads),
        config_text=config_text,
        audit=_audit(directory),
        distances=_distances(directory, summary.clients),
        prompts=_prompts(directory),
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
        raise _malformed(directory, name, complaint(error)) from None
    except (ValueError, RecursionError) as error:
        raise _malformed(directory, name, str(error)) from None


def _malformed(directory: Path, name: str, reason: str) -> RunError:
    return RunError(f"{directory}: {name} is malformed ({reason}); repeat the run, or leave this directory out")


def _printable(text: str) -> bytes:
    """Return JSON text as UTF-8.

    A class name may hold a lone surrogate, if a folder's name is not UTF-8. No page can hold it, so it becomes a
    question mark.
    """
    return json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8", "replace")


def _summary(text: str) -> Summary:
    return Summary.from_json(_printable(text))


def _round(text: str) -> Round:
    # Not pydantic's parser: Python writes NaN and Infinity.
    return Round.model_validate(json.loads(_printable(text)))


def _opened(text: str) -> Distances:
    return Distances.model_validate(json.loads(_printable(text)))


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
    """Read the distances of the last round; the page does not show earlier ones."""
    matches = map(_DISTANCES.fullmatch, _names(directory / "distances"))
    files = [(int(match[1]), match[0]) for match in matches if match]
    if not files:
        return None
    number, file = max(files)
    name = f"distances/{file}"
    distances = _parse(directory, name, _text(directory, name), _opened)
    for column in distances.columns:
        unknown = [client for client in (*column.members, *column.clients) if client >= clients]
        if unknown:
            raise _malformed(directory, name, f"client {unknown[0]} in a federation of {clients}")
    return distances.model_copy(update={"round": number})


def _prompts(directory: Path) -> Literal["personal", "shared"] | None:
    names = _names(directory / "prompts")
    if "shared.safetensors" in names:
        return "shared"
    return "personal" if any(name.startswith("client-") for name in names) else None


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
