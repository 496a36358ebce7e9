"""The distances that a server that clusters on shares saw: a heat map, and the plane that can be drawn from them."""

import math
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from itertools import compress

import numpy as np

from sordino.report.figures import SYMBOLS, color, symbol
from sordino.report.groups import Clients
from sordino.report.markup import NONE, Figure, counted, html_table, keys, place, plain
from sordino.report.runs import Run
from sordino.report.sections.distance_data import Floats, Seen, plane, seen
from sordino.report.sections.heatmap import (
    client_layout,
    color_scale,
    label_width,
    numbered,
    numbers,
    scale_luminance,
    shortened,
    tick_step,
)
from sordino.results import listed
from sordino.secure import NOBODY, to_one_scale

_NEUTRAL = "#788290"  # its color
_SQUARE = 580  # height at which a matrix is about as high as its half of the page is wide
_CELL = 34  # pixels of a column that has numbers
_UPRIGHT = 4  # letters of a column's name that fit over it; longer ones are turned
_NAMED_POINTS = 60  # with more, numbers beside the points would cover each other


def what_the_server_saw(index: int, label: str, run: Run, clients: Clients) -> str:
    """Return the heat map of the last distances, and the plane if they are between all clients; else nothing.

    Args:
        index: of the run on the page.
        label: its name on the page.
        run: the run.
        clients: the run's.
    """
    if run.distances is None or not (opened := seen(run.distances)).clients:
        return ""
    settings = run.config.get("settings", {}).get(run.summary.algorithm, {})
    ratios = settings.get("reveal") == "ratios"
    panels = [_heat_map(index, label, opened, ratios, run.distances.round, clients)]
    if opened.mutual and len(opened.clients) > 1:
        clusters = {entry.round: entry.clusters for entry in run.rounds}
        labels = clusters.get(run.distances.round) or (NOBODY,) * run.summary.clients
        panels.append(_plane(index, label, opened, ratios, labels, clients))
    return f'<div class="panels">\n{"".join(panels)}</div>\n'


def _heat_map(index: int, label: str, opened: Seen, ratios: bool, number: int, clients: Clients) -> str:
    figure = heat_map(opened, ratios, clients)
    to = "each other" if opened.mutual else f"the means of {counted(len(opened.sets), 'set')} of clients"
    words = (
        f"Heat map of distances of {counted(len(opened.clients), 'client')} to {to}; the table below has each client's "
        "nearest and farthest."
    )
    scale = "each row over its mean, since rows have a scale of their own" if ratios else "not squared"
    others = f" Beside them it saw those to the means of {counted(opened.others, 'set')}." if opened.others else ""
    target = "other client" if opened.mutual else "set"
    table = html_table(
        f"Distances in round {number}, {scale}.",
        ["Client", f"Nearest {target}", f"Farthest {target}"],
        _nearest_and_farthest(opened, ratios, clients),
        f"Nearest and farthest, {label}",
    )
    width = 110 + label_width(clients.called(opened.clients))
    width += _CELL * len(opened.sets) if len(figure["data"]) > 1 else 200
    return (
        '<div class="panel"><h4>Distances that the server saw</h4>\n<figure>\n'
        f'<div class="scroll" role="region" aria-label="Heat map of distances, {escape(label)}" tabindex="0">'
        f'<div style="min-width:{width}px">\n{place(f"distances-{index}", figure, words)}</div></div>\n'
        f"<figcaption>Distances of clients' reduced prompts to {to} in round {number}, {scale}. They were computed on "
        f"secret shares and opened to the server.{others}</figcaption>\n</figure>\n"
        f"<details><summary>Nearest and farthest</summary>\n{table}</details></div>\n"
    )


