"""A method in a file that a user names: read once, run as a module of its own, known by its digest.

Running the file executes it. So nothing here opens a file by itself: its path comes from a command line, from a
configuration that a command line names, or from Python. A path that a run directory mentions is never run.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType, TracebackType

from sordino.errors import ConfigError, DataError
from sordino.files import read_regular

MAX_BYTES = 1 << 20  # of a file
ENDING = ".py"


@dataclass(frozen=True)
class MethodFile:
    """The file of a method, as it was when it was read.

    Attributes:
        path: where it was.
        content: what runs, and what a run directory keeps.
    """

    path: Path
    content: bytes = field(repr=False)

    @classmethod
    def read(cls, path: Path, key: str) -> MethodFile:
        """Read a file; nothing is executed.

        Args:
            path: of the file.
            key: of the configuration or the command line that names it, for messages.

        Raises:
            ConfigError: it is missing, cannot be read, or is no Python file.
        """
        if path.suffix != ENDING:
            raise ConfigError(key, str(path), f"give a Python file, NAME{ENDING}")
        try:
            return cls(path, read_regular(path, MAX_BYTES))
        except FileNotFoundError:
            remedy = "no such file; `sordino methods new NAME --from dp-fpl` writes one to start from"
            raise ConfigError(key, str(path), remedy) from None
        except (OSError, DataError) as error:
            raise ConfigError(key, str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None

    @cached_property
    def sha256(self) -> str:
        """The digest of the content, in hex."""
        return hashlib.sha256(self.content).hexdigest()

    def run(self, key: str) -> ModuleType:
        """Execute the content that was read, and return it as a module.

        The module's name follows from the content, because simulated noise is keyed by it: two versions of a file must
        not share noise.

        Raises:
            ConfigError: it is not Python, or it fails; the message names the line.
        """
        name = f"sordino_method_{self.sha256[:32]}"
        module = ModuleType(name)
        module.__file__ = str(self.path)
        sys.modules[name] = module  # dataclasses look up their module here
        try:
            exec(compile(self.content, str(self.path), "exec", dont_inherit=True), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise ConfigError(key, str(self.path), self._failure(error)) from None
        return module

    def _failure(self, error: BaseException) -> str:
        """Return an error of the file in a line: the number of the file's line, and what Python says."""
        reason = " ".join(str(error).split())
        if isinstance(error, SyntaxError) and error.filename in (None, str(self.path)):
            return f"not valid Python, line {error.lineno}: {error.msg}"
        if isinstance(error, ValueError) and "null bytes" in reason:
            return f"not valid Python: {reason}"
        numbers = _lines(error.__traceback__, str(self.path))
        where = f", in line {numbers[-1]}" if numbers else ""
        return f"fails when it is imported{where}: {type(error).__name__}: {reason}"


def method_name(path: Path, key: str = "--method") -> str:
    """Return the name under which a method in a file runs: that of the file, with hyphens for underscores.

    Raises:
        ConfigError: the file's name cannot be a method's.
    """
    name = path.stem.replace("_", "-")
    if path.suffix != ENDING:
        raise ConfigError(key, str(path), f"give a Python file, NAME{ENDING}")
    if not is_name(name):
        remedy = "rename the file to lower-case letters, digits, hyphens and underscores, or name it under [methods]"
        raise ConfigError(key, str(path), remedy)
    return name


def is_name(name: str) -> bool:
    """Return whether a method may have this name."""
    return re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) is not None


def _lines(traceback: TracebackType | None, file: str) -> list[int]:
    """Return the numbers of a file's lines in a traceback, outermost first."""
    numbers = []
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            numbers.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    return numbers
