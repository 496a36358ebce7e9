"""Pictures in folders: class folders, or folders of domains or splits that hold class folders."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sordino.errors import DataError
from sordino.files import read_regular, require_folder
from sordino.pictures.decoding import MAX_BYTES, suffixes
from sordino.tasks.images import ImageSet
from sordino.tasks.own_splits import of_split, require_no_splits, split_of_folders
from sordino.tasks.passed_over import files_passed_over, is_junk, told
from sordino.tasks.persons import persons_of_folders
from sordino.tasks.places import LAYOUTS, require_image_folder
from sordino.tasks.settings import spoken

PERSON_LAYERS = 4  # of folders that are looked through for persons; a layout has 3 at most


def image_folder(root: Path, source: str, person_level: int | None = None, beside: Collection[str] = ()) -> ImageSet:
    """List the pictures under `root`; the depth of its folders tells whether it has domains.

    The layout is ROOT/CLASS/picture or ROOT/DOMAIN/CLASS/picture. If the upper folders are 'train'
    and one of 'test', 'val', ..., they are the source's own test split rather than domains
    (`split_of_folders`). A folder's name, with underscores as spaces, names its class or domain.
    Pictures come in the order of sorted names, so it is the same everywhere. Hidden files and
    folders do not count, nor do system files such as __MACOSX and Thumbs.db.

    Args:
        root: the folder.
        source: the source as in the settings, for messages.
        person_level: the level of the folders that are persons, 1 directly above the pictures. The layout is then one
            of these two with a folder of a person at that level in addition, such as ROOT/CLASS/PERSON/picture for 1
            and ROOT/PERSON/CLASS/picture for 2. None if no folder is a person.
        beside: names of files in `root` that are read too, so that they are not passed over.

    Raises:
        DataError: `root` is missing, a folder holds no picture, pictures lie at two depths, there
            are fewer than two classes, or it is unclear which folders train and which test. The
            message names the folder.
    """
    require_image_folder(root, source)
    if person_level is not None:
        return _folders_of_persons(root, source, person_level, beside)
    upper = _folders(root)
    if not upper:
        raise DataError(f"{source}: folder {str(root)!r} has no class folders; lay it out as {LAYOUTS}")
    nested = [_is_nested(folder) for folder in upper]
    if any(nested) and not all(nested):
        flat, deep = upper[nested.index(False)], upper[nested.index(True)]
        raise DataError(
            f"{source}: folder {flat.name!r} holds pictures, but {deep.name!r} holds folders of pictures; use one "
            f"layout throughout: {LAYOUTS}"
        )
    if not all(nested):
        by_name = {name: [folder] for name, folder in _by_class_name(upper, source).items()}
        return _class_folders(source, root, by_name, beside)
    by_class = {folder.name: _by_class_name(_folders(folder), source) for folder in upper}
    groups = {name: {label: [place] for label, place in folders.items()} for name, folders in by_class.items()}
    return _grouped_folders(source, root, groups, beside)


def every_picture(root: Path, source: str) -> ImageSet:
    """List all pictures under `root`, at any depth, without classes: all have the class "picture".

    Hidden files and folders do not count, nor do system files.

    Raises:
        DataError: `root` is missing, or holds no picture.
    """
    require_folder(root, source)
    names = [path.relative_to(root).as_posix() for path in _pictures_below(root)]
    passed_over = tuple(files_passed_over(root, set(names)))
    if not names:
        contents = f" ({told(passed_over)})" if passed_over else ""
        raise DataError(f"{source}: folder {str(root)!r} holds no picture{contents}")
    return ImageSet(
        source=source,
        class_names=("picture",),
        labels=np.zeros(len(names), dtype=np.int64),
        names=names,
        read=lambda index: read_regular(root / names[index], MAX_BYTES),
        passed_over=passed_over,
    )


def labeled_folders(source: str, root: Path, folders: Mapping[str, Path]) -> ImageSet:
    """List the pictures of class folders given by class name; the folders' order is the classes' order."""
    images = _class_folders(source, root, {name: [folder] for name, folder in folders.items()})
    return replace(images, passed_over=tuple(files_passed_over(root, set(images.names), list(folders.values()))))


def _class_folders(
    source: str, root: Path, folders: Mapping[str, Sequence[Path]], beside: Collection[str] = ()
) -> ImageSet:
    """List the pictures of classes, each of which has one folder or several."""
    names, labels = _listing(root, folders, {name: index for index, name in enumerate(folders)})
    _check_classes(source, list(folders))
    return ImageSet(
        source=source,
        class_names=tuple(folders),
        labels=np.asarray(labels, dtype=np.int64),
        names=names,
        read=lambda index: read_regular(root / names[index], MAX_BYTES),
        passed_over=tuple(files_passed_over(root, {*names, *beside})),
    )


def _folders_of_persons(root: Path, source: str, level: int, beside: Collection[str]) -> ImageSet:
    """List the pictures of a layout that has a folder of a person at a level."""
    filled = _filled_folders(root)
    if not filled:
        raise DataError(f"{source}: folder {str(root)!r} has no folders with pictures; lay it out as {LAYOUTS}")
    parts = [folder.relative_to(root).parts for folder in filled]
    depth = len(parts[0])
    other = next((place for place in parts if len(place) != depth), None)
    if other is not None:
        raise DataError(
            f"{source}: pictures lie in {'/'.join(parts[0])!r} and in {'/'.join(other)!r}, at two depths; use one "
            "layout throughout"
        )
    if depth not in (2, 3) or level > depth:
        raise DataError(
            f"{source}: pictures lie {depth} folders deep, as in {'/'.join(parts[0])!r}; with data.person_level = "
            f"{level}, the layout must be {LAYOUTS} with a folder of a person in addition, at level {level} above the "
            "pictures"
        )
    # Without the person's folder, the other folders are a layout as any.
    groups: dict[str, dict[str, list[Path]]] = {}
    for folder, place in sorted(zip(filled, parts, strict=True), key=lambda pair: _without(pair[1], level)):
        *upper, class_folder = _without(place, level)
        groups.setdefault("/".join(upper), {}).setdefault(class_folder, []).append(folder)
    by_class: dict[str, dict[str, list[Path]]] = {}
    for name, folders in groups.items():
        labeled = _by_class_name([Path(folder) for folder in folders], source)
        by_class[name] = {class_name: folders[folder.name] for class_name, folder in labeled.items()}
    if depth == 2:
        return persons_of_folders(_class_folders(source, root, by_class[""], beside), level)
    return persons_of_folders(_grouped_folders(source, root, by_class, beside), level)


def _without(parts: tuple[str, ...], level: int) -> tuple[str, ...]:
    """Return a path's folders without that at a level, 1 for the last."""
    return parts[: len(parts) - level] + parts[len(parts) - level + 1 :]


