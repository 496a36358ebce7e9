"""What sites promise: their ledgers and prompts say no smaller epsilon than what the whole experiment spent."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
from pydantic import ValidationError
from torch import Tensor

from sites.owners import NAMES, NOISE, experiment, fleet, sites_at, write_pictures, write_site
from sordino.errors import ConfigError, PromptError
from sordino.experiments.run_lock import FILE as LOCK
from sordino.privacy.accounting import spent
from sordino.privacy.ledger import Ledger
from sordino.privacy.statement import statement
from sordino.prompt_file import SavedPrompt
from sordino.results import rounded_up
from sordino.runtime.agreement import Agreement
from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import Answer, Ask, LocalFleet, Lost, Patience
from sordino.runtime.local import RoundError
from sordino.serving.sources import from_file
from sordino.sites.coordinator import LEDGER, METRICS, coordinate
from sordino.sites.hello import Hello
from sordino.sites.proposal import Proposal
from sordino.sites.site import Site

BY_SERVER = {"noise_by": ["client", "server", "shares"]}
SAMPLED = {"mechanism": "dp-fedavg", "noise_by": "server", "noise_multiplier": 1.0, "delta": 0.01}


def statements(site: Site, fingerprint: str) -> set[str]:
    """What a site's saved prompts say of their privacy."""
    files = sorted((site.folder(fingerprint) / "prompts").iterdir())
    return {SavedPrompt.load(file).privacy.statement for file in files}


@pytest.mark.parametrize("method", ["promptfl", "dp-fpl"])
def test_a_prompt_states_what_holds_for_everybody_whose_data_it_was_learned_from(
    method: str, tmp_path: Path, clip_folder: Path
) -> None:
    """A small site's pictures are drawn more often. A large one's prompt tells of them as much as their own does."""
    files = {}
    for number, (name, each) in enumerate(zip(NAMES, (5, 10, 20), strict=True)):
        write_pictures(tmp_path / name / "pictures", number, each)
        files[name] = write_site(tmp_path / name, name, clip_folder)
    config = experiment(clip_folder, method, privacy=NOISE | {"delta": 1e-3})
    sites = sites_at(files)
    outcome = coordinate(config, Proposal.of(config), fleet(sites), tmp_path / "out", Patience())
    own = {name: site.ledger.spent("example", 1e-3) for name, site in sites.items()}
    assert own["west"] < own["north"] < own["east"]
    said = statement(outcome.training.ledger, "example")
    assert f"epsilon = {rounded_up(own['east'], 4)} " in said
    fingerprint = Proposal.of(config).fingerprint
    for site in sites.values():
        assert statements(site, fingerprint) == {said}
        file = next((site.folder(fingerprint) / "prompts").iterdir())
        published = from_file(file, site.folder(fingerprint) / "ledger.json").facts.privacy
        assert published.epsilon == pytest.approx(own["east"])
        assert published.statement == said
        with pytest.raises(PromptError, match="under another ledger"):
            from_file(file, site.state / "ledger" / f"{fingerprint}.json")


def test_a_prompt_of_a_client_that_learns_alone_states_its_own(tmp_path: Path, clip_folder: Path) -> None:
    files = {}
    for number, (name, each) in enumerate((("east", 5), ("west", 20))):
        write_pictures(tmp_path / name / "pictures", number, each)
        files[name] = write_site(tmp_path / name, name, clip_folder)
    config = experiment(clip_folder, "local", privacy=NOISE | {"delta": 1e-3})
    sites = sites_at(files)
    coordinate(config, Proposal.of(config), fleet(sites), tmp_path / "out", Patience())
    for site in sites.values():
        (said,) = statements(site, Proposal.of(config).fingerprint)
        assert f"epsilon = {rounded_up(site.ledger.spent('example', 1e-3), 4)} " in said


