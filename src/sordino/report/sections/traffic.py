"""The section on bytes that clients sent and received."""

from collections.abc import Sequence
from html import escape

from sordino.report import figures
from sordino.report.groups import Group
from sordino.report.markup import html_table, place
from sordino.results import human_bytes


def communication(groups: Sequence[Group]) -> str:
    """Return the section, a bar and a row a group."""
    names = (
        "upload_bytes_per_client_round",
        "broadcast_bytes_per_client_round",
        "total_upload_bytes",
        "total_broadcast_bytes",
    )
    rows = [[escape(group.label), *(human_bytes(group.results.mean_bytes(name)) for name in names)] for group in groups]
    words = "; ".join(f"{group.label} {row[1]} up and {row[2]} down" for group, row in zip(groups, rows, strict=True))
    figure = place("wire", figures.bytes_on_the_wire(groups), f"Bar chart of bytes a client and round: {words}.")
    table = html_table(
        "Bytes on the wire; 1 kB is 1,000 bytes.",
        ["Algorithm", "Up, client and round", "Down, client and round", "Up, whole run", "Down, whole run"],
        rows,
        "Bytes on the wire by algorithm",
    )
    return (
        '<section aria-labelledby="wire-heading"><h2 id="wire-heading">What crossed the wire</h2>\n'
        f"<figure>\n{figure}</figure>\n{table}</section>\n"
    )
