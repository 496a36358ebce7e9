"""The heat map of accuracy by client, and the parts that heat maps share, as plain plotly.js dictionaries."""

from collections.abc import Callable, Sequence

from sordino.report.figures import wrapped
from sordino.report.groups import TITLES, Group, client_names
from sordino.report.markup import Figure, plain
from sordino.results import Measure

WIDTH = 66  # pixels of a column, which hold the longest word of a label
_LONGEST_NAME, _SHORT_NAME, _LETTER = 20, 8, 7  # letters of a client's name, and pixels of a letter
_NUMBERED_CELLS = 240  # above this, numbers in the cells of a heat map would not be read
_NUMBERED_COLUMNS = 16
_NAMED_CLASSES = 12  # a hover label with more does not fit on a screen
# Five stops of cividis, which reads the same with and without color vision, evenly apart.
_SCALE = (
    (0.0, (0, 32, 77)),
    (0.25, (65, 77, 107)),
    (0.5, (124, 123, 120)),
    (0.75, (188, 175, 111)),
    (1.0, (255, 234, 70)),
)


def client_columns(groups: Sequence[Group]) -> list[tuple[Group, Measure, dict[int, float | None]]]:
    """Return the heat map's columns: local and neighbor of each algorithm, or overall if it has neither."""
    columns: list[tuple[Group, Measure, dict[int, float | None]]] = []
    personal: tuple[Measure, ...] = ("local", "neighbor")
    for group in groups:
        candidates = [(group, measure, group.results.client_accuracy(measure)) for measure in (*personal, "overall")]
        known = [column for column in candidates if any(value is not None for value in column[2].values())]
        columns += [column for column in known if column[1] in personal] or known
    return columns


def accuracy_by_client(groups: Sequence[Group]) -> Figure | None:
    """Return a heat map: rows are clients, columns algorithms x measures. None if no run has an accuracy by client."""
    columns = client_columns(groups)
    if not columns:
        return None
    clients = sorted({client for _, _, values in columns for client in values})
    few = numbered(len(clients), len(columns))
    names = client_names(entry for group in groups for entry in group.clients())
    heat = {
        "type": "heatmap",
        "x": list(range(len(columns))),
        "y": [plain(names[client]) for client in clients],
        "z": [[_rounded(values.get(client)) for _, _, values in columns] for client in clients],
        # One text a row; the page's script spreads it over the columns, which keeps a page of many clients small.
        "customdata": [[text] for text in _holdings(groups, clients)],
        "zmin": 0,
        "zmax": 1,
        "colorscale": color_scale(),
        "colorbar": {"tickformat": ".0%", "thickness": 10, "len": 1, "outlinewidth": 0, "xpad": 4},
        "hoverongaps": False,
        "hovertemplate": "client %{y}<br>%{x}: %{z:.1%}<br>%{customdata}<extra></extra>",
        "xgap": 2 if few else 0,
        "ygap": 2 if few else 0,
    }
    ticks = [f"{_lines(group.label)}<br>{TITLES[measure].lower()}" for group, measure, _ in columns]
    data = [heat, numbers(heat, lambda value: f"{value:.0%}", scale_luminance)] if few else [heat]
    return {"data": data, "layout": client_layout(len(clients), ticks, [names[client] for client in clients])}


def _lines(label: str) -> str:
    """Return a label in lines that fit over a column: the algorithm, and each of its settings."""
    return "<br>".join(wrapped(part, 11) for part in label.split(", "))


def numbered(rows: int, columns: int) -> bool:
    """Return True if a heat map of this size has numbers in its cells."""
    return rows * columns <= _NUMBERED_CELLS and columns <= _NUMBERED_COLUMNS


def numbers(heat: Figure, text: Callable[[float], str], luminance_of: Callable[[float], float]) -> Figure:
    """Return the numbers in the cells, each black or white, whichever has more contrast (always 4.5:1 or more).

    Args:
        heat: the heat map's trace.
        text: writes a cell's value.
        luminance_of: relative luminance of a value's color.
    """
    cells = [
        (column, client, value)
        for client, row in zip(heat["y"], heat["z"], strict=True)
        for column, value in zip(heat["x"], row, strict=True)
        if value is not None
    ]
    inks = ["#000" if luminance_of(value) > 0.179 else "#fff" for _, _, value in cells]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [column for column, _, _ in cells],
        "y": [client for _, client, _ in cells],
        "text": [text(value) for _, _, value in cells],
        "textfont": {"size": 12, "color": inks},
        "hoverinfo": "skip",
        "showlegend": False,
        "cliponaxis": True,
    }


