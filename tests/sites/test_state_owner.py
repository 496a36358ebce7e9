"""A state folder is one site's: another would take its answers and its ledger for its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sites.owners import NOISE, experiment, fleet, sites_at, write_pictures, write_site
from sordino.cli.app import invoke
from sordino.errors import RunError
from sordino.runtime.fleet import Patience
from sordino.sites.coordinator import coordinate
from sordino.sites.proposal import Proposal
from sordino.sites.settings import load_site
from sordino.sites.site import OWNER, Site


@pytest.fixture
def neighbors(tmp_path: Path) -> dict[str, Path]:
    """The files of two sites in one folder, which name no state folder."""
    files = {}
    for seed, name in enumerate(("east", "west")):
        write_pictures(tmp_path / f"of {name}", seed, 6)
        data = {"source": f"imagefolder:of {name}", "test_fraction": 0.4}
        files[name] = write_site(tmp_path, name, None, data=data).rename(tmp_path / f"{name}.toml")
    return files


CAUSE = "the state folder in the file of site 'west' is that of site 'east', .*; set another `state` there"


def test_a_second_site_in_a_folder_is_refused_with_cause_and_remedy(
    neighbors: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, sites = experiment(None, privacy=NOISE), sites_at(neighbors)
    outcome = coordinate(config, Proposal.of(config), fleet(sites), tmp_path / "out", Patience(0.5))
    assert set(outcome.met.agreement.sites) == {"east"}
    with pytest.raises(RunError, match=CAUSE):
        raise RunError(outcome.met.left_out["west"])
    with pytest.raises(RunError, match=CAUSE):
        Site(load_site(neighbors["west"]))
    capsys.readouterr()
    assert invoke(["site", "ledger", str(neighbors["west"])]) == 2
    assert "is that of site 'east'" in capsys.readouterr().err
    assert invoke(["site", "ledger", str(neighbors["east"]), "--json"]) == 0
    assert [entry["rounds"] for entry in json.loads(capsys.readouterr().out)["experiments"].values()] == [[1, 2, 3]]


def test_a_state_without_a_name_is_that_of_who_answers_first(neighbors: dict[str, Path], tmp_path: Path) -> None:
    """As earlier versions left it. To look at it takes nothing."""
    state = tmp_path / "state"
    config, first = experiment(None, privacy=NOISE), {"east": Site(load_site(neighbors["east"]))}
    coordinate(config, Proposal.of(config), fleet(first), tmp_path / "out", Patience())
    (state / OWNER).unlink()
    assert invoke(["site", "ledger", str(neighbors["west"])]) == 0
    assert not (state / OWNER).exists()
    again = {"east": Site(load_site(neighbors["east"]))}
    coordinate(config, Proposal.of(config), fleet(again), tmp_path / "out", Patience())
    assert (state / OWNER).read_text() == "east"
    with pytest.raises(RunError, match=CAUSE):
        Site(load_site(neighbors["west"]))
