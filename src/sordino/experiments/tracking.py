"""`[tracking]`: the metrics of each round, sent on to TensorBoard or MLflow while a run trains.

Nothing is sent unless the table is there. The metrics are those of `metrics.jsonl`, which stays the record: a
tracker that fails while a run trains is left out with a warning.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from sordino.errors import ConfigError, require_extra
from sordino.files import absolute_path
from sordino.progress import log

TABLE = "tracking"
LINES = "lines.json"  # in the folder of a comparison
MLFLOW_EXPERIMENT = "sordino"
MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # or it reports its use to its makers
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # or a lost server stops training for minutes
    "MLFLOW_ALLOW_FILE_STORE": "true",  # or it takes no folder
}


class TrackingSettings(BaseModel):
    """The `[tracking]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    to: Literal["tensorboard", "mlflow"] = Field(description="who is sent the metrics of each round")
    where: str = Field(min_length=1, description="a folder, or for MLflow also the URI of a tracking server")


class Lines(Protocol):
    """Lines of metrics that grow, such as `Metrics`.

    Attributes:
        lines: those that are there.
        listener: is given each that is added.
    """

    lines: list[dict[str, Any]]
    listener: Callable[[dict[str, Any]], None] | None


@dataclass
class Heard:
    """Lines of a run elsewhere, as they are told."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    listener: Callable[[dict[str, Any]], None] | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Take a line."""
        self.lines.append(line)
        if self.listener is not None:
            self.listener(line)


class Tracker(Protocol):
    """A receiver of metrics."""

    def send(self, line: Mapping[str, Any]) -> None:
        """Send a line of metrics, of a new round."""

    def close(self, finished: bool) -> None:
        """Write what is left."""


def require_tracker(settings: TrackingSettings | None) -> None:
    """Check that the library that is asked for is installed; nothing is imported.

    Raises:
        MissingExtra: it is not; the message names the extra.
    """
    if settings is not None:
        require_extra("tracking", f"tracking.to = {settings.to!r}", settings.to)


@contextmanager
def tracked(settings: TrackingSettings | None, out: Path, metrics: Lines) -> Iterator[None]:
    """Send all lines that metrics hold, and then each that is added.

    Args:
        settings: None sends nothing.
        out: the run directory; its path names the run.
        metrics: of the run.

    Raises:
        ConfigError: it cannot be reached, or the folder not be written.
    """
    if settings is None:
        yield
        return
    try:
        tracker = _tensorboard(settings, out) if settings.to == "tensorboard" else _mlflow(settings, out)
        for line in metrics.lines:
            tracker.send(line)
    except Exception as error:  # each library has errors of its own
        reason = " ".join(str(error).split())
        raise ConfigError("tracking.where", settings.where, f"{settings.to} cannot write there: {reason}") from None
    metrics.listener = _patient(tracker, settings.to)
    finished = False
    try:
        yield
        finished = True
    finally:
        metrics.listener = None
        try:
            tracker.close(finished)
        except Exception as error:
            log.warning("%s could not be closed: %s", settings.to, " ".join(str(error).split()))


def _patient(tracker: Tracker, name: str) -> Any:
    """Return a function that sends lines until that fails for the first time, which must not end a run."""
    failed = False

    def send(line: Mapping[str, Any]) -> None:
        nonlocal failed
        if failed:
            return
        try:
            tracker.send(line)
        except Exception as error:
            failed = True
            reason = " ".join(str(error).split())
            log.warning("%s gets nothing any more (%s); metrics.jsonl has all metrics", name, reason)

    return send


def numbers(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a line of metrics by dotted name, such as `accuracy.local`; `round` is left out."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix + key != "round":
            found[prefix + key] = float(value)
    return found


def run_name(out: Path) -> str:
    """Return the name of a run: the path of its directory from the working directory.

    Of a directory elsewhere it is the last name, or in a comparison the path from there, with some digits that tell it
    from another one of this name. Others read the name, and the folders above are no affair of theirs.
    """
    path, here = out.resolve(), Path.cwd().resolve()
    if path.is_relative_to(here):
        return path.relative_to(here).as_posix()
    top = next((folder for folder in path.parents if (folder / LINES).exists()), path)
    digits = hashlib.sha256(os.fsencode(top)).hexdigest()[:8]
    return (Path(f"{top.name}-{digits}") / path.relative_to(top)).as_posix()


def _tensorboard(settings: TrackingSettings, out: Path) -> Tracker:
    # torch's writer, which needs no TensorFlow; all lines are sent anew, so earlier ones are dropped.
    writer_of: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    folder = absolute_path(settings.where, "tracking.where") / run_name(out)
    return _TensorBoard(writer_of(str(folder), purge_step=0))


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def send(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line).items():
            self._writer.add_scalar(name.replace(".", "/"), value, line["round"])
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


def _mlflow(settings: TrackingSettings, out: Path) -> Tracker:
    for variable, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(variable, value)
    uri = settings.where if "://" in settings.where else absolute_path(settings.where, "tracking.where").as_uri()
    mlflow: Any = importlib.import_module("mlflow")
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(MLFLOW_EXPERIMENT)
    number = experiment.experiment_id if experiment else client.create_experiment(MLFLOW_EXPERIMENT)
    # A new one where a run goes on, too: MLflow cannot replace the rounds that are repeated.
    run = client.create_run(number, run_name=run_name(out))
    return _Mlflow(mlflow.entities.Metric, client, run.info.run_id)


class _Mlflow:
    def __init__(self, metric: Any, client: Any, run: str) -> None:
        self._metric, self._client, self._run = metric, client, run

    def send(self, line: Mapping[str, Any]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, line["round"]) for name, value in numbers(line).items()]
        self._client.log_batch(self._run, metrics)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")
