"""One data set and one encoder, with every image encoded once, however many runs share them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import model_kind, model_of
from sordino.encoders import choose_device, load_encoder
from sordino.encoders.base import DualEncoder
from sordino.encoders.cache import FeatureCache, Kind
from sordino.encoders.encode import Skipped, encode, tell_skipped
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import DataError
from sordino.experiments.config import Experiment
from sordino.progress import Progress, log, silent
from sordino.tasks.copies import Copies, find_copies
from sordino.tasks.images import Flags, ImageSet, Indices
from sordino.tasks.overview import announce, tell_passed_over
from sordino.tasks.poisoning import poisoned, with_triggers
from sordino.tasks.sources import load_images, public_images
from sordino.tasks.splits import Task, build_task


@dataclass(frozen=True)
class Encoding:
    """The cost of a task's features.

    Attributes:
        seconds: of wall time.
        encoded, cached: how many features were computed, and how many came from the cache on disk.
    """

    seconds: float
    encoded: int
    cached: int

    def __add__(self, other: Encoding) -> Encoding:
        return Encoding(self.seconds + other.seconds, self.encoded + other.encoded, self.cached + other.cached)


@dataclass(frozen=True)
class Table:
    """The images' features of one kind.

    Attributes:
        features: [N, ...] float32 on the CPU.
        known: [N], which rows were tried.
    """

    features: Tensor
    known: Flags

    @classmethod
    def empty(cls, rows: int, shape: Sequence[int]) -> Table:
        """A table with nothing in it yet."""
        return cls(torch.zeros(rows, *shape), np.zeros(rows, dtype=bool))

    def longer(self, rows: int) -> Table:
        """The table with empty rows after its own, `rows` in all."""
        whole = Table.empty(rows, self.features.shape[1:])
        whole.features[: len(self.known)], whole.known[: len(self.known)] = self.features, self.known
        return whole


@dataclass(frozen=True)
class PublicImages:
    """The readable pictures of `data.public`.

    Attributes:
        features: [n, D] float32 on the CPU.
        digests: n SHA-256 of their raw content.
    """

    features: Tensor
    digests: tuple[bytes, ...]


@dataclass
class EncodedDataset:
    """One data set and one encoder, shared by many runs: every image is encoded at most once.

    Threads may share it; one at a time asks for features.

    Attributes:
        images: the data set, followed by copies of it with each trigger that a poisoned run asked for.
        encoder: the frozen encoder.
        tables: what was read of the images so far, by kind; rows are filled as runs need them.
        readable: [N], false for those that were tried and could not be read.
        skipped: the images that could not be read.
        triggers: size of a trigger to the row at which the pictures with it start.
        digests: SHA-256 of the raw content of every row that was tried and whose content could be read.
    """

    images: ImageSet
    encoder: DualEncoder
    tables: dict[Kind, Table]
    readable: Flags
    skipped: list[Skipped] = field(default_factory=list)
    triggers: dict[float, int] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._originals = self.images
        self._told: set[str] = set()
        self._public: dict[str, PublicImages] = {}
        self._one = threading.RLock()
        self._ahead = Encoding(0.0, 0, 0)

    @classmethod
    def open(cls, config: Experiment) -> EncodedDataset:
        """List the images, check that the task can be made of them, and load the encoder.

        Raises:
            SordinoError: data, device or encoder are not what the configuration says.
        """
        device = choose_device(config.device)
        images = load_images(config.data)
        tell_passed_over(images)
        task = build_task(images, config.data, config.partition, config.seed)
        announce(images, task)
        if config.poisoning is not None:
            poisoned(task, config.poisoning, len(images), config.seed)
        wanted = config.encoder
        model_kind(
            algorithm(config.algorithm), config.algorithm, wanted.name
        )  # before weights are read, which may take minutes
        encoder = load_encoder(wanted.name, wanted.checkpoint, wanted.dtype, device, wanted.generative)
        return cls(images, encoder, {}, np.ones(len(images), dtype=bool))

    def model(self, config: Experiment, class_names: Sequence[str]) -> PromptModel:
        """The model of a configuration's method, with these candidate classes.

        Raises:
            SordinoError: its settings are bad, or the encoder lacks what it needs.
        """
        settings = settings_for(config.algorithm, config.settings)
        classes = self.encoder.class_tokens(class_names)
        return model_of(algorithm(config.algorithm), config.algorithm, settings, self.encoder, classes)

    def task(self, config: Experiment, progress: Progress) -> tuple[Task, Encoding]:
        """The task of a configuration on this data set, with every image that it uses encoded, and what that took.

        Raises:
            DataError: without the unreadable images there are too few.
        """
        with self._one:
            task, encoding = self._task(config, progress)
            self._ahead, ahead = Encoding(0.0, 0, 0), self._ahead
        return task, encoding + ahead

    def encode_ahead(self, config: Experiment, progress: Progress) -> None:
        """Encode what a configuration's task uses; what that took is counted with the next task that is asked for."""
        with self._one:
            self._ahead += self._task(config, progress)[1]

    def _task(self, config: Experiment, progress: Progress) -> tuple[Task, Encoding]:
        started, cost, clean = time.monotonic(), np.zeros(2, dtype=np.int64), len(self._originals)
        while True:
            task = build_task(self._originals, config.data, config.partition, config.seed, self.readable[:clean])
            kind = self.model(config, task.class_names).reads
            missing = self._missing(task, kind)
            if not len(missing):
                break
            cost += self._encode(missing, kind, progress)
        if config.poisoning is not None:
            first = self._triggered_from(config.poisoning.trigger_size)
            task = poisoned(task, config.poisoning, first, config.seed)
            cost += self._encode(self._missing(task, kind), kind, progress)
            if not self.readable[task.used].all():
                raise DataError("a picture cannot be read once a trigger is in it; see the warnings above")
        copies = self.copies(task)
        if copies and copies.told() not in self._told:
            self._told.add(copies.told())
            log.warning("%s", copies.told())
        return task, Encoding(time.monotonic() - started, int(cost[0]), int(cost[1]))

    def public(self, config: Experiment, task: Task) -> PublicImages | None:
        """The pictures of `data.public`, encoded; None if the configuration names no such folder.

        Raises:
            DataError: one of them is a picture of the task too. What is computed of them would depend on that example,
                without noise.
        """
        folder = config.data.public
        if folder is None:
            return None
        with self._one:
            if folder not in self._public:
                self._public[folder] = self._encoded_public(config)
        public = self._public[folder]
        used = {self.digests[row]: self.images.names[row] for row in task.used.tolist()}
        both = next((used[digest] for digest in public.digests if digest in used), None)
        if both is not None:
            raise DataError(f"data.public holds a copy of {both!r}, which this run uses; remove it from {folder!r}")
        return public

    def _encoded_public(self, config: Experiment) -> PublicImages:
        images = public_images(config.data)
        result = encode(images, self.encoder, FeatureCache())
        tell_skipped(result.skipped)
        rows = np.flatnonzero(result.readable)
        digests = tuple(digest for row in rows.tolist() if (digest := result.digests[row]) is not None)
        return PublicImages(result.features[torch.from_numpy(rows)], digests)

    def copies(self, task: Task) -> Copies:
        """The pictures of an encoded task that are copies of others in it."""
        return find_copies(task, self.images, self.digests)

    def encoded(self, rows: Indices, kind: Kind, progress: Progress) -> bool:
        """Encode what some rows lack of a kind, and tell whether all of them could be read."""
        with self._one:
            self._encode(self._unknown(rows, kind), kind, progress)
        return bool(self.readable[rows].all())

    def features_of(self, rows: Indices, kind: Kind, progress: Progress = silent) -> Tensor:
        """The features [n, ...] of some rows, on the CPU; zero for a picture that cannot be read."""
        with self._one:
            self._encode(self._unknown(rows, kind), kind, progress)
        return self.tables[kind].features[torch.from_numpy(rows)]

    def _missing(self, task: Task, kind: Kind) -> Indices:
        """The rows that a task uses and that were not read yet."""
        return self._unknown(task.used, kind)

    def _unknown(self, rows: Indices, kind: Kind) -> Indices:
        """Those of some rows that were not read yet."""
        table = self.tables.get(kind)
        return np.array([row for row in rows if table is None or not table.known[row]], dtype=np.int64)

    def _encode(self, rows: Indices, kind: Kind, progress: Progress) -> tuple[int, int]:
        """Fill in rows of a table; how many features were computed for it, and how many came from the cache."""
        if not len(rows):
            return 0, 0
        result = encode(
            self.images.subset(rows),
            self.encoder,
            FeatureCache(),
            kind=kind,
            progress=lambda done, total: progress("encode images", done, total),
        )
        table = self.tables.setdefault(kind, Table.empty(len(self.images), result.features.shape[1:]))
        table.features[torch.from_numpy(rows)] = result.features
        table.known[rows] = True
        self.readable[rows] = result.readable
        self.skipped += result.skipped
        self.digests |= {
            row: digest for row, digest in zip(rows.tolist(), result.digests, strict=True) if digest is not None
        }
        log.info("%d images encoded, %d from the cache", result.encoded, result.cached)
        tell_skipped(result.skipped)
        return result.encoded, result.cached

    def _triggered_from(self, size: float) -> int:
        """The row at which pictures with a trigger of this size start; they are added when first asked for."""
        if size not in self.triggers:
            self.triggers[size] = len(self.images)
            self.images = with_triggers(self.images, len(self._originals), size)
            self.tables = {kind: table.longer(len(self.images)) for kind, table in self.tables.items()}
            added = np.ones(len(self._originals), dtype=bool)
            self.readable = np.concatenate([self.readable, added])
        return self.triggers[size]
