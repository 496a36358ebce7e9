"""Fixtures of the sites' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from sites.owners import NAMES, write_pictures, write_site


@pytest.fixture
def site_files(tmp_path: Path, clip_folder: Path) -> dict[str, Path]:
    """The files of three sites with pictures of their own, by name."""
    files = {}
    for number, name in enumerate(NAMES):
        write_pictures(tmp_path / name / "pictures", number, 5 + number)
        files[name] = write_site(tmp_path / name, name, clip_folder)
    return files
