"""Published data sets that examples name: where outsiders get them, for messages about missing files."""

from __future__ import annotations

import os
from pathlib import Path

from sordino.files import DATA

# By the name of the folder that an example reads.
_HOMES = {
    "caltech101": "Caltech-101 (Fei-Fei et al., 2004), from https://data.caltech.edu/records/mzrjq-6wc02, laid out as "
    "caltech101/CLASS/picture.jpg",
    "pacs": "PACS (Li et al., 2017), from https://domaingeneralization.github.io, laid out as "
    "pacs/DOMAIN/CLASS/picture.jpg",
    "sst2": "SST-2 of GLUE (Socher et al., 2013), from https://gluebenchmark.com/tasks, as sst2/train.tsv and "
    "sst2/validation.tsv",
}


def how_to_get(path: Path) -> str:
    """Return a sentence on getting the data set that a missing path belongs to, by its folder; "" if it is none."""
    home = next((_HOMES[name] for name in (path.name, path.parent.name) if name in _HOMES), None)
    if home is None:
        return ""
    value = os.environ.get(DATA[1:])
    state = f"is {value!r}" if value else "is not set"
    return f"; get {home}, and set {DATA[1:]}, which {state}, to the folder that holds it"
