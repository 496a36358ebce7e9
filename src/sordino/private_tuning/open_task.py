"""Opens the task of a `sordino tune-private` configuration: reads data, splits it, and encodes pictures.

Shots depend on the seed alone. Test examples are the same for all seeds: a text task's test file, and for pictures the
source's own test split, or else a fixed half of every class. So settings can be chosen on "validation", the remaining
training examples, while test examples stay unseen. If it is known whose pictures are, nobody both trains and tests.
"""

from __future__ import annotations

import numpy as np
import torch

from sordino.encoders.bundled import BundledEncoder
from sordino.encoders.cache import FeatureCache
from sordino.encoders.encode import encode, tell_skipped
from sordino.private_tuning.search import projection
from sordino.private_tuning.settings import PrivateTuning, data_of, in_task_keys, task_keys_named
from sordino.private_tuning.tasks import TEST_SEED, ImageTask, Part, TextTask, drawn, text_task
from sordino.progress import Progress, log, silent
from sordino.tasks.images import Flags, ImageSet, Indices
from sordino.tasks.overview import doubts, tell_passed_over
from sordino.tasks.person_splits import testing_persons
from sordino.tasks.settings import DataSettings
from sordino.tasks.sources import load_images

HALVES_STREAM = 4  # purpose of a generator that is derived from the seed
HALF = DataSettings(source="digits", test_fraction=0.5)  # of pictures test; the source is not read


def open_task(config: PrivateTuning, part: Part = "test", progress: Progress = silent) -> TextTask | ImageTask:
    """Open the task of a configuration, with a few-shot split drawn from the seed.

    Args:
        config: of `sordino tune-private`.
        part: examples to test on.
        progress: receives the number of pictures encoded.

    Raises:
        ConfigError: a file or a checkpoint is missing, or the search is wider than the prompt.
        DataError: data is malformed, or there is too little.
    """
    task: TextTask | ImageTask
    if config.task.kind == "text":
        task = text_task(config, part)
    else:
        task = _image_task(config, part, progress)
        task.check_length()
    projection(config.search.search(config.seed), *task.start().shape)  # raises early if z does not fit
    return task


def pictures_of(config: PrivateTuning) -> ImageSet:
    """List the pictures of a configuration, as other commands read them.

    Raises:
        ConfigError, DataError: as `load_images`.
    """
    with task_keys_named():
        return load_images(data_of(config.task))


def _image_task(config: PrivateTuning, part: Part, progress: Progress) -> ImageTask:
    images = pictures_of(config)
    tell_passed_over(images)
    if doubt := doubts(images):
        log.warning("%s", in_task_keys(doubt))
    encoder = BundledEncoder.load(torch.device("cpu"))
    encoder.class_tokens(images.class_names)  # raises on names with equal tokens, before the encoding
    readable = np.ones(len(images), dtype=np.bool_)
    while True:
        train, test = split_images(images, readable, config, part)
        rows = np.concatenate([train, test])
        encoded = encode(
            images.subset(rows),
            encoder,
            FeatureCache(),
            progress=lambda done, total: progress("encode images", done, total),
        )
        tell_skipped(encoded.skipped)
        if encoded.readable.all():
            break
        readable[rows[~encoded.readable]] = False  # the next draw replaces them
    labels = torch.from_numpy(images.labels[rows])
    contents = tuple(
        digest for digest in encoded.digests if digest is not None
    )  # no digest is missing, as all pictures were read
    return ImageTask(
        embedder=encoder.text,
        class_names=images.class_names,
        initial=config.prompt.initial,
        length=config.prompt.length,
        project=encoder.project_text,
        logit_scale=encoder.logit_scale,
        features=encoded.features[: len(train)],
        labels=labels[: len(train)],
        test_features=encoded.features[len(train) :],
        test_labels=labels[len(train) :],
        digests=contents[: len(train)],
        test_digests=contents[len(train) :],
        encoder={"name": encoder.name, "fingerprint": encoder.fingerprint, "dtype": str(encoder.dtype)},
    )


def split_images(images: ImageSet, readable: Flags, config: PrivateTuning, part: Part) -> tuple[Indices, Indices]:
    """Draw shots, and pictures to test on; see `Part`.

    If it is known whose the pictures are, shots and pictures to test on share no person. A person with training
    pictures in the source's own split does not test, as in a run.

    Args:
        images: N pictures.
        readable: [N], false for pictures that could not be read. They do not change the draw of the others.
        config: gives the seed, `task.shots` and `task.test_limit`.
        part: examples to test on.

    Raises:
        DataError: a class has too few pictures.
    """
    tested = images.is_test if images.is_test is not None else _fixed_halves(images)
    trainable, testable, what = ~tested, tested, images.source
    if images.persons is not None:
        testable = tested & ~np.isin(images.persons, images.persons[trainable])
        what += ", where each person either trains or tests,"
    shots = drawn(images.labels, readable & trainable, config.task.shots, config.seed, what)
    if part == "validation":
        testable = trainable & ~np.isin(np.arange(len(images)), shots)
        if images.persons is not None:
            testable &= ~np.isin(images.persons, images.persons[shots])
    return shots, drawn(images.labels, readable & testable, config.task.test_limit, TEST_SEED, what)


def _fixed_halves(images: ImageSet) -> Flags:
    """Mark a half of each class, [N], the same in every run; of whole persons if it is known whose pictures are."""
    labels = images.labels
    if images.persons is not None:
        return testing_persons(images.persons, labels, HALF, TEST_SEED)
    tested = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels).tolist():
        generator = np.random.default_rng([TEST_SEED, HALVES_STREAM, label])
        rows = generator.permutation(np.flatnonzero(labels == label))
        tested[rows[: len(rows) // 2]] = True
    return tested
