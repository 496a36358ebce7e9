"""Run several algorithms and seeds on one data set: every image is encoded once, for one table and one page."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sordino.errors import ConfigError
from sordino.experiments.config import Experiment, resolved
from sordino.experiments.data_digests import data_record
from sordino.experiments.data_record import check
from sordino.experiments.features import EncodedDataset
from sordino.experiments.privacy.plan import planned_mechanism
from sordino.experiments.run import require_same, run
from sordino.experiments.run_lock import all_held, held, lent, require_unused
from sordino.experiments.started import COMPARISON, Line, begin_lines, require_lines, was_begun
from sordino.experiments.tracking import LINES
from sordino.experiments.variants import Variant, fairness_notes, grid, ignored_settings, label
from sordino.files import write_atomically
from sordino.progress import Progress, log, silent
from sordino.report import write_report
from sordino.results import FILE, MEASURES, Best, Claim, Interval, Measure, Results, Spread, Summary, verdict
from sordino.runtime.side_by_side import Check, side_by_side

__all__ = ["Attack", "Row", "Variant", "compare", "grid", "row_of", "to_csv", "write_tables"]

BACKDOOR = "attack_success"  # its columns in the CSV

# Attacks a finished run by membership inference, given its directory, the number of shadow federations, whether an
# earlier attack may be read instead, the progress, and the data; returns the AUC. It is handed in, as this module is
# below `sordino.audit`, where it is `membership_auc`.
Attack = Callable[[Path, int, bool, Progress, EncodedDataset], float]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        algorithm: its name.
        variation: the settings that differ from other lines of the algorithm.
        seeds: the number of runs.
        accuracy: a spread of fractions for each measure; None if the measure does not apply. See `sordino.results`.
        attack_success: the spread of the fraction of images with an attacker's trigger that are taken for its target;
            None if nobody attacks.
        upload_bytes, broadcast_bytes: of one client in one round, means over seeds.
        seconds: of training, mean over seeds.
        claim: the privacy that holds for all runs.
        measure: the accuracy by which lines are compared, see `Results.leading`.
        before: accuracy before training by measure, the mean over runs; None if it is not known.
        hand_written: the same of the hand-written prompt.
        hand_written_prompt: its words before the class name; None if they are not known.
        gain: of the leading accuracy over the hand-written prompt's; None if nothing was learned.
        verdict: whether there is one, in a line.
        difference: of the leading accuracy to the first line's, paired by seed; None for the first line.
        best: the best evaluated rounds; None if they are not offered.
        best_withheld: they are not offered because of a privacy mechanism.
        steps_a_round: gradient steps of a client in a round.
        gradient_steps, examples_seen: of a client in a run; see `Effort`.
        ignored: keys straight under `[settings]` that the method does not have.
        attack: the AUC of membership inference by LiRA against the first run; None if it was not attacked.
    """

    algorithm: str
    variation: str
    seeds: int
    accuracy: dict[Measure, Spread | None]
    attack_success: Spread | None
    upload_bytes: float
    broadcast_bytes: float
    seconds: float
    claim: Claim
    measure: Measure
    before: dict[Measure, float | None]
    hand_written: dict[Measure, float | None]
    hand_written_prompt: str | None
    gain: Interval | None
    verdict: str | None
    difference: Interval | None
    best: Best | None
    best_withheld: bool
    steps_a_round: int | None
    gradient_steps: float | None
    examples_seen: float | None
    ignored: tuple[str, ...] = ()
    attack: float | None = None

    @property
    def label(self) -> str:
        """The algorithm, and what varies by the last part of its name."""
        return label(self.algorithm, self.variation)

    @property
    def private(self) -> bool:
        """Everything that was learned from images and left a client was noised, in every run."""
        return self.claim.private

    @property
    def simulated(self) -> bool:
        """Noise was added that can be drawn again; then nothing is private."""
        return self.claim.simulated

    @property
    def epsilon(self) -> float | None:
        """The largest over seeds, of a simulation that of the noise it simulates; None if a run has none."""
        return self.claim.epsilon


