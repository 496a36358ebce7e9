"""The page's figures, as plain plotly.js dictionaries: {"data": [...], "layout": {...}}.

Colors of text and grid are left to the page's script, which follows the reader's light or dark theme. Strings go in
escaped, since plotly reads a little HTML in labels.
"""

import math
import textwrap
from collections.abc import Sequence

from sordino.report.groups import Group, Point
from sordino.report.markup import Figure, plain
from sordino.results import MEASURES, Measure, human_bytes

# Searched for: at least 3:1 against white and against the dark background (WCAG 1.4.11), and apart from each other
# under simulated protanopia, deuteranopia and tritanopia. Symbols repeat the distinction for readers who see no color.
PALETTE = ("#6996c3", "#c32d0f", "#0f785a", "#9600ff", "#96961e", "#e10f78", "#695ab4", "#9678ff")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x", "star")
_NEUTRAL = "#5f7d95"

DASHES: dict[Measure, str] = {
    "local": "solid",
    "neighbor": "dash",
    "overall": "dot",
    "novel": "dashdot",
    "domain": "longdash",
}


def color(index: int) -> str:
    """Return the color of the algorithm in row `index` of the table."""
    return PALETTE[index % len(PALETTE)]


def symbol(index: int) -> str:
    """Return the marker of the algorithm in row `index`; color and symbol together repeat after 64 algorithms."""
    return SYMBOLS[(index + index // len(PALETTE)) % len(SYMBOLS)]


def measures_by_round(groups: Sequence[Group]) -> list[Measure]:
    """Return the measures that any run recorded while it trained."""
    return [measure for measure in MEASURES if any(group.curve(measure) for group in groups)]


def accuracy_by_round(groups: Sequence[Group], measures: Sequence[Measure]) -> dict[Measure, Figure]:
    """Return one figure a measure, on shared axes: a line an algorithm, with a band if there are several seeds."""
    curves = {(index, measure): group.curve(measure) for index, group in enumerate(groups) for measure in measures}
    last = max((point.round for curve in curves.values() for point in curve), default=0)
    layout = {
        "margin": {"l": 48, "r": 8, "t": 28, "b": 40},
        "height": 320,
        "showlegend": False,  # the page has one legend for all panels
        "hovermode": "x unified",
        "hoverlabel": {"namelength": -1},
        "xaxis": {"title": {"text": "Round"}, "range": [-0.02 * max(last, 1), 1.02 * max(last, 1)]},
        "yaxis": {"tickformat": ".0%", "range": _range([point for curve in curves.values() for point in curve])},
    }
    figures: dict[Measure, Figure] = {}
    for measure in measures:
        data = []
        for index, group in enumerate(groups):
            curve = curves[index, measure]
            if [point.round for point in curve] == [0] and last > 0:
                # Nothing was trained (zero-shot): a level line to read the others against.
                curve = [*curve, Point(last, curve[0].accuracy)]
            if curve:
                data += _curve(curve, index, group, DASHES[measure])
        data.sort(key=lambda trace: trace["meta"]["role"] != "band")  # no band may cover a line
        figures[measure] = {"data": data, "layout": layout}
    return figures


def _range(points: Sequence[Point]) -> list[float]:
    """Return an axis range in steps of 5% that holds every band."""
    low = min((point.accuracy.mean - (point.accuracy.deviation or 0) for point in points), default=0.0)
    high = max((point.accuracy.mean + (point.accuracy.deviation or 0) for point in points), default=1.0)
    return [max(0.0, math.floor(low * 20 - 0.5) / 20), min(1.02, math.ceil(high * 20 + 0.5) / 20)]


def _curve(curve: Sequence[Point], index: int, group: Group, dash: str) -> list[Figure]:
    rounds = [point.round for point in curve]
    means = [point.accuracy.mean for point in curve]
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain(group.label),
        "meta": {"series": index, "role": "mean"},
        "x": rounds,
        "y": means,
        "line": {"color": color(index), "dash": dash, "width": 2},
        "marker": {"symbol": symbol(index), "size": 7, "maxdisplayed": 12},
        "hovertemplate": "%{y:.1%}",
    }
    # A round that only one seed reached has no deviation; the band closes on the line there.
    if not any(point.accuracy.deviation is not None for point in curve):
        return [line]
    spread = [point.accuracy.deviation or 0.0 for point in curve]
    line |= {"customdata": spread, "hovertemplate": "%{y:.1%} ± %{customdata:.1%}"}
    upper = [mean + deviation for mean, deviation in zip(means, spread, strict=True)]
    lower = [mean - deviation for mean, deviation in zip(means, spread, strict=True)]
    band = {
        "type": "scatter",
        "mode": "lines",
        "name": plain(group.label),
        "meta": {"series": index, "role": "band"},
        "x": rounds + rounds[::-1],
        "y": upper + lower[::-1],
        "fill": "toself",
        "fillcolor": _translucent(color(index)),
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    return [band, line]


def _translucent(hexadecimal: str) -> str:
    red, green, blue = (int(hexadecimal[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.12)"


def bytes_on_the_wire(groups: Sequence[Group]) -> Figure:
    """Return bars of the bytes up and down, for one client and one round, by algorithm."""
    labels = [wrapped(group.label) for group in groups]
    directions = {
        "up": [group.results.mean_bytes("upload_bytes_per_client_round") for group in groups],
        "down": [group.results.mean_bytes("broadcast_bytes_per_client_round") for group in groups],
    }
    sizes = [size for values in directions.values() for size in values if size > 0]
    # A method that sends features beside one that sends a prompt would leave the prompt's bar invisible.
    logarithmic = len(sizes) > 1 and max(sizes) > 100 * min(sizes)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": direction,
            "x": values,
            "y": list(range(len(groups))),
            "text": [human_bytes(value) for value in values],
            "textposition": "outside",
            "cliponaxis": False,
            "hovertemplate": "%{y}<br>" + direction + ": %{text}<extra></extra>",
            # One neutral color: the others stand for algorithms on this page.
            "marker": {"color": _NEUTRAL, "pattern": {"shape": "/" if direction == "down" else "", "solidity": 0.3}},
        }
        for direction, values in directions.items()
    ]
    layout = {
        "margin": {"l": 8, "r": 64, "t": 8, "b": 48},
        "height": 110 + sum(max(52, 24 + 17 * (1 + label.count("<br>"))) for label in labels),
        "barmode": "group",
        "bargap": 0.3,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": {
            "title": {"text": "Bytes for one client and one round" + (" (logarithmic)" if logarithmic else "")},
            "type": "log" if logarithmic else "linear",
            "rangemode": "tozero",
            "tickformat": "~s",
            "ticksuffix": "B",
            "nticks": 6,
        },
        "yaxis": {
            "automargin": True,
            "autorange": "reversed",
            "showgrid": False,
            "tickvals": list(range(len(groups))),
            "ticktext": labels,
        },
    }
    return {"data": data, "layout": layout}


def wrapped(label: str, width: int = 22) -> str:
    """Break a label for an axis into lines of so many letters; names of variants may be long."""
    lines = textwrap.wrap(label, width, max_lines=4, placeholder=" …")
    return "<br>".join(plain(line) for line in lines)
