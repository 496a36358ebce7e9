"""The package's own errors. Each message is one line that names the place, the value, and the remedy.

The command line prints such a message without a traceback and exits with code 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo


LONGEST = 300  # characters of a value in a message

# Optional dependencies: the modules that an extra of the package installs, imported only after
# `require_extra`. The extras `medical` and `heif` are not here: without them a file is passed over
# with a message of its own.
EXTRAS = {
    "flare": ("nvflare",),
    "flower": ("flwr",),
    "hub": ("datasets",),
    "mpc": ("cma", "grpc", "numba"),
    "openssf": ("model_signing", "OpenSSL"),
    "serve": (
        "alembic",
        "fastapi",
        "limits",
        "prometheus_client",
        "psycopg",
        "python_multipart",
        "sqlalchemy",
        "uvicorn",
    ),
    "tracking": ("mlflow", "tensorboard"),
}


class SordinoError(Exception):
    """An error that the user can fix; its message is one line."""


class ConfigError(SordinoError):
    """A setting that is unknown, malformed, or out of range."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{_printable(key)} = {shortened(value)}: {allowed}")
        self.key, self.value, self.allowed = key, value, allowed


class DataError(SordinoError):
    """Data that is missing, unreadable, or too little for the request."""


class EncoderError(SordinoError):
    """An encoder that is not ready, or that lacks a capability which a method needs."""


class RunError(SordinoError):
    """A run directory that cannot be written, read, or resumed."""


class MissingExtra(SordinoError, ImportError):
    """An optional dependency that is needed and not installed."""


class PromptError(SordinoError):
    """A saved prompt that is missing, damaged, or of another kind than is asked for."""


class StatementError(SordinoError):
    """A privacy statement that is damaged, was changed, or was signed by somebody else than was expected."""


class SordinoWarning(UserWarning):
    """A warning about something that was left out and may matter."""


def missing_modules(extra: str) -> list[str]:
    """Return the modules of an extra that are not installed; nothing is imported."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def require_extra(extra: str, purpose: str, *modules: str) -> None:
    """Check that an extra's modules are installed, before they are imported.

    Args:
        extra: a key of `EXTRAS`.
        purpose: the part that needs it, as the subject of the message.
        modules: of the extra, those that are needed; by default all.

    Raises:
        MissingExtra: a module is not installed; the message says how to install the extra.
    """
    missing = [module for module in missing_modules(extra) if module in (modules or EXTRAS[extra])]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        shortage = f"{' and '.join(missing)}, which {verb} not installed"
        raise MissingExtra(f"{purpose} needs {shortage}: pip install 'sordino[{extra}]'")


def config_error(error: ValidationError, checked: Any, prefix: str = "") -> ConfigError:
    """Convert an error of a pydantic validation to one line that names key, value and the allowed values.

    Args:
        error: of the validation.
        checked: the type that was validated, a pydantic model or dataclass; its keys are named in place of a wrong one.
        prefix: the key of the whole table.
    """
    errors = error.errors()
    # A key that is misspelled is the cause where another one is missing.
    first = next((each for each in errors if each["type"] in _UNKNOWN_KEY), errors[0])
    path, choice = _without_choice(checked, first["loc"])
    if choice is not None:  # a value of any of several types has an error for each; the one that got furthest is meant
        of_value = [each for each in errors if each["loc"][:choice] == first["loc"][:choice]]
        first = max(of_value, key=lambda each: len(each["loc"]))
        path, _ = _without_choice(checked, first["loc"])
        alternatives = [_plain(each["msg"]) for each in of_value if len(each["loc"]) == len(first["loc"])]
    else:
        alternatives = [_plain(first["msg"])]
    if path[-1:] == ("[key]",) and path[-2:-1] == (first["input"],):  # the name in a table, not its value, is refused
        path = path[:-1]
    key = ".".join(str(part) for part in (prefix, *path) if part != "")
    if first["type"] in _UNKNOWN_KEY:
        *tables, wrong = path
        known = list(_fields(checked, tables))
        listed = f"; choose from {', '.join(known)}" if known else ""
        allowed = f"no such key{nearest(str(wrong), known) or listed}"
    elif first["type"] in _MISSING_KEY:  # its input is the whole table around it
        return ConfigError(key, None, "is needed; give it a value")
    else:
        others = (other.removeprefix("input should be ") for other in alternatives[1:])
        allowed = " or ".join(dict.fromkeys((alternatives[0], *others)))
    return ConfigError(key, first["input"], allowed)


def _plain(message: str) -> str:
    """Return pydantic's message in the words of a TOML file, and as the end of a line."""
    message = message.removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message[:1].lower() + message[1:]


def _without_choice(checked: Any, place: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], int | None]:
    """Return an error's place without what is no key of it, and where that stands; None if all are keys.

    Of a value that may be of several types, pydantic puts the type's name in the place, such as `list[str]`. A user's
    own key may look alike, so the types say which it is.
    """
    for at in range(1, len(place)):
        *tables, last = place[:at]
        field = _fields(checked, tables).get(str(last))
        if field is not None and len(_types(field.annotation)) > 1:
            return (*place[:at], *place[at + 1 :]), at
    return place, None


def _types(annotation: Any) -> list[Any]:
    """Return the types of a union but None; of any other annotation itself."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for kind in get_args(annotation) if kind is not NoneType]
    return [annotation]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'?" with the known name that is most like a wrong one in any case, or ""."""
    by_lower = {each.lower(): each for each in known}
    found = get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.7)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


def _fields(table: Any, path: Iterable[str | int]) -> Mapping[str, FieldInfo]:
    """Return the fields of a pydantic model or dataclass, or of the table at a path in it; empty if there is none."""
    for part in path:
        if get_origin(table) is dict:  # tables under names that are the user's
            annotation = get_args(table)[1]
        else:
            field = _fields(table, ()).get(str(part))
            annotation = field.annotation if field else None
        candidates = (annotation, *get_args(annotation))  # as in `Table | None`
        table = next((kind for kind in candidates if _is_table(kind)), None)
    found: Mapping[str, FieldInfo] = getattr(table, "__pydantic_fields__", {})
    return found


def _is_table(kind: Any) -> bool:
    return hasattr(kind, "__pydantic_fields__") or get_origin(kind) is dict


def _printable(key: str) -> str:
    """Return a key as it is, or quoted if it would not print as one line."""
    return key if key.isprintable() else shortened(key)


def cause(error: BaseException) -> str:
    """Return an error's kind and message on one line; the `repr` of one that could not decode has all of its bytes."""
    message = _printable(" ".join(str(error).split()))
    return f"{type(error).__name__}: {message[:LONGEST]}"


def shortened(value: object) -> str:
    """Quote a value for a message of one line, without its middle if it would fill a screen."""
    try:
        text = ascii(value) if isinstance(value, str) and not _is_text(value) else repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


def _is_text(value: str) -> bool:
    """Return true if a string is Unicode text. The name of a file may hold bytes that are not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_UNKNOWN_KEY = {"extra_forbidden", "unexpected_keyword_argument"}
_MISSING_KEY = {"missing", "missing_argument"}
_WORDS = {
    "valid dictionary or instance of MethodSource": "valid path or table",
    "valid dictionary": "valid table",
    "valid tuple": "valid list",
}
