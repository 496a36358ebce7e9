"""The task of a configuration of `sordino tune-private`: read, split, and with pictures encoded.

The shots depend on the seed alone. What is tested on is the same for all seeds: a text task's test file; of pictures
the source's own test split, or else a fixed half of every class. So settings can be chosen on "validation", the other
examples of the training side, while tests stay unseen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sordino.encoders.bundled import BundledEncoder
from sordino.encoders.cache import FeatureCache
from sordino.encoders.encode import encode, tell_skipped
from sordino.private_tuning.search import projection
from sordino.private_tuning.settings import PrivateTuning
from sordino.private_tuning.tasks import TEST_SEED, ImageTask, Part, TextTask, drawn, text_task
from sordino.progress import Progress, log, silent
from sordino.tasks.folders import image_folder
from sordino.tasks.images import Flags, ImageSet, Indices, with_grey_range
from sordino.tasks.passed_over import told

HALVES_STREAM = 4  # what a generator derived from the seed is for


def open_task(config: PrivateTuning, part: Part = "test", progress: Progress = silent) -> TextTask | ImageTask:
    """The task of a configuration, its few-shot split drawn from the seed.

    Args:
        config: of `sordino tune-private`.
        part: what to test on.
        progress: is told how many pictures are encoded.

    Raises:
        ConfigError: a file or a checkpoint is missing, or the search is wider than the prompt.
        DataError: data is malformed, or too little.
    """
    task: TextTask | ImageTask
    if config.task.kind == "text":
        task = text_task(config, part)
    else:
        task = _image_task(config, part, progress)
        task.check_length()
    projection(config.search.search(config.seed), *task.start().shape)  # refuses what does not fit, before it is needed
    return task


def _image_task(config: PrivateTuning, part: Part, progress: Progress) -> ImageTask:
    source = str(config.task.source)
    images = image_folder(Path(source.partition(":")[2]), source)
    if images.passed_over:
        log.warning("%s", told(images.passed_over))
    if config.task.grey_range is not None:
        images = with_grey_range(images, (config.task.grey_range[0], config.task.grey_range[1]))
    encoder = BundledEncoder.load(torch.device("cpu"))
    encoder.class_tokens(images.class_names)  # refuses names that read the same, before anything is encoded
    readable = np.ones(len(images), dtype=np.bool_)
    while True:
        train, test = split_images(images, readable, config, part)
        rows = np.concatenate([train, test])
        found = encode(
            images.subset(rows),
            encoder,
            FeatureCache(),
            progress=lambda done, total: progress("encode images", done, total),
        )
        tell_skipped(found.skipped)
        if found.readable.all():
            break
        readable[rows[~found.readable]] = False  # and others are drawn in their place
    labels = torch.from_numpy(images.labels[rows])
    contents = tuple(digest for digest in found.digests if digest is not None)  # all of them, as all were read
    return ImageTask(
        embedder=encoder.text,
        class_names=images.class_names,
        initial=config.prompt.initial,
        length=config.prompt.length,
        project=encoder.project_text,
        logit_scale=encoder.logit_scale,
        features=found.features[: len(train)],
        labels=labels[: len(train)],
        test_features=found.features[len(train) :],
        test_labels=labels[len(train) :],
        digests=contents[: len(train)],
        test_digests=contents[len(train) :],
        encoder={"name": encoder.name, "fingerprint": encoder.fingerprint, "dtype": str(encoder.dtype)},
    )


def split_images(images: ImageSet, readable: Flags, config: PrivateTuning, part: Part) -> tuple[Indices, Indices]:
    """Shots, and pictures to test on, see `Part`.

    Args:
        images: N.
        readable: [N], false for pictures that could not be read; they do not change the draw of the others.
        config: its seed, `task.shots` and `task.test_limit`.
        part: what to test on.

    Raises:
        DataError: a class has too few.
    """
    tested = images.is_test if images.is_test is not None else _fixed_halves(images.labels)
    shots = drawn(images.labels, readable & ~tested, config.task.shots, config.seed, images.source)
    among = tested if part == "test" else ~tested & ~np.isin(np.arange(len(images)), shots)
    return shots, drawn(images.labels, readable & among, config.task.test_limit, TEST_SEED, images.source)


def _fixed_halves(labels: Indices) -> Flags:
    """[N], true for a half of each class, the same whatever the run."""
    tested = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels).tolist():
        rows = np.random.default_rng([TEST_SEED, HALVES_STREAM, label]).permutation(np.flatnonzero(labels == label))
        tested[rows[: len(rows) // 2]] = True
    return tested