def compare(
    variants: Sequence[Variant],
    seeds: int,
    out: Path,
    resume: bool = False,
    progress: Progress = silent,
    title: str = "Sordino: comparison",
    attack: Attack | None = None,
    jobs: int = 1,
) -> list[Row]:
    """Run every variant with `seeds` seeds, counted from its configuration's.

    `out` gets a run directory for each, at `ALGORITHM/VARIATION/seed-N`, and `lines.json`, `comparison.csv`,
    `comparison.json`, `report.html`.

    Args:
        variants: at least one; their data and encoder are the first one's.
        seeds: runs of each variant.
        out: the comparison's folder.
        resume: go on after the last checkpoints in `out`.
        progress: is told how far the runs are.
        title: of the report.
        attack: attacks the first run of each variant that has `shadows`.
        jobs: runs at once, each with its share of the cores; their seconds are those that they took beside each other.

    Raises:
        SordinoError: as `run`; before anything is trained if an algorithm's settings are bad.
        RunError: a line or seed that was started is missing, or `out` holds something else.
        ConfigError: a variant has `shadows`, and no `attack` is given; two have a run in common, or its folder.
    """
    planned = [_planned(variant, seeds, out) for variant in variants]
    _require_distinct(variants, planned)
    if attack is None:
        for variant in variants:
            if variant.shadows:
                raise ConfigError("shadows", variant.shadows, "needs compare(..., attack=membership_auc)")
    lines = [
        Line(variant.label, variant.folder.as_posix(), tuple(config.seed for config in runs.values()))
        for variant, runs in zip(variants, planned, strict=True)
    ]
    folders = [folder for runs in planned for folder in runs]
    if resume:  # before the lock is written
        was_begun(out, COMPARISON)
    with held(out):
        if resume:
            require_lines(out, lines)
        else:
            require_unused(out)
        # What is refused up to here leaves no folder behind.
        dataset = _opened(variants, planned, resume, progress)
        new = begin_lines(out, lines)
        try:
            with all_held(folders):
                return _compare(variants, planned, out, resume, progress, title, attack, jobs, dataset)
        finally:
            if new and not any(folder.exists() for folder in folders):  # the first run was refused
                (out / LINES).unlink()


def _opened(
    variants: Sequence[Variant], planned: Sequence[Mapping[Path, Experiment]], resume: bool, progress: Progress
) -> EncodedDataset:
    """Return the data set and encoder of all lines, which are checked before anything is written."""
    own = variants[0].config.encoder
    for variant in variants:
        if variant.config.encoder != own:
            raise ConfigError(
                "encoder",
                variant.variation or variant.label,
                "lines of a comparison share one encoder; run each by itself",
            )
    dataset = EncodedDataset.open(variants[0].config)
    for variant in variants:  # settings that do not fit are refused before anything is trained
        planned_mechanism(variant.config)
    if resume:
        runs = {folder: config for own_runs in planned for folder, config in own_runs.items()}
        for folder, config in runs.items():
            require_same(config, folder)
        _check_finished(runs, dataset, progress)
    return dataset


def _compare(
    variants: Sequence[Variant],
    planned: Sequence[Mapping[Path, Experiment]],
    out: Path,
    resume: bool,
    progress: Progress,
    title: str,
    attack: Attack | None,
    jobs: int,
    dataset: EncodedDataset,
) -> list[Row]:
    """Compare with all directories held."""
    notes = fairness_notes(variants)
    for note in notes:
        log.warning("%s", note)
    trained = _trained(variants, planned, resume, progress, dataset, jobs)
    rows: list[Row] = []
    first: Results | None = None
    for variant, runs in zip(variants, planned, strict=True):
        results = [trained[folder] for folder in runs]
        row = replace(row_of(results, variant.variation, first), ignored=ignored_settings(variant.config))
        first = first or Results(tuple(results))
        if attack is not None and variant.shadows:
            auc = attack(next(iter(runs)), variant.shadows, resume, progress, dataset)
            row = replace(row, attack=auc)
        rows.append(row)
    write_tables(rows, trained, out, notes)
    write_report(list(trained), out / "report.html", title)
    return rows


def _trained(
    variants: Sequence[Variant],
    planned: Sequence[Mapping[Path, Experiment]],
    resume: bool,
    progress: Progress,
    dataset: EncodedDataset,
    jobs: int,
) -> dict[Path, Summary]:
    """Return the summaries of all runs by their directories, in the order of the comparison."""
    one = threading.Lock()  # one run at a time tells how far it is

    def task(folder: Path, config: Experiment, variation: str) -> Callable[[Check], Summary]:
        def train(check: Check) -> Summary:
            def tell(stage: str, done: int, total: int, note: str = "") -> None:
                check()
                with one:
                    progress(f"{stage}, {variation}" if variation and jobs > 1 else stage, done, total, note)

            with lent(folder):
                return run(config, folder, resume, tell, dataset)

        return train

    lines = [
        (folder, config, variant.variation)
        for variant, runs in zip(variants, planned, strict=True)
        for folder, config in runs.items()
    ]
    unfinished = [config for folder, config, _ in lines if not (folder / FILE).exists()]
    if jobs > 1 and unfinished:
        dataset.encode_ahead(unfinished[0], progress)  # which uses all cores
    summaries = side_by_side([task(*line) for line in lines], jobs)
    return {folder: summary for (folder, *_), summary in zip(lines, summaries, strict=True)}


def _planned(variant: Variant, seeds: int, out: Path) -> dict[Path, Experiment]:
    """Return the runs of a variant by their directories."""
    first = variant.config
    configs = [first.model_copy(update={"seed": first.seed + offset}) for offset in range(seeds)]
    return {out / variant.folder / f"seed-{config.seed}": config for config in configs}


