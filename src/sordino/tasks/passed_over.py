"""Counts of files under a source's folder that are no pictures of it, by kind and folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sordino.pictures.decoding import remedy, suffixes

# Files that systems and programs leave beside pictures; they are no part of anybody's data and are
# not counted.
JUNK = frozenset(
    {
        *(
            "__macosx",
            "thumbs.db",
            "ehthumbs.db",
            "ehthumbs_vista.db",
            "desktop.ini",
            "@eadir",
            "#recycle",
        ),
        *("$recycle.bin", "system volume information", "lost+found", "__pycache__", "icon\r"),
    }
)
NO_EXTENSION, DANGLING, HIDDEN = "no extension", "dangling link", "hidden"
IRREGULAR, UNLISTED = "no regular file", "folder that cannot be listed"
LAYERS = 2  # layers of folders in a layout, which may be links
FOLDERS_SHOWN = 3  # for each kind, in a message


@dataclass(frozen=True)
class PassedOver:
    """Files of one kind in one folder that were passed over, or pictures of a split that is not used.

    Attributes:
        kind: the lower-case ending ('.txt'), 'misplaced .png' for a picture outside of the layout,
            'no extension', 'dangling link', 'hidden' (pictures only), 'no regular file', 'folder
            that cannot be listed', or "of split 'val'".
        folder: the folder relative to the source's folder, '.' for itself; or the name of the table
            or data set whose rows these are.
        files: number of files, or rows.
    """

    kind: str
    folder: str
    files: int


def is_junk(name: str) -> bool:
    """Return true if a file or folder of this name comes from a system rather than from a person."""
    return name.lower() in JUNK or name.startswith("._")


def files_passed_over(
    root: Path,
    used: Collection[str],
    tops: Sequence[Path] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> list[PassedOver]:
    """Count the files under `root`, or under some folders of it, that are not used.

    Args:
        root: the source's folder.
        used: names of used files relative to it, with forward slashes.
        tops: the folders to look under; None means `root` itself.
        kinds: by name, the kind of files whose kind their names do not say.
    """
    kinds = kinds or {}
    counts: Counter[tuple[str, str]] = Counter()
    for top in [root] if tops is None else tops:
        for kind, path in _beside(top, LAYERS):
            name = path.relative_to(root).as_posix()
            if name not in used:
                folder = path.parent.relative_to(root).as_posix()
                counts[kinds.get(name, kind), folder.encode("utf-8", "backslashreplace").decode()] += 1
    return [PassedOver(kind, folder, files) for (kind, folder), files in sorted(counts.items())]


def told(passed_over: Sequence[PassedOver]) -> str:
    """Return one line on the files that were passed over, their folders, and the remedy if there is one."""
    by_kind: dict[str, list[PassedOver]] = {}
    for part in passed_over:
        by_kind.setdefault(part.kind, []).append(part)
    parts = [_told_of(kind, some) for kind, some in by_kind.items()]
    return f"passed over {sum(part.files for part in passed_over)} files: {'; '.join(parts)}"


def _told_of(kind: str, some: Sequence[PassedOver]) -> str:
    folders = [repr(part.folder) for part in some]
    more = len(folders) - FOLDERS_SHOWN
    where = ", ".join(folders[:FOLDERS_SHOWN]) + (f" and {more} more folders" if more > 0 else "")
    if kind == NO_EXTENSION:
        advice = " (give them the ending of their format, such as .jpg or .dcm)"
    else:
        advice = f" ({install})" if (install := remedy(kind)) else ""
    return f"{sum(part.files for part in some)} {kind} in {where}{advice}"


def _beside(folder: Path, layers: int) -> Iterator[tuple[str, Path]]:
    """Yield every file under a folder with its kind, pictures as misplaced ones.

    Links to folders are followed for `layers` layers.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        yield UNLISTED, folder
        return
    for path in paths:
        hidden = path.name.startswith(".")
        if is_junk(path.name) or (hidden and path.suffix.lower() not in suffixes()):
            continue
        if path.is_dir():
            if not hidden and (layers > 0 or not path.is_symlink()):
                yield from _beside(path, layers - 1)
        elif hidden:
            yield HIDDEN, path
        else:
            yield _kind(path), path


def _kind(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return DANGLING
    if not path.is_file():
        return IRREGULAR
    suffix = path.suffix.lower()
    return f"misplaced {suffix}" if suffix in suffixes() else suffix or NO_EXTENSION
