"""The report as plain semantic HTML: its head, and its sections in order."""

import re
from collections.abc import Sequence
from html import escape

from sordino.report.frame import frame
from sordino.report.groups import Group
from sordino.report.runs import Run
from sordino.report.sections.attacks import audits
from sordino.report.sections.budget import epsilon_by_round
from sordino.report.sections.clients import by_client
from sordino.report.sections.clusters import clusters
from sordino.report.sections.configuration import configuration, skipped
from sordino.report.sections.personal import personal_or_shared
from sordino.report.sections.promises import promises
from sordino.report.sections.rounds import by_round
from sordino.report.sections.tables import results
from sordino.report.sections.tradeoff import tradeoff
from sordino.report.sections.traffic import communication
from sordino.report.sections.verdict import verdict
from sordino.report.sections.worth import worth
from sordino.results import listed


def render(runs: Sequence[Run], groups: Sequence[Group], title: str) -> str:
    """Return the whole page; see `frame`."""
    sections = [
        verdict(groups),
        results(groups),
        worth(groups),
        tradeoff(groups),
        personal_or_shared(groups),
        by_round(groups),
        by_client(groups),
        clusters(groups),
        promises(groups),
        epsilon_by_round(groups),
        audits(groups),
        communication(groups),
        skipped(runs),
        configuration(runs, groups),
    ]
    versions = listed(sorted({run.summary.version for run in runs if run.summary.version}))
    shown = [section for section in sections if section]
    contents = _contents(shown)
    body = f"""<main>
<header>
<h1>{escape(title)}</h1>
<p>{_what_was_run(runs, groups)}</p>
{contents}<noscript><p>The figures need JavaScript; all tables stand without it.</p></noscript>
</header>
{"".join(shown)}</main>
<footer><p>Written by Sordino{escape(" " + versions if versions else "")}.</p></footer>
"""
    return frame(title, body)


def _contents(sections: Sequence[str]) -> str:
    """Return links to the sections, by their headings."""
    headings = [found for section in sections if (found := re.search(r'<h2 id="([^"]+)">(.*?)</h2>', section))]
    links = "".join(f'<a href="#{found[1]}">{found[2]}</a>\n' for found in headings[1:])
    return f'<nav class="contents" aria-label="Contents">\n{links}</nav>\n'


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
