"""The section on personal prompts beside shared ones: accuracy on a client's own classes, and on the others'."""

from collections.abc import Sequence
from html import escape

from sordino.report.figures import color, symbol
from sordino.report.groups import Group
from sordino.report.markup import NONE, Figure, html_table, keys, place, plain
from sordino.report.sections.verdict import contenders, learned_nothing
from sordino.results import Interval, Spread, points

_KINDS = {"personal": "one each", "shared": "shared", None: NONE}


def personal_or_shared(groups: Sequence[Group]) -> str:
    """Return the section; nothing if no group has both local and neighbor accuracy."""
    measured = [(index, group, pair) for index, group in enumerate(groups) if (pair := _pair(group))]
    if not measured:
        return ""
    rows = [
        [
            escape(group.label),
            _KINDS[prompts_of(group)],
            local.percent(),
            neighbor.percent(),
            points(local.mean - neighbor.mean),
        ]
        for _, group, (local, neighbor) in measured
    ]
    table = html_table(
        "Accuracy in percent, and how much better a prompt is on its client's own classes.",
        ["Algorithm", "Prompt", "Local, %", "Neighbor, %", "Local over neighbor"],
        rows,
        "Personal and shared prompts by algorithm",
    )
    figure = ""
    if len(measured) > 1:
        legend = keys("Prompt", [(_mark(index, group), color(index), group.label) for index, group, _ in measured])
        words = "; ".join(
            f"{group.label} {points(local.mean)} local and {points(neighbor.mean)} neighbor"
            for _, group, (local, neighbor) in measured
        )
        figure = (
            f'<figure>\n{legend}<div class="square">'
            f"{place('personal', personal_figure(groups), f'Local over neighbor accuracy: {words}.')}</div>"
            "<figcaption>Up: better on a client's own classes; right: better on those of the others. On the dotted "
            "line a prompt is as good on both. Open marks are prompts that all clients share. Bars: one standard "
            "deviation.</figcaption>\n</figure>\n"
        )
    return (
        '<section aria-labelledby="personal-heading"><h2 id="personal-heading">Personal or shared prompt</h2>\n'
        f"{_in_words(groups)}{figure}{table}</section>\n"
    )


def prompts_of(group: Group) -> str | None:
    """Return whether a group's runs kept personal prompts or a shared one; None if unknown, or not alike."""
    kinds = {run.prompts for run in group.runs}
    return kinds.pop() if len(kinds) == 1 else None


def personal_figure(groups: Sequence[Group]) -> Figure:
    """Return a mark a group: local accuracy over neighbor accuracy, with deviations as bars."""
    pairs = [(index, group, pair) for index, group in enumerate(groups) if (pair := _pair(group))]
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "#888888", "dash": "dot", "width": 1},
        "hoverinfo": "skip",
        "meta": {"role": "diagonal"},
    }
    marks = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": plain(group.label),
            "x": [neighbor.mean],
            "y": [local.mean],
            "error_x": {"array": [neighbor.deviation or 0], "thickness": 1, "width": 3},
            "error_y": {"array": [local.deviation or 0], "thickness": 1, "width": 3},
            "marker": {"symbol": _mark(index, group), "size": 11, "color": color(index), "line": {"width": 2}},
            "hovertemplate": "neighbor %{x:.1%}, local %{y:.1%}",
            "meta": {"series": index, "role": "mark"},
        }
        for index, group, (local, neighbor) in pairs
    ]
    axis = {"tickformat": ".0%", "range": [-0.02, 1.02], "dtick": 0.2}
    layout = {
        "height": 400,
        "margin": {"l": 56, "r": 24, "t": 8, "b": 48},
        "showlegend": False,
        "hoverlabel": {"namelength": -1},
        "xaxis": axis | {"title": {"text": "Neighbor accuracy"}},
        "yaxis": axis | {"title": {"text": "Local accuracy"}},
    }
    return {"data": [diagonal, *marks], "layout": layout}


def _pair(group: Group) -> tuple[Spread, Spread] | None:
    local, neighbor = group.results.accuracy("local"), group.results.accuracy("neighbor")
    return (local, neighbor) if local and neighbor else None


def _mark(index: int, group: Group) -> str:
    return symbol(index) + ("-open" if prompts_of(group) == "shared" else "")


def _in_words(groups: Sequence[Group]) -> str:
    """Return how the best personal prompt compares with the best shared one that was learned; nothing without both."""
    among = [group for group in contenders(groups) if _pair(group)]
    if not {"personal", "shared"} <= {prompts_of(group) for group in among}:  # then beside yardsticks
        among = [group for group in groups if _pair(group) and not learned_nothing(group)]
    best: dict[str | None, Group] = {}
    for group in among:
        kind, local = prompts_of(group), group.results.accuracy("local")
        other = best[kind].results.accuracy("local") if kind in best else None
        if local and (other is None or local.mean > other.mean):
            best[kind] = group
    if not {"personal", "shared"} <= best.keys():
        return ""
    own, shared = best["personal"], best["shared"]
    changes = [(name, own.results.difference(shared.results, name)) for name in ("local", "neighbor")]
    told = [f"{name} {_change(change)}" for name, change in changes if change]
    if not told:
        return ""
    return (
        f"<p>The personal prompt with the highest local accuracy, <strong>{escape(own.label)}</strong>, against the "
        f"shared one, <strong>{escape(shared.label)}</strong>: {escape(' and '.join(told))}.</p>\n"
    )


def _change(change: Interval) -> str:
    text = f"{points(change.mean)} points"
    if change.low is None:
        return f"{text} (too few seeds to claim a difference)"
    shown = "" if change.above or change.below else "not shown to differ: "
    return f"{shown}{text} (95% interval {change.percent()})"
