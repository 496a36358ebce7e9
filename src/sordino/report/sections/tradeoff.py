"""The section on accuracy over the epsilon that was asked for."""

import math
from collections.abc import Sequence

from sordino.report.figures import color, symbol
from sordino.report.groups import TITLES, Group
from sordino.report.markup import keys, place, plain
from sordino.results import Measure

_TRADED: tuple[Measure, ...] = ("local", "neighbor")


def tradeoff(groups: Sequence[Group]) -> str:
    """Return the section on accuracy over the epsilon that was asked for.

    It has a line for each method with its other settings, and is empty below two epsilons.
    """
    lines: dict[str, dict[float, Group]] = {}
    for group in groups:
        epsilon = group.runs[0].config.get("privacy", {}).get("epsilon")
        if epsilon is not None:
            lines.setdefault(group.line, {})[float(epsilon)] = group
    asked = sorted({epsilon for line in lines.values() for epsilon in line})
    if len(asked) < 2:
        return ""
    panels = []
    for measure in _TRADED:
        data = []
        for index, (label, line) in enumerate(lines.items()):
            points = [(epsilon, line[epsilon].results.accuracy(measure)) for epsilon in asked if epsilon in line]
            known = [(epsilon, spread) for epsilon, spread in points if spread is not None]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": plain(label),
                    "x": [_tick(epsilon) for epsilon, _ in known],
                    "y": [spread.mean for _, spread in known],
                    "error_y": {"array": [spread.deviation or 0 for _, spread in known], "thickness": 1, "width": 3},
                    "line": {"color": color(index), "width": 2},
                    "marker": {"symbol": symbol(index), "size": 8},
                    "meta": {"series": index},
                }
            )
        layout = {
            "height": 340,
            "margin": {"l": 56, "r": 8, "t": 8, "b": 48},
            "showlegend": False,
            "hoverlabel": {"namelength": -1},
            "xaxis": {
                "type": "category",
                "categoryorder": "array",
                "categoryarray": [_tick(epsilon) for epsilon in asked],
                "title": {"text": "ε"},
            },
            "yaxis": {"tickformat": ".0%", "range": [0, 1.02]},
        }
        words = f"{TITLES[measure]} accuracy over epsilon; the results table has the numbers."
        figure = place(f"epsilon-{measure}", {"data": data, "layout": layout}, words)
        panels.append(f'<div class="panel"><h3>{TITLES[measure]}</h3>\n{figure}</div>\n')
    legend = keys("Algorithm", [(symbol(index), color(index), label) for index, label in enumerate(lines)])
    return (
        '<section aria-labelledby="tradeoff"><h2 id="tradeoff">Accuracy over epsilon</h2>\n<figure>\n'
        f'{legend}<div class="panels">\n{"".join(panels)}</div>\n<figcaption>What a smaller ε costs: to the left, more '
        "noise. Bars: one standard deviation. At ∞ contributions are clipped and sampled as for the others, and no "
        "noise is added.</figcaption></figure></section>\n"
    )


def _tick(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{epsilon:g}"
