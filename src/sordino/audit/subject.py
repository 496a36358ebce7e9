"""The subject of an attack: a finished run, opened again, and variations of it on other data."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sordino.algorithms import METHODS
from sordino.encoders.checkpoint_place import checkpoint_folder
from sordino.encoders.prompt_model import Prompt, PromptModel
from sordino.errors import ConfigError, EncoderError, RunError
from sordino.experiments.config import WITH_CHECKPOINT, Experiment, method_sources, parse_config
from sordino.experiments.data_digests import data_record
from sordino.experiments.data_record import check
from sordino.experiments.features import EncodedDataset
from sordino.experiments.release_file import FILE as RELEASE
from sordino.experiments.release_file import ReleaseFile
from sordino.experiments.run import assemble
from sordino.privacy.ledger import Ledger
from sordino.privacy.mechanism import Mechanism
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.progress import Progress, silent
from sordino.results import FILE, Summary
from sordino.runtime import checkpoint
from sordino.runtime.local import LocalRuntime, Training
from sordino.tasks.splits import Task


@dataclass(frozen=True)
class Subject:
    """A finished run.

    Attributes:
        config: its configuration.
        runtime: the method with its federation, as it was trained.
        training: the state at the end of training.
        ledger: the run's releases.
        task: each client's training images, and the test images.
        features, labels: [N, ...] and [N], of all images of the data set that the task uses.
        progress: is called as an attack advances.
        exchangeable: true if training and test images of a client and class were split at random. A source's own test
            split is of others' making. With domains the split is random within each, and a client may hold several.
        dataset: the pictures, for attacks that ask with them.
    """

    config: Experiment
    runtime: LocalRuntime
    training: Training
    ledger: Ledger
    task: Task
    features: Tensor
    labels: Tensor
    progress: Progress = silent
    exchangeable: bool = True
    dataset: EncodedDataset | None = None

    @property
    def encoded_data(self) -> EncodedDataset:
        """The pictures themselves.

        Raises:
            ConfigError: they are not at hand.
        """
        if self.dataset is None:
            raise ConfigError("data", "features alone", "the attack asks with pictures; audit a run directory")
        return self.dataset

    @classmethod
    def open(
        cls,
        folder: Path,
        progress: Progress = silent,
        dataset: EncodedDataset | None = None,
        encoder: str | None = None,
    ) -> Subject:
        """Read a run directory and encode its images again, from the cache if they are still there.

        Args:
            folder: the run directory.
            progress: is called as images are encoded, and as an attack advances.
            dataset: data and encoder, if they are open already.
            encoder: folder or hub name of the encoder's checkpoint; None: where it was in training.

        Raises:
            SordinoError: the directory holds no finished run, its data or encoder are gone or changed.
        """
        try:
            # First, as a coordinator's directory has none; its configuration lacks the data, which others hold.
            Summary.from_json((folder / FILE).read_bytes())
            tables = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
            _check_method(folder, tables)
            config = parse_config(tables)
            ledger = Ledger.from_json((folder / "ledger.json").read_bytes(), folder / "ledger.json")
        except OSError as error:
            missing = Path(str(error.filename)).name
            raise RunError(f"{folder} holds no finished run ({missing}: {error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise RunError(f"{folder} is damaged ({error}); go on with --resume, or start a new run") from None
        dataset = dataset or EncodedDataset.open(_with_encoder(config, encoder))
        task, _ = dataset.task(config, progress)
        check(folder, data_record(dataset, task, dataset.public(config, task)))
        runtime, _ = assemble(config, dataset, task)
        start = runtime.start()
        if runtime.releases_statistics:
            record = ReleaseFile.load(folder / RELEASE)
            record.check(runtime)
            start = runtime.with_release(start, record.tensors, record.releases)
        training = checkpoint.load(folder / "checkpoint", start)
        if training is None:
            raise RunError(f"{folder} has no checkpoint; attacks need the trained state")
        device = dataset.encoder.device
        features = dataset.tables[runtime.model.reads].features.to(device)
        labels = torch.from_numpy(task.labels).to(device)
        one_domain = all(len(domains) <= 1 for domains in task.client_domains)
        exchangeable = dataset.images.is_test is None and one_domain
        return cls(config, runtime, training, ledger, task, features, labels, progress, exchangeable, dataset)

    def begun(self) -> Training:
        """Return the state from which the run's first round started: after its own release of statistics, if any."""
        start = self.runtime.start()
        if not self.runtime.releases_statistics:
            return start
        return self.runtime.with_release(start, self.training.at_clients.release, self.ledger.releases)

    def variation(
        self, features: Tensor, labels: Tensor, rows: Sequence[Sequence[int]], seed: int, **privacy: Any
    ) -> LocalRuntime:
        """Return a runtime with the same method, settings and noise on other data, or with other randomness.

        Args:
            features, labels: [N, ...] and [N].
            rows: each client's row numbers.
            seed: decides start, batches and noise.
            privacy: keys of the `[privacy]` table to change.
        """
        return vary(self.runtime, features, labels, rows, seed, **privacy)


