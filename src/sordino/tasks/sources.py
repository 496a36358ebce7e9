"""Pictures with class labels from any of the supported sources: `load_images(settings) -> ImageSet`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from sordino.errors import require_extra, shortened
from sordino.files import user_path
from sordino.progress import log
from sordino.tasks.folders import every_picture, image_folder, labeled_folders
from sordino.tasks.images import ImageSet, with_gray_range
from sordino.tasks.persons import persons_of_table
from sordino.tasks.settings import DataSettings
from sordino.tasks.tables import METADATA, described_by, has_labels, listed_in_folder, metadata_of, table_of_pictures

__all__ = ["ImageSet", "load_images", "public_images"]

LISTS = (".csv", ".jsonl", ".parquet")  # that Hugging Face has beside pictures, also in folders of splits
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_images(settings: DataSettings) -> ImageSet:
    """List the pictures of a source; none is decoded yet.

    Raises:
        ConfigError: a column does not exist, or the settings must choose between columns.
        DataError: the source is missing or empty, or has no supported layout; or a picture has no person, where
            `data.persons` names a file of them.
        MissingExtra: it is a Hugging Face data set, and the extra `hub` is not installed.
    """
    images = _listed(settings)
    if settings.persons is not None:
        images = persons_of_table(images, user_path(settings.persons, "data.persons"))
    return _in_gray_range(images, settings)


def public_images(settings: DataSettings) -> ImageSet:
    """List the pictures of `data.public`; gray ones are read as the source's are.

    Raises:
        DataError: the folder is missing or empty.
    """
    assert settings.public is not None
    return _in_gray_range(every_picture(user_path(settings.public, "data.public"), "data.public"), settings)


def _in_gray_range(images: ImageSet, settings: DataSettings) -> ImageSet:
    if settings.gray_range is None:
        return images
    black, white = settings.gray_range
    return with_gray_range(images, (black, white))


def _listed(settings: DataSettings) -> ImageSet:
    kind, _, rest = settings.source.partition(":")
    if kind == "digits":
        return _digits()
    if kind == "textile":
        return _textile()
    if kind == "table":
        return table_of_pictures(user_path(rest, "data.source"), settings)
    if kind == "imagefolder":
        return _in_folders(user_path(rest, "data.source"), settings)
    require_extra("hub", f"data.source = {shortened(settings.source)}")
    from sordino.tasks.hub import hugging_face  # imports `datasets`, which takes a second

    return hugging_face(rest, settings)


def _in_folders(root: Path, settings: DataSettings) -> ImageSet:
    """List the pictures of a folder, by its `metadata.csv` if that has labels, else by its folders."""
    table = metadata_of(root, settings)
    if table is not None and has_labels(table, settings):
        return listed_in_folder(root, table, settings)
    read_too = () if table is None else (METADATA,)
    _tell_unread_lists(root, read_too, settings)
    images = image_folder(root, settings.source, settings.person_level, read_too)
    return images if table is None else described_by(images, table, settings)


def _tell_unread_lists(root: Path, read: Collection[str], settings: DataSettings) -> None:
    """Warn of a list that is not `metadata.csv` in the folder itself: it may say persons or splits."""
    beside = [*root.glob("metadata.*"), *root.glob("*/metadata.*")]
    lists = sorted(path.relative_to(root).as_posix() for path in beside if path.suffix in LISTS)
    unread = next((name for name in lists if name not in read), None)
    if unread is not None:
        log.warning(
            "%s: %s is not read; what it says of labels, persons and splits must be in %s of the folder itself, with a "
            "column 'file_name', or in a table of its own ('table:PATH')",
            settings.source,
            unread,
            METADATA,
        )


def _digits() -> ImageSet:
    """Load scikit-learn's 1,797 handwritten digits (UCI Optical Recognition of Handwritten Digits), 8 x 8 pixels.

    They are drawn as they are stored: 16 levels of ink, light on dark, as in MNIST. Encoders scale
    them up smoothly.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    return ImageSet(
        source="digits",
        class_names=DIGIT_NAMES,
        labels=digits.target.astype(np.int64),
        names=[f"digits[{row}]" for row in range(len(pixels))],
        read=lambda index: pixels[index].tobytes(),
        draw=lambda content: Image.frombytes("L", (8, 8), content),
    )


def _textile() -> ImageSet:
    """List 2,000 simulated pictures of woven fabric, from conformal-clip-data.

    Megahed et al., 2025 (arXiv 2501.12596).
    """
    import conformal_clip_data as package

    folders = {
        "fabric without a defect": package.nominal_dir(),
        "fabric with a local defect": package.local_dir(),
        "fabric with a global defect": package.global_dir(),
    }
    return labeled_folders("textile", package.textile_simulated_root(), folders)