def _filled_folders(root: Path, layers: int = PERSON_LAYERS) -> list[Path]:
    """Return the folders below `root` that hold pictures directly, at most `layers` down, in their paths' order."""
    found: list[Path] = []
    for folder in _folders(root) if layers else []:
        found += [folder] if _has_pictures(folder) else []
        found += _filled_folders(folder, layers - 1)
    return found


def _grouped_folders(
    source: str, root: Path, groups: Mapping[str, Mapping[str, Sequence[Path]]], beside: Collection[str]
) -> ImageSet:
    """List the pictures of folders of domains or splits; classes are the union over all of these groups."""
    split = split_of_folders(list(groups), source)
    kinds: dict[str, str] = {}  # of pictures that are not used, by their names
    if split is not None:
        for name in split.unused:
            unused, _ = _listing(root, groups[name], dict.fromkeys(groups[name], 0))
            kinds |= dict.fromkeys(unused, of_split(name))
        groups = {name: folders for name, folders in groups.items() if name not in split.unused}
    class_names = sorted({name for folders in groups.values() for name in folders})
    _check_classes(source, class_names)
    names: list[str] = []
    labels: list[int] = []
    group_of: list[int] = []
    index_of = {name: index for index, name in enumerate(class_names)}
    for number, folders in enumerate(groups.values()):
        more_names, more_labels = _listing(root, folders, index_of)
        names += more_names
        labels += more_labels
        group_of += [number] * len(more_names)
    group = np.asarray(group_of, dtype=np.int64)
    if split is None:
        _domains_differ(source, list(groups))
    return ImageSet(
        source=source,
        class_names=tuple(class_names),
        labels=np.asarray(labels, dtype=np.int64),
        names=names,
        read=lambda index: read_regular(root / names[index], MAX_BYTES),
        domain_names=None if split is not None else tuple(spoken(name) for name in groups),
        domains=None if split is not None else group,
        is_test=None if split is None else group == list(groups).index(split.test),
        passed_over=tuple(files_passed_over(root, {*names, *beside}, kinds=kinds)),
    )


