"""The frame that all pages of Sordino share: head, styles, and the scripts of those that have figures."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files


def frame(title: str, body: str, figures: bool = True, styles: Sequence[str] = ("page.css",)) -> str:
    """Return a whole page, which holds its styles, scripts and data, and refers to nothing outside itself.

    Args:
        title: as plain text.
        body: main part and footer, as HTML.
        figures: whether it has places for figures, which need plotly and page.js; without, no script can run in it.
        styles: style sheets of this folder, a later one over an earlier one.
    """
    scripts = ""
    if figures:
        from plotly.offline import get_plotlyjs  # 5 MB of script, and a slow import

        scripts = f"<script>{get_plotlyjs()}</script>\n<script>\n{asset('page.js')}</script>\n"
    policy = "default-src 'none'; " + ("script-src 'unsafe-inline'; " if figures else "")
    policy += "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{"".join(map(asset, styles))}</style>
</head>
<body>
{body}{scripts}</body>
</html>
"""


def asset(name: str) -> str:
    """Return a text file of this folder."""
    return (files("sordino.report") / name).read_text(encoding="utf-8")
