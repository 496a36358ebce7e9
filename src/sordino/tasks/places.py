"""Folders and files that `[data]` names. This imports nothing heavy, so a wrong name is refused at once."""

from __future__ import annotations

from pathlib import Path

from sordino.errors import DataError
from sordino.files import require_file, require_folder, user_path
from sordino.tasks.published import how_to_get
from sordino.tasks.settings import DataSettings

LAYOUTS = "ROOT/CLASS/picture.jpg or ROOT/DOMAIN/CLASS/picture.jpg"


def check_places(data: DataSettings) -> None:
    """Check that everything is there that is to be read; what it holds is not looked at.

    Raises:
        DataError: a folder or file is missing.
        ConfigError: no file can have such a name.
    """
    kind, _, rest = data.source.partition(":")
    if kind == "imagefolder":
        require_image_folder(user_path(rest, "data.source"), data.source)
    if kind == "table":
        require_table(user_path(rest, "data.source"), data.source)
    if kind == "hf":
        require_data_set(rest, data.source)
    if data.public is not None:
        require_folder(user_path(data.public, "data.public"), "data.public")
    if data.persons is not None:
        require_file(user_path(data.persons, "data.persons"), f"data.persons: {data.persons!r}")


def require_image_folder(root: Path, source: str) -> None:
    """Check that a folder of pictures is there.

    Raises:
        DataError: there is none.
    """
    published = how_to_get(root)
    require_folder(root, source, published or f"; give a folder laid out as {LAYOUTS}", similar=not published)


def require_table(path: Path, source: str) -> None:
    """Check that a table of pictures is there.

    Raises:
        DataError: there is none.
    """
    require_file(path, f"{source}:")


def require_data_set(where: str, source: str) -> None:
    """Check that a Hugging Face data set is there, if it can only be a path and no name on the hub.

    Raises:
        DataError: there is no such file or folder.
    """
    if where.startswith((".", "/", "~")) and not user_path(where, "data.source").exists():
        raise DataError(f"{source}: there is no such file or folder")
