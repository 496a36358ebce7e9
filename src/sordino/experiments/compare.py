"""Several algorithms and seeds on one data set: every image encoded once, one table, one page."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sordino.audit.run import FILE, audit, read_audit
from sordino.errors import RunError
from sordino.experiments.config import Experiment, parse_config, resolved
from sordino.experiments.data_digests import data_record
from sordino.experiments.data_record import check
from sordino.experiments.features import EncodedDataset
from sordino.experiments.privacy_plan import planned_mechanism
from sordino.experiments.run import run
from sordino.experiments.run_lock import all_held, held, is_empty
from sordino.experiments.toml_tables import set_key
from sordino.files import write_atomically
from sordino.progress import Progress, silent
from sordino.report import write_report

SPLITS = ("local", "neighbor", "overall", "novel", "domain")
BACKDOOR = "attack_success"


@dataclass(frozen=True)
class Variant:
    """One line of a comparison: an algorithm with its settings.

    Attributes:
        config: the experiment, with the first seed.
        variation: what is different from other lines of the same algorithm, as `key=value, ...`; may be empty.
        shadows: shadow federations for membership inference against its first run; 0 does not attack it.
    """

    config: Experiment
    variation: str = ""
    shadows: int = 0

    @property
    def folder(self) -> Path:
        """Where its runs are, below the comparison's folder."""
        return Path(self.config.algorithm, re.sub(r"[^\w.=-]+", "_", self.variation))


