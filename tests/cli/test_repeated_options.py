"""An option that is repeated counts each time, and a thing that is given twice is refused or counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sordino.cli import app
from sordino.cli.app import invoke


@pytest.mark.parametrize(
    ("vary", "lines"),
    [
        (["rounds=1", "rounds=2"], [{"rounds": 1}, {"rounds": 2}]),
        (["rounds=1,2", " rounds =2,3"], [{"rounds": 1}, {"rounds": 2}, {"rounds": 3}]),
        (["rounds=1", "seed=4", "rounds=2"], [{"rounds": 1, "seed": 4}, {"rounds": 2, "seed": 4}]),
    ],
)
def test_a_key_that_is_varied_twice_has_the_values_of_both(
    vary: list[str], lines: list[dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, found = tmp_path / "c.toml", []
    file.write_text('algorithm = "local"\n[data]\nsource = "digits"\n[partition]\nscheme = "iid"\nclients = 2\n')

    def keep(variants: list[Any], *_: Any) -> None:
        found.extend(variants)

    monkeypatch.setattr(app, "_compare", keep)
    options = [word for each in vary for word in ("--vary", each)]
    command = ["compare", str(file), "--algorithms", "local", *options, "--out", str(tmp_path / "out")]
    assert invoke(command) == 0
    assert [{key: getattr(variant.config, key) for key in lines[0]} for variant in found] == lines
