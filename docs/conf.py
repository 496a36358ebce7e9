"""The site of these documents: `make docs` builds it into docs/_build, with every warning as an error.

The pages are plain Markdown, as a code host shows it. What the site needs beyond that is made here: its navigation is
the lists of links in index.md, one part for each heading.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pygments.lexers.special import TextLexer
from sphinx.errors import SphinxError

import sordino

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "Sordino"
author = "Sordino maintainers"
copyright = author
version = release = sordino.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
root_doc = "index"
nitpicky = True
nitpick_ignore_regex = [("py:(class|obj)", ".*")]  # types in signatures, most of which have no entry here

highlight_language = "none"  # a block without a language is output
myst_heading_anchors = 4  # links to headings, as a code host makes them


default_role = "code"  # docstrings have `names` as Markdown has them
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
MADE = {f"sordino.{name}" for name in ("Experiment", "Plan", "Comparison", "SavedPrompt", "results.Summary")}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"Sordino {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_permalinks_icon = "#"


def navigation(index: str) -> str:
    """Return a hidden toctree for each list of links in index.md, with its heading as caption."""
    trees = []
    for part in index.split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        pages = re.findall(r"^- \[([^]]+)\]\(([\w-]+)\.md\)", body, re.MULTILINE)
        if pages:
            lines = [":hidden:", f":caption: {heading}", "", *(f"{title} <{page}>" for title, page in pages)]
            trees.append("\n".join(["```{toctree}", *lines, "```"]))
    return "\n\n".join(trees)


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the navigation to the index, when Sphinx reads it."""
    if docname == root_doc:
        source[0] += "\n\n" + navigation(source[0])


def foreign(page: str) -> list[str]:
    """Return the addresses of other origins that a browser would load with an HTML page; links are none of them."""
    tags = re.findall(r"<(?:link|script|img|iframe|source|video|audio)\b[^>]*>", page)
    addresses = (address for tag in tags for address in re.findall(r"""(?:href|src|srcset)=["']?([^"' >]+)""", tag))
    return [address for address in addresses if re.match(r"(?:\w+:)?//", address)]


def check_origins(app: Sphinx, exception: Exception | None) -> None:
    """End a build whose pages or style sheets would load anything from elsewhere."""
    if exception is not None:
        return
    for file in Path(app.outdir).rglob("*.html"):
        if found := foreign(file.read_text(encoding="utf-8")):
            raise SphinxError(f"{file.name} loads {found[0]}; the site may load nothing from another origin")
    for file in Path(app.outdir).rglob("*.css"):
        if found := re.findall(r"""(?:url\(|@import)\s*["']?((?:\w+:)?//[^"')]+)""", file.read_text(encoding="utf-8")):
            raise SphinxError(f"{file.name} loads {found[0]}; the site may load nothing from another origin")


def mark_code(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Have indented blocks of docstrings read as code, as in Markdown; a section such as `Args:` has no empty line."""
    for at in range(len(lines) - 1, 0, -1):
        starts = lines[at].startswith("    ") and not lines[at - 1].strip()
        before = next((line for line in reversed(lines[:at]) if line.strip()), " ")
        if starts and not before.startswith(" "):
            lines[at:at] = ["::", ""]


def hide_constructor(app: Sphinx, what: str, name: str, *rest: object) -> tuple[str, None] | None:
    """Leave out the arguments of classes that functions make, not users; their docstrings have the attributes."""
    return ("", None) if what == "class" and name in MADE else None


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon, which knows sections
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-signature", hide_constructor)
    app.connect("build-finished", check_origins)
    app.add_lexer("csv", TextLexer)  # which Pygments does not know; a code host does