def _require_distinct(variants: Sequence[Variant], planned: Sequence[Mapping[Path, Experiment]]) -> None:
    """Check, before anything is trained, that no run is there twice and none has the folder of another.

    Raises:
        ConfigError: two lines share one.
    """
    folders: dict[Path, Variant] = {}
    runs: dict[str, Variant] = {}
    for variant, own in zip(variants, planned, strict=True):
        for folder, config in own.items():
            same = runs.setdefault(repr(resolved(config)), variant)
            if same is not variant:
                remedy = f"has the run of {same.label!r} with seed {config.seed} again; name each once"
                raise ConfigError("line", variant.label, remedy)
            other = folders.setdefault(folder, variant)
            if other is not variant:
                remedy = f"would have the folder of {other.label!r}, {folder}; compare the two apart"
                raise ConfigError("line", variant.label, remedy)


def _check_finished(planned: Mapping[Path, Experiment], dataset: EncodedDataset, progress: Progress) -> None:
    """Check that finished runs are of the data that the others will be of; one table must not mix two data sets.

    Raises:
        RunError: they are not.
    """
    finished = {folder: config for folder, config in planned.items() if (folder / FILE).exists()}
    if len(finished) == len(planned):
        return  # nothing will be trained, so the data need not exist any more
    for folder, config in finished.items():
        task, _ = dataset.task(config, progress)
        check(folder, data_record(dataset, task, dataset.public(config, task)))


def write_tables(rows: Sequence[Row], runs: Mapping[Path, Summary], out: Path, notes: Sequence[str]) -> None:
    """Write `comparison.csv`, and `comparison.json` with the runs in the order of the comparison."""
    content = {
        "runs": [summary.as_dict() for summary in runs.values()],
        "folders": [folder.relative_to(out).as_posix() for folder in runs],
        "verdicts": [{"line": row.label, "verdict": row.verdict} for row in rows],
        "notes": list(notes),
    }
    write_atomically(out / "comparison.csv", to_csv(rows).encode())
    write_atomically(out / "comparison.json", (json.dumps(content, indent=2) + "\n").encode())


def row_of(summaries: Sequence[Summary], variation: str = "", first: Results | None = None) -> Row:
    """Aggregate the runs of one variant; `first` are the runs of the comparison's first one, None for that itself."""
    results = Results(tuple(summaries))
    measure = results.leading
    return Row(
        algorithm=summaries[0].algorithm,
        variation=variation,
        seeds=len(summaries),
        accuracy={measure: results.accuracy(measure) for measure in MEASURES},
        attack_success=results.attack_success(),
        upload_bytes=results.mean_bytes("upload_bytes_per_client_round"),
        broadcast_bytes=results.mean_bytes("broadcast_bytes_per_client_round"),
        seconds=results.seconds,
        claim=results.claim,
        measure=measure,
        before={name: results.before(name) for name in MEASURES},
        hand_written={name: results.hand_written(name) for name in MEASURES},
        hand_written_prompt=results.hand_written_prompt,
        gain=results.gain(measure),
        verdict=verdict(results),
        difference=results.difference(first, measure) if first else None,
        best=results.best,
        best_withheld=results.best_withheld,
        steps_a_round=results.steps_a_round,
        gradient_steps=results.gradient_steps,
        examples_seen=results.examples_seen,
    )


def to_csv(rows: Sequence[Row]) -> str:
    """Return the table as CSV, a line a row: fractions in full precision, empty cells for values that do not exist."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "algorithm",
            "variation",
            "seeds",
            *(f"{name}_{part}" for name in (*MEASURES, BACKDOOR) for part in ("mean", "spread")),
            "upload_bytes",
            "broadcast_bytes",
            "train_seconds",
            "private",
            "simulated",
            "epsilon",
            "membership_auc",
            *(f"{name}_{what}" for name in MEASURES for what in ("before", "hand_written")),
            "compared_by",
            *(f"{what}_{part}" for what in ("gain", "difference_to_first") for part in Interval._fields),
            "best_mean",
            "best_rounds",
            "steps_a_round",
            "gradient_steps",
            "examples_seen",
        ]
    )
    for row in rows:
        unknown = (None,) * len(Interval._fields)
        spreads = [*(row.accuracy[measure] for measure in MEASURES), row.attack_success]
        writer.writerow(
            [
                row.algorithm,
                row.variation,
                row.seeds,
                *(value for spread in spreads for value in (spread or (None, None))),
                row.upload_bytes,
                row.broadcast_bytes,
                row.seconds,
                row.private,
                row.simulated,
                row.epsilon,
                row.attack,
                *(value for name in MEASURES for value in (row.before[name], row.hand_written[name])),
                row.measure,
                *(row.gain or unknown),
                *(row.difference or unknown),
                row.best.accuracy if row.best else None,
                " ".join(map(str, row.best.rounds)) if row.best else None,
                row.steps_a_round,
                row.gradient_steps,
                row.examples_seen,
            ]
        )  # None becomes an empty cell
    return text.getvalue()
