"""`sordino site`: what it writes, says and refuses, and that the page has every key."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from sites.owners import NOISE, experiment, fleet, sites_at, write_site
from sordino.cli.app import app
from sordino.cli.site_words import ledger_as_text, round_as_text
from sordino.cli.watching import print_outcome
from sordino.errors import ConfigError
from sordino.results import rounded_up
from sordino.runtime.fleet import Patience
from sordino.sites.coordinator import OUTCOME, coordinate
from sordino.sites.fleet_config import FleetSettings, load_fleet_config
from sordino.sites.settings import PolicySettings, SiteSettings, load_site

PAGE = Path(__file__).parents[2] / "docs" / "sites.md"


def said(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["site", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture
def proposed(tmp_path: Path, clip_folder: Path) -> Path:
    """An experiment's file, as a coordinator writes it."""
    tables: dict[str, Any] = {
        "algorithm": "promptfl",
        "rounds": 3,
        "encoder": {"name": "clip", "checkpoint": str(clip_folder)},
        "privacy": NOISE,
        "settings": {"context_length": 2, "batch_size": 4, "local_steps": 1, "dp-fpl": {"rank": 1}},
        "device": "cpu",
    }
    file = tmp_path / "experiment.toml"
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return file


def test_a_new_site_allows_nothing(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    said("init", file, "--name", "north", "--source", "digits", "--epsilon", "4", "--unit", "person")
    site = load_site(file)
    assert (site.name, site.data.source) == ("north", "digits")
    policy = site.policy
    assert (policy.epsilon, policy.unit, policy.experiments, policy.signers) == (4, "person", [], [])
    assert "none" not in policy.mechanisms
    assert "server" not in policy.noise_by
    with pytest.raises(ConfigError, match="exists, and is not overwritten"):
        said("init", file, "--name", "north", "--source", "digits")
    for name, source in (("no th", "digits"), ('a"b', "digits"), ("north", "nowhere")):
        with pytest.raises(ConfigError):
            said("init", tmp_path / "other.toml", "--name", name, "--source", source)
        assert not (tmp_path / "other.toml").exists()


def test_an_owner_sees_what_an_experiment_means_and_allows_it(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, proposed: Path
) -> None:
    write_site(tmp_path / "east", "east", clip_folder, {"experiments": [], "epsilon": 1000.0})
    east = site_files["east"]
    told = json.loads(said("check", east, proposed, "--json", code=1))
    assert told["classes"] == {"blue sky": 5, "green leaf": 5, "red apple": 5}
    assert told["clients"] == {"0": 9}
    for delta, empty in ((0.2, True), (0.1, False)):  # of nine examples
        write_site(tmp_path / "east", "east", clip_folder, {"delta": delta})
        assert ("Set policy.delta below 1/9" in said("check", east)) == empty
    write_site(tmp_path / "east", "east", clip_folder, {"experiments": [], "epsilon": 1000.0})
    fingerprint = told["verdict"]["experiment"]
    assert fingerprint == load_fleet_config(proposed).proposal().fingerprint
    assert told["verdict"]["reasons"] == [
        f"experiment {fingerprint} is not in policy.experiments, and none of policy.signers signed it"
    ]
    words = said("check", east, proposed, code=1)
    assert "east takes no part" in words
    planned = told["verdict"]["epsilon"]
    assert f"It would spend epsilon = {rounded_up(planned, 4)} at" in words
    write_site(tmp_path / "east", "east", clip_folder, {"experiments": [fingerprint], "epsilon": 1000.0})
    assert "east takes part." in said("check", east, proposed)
    config = load_fleet_config(proposed)
    coordinate(config.experiment, config.proposal(), fleet(sites_at(site_files)), tmp_path / "out", Patience())
    ledger = json.loads(said("ledger", east, "--json"))
    assert ledger["epsilon"] == pytest.approx(planned), "what was planned is what was spent"
    assert ledger["experiments"][fingerprint]["rounds"] == [1, 2, 3]
    assert f"{fingerprint}: 3 rounds; epsilon {rounded_up(planned, 4)}" in said("ledger", east)
    write_site(tmp_path / "east", "east", clip_folder, {"experiments": [fingerprint], "epsilon": planned / 2})
    assert "policy.epsilon" in said("check", east, proposed, code=1)


def test_an_override_without_an_experiment_is_refused(site_files: dict[str, Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"^--set = 'rounds=9': goes with an experiment's file.*give CONFIG\.toml too"
    ):
        said("check", site_files["east"], "--set", "rounds=9")


def test_a_site_without_a_budget_says_so_in_words(site_files: dict[str, Path]) -> None:
    """The sites of these tests have none: epsilon is inf."""
    words = said("check", site_files["east"])
    assert "It sets no bound on epsilon, which is counted at delta = 1e-05 for one example, in all exp" in words
    assert "spends" not in words
    assert said("ledger", site_files["east"]) == "east: epsilon 0 at delta = 1e-05 for one example; no budget is set\n"


def test_the_fingerprint_is_of_all_that_parties_agree_on_and_of_nothing_else(tmp_path: Path, clip_folder: Path) -> None:
    from sordino.sites.proposal import Proposal

    base = Proposal.of(experiment(clip_folder)).fingerprint
    for change in ({"rounds": 4}, {"seed": 1}, {"privacy": NOISE}, {"runtime": {"participation": 0.5}}):
        assert Proposal.of(experiment(clip_folder, **change)).fingerprint != base, change
    own: dict[str, Any] = {"data": {"source": "textile"}, "device": "auto"}
    assert Proposal.of(experiment(clip_folder, **own)).fingerprint == base
    other = {"encoder": {"name": "clip", "checkpoint": str(tmp_path)}}
    assert Proposal.of(experiment(clip_folder, **other)).fingerprint == base, "each has it somewhere else"
    assert Proposal.of(experiment(clip_folder), ("a", "b")).fingerprint != base


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"clients": [0]}, "clients and .partition. come together"),
        ({"clients": [4], "partition": {"scheme": "iid", "clients": 4}}, "client 4 is not one of the partition's 4"),
        ({"policy": {"epsilon": 1.0, "experiments": ["abc"]}}, "'abc' is neither 'any' nor 64 hexadecimal digits"),
        ({"policy": {"epsilon": 1.0, "signers": ["nobody.pem"]}}, "nobody.pem.*there is no such file"),
        ({"policy": {}}, "policy.epsilon"),
        ({"polcy": {}}, "did you mean 'policy'"),
    ],
)
def test_a_wrong_site_file_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    tables = {"name": "north", "data": {"source": "digits"}, "policy": {"epsilon": 1.0}} | change
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        load_site(file)


