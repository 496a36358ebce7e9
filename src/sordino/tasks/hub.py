"""Hugging Face data sets: from the hub, a directory, a parquet file, or a folder that `save_to_disk` wrote."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from huggingface_hub.errors import HfHubHTTPError

from sordino.errors import ConfigError, DataError
from sordino.files import read_regular, user_path
from sordino.pictures.decoding import MAX_BYTES
from sordino.tasks.columns import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    chosen,
    existing,
    indexed,
    listed,
    person_of,
    warn_of_persons,
)
from sordino.tasks.images import ImageSet
from sordino.tasks.own_splits import of_split, says_test, says_train, split_column, test_of, with_splits
from sordino.tasks.passed_over import PassedOver
from sordino.tasks.persons import with_persons
from sordino.tasks.places import require_data_set
from sordino.tasks.settings import DataSettings


def hugging_face(where: str, settings: DataSettings) -> ImageSet:
    """List the pictures of a Hugging Face data set; its test (else validation) split is the source's own test split.

    A split whose labels are all missing or -1 is passed over; this is how test labels are withheld.
    Of a data set without a training split the first one is used, without a test split. If there is
    no test split, a column `split` may say which rows test. Rows of other splits are counted as
    passed over. No code of a data set is run.

    Args:
        where: a hub name, a directory, or a parquet file.
        settings: the `[data]` table.

    Raises:
        ConfigError: a column does not exist, or the settings must choose between columns.
        DataError: the data set is missing, cannot be reached, or has no usable split.
    """
    with _quiet():
        splits = _load(where, settings)
    image, label, domain = _columns(next(iter(splits.values())), settings)
    features = next(iter(splits.values())).features
    named_labels = {name: _values(split, label) for name, split in splits.items()}
    train, test = next((name for name in splits if says_train(name)), None), None
    if train is None:
        train = next(iter(splits))
    else:
        test = test_of([name for name in splits if _labeled(named_labels[name])])
    used = [name for name in (train, test) if name is not None]
    labels, class_names = indexed(
        [value for name in used for value in named_labels[name]],
        label,
        _order(features[label]),
        settings,
        "label_column",
    )
    if len(class_names) < 2:
        raise DataError(f"{settings.source}: column {label!r} holds only one class; at least two are needed")
    domains = domain_names = None
    if domain is not None:
        values = [value for name in used for value in _values(splits[name], domain)]
        domains, domain_names = indexed(values, domain, _order(features[domain]), settings, "domain_column")
    persons = None
    if settings.person_column is not None:
        column = settings.person_column
        persons = [person_of(value, column, settings) for name in used for value in _values(splits[name], column)]
    columns = [splits[name].select_columns([image]) for name in used]
    contents = [column.cast_column(image, datasets.Image(decode=False)) for column in columns]
    first, folder = len(contents[0]), _folder(where)

    def read(index: int) -> bytes:
        part, row = (contents[0], index) if index < first else (contents[1], index - first)
        return _content(part[row][image], folder)

    images = ImageSet(
        source=settings.source,
        class_names=class_names,
        labels=labels,
        names=[f"{name}[{row}]" for name in used for row in range(len(splits[name]))],
        read=read,
        domain_names=domain_names,
        domains=domains,
        is_test=None if test is None else np.arange(len(labels)) >= first,
        passed_over=tuple(
            PassedOver(of_split(name), Path(where).name, len(rows)) for name, rows in splits.items() if name not in used
        ),
    )
    if persons is not None:
        images = with_persons(images, persons)
    else:
        warn_of_persons([name for name in features if name not in (image, label, domain)], settings)
    return _by_column(images, [splits[name] for name in used], {image, label, domain, settings.person_column}, where)


def _by_column(images: ImageSet, splits: list[Dataset], taken: set[str | None], where: str) -> ImageSet:
    """Return the pictures that train or test by a column `split`, if there is one that says so.

    A column of this name may mean something else, and nobody can rename that of a data set on the hub. So it says the
    split only if a value of it is a split's name; or if all are, where the data set has splits without it.
    """
    column = split_column([name for name in splits[0].features if name not in taken], images.source)
    if column is None:
        return images
    values = [value for split in splits for value in _values(split, column)]
    if images.is_test is None and all(says_train(value) for value in values):
        return images  # of a data set that has no test split, or not here
    known = [says_train(value) or says_test(value) for value in values]
    says_splits = any(known) if images.is_test is None else all(known)
    return with_splits(images, values, column, Path(where).name) if says_splits else images


def _load(where: str, settings: DataSettings) -> dict[str, Dataset]:
    """Load the data set's splits, by name; empty ones are left out."""
    path = user_path(where, "data.source")
    require_data_set(where, settings.source)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path))
        elif path.is_file():
            raise DataError(f"{settings.source}: of single files only a '.parquet' file can be read")
        else:
            target = str(path) if path.exists() else where
            loaded = datasets.load_dataset(target, settings.hf_config, revision=settings.revision)
    except DataError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"{settings.source}: there is no such file or folder here, and the hub cannot be reached; give the path of "
            f"a local copy, or connect ({_first(error)})"
        ) from error
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DataError(f"{settings.source}: cannot be loaded: {_first(error)}") from error
    except Exception as error:
        # Readers of broken files (pyarrow, json, zip, ...) raise errors of their own types.
        raise DataError(f"{settings.source}: cannot be loaded: {type(error).__name__}: {_first(error)}") from error
    is_dict = isinstance(loaded, DatasetDict)
    splits = dict(loaded) if is_dict else {str(loaded.split or "train"): loaded}
    splits = {name: split for name, split in splits.items() if len(split)}
    if not splits:
        raise DataError(f"{settings.source}: it has no row")
    return splits


