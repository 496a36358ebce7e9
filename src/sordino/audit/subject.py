"""The subject of an attack: a finished run, opened again, and variations of it on other data."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
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
from sordino.tasks.images import Indices
from sordino.tasks.splits import Task

# Reasons why pairs bound no epsilon.
OWN_SPLIT = "the source has a test split of its own, which nobody says was drawn at random"
WHOLE_PERSONS = (
    "whole persons train or test, so one draw decides over all pictures of a person; intervals count persons"
)


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
        not_exchangeable: why a member and a non-member of one client and class are not exchangeable one by one; None if
            they are, so that a fair coin of its own decided over each pair. See `_not_exchangeable`.
        dataset: the pictures, for attacks that ask with them.
        persons: [N], whose each image is; None if unknown.
    """

    config: Experiment
    runtime: LocalRuntime
    training: Training
    ledger: Ledger
    task: Task
    features: Tensor
    labels: Tensor
    progress: Progress = silent
    not_exchangeable: str | None = None
    dataset: EncodedDataset | None = None
    persons: Indices | None = None

    @property
    def encoded_data(self) -> EncodedDataset:
        """The pictures themselves.

        Raises:
            ConfigError: they are not at hand.
        """
        if self.dataset is None:
            raise ConfigError("data", "features alone", "the attack asks with pictures; audit a run directory")
        return self.dataset

    def persons_of(self, rows: Indices) -> Indices | None:
        """Return whose each of some images is; None if unknown."""
        return None if self.persons is None else self.persons[rows]

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
        reason, persons = _not_exchangeable(dataset), dataset.images.persons
        return cls(config, runtime, training, ledger, task, features, labels, progress, reason, dataset, persons)

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


def _not_exchangeable(dataset: EncodedDataset) -> str | None:
    """Return why the images of a class did not each train or test by a draw of their own; None if they did.

    `sordino.tasks.splits` draws every cell's images at random, by the rule alone: with counts or a fraction, with novel
    classes, a held-out domain or attackers, whatever the partition. A cell is a class of one domain if clients are
    divided by domain, and else a class of all domains, whose images are then divided at random too. Copies of an image
    are drawn one by one as others are. Exceptions are a source's own test split, which is of others' making, and
    persons, who are drawn whole. If every person has one image, that is a draw of images.
    """
    images = dataset.images
    if images.is_test is not None:
        return OWN_SPLIT
    if images.persons is None:
        return None
    originals = min(dataset.triggers.values(), default=len(images))  # copies with a trigger are no more images
    persons = images.persons[:originals]
    return WHOLE_PERSONS if len(np.unique(persons)) < len(persons) else None


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


def refuse_persons(runtime: LocalRuntime) -> None:
    """Refuse a run that promises something to persons to an attack on examples.

    Raises:
        ConfigError: the person is the unit of privacy.
    """
    if runtime.privacy.by_person:
        remedy = "the attack guesses single examples, not persons; audit a run with privacy.unit = 'example'"
        raise ConfigError("privacy.unit", "person", remedy)


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
