"""The section on epsilon by round: what was spent when, and what is left of the budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import cast

from sordino.privacy import accounting
from sordino.privacy.ledger import ALL_CLIENTS, OBSERVERS, Ledger, Release, Unit
from sordino.report.figures import color, symbol
from sordino.report.groups import Group
from sordino.report.markup import NONE, Figure, html_table, keys, place, plain
from sordino.report.runs import Run
from sordino.results import rounded_up

POINTS = 8  # of a curve, at most, after round 0
COARSENESS = 30.0  # of the bounds before the last round: three digits, in a thirtieth of the time
SLACK = 1e-6  # of a budget's epsilon, by which accountants round


@dataclass(frozen=True)
class Spending:
    """The privacy that a run spent by round, against the untrusted observer that learned most.

    Attributes:
        points: (round, epsilon), ascending in both; the last is the ledger's.
        delta: at which epsilon is stated.
        asked: the budget; None if none was set.
        releases: number of releases of the party that spent most.
        once: everything was released before the first round, and rounds cost nothing.
        spread: some releases are not in every round, and are drawn as if spread evenly over the rounds.
    """

    points: tuple[tuple[int, float], ...]
    delta: float
    asked: float | None
    releases: int
    once: bool
    spread: bool

    @property
    def spent(self) -> float:
        """Epsilon at the end."""
        return self.points[-1][1]

    @property
    def left(self) -> float | None:
        """Return the rest of the budget, 0 if less than accountants round; None without a finite one."""
        if self.asked is None or math.isinf(self.asked):
            return None
        left = self.asked - self.spent
        return 0.0 if abs(left) < SLACK else left


def epsilon_by_round(groups: Sequence[Group]) -> str:
    """Return the section; nothing if no run has a finite epsilon and the ledger to compute it from."""
    spendings = [(index, group, found) for index, group in enumerate(groups) if (found := _of_group(group))]
    if not spendings:
        return ""
    rows = [
        [
            escape(group.label) + (" <small>(simulated)</small>" if group.results.claim.simulated else ""),
            NONE if of.asked is None else "∞" if math.isinf(of.asked) else f"{of.asked:g}",
            rounded_up(of.spent),
            NONE if of.left is None else _left(of.left),
            rounded_up(of.delta),
            "once, before the first round" if of.once else f"{of.releases:,} times over {of.points[-1][0]:,} rounds",
        ]
        for _, group, of in spendings
    ]
    table = html_table(
        "Privacy budget by algorithm, of the run and the client that spent most.",
        ["Algorithm", "Budget, ε", "Spent, ε", "Left, ε", "At δ", "Released with noise"],
        [[*row[:-1], f'<span class="words">{row[-1]}</span>'] for row in rows],
        "Privacy budget by algorithm",
    )
    once = [group.label for _, group, of in spendings if of.once]
    words = (
        "<p>Where noise is released once, before the first round, the rounds after it are post-processing and cost "
        "nothing.</p>\n"
        if once
        else ""
    )
    return (
        '<section aria-labelledby="budget"><h2 id="budget">Epsilon by round</h2>\n'
        f"{_figure([entry for entry in spendings if not entry[2].once])}{words}{table}</section>\n"
    )


def spending(run: Run) -> Spending | None:
    """Return what a run spent by round, from its ledger; None without a ledger or without a finite epsilon.

    Releases are in rounds as far as the ledger tells: it has their number, and not when each was made. If every client
    takes part in every round, each round has the same; else a client's are spread evenly, as its budget was.
    """
    claimed, rounds = run.summary.privacy, run.summary.rounds
    if not claimed.epsilon or math.isinf(claimed.epsilon) or claimed.unit is None:
        return None
    ledger = run.ledger()
    if ledger is None:
        return None
    unit = cast("Unit", claimed.unit)
    seen = [
        accounting.spent(ledger, observer, unit, coarseness=COARSENESS)
        for observer in OBSERVERS
        if observer not in ledger.trusted
    ]
    worst = max(seen, key=lambda view: view.epsilon, default=None)
    if worst is None or worst.party is None:
        return None
    mine = tuple(release for release in ledger.releases if release.party in (worst.party, ALL_CLIENTS))
    once = not rounds or all(release.name for release in mine)
    counts = [0] if once else sorted({max(1, round(rounds * step / POINTS)) for step in range(1, POINTS + 1)})
    points: list[tuple[int, float]] = [] if once else [(0, _at(ledger, mine, worst, 0, rounds))]
    for number in counts:
        epsilon = claimed.epsilon if number == counts[-1] else _at(ledger, mine, worst, number, rounds)
        # Coarse bounds are a little too high.
        before = points[-1][1] if points else 0.0
        points.append((number, min(max(epsilon, before), claimed.epsilon)))
    asked = run.config.get("privacy", {}).get("epsilon")
    everybody = run.config.get("runtime", {}).get("participation", 1.0) == 1.0
    by_round = [release for release in mine if not release.name]
    spread = any(
        release.steps % max(rounds, 1) or not (everybody or release.party == ALL_CLIENTS) for release in by_round
    )
    return Spending(
        points=tuple(points),
        delta=worst.delta,
        asked=None if asked is None else float(asked),
        releases=sum(release.steps for release in mine),
        once=once,
        spread=spread and not once,
    )


def _at(ledger: Ledger, mine: Sequence[Release], worst: accounting.Spent, number: int, rounds: int) -> float:
    """Return epsilon after a number of rounds, of the party that has spent most at the end."""
    so_far = [
        release if release.name else replace(release, steps=math.ceil(release.steps * number / rounds))
        for release in mine
    ]
    partial = replace(ledger, releases=tuple(release for release in so_far if release.steps))
    return accounting.spent(partial, worst.observer, worst.unit, coarseness=COARSENESS).epsilon


def _of_group(group: Group) -> Spending | None:
    """Return the spending of the run with the largest epsilon."""
    run = max(group.runs, key=lambda candidate: candidate.summary.privacy.epsilon or 0.0)
    return spending(run)


def _left(left: float) -> str:
    return (
        f'<strong class="exposed">{left:.3g}, over the budget</strong>'
        if left < 0
        else "under 0.001"
        if 0 < left < 0.001
        else f"{left:.3g}"
    )


def _figure(spendings: Sequence[tuple[int, Group, Spending]]) -> str:
    if not spendings:
        return ""
    legend = keys("Algorithm", [(symbol(index), color(index), group.label) for index, group, _ in spendings])
    ends = "; ".join(
        f"{group.label} {rounded_up(of.spent)} after round {of.points[-1][0]}" for _, group, of in spendings
    )
    spread = (
        " A client that sits out rounds is drawn as if its releases were spread evenly over them."
        if any(of.spread for _, _, of in spendings)
        else ""
    )
    budget = " Dashed lines are budgets." if any(_budget(of) for _, _, of in spendings) else ""
    return (
        f"<figure>\n{legend}{place('budget-figure', budget_figure(spendings), f'Epsilon by round: {ends}.')}"
        f"<figcaption>Privacy loss so far, of the client that has lost most, from the ledger; it only grows."
        f"{budget}{spread}</figcaption>\n</figure>\n"
    )


def budget_figure(spendings: Sequence[tuple[int, Group, Spending]]) -> Figure:
    """Return a line a group: epsilon by round, and its budget as a dashed line."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(group.label),
            "x": [number for number, _ in of.points],
            "y": [epsilon for _, epsilon in of.points],
            "line": {"color": color(index), "width": 2},
            "marker": {"symbol": symbol(index), "size": 7},
            "hovertemplate": "%{y:.3g}",
            "meta": {"series": index},
        }
        for index, group, of in spendings
    ]
    budgets = {budget: index for index, _, of in spendings if (budget := _budget(of)) is not None}
    shapes = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": budget,
            "y1": budget,
            "line": {"color": color(index), "dash": "dash", "width": 1},
        }
        for budget, index in budgets.items()
    ]
    layout = {
        "height": 320,
        "margin": {"l": 48, "r": 8, "t": 8, "b": 48},
        "showlegend": False,
        "hovermode": "x unified",
        "hoverlabel": {"namelength": -1},
        "shapes": shapes,
        "xaxis": {"title": {"text": "Round"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "ε"}, "rangemode": "tozero"},
    }
    return {"data": data, "layout": layout}


def _budget(of: Spending) -> float | None:
    return of.asked if of.asked is not None and math.isfinite(of.asked) else None
