"""The one path from a configuration to a finished run directory."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sordino
from sordino.algorithms import algorithm, settings_for
from sordino.errors import RunError
from sordino.experiments.config import Experiment, kept_methods, resolved
from sordino.experiments.data_digests import data_record, party_digests
from sordino.experiments.data_record import pin
from sordino.experiments.features import EncodedDataset
from sordino.experiments.release_file import FILE as RELEASE
from sordino.experiments.release_file import ReleaseFile, with_release
from sordino.experiments.run_folder import Metrics, finished, was_started
from sordino.experiments.run_folder import start as start_folder
from sordino.experiments.run_lock import held
from sordino.experiments.saved_prompts import save_prompts
from sordino.experiments.started import RUN, started_with, was_begun
from sordino.experiments.tracking import TABLE as TRACKING
from sordino.experiments.tracking import require_tracker, tracked
from sordino.experiments.unread_keys import warn_of_unread
from sordino.experiments.yardsticks import Yardstick, accuracy_before, best_round, effort, evaluation_of
from sordino.files import write_atomically
from sordino.privacy.ledger import Ledger
from sordino.privacy.statement import as_summary
from sordino.progress import Progress, log, silent
from sordino.randomness import new_nonce
from sordino.report import write_report
from sordino.results import (
    Accuracy,
    ClientResult,
    Communication,
    Copies,
    Durations,
    Images,
    PassedOver,
    Privacy,
    SkippedImage,
    Summary,
)
from sordino.runtime import checkpoint
from sordino.runtime.evaluate import Evaluation, Scores
from sordino.runtime.facts import warn_of_unused
from sordino.runtime.local import LocalRuntime, RoundError, Training
from sordino.runtime.records import RoundRecord
from sordino.tasks.splits import Task

LEDGER = "ledger.json"
COUNTED = ("seconds", "evaluate_seconds", "upload_bytes", "broadcast_bytes", "participants")  # of a line of metrics
DISTANCES = "distances"  # folder: what a server that clusters on shares saw, a file a round


def run(
    config: Experiment,
    out: Path,
    resume: bool = False,
    progress: Progress = silent,
    dataset: EncodedDataset | None = None,
) -> Summary:
    """Train, evaluate and write a run directory.

    Args:
        config: what to do.
        out: the run directory; must not exist, unless `resume`.
        resume: go on after the last checkpoint in `out`.
        progress: is told how far the run is.
        dataset: data and encoder, where several runs share them.

    Returns:
        The summary, which `summary.json` holds too.

    Raises:
        SordinoError: before anything is trained where input is bad; later where the disk is full or training diverges.
    """
    require_tracker(config.tracking)
    if resume:  # before the lock is written
        was_begun(out, RUN)
    with held(out):
        config, started = _checked(config, out, resume)
        summary = finished(out, Summary.from_json) if started else None
        trained = summary is None
        if summary is None:
            summary = _run(config, resolved(config), out, resume, progress, dataset)
        if trained or not (out / "report.html").exists():
            write_report([out], out / "report.html", f"Sordino: {config.algorithm} on {config.data.source}")
    return summary


def require_same(config: Experiment, out: Path) -> None:
    """Check that a run may be started in a directory, or go on there.

    Raises:
        RunError: it was started with another configuration, or holds something else.
    """
    _checked(config, out, resume=True)


def _checked(config: Experiment, out: Path, resume: bool) -> tuple[Experiment, bool]:
    """Return the configuration with everything that the directory adds to it, and whether it was started with that."""
    config = _with_nonce(with_release(config)[0], out)
    return config, was_started(out, resolved(config), resume, (TRACKING,))


def _with_nonce(config: Experiment, out: Path) -> Experiment:
    """The configuration with the nonce that a simulation was started with, or with a new one."""
    if not (config.privacy.simulation and config.privacy.on and config.privacy.nonce is None):
        return config
    nonce = started_with(out).get("privacy", {}).get("nonce") or new_nonce()
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"nonce": nonce})})


def _run(
    config: Experiment,
    tables: dict[str, Any],
    out: Path,
    resume: bool,
    progress: Progress,
    shared: EncodedDataset | None,
) -> Summary:
    dataset = shared or EncodedDataset.open(config)
    task, encoding = dataset.task(config, progress)
    started = time.monotonic()
    runtime, evaluation = assemble(config, dataset, task)
    if shared is None:  # of several runs, who starts them says it once
        warn_of_unread(config)
    warn_of_unused(runtime.algorithm, runtime.settings, runtime.mechanism)
    yardstick = Yardstick.of(config, dataset, task, progress)
    # Before config.toml, so that where there is one there is the other.
    pin(out, data_record(dataset, task, dataset.public(config, task)))
    start_folder(out, tables, kept_methods(config))
    start, released = _released(runtime, out, with_release(config)[1])
    training = _resumed(runtime, start, out) if resume else start
    metrics = Metrics(out / "metrics.jsonl", training.round, numbers=COUNTED)
    with tracked(config.tracking, out, metrics):
        training, scores = _train(config, runtime, evaluation, training, metrics, out, progress, released)
    ledger = training.ledger
    write_atomically(out / LEDGER, ledger.to_json().encode(), private=True)
    privacy = as_summary(ledger, config.privacy.unit)
    prompts = runtime.prompts(training)
    words = tuple(runtime.model.text(prompts))
    save_prompts(out / "prompts", config, dataset.encoder, task.class_names, prompts, privacy, words=words)
    summary = Summary(
        algorithm=config.algorithm,
        encoder=dataset.encoder.name,
        dataset=config.data.source,
        clients=task.clients,
        rounds=training.round,
        seed=config.seed,
        accuracy=Accuracy(**scores.means()),
        attack_success=scores.mean_attack_success(),
        per_client=_per_client(task, scores),
        privacy=Privacy(
            **privacy,
            rounds_unpaid=runtime.rounds - training.round,
        ),
        communication=_communication(metrics, _handed_over(runtime, dataset, task)),
        seconds=Durations(
            encode=encoding.seconds,
            train=metrics.seconds("seconds"),
            evaluate=metrics.seconds("evaluate_seconds"),
            total=encoding.seconds + time.monotonic() - started,
        ),
        images=Images(
            encoded=encoding.encoded,
            cached=encoding.cached,
            skipped=tuple(SkippedImage(**asdict(image)) for image in dataset.skipped),
            passed_over=tuple(PassedOver(**asdict(files)) for files in dataset.images.passed_over),
            copies=Copies(**dataset.copies(task).as_summary()),
        ),
        before=accuracy_before(metrics.lines),
        hand_written=yardstick.against(scores) if yardstick else None,
        best=best_round(metrics.lines, config.privacy.on),
        effort=effort(runtime, training.round),
        words=words,
        version=sordino.__version__,
    )
    summary.write(out)  # at the very end, as it marks the run as finished
    return summary


def assemble(config: Experiment, dataset: EncodedDataset, task: Task) -> tuple[LocalRuntime, Evaluation]:
    """The federation of a configuration, ready to be trained, and the splits that it is evaluated on.

    Raises:
        ConfigError: the method's settings or the privacy mechanism do not fit.
    """
    config, earlier = with_release(config)
    device, labels = dataset.encoder.device, torch.from_numpy(task.labels)
    model = dataset.model(config, task.class_names)
    features = dataset.tables[model.reads].features
    evaluation = evaluation_of(dataset, task, lambda names: dataset.model(config, names))
    held = np.concatenate(task.train)
    ends = np.cumsum([len(rows) for rows in task.train])
    persons = dataset.images.persons
    public = dataset.public(config, task)
    runtime = LocalRuntime(
        algorithm(config.algorithm),
        settings_for(config.algorithm, config.settings),
        model,
        features[torch.from_numpy(held)].to(device),
        labels[torch.from_numpy(held)].to(device),
        [range(end - len(rows), end) for rows, end in zip(task.train, ends, strict=True)],
        config.rounds,
        config.runtime,
        config.seed,
        config.privacy,
        dict.fromkeys(range(task.attackers), config.poisoning.boost) if config.poisoning else {},
        party_digests(dataset, task),
        None if persons is None else persons[held].tolist(),
        None if earlier is None else earlier.noise,
        None if public is None else public.features.to(device),
    )
    return runtime, evaluation


def _released(runtime: LocalRuntime, out: Path, earlier: ReleaseFile | None) -> tuple[Training, RoundRecord]:
    """The start after the release of class statistics, if there is one, and what it sent.

    What was released is written before anything is made of it, so that a restart does not release again.
    """
    start, nothing = runtime.start(), RoundRecord(0, 0.0, 0, 0, 0)
    if not runtime.releases_statistics:
        return start, nothing
    file = out / RELEASE
    record = ReleaseFile.load(file) if file.exists() else earlier
    if record is not None:
        record.check(runtime)
        if record.path != file:
            replace(record, path=file).save()
        return runtime.with_release(start, record.tensors, record.releases), nothing
    # A release that failed may have left some clients: it stays counted.
    before = start.ledger
    if (out / LEDGER).exists():
        before = replace(Ledger.from_json((out / LEDGER).read_bytes(), out / LEDGER), run=start.ledger.run)
    if not runtime.pays_for_release(start.with_ledger(before)):
        raise RunError(
            f"{out}: class statistics that were released before, of which nothing was kept, have spent the budget; "
            "start anew in another directory, and count both runs together (sordino privacy ledger)"
        )
    try:
        start, sent = runtime.release(start)
    except RoundError as error:
        write_atomically(out / LEDGER, before.add(error.ledger.releases).to_json().encode(), private=True)
        raise
    if start.ledger.releases:  # without noise there is nothing that must not happen twice
        ReleaseFile.of(runtime, start, file).save()
        start = start.with_ledger(before.add(start.ledger.releases))
        write_atomically(out / LEDGER, start.ledger.to_json().encode(), private=True)
    return start, sent


def _resumed(runtime: LocalRuntime, start: Training, out: Path) -> Training:
    """Where an interrupted run stands.

    Rounds after the last checkpoint are run again. A simulation releases the same numbers again, which tells nothing
    new. Noise from the operating system is new each time, so what was released stays counted.
    """
    training = checkpoint.load(out / "checkpoint", start) or start
    if runtime.privacy.simulation:
        return training
    ledger = Ledger.from_json((out / LEDGER).read_bytes(), out / LEDGER) if (out / LEDGER).exists() else training.ledger
    # A process that died as soon as it had the release did not enter it beside one that had failed before.
    ledger = ledger.add(release for release in start.ledger.releases if release.name)
    training = training.with_ledger(ledger)
    if training.round == runtime.rounds or not runtime.within_budget(training):
        return training  # nothing more is released
    # A new name from here on: of two copies of a directory that both go on, the releases differ.
    return training.with_ledger(replace(ledger, run=start.ledger.run))


def _train(
    config: Experiment,
    runtime: LocalRuntime,
    evaluation: Evaluation,
    training: Training,
    metrics: Metrics,
    out: Path,
    progress: Progress,
    released: RoundRecord,
) -> tuple[Training, Scores]:
    """All remaining rounds; a line of metrics for each, and for the start with its release."""
    scores: Scores | None = None
    if training.round == 0 and not metrics.lines:
        scores = _record(metrics, released, 0.0, runtime, evaluation, training)
    unlimited = runtime.pays_for_all(training)
    while training.round < runtime.rounds:
        if not (unlimited or runtime.within_budget(training)):
            log.warning("the privacy budget is spent after round %d of %d", training.round, runtime.rounds)
            break
        started = time.monotonic()
        try:
            training, record = runtime.round(training)
        except RoundError as error:  # its round is lost, and what it released is not
            write_atomically(out / LEDGER, error.ledger.to_json().encode(), private=True)
            raise
        if training.ledger.releases:  # before anything else of this round is written, so that nothing goes uncounted
            write_atomically(out / LEDGER, training.ledger.to_json().encode(), private=True)
        if record.protocol and record.protocol.opened:
            content = json.dumps(record.protocol.distances()).encode()
            write_atomically(out / DISTANCES / f"round-{training.round:06d}.json", content, private=True)
        last = training.round == runtime.rounds
        due = last or training.round % config.runtime.evaluate_every == 0
        scores = _record(metrics, record, time.monotonic() - started, runtime, evaluation if due else None, training)
        if training.round % config.runtime.checkpoint_every == 0:
            checkpoint.save(out / "checkpoint", training)
        progress(f"{config.algorithm} (seed {config.seed})", training.round, runtime.rounds, f"loss {record.loss:.3f}")
    checkpoint.save(out / "checkpoint", training)
    return training, scores or evaluation.scores(runtime.prompts(training))


def _record(
    metrics: Metrics,
    record: RoundRecord,
    seconds: float,
    runtime: LocalRuntime,
    evaluation: Evaluation | None,
    training: Training,
) -> Scores | None:
    """Evaluate where an evaluation is given, and write the round's line."""
    started = time.monotonic()
    scores = evaluation.scores(runtime.prompts(training)) if evaluation else None
    line = record.line() | {
        "loss": record.loss if record.round and math.isfinite(record.loss) else None,  # JSON has no NaN
        "seconds": seconds,
        "evaluate_seconds": time.monotonic() - started,
        "accuracy": scores.means() if scores else None,
        "attack_success": scores.mean_attack_success() if scores else None,
    }
    metrics.add(line)
    return scores