def _with_encoder(config: Experiment, encoder: str | None) -> Experiment:
    """Return the configuration with its encoder's checkpoint where it is now.

    Raises:
        ConfigError: it is not there, or the encoder has none.
    """
    own = config.encoder
    if own.name not in WITH_CHECKPOINT:
        if encoder is not None:
            raise ConfigError(
                "--encoder", encoder, f"the run's encoder is {own.name!r}, which has none; leave this out"
            )
        return config
    if encoder is not None:
        return config.model_copy(update={"encoder": own.model_copy(update={"checkpoint": encoder})})
    try:
        checkpoint_folder(str(own.checkpoint))
    except EncoderError:
        remedy = "there is no such folder now; put it back there or link it, or say where it is with --encoder"
        raise ConfigError("encoder.checkpoint", own.checkpoint, remedy) from None
    return config


def _check_method(folder: Path, tables: dict[str, Any]) -> None:
    """See that a run's method, if it was in a file, is here as it was; code in a run directory is never executed.

    Raises:
        RunError: it is not; the message names the run's copy.
    """
    for name, source in method_sources(tables).items():
        method = METHODS.get(name)
        kept = folder / source.file
        if method is None or method.file is None:
            raise RunError(
                f"{folder} was trained by the method in {kept}, which nobody runs unasked; read it, then give "
                f"--method {kept}, or in Python sordino.add_method({name!r}, {str(kept)!r})"
            )
        if method.file.sha256 != source.sha256:
            raise RunError(f"{method.file.path} is not the method that trained {folder}; give the copy in {kept}")


def vary(
    runtime: LocalRuntime, features: Tensor, labels: Tensor, rows: Sequence[Sequence[int]], seed: int, **privacy: Any
) -> LocalRuntime:
    """Return a runtime with the method, settings and noise of another, on other data.

    It has no budget that could end it.

    Raises:
        ConfigError: the person is the unit of privacy. Attacks divide examples, and not persons with all their images.
    """
    settings = runtime.privacy
    if settings.by_person:
        remedy = "attacks that train again draw single examples, not persons; audit a run with privacy.unit = 'example'"
        raise ConfigError("privacy.unit", "person", remedy)
    earlier = None
    if isinstance(runtime.mechanism, StatisticsMechanism):  # both follow from sizes, which may be others here
        earlier = runtime.mechanism.multipliers
        settings = settings.model_copy(update={"count_share": runtime.mechanism.count_share})
    if settings.on:
        fixed = {"epsilon": None, "noise_multiplier": runtime.mechanism.noise_multiplier, "delta": None}
        settings = settings.model_copy(update=fixed | privacy)
    varied = LocalRuntime(
        runtime.algorithm,
        runtime.settings,
        runtime.model,
        features,
        labels,
        rows,
        runtime.rounds,
        runtime.runtime,
        seed,
        settings,
        runtime.boosts,
        earlier=earlier,
        public=runtime.mechanism.public,
    )
    varied.mechanism = as_implemented_by(type(runtime.mechanism), varied.mechanism)
    return varied


def replaces_images(runtime: LocalRuntime) -> bool:
    """Return true if clients train on examples drawn from released statistics, and not on their images."""
    return isinstance(runtime.mechanism, StatisticsMechanism) and runtime.mechanism.replaces_images


def coop(runtime: LocalRuntime) -> bool:
    """Return true if prompts are contexts and meet images as in CoOp, which attacks on gradients assume."""
    return type(runtime.model) is PromptModel


def contexts_of(prompt: Prompt) -> Tensor:
    """Return the contexts [K, M, E] of a method that `coop` accepts."""
    assert isinstance(prompt, Tensor)
    return prompt


def as_implemented_by(kind: type[Mechanism], mechanism: Mechanism) -> Mechanism:
    """Return a mechanism of class `kind` with the settings, inputs and noise of another."""
    return kind(**{entry.name: getattr(mechanism, entry.name) for entry in fields(mechanism)})


def train(runtime: LocalRuntime, rounds: int | None = None, progress: Progress = silent, stage: str = "") -> Training:
    """Release statistics if the runtime does, and train its first `rounds` rounds, or all of them."""
    training = runtime.begun()
    rounds = runtime.rounds if rounds is None else rounds
    while training.round < rounds:
        training, _ = runtime.round(training)
        if stage:
            progress(stage, training.round, rounds)
    return training
