"""Several algorithms and seeds on one data set: every image encoded once, one table, one page."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sordino.algorithms import settings_for
from sordino.bench import Bench
from sordino.config import Experiment
from sordino.errors import RunError
from sordino.experiment import run
from sordino.files import write_atomically
from sordino.plan import planned_mechanism
from sordino.progress import Progress, silent
from sordino.report import write_report

SPLITS = ("local", "neighbor", "overall", "novel", "domain")


@dataclass(frozen=True)
class Row:
    """One algorithm's line of the table.

    Attributes:
        algorithm: its name.
        seeds: how many runs it is made of.
        accuracy: split to (mean, spread), fractions; None where the split does not apply. The spread is the standard
            deviation over seeds of the mean over clients, or, with one seed, over clients.
        upload_bytes, broadcast_bytes: of one client in one round.
        seconds: of training, mean over seeds.
        private: whether everything that left a client was noised.
    """

    algorithm: str
    seeds: int
    accuracy: dict[str, tuple[float, float] | None]
    upload_bytes: int
    broadcast_bytes: int
    seconds: float
    private: bool


def compare(
    config: Experiment,
    algorithms: Sequence[str],
    seeds: int,
    out: Path,
    resume: bool = False,
    progress: Progress = silent,
    title: str = "Sordino: comparison",
) -> list[Row]:
    """Run every algorithm with seeds `config.seed`, `config.seed` + 1, ...

    `out` gets a run directory for each, at `ALGORITHM/seed-N`, and `comparison.csv`, `comparison.json`, `report.html`.

    Raises:
        SordinoError: as `run`; before anything is trained where an algorithm's settings are bad.
    """
    plan = [
        config.model_copy(update={"algorithm": name, "seed": config.seed + offset})
        for name in algorithms
        for offset in range(seeds)
    ]
    for each in plan:
        settings_for(each.algorithm, each.settings)
    folders = [out / each.algorithm / f"seed-{each.seed}" for each in plan]
    if not resume and out.exists() and any(out.iterdir()):
        raise RunError(f"{out} exists; go on with --resume, or choose another --out")
    bench = Bench.open(config)
    if config.privacy.on:  # a mechanism that does not fit a method is told before another is trained
        for each in plan:
            planned_mechanism(each)
    summaries = []
    for each, folder in zip(plan, folders, strict=True):
        summaries.append(run(each, folder, resume, progress, bench))
    rows = [row_of([s for s in summaries if s["algorithm"] == name]) for name in algorithms]
    write_atomically(out / "comparison.csv", to_csv(rows).encode())
    write_atomically(out / "comparison.json", (json.dumps({"runs": summaries}, indent=2) + "\n").encode())
    write_report(folders, out / "report.html", title)
    return rows


def row_of(summaries: Sequence[dict[str, Any]]) -> Row:
    """Aggregate the runs of one algorithm."""
    first = summaries[0]
    return Row(
        first["algorithm"],
        len(summaries),
        {split: _mean_and_spread(summaries, split) for split in SPLITS},
        first["wire"]["upload_bytes_per_client_round"],
        first["wire"]["broadcast_bytes_per_client_round"],
        statistics.fmean(s["seconds"]["train"] for s in summaries),
        all(s["privacy"]["private"] for s in summaries),
    )


def _mean_and_spread(summaries: Sequence[dict[str, Any]], split: str) -> tuple[float, float] | None:
    means = [s["accuracy"][split] for s in summaries if s["accuracy"][split] is not None]
    if not means:
        return None
    spread_over = means
    if len(summaries) == 1:
        spread_over = [client[split] for client in summaries[0]["per_client"] if client[split] is not None]
    return statistics.fmean(means), statistics.stdev(spread_over) if len(spread_over) > 1 else 0.0


def to_csv(rows: Sequence[Row]) -> str:
    """The table as CSV: a line an algorithm, fractions in full precision, empty cells where a split does not apply."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    split_columns = [f"{split}_{what}" for split in SPLITS for what in ("mean", "spread")]
    writer.writerow(
        ["algorithm", "seeds", *split_columns, "upload_bytes", "broadcast_bytes", "train_seconds", "private"]
    )
    for row in rows:
        cells = [value for split in SPLITS for value in (row.accuracy[split] or ("", ""))]
        writer.writerow(
            [row.algorithm, row.seeds, *cells, row.upload_bytes, row.broadcast_bytes, row.seconds, row.private]
        )
    return text.getvalue()