def color_scale() -> list[list[object]]:
    """Return the heat maps' scale from 0 to 1, as plotly takes it."""
    return [[at, f"rgb{rgb}"] for at, rgb in _SCALE]


def scale_luminance(value: float) -> float:
    """Return the relative luminance (WCAG) of a value in [0, 1] on the heat maps' scale."""
    position = value * (len(_SCALE) - 1)
    below = min(int(position), len(_SCALE) - 2)
    return luminance(
        [
            low + (high - low) * (position - below)
            for low, high in zip(_SCALE[below][1], _SCALE[below + 1][1], strict=True)
        ]
    )


def luminance(rgb: Sequence[float]) -> float:
    """Return the relative luminance (WCAG) of a color with channels in [0, 255]."""
    shares = (channel / 255 for channel in rgb)
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def client_layout(clients: int, ticks: Sequence[str], names: Sequence[str] = ()) -> Figure:
    """Return the layout of a heat map whose rows are clients, with a tick for each column at 0, 1, ...

    Args:
        clients: the number of rows.
        ticks: labels of columns, as HTML.
        names: of the clients, which are shortened if they are long; their hover label has them whole.
    """
    named: Figure = {}
    if label_width(names):
        rows = range(0, clients, tick_step(clients))
        named = {"tickvals": list(rows), "ticktext": [plain(shortened(names[row])) for row in rows]}
    return {
        "margin": {"l": 52, "r": 8, "t": 28, "b": 8},
        "height": 160 + min(max(clients * 28, 120), 900),
        "xaxis": {
            "range": [-0.5, len(ticks) - 0.5],  # the numbers' trace would widen it
            "tickvals": list(range(len(ticks))),
            "ticktext": list(ticks),
            "tickangle": 0,
            "tickfont": {"size": 11},
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
        },
        "yaxis": {
            "title": {"text": "Client"},
            "type": "category",
            "range": [clients - 0.5, -0.5],
            "dtick": tick_step(clients),
            **named,
            "showgrid": False,
            "automargin": True,
        },
    }


def shortened(name: str, most: int = _LONGEST_NAME) -> str:
    """Return a name of at most so many letters: its beginning and its end, by which long names differ."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - 1 - most // 2) :]}"


def label_width(names: Sequence[str]) -> int:
    """Return the pixels that the longest of clients' names takes beyond those of a number; 0 for short ones."""
    longest = max(map(len, names), default=0)
    return _LETTER * min(longest, _LONGEST_NAME) if longest > _SHORT_NAME else 0


def tick_step(count: int) -> int:
    """Return n so that every n-th of `count` rows or columns has a tick."""
    return next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if count <= 32 * step), 1000)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _holdings(groups: Sequence[Group], clients: Sequence[int]) -> list[str]:
    """Return the classes and domains of each client, in words for its hover label."""
    held: dict[int, dict[tuple[tuple[str, ...], tuple[str, ...]], None]] = {client: {} for client in clients}
    for group in groups:
        for entry in group.clients():
            if entry.client in held:
                held[entry.client][entry.classes, entry.domains or ()] = None
    texts = []
    for client in clients:
        if len(held[client]) > 1:
            texts.append("what it holds differs between runs")
            continue
        classes, domains = next(iter(held[client]))
        parts = [_listed("classes", classes), _listed("domains", domains)]
        texts.append("<br>".join(part for part in parts if part))
    return texts


def _listed(kind: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = [plain(name if len(name) <= 40 else name[:39] + "…") for name in names[:_NAMED_CLASSES]]
    # A line of the hover label holds four names.
    lines = [", ".join(shown[at : at + 4]) for at in range(0, len(shown), 4)]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{kind}: " + ",<br>".join(lines) + more