def _nearest_and_farthest(opened: Seen, ratios: bool, clients: Clients) -> list[list[str]]:
    shown, rows = opened.shown(ratios), []
    others = [[members != (client,) for members in opened.sets] for client in opened.clients]
    known = ~np.isnan(shown) & others
    for client, distances, known_sets in zip(opened.clients, shown.tolist(), known.tolist(), strict=True):
        by_distance = sorted(compress(zip(distances, opened.sets, strict=True), known_sets))
        ends = [by_distance[0], by_distance[-1]] if by_distance else []
        cells = [
            f'<span class="words">{named(members, clients.name)} <small>({value:.3g})</small></span>'
            for value, members in ends
        ]
        rows.append([clients.name(client), *(cells or [NONE] * 2)])
    return rows


def heat_map(opened: Seen, ratios: bool, clients: Clients) -> Figure:
    """Return a heat map of distances: rows are clients, columns the sets to whose means they are.

    Args:
        opened: the distances.
        ratios: True if rows have scales of their own.
        clients: the run's.
    """
    shown = opened.shown(ratios)
    known = shown[~np.isnan(shown)]
    top = float(known.max()) if known.size and known.max() > 0 else 1.0
    # Points have unit norm, so most distances are between 0.1 and 2; two places would show nothing of smaller ones.
    few = numbered(len(opened.clients), len(opened.sets)) and top >= 0.1
    heat = {
        "type": "heatmap",
        "x": list(range(len(opened.sets))),
        "y": [clients.name(client) for client in opened.clients],
        "z": [[None if math.isnan(value) else float(f"{value:.4g}") for value in row] for row in shown.tolist()],
        "customdata": [[clients.holding(client)] for client in opened.clients],
        # One text a column; the page's script spreads it over the rows.
        "text": [[_hover_text(members, clients.name) for members in opened.sets]],
        "zmin": 0,
        "zmax": top,
        "colorscale": color_scale(),
        "colorbar": {"thickness": 10, "len": 1, "outlinewidth": 0, "xpad": 4},
        "hoverongaps": False,
        "hovertemplate": "client %{y} to %{text}: %{z:.3~g}<br>%{customdata}<extra></extra>",
        "xgap": 2 if few else 0,
        "ygap": 2 if few else 0,
    }
    text = numbers(heat, lambda value: f"{value:.2f}", lambda value: scale_luminance(min(value / top, 1)))
    data = [heat, text] if few else [heat]
    ticks = [_tick(members, clients) for members in opened.sets]
    layout = client_layout(
        len(opened.clients),
        ticks,
        clients.called(opened.clients),
    )
    if opened.mutual:
        layout["height"] = min(layout["height"], _SQUARE)
    step = tick_step(len(opened.sets))
    axis = layout["xaxis"]
    axis |= {"tickvals": axis["tickvals"][::step], "ticktext": axis["ticktext"][::step]}
    axis["tickangle"] = -90 if max(map(len, ticks), default=0) > _UPRIGHT else 0
    axis["title"] = {"text": "Client" if opened.mutual else "Members of the set"}
    return {"data": data, "layout": layout}


def named(members: Sequence[int], name: Callable[[int], str]) -> str:
    """Return a set of clients in words: `client 3`, or `the mean of clients 1, 2 and 5`."""
    names = [name(member) for member in members]
    return f"client {names[0]}" if len(members) == 1 else f"the mean of clients {listed(names)}"


def _hover_text(members: Sequence[int], name: Callable[[int], str]) -> str:
    return "<br>".join(textwrap.wrap(named(members, name), 60, max_lines=6, placeholder=" …"))


def _tick(members: Sequence[int], clients: Clients) -> str:
    return plain(shortened(", ".join(clients.called(members)), 18))


