"""`sordino tune-private`: a data owner's search for a prompt, in a run directory from which it can be resumed.

The caller supplies the forward pass: two servers on shares, or a tower in the clear. The run directory belongs to the
data owner. Losses, the prompt and accuracies never leave it.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sordino
from sordino.errors import ConfigError, RunError
from sordino.experiments.data_record import pin
from sordino.experiments.run_folder import Metrics, prepare
from sordino.experiments.run_lock import held
from sordino.experiments.started import TUNING, was_begun
from sordino.experiments.toml_tables import to_toml
from sordino.files import user_path, write_atomically
from sordino.mpc.dealing.costs import Cost, Costs
from sordino.mpc.parties.certificates import DATA_OWNER, Identity
from sordino.mpc.parties.network import LAN, WAN
from sordino.mpc.tower.sentences import Forward
from sordino.mpc.tower.tower import BUNDLED, PrivateTower, bundled_tower
from sordino.private_tuning.search import SearchState, tune
from sordino.private_tuning.settings import PrivateTuning
from sordino.private_tuning.tasks import Task
from sordino.private_tuning.worth import HandWritten, as_lines, by_class, summarized
from sordino.progress import Progress, silent
from sordino.prompt_file import EncoderRecord, PrivacyRecord, SavedPrompt
from sordino.results.wording import ON_SHARES

METHOD = "secp-tuning"  # as a saved prompt names it
STATE = "search.json"
SESSION = "session"  # table that may change between a run and its resumption, as servers may move


def tune_private(
    config: PrivateTuning,
    out: Path,
    task: Task,
    forward: Forward,
    clear: bool,
    costs: Costs | None = None,
    resume: bool = False,
    progress: Progress = silent,
    model: str | None = None,
) -> dict[str, Any]:
    """Search for a prompt, measure it, and write a run directory.

    Args:
        config: of the run.
        out: the run directory; must not exist, unless `resume`.
        task: of the configuration, see `sordino.private_tuning.open_task.open_task`.
        forward: maps sentences to features.
        clear: `forward` is a tower in the clear. It is recorded, and must be the same when the run is resumed.
        costs: where `forward` enters its costs; None if it has none. At the end it holds the costs of the whole run,
            including generations that were finished before the run was resumed.
        resume: go on after the last finished generation in `out`.
        progress: receives the number of generations done.
        model: name of the servers' model, which must be the same when the run is resumed.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        RunError: `out` may not be written or resumed, or a loss is not finite.
    """
    if resume:  # before the lock is written
        was_begun(out, TUNING)
    with held(out):
        finished = finished_before(config, out, resume)
        return finished or _tuned(config, out, task, forward, clear, costs, progress, model)


def _tuned(
    config: PrivateTuning,
    out: Path,
    task: Task,
    forward: Forward,
    clear: bool,
    costs: Costs | None,
    progress: Progress,
    model: str | None,
) -> dict[str, Any]:
    """Do the work of `tune_private` for a run directory that is locked and not finished."""
    tables = config.model_dump(exclude_none=True)
    began = time.monotonic()
    state = _state(out / STATE, clear, costs)
    tower = _tower_digest(config) if clear else model
    pin(out, {"version": sordino.__version__, **task.record(), "tower": tower})
    write_atomically(out / "config.toml", to_toml(tables).encode())
    record = _Record(out, clear, costs, len(state.losses))
    start, search = task.start(), config.search.search(config.seed)
    if not record.metrics.lines:
        record.add(0, task.losses(forward, start[None]).tolist())
    prompt, state = tune(
        search, start, lambda prompts: task.losses(forward, prompts), state, record.generation, progress
    )
    searched = time.monotonic()
    at_start, _ = task.measure(forward, start)
    tuned, beside = task.measure(forward, prompt)
    hand_written = HandWritten.of(task)
    given = hand_written.correct(task, forward, start, at_start)
    saved = _saved_prompt(config, task, {"context": prompt, **beside}, state, clear)
    saved.save(out / "prompts" / "private.safetensors", private=True)
    before = record.metrics.lines[0]["mean_loss"]
    summary = {
        "task": task.kind,
        "classes": list(task.class_names),
        "shots": config.task.shots,
        "seed": config.seed,
        "generations": len(state.losses),
        "evaluations": sum(map(len, state.losses)),
        "test_examples": len(task.test_labels),
        "accuracy": {"zero_shot": float(at_start.double().mean()), "tuned": float(tuned.double().mean())},
        "hand_written": summarized(hand_written, given, tuned),
        "by_class": by_class(task.class_names, task.test_labels, given, tuned),
        "train_loss": {"before": before, "after": state.least if state.losses else before},
        "seconds": {
            "search": record.metrics.seconds("seconds"),
            "evaluate": time.monotonic() - searched,
            "session": time.monotonic() - began,
        },
        "costs": None if costs is None else _costs(costs),
        "clear": clear,
        "model": model,
        "version": sordino.__version__,
    }
    # Written last, since it marks the run as finished.
    write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def finished_before(config: PrivateTuning, out: Path, resume: bool) -> dict[str, Any] | None:
    """Return the summary of a finished run, without servers or data; None if the run is not finished.

    Raises:
        RunError: `out` may not be written or resumed.
    """
    return prepare(out, config.model_dump(exclude_none=True), resume, (SESSION,), TUNING)


def tower_of(config: PrivateTuning) -> PrivateTower:
    """Load the tower of a run in the clear.

    Raises:
        ConfigError: the file holds no tower.
    """
    if not config.model.tower:
        return bundled_tower()
    return PrivateTower.load(user_path(config.model.tower, "model.tower"))


def _tower_digest(config: PrivateTuning) -> str:
    """Return the SHA-256 of the file of the tower in the clear. Only its owner could do so for a tower on shares."""
    file = user_path(config.model.tower, "model.tower") if config.model.tower else BUNDLED
    return hashlib.sha256(file.read_bytes()).hexdigest()


def owner_of(config: PrivateTuning) -> tuple[Identity, list[str]]:
    """Return the data owner's identity and the servers' addresses for a run on shares.

    Raises:
        ConfigError: the configuration lacks them, or the identity cannot be loaded.
    """
    session = config.session
    if session.servers is None:
        raise ConfigError("session.servers", None, "give the two servers, each as 'host:port', or use --clear")
    if session.certificates is None:
        raise ConfigError("session.certificates", None, "give the data owner's folder, or use --clear")
    return Identity.load(user_path(session.certificates, "session.certificates"), DATA_OWNER), session.servers


class _Record:
    """Writes the files of a running search: for each generation a line of metrics, then the state."""

    def __init__(self, out: Path, clear: bool, costs: Costs | None, generations: int) -> None:
        self._out, self._clear, self._costs = out, clear, costs
        self.metrics = Metrics(out / "metrics.jsonl", generations, "generation", ("seconds", "mean_loss"))
        self._then = time.monotonic()

    def generation(self, state: SearchState) -> None:
        """Record a search's last generation. A state that lags behind the metrics only repeats one generation."""
        self.add(len(state.losses), state.losses[-1], state.least)
        stored = {"clear": self._clear} | json.loads(state.to_json())
        if self._costs is not None:
            stored["costs"] = self._costs.taken()
            self._costs.add_taken(stored["costs"])
        write_atomically(self._out / STATE, json.dumps(stored).encode(), private=True)

    def add(self, generation: int, losses: list[float], least: float | None = None) -> None:
        """Append a line of metrics. Generation 0 is the initial prompt."""
        line: dict[str, Any] = {
            "generation": generation,
            "least_loss": min(losses) if least is None else least,
            "mean_loss": sum(losses) / len(losses),
            "seconds": time.monotonic() - self._then,
        }
        if self._costs is not None:
            line |= _figures(self._costs.total)  # since the start of the run
        self.metrics.add(line)
        self._then = time.monotonic()