def _handed_over(runtime: LocalRuntime, dataset: EncodedDataset, task: Task) -> int:
    """Bytes of the images that clients hand over before training, where a method pools them."""
    if not runtime.algorithm.ABOUT.pools_data:
        return 0
    return sum(len(dataset.images.raw(int(row))) for rows in task.train for row in rows)


def _communication(metrics: Metrics, handed_over: int) -> Communication:
    """Return the bytes of serialized messages, and of images where those are handed over."""
    rounds = [line for line in metrics.lines if line["round"] > 0]
    total = metrics.lines  # with the release of statistics before the first round
    return Communication(
        upload_bytes_per_client_round=max((line["upload_bytes"] for line in rounds), default=0),
        broadcast_bytes_per_client_round=max((line["broadcast_bytes"] for line in rounds), default=0),
        total_upload_bytes=handed_over + sum(line["upload_bytes"] * line["participants"] for line in total),
        total_broadcast_bytes=sum(line["broadcast_bytes"] * line["participants"] for line in total),
    )


def _per_client(task: Task, scores: Scores) -> tuple[ClientResult, ...]:
    return tuple(
        ClientResult(
            client=line["client"],
            name=line["name"],
            local=scores.local[index],
            neighbor=scores.neighbor[index],
            overall=scores.overall[index],
            novel=scores.novel[index],
            domain=scores.domain[index],
            attack_success=scores.attack_success[index],
            examples=line["images"],
            classes=line["classes"],
            domains=line["domains"] or None,
        )
        for index, line in enumerate(task.summary())
    )
