"""A run's privacy before it, on a page like that of a statement after it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import sordino
from sordino.experiments.privacy import words
from sordino.experiments.privacy.plan import Plan
from sordino.files import ANOTHER_OUT, write_atomically
from sordino.privacy.statement import WHO
from sordino.report.document import Block, Document, Section, document_page
from sordino.report.figures import color
from sordino.results import dataset_name, rounded_up


def write_page(chosen: Plan, path: Path) -> None:
    """Write a plan as one HTML page with a plot of epsilon by round.

    Raises:
        RunError: it cannot be written.
    """
    write_atomically(path, document_page(_document(chosen)).encode("utf-8", "replace"), ANOTHER_OUT)


def _document(chosen: Plan) -> Document:
    ledger, unit, config = chosen.ledger, chosen.config.privacy.unit, chosen.config
    simulated, inputs = ledger.simulated, chosen.mechanism.inputs
    noun = "person" if config.privacy.by_person else "example"
    held = sum(inputs.sizes)
    units = {noun: held, "client": len(inputs.sizes)}.get(unit)
    of_units = words.units_section(words.unit_data(ledger, unit), ledger, unit, simulated)
    sections: list[Section | None] = [
        words.who_learns_what(words.observer_data(ledger, unit), unit, simulated),
        words.meaning(ledger, unit, units, simulated),
        of_units,
        _by_round(chosen),
        {
            "title": "What is not covered",
            "blocks": [{"items": [*words.left_open(ledger), *words.LEFT_OPEN_BY_ANY_RUN]}],
        },
        words.noise(ledger, config.privacy.mechanism),
    ]
    parties = "1 party" if len(inputs.sizes) == 1 else f"{len(inputs.sizes):,} clients"
    # Where the client is the unit, how much clients hold is as private as all else.
    parties += "" if unit == "client" else f" with {held:,} {noun}s for training in all"
    return {
        "title": f"Privacy plan: {config.algorithm} on {dataset_name(config.data.source)}",
        "subtitle": f"Before the run, from its configuration: {parties}, {inputs.rounds:,} rounds.",
        "banner": words.banner(ledger, unit, planned=True),
        "exposed": words.verdict(ledger, unit) != "private",
        "lead": words.lead(ledger, unit),
        "sections": [section for section in sections if section is not None],
        "footer": f"Written by Sordino {sordino.__version__}. All bounds are rounded against the run: up.",
    }


def _by_round(chosen: Plan) -> Section | None:
    """Return the section with the curve of epsilon by round; None where there is nothing to be drawn."""
    curves: list[dict[str, Any]] = []
    same: dict[tuple[float, ...], list[str]] = {}
    for index, view in enumerate(chosen.views):
        epsilons = tuple(epsilon[index] for _, epsilon in chosen.by_round)
        if epsilons and all(map(math.isfinite, epsilons)):
            same.setdefault(epsilons, []).append(WHO[view.observer])
    if not (same and chosen.ledger.releases):
        return None
    rounds = [number for number, _ in chosen.by_round]
    for number, (epsilons, names) in enumerate(same.items()):
        curves.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": ", ".join(names),
                "x": rounds,
                "y": list(epsilons),
                "line": {"color": color(number), "width": 2},
                "meta": {"series": number},
            }
        )
    layout: dict[str, Any] = {
        "height": 300,
        "margin": {"l": 56, "r": 8, "t": 8, "b": 48},
        "legend": {"orientation": "h", "y": -0.25},
        "showlegend": True,
        "xaxis": {"title": {"text": "round"}},
        "yaxis": {"title": {"text": "ε"}, "rangemode": "tozero"},
    }
    budget = chosen.config.privacy.epsilon
    if budget is not None and math.isfinite(budget):
        line = {"color": "#888888", "dash": "dash", "width": 1}
        layout["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": budget, "y1": budget, "line": line}
        ]
    ends = "; ".join(f"{', '.join(names)}: {rounded_up(epsilons[-1])}" for epsilons, names in same.items())
    words_of_it = f"Line chart of epsilon by round. At the end: {ends}."
    figure: Block = {"figure": {"id": "epsilon", "figure": {"data": curves, "layout": layout}, "words": words_of_it}}
    rest = " The dashed line is the budget." if "shapes" in layout else ""
    texts: list[Block] = [{"text": f"ε at the end of the run, by who sees: {ends}.{rest}"}]
    formula = chosen.formula()
    if formula is not None:
        texts.append(
            {
                "text": f"The formula of public implementations would claim ε = {formula:.4g} for this noise; it does "
                "not hold."
            }
        )
    return {"title": "ε by round", "blocks": [figure, *texts]}