def grid(
    config: Experiment, algorithms: Sequence[str], vary: Mapping[str, Sequence[Any]] | None = None
) -> list[Variant]:
    """Every algorithm with every combination of the varied keys; a key that an algorithm ignores makes no new line.

    Args:
        config: what all have in common.
        algorithms: names.
        vary: dotted key to values.

    Raises:
        ConfigError: an algorithm, key or value is not allowed.
    """
    keys = list(vary or {})
    variants: list[Variant] = []
    for name in algorithms:
        seen: list[dict[str, Any]] = []
        for values in itertools.product(*(vary[key] for key in keys) if vary else ()):
            tables = config.model_dump(exclude_none=True) | {"algorithm": name}
            for key, value in zip(keys, values, strict=True):
                set_key(tables, key, value)
            varied = parse_config(tables)
            same = resolved(varied)
            if same not in seen:
                seen.append(same)
                words = ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
                variants.append(Variant(varied, words))
        if len(seen) == 1:  # nothing that varies matters to this algorithm
            variants[-1] = replace(variants[-1], variation="")
    return variants


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        algorithm: its name.
        variation: what is different from other lines of the same algorithm.
        seeds: how many runs it is made of.
        accuracy: split to (mean, spread), fractions; None where the split does not apply. The spread is the standard
            deviation over seeds of the mean over clients, or, with one seed, over clients.
        attack_success: (mean, spread) likewise, of pictures with an attacker's trigger that are taken for its target;
            None where nobody attacks.
        upload_bytes, broadcast_bytes: of one client in one round.
        seconds: of training, mean over seeds.
        private: whether everything that was learned and left a client was noised.
        simulated: whether noise was added that can be drawn again; then nothing is private.
        epsilon: the largest over seeds, of a simulation that of the noise it simulates; None where there is none.
        attack: the AUC of membership inference by LiRA against the first run; None where it was not attacked.
    """

    algorithm: str
    variation: str
    seeds: int
    accuracy: dict[str, tuple[float, float] | None]
    attack_success: tuple[float, float] | None
    upload_bytes: int
    broadcast_bytes: int
    seconds: float
    private: bool
    simulated: bool
    epsilon: float | None
    attack: float | None = None


def compare(
    variants: Sequence[Variant],
    seeds: int,
    out: Path,
    resume: bool = False,
    progress: Progress = silent,
    title: str = "Sordino: comparison",
) -> list[Row]:
    """Run every variant with `seeds` seeds, from its configuration's on.

    `out` gets a run directory for each, at `ALGORITHM/VARIATION/seed-N`, and `comparison.csv`, `comparison.json`,
    `report.html`.

    Raises:
        SordinoError: as `run`; before anything is trained where an algorithm's settings are bad.
    """
    planned = [_planned(each, seeds, out) for each in variants]
    with held(out):
        if not resume and not is_empty(out):
            raise RunError(f"{out} exists; go on with --resume, or choose another --out")
        with all_held([folder for runs in planned for folder in runs]):
            return _compare(variants, planned, out, resume, progress, title)


def _compare(
    variants: Sequence[Variant],
    planned: Sequence[Mapping[Path, Experiment]],
    out: Path,
    resume: bool,
    progress: Progress,
    title: str,
) -> list[Row]:
    """`compare`, with all its directories held."""
    dataset = EncodedDataset.open(variants[0].config)
    for each in variants:  # what does not fit is told before anything is trained
        planned_mechanism(each.config)
    if resume:
        _check_finished({folder: config for runs in planned for folder, config in runs.items()}, dataset, progress)
    rows, folders, summaries = [], [], []
    for each, runs in zip(variants, planned, strict=True):
        own = []
        for folder, config in runs.items():
            folders.append(folder)
            own.append(run(config, folder, resume, progress, dataset))
        attack = _attack(next(iter(runs)), each.shadows, resume, progress, dataset) if each.shadows else None
        rows.append(replace(row_of(own, each.variation), attack=attack))
        summaries += own
    write_tables(rows, summaries, out)
    write_report(folders, out / "report.html", title)
    return rows


def _planned(variant: Variant, seeds: int, out: Path) -> dict[Path, Experiment]:
    """The runs of a variant by their directories."""
    first = variant.config
    configs = [first.model_copy(update={"seed": first.seed + offset}) for offset in range(seeds)]
    return {out / variant.folder / f"seed-{config.seed}": config for config in configs}


def _check_finished(planned: Mapping[Path, Experiment], dataset: EncodedDataset, progress: Progress) -> None:
    """See that finished runs are of the data that the others will be of; one table must not mix two data sets.

    Raises:
        RunError: they are not.
    """
    finished = {folder: config for folder, config in planned.items() if (folder / "summary.json").exists()}
    if len(finished) == len(planned):
        return  # nothing will be trained, so the data need not be there any more
    for folder, config in finished.items():
        check(folder, data_record(dataset, dataset.task(config, progress)[0]))


def _attack(folder: Path, shadows: int, resume: bool, progress: Progress, dataset: EncodedDataset) -> float:
    if resume and (folder / FILE).exists():
        found = read_audit(folder)
    else:
        found = audit(folder, ["membership"], shadows, progress=progress, dataset=dataset)
    return float(found["attacks"]["membership"]["lira"]["auc"])


def write_tables(rows: Sequence[Row], summaries: Sequence[dict[str, Any]], out: Path) -> None:
    """`comparison.csv` and `comparison.json`."""
    write_atomically(out / "comparison.csv", to_csv(rows).encode())
    write_atomically(out / "comparison.json", (json.dumps({"runs": summaries}, indent=2) + "\n").encode())


def row_of(summaries: Sequence[dict[str, Any]], variation: str = "") -> Row:
    """Aggregate the runs of one variant."""
    first = summaries[0]
    epsilons = [s["privacy"]["epsilon"] for s in summaries]
    return Row(
        first["algorithm"],
        variation,
        len(summaries),
        {split: _mean_and_spread(summaries, split) for split in SPLITS},
        _mean_and_spread(summaries, BACKDOOR),
        first["communication"]["upload_bytes_per_client_round"],
        first["communication"]["broadcast_bytes_per_client_round"],
        statistics.fmean(s["seconds"]["train"] for s in summaries),
        all(s["privacy"]["private"] for s in summaries),
        any(s["privacy"]["simulated"] for s in summaries),
        None if None in epsilons else max(epsilons),
    )


def _mean_and_spread(summaries: Sequence[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """Of an accuracy, or of the attack's success."""
    found = [(s["accuracy"] | {BACKDOOR: s.get(BACKDOOR)})[name] for s in summaries]
    means = [value for value in found if value is not None]
    if not means:
        return None
    spread_over = means
    if len(summaries) == 1:
        spread_over = [client[name] for client in summaries[0]["per_client"] if client[name] is not None]
    return statistics.fmean(means), statistics.stdev(spread_over) if len(spread_over) > 1 else 0.0


def to_csv(rows: Sequence[Row]) -> str:
    """The table as CSV: a line an algorithm, fractions in full precision, empty cells where a split does not apply."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    split_columns = [f"{split}_{what}" for split in (*SPLITS, BACKDOOR) for what in ("mean", "spread")]
    writer.writerow(
        [
            "algorithm",
            "variation",
            "seeds",
            *split_columns,
            "upload_bytes",
            "broadcast_bytes",
            "train_seconds",
            "private",
            "simulated",
            "epsilon",
            "membership_auc",
        ]
    )
    for row in rows:
        measured = [*(row.accuracy[split] for split in SPLITS), row.attack_success]
        cells = [value for pair in measured for value in (pair or ("", ""))]
        writer.writerow(
            [
                row.algorithm,
                row.variation,
                row.seeds,
                *cells,
                row.upload_bytes,
                row.broadcast_bytes,
                row.seconds,
                row.private,
                row.simulated,
                "" if row.epsilon is None else row.epsilon,
                "" if row.attack is None else row.attack,
            ]
        )
    return text.getvalue()
