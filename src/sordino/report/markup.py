"""The pieces of HTML that every section of the page is made of, and its lists and counts in words."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

Figure = dict[str, Any]  # of plotly.js: {"data": [...], "layout": {...}}

NONE = '<span class="none">n/a</span>'  # the cell of a value that does not exist

_KEYS = 24  # a legend with more marks is cut


def place(identity: str, figure: Figure, description: str) -> str:
    """Return the place and the data of a figure, which page.js draws.

    Args:
        identity: the element's id, unique on the page.
        figure: with a height in pixels in its layout.
        description: what a screen reader says of it, as plain text.
    """
    # Inside <script> only "</script" and "<!--" could end the data; no "<" is left at all.
    data = json.dumps(figure, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="plot" id="{identity}" role="img" aria-label="{escape(description)}" '
        f'style="height:{figure["layout"]["height"]}px"></div>\n'
        f'<script type="application/json" data-figure="{identity}">{data}</script>\n'
    )


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """Return a table, which scrolls inside its own box if it is wide.

    Args:
        caption: as HTML.
        head: the columns' names, as HTML.
        rows: cells as HTML; the first cell of a row names the row.
        label: the table's accessible name, as plain text, unique on the page.
    """
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = (
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">\n<table>\n'
        f"<caption>{caption}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n"
        "</table>\n</div>\n"
    )


def keys(title: str, marks: Sequence[tuple[str, str, str]]) -> str:
    """Return the legend of a figure; nothing if there are no marks.

    Args:
        title: of the legend, as plain text.
        marks: (symbol, color in CSS, name) of each.
    """
    shown = "".join(
        f'<span class="key"><span class="swatch" data-symbol="{mark}" style="color:{color}"></span>'
        f"{escape(name)}</span>\n"
        for mark, color, name in marks[:_KEYS]
    )
    more = f"<span>and {len(marks) - _KEYS} more</span>" if len(marks) > _KEYS else ""
    return f'<div class="legend"><span class="none">{escape(title)}</span>\n{shown}{more}</div>\n' if marks else ""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 client`, `2 clients`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plain(text: str) -> str:
    """Return text that plotly shows as it is, though its labels read tags such as <b> and <a href>."""
    return escape(text, quote=False)
