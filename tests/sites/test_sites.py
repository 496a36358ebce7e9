"""A coordinator and three sites: what they agree on, what each allows, and what its own ledger says."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

import sordino
from encoders.checkpoints import save_clip
from experiments.test_tracking import of_tensorboard, same
from runtime.fleets import TimedFleet
from sites.owners import NAMES, NOISE, experiment, fleet, sites_at, write_pictures, write_site
from sordino.algorithms.base import named_tensors
from sordino.cli.app import invoke
from sordino.errors import ConfigError, RunError
from sordino.experiments.config import Experiment
from sordino.experiments.run import run
from sordino.privacy.accounting import spent
from sordino.privacy.signature import load_private_key, make_key
from sordino.prompt_file import SavedPrompt
from sordino.results import rounded_up
from sordino.runtime import checkpoint
from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import Answer, Ask, LocalFleet, Lost, Patience
from sordino.sites import answers
from sordino.sites.coordinator import AGREEMENT, LEDGER, METRICS, Outcome, coordinate
from sordino.sites.ledger import SiteLedger
from sordino.sites.page import epsilon_by_site
from sordino.sites.proposal import Proposal
from sordino.sites.settings import load_site
from sordino.sites.site import Site
from sordino.sites.site import refusal as refusal_of

ALL = Patience()


def run_over(config: Experiment, sites: dict[str, Site], out: Path, patience: Patience = ALL, **known: Any) -> Outcome:
    return coordinate(config, Proposal.of(config, **known), fleet(sites), out, patience)


def hello(site: Site, config: Experiment, **known: Any) -> Envelope:
    proposal = Proposal.of(config, **known)
    return Envelope.decode(site.turn(Envelope("hello", proposal.fingerprint, proposal.facts).encode()))


def refusal(site: Site, config: Experiment, **known: Any) -> str:
    answer = hello(site, config, **known)
    assert answer.kind == "refusal", answer.facts
    return str(answer.facts["reason"])


@pytest.mark.parametrize("method", ["promptfl", "dp-fpl"])
def test_three_sites_learn_together(
    method: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config = experiment(clip_folder, method)
    write_site(tmp_path / "west", "west", clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
    sites = sites_at(site_files)
    outcome = run_over(config, sites, tmp_path / "out")
    assert outcome.training.round == 3
    assert outcome.met.agreement.sites == {"east": [0], "north": [1], "west": [2]}
    assert outcome.met.agreement.sizes == [9, 12, 12], "examples that train"
    assert set(outcome.accuracy) == {"client 2"}, "of those alone who tell it"
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    private = [tmp_path / "out" / LEDGER, *(tmp_path / "out" / "checkpoint").iterdir()]
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0
    assert [file.name for file in private if file.stat().st_mode & 0o077] == [], "in an opened folder, too"
    assert all(line["participants"] == 3 for line in lines)
    for name in NAMES:
        folder = sites[name].folder(Proposal.of(config).fingerprint) / "prompts"
        (file,) = folder.iterdir()
        prompt = SavedPrompt.load(file)
        assert prompt.class_names == ("blue sky", "green leaf", "red apple")
        assert (prompt.client is None) == (method == "promptfl")


@pytest.mark.parametrize("method", ["promptfl", "dp-fpl"])
def test_accuracy_by_round_is_that_of_the_prompts_then_and_changes_nothing(
    method: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Of the sites that tell it, in rounds that are evaluated; as if training had ended there."""
    quiet = run_over(experiment(clip_folder, method, rounds=5), sites_at(site_files), tmp_path / "quiet")
    write_site(tmp_path / "west", "west", clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
    config = experiment(clip_folder, method, rounds=5, runtime={"evaluate_every": 2})
    outcome = run_over(config, sites_at(site_files), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [line["round"] for line in lines if "accuracy" in line] == [2, 4, 5]
    assert lines[-1]["accuracy_by_client"] == {"2": outcome.accuracy["client 2"]}
    for name, tensor in named_tensors(quiet.training.state).items():
        assert tensor.equal(named_tensors(outcome.training.state)[name]), name
    # That method's prompts after two rounds do not depend on how many follow.
    two = run_over(experiment(clip_folder, method, rounds=2), sites_at(site_files), tmp_path / "two")
    assert lines[1]["accuracy_by_client"] == {"2": two.accuracy["client 2"]}
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{100 * lines[1]['accuracy']['local']:.1f}" in page
    told = f"Local accuracy is {100 * lines[-1]['accuracy']['local']:.1f}%, the mean over the 1 client of 3 whose sites"
    assert told in page
    assert "Nothing here is private" in page, "a method without noise"
    assert "No site told its accuracy" in (tmp_path / "quiet" / "report.html").read_text()


def test_at_the_end_many_clients_are_told_in_groups(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keep their prompts, and no question holds the broadcasts of all clients at once."""
    config, sites, asked = experiment(clip_folder, "dp-fpl", rounds=1), sites_at(site_files), []

    class Notes(LocalFleet):
        def ask(self, ask: Ask) -> Any:
            asked.append((Envelope.decode(next(iter(ask.payloads.values()))).kind, set(ask.payloads)))
            return super().ask(ask)

    notes = Notes({name: site.turn for name, site in sites.items()})
    monkeypatch.setattr(answers, "AT_ONCE", 2)
    coordinate(config, Proposal.of(config), notes, tmp_path / "out", ALL)
    assert [names for kind, names in asked if kind == "end"] == [{"east", "north"}, {"west"}]
    for site in sites.values():
        assert list((site.folder(Proposal.of(config).fingerprint) / "prompts").iterdir())


def test_a_site_that_tells_no_accuracy_refuses_to_evaluate(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config, sites, asked = experiment(clip_folder), sites_at(site_files), []

    def east(request: bytes) -> bytes:
        if Envelope.decode(request).kind == "end":
            asked.append(request)
        return sites["east"].turn(request)

    turns = {name: site.turn for name, site in sites.items()} | {"east": east}
    coordinate(config, Proposal.of(config), LocalFleet(turns), tmp_path / "out", ALL)
    for request in asked:
        answer = Envelope.decode(sites["east"].turn(replace(Envelope.decode(request), kind="evaluate").encode()))
        assert answer.kind == "refusal"
        assert "policy.tells" in str(answer.facts["reason"])
    assert asked


@pytest.mark.parametrize("kind", ["evaluate", "end"])
def test_an_accuracy_is_in_the_ledger_before_the_first_round_too(
    kind: Literal["evaluate", "end"], site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """A server may ask for it at once, and a method that does not train has no rounds."""
    write_site(tmp_path / "west", "west", clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
    config, sites, agreement = experiment(clip_folder, privacy=NOISE), sites_at(site_files), []

    class Stops(LocalFleet):
        def ask(self, ask: Ask) -> Any:
            agreement.append(ask.payloads["west"])
            if ask.round:
                raise KeyboardInterrupt
            return super().ask(ask)

    fingerprint = Proposal.of(config).fingerprint
    with pytest.raises(KeyboardInterrupt):
        coordinate(config, Proposal.of(config), Stops({n: s.turn for n, s in sites.items()}), tmp_path / "out", ALL)
    assert fingerprint not in sites["west"].ledger.experiments, "nothing has left"
    round_one = Envelope.decode(agreement[-1])
    answer = Envelope.decode(sites["west"].turn(replace(round_one, kind=kind).encode()))
    assert set(answer.facts["accuracy"]) == {"2"}
    again = sites_at(site_files)["west"].ledger
    assert again.experiments[fingerprint].rounds == ()
    assert math.isinf(again.spent("example", 1e-3))


def test_rounds_across_machines_are_tracked(site_files: dict[str, Path], tmp_path: Path, clip_folder: Path) -> None:
    """`[tracking]` gets each round once, also over a restart, and accuracy where a site tells it."""
    write_site(tmp_path / "west", "west", clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
    tracking = {"to": "tensorboard", "where": str(tmp_path / "curves")}
    config = experiment(clip_folder, rounds=4, tracking=tracking)
    sites = sites_at(site_files)

    class Dies(LocalFleet):
        def ask(self, ask: Ask) -> Any:
            if ask.round == 3:
                raise KeyboardInterrupt
            return super().ask(ask)

    dying = Dies({name: site.turn for name, site in sites.items()})
    with pytest.raises(KeyboardInterrupt):
        coordinate(config, Proposal.of(config), dying, tmp_path / "out", ALL)
    run_over(config, sites, tmp_path / "out")
    ((_, curves),) = of_tensorboard(tmp_path / "curves").items()
    assert same(curves, tmp_path / "out")
    assert set(curves["accuracy.local"]) == set(curves["seconds"]) == {1, 2, 3, 4}
    assert "tracking" not in Proposal.of(config).tables, "it is nobody else's"


ONE_STEP = {"context_length": 2, "batch_size": 0, "local_steps": 1, "dp-fpl": {"rank": 1}}
BY_SHARES = {"mechanism": "dp-fedavg", "noise_by": "shares", "noise_multiplier": 1.0}


def test_a_coordinator_warns_of_a_part_that_does_nothing(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of a clustering that three rounds never reach; nothing is claimed of distances then."""
    tables = {"settings": ONE_STEP, "runtime": {"weighting": "uniform"}}
    write_site(tmp_path / "east", "east", clip_folder, {"unit": "client", "delta": 1e-3})
    with caplog.at_level(logging.WARNING):
        outcome = run_over(experiment(clip_folder, "secfpp", **tables), sites_at(site_files), tmp_path / "out")
    (line,) = [text for text in caplog.messages if text.startswith("settings.")]
    assert line.startswith("settings.secfpp.cluster_every = 10: in 3 rounds there is no clustering")
    assert {part.channel for part in outcome.training.ledger.disclosures} == {"prompt"}


@pytest.mark.parametrize("method", ["dp-fpl", "secfpp"])
def test_a_protocol_of_several_clients_runs_over_sites_with_one_each(
    method: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """A secure sum and SecFPP need three clients: no site can plan them alone, and each refuses by its own budget."""
    settings = ONE_STEP | {"secfpp": {"clusters": 2, "cluster_every": 2}}
    privacy = BY_SHARES if method == "dp-fpl" else {}
    tables = {"settings": settings, "privacy": privacy, "runtime": {"weighting": "uniform"}}
    config = experiment(clip_folder, method, **tables)
    write_site(tmp_path / "east", "east", clip_folder, {"unit": "client", "delta": 1e-3})
    sites = sites_at(site_files)
    planned = sites["east"].membership(Proposal.of(config)).planned_epsilon()
    outcome = run_over(config, sites, tmp_path / "out")
    assert outcome.training.round == 3
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [line["participants"] for line in lines] == [3, 3, 3]
    assert not any("void" in line or "lost" in line for line in lines)
    if privacy:
        assert sites["east"].ledger.experiments[Proposal.of(config).fingerprint].rounds == (1, 2, 3)
        assert sites["east"].ledger.spent("client", 1e-3) == pytest.approx(planned), "as was told before"
        write_site(tmp_path / "east", "east", clip_folder, {"epsilon": 0.1, "unit": "client"})
        dearer = experiment(clip_folder, method, seed=1, **tables)
        assert "policy.epsilon = 0.1" in refusal(sites_at(site_files)["east"], dearer)


@pytest.mark.parametrize("method", ["promptfl", "fedpgp", "secfpp"])
def test_a_site_with_all_clients_has_the_numbers_of_a_run(method: str, tmp_path: Path, clip_folder: Path) -> None:
    """To the bit: the same data, partition and seed in one process and at a site."""
    write_pictures(tmp_path / "all" / "pictures", 0, 8)
    data = {"source": f"imagefolder:{tmp_path}/all/pictures", "test_fraction": 0.4}
    partition = {"scheme": "iid", "clients": 4}
    settings = {"context_length": 2, "batch_size": 0, "local_steps": 1, "secfpp": {"clusters": 2, "cluster_every": 2}}
    config = experiment(clip_folder, method, data=data, partition=partition, settings=settings)
    run(config, tmp_path / "run")
    file = write_site(tmp_path / "all", "all", clip_folder, partition=partition, clients=[0, 1, 2, 3])
    outcome = run_over(config, sites_at({"all": file}), tmp_path / "out")
    alone = checkpoint.load_server(tmp_path / "run" / "checkpoint", outcome.training)
    assert alone is not None
    assert alone.round == outcome.training.round
    for name, tensor in named_tensors(outcome.training.state).items():
        assert tensor.equal(named_tensors(alone.state)[name]), name


def test_a_coordinator_that_died_goes_on_with_the_sites_that_are_there(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config = experiment(clip_folder, privacy=NOISE, rounds=4)
    sites = sites_at(site_files)

    class Dies(LocalFleet):
        def ask(self, ask: Ask) -> Any:
            if ask.round == 3:
                for name, payload in ask.payloads.items():  # they answer, and nobody hears it
                    sites[name].turn(payload)
                raise KeyboardInterrupt
            return super().ask(ask)

    dying = Dies({name: site.turn for name, site in sites.items()})
    with pytest.raises(KeyboardInterrupt):
        coordinate(config, Proposal.of(config), dying, tmp_path / "out", ALL)
    fingerprint = Proposal.of(config).fingerprint
    assert all(site.ledger.experiments[fingerprint].rounds == (1, 2, 3) for site in sites.values())
    again = sites_at(site_files)  # all of them were restarted
    outcome = run_over(config, again, tmp_path / "out")
    assert outcome.training.round == 4
    assert dict(outcome.met.rounds) == dict.fromkeys(NAMES, 3)
    for name, site in again.items():
        entry = site.ledger.experiments[fingerprint]
        assert entry.rounds == (1, 2, 3, 4)
        assert {release.steps for release in entry.ledger.releases} == {4}, f"{name} drew no noise twice"
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert not any("lost" in line for line in lines)


@pytest.mark.parametrize("cut", ["before the state", "in the line"])
def test_a_coordinator_that_dies_as_it_writes_a_round_has_each_round_once(
    cut: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = experiment(clip_folder, privacy=NOISE, rounds=4), tmp_path / "out"
    save = checkpoint.save_server

    def dies(folder: Path, training: Any) -> None:
        if training.round == 3:
            raise KeyboardInterrupt
        save(folder, training)

    monkeypatch.setattr(checkpoint, "save_server", dies)
    with pytest.raises(KeyboardInterrupt):
        run_over(config, sites_at(site_files), out)
    monkeypatch.undo()
    text = (out / METRICS).read_text()
    assert text.count("\n") == 3, "the line is there, and the state is not"
    if cut == "in the line":
        (out / METRICS).write_text(text[:-10])
    sites = sites_at(site_files)
    outcome = run_over(config, sites, out)
    assert outcome.training.round == 4
    lines = (out / METRICS).read_text()
    assert [json.loads(line)["round"] for line in lines.splitlines()] == [1, 2, 3, 4]
    assert '"lost"' not in lines, "it asked in the same bytes, so sites sent the answers that they had kept"
    assert lines.startswith("".join(text.splitlines(keepends=True)[:2])), "what had its state is as it was"
    for site in sites.values():
        assert site.ledger.experiments[Proposal.of(config).fingerprint].rounds == (1, 2, 3, 4)


@pytest.mark.parametrize("ledger", ["is missing", "lacks round 2, which was answered"])
def test_a_ledger_without_a_round_that_was_answered_is_an_error(
    ledger: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """What is left of it would say that less was spent, and budgets would allow as much again."""
    config, other = experiment(clip_folder, privacy=NOISE, rounds=2), experiment(clip_folder, privacy=NOISE, rounds=1)
    for each in (other, config):
        run_over(each, sites_at(site_files), tmp_path / Proposal.of(each).fingerprint)
    file = tmp_path / "east" / "state" / "ledger" / f"{Proposal.of(config).fingerprint}.json"
    newest = file.read_bytes()
    if ledger == "is missing":
        file.unlink()
    else:
        old = json.loads(newest)
        file.write_text(json.dumps(old | {"rounds": [1]}), encoding="utf-8")
    with pytest.raises(RunError, match=rf"{file.name} {ledger}; .*put the newest backup back"):
        sites_at(site_files)
    assert invoke(["site", "ledger", str(site_files["east"])]) == 2
    file.write_bytes(newest)
    assert sites_at(site_files)["east"].ledger.experiments[file.stem].rounds == (1, 2)


@pytest.mark.parametrize("state", ["an old backup", "none"])
def test_a_site_that_lost_its_state_or_is_an_old_copy_answers_no_round_twice(
    state: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """It would draw other noise for rounds that were answered, and no ledger would have them together."""
    config = experiment(clip_folder, privacy=NOISE, rounds=5)
    east = tmp_path / "east" / "state"

    class Dies(LocalFleet):
        def ask(self, ask: Ask) -> Any:
            if ask.round == 2:
                shutil.copytree(east, tmp_path / "backup")
            if ask.round == 4:
                raise KeyboardInterrupt
            return super().ask(ask)

    dying = Dies({name: site.turn for name, site in sites_at(site_files).items()})
    with pytest.raises(KeyboardInterrupt):
        coordinate(config, Proposal.of(config), dying, tmp_path / "out", ALL)
    shutil.move(east, tmp_path / "newest")
    if state == "an old backup":
        shutil.copytree(tmp_path / "backup", east)
    before = [path.read_bytes() for path in sorted((tmp_path / "backup" / "ledger").iterdir())]

    class Restarts(LocalFleet):
        """Every message meets a new process of each site."""

        def ask(self, ask: Ask) -> Any:
            self._sites = {name: site.turn for name, site in sites_at(site_files).items()}
            return super().ask(ask)

    restarting = Restarts(dict.fromkeys(NAMES, lambda request: request))
    outcome = coordinate(config, Proposal.of(config), restarting, tmp_path / "out", Patience(0.6))
    assert outcome.training.round == 5
    assert set(outcome.met.left_out) == {"east"}
    named = "this site answered round 3, and its state ends with round 1" if state != "none" else "the key in its state"
    assert named in outcome.met.left_out["east"]
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [line["participants"] for line in lines] == [3, 3, 3, 2, 2]
    ledger = east / "ledger"
    assert [path.read_bytes() for path in sorted(ledger.glob("*"))] == (before if state != "none" else [])
    shutil.rmtree(east)
    shutil.move(tmp_path / "newest", east)
    site = sites_at(site_files)["east"]
    agreement = {**outcome.met.agreement.facts, "answered": 3}
    request = Envelope("agreement", Proposal.of(config).fingerprint, agreement).encode()
    assert Envelope.decode(site.turn(request)).facts["round"] == 3, "with the newest state it goes on"


def test_the_sites_ledger_is_what_the_server_knows_of_it(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config = experiment(clip_folder, privacy=NOISE)
    sites = sites_at(site_files)
    outcome = run_over(config, sites, tmp_path / "out")
    told = [
        SiteLedger(site.state / "ledger").spent("example", outcome.training.ledger.delta or 0)
        for site in sites.values()
    ]
    assert max(told) == pytest.approx(spent(outcome.training.ledger, "server", "example").epsilon)
    known = epsilon_by_site(outcome.training.ledger, outcome.met.agreement, "example")
    assert list(known.values()) == pytest.approx(told)
    assert (tmp_path / "out" / LEDGER).exists()


def test_the_budget_of_a_site_is_over_all_experiments_and_refused_with_the_numbers(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    first = experiment(clip_folder, privacy=NOISE)
    run_over(first, sites_at(site_files), tmp_path / "out")
    one = sites_at(site_files)["east"].ledger.spent("example", 1e-3)
    write_site(tmp_path / "east", "east", clip_folder, {"epsilon": round(1.2 * one, 3), "delta": 1e-3})
    sites = sites_at(site_files)
    assert hello(sites["east"], first).kind == "hello", "what was run already costs nothing more"
    dearer = experiment(clip_folder, privacy=NOISE, seed=1)
    told = refusal(sites["east"], dearer)
    assert f"policy.epsilon = {round(1.2 * one, 3):g}" in told
    assert f"{rounded_up(one, 4)} is spent" in told
    total = float(told.split("epsilon would be ")[1].split()[0])
    assert 1.2 * one < total <= 2 * one
    with pytest.raises(RunError, match=r"2 of 3 sites take part, and 3 are needed. east: with it epsilon would be"):
        run_over(dearer, sites, tmp_path / "dearer")
    assert run_over(dearer, sites, tmp_path / "without", Patience(0.6)).met.left_out.keys() == {"east"}


def test_a_plan_that_was_paid_for_is_computed_once_and_others_are_seen(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two experiments, each affordable when it begins: one is stopped before they pass the budget together."""
    configs = [experiment(clip_folder, privacy=NOISE, seed=seed, rounds=6) for seed in (0, 1)]
    run_over(configs[0], sites_at(site_files), tmp_path / "alone")
    one = sites_at(site_files)["east"].ledger.spent("example", 1e-3)
    for name in NAMES:
        shutil.rmtree(tmp_path / name / "state")
    write_site(tmp_path / "east", "east", clip_folder, {"epsilon": round(1.3 * one, 3), "delta": 1e-3})
    sites = sites_at(site_files)
    counted: list[float] = []
    whole = SiteLedger.spent

    def spent_and_counted(self: SiteLedger, *arguments: Any) -> float:
        counted.append(whole(self, *arguments))
        return counted[-1]

    monkeypatch.setattr(SiteLedger, "spent", spent_and_counted)
    lines: list[dict[str, Any]] = []
    calls: list[int] = []

    class Second(LocalFleet):
        """Runs the other experiment after the third round of this one."""

        def ask(self, ask: Ask) -> Any:
            calls.append(len(counted))
            if ask.round == 4:
                few = Patience(0.6)
                coordinate(configs[1], Proposal.of(configs[1]), fleet(sites), tmp_path / "second", few)
            return super().ask(ask)

    first = Second({name: site.turn for name, site in sites.items()})
    outcome = coordinate(configs[0], Proposal.of(configs[0]), first, tmp_path / "first", Patience(0.6), lines.append)
    assert calls[2] == calls[4], "nothing is computed in rounds while nobody else spends"
    assert outcome.training.round == 6
    assert any("policy.epsilon" in line.get("lost", {}).get("east", "") for line in lines)
    assert whole(sites["east"].ledger, "example", 1e-3) <= 1.3 * one + 1e-3


def test_what_the_policy_does_not_allow_is_refused(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    plain, noised = experiment(clip_folder), experiment(clip_folder, privacy=NOISE)

    def told(policy: dict[str, Any], config: Experiment) -> str:
        write_site(tmp_path / "east", "east", clip_folder, policy)
        return refusal(Site(load_site(site_files["east"])), config)

    fingerprint = Proposal.of(plain).fingerprint
    assert f"experiment {fingerprint} is not in policy.experiments" in told({"experiments": ["ab" * 32]}, plain)
    assert "privacy.mechanism = 'none' is not in policy.mechanisms" in told({"mechanisms": ["dp-sgd"]}, plain)
    by_server = experiment(clip_folder, privacy=NOISE | {"noise_by": "server"})
    assert "privacy.noise_by = 'server' is not in policy.noise_by" in told({}, by_server)
    assert "upload's 'change' may not leave; policy.fields = ['weight']" in told({"fields": ["weight"]}, plain)
    assert "epsilon would be inf" in told({"epsilon": 8.0}, plain), "without noise no budget suffices"
    assert "epsilon would be inf for one person" in told({"epsilon": 8.0, "unit": "person"}, noised)
    assert "policy.tells lacks them" in told({"tells": ["class_names"]}, plain)
    assert "policy.most_bytes = 100" in told({"most_bytes": 100}, plain)


def test_a_signed_experiment_is_allowed_by_its_signer(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config = experiment(clip_folder)
    for name in ("mine", "other"):
        make_key(tmp_path / f"{name}.pem")
    write_site(tmp_path / "east", "east", clip_folder, {"experiments": [], "signers": [str(tmp_path / "mine.pub.pem")]})
    site = sites_at(site_files)["east"]
    mine, other = (load_private_key(tmp_path / f"{name}.pem") for name in ("mine", "other"))
    assert hello(site, config, key=mine).kind == "hello"
    assert "none of policy.signers signed it" in refusal(site, config, key=other)
    assert "none of policy.signers signed it" in refusal(site, config)
    signed = Proposal.of(config, key=mine)
    changed = replace(signed, tables={**signed.tables, "rounds": 4})
    request = Envelope("hello", changed.fingerprint, changed.facts)
    assert "none of policy.signers signed it" in str(Envelope.decode(site.turn(request.encode())).facts["reason"])
    lying = replace(request, experiment=signed.fingerprint).encode()
    assert f"the proposal is of experiment {changed.fingerprint}" in str(Envelope.decode(site.turn(lying)).facts)


def test_no_message_can_name_data_state_or_simulated_noise(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    site = sites_at(site_files)["east"]
    honest = Proposal.of(experiment(clip_folder, privacy=NOISE))
    for change in (
        {"data": {"source": "digits"}},
        {"partition": {"scheme": "iid", "clients": 1}},
        {"methods": {"mine": "mine.py"}},
        {"state": "/tmp/elsewhere"},
        {"policy": {"epsilon": 1e9}},
        {"privacy": {**honest.tables["privacy"], "simulation": True}},
        {"privacy": {**honest.tables["privacy"], "release": "/data/runs/other"}},
        {"encoder": {"name": "clip", "checkpoint": "somebody/model"}},
        {"encoder": "clip"},
    ):
        forged = replace(honest, tables={**honest.tables, **change})
        request = Envelope("hello", forged.fingerprint, forged.facts).encode()
        answer = Envelope.decode(site.turn(request))
        assert answer.kind == "refusal", change
    with pytest.raises(ConfigError, match="privacy.simulation"):
        Proposal.of(experiment(clip_folder, privacy=NOISE | {"simulation": True}))
    for path in ("../../elsewhere", "", "a/b"):
        answer = Envelope.decode(site.turn(Envelope("round", path, {}, {0: b""}).encode()))
        assert answer.kind == "refusal"


def test_differences_are_told_before_a_round_is_run(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(clip_folder)
    other_clip = save_clip(tmp_path / "other clip", text={"hidden_act": "gelu"})
    write_site(tmp_path / "east", "east", other_clip)
    write_pictures(tmp_path / "fewer" / "pictures", 5, 6, ("red apple", "green leaf"))
    files = site_files | {"south": write_site(tmp_path / "fewer", "south", clip_folder)}
    with pytest.raises(RunError) as failed:
        run_over(config, sites_at(files), tmp_path / "out")
    told = str(failed.value)
    assert "2 of 4 sites take part, and 4 are needed" in told
    assert "east: its encoder's fingerprint is" in told
    assert "south: its classes are others: it has none besides, and lacks 'blue sky'" in told
    assert not (tmp_path / "out" / AGREEMENT).exists()
    del files["east"]
    names = ("blue sky", "green leaf", "red apple")
    outcome = run_over(config, sites_at(files), tmp_path / "named", class_names=names)
    assert outcome.training.round == 3, "with the experiment's classes, a site may lack some"
    with pytest.raises(RunError, match="pictures of 'blue sky', which is not a class of the experiment"):
        run_over(config, sites_at(files), tmp_path / "lacks", class_names=names[1:])
    monkeypatch.setattr(sordino, "__version__", "0.0.9")
    answers = {name: site.turn for name, site in sites_at(files).items()}

    def older(request: bytes) -> bytes:
        envelope = Envelope.decode(answers["west"](request))
        return replace(envelope, facts={**envelope.facts, "protocol": 0}).encode()

    with pytest.raises(RunError, match=r"west: it runs 0.0.9 with protocol 0, and the coordinator 0.0.9 with protocol"):
        coordinate(config, Proposal.of(config, names), LocalFleet(answers | {"west": older}), tmp_path / "old", ALL)
    assert sordino.__version__ == "0.0.9"


def test_a_site_that_is_lost_is_named_and_comes_back(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config = experiment(clip_folder, privacy=NOISE, rounds=4)
    sites = sites_at(site_files)

    class Flaky(LocalFleet):
        def ask(self, ask: Ask) -> Any:
            for event in super().ask(ask):
                gone = ask.round == 2 and isinstance(event, Answer) and event.site == "north"
                yield Lost("north", "the connection broke") if gone else event

    flaky = Flaky({name: site.turn for name, site in sites.items()})
    lines: list[dict[str, Any]] = []
    outcome = coordinate(config, Proposal.of(config), flaky, tmp_path / "out", Patience(0.6), lines.append)
    assert [line.get("lost", {}) for line in lines] == [{}, {"north": "the connection broke"}, {}, {}]
    assert [line["participants"] for line in lines] == [3, 2, 3, 3]
    assert outcome.training.round == 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Round 4 of 4, finished" in page
    assert "1: the connection broke" in page
    assert "1 round went on without somebody" in page
    most = max(epsilon_by_site(outcome.training.ledger, outcome.met.agreement, "example").values())
    assert f"So far at most ε = {rounded_up(most)} at δ = " in page
    kept = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    spent = [line["epsilon_spent"] for line in kept if "epsilon_spent" in line]
    assert spent == sorted(spent)
    assert 0 < spent[0] < spent[-1] == most
    assert all(rounded_up(epsilon) in page for epsilon in spent)
    assert "Nothing here is private" not in page
    spent_by_all = {site.ledger.spent("example", 1e-3) for site in sites.values()}
    assert all(math.isfinite(epsilon) and epsilon > 0 for epsilon in spent_by_all)


def test_a_site_that_comes_late_is_waited_for_and_one_that_does_not_is_named(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config, sites = experiment(clip_folder), sites_at(site_files)

    class Late(LocalFleet):
        looks = 0

        def sites(self) -> frozenset[str]:
            self.looks += 1
            return super().sites() - ({"west"} if self.looks < 3 else set())

    late = Late({name: site.turn for name, site in sites.items()})
    outcome = coordinate(config, Proposal.of(config), late, tmp_path / "out", replace(ALL, sites=NAMES))
    assert set(outcome.met.agreement.sites) == set(NAMES)
    assert late.looks >= 3
    there = fleet({name: sites[name] for name in ("east", "north")})
    short = Patience(0.6, deadline=0.1, sites=NAMES)
    waited_before = Patience(0.6, deadline=1e6, sites=NAMES, joining=0.0)  # by an engine, which then need not wait here
    for seed, patience in enumerate((short, waited_before)):
        config = experiment(clip_folder, seed=seed + 5)
        outcome = coordinate(config, Proposal.of(config), there, tmp_path / f"without {seed}", patience)
        assert outcome.met.left_out == {"west": "it is not there"}
        assert set(outcome.met.agreement.sites) == {"east", "north"}


def test_a_refusal_to_tell_accuracy_makes_nobody_wait_less(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Two of three refuse at once, and the third is slow: as a quorum they would leave it five seconds of its fifty."""
    for name in NAMES:
        write_site(tmp_path / name, name, clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
    sites = sites_at(site_files)

    def refusing(request: bytes, site: Site) -> bytes:
        asked = Envelope.decode(request)
        return refusal_of("not now") if asked.kind == "evaluate" else site.turn(request)

    class Slow(TimedFleet):
        def ask(self, ask: Ask) -> Any:
            kind = Envelope.decode(next(iter(ask.payloads.values()))).kind
            self._sites["west"] = (50.0 if kind == "evaluate" else 0.0, sites["west"].turn)
            yield from super().ask(ask)

    slow = Slow({name: (0.0, partial(refusing, site=site)) for name, site in sites.items()})
    config = experiment(clip_folder, runtime={"evaluate_every": 1}, rounds=1)
    coordinate(config, Proposal.of(config), slow, tmp_path / "out", Patience(0.6, deadline=100.0, grace=5.0))
    (line,) = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert line["accuracy_by_client"].keys() == {"2"}


def test_two_processes_of_a_site_answer_as_one(site_files: dict[str, Path], tmp_path: Path, clip_folder: Path) -> None:
    """Whichever is asked: a process that was thought dead draws no second noise for a round."""
    config = experiment(clip_folder, privacy=NOISE)
    first, second = sites_at(site_files), sites_at(site_files)
    asked: dict[int, list[bytes]] = {}

    class Turns(LocalFleet):
        def ask(self, ask: Ask) -> Any:
            payload = ask.payloads["east"]
            chosen, other = (first, second) if ask.round % 2 else (second, first)
            asked[ask.round] = [site["east"].turn(payload) for site in (chosen, other)]
            yield from super().ask(ask)

    both = Turns({name: site.turn for name, site in first.items()})
    coordinate(config, Proposal.of(config), both, tmp_path / "out", ALL)
    assert all(asked[number][0] == asked[number][1] for number in (1, 2, 3))
    entry = SiteLedger(tmp_path / "east" / "state" / "ledger").experiments[Proposal.of(config).fingerprint]
    assert entry.rounds == (1, 2, 3)
    assert {release.steps for release in entry.ledger.releases} == {3}


def test_who_is_missing_when_an_experiment_goes_on_is_waited_for_like_in_a_round(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """At first all must answer, as those left out stay out. Later a quorum and the grace are enough."""
    config, sites = experiment(clip_folder), sites_at(site_files)
    asks: list[Ask] = []

    class Watched(LocalFleet):
        def ask(self, ask: Ask) -> Any:
            asks.append(ask)
            return super().ask(ask)

    def over(names: tuple[str, ...]) -> Outcome:
        asks.clear()
        there = Watched({name: sites[name].turn for name in names})
        return coordinate(config, Proposal.of(config), there, tmp_path / "out", Patience(0.6))

    over(NAMES)
    assert [ask.quorum for ask in asks[:2]] == [3, 3]
    outcome = over(("east", "west"))
    assert [ask.quorum for ask in asks[:2]] == [2, 2]
    assert outcome.met.left_out == {"north": "it is not there"}
    assert set(asks[-1].payloads) == set(NAMES), "the end is told to everybody"


def test_a_site_without_a_budget_accounts_nothing_in_a_round(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise AssertionError("it would take a second in every round")

    monkeypatch.setattr(SiteLedger, "spent", fail)
    outcome = run_over(experiment(clip_folder, privacy=NOISE), sites_at(site_files), tmp_path / "out")
    assert outcome.training.round == 3
    assert [entry.rounds for entry in sites_at(site_files)["east"].ledger.experiments.values()] == [(1, 2, 3)]


def test_data_that_changed_since_a_site_joined_is_refused(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Though it is as much as before: the ledger has the digests of what was released."""
    config = experiment(clip_folder, privacy=NOISE)
    sites = sites_at(site_files)
    outcome = run_over(config, sites, tmp_path / "out")
    agreement = Envelope("agreement", Proposal.of(config).fingerprint, outcome.met.agreement.facts).encode()
    assert Envelope.decode(sites["east"].turn(agreement)).kind == "agreement"
    shutil.rmtree(tmp_path / "east" / "pictures")
    write_pictures(tmp_path / "east" / "pictures", 9, 5)
    changed = sites_at(site_files)["east"]
    assert "data changed since it joined" in str(Envelope.decode(changed.turn(agreement)).facts["reason"])
    assert hello(changed, config).kind == "hello", "which tells nothing that is not known"
    assert "data changed since it joined" in str(Envelope.decode(changed.turn(agreement)).facts["reason"])


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("hello", {"sizes": ["many"]}, "its hello cannot be read: sizes.0"),
        ("hello", {"sizes": [9, 9]}, "not of the same clients"),
        ("hello", {"example": [10**6, 10**6]}, "too large"),
        ("hello", {"encoder": None}, "its hello cannot be read: encoder"),
        ("hello", {"whole_persons": "yes"}, "its hello cannot be read: whole_persons"),
        ("agreement", {"federation": 7}, "it computes another noise"),
        ("end", {"accuracy": {"0": 1.0}}, "accuracies of clients that are not its own"),
        ("end", {"accuracy": {"2": "good"}}, "accuracies that are none"),
        ("end", {"accuracy": 3}, "accuracies of clients that are not its own"),
    ],
)
def test_a_site_that_tells_nonsense_harms_nobody_else(
    kind: str,
    change: dict[str, Any],
    told: str,
    site_files: dict[str, Path],
    tmp_path: Path,
    clip_folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, sites = experiment(clip_folder, rounds=1), sites_at(site_files)

    def west(request: bytes) -> bytes:
        answer = Envelope.decode(sites["west"].turn(request))
        return replace(answer, facts={**answer.facts, **change}).encode() if answer.kind == kind else answer.encode()

    turns = {name: site.turn for name, site in sites.items()} | {"west": west}
    outcome = coordinate(config, Proposal.of(config), LocalFleet(turns), tmp_path / "out", Patience(0.6))
    assert outcome.training.round == 1
    assert not outcome.accuracy
    assert told in caplog.text + " ".join(outcome.met.left_out.values())


def test_another_agreement_is_refused_also_after_a_restart(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config = experiment(clip_folder)
    outcome = run_over(config, sites_at(site_files), tmp_path / "out")
    facts = outcome.met.agreement.facts
    without = {"sites": {"east": [0], "west": [1]}, "sizes": [facts["sizes"][0], facts["sizes"][2]]}
    other = Envelope("agreement", Proposal.of(config).fingerprint, {**facts, **without}).encode()
    for said_hello in (False, True):
        site = sites_at(site_files)["east"]
        if said_hello:
            hello(site, config)
        assert "another agreement was made before" in str(Envelope.decode(site.turn(other)).facts["reason"])


def test_what_a_site_tells_beside_uploads_is_in_the_ledgers(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """An accuracy has no noise, so no budget pays for it; a size is as private as a client."""
    tells = ["sizes", "class_names", "accuracy"]
    config = experiment(clip_folder, privacy=NOISE)
    write_site(tmp_path / "west", "west", clip_folder, {"tells": tells, "epsilon": 1e4})
    assert "epsilon would be inf" in refusal(sites_at(site_files)["west"], config)
    write_site(tmp_path / "west", "west", clip_folder, {"tells": tells})
    sites = sites_at(site_files)
    outcome = run_over(config, sites, tmp_path / "out")
    assert set(outcome.accuracy) == {"client 2"}
    assert not outcome.training.ledger.private
    assert math.isinf(sites["west"].ledger.spent("example", 1e-3))
    assert math.isfinite(sites["east"].ledger.spent("example", 1e-3))
    by_client = {"mechanism": "dp-fedavg", "noise_multiplier": 1.0}
    alike = experiment(clip_folder, privacy=by_client, runtime={"weighting": "uniform"})
    write_site(tmp_path / "east", "east", clip_folder, {"mechanisms": ["dp-fedavg"]})
    assert hello(sites_at(site_files)["east"], alike).facts["sizes"] == [1]
    told = experiment(clip_folder, privacy=by_client)
    write_site(tmp_path / "east", "east", clip_folder, {"mechanisms": ["dp-fedavg"], "unit": "client", "epsilon": 1e4})
    assert "runtime.weighting" in refusal(sites_at(site_files)["east"], told), "weights would say a size"


def test_an_error_of_data_stays_at_the_site(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = experiment(clip_folder)
    shutil.move(tmp_path / "east" / "pictures", tmp_path / "east" / "of patient Miller")
    told = refusal(sites_at(site_files)["east"], config)
    assert "its own data or file is not as it should be" in told
    assert str(tmp_path) not in told
    assert str(tmp_path / "east" / "pictures") in caplog.text
    shutil.move(tmp_path / "east" / "of patient Miller", tmp_path / "east" / "pictures")
    write_site(tmp_path / "east", "east", clip_folder, {"tells": ["sizes"]})
    site = sites_at(site_files)["east"]
    told = refusal(site, config, class_names=("red apple", "green leaf"))
    assert "which is not a class of the experiment" in told
    assert "blue" not in told


def test_a_site_that_computes_other_noise_is_left_out(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config, sites = experiment(clip_folder, privacy=NOISE), sites_at(site_files)

    def other(request: bytes) -> bytes:
        answer = Envelope.decode(sites["west"].turn(request))
        facts = {**answer.facts, "federation": "00"} if answer.kind == "agreement" else answer.facts
        return replace(answer, facts=facts).encode()

    turns = {name: site.turn for name, site in sites.items()} | {"west": other}
    outcome = coordinate(config, Proposal.of(config), LocalFleet(turns), tmp_path / "out", Patience(0.6))
    assert outcome.met.left_out == {"west": "it computes another noise, or other messages, from what was agreed"}


def test_another_experiment_in_the_folder_is_refused(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    sites = sites_at(site_files)
    run_over(experiment(clip_folder), sites, tmp_path / "out")
    with pytest.raises(RunError, match="holds another experiment"):
        run_over(experiment(clip_folder, rounds=5), sites, tmp_path / "out")


def test_a_damaged_ledger_is_never_taken_for_an_empty_one(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    run_over(experiment(clip_folder, privacy=NOISE), sites_at(site_files), tmp_path / "out")
    (file,) = (tmp_path / "east" / "state" / "ledger").glob("*.json")
    whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:-20])
    with pytest.raises(RunError, match="damaged .* without it nobody knows what was spent"):
        sites_at(site_files)
    for changed in ({"releases": {}}, {"data": []}, {"trusted": ["nobody"]}):
        file.write_text(json.dumps(whole | {"ledger": whole["ledger"] | changed}))
        with pytest.raises(RunError, match=rf"{file.name}: .*{next(iter(changed))}.* without it nobody knows"):
            sites_at(site_files)
