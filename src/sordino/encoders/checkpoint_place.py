"""Where a checkpoint is: a folder, or a name on the hub. This imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from sordino.errors import EncoderError
from sordino.files import user_path


def checkpoint_folder(checkpoint: str) -> Path | None:
    """Return the folder that a checkpoint's name leads to; None if it is a name on the hub.

    Raises:
        EncoderError: it is neither.
    """
    folder = user_path(checkpoint, "encoder.checkpoint")
    if folder.is_dir():
        return folder
    if folder.is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") != 1:
        raise EncoderError(
            f"checkpoint {checkpoint!r}: no such folder; give a folder with config.json, or a hub name 'owner/model'"
        )
    return None
