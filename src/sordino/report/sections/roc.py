"""ROC curves of membership inference on logarithmic axes, and the bound that differential privacy puts on them.

Axes are as Carlini, Chien, Nasr, Song, Terzis, Tramer, Membership Inference Attacks From First Principles, S&P 2022,
ask for: what matters is how many members are found while hardly any non-member is accused.
"""

import math
from collections.abc import Sequence

from sordino.report.figures import color
from sordino.report.groups import Group
from sordino.report.markup import Figure, keys, place, plain
from sordino.report.runs import Run
from sordino.report.sections.evidence import Guess, evidence
from sordino.results import rounded_up

_DASHES = {"LiRA": "solid", "RMIA": "dash", "uploads over rounds": "dot", "statistics, regression": "dashdot"}
_LEAST = 1e-4  # a rate below is drawn there: a logarithmic axis has no 0
_POINTS = 60  # of a bound's curve


def curves(audited: Sequence[tuple[int, Group, Run]]) -> str:
    """Return the figure; nothing if no audit has a curve.

    Args:
        audited: the place of a group on the page, the group, and a run of it that was attacked.
    """
    data: list[Figure] = []
    marks: dict[str, tuple[str, str, str]] = {}
    claims: dict[tuple[float, float], int] = {}
    for index, group, run in audited:
        for guess in evidence(run).guesses:
            if guess.title not in _DASHES or not guess.curve:
                continue
            data.append(_curve(index, f"{group.label}, seed {run.summary.seed}", guess))
            marks.setdefault(group.label, ("line", color(index), group.label))
            if guess.claimed is not None:
                claims.setdefault((guess.claimed, guess.delta), index)
    if not data:
        return ""
    bounds = [_bound(claim, delta, index) for (claim, delta), index in claims.items()]
    dashes = {guess.title for _, _, run in audited for guess in evidence(run).guesses if guess.curve}
    kinds = [(f"line-{_DASHES[title]}", "var(--ink)", title) for title in _DASHES if title in dashes]
    legend = keys("Run", list(marks.values())) if len(marks) > 1 else ""
    legend += keys("Attack", kinds)
    axis = {"type": "log", "range": [math.log10(_LEAST), 0], "tickvals": [1e-4, 1e-3, 1e-2, 1e-1, 1]}
    axis |= {"ticktext": ["0.01%", "0.1%", "1%", "10%", "100%"]}
    layout = {
        "height": 440,
        "margin": {"l": 64, "r": 24, "t": 8, "b": 48},
        "showlegend": False,
        "xaxis": axis | {"title": {"text": "False positive rate"}},
        "yaxis": axis | {"title": {"text": "True positive rate"}},
    }
    figure = {"data": [_guessing(), *bounds, *data], "layout": layout}
    said = _bound_words(list(claims))
    return (
        f'<h3>ROC of membership inference</h3>\n<figure>\n{legend}<div class="square">'
        + place("roc", figure, "ROC curves of membership inference; the table has AUCs.")
        + "</div><figcaption>How many members an attack finds, over how many non-members it accuses; both axes are "
        "logarithmic, since few sure finds matter more than many guesses. The thin dotted line is guessing. "
        f"{said}</figcaption></figure>\n"
    )


def privacy_bound(false_positive_rate: float, epsilon: float, delta: float) -> float:
    """Return the largest true positive rate that (epsilon, delta)-DP allows a test at a false positive rate.

    Wasserman, Zhou, A Statistical Framework for Differential Privacy, JASA 2010, Theorem 2.4; Kairouz, Oh, Viswanath,
    The Composition Theorem for Differential Privacy, ICML 2015, section 2.

    Args:
        false_positive_rate: in [0, 1].
        epsilon, delta: of the two data sets that the test tells apart.
    """
    grown = math.exp(min(epsilon, 700.0))
    steep = grown * false_positive_rate + delta
    flat = 1 - (1 - delta - false_positive_rate) / grown
    return max(0.0, min(1.0, steep, flat))


def of_replaced(epsilon: float, delta: float) -> tuple[float, float]:
    """Return epsilon and delta for an example that is replaced, given those for one that is added or removed.

    A candidate that is no member has another one in its place, so its two worlds are two steps apart.
    """
    return 2 * epsilon, min(1.0, (1 + math.exp(min(epsilon, 700.0))) * delta)


def _curve(index: int, name: str, guess: Guess) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(f"{name}: {guess.title}"),
        "x": [max(x, _LEAST) for x, _ in guess.curve],
        "y": [max(y, _LEAST) for _, y in guess.curve],
        "line": {"color": color(index), "dash": _DASHES[guess.title], "width": 2},
        "meta": {"series": index, "role": "curve"},
    }


def _bound(epsilon: float, delta: float, index: int) -> Figure:
    replaced = of_replaced(epsilon, delta)
    rates = [_LEAST ** (1 - step / _POINTS) for step in range(_POINTS + 1)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"most at ε {rounded_up(epsilon)}",
        "x": rates,
        "y": [max(privacy_bound(rate, *replaced), _LEAST) for rate in rates],
        "line": {"color": color(index), "width": 1},
        "fill": "none",
        "meta": {"series": index, "role": "bound"},
    }


def _bound_words(claims: Sequence[tuple[float, float]]) -> str:
    if not claims:
        return "No ε is claimed against these attackers, so nothing bounds the curves."
    told = [f"ε = {rounded_up(epsilon)} at δ = {rounded_up(delta)}" for epsilon, delta in claims]
    open_to_all = all(privacy_bound(_LEAST, *of_replaced(*claim)) > 0.99 for claim in claims)
    text = f"Thin full lines are the most that is allowed by {'; '.join(told)}, doubled as one image replaces another."
    return text + (" It is so large that every curve of this figure keeps to it." if open_to_all else "")


def _guessing() -> Figure:
    line = {"color": "#888888", "dash": "dot", "width": 1}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "guessing",
        "x": [_LEAST, 1],
        "y": [_LEAST, 1],
        "line": line,
        "meta": {"role": "guessing"},
    }
