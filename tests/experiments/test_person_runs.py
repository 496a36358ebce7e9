"""The person as unit of privacy, from the configuration to the run directory, its ledger and its audit."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sordino.audit.run import audit
from sordino.cli.app import app
from sordino.errors import ConfigError, RunError
from sordino.experiments.config import load_config
from sordino.experiments.privacy.plan import as_text, plan
from sordino.experiments.run import run
from sordino.privacy.accounting import epsilon
from sordino.privacy.ledger import Ledger

BY_PERSON = ["privacy.unit=person", "privacy.noise_multiplier=1.5", "privacy.delta=0.01"]


@pytest.fixture
def persons(pictures: Path, tmp_path: Path) -> Path:
    """A table that gives each person two pictures of one class: four persons a class."""
    files = [file.relative_to(pictures) for file in sorted(pictures.rglob("*.png"))]
    lines = [f"{file.as_posix()},{file.parent.name} {int(file.stem) // 2}" for file in files]
    path = tmp_path / "persons.csv"
    path.write_text("\n".join(["file,person", *lines]) + "\n")
    return path


@pytest.mark.parametrize("mechanism", ["cotangent", "dp-sgd"])
def test_a_run_protects_persons(
    mechanism: str, config_file: Path, persons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(config_file, [*BY_PERSON, f"privacy.mechanism={mechanism}", "data.persons=persons.csv"])
    chosen = plan(config)
    assert "2 clients with 4 persons each" in as_text(chosen)
    assert chosen.as_dict()["unit"] == "person"
    summary = run(config, tmp_path / "run")
    ledger = Ledger.from_json((tmp_path / "run" / "ledger.json").read_bytes())
    # Two classes of two persons a client, batches of two persons: one half, in each of six rounds.
    assert {(each.party, each.unit, each.steps, each.sampling_rate) for each in ledger.releases} == {
        ("client 0", "person", 6, 0.5),
        ("client 1", "person", 6, 0.5),
    }
    assert chosen.ledger == replace(ledger, run="", data={})
    of_one = [release for release in ledger.releases if release.party == "client 0"]
    assert summary.privacy.epsilon == pytest.approx(epsilon(of_one, 0.01))
    assert (summary.privacy.unit, summary.privacy.private) == ("person", True)
    assert "for each person" in summary.privacy.statement
    assert "for each person" in (tmp_path / "run" / "report.html").read_text()
    text = CliRunner().invoke(app, ["privacy", "ledger", str(tmp_path / "run")]).stdout
    assert "unit person" in text
    assert "for each person, most about client 0" in text
    table = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert table["data"]["persons"] == str(persons)  # found from any folder
    assert (table["privacy"]["unit"], table["privacy"]["person_images"]) == ("person", 16)


def test_persons_are_asked_for(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, [*BY_PERSON, "privacy.mechanism=cotangent"])
    expected = r"privacy\.unit = 'person'.*data\.person_column.*data\.persons.*data\.person_level"
    with pytest.raises(ConfigError, match=expected):
        plan(config)
    with pytest.raises(ConfigError, match=expected):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_run_does_not_go_on_with_other_persons(config_file: Path, persons: Path, tmp_path: Path) -> None:
    keys = [*BY_PERSON, "privacy.mechanism=cotangent", f"data.persons={persons}"]
    run(load_config(config_file, keys), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    record = tmp_path / "run" / "data.json"
    content = json.loads(record.read_bytes())
    content["persons"] = "0" * 64
    record.write_text(json.dumps(content))
    with pytest.raises(RunError, match="whose the training pictures are changed"):
        run(load_config(config_file, keys), tmp_path / "run", resume=True)


def test_names_of_persons_are_in_no_file_of_a_run(config_file: Path, persons: Path, tmp_path: Path) -> None:
    persons.write_text(persons.read_text().replace(",red_apple ", ",xyzzy "))
    run(
        load_config(config_file, [*BY_PERSON, "privacy.mechanism=cotangent", f"data.persons={persons}"]),
        tmp_path / "run",
    )
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or b"xyzzy" not in file.read_bytes()


def test_a_client_level_ledger_says_whether_persons_are_whole(config_file: Path, persons: Path, tmp_path: Path) -> None:
    keys = ["algorithm=promptfl", "privacy.mechanism=dp-fedavg", "privacy.noise_multiplier=2.0", "privacy.delta=0.01"]
    keys += ["runtime.weighting=uniform"]
    for more, expected in (([], False), ([f"data.persons={persons}"], True)):
        assert plan(load_config(config_file, [*keys, *more])).ledger.whole_persons is expected


@pytest.mark.slow
def test_attacks_that_draw_examples_say_that_they_do(config_file: Path, persons: Path, tmp_path: Path) -> None:
    run(
        load_config(config_file, [*BY_PERSON, "privacy.mechanism=cotangent", f"data.persons={persons}"]),
        tmp_path / "run",
    )
    attacks = audit(tmp_path / "run", shadows=4, canaries=4, queries=20)["attacks"]
    for name in ("membership", "canaries"):
        assert "privacy.unit" in attacks[name]["reason"]
    assert "attacks" in attacks["inversion"]
