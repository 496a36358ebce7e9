"""The section on accuracy by client: a heat map, and its quartiles."""

from collections.abc import Sequence
from html import escape

from sordino.report.groups import TITLES, Group, client_names
from sordino.report.markup import counted, html_table, place
from sordino.report.sections.heatmap import WIDTH, accuracy_by_client, client_columns, label_width


def by_client(groups: Sequence[Group]) -> str:
    """Return the section; nothing if no run has an accuracy by client."""
    figure = accuracy_by_client(groups)
    if figure is None:
        return ""
    rows, cells = [], []
    names = client_names(entry for group in groups for entry in group.clients())
    for group, measure, values in client_columns(groups):
        known = sorted((value, client) for client, value in values.items() if value is not None)
        cells += known
        quartiles = [known[round(share * (len(known) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
        name = f"{escape(group.label)}, {TITLES[measure].lower()}"
        rows.append(
            [
                name,
                *(f"{100 * value:.1f} {_client(names[client])}" for value, client in quartiles),
            ]
        )
    clients = len(figure["data"][0]["y"])
    low, high = min(cells), max(cells)
    words = (
        f"Heat map of accuracy, {counted(clients, 'client')} by {counted(len(rows), 'column')}, "
        f"from {low[0]:.1%} (client {names[low[1]]}) to {high[0]:.1%} (client {names[high[1]]}). The table below has "
        "its quartiles."
    )
    seeds = " Means over seeds." if any(group.over_seeds for group in groups) else ""
    table = html_table(
        "Accuracy in percent, and a client that has it.",
        ["Column", "Lowest", "Lower quartile", "Median", "Upper quartile", "Highest"],
        rows,
        "Accuracy by client in quartiles",
    )
    return (
        '<section aria-labelledby="by-client"><h2 id="by-client">Accuracy by client</h2>\n<figure>\n'
        # Columns too narrow for their numbers would be worse than a figure that scrolls.
        '<div class="scroll" role="region" aria-label="Heat map" tabindex="0">'
        f'<div style="min-width:{110 + label_width(list(names.values())) + WIDTH * len(rows)}px">\n'
        f"{place('clients', figure, words)}</div></div>\n"
        f"<figcaption>Each row is a client; point at a cell for the classes it holds, drag to enlarge a part, "
        f"double-click to go back.{seeds}</figcaption>\n</figure>\n"
        f"<details><summary>Quartiles over clients</summary>\n{table}</details></section>\n"
    )


def _client(name: str) -> str:
    """Return a client's name in small print; a long one may wrap."""
    wraps = ' class="long"' if label_width([name]) else ""
    return f"<small{wraps}>(client {escape(name)})</small>"
