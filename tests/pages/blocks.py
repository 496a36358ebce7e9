"""Fenced blocks of the documents, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


@dataclass(frozen=True)
class Block:
    """A fenced block: its page as `docs/x.md`, its language, "" for output that is shown, and its text."""

    page: str
    language: str
    text: str

    @property
    def first(self) -> str:
        """The start of its first line, which tells it from others of its page."""
        return self.text.strip().splitlines()[0][:50]


@cache
def blocks(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page in their order, perhaps of one language alone; also those in lists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^( *)```([^\n`]*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    whole = [
        Block(page, kind.strip(), re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)) for indent, kind, body in found
    ]
    return [block for block in whole if language is None or block.language == language]


def lines(block: Block) -> list[list[str]]:
    """The words of every command of a block, without comments; one that goes on in the next line is one."""
    joined = block.text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in joined]
    return [words[:-1] if words[-1] == "&" else words for words in found if words]


def commands(page: str) -> list[list[str]]:
    """The arguments of every `sordino` command of a page."""
    every = [words for block in blocks(page, "sh") for words in lines(block)]
    return [words[1:] for words in every if Path(words[0]).name == "sordino"]


def shown(page: str) -> list[str]:
    """The output that a page shows, each block with single spaces."""
    return [" ".join(block.text.split()) for block in blocks(page, "")]
