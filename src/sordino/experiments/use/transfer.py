"""Saved prompts on another data set than the one that they were learned on (cross-dataset evaluation, as in CoCoOp).

A context says nothing of classes, so it stands before the names of other classes too. Parts of a prompt that belong to
a class, such as a residual, do nothing for classes of other names. Nothing is learned here, and nothing is released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from sordino.encoders.base import DualEncoder
from sordino.encoders.cache import FeatureCache, Kind
from sordino.encoders.encode import encode, tell_skipped
from sordino.encoders.generative.model import context_model
from sordino.encoders.prompt_model import Prompt, PromptModel, map_prompt
from sordino.errors import ConfigError, DataError, PromptError, config_error
from sordino.progress import Progress, silent
from sordino.prompt_file import SavedPrompt
from sordino.results import Interval, crossed, paired
from sordino.runtime.evaluate import EvaluationSet
from sordino.runtime.paired import paired_variance
from sordino.tasks.images import ImageSet, Indices
from sordino.tasks.overview import tell_passed_over
from sordino.tasks.settings import DataSettings
from sordino.tasks.sources import load_images


@dataclass(frozen=True)
class OnPrompt:
    """One prompt on the other data set.

    Attributes:
        file: of the prompt.
        client: whose it is; None if it is shared.
        accuracy: fraction of pictures.
        gain: over the hand-written prompt, paired by picture.
    """

    file: str
    client: int | None
    accuracy: float
    gain: Interval


@dataclass(frozen=True)
class Transfer:
    """Prompts on another data set.

    Attributes:
        source: of the data set, as in `data.source`.
        method: that learned the prompts.
        classes, pictures: of the data set.
        hand_written: accuracy of the hand-written prompt, a fraction.
        prompts: each one's figures.
        gain: of all prompts over the hand-written one; prompts and pictures are two crossed samples.
    """

    source: str
    method: str
    classes: int
    pictures: int
    hand_written: float
    prompts: tuple[OnPrompt, ...]
    gain: Interval

    @property
    def accuracy(self) -> float:
        """The mean over prompts."""
        return sum(each.accuracy for each in self.prompts) / len(self.prompts)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "source": self.source,
            "method": self.method,
            "classes": self.classes,
            "pictures": self.pictures,
            "hand_written": self.hand_written,
            "accuracy": self.accuracy,
            "gain": self.gain._asdict(),
            "prompts": [
                {"file": one.file, "client": one.client, "accuracy": one.accuracy, "gain": one.gain._asdict()}
                for one in self.prompts
            ],
        }

    def as_text(self) -> str:
        """Return two lines for a terminal."""
        count = len(self.prompts)
        whose = "its prompt" if count == 1 else f"the mean of {count} prompts"
        return (
            f"{self.method} on {self.source} ({self.classes} classes, {self.pictures:,} pictures): "
            f"{100 * self.accuracy:.1f}%, {whose}\n"
            f"  the hand-written prompt: {100 * self.hand_written:.1f}%, interval of the difference "
            f"{self.gain.percent()}"
        )


def transfer(
    prompts: Sequence[Path],
    source: str,
    per_class: int | None = None,
    seed: int = 0,
    checkpoint: str | None = None,
    progress: Progress = silent,
) -> Transfer:
    """Evaluate saved prompts on another data set, with its own class names.

    If the source has its own test split, that is used, else all pictures.

    Args:
        prompts: files, or run directories, whose prompts are all taken; of one method and one encoder.
        source: as `data.source`.
        per_class: the most pictures of a class, drawn by the seed; None: all.
        seed: of the draw.
        checkpoint: the folder or hub name where the prompts' encoder is now; None: where it was in training.
        progress: is told how far encoding is.

    Raises:
        PromptError, EncoderError: see `SavedPrompt`; or prompts of several methods, encoders or precisions are given.
        ConfigError: a prompt is given twice; or as DataError.
        DataError: the source is not there, or none of its pictures can be read.
    """
    files = [file for given in prompts for file in prompt_files(given)]
    places = [file.resolve() for file in files]
    if twice := [file for at, file in enumerate(files) if places[at] in places[:at]]:
        raise ConfigError("PROMPT", str(twice[0]), "is there twice, and would count twice in the mean; give it once")
    saved = [SavedPrompt.load(file) for file in files]
    for one in saved[1:]:
        if (one.method, one.encoder.identity) != (saved[0].method, saved[0].encoder.identity):
            raise PromptError(
                f"{one.source} is of another method, encoder or precision than {saved[0].source}; "
                "give those of one run at a time"
            )
    try:
        images = load_images(DataSettings(source=source))
    except ValidationError as error:
        raise ConfigError("--to", source, config_error(error, DataSettings).allowed) from None
    tell_passed_over(images)
    images = images.subset(_chosen(images, per_class, seed))
    encoder = saved[0].load_encoder(checkpoint)
    classifiers = [one.model(encoder, images.class_names) for one in saved]
    hand_written = context_model(encoder, encoder.class_tokens(images.class_names))
    read = _read(images, encoder, {hand_written.reads, *(one.model.reads for one in classifiers)}, progress)
    before = _hits(hand_written, encoder.zero_shot_context()[None], read)
    hits = torch.stack([_hits(one.model, one.prompt, read) for one in classifiers])  # [P, T]
    return _compared(source, saved, images, hits, before)


def prompt_files(given: Path) -> list[Path]:
    """Return a prompt's file, or all of a run directory's.

    Raises:
        ConfigError: it is a folder without prompts.
    """
    if not given.is_dir():
        return [given]
    files = sorted((given / "prompts").glob("*.safetensors"))
    if not files:
        raise ConfigError("PROMPT", str(given), "has no prompts/ of a finished run; give a run directory, or a file")
    return files


def _chosen(images: ImageSet, per_class: int | None, seed: int) -> Indices:
    rows = np.arange(len(images)) if images.is_test is None else np.flatnonzero(images.is_test)
    if per_class is None:
        return rows
    order = np.random.default_rng(seed).permutation(rows)
    taken = [order[images.labels[order] == label][:per_class] for label in range(len(images.class_names))]
    return np.sort(np.concatenate(taken))


@dataclass(frozen=True)
class _Read:
    """Features of T pictures: by kind [T, ...], on the CPU, and their labels [T]."""

    features: dict[Kind, Tensor]
    labels: Tensor


def _read(images: ImageSet, encoder: DualEncoder, kinds: set[Kind], progress: Progress) -> _Read:
    """Encode pictures in every way that is needed; those that cannot be read in one of them are left out."""

    def told(done: int, total: int) -> None:
        progress("encode images", done, total)

    found = {kind: encode(images, encoder, FeatureCache(), kind=kind, progress=told) for kind in sorted(kinds)}
    tell_skipped(next(iter(found.values())).skipped)
    readable = np.flatnonzero(np.logical_and.reduce([one.readable for one in found.values()]))
    if not len(readable):
        raise DataError(f"none of the {len(images):,} pictures of {images.source!r} can be read; give another source")
    rows = torch.from_numpy(readable)
    return _Read({kind: one.features[rows] for kind, one in found.items()}, torch.from_numpy(images.labels)[rows])


def _hits(model: PromptModel, prompt: Prompt, read: _Read) -> Tensor:
    """Return which pictures a stack of one prompt classifies correctly, [T] float64 on the CPU."""
    device = model.encoder.device
    held = EvaluationSet(model, read.features[model.reads].to(device), read.labels.to(device))
    with torch.inference_mode():
        return held.correct(map_prompt(prompt, lambda part: part.to(device)))[0].cpu().double()


def _compared(source: str, saved: Sequence[SavedPrompt], images: ImageSet, hits: Tensor, before: Tensor) -> Transfer:
    differences = hits - before  # [P, T]
    prompts = tuple(
        OnPrompt(one.source, one.client, float(row.mean()), paired(difference.tolist()))
        for one, row, difference in zip(saved, hits, differences, strict=True)
    )
    varies = paired_variance(differences, torch.ones_like(differences))
    by_prompt = differences.mean(1).tolist()
    gain = crossed(float(differences.mean()), by_prompt, varies.pictures, varies.over_pictures, varies.over_pairs)
    return Transfer(
        source, saved[0].method, len(images.class_names), varies.pictures, float(before.mean()), prompts, gain
    )
