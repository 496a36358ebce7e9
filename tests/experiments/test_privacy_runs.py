"""Privacy from the configuration to the run directory: plans, ledgers, and budgets that are never passed."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import dp_accounting
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sordino.cli.app import app
from sordino.errors import ConfigError, RunError
from sordino.experiments import run as experiment
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.privacy.plan import as_text, plan
from sordino.experiments.run import run
from sordino.experiments.variants import grid
from sordino.privacy.accounting import spent
from sordino.privacy.ledger import Ledger
from sordino.privacy.statement import read_ledgers
from sordino.runtime.local import LocalRuntime

SIMULATED = ["privacy.simulation=true", "privacy.nonce=" + "a5" * 16]  # noise that can be drawn again
DP_SGD = ["privacy.mechanism=dp-sgd", "privacy.clip=0.1", "privacy.delta=0.01"]


def pld(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    accountant = dp_accounting.pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


@pytest.mark.slow
def test_the_ledger_of_a_run_says_what_was_spent(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, [*DP_SGD, "privacy.noise_multiplier=1.5"])
    summary = run(config, tmp_path / "run")
    ledger = Ledger.from_json((tmp_path / "run" / "ledger.json").read_bytes())
    # Two classes of four images a client, batches of two: a quarter, in each of six rounds.
    expected = pld(1.5, 0.25, 6, 0.01)
    assert summary.privacy.epsilon == pytest.approx(expected, abs=1e-6)
    assert {(each.party, each.steps, each.sampling_rate) for each in ledger.releases} == {
        ("client 0", 6, 0.25),
        ("client 1", 6, 0.25),
    }
    assert summary.privacy.private
    assert "epsilon = " in summary.privacy.statement
    assert summary.privacy.randomness == "system"
    chosen = plan(config)
    assert chosen.ledger == replace(ledger, run="", data={})
    assert chosen.by_round[-1][1][0] == pytest.approx(expected, abs=1e-6)


def test_a_target_is_met_and_not_passed(config_file: Path, tmp_path: Path) -> None:
    summary = run(load_config(config_file, [*DP_SGD, "privacy.epsilon=2.0"]), tmp_path / "run")
    assert 1.99 < summary.privacy.epsilon <= 2.0
    assert summary.rounds == 6
    assert summary.privacy.rounds_unpaid == 0


@pytest.mark.slow
def test_a_run_stops_at_its_budget_whether_or_not_it_is_interrupted(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = pld(1.0, 0.25, 3, 0.01) + 1e-3  # pays for three rounds, not for four
    keys = ["privacy.noise_multiplier=1.0", f"privacy.epsilon={budget}", *SIMULATED]
    config = load_config(config_file, [*DP_SGD, *keys])
    whole = run(config, tmp_path / "whole")
    assert (whole.rounds, whole.privacy.rounds_unpaid) == (3, 3)
    assert whole.privacy.epsilon <= budget
    interrupt(config, tmp_path / "cut", after=1, monkeypatch=monkeypatch)
    resumed = run(config, tmp_path / "cut", resume=True)
    assert resumed.rounds == 3
    ledgers = [(tmp_path / name / "ledger.json").read_bytes() for name in ("whole", "cut")]
    assert ledgers[0] == ledgers[1]  # what was noised alike again is no new release
    assert json.loads((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()[-1])["round"] == 3


@pytest.mark.slow
def test_noise_of_the_operating_system_stays_counted_over_an_interruption(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that is lost and run again released something new each time; the budget knows."""
    budget = pld(1.0, 0.25, 6, 0.01) + 1e-3
    keys = ["privacy.noise_multiplier=1.0", f"privacy.epsilon={budget}"]
    config = load_config(config_file, [*DP_SGD, *keys, "runtime.checkpoint_every=6"])
    interrupt(config, tmp_path / "run", after=4, monkeypatch=monkeypatch)
    summary = run(config, tmp_path / "run", resume=True)
    ledger = Ledger.from_json((tmp_path / "run" / "ledger.json").read_bytes())
    assert summary.rounds == 2  # four of six were spent before the interruption and are lost
    assert {each.steps for each in ledger.releases} == {6}
    assert summary.privacy.epsilon <= budget
    assert ledger.randomness == "system"
    assert summary.privacy.private
    assert not summary.privacy.simulated


