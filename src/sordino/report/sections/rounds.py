"""The section on accuracy by round: a panel a measure, with one legend for all."""

from collections.abc import Sequence
from html import escape

from sordino.report import figures
from sordino.report.groups import TITLES, Group
from sordino.report.markup import place
from sordino.results import Measure


def by_round(groups: Sequence[Group]) -> str:
    """Return the section; nothing if no accuracy was recorded while runs trained."""
    measures = figures.measures_by_round(groups)
    if not measures:
        return ""
    drawn = figures.accuracy_by_round(groups, measures)
    keys = "".join(
        f'<label><input type="checkbox" checked autocomplete="off" data-series="{index}">'
        f'<span class="swatch" data-symbol="{figures.symbol(index)}" style="color:{figures.color(index)}"></span>'
        f"{escape(group.label)}</label>\n"
        for index, group in enumerate(groups)
    )
    panels = "".join(
        f'<div class="panel"><h3>{TITLES[measure]}</h3>\n'
        + place(f"round-{measure}", figure, _curve_words(measure, groups))
        + "</div>\n"
        for measure, figure in drawn.items()
    )
    band = " Bands: one sample standard deviation over seeds." if any(group.over_seeds for group in groups) else ""
    return (
        '<section aria-labelledby="by-round"><h2 id="by-round">Accuracy by round</h2>\n<figure>\n'
        f'<fieldset class="legend"><legend>Show</legend>\n{keys}</fieldset>\n<div class="panels">\n{panels}</div>\n'
        f"<figcaption>Round 0 is before training; a method that does not train is drawn as a level line. All panels "
        f"share one scale, which need not start at 0.{band}</figcaption>\n</figure></section>\n"
    )


def _curve_words(measure: Measure, groups: Sequence[Group]) -> str:
    ends = []
    for group in groups:
        if curve := group.curve(measure):
            first, last = curve[0], curve[-1]
            ends.append(
                f"{group.label} from {first.accuracy.mean:.1%} in round {first.round} "
                f"to {last.accuracy.mean:.1%} in round {last.round}"
            )
    return f"Line chart of {TITLES[measure].lower()} accuracy by round: {'; '.join(ends) or 'not measured'}."
