"""One data set and one encoder, with every image encoded once, however many runs share them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sordino.config import Experiment
from sordino.encoders import choose_device, load_encoder
from sordino.encoders.base import DualEncoder
from sordino.encoders.cache import FeatureCache
from sordino.encoders.encode import Skipped, encode
from sordino.progress import Progress, log
from sordino.tasks.images import Flags, ImageSet
from sordino.tasks.sources import load_images
from sordino.tasks.splits import Task, build_task


@dataclass(frozen=True)
class Encoding:
    """What it took to have a task's features.

    Attributes:
        seconds: of wall time.
        encoded, cached: how many features were computed, and how many came from the cache on disk.
    """

    seconds: float
    encoded: int
    cached: int


@dataclass
class Bench:
    """One data set and one encoder, shared by many runs: every image is encoded at most once.

    Attributes:
        images: the data set.
        encoder: the frozen encoder.
        features: [N, D] float32 on the CPU; rows are filled as runs need them.
        known, readable: [N], which rows were tried, and which could not be read.
        skipped: the images that could not be read.
    """

    images: ImageSet
    encoder: DualEncoder
    features: Tensor
    known: Flags
    readable: Flags
    skipped: list[Skipped] = field(default_factory=list)

    @classmethod
    def open(cls, config: Experiment) -> Bench:
        """List the images, check that the task can be made of them, and load the encoder.

        Raises:
            SordinoError: data, device or encoder are not what the configuration says.
        """
        device = choose_device(config.device)
        images = load_images(config.data)
        build_task(images, config.data, config.partition, config.seed)
        encoder = load_encoder(config.encoder.name, config.encoder.checkpoint, config.encoder.dtype, device)
        rows = len(images)
        features = torch.zeros(rows, encoder.feature_width)
        return cls(images, encoder, features, np.zeros(rows, dtype=bool), np.ones(rows, dtype=bool))

    def task(self, config: Experiment, progress: Progress) -> tuple[Task, Encoding]:
        """The task of a configuration on this data set, with every image that it uses encoded, and what that took.

        Raises:
            DataError: without the unreadable images there are too few.
        """
        started, encoded, cached = time.monotonic(), 0, 0
        while True:
            task = build_task(self.images, config.data, config.partition, config.seed, self.readable)
            missing = np.array([row for row in task.used if not self.known[row]], dtype=np.int64)
            if not len(missing):
                return task, Encoding(time.monotonic() - started, encoded, cached)
            result = encode(
                self.images.subset(missing),
                self.encoder,
                FeatureCache(),
                progress=lambda done, total: progress("encode images", done, total),
            )
            self.features[torch.from_numpy(missing)] = result.features
            self.known[missing] = True
            self.readable[missing] = result.readable
            self.skipped += result.skipped
            encoded, cached = encoded + result.encoded, cached + result.cached
            log.info("%d images encoded, %d from the cache", result.encoded, result.cached)
            for skipped in result.skipped:
                log.warning("skipped %s: %s", skipped.name, skipped.reason)
