"""The documents name what is there, and their examples work."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from sordino.algorithms import METHODS, algorithm
from sordino.config import EncoderSettings, Experiment, parse_config
from sordino.runtime.settings import RuntimeSettings
from sordino.tasks.settings import DataSettings, PartitionSettings

ROOT = Path(__file__).parents[1]


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    tables = [Experiment, DataSettings, PartitionSettings, EncoderSettings, RuntimeSettings]
    keys = {key for table in tables for key in table.model_fields}
    keys |= {field.name for name in METHODS for field in fields(algorithm(name).Settings)}
    assert not {key for key in keys if f"`{key}`" not in text and f"[{key}]" not in text}


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md"])
def test_configurations_in_documents_are_valid(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        parse_config(tomllib.loads(block))


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_examples_are_valid_for_every_method(example: Path) -> None:
    tables = tomllib.loads(example.read_text(encoding="utf-8"))
    for name in METHODS:
        parse_config(tables | {"algorithm": name})


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_lock_file_has_hashes_and_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if re.match(r"^[a-z0-9]", line)]
    assert len(pins) > 50
    assert all("==" in pin and pin.rstrip().endswith("\\") for pin in pins)
    assert not re.search(r"https?://|index-url|find-links", text)