def _listing(
    root: Path,
    folders: Mapping[str, Sequence[Path]],
    index_of: Mapping[str, int],
) -> tuple[list[str], list[int]]:
    """Return the pictures' names relative to `root`, and their labels."""
    names: list[str] = []
    labels: list[int] = []
    for class_name, places in folders.items():
        files = [path for folder in places for path in _visible(folder) if path.suffix.lower() in suffixes()]
        pictures = [path for path in files if path.is_file()]
        names += [path.relative_to(root).as_posix() for path in pictures]
        labels += [index_of[class_name]] * len(pictures)
    return names, labels


def _pictures_below(folder: Path) -> list[Path]:
    """Return the pictures in a folder and in all folders below it, in the order of their names."""
    found: list[Path] = []
    for path in _visible(folder):
        if path.is_dir():
            found += _pictures_below(path) if not path.is_symlink() else []
        elif path.suffix.lower() in suffixes() and path.is_file():
            found.append(path)
    return found


def _is_nested(folder: Path) -> bool:
    """Return true if `folder` holds folders of pictures, and false if it holds pictures itself.

    Raises:
        DataError: it holds both or neither, or its pictures lie deeper.
    """
    inner = _folders(folder)
    filled = [child for child in inner if _has_pictures(child)]
    if _has_pictures(folder):
        if filled:
            raise DataError(
                f"folder {str(folder)!r} holds both pictures and a folder of pictures ({filled[0].name!r}); "
                f"use one layout: {LAYOUTS}"
            )
        return False
    if not filled:
        others = files_passed_over(folder, ())
        contents = f" ({told(others)})" if others else ""
        raise DataError(f"folder {str(folder)!r} holds no picture{contents}; remove it or fill it (layout: {LAYOUTS})")
    for child in inner:
        if _is_nested(child):
            raise DataError(f"the pictures in folder {str(child)!r} lie too deep; use one layout: {LAYOUTS}")
    return True


def _by_class_name(folders: list[Path], source: str) -> dict[str, Path]:
    """Return class folders by class name.

    Raises:
        DataError: a name is empty, or two folders name the same class.
    """
    named: dict[str, Path] = {}
    for folder in folders:
        name = spoken(folder.name)
        if not name:
            raise DataError(f"{source}: folder {folder.name!r} gives its class no name; rename it")
        if name in named:
            raise DataError(
                f"{source}: folders {named[name].name!r} and {folder.name!r} name the same class {name!r}; merge them"
            )
        named[name] = folder
    return named


def _domains_differ(source: str, folders: list[str]) -> None:
    named: dict[str, str] = {}
    for folder in folders:
        if not spoken(folder):
            raise DataError(f"{source}: folder {folder!r} gives its domain no name; rename it")
        if (other := named.setdefault(spoken(folder), folder)) != folder:
            raise DataError(
                f"{source}: folders {other!r} and {folder!r} name the same domain {spoken(folder)!r}; merge them"
            )


def _check_classes(source: str, class_names: list[str]) -> None:
    require_no_splits(class_names, source)
    if len(class_names) < 2:
        raise DataError(f"{source}: only one class ({class_names[0]!r}); at least two are needed")


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in suffixes() and path.is_file() for path in _visible(folder))


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"folder {str(folder)!r} cannot be listed: {error.strerror}") from error
    return [path for path in paths if not (path.name.startswith(".") or is_junk(path.name))]
