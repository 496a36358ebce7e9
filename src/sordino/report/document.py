"""Documents of words and tables: plain data to a page in the report's look that prints well.

A document is plain data, so that it can be written as JSON and signed. All its text is escaped here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, TypedDict

from sordino.report.frame import frame
from sordino.report.markup import html_table, place


class Table(TypedDict):
    """Rows of text; the first cell of a row names the row."""

    caption: str
    head: list[str]
    rows: list[list[str]]


class Block(TypedDict, total=False):
    """One of: a paragraph, one that stands out, a list, a table, or a figure of plotly.

    A figure has the keys `id`, `figure` and `words`, as `sordino.report.markup.place` takes them.
    """

    text: str
    warning: str
    items: list[str]
    table: Table
    figure: dict[str, Any]


class Section(TypedDict):
    """A heading, and what stands under it."""

    title: str
    blocks: list[Block]


class Document(TypedDict):
    """A page in plain data.

    The banner is its largest text; where `exposed` is true it is a warning, in the color of one.
    """

    title: str
    subtitle: str
    banner: str
    exposed: bool
    lead: list[str]
    sections: list[Section]
    footer: str


def document_page(document: Document, after: str = "") -> str:
    """Return a document as a whole page.

    Args:
        document: in plain data.
        after: HTML that is put behind the document, which nobody sees.
    """
    blocks = [block for section in document["sections"] for block in section["blocks"]]
    sections = "".join(
        f'<section aria-labelledby="part-{number}"><h2 id="part-{number}">{escape(section["title"])}</h2>\n'
        f"{''.join(map(_block, section['blocks']))}</section>\n"
        for number, section in enumerate(document["sections"], 1)
    )
    tone = " exposed" if document["exposed"] else ""
    body = (
        f'<main class="document">\n<header>\n<h1>{escape(document["title"])}</h1>\n'
        f'<p class="subtitle">{escape(document["subtitle"])}</p>\n'
        f'<p class="banner{tone}">{escape(document["banner"])}</p>\n'
        f"{_paragraphs(document['lead'])}</header>\n{sections}</main>\n"
        f'<footer class="document"><p>{escape(document["footer"])}</p></footer>\n{after}'
    )
    return frame(document["title"], body, any("figure" in block for block in blocks), ("page.css", "document.css"))


def _block(block: Block) -> str:
    if "text" in block:
        return _paragraphs([block["text"]])
    if "warning" in block:
        return f'<p class="exposed"><strong>{escape(block["warning"])}</strong></p>\n'
    if "items" in block:
        return "<ul>\n" + "".join(f"<li>{escape(item)}</li>\n" for item in block["items"]) + "</ul>\n"
    if "table" in block:
        table = block["table"]
        cells = [[_cell(cell) for cell in row] for row in table["rows"]]
        return html_table(escape(table["caption"]), list(map(escape, table["head"])), cells, table["caption"])
    figure = block["figure"]
    return f"<figure>\n{place(figure['id'], figure['figure'], figure['words'])}</figure>\n"


def _cell(text: str) -> str:
    """Return a cell's text as HTML, each of its lines on its own."""
    return "<br>".join(escape(line) for line in text.split("\n"))


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>\n" for text in texts)
