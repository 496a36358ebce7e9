"""Claimed against shown epsilon: a figure and a table, a line for each attack that gives a lower bound."""

from collections.abc import Sequence
from html import escape

from sordino.report.figures import color, wrapped
from sordino.report.groups import Group
from sordino.report.markup import Figure, html_table, keys, place
from sordino.report.runs import Run
from sordino.report.sections.evidence import Bound, evidence
from sordino.results import rounded_up

NOTHING = "nothing"


def claimed_and_shown(audited: Sequence[tuple[int, Group, Run]]) -> str:
    """Return the figure and the table; nothing if no attack gives a bound.

    Args:
        audited: the place of a group on the page, the group, and a run of it that was attacked.
    """
    bounds = [(index, _name(group, run), bound) for index, group, run in audited for bound in evidence(run).bounds]
    if not bounds:
        return ""
    rows = [[escape(name), escape(bound.title), _claimed(bound), _shown(bound)] for _, name, bound in bounds]
    table = html_table(
        "Claimed ε, and the lower bound that each attack shows.",
        ["Run", "Attack", "Claimed ε", "Shown ε, at least"],
        rows,
        "Claimed and shown epsilon by attack",
    )
    words = "; ".join(
        f"{name}, {bound.title}: {bound.shown:.3g} shown, "
        f"{NOTHING if bound.claimed is None else rounded_up(bound.claimed)} claimed"
        for _, name, bound in bounds
    )
    ink = "var(--ink)"
    legend = keys("Epsilon", [("circle", ink, "shown, at least"), ("circle-open", ink, "claimed")])
    if not any(bound.shown > 0 or bound.claimed is not None for _, _, bound in bounds):
        return f"<h3>Claimed and shown ε</h3>\n{table}"  # a figure of zeros tells nothing
    return (
        f"<h3>Claimed and shown ε</h3>\n<figure>\n{legend}"
        f"{place('bounds', bounds_figure(bounds), f'Claimed and shown epsilon: {words}.')}"
        "<figcaption>A claim holds as long as nothing shown is to the right of it; between the two, nobody knows. An "
        "attack's claim is that of the training that it attacks, at its own δ: canaries train once more."
        f"</figcaption>\n</figure>\n{table}"
    )


def bounds_figure(bounds: Sequence[tuple[int, str, Bound]]) -> Figure:
    """Return a line for each attack, from the bound that it shows to the claim."""
    places = list(range(len(bounds)))
    colors = [color(index) for index, _, _ in bounds]
    known = [at for at in places if bounds[at][2].claimed is not None]
    claims = [bounds[at][2].claimed for at in known]
    ends = [max(bound.shown, bound.claimed or 0.0) for _, _, bound in bounds]
    shown: Figure = {
        "type": "scatter",
        "mode": "markers",
        "name": "shown, at least",
        "x": [bound.shown for _, _, bound in bounds],
        "y": places,
        "marker": {"symbol": "circle", "size": 10, "color": colors},
        "hovertemplate": "shown, at least: %{x:.3g}<extra></extra>",
        "cliponaxis": False,
    }
    claimed: Figure = shown | {
        "name": "claimed",
        "x": claims,
        "y": known,
        "marker": {"symbol": "circle-open", "size": 11, "color": [colors[at] for at in known], "line": {"width": 2}},
        "hovertemplate": "claimed: %{x:.3g}<extra></extra>",
    }
    spans = [
        {"type": "line", "x0": bounds[at][2].shown, "x1": claim, "y0": at, "y1": at, "line": {"color": colors[at]}}
        for at, claim in zip(known, claims, strict=True)
    ]
    labels = [f"{wrapped(name)}<br>{wrapped(bound.title)}" for _, name, bound in bounds]
    layout = {
        "height": 70 + sum(14 + 17 * (1 + label.count("<br>")) for label in labels),
        "margin": {"l": 8, "r": 16, "t": 8, "b": 48},
        "showlegend": False,
        "shapes": spans,
        "xaxis": {"title": {"text": "ε"}, "range": [0, 1.06 * max([*ends, 0.1])], "nticks": 6},
        "yaxis": {
            "automargin": True,
            "range": [len(bounds) - 0.5, -0.5],
            "tickvals": places,
            "ticktext": labels,
            "showgrid": False,
            "zeroline": False,
        },
    }
    return {"data": [shown, claimed], "layout": layout}


def _name(group: Group, run: Run) -> str:
    return f"{group.label}, seed {run.summary.seed}" if group.over_seeds else group.label


def _claimed(bound: Bound) -> str:
    if bound.claimed is None:
        return NOTHING
    return f"{rounded_up(bound.claimed)} <small>(δ = {rounded_up(bound.delta)})</small>"


def _shown(bound: Bound) -> str:
    text = f"{bound.shown:.3g}"
    return f'<strong class="exposed">{text}, which refutes the claim</strong>' if bound.refuted else text