def test_a_site_that_is_sampled_spends_what_all_rounds_spend(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """It is asked in a part of the rounds, which the sampling rate says already; and one draw decides on a round."""
    for name in NAMES:
        write_site(tmp_path / name, name, clip_folder, BY_SERVER)
    runtime = {"participation": 0.4, "weighting": "uniform"}
    config = experiment(clip_folder, privacy=SAMPLED, runtime=runtime, rounds=30)
    sites, out = sites_at(site_files), tmp_path / "out"
    outcome = coordinate(config, Proposal.of(config), fleet(sites), out, Patience())
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert not any(line.get("void") for line in lines), "all who were asked answered"
    assert sum(line["participants"] for line in lines) < 90
    ledger = outcome.training.ledger
    epsilon = spent(ledger, "public", "client", 0.01).epsilon
    for site in sites_at(site_files).values():
        assert site.ledger.spent("client", 0.01) == pytest.approx(epsilon)
        assert statements(site, Proposal.of(config).fingerprint) == {statement(ledger, "client")}


def test_a_site_that_no_sample_draws_has_spent_all_the_same(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Else its experiments together would be those of luck, each at a rate that counts on none."""
    for name in NAMES:
        write_site(tmp_path / name, name, clip_folder, BY_SERVER)
    runtime = {"participation": 1e-6, "weighting": "uniform"}
    config = experiment(clip_folder, privacy=SAMPLED, runtime=runtime)
    sites = sites_at(site_files)
    coordinate(config, Proposal.of(config), fleet(sites), tmp_path / "out", Patience())
    for site in sites.values():
        (release,) = site.ledger.experiments[Proposal.of(config).fingerprint].ledger.releases
        assert (release.steps, release.sampling_rate) == (3, 1e-6)


class Loses(LocalFleet):
    """A fleet that loses a site in one question of the release, after the site has answered it.

    Attributes:
        told: what clients were told of the release, in every question.
    """

    def __init__(self, sites: dict[str, Site], at: int) -> None:
        super().__init__({name: site.turn for name, site in sites.items()})
        self._at, self.told = at, list[dict[str, Tensor]]()

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        asked = Envelope.decode(next(iter(ask.payloads.values())))
        releasing = asked.kind == "round" and ask.round == 0
        if releasing:
            self.told.append(safetensors.torch.load(next(iter(asked.contents.values()))))
        for event in super().ask(ask):
            lost = releasing and len(self.told) == self._at and event.site == "west"
            yield Lost("west", "it fell") if lost else event


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("noise_by", ["server", "client"])
def test_a_release_that_is_begun_again_is_told_in_the_same_numbers(
    at: int, noise_by: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Fresh noise on sums that clients were told before would be a second release, which no ledger has."""
    for name in NAMES:
        write_site(tmp_path / name, name, clip_folder, BY_SERVER)
    privacy = {"mechanism": "statistics", "noise_by": noise_by, "noise_multiplier": 1.0, "center_share": 0.1}
    config, out = experiment(clip_folder, privacy=privacy), tmp_path / "out"
    first = Loses(sites_at(site_files), at)
    with pytest.raises(RoundError, match="client 2 did not release its statistics: it fell"):
        coordinate(config, Proposal.of(config), first, out, Patience())
    counted = Ledger.from_json((out / LEDGER).read_text())
    assert {release.steps for release in counted.releases} == {1}, "it may have left"
    again = Loses(sites_at(site_files), 0)
    outcome = coordinate(config, Proposal.of(config), again, out, Patience())
    assert outcome.training.round == 3
    assert outcome.training.ledger.releases == counted.releases
    assert "statistics.center" in again.told[1]
    for before, after in zip(first.told, again.told, strict=False):
        assert before.keys() == after.keys()
        assert all(before[name].equal(after[name]) for name in before)


def test_an_accuracy_that_is_told_from_the_middle_of_an_experiment_on_is_in_all_ledgers(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """A site's owner lets it tell accuracy where it did not before: no epsilon holds from then on, nor after."""

    class Stops(LocalFleet):
        def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
            if ask.round == 2:
                raise KeyboardInterrupt
            return super().ask(ask)

    config, out = experiment(clip_folder, privacy=NOISE), tmp_path / "out"
    fingerprint = Proposal.of(config).fingerprint
    first = Stops({name: site.turn for name, site in sites_at(site_files).items()})
    with pytest.raises(KeyboardInterrupt):
        coordinate(config, Proposal.of(config), first, out, Patience())
    assert math.isfinite(sites_at(site_files)["west"].ledger.spent("example", 1e-3))
    write_site(tmp_path / "west", "west", clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
    outcome = coordinate(config, Proposal.of(config), fleet(sites_at(site_files)), out, Patience())
    assert outcome.accuracy
    assert not outcome.training.ledger.private
    assert not Ledger.from_json((out / LEDGER).read_text()).private
    for policy in ({"tells": ["sizes", "class_names"]}, {"epsilon": 1e6}):  # it cannot be taken back
        write_site(tmp_path / "west", "west", clip_folder, policy)
        site = sites_at(site_files)["west"]
        assert math.isinf(site.ledger.spent("example", 1e-3))
        assert not site.ledger.experiments[fingerprint].ledger.private


def test_an_accuracy_that_is_told_at_the_end_alone_is_in_the_coordinators_ledger(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """The site is started again with another policy, and the coordinator is not: it meets nobody anew."""

    class Allows(LocalFleet):
        def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
            if Envelope.decode(next(iter(ask.payloads.values()))).kind == "end":
                write_site(tmp_path / "west", "west", clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
                self._sites["west"] = sites_at(site_files)["west"].turn
            return super().ask(ask)

    config, out = experiment(clip_folder, privacy=NOISE), tmp_path / "out"
    over = Allows({name: site.turn for name, site in sites_at(site_files).items()})
    outcome = coordinate(config, Proposal.of(config), over, out, Patience())
    assert set(outcome.accuracy) == {"client 2"}
    assert not outcome.training.ledger.private
    assert not Ledger.from_json((out / LEDGER).read_text()).private
    assert math.isinf(sites_at(site_files)["west"].ledger.spent("example", 1e-3))


def test_that_nobody_is_at_two_sites_is_told_as_an_assumption(tmp_path: Path, clip_folder: Path) -> None:
    """Here everybody is. No site can see it, each protects a part of a person, and the bound is one for a part."""
    files = {}
    for number, name in enumerate(NAMES[:2]):
        pictures = write_pictures(tmp_path / name / "pictures", number, 6)
        lines = [f"{file.relative_to(pictures)},person {file.stem}" for file in sorted(pictures.rglob("*.png"))]
        (tmp_path / name / "persons.csv").write_text("\n".join(["file,person", *lines]))
        data = {"source": "imagefolder:pictures", "test_fraction": 0.4, "persons": "persons.csv"}
        files[name] = write_site(tmp_path / name, name, clip_folder, {"unit": "person"}, data=data)
    assumed = "nobody has images at two sites"
    runtime = {"weighting": "uniform"}
    for privacy, told in (
        (NOISE | {"unit": "person", "delta": 0.1}, True),
        ({"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "delta": 0.4}, True),
        (NOISE | {"delta": 1e-3}, False),
    ):
        config, sites = experiment(clip_folder, privacy=privacy, runtime=runtime, rounds=1), sites_at(files)
        fingerprint = Proposal.of(config).fingerprint
        outcome = coordinate(config, Proposal.of(config), fleet(sites), tmp_path / fingerprint, Patience())
        ledgers = [site.ledger.experiments[fingerprint].ledger for site in sites.values()]
        for ledger in (outcome.training.ledger, *ledgers):
            assert (assumed in ledger.assumptions) == told
            assert math.isfinite(spent(ledger, "public", "person", 0.1).epsilon) == told
        for site in sites.values():
            assert {assumed in said for said in statements(site, fingerprint)} == {told}


@pytest.mark.parametrize("name", ["class_names", "sizes", "data", "numbers"])
def test_a_hello_of_many_wrong_elements_costs_one_error(name: str) -> None:
    """A message has room for millions, and pydantic lists each that is wrong."""
    facts = {
        **{"version": "1", "protocol": 1, "encoder": {"name": "clip", "fingerprint": "a", "dtype": "float32"}},
        **{"classes": "a", "sizes": [1], "data": ["a"], "whole_persons": False, "example": [1]},
    }
    Hello.model_validate(facts)
    with pytest.raises(ValidationError) as error:
        Hello.model_validate(facts | {name: [None] * 500})
    assert error.value.error_count() == 1


@pytest.mark.parametrize("method", ["promptfl", "secfpp"])
@pytest.mark.parametrize("most", [1, 2])
def test_a_site_with_more_clients_than_may_pool_what_they_know_is_in_no_protocol_on_shares(
    method: str, most: int, tmp_path: Path, clip_folder: Path
) -> None:
    """It could take off its clients' shares of the noise, or put their shares of a prompt together."""
    files, alone = {}, {"noise_multiplier": 1.0, "delta": 1e-3, "noise_by": "shares", "colluders": most}
    for number, (name, clients) in enumerate((("east", [0, 1]), ("west", [2]), ("north", [3]))):
        write_pictures(tmp_path / name / "pictures", number, 16)
        tables = {"partition": {"scheme": "iid", "clients": 4}, "clients": clients}
        files[name] = write_site(tmp_path / name, name, clip_folder, {"unit": "client", "delta": 1e-3}, **tables)
    privacy = {"mechanism": "dp-fedavg", **alone} if method == "promptfl" else {}
    settings = {"context_length": 2, "batch_size": 0, "local_steps": 1, "secfpp": {"colluders": most}}
    tables = {"settings": settings, "privacy": privacy, "runtime": {"weighting": "uniform"}, "rounds": 1}
    config, sites = experiment(clip_folder, method, **tables), sites_at(files)
    proposal = Proposal.of(config)
    if most == 2:
        if method == "secfpp":  # four clients are too few for it; it is not refused for the site
            with pytest.raises(ConfigError, match="4 clients of whom 25% may drop out cannot have privacy 2"):
                coordinate(config, proposal, fleet(sites), tmp_path / "out", Patience())
            return
        assert coordinate(config, proposal, fleet(sites), tmp_path / "out", Patience()).training.round == 1
        return
    with pytest.raises(
        ConfigError, match=r"colluders = 1: site east holds 2 clients, .* set it to that, or have fewer"
    ):
        coordinate(config, proposal, fleet(sites), tmp_path / "out", Patience())
    # A coordinator that does not mind: west refuses by itself.
    assert Envelope.decode(sites["west"].turn(Envelope("hello", proposal.fingerprint, proposal.facts).encode())).facts
    agreement = Agreement({"east": [0, 1], "west": [2], "north": [3]}, [1] * 4, False)
    answer = Envelope.decode(sites["west"].turn(Envelope("agreement", proposal.fingerprint, agreement.facts).encode()))
    assert "site east holds 2 clients" in answer.facts["reason"]


def test_what_a_site_keeps_is_its_owners_alone(
    tmp_path: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts, answers and agreement: with the answer of a round and its noise's key, one could take off the noise."""
    before, files = os.umask(0o022), {}
    try:
        for number, name in enumerate(NAMES):
            write_pictures(tmp_path / name / "pictures", number, 8)
            files[name] = write_site(tmp_path / name, name, clip_folder)
        (tmp_path / "west" / "state").mkdir(mode=0o755)  # as an earlier version made it
        config = experiment(clip_folder, privacy=NOISE | {"delta": 1e-3}, rounds=1)
        sites = sites_at(files)
        with caplog.at_level(logging.WARNING):
            coordinate(config, Proposal.of(config), fleet(sites), tmp_path / "out", Patience())
    finally:
        os.umask(before)
    for name in ("east", "north"):
        state = tmp_path / name / "state"
        assert state.stat().st_mode & 0o077 == 0
        kept = [file for file in state.rglob("*") if file.is_file() and file.name != LOCK]
        assert {"agreement.json", "turn.safetensors", "ledger.json", "shared.safetensors"} <= {
            file.name for file in kept
        }
        assert [file.name for file in kept if file.stat().st_mode & 0o077] == []
    told = [text for text in caplog.messages if "may be entered by others" in text]
    assert len(told) == 1
    assert "west" in told[0]
    assert "chmod 700" in told[0]
