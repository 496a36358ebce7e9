"""What docs/serving.md shows of refused prompts is what is said."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pages.blocks import shown
from sordino.errors import SordinoError
from sordino.serving.registry import Registry
from sordino.serving.sources import from_run
from sordino.serving.trust import Trusted, publisher_key


def test_prompts_are_refused_as_on_the_page(shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused, damaged = shown("docs/serving.md")
    own, _ = publisher_key()
    material = from_run(shared_run, own)
    with Registry("sqlite:///prompts.db", create=True) as registry:
        with pytest.raises(SordinoError) as error:
            registry.publish("fabric-faults", material.facts, material.files, own)
        assert re.fullmatch(re.escape(refused).replace(re.escape("(...)"), r"\(.*\)"), f"sordino: {error.value}")
        registry.publish("fabric-faults", material.facts, material.files, own, accept_not_private=True)
    with closing(sqlite3.connect("prompts.db")) as database, database:
        for (trigger,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {trigger}")
        assert database.execute("UPDATE files SET content = x'7b7d' WHERE name = 'ledger.json'").rowcount == 1
    with Registry("sqlite:///prompts.db") as registry, pytest.raises(SordinoError) as error:
        registry.load("fabric-faults", None, Trusted.of())
    assert f"sordino: {error.value}" == damaged