def _state(file: Path, clear: bool, costs: Costs | None) -> SearchState:
    """Read the state of an interrupted search, and enter its costs."""
    if not file.exists():
        return SearchState()
    content = file.read_bytes()
    state = SearchState.from_json(content)
    stored = json.loads(content)
    if stored.get("clear") != clear:
        raise RunError(f"{file.parent} was begun {'on shares' if clear else 'with --clear'}; go on in the same way")
    if costs is not None:
        try:
            costs.add_taken(stored["costs"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{file} is damaged ({error}); start anew") from None
    return state


def _saved_prompt(
    config: PrivateTuning, task: Task, tensors: dict[str, Tensor], state: SearchState, clear: bool
) -> SavedPrompt:
    """Return the prompt, its z, and what a classifier needs beside it, with what they belong to."""
    z = torch.tensor(state.best or [0.0] * config.search.width, dtype=torch.float64)
    black_and_white = config.task.gray_range
    return SavedPrompt(
        prompt={**tensors, "z": z},
        method=METHOD,
        settings=config.model_dump(include={"seed", "prompt", "search"}) | {"shots": config.task.shots},
        class_names=task.class_names,
        encoder=_encoder(config, task),
        privacy=PrivacyRecord(
            private=False,
            simulated=False,
            statement=f"{_IN_THE_CLEAR if clear else _ON_SHARES} {_PUBLISHED}",
            ledger_sha256=None,
        ),
        version=sordino.__version__,
        task=task.kind,
        gray_range=None if black_and_white is None else (black_and_white[0], black_and_white[1]),
    )


_IN_THE_CLEAR = "Tuned on the data owner's machine, with the text tower in the clear: nothing left the machine."
_ON_SHARES = (
    "Tuned on secret shares: the two servers learned no sentence, image, label, loss or prompt, as long as "
    f"{ON_SHARES}."
)
_PUBLISHED = "Not private if published: the prompt is a function of the training examples, without noise."


def _encoder(config: PrivateTuning, task: Task) -> EncoderRecord:
    """Return the record of the image tower, or for sentences that of tokenizer and embeddings."""
    record = task.record()
    if "encoder" not in record:
        folder = config.model.embeddings
        name = "bundled embeddings" if folder is None else "embeddings"
        return EncoderRecord(name=name, fingerprint=record["embeddings"], checkpoint=folder)
    tower = record["encoder"]
    return EncoderRecord(name=tower["name"], fingerprint=tower["fingerprint"])


def _figures(cost: Cost) -> dict[str, int]:
    return {"rounds": cost.rounds, "online_bytes_per_server": cost.online, "offline_bytes": cost.offline}


def _costs(costs: Costs) -> dict[str, Any]:
    """Summarize a run's costs: set-up, generations and test examples, and seconds of messages on two networks."""
    total = costs.total
    return _figures(total) | {
        "by_label": {label: _figures(cost) for label, cost in costs.by_label().items()},
        "by_protocol": {name: _figures(cost) for name, cost in costs.by_protocol().items()},
        "by_nested_protocol": {name: _figures(cost) for name, cost in costs.by_protocol(depth=None).items()},
        "by_label_and_protocol": {
            label: {name: _figures(cost) for name, cost in inner.items()}
            for label, inner in costs.by_label_and_protocol().items()
        },
        "seconds_on": {
            name: {"online": network.online(total), "offline": network.offline(total)}
            for name, network in (("lan", LAN), ("wan", WAN))
        },
    }


def as_text(summary: dict[str, Any]) -> str:
    """Format a summary as text."""
    loss = summary["train_loss"]
    lines = [
        *as_lines(summary),
        f"loss on {summary['shots']} examples a class: {loss['after']:.3f}, {loss['before']:.3f} before; "
        f"{summary['generations']} generations, {summary['evaluations']} candidates, "
        f"{summary['seconds']['search']:.0f} s",
    ]
    for name, network in (("lan", LAN), ("wan", WAN)) if summary["costs"] else ():
        seconds = summary["costs"]["seconds_on"][name]
        lines.append(f"{network.name}: {seconds['online']:,.1f} s online, {seconds['offline']:,.1f} s offline")
    return "\n".join(lines)
