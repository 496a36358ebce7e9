"""Every engine gives the same experiments: to the bit, through faults, and charging each round once.

A server and three sites in real processes, over TLS with authentication, on the loopback. A module an engine imports
these tests and has a fixture `engine`, so that engines are tested side by side.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from engines.engine import Engine
from engines.faulty.site_faults import NOISE as REPEATABLE
from engines.faulty.site_faults import SECRET, repeatable_noise
from engines.processes import HELD, SECONDS, Trial, paced
from flare.parties import until
from sites.owners import NAMES, fleet, sites_at, write_pictures, write_site
from sordino.algorithms.base import named_tensors
from sordino.prompt_file import SavedPrompt
from sordino.runtime import checkpoint
from sordino.runtime.fleet import Patience
from sordino.runtime.turns import Turns
from sordino.sites.coordinator import AGREEMENT, LEDGER, OUTCOME, coordinate

UNIFORM: dict[str, Any] = {"runtime": {"weighting": "uniform"}}
ONE_STEP: dict[str, Any] = {"context_length": 2, "batch_size": 0, "local_steps": 1, "dp-fpl": {"rank": 1}}
CLUSTERS: dict[str, Any] = ONE_STEP | {"secfpp": {"clusters": 2, "cluster_every": 2}}
ADAPTIVE: dict[str, Any] = {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "clip_quantile": 0.5}
BITS: dict[str, tuple[str, dict[str, Any]]] = {
    "promptfl": ("promptfl", {"privacy": {}}),
    "dp-fpl, adaptive clip": ("dp-fpl", {"privacy": ADAPTIVE, "settings": ONE_STEP, **UNIFORM}),
    "dp-fpl, a secure sum": ("dp-fpl", {"privacy": ADAPTIVE | {"noise_by": "shares"}, "settings": ONE_STEP, **UNIFORM}),
    "fedpgp": ("fedpgp", {"privacy": {}}),
    "secfpp": ("secfpp", {"privacy": {}, "settings": CLUSTERS}),
}


@pytest.mark.parametrize("method", BITS)
def test_it_has_the_bits_of_sites_in_one_process(
    method: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """With noise that can be drawn again, which no site allows: the tests' own hook puts it there.

    Bits depend on the number of threads; the engines' processes have one.
    """
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    algorithm, tables = BITS[method]
    trial = Trial.of(engine, method.replace(", ", "-").replace(" ", "-"), algorithm, rounds=2, **tables)
    (engine.faults / REPEATABLE).touch()
    with trial.start() as run:
        monkeypatch.setattr(Turns, "_noise", repeatable_noise)
        folder, files = engine.folder / "here" / trial.name, {}
        for number, site in enumerate(NAMES):
            write_pictures(folder / site / "pictures", number, 5 + number)
            files[site] = write_site(folder / site, site, engine.clip)
        here = coordinate(trial.config, trial.proposal, fleet(sites_at(files)), folder / "out", Patience())
        run.end()
    (engine.faults / REPEATABLE).unlink()
    there = checkpoint.load_server(trial.out / "checkpoint", here.training)
    assert there is not None
    assert there.round == here.training.round == 2
    for tensor_name, tensor in named_tensors(here.training.state).items():
        assert tensor.equal(named_tensors(there.state)[tensor_name]), tensor_name
    for tensor_name, tensor in here.training.mechanism.items():
        assert tensor.equal(there.mechanism[tensor_name]), tensor_name
    ours = trial.prompts({site: folder / site / "state" for site in NAMES})
    for site, tensors in trial.prompts(dict(engine.states)).items():
        assert tensors.keys() == ours[site].keys()
        assert all(tensor.equal(ours[site][key]) for key, tensor in tensors.items()), site


def test_a_site_that_is_killed_comes_back_and_a_server_that_is_killed_goes_on(engine: Engine) -> None:
    """In one experiment: each of both may start a job anew, which takes longer than all rounds."""
    rounds = 12
    trial = Trial.of(engine, "killed", rounds=rounds, seed=2)
    with trial.start(deadline=400.0, grace=4.0) as run:
        with paced(engine, "east") as pace:
            until("the first round is over", lambda: len(trial.rounds()) >= 1)
            engine.kill_site("north")
            # A site that is back within the grace is never missed.
            until("a round is over without it", lambda: any("north" in line.get("lost", {}) for line in trial.rounds()))
            pace(HELD)
            engine.start_site("north")
            until("the command heard of it", lambda: engine.rejoined in run.told())
            pace(SECONDS)
            until("it is in a round again", lambda: trial.back("north"))
            engine.kill_server()
        # The last line may be of a round whose state was not written any more; it is run again.
        before = "".join(json.dumps(line) + "\n" for line in trial.rounds()[:-1])
        assert 2 <= before.count("\n") < rounds - 1, "it is killed before the end"
        engine.start_server()
        outcome, _ = run.end()
    assert outcome["rounds"] == rounds
    lines = trial.written()
    assert [line["round"] for line in lines] == list(range(1, rounds + 1)), "none is run twice, none left out"
    assert "".join(json.dumps(line) + "\n" for line in lines).startswith(before)
    for name in NAMES:  # an answer that comes too late is charged, and its site is lost
        taken = {line["round"] for line in lines if name not in line.get("lost", {})}
        assert taken <= set(trial.charged(name)) <= set(range(1, rounds + 1)), name


# The reason that the coordinator must give for a fault at a site, by its round.
FAULTS = {
    "slow": "no answer",
    "NaN": "not finite",
    "wrong shape": "shape",
    "oversized": "bytes where at most",
    "replayed": "it is of round",
    "garbage": "no message of Sordino's",
    "full disk": "No space left on device",
    "exception": "ValueError",
}
UNCHARGED = ("full disk", "exception")  # nothing left the site


def test_each_fault_of_a_site_is_named_and_loses_one_round(engine: Engine) -> None:
    rounds = 2 * len(FAULTS) + 1
    trial = Trial.of(engine, "faults", rounds=rounds, seed=4)
    faults = {2 * number: fault for number, fault in enumerate(FAULTS, 1)}
    (engine.faults / "north.json").write_text(json.dumps(faults))
    with trial.start(deadline=60.0, grace=20.0) as run:
        _, told = run.end()
    (engine.faults / "north.json").unlink()
    lines = trial.written()
    assert [line["round"] for line in lines] == list(range(1, rounds + 1))
    for line in lines:
        why = {**line.get("lost", {}), **line.get("lost_clients", {})}
        if line["round"] in faults:
            assert FAULTS[faults[line["round"]]] in " ".join(why.values()), line
            assert set(why) <= {"north", "1"}, line
            assert line["participants"] == 2
        else:
            assert (why, line["participants"]) == ({}, 3), "a late or wrong answer breaks nothing after it"
    assert trial.charged("east") == trial.charged("west") == list(range(1, rounds + 1))
    uncharged = {number for number, fault in faults.items() if fault in UNCHARGED}
    assert trial.charged("north") == sorted(set(range(1, rounds + 1)) - uncharged)
    assert SECRET not in told
    for file in [*engine.server_files(), *trial.out.rglob("*")]:
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_site_that_comes_late_is_waited_for_and_is_in_the_next_experiment(engine: Engine) -> None:
    """Who takes part is agreed before the first round: it decides the noise. Nobody joins later."""
    engine.kill_site("west")
    trial = Trial.of(engine, "late", rounds=8, seed=5)
    with trial.start(0.6, 20.0, 5.0, f"fleet.sites={json.dumps(list(NAMES))}") as run:
        with paced(engine, "east"):
            until("the first round is over", lambda: len(trial.rounds()) >= 1)
            engine.start_site("west")
        outcome, _ = run.end()
    assert set(outcome["sites"]) == {"east", "north"}
    assert set(outcome["left_out"]) == {"west"}
    assert [line["participants"] for line in trial.written()] == [2] * 8
    assert not (engine.states["west"] / "ledger" / f"{trial.proposal.fingerprint}.json").exists()
    following = Trial.of(engine, "following", seed=6)
    with following.start() as run:
        outcome, told = run.end()
    assert (outcome["experiment"], outcome["rounds"]) == (following.proposal.fingerprint, 3)
    assert outcome["sites"] == {name: [number] for number, name in enumerate(NAMES)}
    assert outcome["privacy"]["private"]
    assert "round 3: " in told
    assert [line["participants"] for line in following.written()] == [3, 3, 3]
    assert {LEDGER, AGREEMENT, OUTCOME, "checkpoint", "config.toml", "report.html"} <= {
        path.name for path in following.out.iterdir()
    }
    for number, name in enumerate(NAMES):
        assert following.charged(name) == [1, 2, 3]
        (prompt,) = (engine.states[name] / "experiments" / following.proposal.fingerprint / "prompts").iterdir()
        assert SavedPrompt.load(prompt).client == number
