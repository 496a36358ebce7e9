"""The prompts of a run, as files that say what they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import sordino
from sordino.algorithms import settings_for
from sordino.encoders.base import DualEncoder
from sordino.encoders.prompt_model import Prompt, named_parts, prompt_count
from sordino.experiments.config import Experiment
from sordino.files import absolute_path, user_path
from sordino.prompt_file import EncoderRecord, PrivacyRecord, SavedPrompt


def save_prompts(
    folder: Path,
    config: Experiment,
    encoder: DualEncoder,
    class_names: Sequence[str],
    prompt: Prompt,
    privacy: Mapping[str, Any],
    clients: Sequence[int] | None = None,
    words: Sequence[str] = (),
) -> None:
    """Write one file a client, or one for all where they share a prompt; each says what it belongs to.

    Only their owner may read the files: a prompt to which no noise was added tells of its client's pictures.

    Args:
        folder: of the files.
        config: of the run.
        encoder: the run's.
        class_names: the C classes.
        prompt: of the clients.
        privacy: of the run, as its summary says it.
        clients: [K], the numbers of those whose own prompts these are; by default from 0, if there are several.
        words: the prompts as text, one for each, if they are words.

    Raises:
        RunError: one cannot be written.
    """
    parts = {name: part.cpu() for name, part in named_parts(prompt).items()}
    count = prompt_count(prompt)
    black_and_white = config.data.gray_range
    shared = SavedPrompt(
        prompt={},
        method=config.algorithm,
        settings=asdict(settings_for(config.algorithm, config.settings)),
        class_names=tuple(class_names),
        encoder=EncoderRecord(
            name=encoder.name,
            fingerprint=encoder.fingerprint,
            checkpoint=_from_anywhere(config.encoder.checkpoint),
            dtype=config.encoder.dtype,
            generative=config.encoder.generative,
        ),
        privacy=PrivacyRecord(
            private=privacy["private"],
            simulated=privacy["simulated"],
            statement=privacy["statement"],
            ledger_sha256=privacy["ledger_digest"],
        ),
        version=sordino.__version__,
        gray_range=None if black_and_white is None else (black_and_white[0], black_and_white[1]),
    )
    owners: Sequence[int | None] = clients or (range(count) if count > 1 else [None])
    for place, client in enumerate(owners):
        client_parts = {part: tensor[place] for part, tensor in parts.items()}
        name = "shared" if client is None else f"client-{client:04d}"
        saved = replace(
            shared,
            prompt=client_parts["context"] if isinstance(prompt, Tensor) else client_parts,
            client=client,
            words=words[place] if words else None,
        )
        saved.save(folder / f"{name}.safetensors", private=True)


def _from_anywhere(checkpoint: str | None) -> str | None:
    """A checkpoint's folder from the root, so that a prompt is used in whatever folder; a hub name as it is."""
    if checkpoint is None or not user_path(checkpoint, "encoder.checkpoint").is_dir():
        return checkpoint
    return str(absolute_path(checkpoint, "encoder.checkpoint"))