def test_any_experiment_may_be_allowed_in_either_way_of_writing(tmp_path: Path) -> None:
    for written in ("any", ["any"]):
        policy = {"epsilon": 1.0, "experiments": written}
        tables = {"name": "north", "data": {"source": "digits"}, "policy": policy}
        (tmp_path / "site.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
        assert load_site(tmp_path / "site.toml").policy.experiments == ["any"]


def test_paths_are_from_the_files_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    file = tmp_path / "site.toml"
    tables = {"name": "north", "data": {"source": "imagefolder:photos"}, "policy": {"epsilon": 1.0}}
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    site = load_site(file)
    assert site.data.source == f"imagefolder:{tmp_path.resolve()}/photos"
    assert site.state == f"{tmp_path.resolve()}/state"


def test_a_link_to_a_sites_file_is_read_where_it_leads(tmp_path: Path) -> None:
    """Else its owner's commands would look for the ledger beside the link, and tell that nothing was spent."""
    real, kit = tmp_path / "real", tmp_path / "kit"
    real.mkdir()
    kit.mkdir()
    tables = {"name": "north", "data": {"source": "imagefolder:photos"}, "policy": {"epsilon": 1.0}}
    (real / "north.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    (kit / "site.toml").symlink_to(Path("..") / "real" / "north.toml")
    assert load_site(kit / "site.toml") == load_site(real / "north.toml")
    assert said("ledger", kit / "site.toml") == said("ledger", real / "north.toml")
    assert [path.name for path in kit.iterdir()] == ["site.toml"], "no state beside the link"


def test_the_page_has_every_key_and_its_configuration_is_valid(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    keys = [*SiteSettings.model_fields, *(f"policy.{key}" for key in PolicySettings.model_fields)]
    assert not [key for key in keys if key != "policy" and f"`{key}`" not in text and f"`[{key}]`" not in text]
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "experiment.toml").write_text(block, encoding="utf-8")
    config = load_fleet_config(tmp_path / "experiment.toml")
    assert config.patience == Patience(0.66, 600, 30, ("north", "south", "west"))
    assert set(tomllib.loads(block)["fleet"]) == set(FleetSettings.model_fields)


def test_the_end_names_who_took_no_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = {"rounds": 2, "sites": {"east": [0]}, "left_out": {"west": "why"}, "privacy": {"statement": "Private."}}
    (tmp_path / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
    print_outcome(tmp_path, as_json=False)
    assert capsys.readouterr().out.splitlines()[:3] == ["2 rounds at east", "west took no part: why", "Private."]


def test_a_round_in_a_line() -> None:
    line = {"round": 7, "seconds": 1.24, "participants": 3, "broadcast_bytes": 1000, "upload_bytes": 500}
    assert round_as_text(line) == "round 7: 1.2 s, 3 clients, 3.0 kB down, 1.5 kB up"
    spent = {"epsilon": {"north": 3.6249, "south": 3.6241}}
    assert round_as_text(line | spent).endswith("epsilon 3.63 at north, the most"), "never less than was spent"
    assert ledger_as_text(
        {"experiments": {}, "budget": 8.0, "delta": 1e-5, "unit": "example", "site": "north", "epsilon": 3.62411}
    ).startswith("north: epsilon 3.625 of 8 ")
    more = {"accuracy": {"local": 0.8321}, "epsilon": {"east": 0.5, "west": 2.0}, "lost": {"north": "no answer"}}
    assert round_as_text(line | more).endswith(
        "up, accuracy 83.2, epsilon 2 at west, the most; without north: no answer"
    )
    assert "epsilon unbounded" in round_as_text(line | {"epsilon": {"east": 0.5, "west": None}})
    assert round_as_text({"round": 0, "seconds": 0.5, "accuracy": None}) == "round 0: 0.5 s"
    void = line | {"participants": 0, "void": "2 of 6 answered, and 4 are needed"}
    assert round_as_text(void).endswith("0 clients, 0 B down, 0 B up; void: 2 of 6 answered, and 4 are needed")
