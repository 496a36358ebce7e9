"""The section on privacy: the statement of each group of runs, in full, and that runs spend together."""

from collections.abc import Sequence
from html import escape

from sordino.report.groups import Group
from sordino.results import listed, rounded_up


def promises(groups: Sequence[Group]) -> str:
    """Return the section, an article a group; what differs by seed is told by seed."""
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
    head = f'<h2 id="privacy">Privacy</h2>\n{_together(groups)}'
    return f'<section aria-labelledby="privacy">{head}{"".join(items)}</section>\n'


def _together(groups: Sequence[Group]) -> str:
    """Return what several private runs on a page come to; nothing for one."""
    private = [run for group in groups for run in group.runs if run.summary.privacy.private]
    spending = [run for run in private if run.summary.privacy.epsilon]
    if len(spending) < 2:
        return ""
    return (
        f"<p>Each ε is that of one run. There are {len(spending):,} here that spent any, and what runs on the same "
        "data spend adds up: <code>sordino privacy ledger RUN RUN</code> says to how much.</p>\n"
    )


def privacy_words(group: Group) -> str:
    """Return the privacy that holds for all runs of a group, as HTML."""
    claim = group.results.claim
    if not claim.bounded or claim.epsilon is None:
        return '<strong class="exposed">not private</strong>'
    words = f"{'simulated, not private' if claim.simulated else 'private'}: ε = {rounded_up(claim.epsilon)}"
    words += "" if claim.delta is None else f", δ = {rounded_up(claim.delta)}"
    return escape(words + (f" for each {listed(claim.units)}" if claim.units else ""))
