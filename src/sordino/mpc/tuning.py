"""`sordino tune-private`: a data owner's search for a prompt, in a run directory, from which it can be resumed.

Whoever runs the forward pass is given by the caller: two servers on shares, or a tower in the clear. What is written
here is the owner's own: losses, the prompt and accuracies never leave.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import sordino
from sordino.errors import ConfigError, RunError
from sordino.experiments.data_record import pin
from sordino.experiments.run_folder import Metrics, prepare
from sordino.experiments.run_lock import held
from sordino.experiments.toml_tables import to_toml
from sordino.files import user_path, write_atomically
from sordino.mpc.certificates import DATA_OWNER, Identity
from sordino.mpc.costs import Cost, Costs
from sordino.mpc.network import LAN, WAN
from sordino.mpc.search import Found, tune
from sordino.mpc.sentences import Forward
from sordino.mpc.settings import PrivateTuning
from sordino.mpc.tasks import Task
from sordino.mpc.tower import BUNDLED, PrivateTower, bundled_tower
from sordino.progress import Progress, silent

STATE = "search.json"
SESSION = "session"  # the table that may change between a run and its resumption: servers move


def tune_private(
    config: PrivateTuning,
    out: Path,
    task: Task,
    forward: Forward,
    clear: bool,
    costs: Costs | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Search for a prompt, measure it, and write a run directory.

    Args:
        config: what to do.
        out: the run directory; must not exist, unless `resume`.
        task: of the configuration, see `sordino.private_tasks.open_task`.
        forward: sentences to features.
        clear: whether `forward` is a tower in the clear; written down, and the same when resumed.
        costs: that `forward` enters what it costs in, None where it has none. At the end it holds those of the whole
            run, with those of generations that were finished before it was resumed.
        resume: go on after the last finished generation in `out`.
        progress: is told how far the search is.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        RunError: `out` may not be written or resumed, or a loss is not finite.
    """
    with held(out):
        finished = finished_before(config, out, resume)
        return finished or _tuned(config, out, task, forward, clear, costs, progress)


