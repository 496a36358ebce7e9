"""The report as plain semantic HTML: the sections that have no module of their own."""

from collections.abc import Sequence
from html import escape

from sordino.report import figures
from sordino.report.clusters import clusters
from sordino.report.frame import frame
from sordino.report.groups import TITLES, Group, client_names
from sordino.report.heatmap import WIDTH, accuracy_by_client, client_columns
from sordino.report.markup import counted, html_table, place
from sordino.report.privacy import audits, tradeoff
from sordino.report.runs import Run
from sordino.report.tables import privacy_words, results
from sordino.report.worth import worth
from sordino.results import Measure, human_bytes, listed

_LISTED_IMAGES = 200


def render(runs: Sequence[Run], groups: Sequence[Group], title: str) -> str:
    """Return the whole page; see `frame`."""
    sections = [
        results(groups),
        worth(groups),
        tradeoff(groups),
        audits(groups),
        _by_round(groups),
        _by_client(groups),
        clusters(groups),
        _communication(groups),
        _privacy(groups),
        _skipped(runs),
        _configuration(runs, groups),
    ]
    versions = listed(sorted({run.summary.version for run in runs if run.summary.version}))
    body = f"""<main>
<header>
<h1>{escape(title)}</h1>
<p>{_what_was_run(runs, groups)}</p>
<noscript><p>The figures need JavaScript; all tables stand without it.</p></noscript>
</header>
{"".join(section for section in sections if section)}</main>
<footer><p>Written by Sordino{escape(" " + versions if versions else "")}.</p></footer>
"""
    return frame(title, body)


def _what_was_run(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    def distinct(field: str) -> list[object]:
        return list(dict.fromkeys(getattr(run.summary, field) for run in runs))

    seeds = sorted({run.summary.seed for run in runs})
    clients = distinct("clients")
    rounds = [number for number in distinct("rounds") if number] or [0]  # zero-shot has none, and says so in the table
    methods = distinct("algorithm")
    variants = f" in {len(groups)} variants" if len(groups) > len(methods) else ""
    text = (
        f"{listed(methods)}{variants} on {listed(distinct('dataset'))}, "
        f"encoder {listed(distinct('encoder'))}: "
        f"{listed(f'{number:,}' for number in clients)} client{'' if clients == [1] else 's'}, "
        f"{listed(f'{number:,}' for number in rounds)} round{'' if rounds == [1] else 's'}, "
        f"seed{'' if len(seeds) == 1 else 's'} {listed(seeds)}"
        + (f"; {len(runs):,} runs in all." if len(runs) > 1 else ".")
    )
    text = escape(text)
    apart = [noun for noun, field in (("data sets", "dataset"), ("encoders", "encoder")) if len(distinct(field)) > 1]
    apart += ["numbers of clients"] if len(clients) > 1 else []
    if apart:
        text += (
            f" <strong>These runs differ in their {listed(apart)}: not every row compares with every other.</strong>"
        )
    return text


def _by_round(groups: Sequence[Group]) -> str:
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


def _by_client(groups: Sequence[Group]) -> str:
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
                *(f"{100 * value:.1f} <small>(client {escape(names[client])})</small>" for value, client in quartiles),
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
        f'<div style="min-width:{110 + WIDTH * len(rows)}px">\n'
        f"{place('clients', figure, words)}</div></div>\n"
        f"<figcaption>Each row is a client; point at a cell for the classes it holds, drag to enlarge a part, "
        f"double-click to go back.{seeds}</figcaption>\n</figure>\n"
        f"<details><summary>Quartiles over clients</summary>\n{table}</details></section>\n"
    )


def _communication(groups: Sequence[Group]) -> str:
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


def _privacy(groups: Sequence[Group]) -> str:
    items = []
    for group in groups:
        statements = dict.fromkeys(run.summary.privacy.statement for run in group.runs)
        by_statement = [
            (statement, [run.summary.seed for run in group.runs if run.summary.privacy.statement == statement])
            for statement in statements
        ]
        paragraphs = "".join(
            f"<p>{escape(statement)}{escape(f' (seed {listed(seeds)})') if len(statements) > 1 else ''}</p>"
            for statement, seeds in by_statement
        )
        items.append(f"<article><h3>{escape(group.label)}: {privacy_words(group)}</h3>{paragraphs}</article>\n")
    return f'<section aria-labelledby="privacy"><h2 id="privacy">Privacy</h2>\n{"".join(items)}</section>\n'


def _skipped(runs: Sequence[Run]) -> str:
    skipped = list(dict.fromkeys((image.name, image.reason) for run in runs for image in run.summary.images.skipped))
    if not skipped:
        return ""
    rows = [
        [f'<span class="words">{escape(name)}</span>', f'<span class="words">{escape(reason)}</span>']
        for name, reason in skipped[:_LISTED_IMAGES]
    ]
    more = f" The first {_LISTED_IMAGES} are listed." if len(skipped) > _LISTED_IMAGES else ""
    caption = f"{counted(len(skipped), 'image')} could not be used and took no part in these runs.{more}"
    table = html_table(caption, ["Image", "Reason"], rows, "Skipped images")
    return f'<section aria-labelledby="skipped"><h2 id="skipped">Skipped images</h2>\n{table}</section>\n'


def _configuration(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    first = runs[0]
    variants = [group for group in groups if group.difference]
    differences = "".join(f"<li>{escape(group.label)}: {escape(group.difference)}</li>\n" for group in variants)
    shortened = (
        f"<details><summary>What labels stand for</summary>\n<ul>{differences}</ul>\n</details>\n" if variants else ""
    )
    directory = escape(first.directory.name) + (f", the first of {len(runs)} runs" if len(runs) > 1 else "")
    return (
        '<section aria-labelledby="configuration"><h2 id="configuration">Configuration</h2>\n'
        f"{shortened}"
        f'<details><summary>config.toml of {directory}</summary>\n<pre tabindex="0"><code>{escape(first.config_text)}'
        "</code></pre></details></section>\n"
    )
