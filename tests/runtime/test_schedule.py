"""Accounting assumes a method's schedule and nothing else; whoever does not keep to it releases nothing."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sordino import algorithms
from sordino.algorithms import METHODS, Method, algorithm, promptfl, settings_for
from sordino.algorithms.base import ClientData, Schedule
from sordino.errors import ConfigError, RunError
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.privacy.accounting import spent
from sordino.privacy.ledger import Ledger
from sordino.privacy.sampling import PoissonSampler, sampling_rate
from sordino.randomness import Streams, SystemRandomness
from sordino.runtime.local import LocalRuntime

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(10 * k, 10 * k + 10)) for k in range(4)]
TABLES = {"context_length": 3, "batch_size": 4, "local_steps": 2}
HONEST = promptfl.client_round
DP_SGD = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "delta": 0.01}


def method(**changed: Any) -> types.SimpleNamespace:
    """PromptFL with some of its functions replaced."""
    return types.SimpleNamespace(**(vars(promptfl) | changed))


def with_batches(change: Callable[..., Any]) -> Callable[..., Any]:
    """A client's round that asks for other batches than its settings say."""

    def client_round(
        settings: Any, broadcast: Any, state: Any, data: ClientData, gradients: Any, round_context: Any
    ) -> Any:
        class Other(ClientData):
            def batches(self, steps: int, size: int | None, streams: Streams) -> Any:
                return change(super().batches, steps, size, streams)

        other = Other(**{name: getattr(data, name) for name in data.__dataclass_fields__})
        return HONEST(settings, broadcast, state, other, gradients, round_context)

    return client_round


def twice(batches: Any, steps: int, size: int | None, streams: Streams) -> Any:
    for batch in batches(1, size, streams):
        yield from (batch, batch)


BROKEN = {
    "all examples each time": lambda batches, steps, size, streams: batches(steps, None, streams),
    "one step more": lambda batches, steps, size, streams: batches(steps + 1, size, streams),
    "one step less": lambda batches, steps, size, streams: batches(steps - 1, size, streams),
    "larger batches": lambda batches, steps, size, streams: batches(steps, size + 1, streams),
    "one batch twice": twice,
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("privacy", [DP_SGD, DP_SGD | {"mechanism": "cotangent"}], ids=["dp-sgd", "cotangent"])
def test_a_method_that_does_not_keep_to_its_schedule_ends_the_run(
    change: Callable[..., Any], privacy: dict[str, Any], make_runtime: MakeRuntime
) -> None:
    runtime = make_runtime("promptfl", ROWS, TABLES, privacy=privacy)
    left: list[object] = []
    runtime.algorithm = method(client_round=with_batches(change), server_round=lambda *heard: left.append(heard))  # type: ignore[assignment]
    start = runtime.start()
    with pytest.raises(RunError, match="schedule|two gradients of one batch"):
        runtime.round(start)
    assert not left, "nothing reached the server"
    assert not start.ledger.releases


def test_the_schedule_of_every_method_is_what_it_draws(make_runtime: MakeRuntime) -> None:
    """Else its rounds would not go through; here with one client smaller than a batch."""
    rows = [list(range(3)), list(range(3, 20)), list(range(20, 40))]
    for name in METHODS:
        if not algorithm(name).ABOUT.trains:
            assert algorithm(name).schedule(None) == Schedule(0, None)
            continue
        tables = TABLES | {
            "local_steps": 3,
            "dp-fpl": {"rank": 2},
            "secfpp": {"cluster_every": 1},
            "fedbpt": {"search_width": 6},
        }
        runtime = make_runtime(name, rows, tables, privacy=DP_SGD, rounds=2)
        schedule = runtime.algorithm.schedule(runtime.settings)
        steps = 3 + (name == "fedbpt")  # the last measures where the search ended
        assert schedule == Schedule(steps, 4)
        training, _ = runtime.round(runtime.start())
        sizes = [40] if name == "central" else [3, 17, 20]
        drawn = {(each.party, each.sampling_rate, each.steps) for each in training.ledger.releases}
        assert drawn == {(f"client {k}", sampling_rate(4, size), steps) for k, size in enumerate(sizes)}


def test_a_method_from_elsewhere_must_say_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = types.ModuleType("elsewhere.method")
    vars(module).update({name: value for name, value in vars(promptfl).items() if name != "schedule"})
    monkeypatch.setitem(sys.modules, "elsewhere", types.ModuleType("elsewhere"))
    monkeypatch.setitem(sys.modules, "elsewhere.method", module)
    monkeypatch.setitem(algorithms.METHODS, "elsewhere", Method("elsewhere.method"))
    with pytest.raises(ConfigError, match=r"algorithm = 'elsewhere': .*schedule\(settings\)"):
        algorithm("elsewhere")
    module.schedule = promptfl.schedule  # type: ignore[attr-defined]
    assert algorithm("elsewhere") is module
    assert settings_for("elsewhere", {}).local_steps == 4


def test_a_run_that_leaves_its_schedule_has_spent_nothing_more(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the budget that was stated: rounds before the difference stay counted, nothing after it is."""
    keys = ["algorithm=promptfl", "privacy.mechanism=dp-sgd", "privacy.epsilon=2.0", "privacy.delta=0.01"]
    config = load_config(config_file, [*keys, "runtime.checkpoint_every=1"])
    greedy = with_batches(BROKEN["all examples each time"])

    def client_round(settings: Any, broadcast: Any, state: Any, data: Any, gradients: Any, round_context: Any) -> Any:
        chosen = greedy if round_context.round == 3 else HONEST
        return chosen(settings, broadcast, state, data, gradients, round_context)

    monkeypatch.setattr(promptfl, "client_round", client_round)
    with pytest.raises(RunError, match="does not keep to its schedule"):
        run(config, tmp_path / "run")
    ledger = Ledger.from_json((tmp_path / "run" / "ledger.json").read_bytes())
    assert {each.steps for each in ledger.releases} == {2}
    assert spent(ledger, "server", "example").epsilon < 2.0


def test_no_two_draws_toss_the_same_coins() -> None:
    """In however many loops a round asks for batches, and where coins can be drawn again."""
    poisson = PoissonSampler(Streams(0, 1, [0], torch.device("cpu")))
    features, labels = torch.arange(400.0)[:, None], torch.zeros(400, dtype=torch.int64)
    data = ClientData(features, labels, torch.arange(400)[None], torch.tensor([400]), torch.ones(1), poisson)
    streams = Streams(0, 1, [0], torch.device("cpu"))
    batches = [*data.batches(2, 200, streams), *data.batches(2, 200, streams)]
    drawn = [{int(x) for x in each.features[0, each.mask[0], 0]} for each in batches]
    assert len({each.sampling.draw for each in batches if each.sampling}) == 4
    for a in range(4):
        for b in range(a):
            shared = len(drawn[a] & drawn[b]) / 400
            assert abs(shared - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5  # independent: a quarter is in both


def test_rates_are_those_of_the_batches_that_are_drawn() -> None:
    sampler = PoissonSampler(SystemRandomness(3, torch.device("cpu")))
    chosen, sampling = sampler.draw([10, 3, 0], 5)
    assert sampling.rate.tolist() == [0.5, 1.0, 1.0]
    assert sampling.expected.tolist() == [5.0, 3.0, 0.0]
    assert chosen[1].tolist() == [0, 1, 2]
    assert not len(chosen[2])
    assert [sampling.draw, sampler.draw([1, 1, 1], None)[1].draw] == [0, 1]