def _columns(split: Dataset, settings: DataSettings) -> tuple[str, str, str | None]:
    """Return the names of the image, label and domain columns."""
    features = split.features
    pictures = [name for name, feature in features.items() if _holds_pictures(feature)]
    classes = [
        name for name, feature in features.items() if isinstance(feature, ClassLabel) and name != settings.person_column
    ]
    image = chosen("image_column", settings.image_column, list(features), pictures, IMAGE_COLUMNS)
    if image not in pictures:
        raise ConfigError(
            "data.image_column",
            image,
            f"it holds no pictures; columns that do: {listed(pictures)}",
        )
    label = chosen("label_column", settings.label_column, list(features), classes, LABEL_COLUMNS)
    default_domain = "domain" if "domain" in features and label != "domain" else None
    domain = settings.domain_column or default_domain
    for key, column in (("domain_column", domain), ("person_column", settings.person_column)):
        if column is not None:
            existing(key, column, list(features))
    return image, label, domain


def _order(feature: Any) -> list[str] | None:
    """Return the order of a class label's names; None for other columns."""
    return feature.names if isinstance(feature, ClassLabel) else None


def _holds_pictures(feature: Any) -> bool:
    """Return true for an image column, also in the form in which other tools write one to a parquet file."""
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _values(split: Dataset, column: str) -> list[Any]:
    """Return a column's values, with a class label as its name (None if it is -1)."""
    values = split.select_columns([column]).with_format(None)[:][column]
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    return list(values)


def _labeled(values: list[Any]) -> bool:
    return any(value is not None and value != -1 for value in values)


def _content(cell: dict[str, Any] | None, folder: Path | None) -> bytes:
    """Return the content of a picture that a row holds, or of the file that it names."""
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        return b""
    content: bytes | None = cell["bytes"]
    if content is not None:
        if len(content) > MAX_BYTES:
            raise DataError(f"larger than the {MAX_BYTES:,} bytes that are read")
        return content
    path = Path(cell["path"])
    if not path.is_absolute():
        if folder is None:
            raise DataError(
                "its row names a file by a relative path, and the data set has no folder here",
            )
        path = folder / path
    return read_regular(path, MAX_BYTES)


def _folder(where: str) -> Path | None:
    """Return the folder to which paths in a data set are relative; None for a data set on the hub."""
    path = Path(where).expanduser()
    if path.is_dir():
        return path
    return path.parent if path.is_file() else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the libraries' own progress bars, which would break into ours, and their line for each retry."""
    libraries = (datasets, huggingface_hub.utils)
    shown = [bars for bars in libraries if not bars.are_progress_bars_disabled()]
    level = huggingface_hub.utils.logging.get_verbosity()
    for bars in shown:
        bars.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        huggingface_hub.utils.logging.set_verbosity(level)
        for bars in shown:
            bars.enable_progress_bars()


def _first(error: BaseException) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