def test_copies_of_a_run_that_both_go_on_are_two_runs(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What both released before is then counted twice, which is too much and never too little."""
    config = load_config(config_file, [*DP_SGD, "privacy.noise_multiplier=1.0"])
    interrupt(config, tmp_path / "one", after=2, monkeypatch=monkeypatch)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("one", "two"):
        run(config, tmp_path / name, resume=True)
    both = read_ledgers([tmp_path / "one", tmp_path / "two"])
    assert spent(both, "server", "example").epsilon == pytest.approx(pld(1.0, 0.25, 12, 0.01), abs=1e-6)
    with pytest.raises(RunError, match="is the same run as"):
        read_ledgers([tmp_path / "one", tmp_path / "one"])


def prompt(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "prompts" / f"{name}.safetensors")["context"]


def interrupt(config: experiment.Experiment, out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies in the round after `after`."""
    whole = LocalRuntime.round

    def dies(self: LocalRuntime, training: experiment.Training) -> object:
        if training.round == after:
            raise KeyboardInterrupt
        return whole(self, training)

    with monkeypatch.context() as patch:
        patch.setattr(LocalRuntime, "round", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config, out)


def test_what_a_diverging_round_released_is_counted(config_file: Path, tmp_path: Path) -> None:
    """The round is lost; who saw its uploads has seen them."""
    keys = ["privacy.noise_multiplier=1.0", "algorithm=promptfl"]
    keys += [f"settings.{each}.learning_rate=1e30" for each in ("optimizer", "server_optimizer")]
    config = load_config(config_file, [*DP_SGD, *keys])
    with pytest.raises(RunError, match="training diverged in round 1"):
        run(config, tmp_path / "run")
    ledger = Ledger.from_json((tmp_path / "run" / "ledger.json").read_bytes())
    assert {each.steps for each in ledger.releases} == {1}


def test_runs_with_the_operating_systems_noise_differ_and_say_so(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, [*DP_SGD, "privacy.noise_multiplier=1.0"])
    runs = [run(config, tmp_path / name) for name in ("one", "two")]
    assert not torch.equal(prompt(tmp_path / "one", "client-0000"), prompt(tmp_path / "two", "client-0000"))
    assert [summary.privacy.randomness for summary in runs] == ["system", "system"]


@pytest.mark.parametrize(
    ("algorithm", "keys", "message"),
    [
        ("dp-fpl", ["privacy.mechanism=dp-sgd"], "privacy.epsilon = None: mechanism 'dp-sgd' needs epsilon"),
        ("dp-fpl", ["privacy.mechanism=dp-sgd", "privacy.epsilon=-1"], "privacy.epsilon = -1: .*greater than 0"),
        (
            "dp-fpl",
            [*DP_SGD, "privacy.epsilon=1", "privacy.delta=0.1"],
            "privacy.delta = 0.1: .*1 in|privacy.delta = 0.1",
        ),
        ("promptfl", [*DP_SGD, "privacy.epsilon=1", "privacy.noise_by=server"], "noise_by = 'server': .*use 'client'"),
        ("dp-fpl", [*DP_SGD, "privacy.epsilon=1", "privacy.noise_by=shares", "settings.local_steps=2"], "steps = 2"),
        (
            "dp-fpl",
            [*DP_SGD, "privacy.epsilon=1", "privacy.noise_by=shares", "runtime.participation=0.5"],
            "runtime.participation = 0.5",
        ),
        (
            "local",
            ["privacy.mechanism=dp-fedavg", "privacy.epsilon=1"],
            "'dp-fedavg': .*sends nothing.*use 'dp-sgd'",
        ),
        ("promptfl", ["privacy.mechanism=dp-fedavg", "privacy.epsilon=1"], "runtime.weighting = 'examples'"),
        ("promptfl", ["privacy.mechanism=cotangent", "privacy.epsilon=1", "privacy.clip=2.0"], "privacy.clip = 2.0"),
        ("promptfl", ["privacy.mechanism=cotangent", "privacy.epsilon=1", "privacy.noise_by=server"], "each client"),
        ("promptfl", [*DP_SGD, "privacy.epsilon=1", "privacy.clip_quantile=0.5"], "only 'dp-fedavg' adapts"),
        ("promptfl", ["privacy.mechanism=dpsgd"], "privacy.mechanism = 'dpsgd': .*'dp-sgd'"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_trained(
    algorithm: str, keys: list[str], message: str, config_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(load_config(config_file, [f"algorithm={algorithm}", *keys]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_compare_checks_the_mechanism_of_every_method_first(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, [*DP_SGD, "privacy.epsilon=1", "privacy.noise_by=server"])
    with pytest.raises(ConfigError, match="use 'client'"):
        compare(grid(config, ["dp-fpl", "promptfl"]), 1, tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["zero-shot", "local", "central", "promptfl", "dp-fpl", "dplora", "dp-fpl-full"])
def test_every_method_says_what_a_mechanism_leaves_open(algorithm: str, config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, [f"algorithm={algorithm}", *DP_SGD, "privacy.epsilon=4", "rounds=2"])
    summary = run(config, tmp_path / "run").privacy
    if algorithm == "zero-shot":
        assert (summary.private, summary.epsilon, summary.noise_multiplier) == (True, 0.0, None)
        return
    assert summary.private
    assert 3.9 < summary.epsilon <= 4
    assert summary.trusted == (("server",) if algorithm == "central" else ())


def test_who_is_trusted_with_what(config_file: Path, tmp_path: Path) -> None:
    """DP-FPL as published: the server adds the noise on the shared gradient, and sees it bare."""
    config = load_config(config_file, [*DP_SGD, "privacy.epsilon=2", "privacy.noise_by=server"])
    summary = run(config, tmp_path / "run").privacy
    epsilons = {view.observer: view.epsilon for view in summary.observers}
    assert epsilons["server"] is None
    assert epsilons["clients"] == epsilons["public"] == summary.epsilon <= 2
    assert summary.trusted == ("server",)
    assert "The server is trusted: it sees each client's gradient" in summary.statement


def test_client_level_privacy_of_a_personal_prompt_is_not_claimed(config_file: Path, tmp_path: Path) -> None:
    keys = ["privacy.mechanism=dp-fedavg", "privacy.epsilon=4", "runtime.weighting=uniform", "privacy.delta=0.01"]
    personal = run(load_config(config_file, keys), tmp_path / "personal").privacy
    assert not personal.private
    assert personal.epsilon is None
    assert "each client's prompt, where it is published, without noise" in personal.statement
    shared = run(load_config(config_file, [*keys, "algorithm=promptfl"]), tmp_path / "shared").privacy
    assert shared.private
    assert (shared.unit, shared.epsilon <= 4) == ("client", True)


def test_an_adaptive_clip_moves_is_kept_and_is_paid_for(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["algorithm=promptfl", "privacy.mechanism=dp-fedavg", "runtime.weighting=uniform", "privacy.delta=0.01"]
    keys += ["privacy.clip_quantile=0.5", "privacy.noise_multiplier=20.0", "privacy.noise_by=server", *SIMULATED]
    config = load_config(config_file, keys)
    whole = run(config, tmp_path / "whole")
    interrupt(config, tmp_path / "cut", after=3, monkeypatch=monkeypatch)
    run(config, tmp_path / "cut", resume=True)
    released = [Ledger.from_json((tmp_path / name / "ledger.json").read_bytes()).releases for name in ("whole", "cut")]
    assert released[0] == released[1]
    (release,) = released[0]
    assert len(release.noise_multipliers) == 2
    assert release.noise_multiplier == pytest.approx(20.0)
    assert torch.equal(prompt(tmp_path / "whole", "shared"), prompt(tmp_path / "cut", "shared"))
    # The clip after round 2 came back from the checkpoint.
    plain = run(load_config(config_file, ["algorithm=promptfl", "runtime.weighting=uniform"]), tmp_path / "plain")
    for sent in ("upload_bytes_per_client_round", "broadcast_bytes_per_client_round"):
        assert getattr(whole.communication, sent) > getattr(
            plain.communication, sent
        )  # the bit goes up, the clip goes down, and both are counted


@pytest.mark.slow
def test_the_command_line_plans_and_reads_ledgers(config_file: Path, tmp_path: Path) -> None:
    keys = [part for key in [*DP_SGD, "privacy.noise_multiplier=1.0"] for part in ("--set", key)]
    runner = CliRunner()
    page = tmp_path / "plan.html"
    done = runner.invoke(app, ["privacy", "plan", str(config_file), *keys, "--out", str(page)])
    assert done.exit_code == 0, done.output
    for phrase in ("the server: epsilon", "noise by each client", "Epsilon by round", "it does not hold"):
        assert phrase in done.stdout
    assert "Plotly.newPlot" in page.read_text()
    planned = json.loads(runner.invoke(app, ["privacy", "plan", str(config_file), *keys, "--json"]).stdout)
    for name in ("one", "two"):
        run(load_config(config_file, keys[1::2]), tmp_path / name)
    read = json.loads(runner.invoke(app, ["privacy", "ledger", str(tmp_path / "one"), "--json"]).stdout)
    assert {view["epsilon"] for view in read["spent"]} == {view["epsilon"] for view in planned["observers"]}
    both = json.loads(
        runner.invoke(app, ["privacy", "ledger", str(tmp_path / "one"), str(tmp_path / "two"), "--json"]).stdout
    )
    assert both["spent"][0]["epsilon"] == pytest.approx(pld(1.0, 0.25, 12, 0.01), abs=1e-6)
    text = runner.invoke(app, ["privacy", "ledger", str(tmp_path / "one")]).stdout
    assert re.search(r"2 parties, unit example, noise by client.*\n +6 times, noise multiplier 1, .* rate 0.25", text)


def test_a_plan_without_noise_names_every_disclosure(config_file: Path) -> None:
    chosen = plan(load_config(config_file))
    text = as_text(chosen)
    assert "epsilon unbounded" in text
    assert "each client's prompt, where it is published: no noise" in text
    assert chosen.formula() is None


def test_the_privacy_table_is_resolved_into_the_run(config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file, [*DP_SGD, "privacy.epsilon=inf"]), tmp_path / "run")
    table = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["privacy"]
    assert (table["mechanism"], table["noise_by"]) == ("dp-sgd", "client")
    summary = json.loads((tmp_path / "run" / "summary.json").read_bytes())["privacy"]
    assert (summary["private"], summary["epsilon"]) == (False, None)
    assert "no noise was added" in summary["statement"]