def _plane(index: int, label: str, opened: Seen, ratios: bool, labels: Sequence[int], clients: Clients) -> str:
    points, share = plane(to_one_scale(opened.squared))
    clusters = [max(labels[client], NOBODY) for client in opened.clients]
    domains = clients.domains
    client_domains = [listed(domains.get(client, ())) or "no domain" for client in opened.clients]
    kinds = list(dict.fromkeys(client_domains)) if any(domains.values()) else []
    if kinds:
        colors = [color(kinds.index(domain)) for domain in client_domains]
    else:
        colors = [cluster_color(cluster) for cluster in clusters]
    symbols = [_cluster_symbol(cluster) for cluster in clusters]
    texts = [
        f"client {clients.name(client)}<br>{plain(domain) + '<br>' if kinds else ''}{cluster_name(cluster)}"
        for client, domain, cluster in zip(opened.clients, client_domains, clusters, strict=True)
    ]
    beside = [plain(shortened(name, 14)) for name in clients.called(opened.clients)]
    figure = scatter(points, beside, colors, symbols, texts)
    legend = keys("Domain", [("circle", color(number), name) for number, name in enumerate(kinds)])
    legend += keys(
        "Cluster",
        [
            (_cluster_symbol(cluster), "inherit" if kinds else cluster_color(cluster), _number(cluster))
            for cluster in sorted({*clusters}, key=lambda number: (number < 0, number))  # no cluster comes last
        ],
    )
    but = ", except for the colors, which are true domains" if kinds else ""
    scale = " and to a common scale" if ratios else ""
    repeated = f" Symbols repeat after {len(SYMBOLS)} clusters." if max(clusters) >= len(SYMBOLS) else ""
    words = f"{counted(len(opened.clients), 'client')} as points on a plane; the table below has their coordinates."
    rows = [
        [clients.name(client), *([escape(domain)] if kinds else []), _number(cluster), f"{x:.3g}", f"{y:.3g}"]
        for client, domain, cluster, (x, y) in zip(
            opened.clients, client_domains, clusters, points.tolist(), strict=True
        )
    ]
    head = ["Client", *(["Domain"] if kinds else []), "Cluster", "First axis", "Second axis"]
    table = html_table("Clients on the plane.", head, rows, f"Clients in two dimensions, {label}")
    return (
        f'<div class="panel"><h4>Clients in two dimensions</h4>\n<figure>\n{legend}'
        f"{place(f'plane-{index}', figure, words)}"
        f"<figcaption>Classical multidimensional scaling of the distances. The server can draw this for itself{but}. "
        f"Axes are arbitrary up to rotation{scale}; these two carry {share:.0%} of the squared distances.{repeated}"
        f"</figcaption>\n</figure>\n<details><summary>Coordinates</summary>\n{table}</details></div>\n"
    )


def _number(cluster: int) -> str:
    return str(cluster) if cluster >= 0 else "none"


def cluster_name(label: int) -> str:
    """Return a cluster in words."""
    return f"cluster {label}" if label >= 0 else "in no cluster"


def cluster_color(label: int) -> str:
    """Return the color of a cluster."""
    return color(label) if label >= 0 else _NEUTRAL


def _cluster_symbol(label: int) -> str:
    return symbol(label) if label >= 0 else "circle-open"


def scatter(
    points: Floats, names: Sequence[str], colors: Sequence[str], symbols: Sequence[str], texts: Sequence[str]
) -> Figure:
    """Return clients as points on a plane, with their names beside them if there is room.

    Args:
        points: [N, 2].
        names: of the N clients.
        colors, symbols: of their markers.
        texts: of their hover labels.
    """
    marks = {
        "type": "scatter",
        "mode": "markers+text" if len(names) <= _NAMED_POINTS else "markers",
        "x": [float(f"{value:.4g}") for value in points[:, 0]],
        "y": [float(f"{value:.4g}") for value in points[:, 1]],
        "text": list(names),
        "textposition": "top center",
        "customdata": list(texts),
        "hovertemplate": "%{customdata}<extra></extra>",
        "cliponaxis": False,
        "marker": {"color": list(colors), "symbol": list(symbols), "size": 10},
    }
    layout = {
        "margin": {"l": 56, "r": 16, "t": 28, "b": 48},
        "height": 480,
        "showlegend": False,  # the page has one of its own
        "hovermode": "closest",
        "xaxis": {"title": {"text": "First axis"}, "zeroline": False},
        # A step is as long on one axis as on the other, or the picture's distances would not be distances.
        "yaxis": {"title": {"text": "Second axis"}, "zeroline": False, "scaleanchor": "x", "scaleratio": 1},
    }
    return {"data": [marks], "layout": layout}
