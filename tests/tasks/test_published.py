"""The data that examples name: the environment says where they are, and a message says where they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from sordino.errors import SordinoError
from sordino.experiments.config import load_config
from sordino.private_tuning.open_task import open_task
from sordino.private_tuning.settings import load_private_config
from sordino.tasks import DataSettings
from sordino.tasks.sources import load_images

EXAMPLES = Path(__file__).parents[2] / "examples"
HOMES = ("https://data.caltech.edu/", "https://domaingeneralization.github.io", "https://gluebenchmark.com/tasks")


def read(example: Path) -> None:
    """Open the data of an example."""
    if example.name.startswith("private_"):
        open_task(load_private_config(example))
    else:
        load_images(load_config(example).data)


def test_the_environment_names_the_folder_of_the_examples_data(
    pictures: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start of a path only; a run directory has the path itself."""
    monkeypatch.setenv("SORDINO_DATA", str(tmp_path))
    source = "data.source=imagefolder:$SORDINO_DATA/pictures"
    assert load_config(config_file, [source]).data.source == f"imagefolder:{pictures}"
    monkeypatch.setenv("SORDINO_DATA", str(tmp_path / "pictures"))
    assert load_config(config_file, ["data.source=imagefolder:$SORDINO_DATA"]).data.source == f"imagefolder:{pictures}"
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for unset in (lambda: monkeypatch.setenv("SORDINO_DATA", ""), lambda: monkeypatch.delenv("SORDINO_DATA")):
        unset()
        assert load_config(config_file, [source]).data.source == f"imagefolder:{tmp_path}/a/shared/data/pictures"
    literal = "data.source=imagefolder:here/$SORDINO_DATA"
    assert load_config(config_file, [literal]).data.source.endswith("/a/b/here/$SORDINO_DATA")


@pytest.mark.parametrize("value", [None, "/no/such/folder"])
@pytest.mark.parametrize(
    "example", [path for path in sorted(EXAMPLES.glob("*.toml")) if "SORDINO_DATA" in path.read_text("utf-8")]
)
def test_an_example_without_its_data_says_how_to_get_them(
    example: Path, value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if value is None:
        monkeypatch.delenv("SORDINO_DATA", raising=False)
    else:
        monkeypatch.setenv("SORDINO_DATA", value)
    with pytest.raises(SordinoError) as error:
        read(example)
    (home,) = [home for home in HOMES if home in str(error.value)]
    assert home in (EXAMPLES.parent / "docs" / "install.md").read_text(encoding="utf-8")
    assert f"set SORDINO_DATA, which {'is not set' if value is None else f'is {value!r}'}, to the folder that" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_another_missing_folder_is_sent_nowhere(tmp_path: Path) -> None:
    with pytest.raises(SordinoError, match="give a folder laid out as"):
        load_images(DataSettings(source=f"imagefolder:{tmp_path}/mine"))
