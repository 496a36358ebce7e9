"""Progress, tables and lists, as the command line prints them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sordino.cli.console import harmless

if TYPE_CHECKING:
    from sordino.experiments.compare import Row
    from sordino.experiments.methods import Card
    from sordino.progress import Progress

ERRORS = Console(stderr=True)
WIDE = 130  # columns from which a list of items is shown as a table


@contextmanager
def live_progress() -> Iterator[Progress]:
    """Live bars on a terminal, a line per tenth where standard error is a file; the log goes to the same place."""
    from rich.logging import RichHandler
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    handler = RichHandler(console=ERRORS, show_path=False, show_level=False, show_time=False)
    logger = logging.getLogger("sordino")
    logger.handlers, logger.level, logger.propagate = [handler], logging.INFO, False
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Bars(*columns, console=ERRORS, disable=not ERRORS.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)
            if bars.disable and (done == total or done % max(1, total // 10) == 0):
                logger.info("%s: %d of %d %s", stage, done, total, note)

        yield draw


def print_table(rows: list[Row]) -> None:
    """Print a comparison, a line a row, and whether it was worth it; the report shows the same numbers."""
    from sordino.results import MEASURES, human_bytes, human_seconds

    measures = [measure for measure in MEASURES if any(row.accuracy[measure] for row in rows)]
    over = "seeds" if rows[0].seeds > 1 else "clients"
    audited = any(row.attack is not None for row in rows)
    poisoned = any(row.attack_success is not None for row in rows)
    # Where there are attacks to show, 80 columns have no room for bytes; the report has them.
    bytes_shown = not (audited or poisoned)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # three splits fit 80 columns
    table.add_column("algorithm")  # the one that is wrapped where not all fit
    headings = [*measures, *(["backdoor"] if poisoned else []), *(["sent up", "down"] if bytes_shown else [])]
    for heading in (*headings, "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("private", no_wrap=True)
    if audited:
        table.add_column("attack", justify="right", no_wrap=True)
    for row in rows:
        spreads = [row.accuracy[measure] for measure in measures]
        spreads += [row.attack_success] if poisoned else []
        cells = ["-" if spread is None else spread.percent() for spread in spreads]
        cells += [human_bytes(row.upload_bytes), human_bytes(row.broadcast_bytes)] if bytes_shown else []
        cells += [human_seconds(row.seconds), _privacy(row)]
        cells += ["-" if row.attack is None else f"{row.attack:.2f}"] if audited else []
        table.add_row(_text(row.label), *cells)
    console = Console()
    console.print(table)
    sent = " Sent up and down: by one client in one round." if bytes_shown else ""
    backdoor = " Backdoor: test images of other classes that an attacker's trigger turns into the attacker's target."
    attack = " Attack: area under the ROC curve of membership inference on the prompts; 0.5 is guessing."
    console.print(
        f"Accuracy in percent, mean ± sample standard deviation over {over}: local on what a client trains on, "
        f"neighbor on what others train on, overall on both.{backdoor if poisoned else ''}{sent} Seconds: of training. "
        f"Private: epsilon, or yes where nothing learned from images left a client, no where it left without noise."
        f"{attack if audited else ''}",
        highlight=False,
    )
    _print_worth(rows, console)


def _print_worth(rows: list[Row], console: Console) -> None:
    """Print what the rows are held against: the hand-written prompt, the start, the best round, the first row."""
    from sordino.experiments.variants import ignored_words
    from sordino.results import BEST_NOT_OFFERED, BEST_TOO_HIGH, points, unequal_steps

    def shown(value: float | None, form: Callable[[float], str] = points) -> str:
        return "-" if value is None else form(value)

    measure = rows[0].measure
    best = any(row.best for row in rows)
    several = any(row.difference and row.difference.low is not None for row in rows)  # two seeds at least
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"{measure} accuracy", overflow="fold")
    headings = ["hand-written", "before", "last", *(["best (round)"] if best else []), "steps", "examples"]
    for heading in [*headings, *(["to first"] if several else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        learned = row.accuracy[measure]
        cells = [row.hand_written[measure], row.before[measure], learned.mean if learned else None]
        table.add_row(
            _text(row.label),
            *map(shown, cells),
            *([str(row.best or "-")] if best else []),
            shown(row.gradient_steps, lambda value: f"{value:,.0f}"),
            shown(row.examples_seen, lambda value: f"{value:,.0f}"),
            *([row.difference.percent() if row.difference else "-"] if several else []),
        )
    first = f" To first: interval of 95% of the difference to {rows[0].label}, paired by seed." if several else ""
    steps = {row.label: (row.steps_a_round or 0, row.gradient_steps or 0.0) for row in rows}
    ignored: dict[str, tuple[str, ...]] = {}
    for row in rows:
        ignored[row.algorithm] = tuple(dict.fromkeys((*ignored.get(row.algorithm, ()), *row.ignored)))
    console.print()
    console.print(table)
    words = next((row.hand_written_prompt for row in rows if row.hand_written_prompt), "a photo of a")
    lines = [
        f"Compared by {measure} accuracy, the first column. Hand-written: the prompt '{words} CLASS'. Before: before "
        f"training. Steps and examples: of one client in the run.{first}",
        BEST_TOO_HIGH if best else None,
        BEST_NOT_OFFERED if any(row.best_withheld for row in rows) else None,
        *(f"{row.label}: {row.verdict}" for row in rows if row.verdict),
        unequal_steps(steps),
        ignored_words(ignored),
    ]
    for line in lines:
        if line:
            console.print(line, highlight=False, markup=False)


def print_items(items: Sequence[Mapping[str, str]]) -> None:
    """A table where there is room for one, else each item under its name, a line a property."""
    console = Console(highlight=False)
    if console.width >= WIDE:
        table = Table(box=None, pad_edge=False, row_styles=["", "dim"])
        for key in items[0]:
            table.add_column(key, no_wrap=key == "name", overflow="fold")
        for item in items:
            table.add_row(*(_text(value) for value in item.values()))
        console.print(table)
        return
    for item in items:
        console.print(_text(item["name"]), style="bold")
        lines = Table.grid(padding=(0, 2), pad_edge=True)
        for key, value in item.items():
            if key != "name":
                lines.add_row(f"  {key}", _text(value))
        console.print(lines)


def _text(value: str) -> Text:
    """Return a cell of a table: no markup of rich's, and nothing that a terminal obeys."""
    return Text(harmless(value))


def print_method(card: Card) -> None:
    """All about one method: its docstring, what it keeps and sends, its settings."""
    console = Console(highlight=False)
    console.print(re.sub(r"(?<=\S)\n(?=[^\s*-])", " ", card.text), markup=False)  # lines of a paragraph joined
    about = Table.grid(padding=(0, 2))
    for key in ("personal", "shared", "privacy", "needs"):
        about.add_row(key, _text(getattr(card.about, key)))
    if card.parent is not None:
        about.add_row("descends", f"from {card.parent}, so [settings.{card.parent}] also applies here")
    for content in card.discloses:
        about.add_row("leaves", _text(content))
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "default", "meaning"):
        table.add_column(heading, no_wrap=heading == "setting")
    for setting in card.settings:
        table.add_row(*(_text(part) for part in (setting.name, setting.default, setting.meaning)))
    for part in ("", about, "", table):
        console.print(part, markup=False)


def _privacy(row: Row) -> str:
    """The claim that holds for all runs of a row, in a word or two."""
    from sordino.results import rounded_up

    claim = row.claim
    if not claim.bounded:
        return "no"
    if not claim.epsilon:
        return "yes"
    return f"{'simulated ' if claim.simulated else ''}ε = {rounded_up(claim.epsilon)}"