def _tuned(
    config: PrivateTuning,
    out: Path,
    task: Task,
    forward: Forward,
    clear: bool,
    costs: Costs | None,
    progress: Progress,
) -> dict[str, Any]:
    """`tune_private`, with the run directory held and not finished."""
    tables = config.model_dump(exclude_none=True)
    began = time.monotonic()
    found = _state(out / STATE, clear, costs)
    pin(out, {"version": sordino.__version__, **task.record(), "tower": _tower_digest(config) if clear else None})
    write_atomically(out / "config.toml", to_toml(tables).encode())
    record = _Record(out, clear, costs, len(found.losses))
    start, search = task.start(), config.search.search(config.seed)
    if not record.metrics.lines:
        record.add(0, task.losses(forward, start[None]).tolist())
    prompt, found = tune(search, start, lambda asked: task.losses(forward, asked), found, record.generation, progress)
    searched = time.monotonic()
    accuracy = {"zero_shot": task.accuracy(forward, start), "tuned": task.accuracy(forward, prompt)}
    _save_prompt(out / "prompts" / "private.safetensors", config, task, prompt, found)
    before = record.metrics.lines[0]["mean_loss"]
    summary = {
        "task": task.kind,
        "classes": list(task.class_names),
        "shots": config.task.shots,
        "seed": config.seed,
        "generations": len(found.losses),
        "evaluations": sum(map(len, found.losses)),
        "test_examples": len(task.test_labels),
        "accuracy": accuracy,
        "train_loss": {"before": before, "after": found.least if found.losses else before},
        "seconds": {
            "search": record.metrics.seconds("seconds"),
            "evaluate": time.monotonic() - searched,
            "session": time.monotonic() - began,
        },
        "costs": None if costs is None else _costs(costs),
        "clear": clear,
        "version": sordino.__version__,
    }
    # At the very end, as it marks the run as finished.
    write_atomically(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def finished_before(config: PrivateTuning, out: Path, resume: bool) -> dict[str, Any] | None:
    """The summary of a run that is finished already, which needs no servers and no data; None for one that is not.

    Raises:
        RunError: `out` may not be written or resumed.
    """
    return prepare(out, config.model_dump(exclude_none=True), resume, free=(SESSION,))


def tower_of(config: PrivateTuning) -> PrivateTower:
    """The tower of a run in the clear.

    Raises:
        MpcError: its file holds none.
    """
    return PrivateTower.load(user_path(config.model.tower, "model.tower")) if config.model.tower else bundled_tower()


def _tower_digest(config: PrivateTuning) -> str:
    """SHA-256 of the file of the tower in the clear. Of a tower on shares, its owner alone could tell a digest."""
    file = user_path(config.model.tower, "model.tower") if config.model.tower else BUNDLED
    return hashlib.sha256(file.read_bytes()).hexdigest()


def owner_of(config: PrivateTuning) -> tuple[Identity, list[str]]:
    """Of a run on shares, the data owner's identity, and the servers.

    Raises:
        ConfigError: the configuration does not say, or there is no such identity.
    """
    session = config.session
    if session.servers is None:
        raise ConfigError("session.servers", None, "give the two servers, each as 'host:port', or use --clear")
    if session.certificates is None:
        raise ConfigError("session.certificates", None, "give the data owner's folder, or use --clear")
    return Identity.load(user_path(session.certificates, "session.certificates"), DATA_OWNER), session.servers


class _Record:
    """What is written while a search runs: a line of metrics a generation, then the state."""

    def __init__(self, out: Path, clear: bool, costs: Costs | None, generations: int) -> None:
        self._out, self._clear, self._costs = out, clear, costs
        self.metrics = Metrics(out / "metrics.jsonl", generations, "generation", ("seconds", "mean_loss"))
        self._then = time.monotonic()

    def generation(self, found: Found) -> None:
        """The last generation of a search is finished; a state that lags behind its metrics only repeats one."""
        self.add(len(found.losses), found.losses[-1], found.least)
        state = {"clear": self._clear} | json.loads(found.to_json())
        if self._costs is not None:
            state["costs"] = self._costs.taken()
            self._costs.add_taken(state["costs"])
        write_atomically(self._out / STATE, json.dumps(state).encode())

    def add(self, generation: int, losses: list[float], least: float | None = None) -> None:
        """A line of metrics; the start is generation 0."""
        line: dict[str, Any] = {
            "generation": generation,
            "least_loss": min(losses) if least is None else least,
            "mean_loss": sum(losses) / len(losses),
            "seconds": time.monotonic() - self._then,
        }
        if self._costs is not None:
            line |= _figures(self._costs.total)  # up to here
        self.metrics.add(line)
        self._then = time.monotonic()


def _state(file: Path, clear: bool, costs: Costs | None) -> Found:
    """Where an interrupted search stands; what it cost is entered with what is to come."""
    if not file.exists():
        return Found()
    content = file.read_bytes()
    found = Found.from_json(content)
    state = json.loads(content)
    if state.get("clear") != clear:
        raise RunError(f"{file.parent} was begun {'on shares' if clear else 'with --clear'}; go on in the same way")
    if costs is not None:
        try:
            costs.add_taken(state["costs"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{file} is damaged ({error}); start anew") from None
    return found


def _save_prompt(file: Path, config: PrivateTuning, task: Task, prompt: Tensor, found: Found) -> None:
    """The prompt, and z, with what they belong to."""
    z = torch.tensor(found.best or [0.0] * config.search.width, dtype=torch.float64)
    metadata = {
        "task": task.kind,
        "encoder": config.model.embeddings or "bundled",
        "classes": json.dumps(task.class_names),
        "seed": str(config.seed),
    }
    content = safetensors.torch.save({"prompt": prompt.detach().contiguous(), "z": z}, metadata=metadata)
    write_atomically(file, content)


def _figures(cost: Cost) -> dict[str, int]:
    return {"rounds": cost.rounds, "online_bytes_per_server": cost.online, "offline_bytes": cost.offline}


def _costs(costs: Costs) -> dict[str, Any]:
    """Of the run: set-up, generations, and test examples; and the seconds that messages need on two networks."""
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
    """A summary for people."""
    accuracy, loss = summary["accuracy"], summary["train_loss"]
    lines = [
        f"accuracy on {summary['test_examples']} test examples: {accuracy['tuned']:.3f}, "
        f"{accuracy['zero_shot']:.3f} with the initial prompt",
        f"loss on {summary['shots']} examples a class: {loss['after']:.3f}, {loss['before']:.3f} before; "
        f"{summary['generations']} generations, {summary['evaluations']} candidates, "
        f"{summary['seconds']['search']:.0f} s",
    ]
    for name, network in (("lan", LAN), ("wan", WAN)) if summary["costs"] else ():
        seconds = summary["costs"]["seconds_on"][name]
        lines.append(f"{network.name}: {seconds['online']:,.1f} s online, {seconds['offline']:,.1f} s offline")
    return "\n".join(lines)
