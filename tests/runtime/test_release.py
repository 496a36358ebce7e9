"""The release before the first round: what clients train on afterwards, what the ledger has, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from scipy.stats import norm
from torch import Tensor

from sordino.algorithms import METHODS
from sordino.algorithms.base import Broadcast, named_tensors
from sordino.errors import ConfigError, RunError
from sordino.privacy.accounting import compose, epsilon, spent
from sordino.privacy.gradients import Batch, ExactGradients, Gradient
from sordino.privacy.ledger import OBSERVERS
from sordino.privacy.statistics.estimates import Released
from sordino.privacy.statistics.mechanism import CONTENT, StatisticsMechanism
from sordino.privacy.statistics.release import CENTER_COUNTS, unpacked
from sordino.runtime import checkpoint, messages
from sordino.runtime.client import ClientEnd, ClientReleaseRound, ClientRound
from sordino.runtime.local import LocalRuntime, RoundError, Training
from sordino.runtime.messages import MessageError, RoundHeader
from sordino.runtime.release import RELEASE_ROUND, told_like

CPU = torch.device("cpu")
MakeRuntime = Callable[..., LocalRuntime]
NONCE = "00112233445566778899aabbccddeeff"
ROWS = [list(range(k, 40, 4)) + list(range((k + 1) % 4, 20, 4)) for k in range(4)]
NOISE = {"mechanism": "statistics", "noise_multiplier": 0.5, "simulation": True, "nonce": NONCE}
SYSTEM = {"mechanism": "statistics", "noise_multiplier": 0.5}
TABLES = {"context_length": 4, "batch_size": 4, "local_steps": 2, "dp-fpl": {"rank": 2}}


def made(make_runtime: MakeRuntime, name: str, privacy: dict[str, Any] = NOISE, **more: Any) -> LocalRuntime:
    return make_runtime(name, ROWS, TABLES, privacy=privacy, **more)


def poison(runtime: LocalRuntime) -> None:
    """Replace the clients' images by NaN, and their labels by none: whatever looks at one has NaN too, or fails."""
    data = runtime.clients.data
    features, labels = torch.full_like(data.features, math.nan), torch.full_like(data.labels, -(10**6))
    runtime.clients.data = replace(data, features=features, labels=labels)


def trained(runtime: LocalRuntime, training: Training, rounds: int) -> tuple[Training, list[float]]:
    losses = []
    for _ in range(rounds):
        training, record = runtime.round(training)
        losses.append(record.loss)
    return training, losses


REFUSED = [
    "fedotp",
    "plot",
    "pfedpt",
    "pfedpg",
    "fedperfix",
    "sgpt",
    "maple",
    "promptsrc",
]  # they need more of an image than its one feature
FITTING = [name for name in METHODS if name not in (*REFUSED, "zero-shot", "random-prompt")]


@pytest.mark.parametrize("name", FITTING)
def test_rounds_see_what_was_drawn_and_no_image(name: str, make_runtime: MakeRuntime) -> None:
    runtime = made(make_runtime, name)
    released, _ = runtime.release(runtime.start())
    expected, losses = trained(runtime, released, 2)

    blind = made(make_runtime, name)
    poison(blind)
    start = blind.with_release(blind.start(), released.at_clients.release, released.ledger.releases)
    reached, same_losses = trained(blind, start, 2)
    assert same_losses == pytest.approx(losses, rel=0, abs=0, nan_ok=True)  # none where no gradient is taken
    for ours, theirs in ((reached.server, expected.server), (reached.clients, expected.clients)):
        for key, tensor in named_tensors(theirs).items():
            assert torch.equal(named_tensors(ours)[key], tensor), key
            assert tensor.isfinite().all()
    assert reached.ledger == expected.ledger


def test_the_start_before_a_release_does_not_depend_on_images(make_runtime: MakeRuntime) -> None:
    for name in FITTING:
        runtime, blind = made(make_runtime, name), made(make_runtime, name)
        poison(blind)
        for key, tensor in named_tensors(runtime.start().clients).items():
            assert torch.equal(named_tensors(blind.start().clients)[key], tensor), (name, key)


def test_batches_are_of_the_drawn_table(make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = made(make_runtime, "dp-fpl")
    training, _ = runtime.release(runtime.start())
    table = runtime.clients.training_data(training.at_clients)
    seen: list[Tensor] = []
    whole = ExactGradients.__call__

    def spy(self: ExactGradients, prompt_of: Any, parameters: Any, fixed: Any, batch: Batch) -> Gradient:
        seen.append(batch.features[batch.mask])
        return whole(self, prompt_of, parameters, fixed, batch)

    monkeypatch.setattr(ExactGradients, "__call__", spy)
    trained(runtime, training, 2)
    assert seen
    for features in seen:
        assert (features[:, None] == table.features).all(-1).any(1).all()
    images = runtime.data.features
    assert (table.features[:, None] - images).norm(dim=-1).min() > 0


def test_one_release_pays_for_500_rounds(make_runtime: MakeRuntime) -> None:
    budget = {"mechanism": "statistics", "epsilon": 1.0, "delta": 1e-3}
    runtime = made(make_runtime, "promptfl", budget, rounds=500)
    training, _ = runtime.release(runtime.start())
    assert runtime.pays_for_all(training)
    training, _ = trained(runtime, training, 3)
    ledger = training.ledger
    assert [(release.content, release.party, release.steps) for release in ledger.releases] == [
        (CONTENT, f"client {client}", 1) for client in range(4)
    ]
    (name,) = {release.name for release in ledger.releases}
    assert name
    assert ledger.run not in name, "the run's name stays at home"
    assert ledger.private
    epsilon = spent(ledger, "server", "example").epsilon
    assert epsilon == pytest.approx(spent(runtime.mechanism.total, "server", "example").epsilon, abs=1e-6)
    # The noise of one Gaussian release, by the formula of Balle and Wang (ICML 2018).
    assert exact_delta(runtime.mechanism.noise_multiplier, epsilon) == pytest.approx(1e-3, rel=1e-3)
    assert 0.999 < epsilon <= 1


def exact_delta(noise_multiplier: float, epsilon: float) -> float:
    half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    return float(norm.cdf(half - shift) - math.exp(epsilon) * norm.cdf(-half - shift))


@pytest.mark.slow
def test_the_ledger_after_500_rounds_is_that_of_the_release(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(
        "promptfl", ROWS, {"context_length": 1, "batch_size": 2, "local_steps": 1}, privacy=NOISE, rounds=500
    )
    training, _ = runtime.release(runtime.start())
    after, _ = trained(runtime, training, 500)
    assert after.ledger == training.ledger
    assert replace(after.ledger, run="", data={}) == replace(
        runtime.mechanism.empty_ledger(),
        releases=tuple(runtime.mechanism.released(after.ledger.run)),  # type: ignore
    )


def opening(client: int, number: int = RELEASE_ROUND, clients: int = 4) -> bytes:
    return messages.encode(Broadcast(), RoundHeader(number, client, clients))


@pytest.mark.parametrize("center_share", [0.0, 0.1])
@pytest.mark.parametrize("name", ["dp-fpl", "local"])
def test_a_client_releases_once(name: str, center_share: float, make_runtime: MakeRuntime) -> None:
    runtime = made(make_runtime, name, SYSTEM | {"center_share": center_share})
    mechanism = runtime.mechanism
    assert isinstance(mechanism, StatisticsMechanism)
    assert len(mechanism.stages) == (2 if center_share else 1)
    end = ClientEnd(runtime.federation, runtime.data, range(4))
    start = end.start()
    clients = end.round(start)
    asked = {client: opening(client) for client in range(4)}
    first = dict(clients.handle(asked))
    again = end.round(start)
    assert again is clients  # so whoever opens the round anew meets the same noise
    for stage in range(1, len(mechanism.stages) + 1):
        if name == "dp-fpl":
            with pytest.raises(MessageError, match="lacks tensors"):
                again.handle({client: opening(client) for client in range(4)})
        like = told_like(mechanism, stage, CPU)
        again.handle({client: messages.encode(like, RoundHeader(RELEASE_ROUND, client, 4)) for client in range(4)})
    with pytest.raises(MessageError, match="do so once"):
        again.handle({client: opening(client) for client in range(4)})
    with pytest.raises(MessageError, match="round 0 after round 0"):
        end.round(again.training).handle({client: opening(client) for client in range(4)})
    assert len(first) == 4


def test_a_client_releases_to_those_who_were_agreed_only(make_runtime: MakeRuntime) -> None:
    runtime = made(make_runtime, "promptfl", SYSTEM | {"noise_by": "shares"})

    def asked(places: list[int], number: int, everyone: int) -> None:
        end = ClientEnd(runtime.federation, runtime.data, range(4))
        contents = dict(enumerate(opening(place, number, everyone) for place in places))
        end.round(end.start()).handle(contents)

    asked([0, 1, 2, 3], 0, 4)
    for places, number, everyone in (
        ([0, 1, 2], 0, 4),  # fewer
        ([0, 1, 2, 3], 1, 4),  # a round before the release
        ([0, 1, 2, 3], 0, 5),  # more share the noise than there are
        ([1, 0, 2, 3], 0, 4),  # another's place
    ):
        with pytest.raises(MessageError, match="release"):
            asked(places, number, everyone)


def test_clients_who_lost_their_release_make_no_other(make_runtime: MakeRuntime, tmp_path: Path) -> None:
    runtime = made(make_runtime, "dp-fpl", SYSTEM)
    training, _ = runtime.release(runtime.start())
    training, _ = trained(runtime, training, 1)
    with pytest.raises(RunError, match="without the statistics that they released"):
        runtime.clients.round(replace(training.at_clients, release={}))
    checkpoint.save_clients(tmp_path / "clients", training.at_clients)
    loaded = checkpoint.load_clients(tmp_path / "clients", runtime.start().at_clients)
    assert loaded is not None
    assert loaded.release.keys() == training.at_clients.release.keys()
    assert all(torch.equal(loaded.release[key], tensor) for key, tensor in training.at_clients.release.items())
    assert isinstance(runtime.clients.round(loaded), ClientRound)
    checkpoint.save_server(tmp_path / "server", training.at_server)
    server = checkpoint.load_server(tmp_path / "server", runtime.start().at_server)
    assert server is not None
    assert server.released
    assert server.release.keys() == training.at_server.release.keys()


def test_rounds_wait_for_the_release(make_runtime: MakeRuntime) -> None:
    runtime = made(make_runtime, "promptfl")
    end = runtime.clients
    with pytest.raises(MessageError, match="statistics were not released"):
        end.round(end.start()).handle({client: opening(client, 1) for client in range(4)})


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_need_more_than_one_feature_are_refused(name: str, make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.mechanism = 'statistics'.*more of an image than its one feature"):
        made(make_runtime, name)


@pytest.mark.parametrize("noise_by", ["server", "shares"])
def test_what_is_not_sent_is_not_summed(noise_by: str, make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.noise_by.*sends nothing that could be summed"):
        made(make_runtime, "local", NOISE | {"noise_by": noise_by})


@pytest.mark.parametrize("name", ["dp-fpl", "promptfl"])
def test_a_trusted_server_is_in_the_ledger(name: str, make_runtime: MakeRuntime) -> None:
    runtime = made(make_runtime, name, SYSTEM | {"noise_by": "server"})
    training, _ = runtime.release(runtime.start())
    ledger = training.ledger
    assert ledger.trusted == ("server",)
    assert [disclosure.channel for disclosure in ledger.disclosures] == ["upload"]
    assert {release.observers for release in ledger.releases} == {("clients", "public")}
    assert spent(ledger, "server", "example").epsilon == math.inf
    expected = epsilon([replace(ledger.releases[0], noise_multipliers=(0.5,))], ledger.delta or 0.0)
    for observer in ("clients", "public"):
        assert spent(ledger, observer, "example").epsilon == pytest.approx(expected, rel=1e-6)


def test_a_trusted_server_is_sent_exact_sums(make_runtime: MakeRuntime) -> None:
    """Rounded to float32, a sum of thousands would change by more than one contribution."""
    beside = {"center_share": 0.0, "scatter_share": 0.0}
    runtime = made(make_runtime, "promptfl", SYSTEM | {"noise_by": "server"} | beside)
    mechanism = runtime.mechanism
    assert isinstance(mechanism, StatisticsMechanism)
    end = ClientEnd(runtime.federation, runtime.data, range(4))
    assert mechanism.stages == [["matrix"]]
    replies = dict(end.round(end.start()).handle({client: opening(client) for client in range(4)}))
    table = (runtime.data.features, runtime.data.labels)
    exact = mechanism.exact("matrix", *table, [torch.tensor(rows) for rows in ROWS])
    for client, reply in replies.items():
        assert isinstance(reply, bytes)
        assert torch.equal(safetensors.torch.load(reply)["sums.matrix"][0], exact[client])


def test_images_that_are_handed_over_are_in_the_ledger(make_runtime: MakeRuntime) -> None:
    """Noise on what is made of them does not protect them from those who hold them."""
    ledger = made(make_runtime, "central", SYSTEM).start().ledger
    assert ledger.trusted == ("server",)
    assert "images" in {disclosure.channel for disclosure in ledger.disclosures}
    assert spent(ledger, "server", "example").epsilon == math.inf


def test_a_secure_sum_is_charged_what_its_survivors_noised(make_runtime: MakeRuntime) -> None:
    runtime = made(make_runtime, "dp-fpl", SYSTEM | {"noise_by": "shares", "colluders": 1, "shared_budget": 0.3})
    training, record = runtime.release(runtime.start())
    assert not training.ledger.trusted
    assert not training.ledger.disclosures
    for release in training.ledger.releases:
        assert release.noise_multiplier >= 0.5 * (1 - 1e-6)
        assert release.noise_multiplier == pytest.approx(0.5, rel=1e-3)
    assert "own" in training.at_clients.release
    assert "own" not in training.at_server.release
    assert record.round == 0


def test_a_release_that_failed_is_counted(make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = made(make_runtime, "promptfl", SYSTEM)

    def silent(self: ClientReleaseRound, contents: Any) -> list[tuple[int, bytes]]:
        return []

    monkeypatch.setattr(ClientReleaseRound, "handle", silent)
    with pytest.raises(RoundError, match="client 0 did not release its statistics") as caught:
        runtime.release(runtime.start())
    assert len(caught.value.ledger.releases) == 4


def test_a_release_that_two_runs_use_costs_once(make_runtime: MakeRuntime) -> None:
    one = made(make_runtime, "local", SYSTEM)
    training, _ = one.release(one.start())
    two = made(make_runtime, "promptfl", SYSTEM)
    again = two.with_release(two.start(), training.at_clients.release, training.ledger.releases)
    assert again.at_server.release.keys() >= {"sums", "counts"}  # the server joins what each released
    other, _ = two.release(two.start())
    for observer in OBSERVERS:
        alone = spent(training.ledger, observer, "example").epsilon
        assert spent(compose([training.ledger, again.ledger]), observer, "example").epsilon == alone
        assert spent(compose([again.ledger, training.ledger]), observer, "example").epsilon == alone
        assert spent(compose([training.ledger, other.ledger]), observer, "example").epsilon > alone
        assert spent(compose([training.ledger, other.ledger, again.ledger]), observer, "example").epsilon > alone
    assert training.ledger.add(training.ledger.releases) == training.ledger


@pytest.mark.parametrize("system", [False, True])
def test_all_parts_are_of_the_same_sample(system: bool, make_runtime: MakeRuntime) -> None:
    """Otherwise they would be several subsampled releases, and the ledger has one."""
    exact = {"mechanism": "statistics", "noise_multiplier": 0.0, "sampling_rate": 0.5}
    exact |= {"center_share": 0.1, "scatter_share": 0.1}
    runtime = made(make_runtime, "promptfl", exact if system else exact | {"simulation": True, "nonce": NONCE})
    mechanism = runtime.mechanism
    assert isinstance(mechanism, StatisticsMechanism)
    seen = runtime.release(runtime.start())[0].at_clients.release
    counted = float(seen["own"][..., 0].sum()) / mechanism.count_share**0.5
    assert 0 < counted < sum(map(len, ROWS))
    assert counted == pytest.approx(round(counted), abs=1e-3)
    assert float(seen["center"][0]) / CENTER_COUNTS**0.5 == pytest.approx(counted, abs=1e-3)
    assert float(unpacked(seen["scatter"]).trace()) == pytest.approx(counted, abs=1e-3)
    again = runtime.release(runtime.start())[0].at_clients.release
    assert system != all(torch.equal(again[name], tensor) for name, tensor in seen.items())


@pytest.mark.parametrize(("first", "second"), [("promptfl", "local"), ("local", "promptfl"), ("dp-fpl", "promptfl")])
def test_a_second_method_sees_features_from_where_they_were_released(
    first: str, second: str, make_runtime: MakeRuntime
) -> None:
    """Whether the center is of all clients or of each depends on the release, and not on who uses it."""
    noise = {"mechanism": "statistics", "noise_multiplier": 0.5, "center_share": 0.3, "count_share": 0.2}
    one = made(make_runtime, first, noise)
    training, _ = one.release(one.start())
    released = Released.of(training.at_clients.release)
    two = made(make_runtime, second, noise)
    after = two.with_release(two.start(), training.at_clients.release, training.ledger.releases)
    assert isinstance(one.mechanism, StatisticsMechanism)
    assert isinstance(two.mechanism, StatisticsMechanism)
    centers = one.mechanism.centers(released, range(4))
    assert centers is not None
    assert centers.norm(dim=1).min() > 0
    again = two.mechanism.centers(Released.of(after.at_clients.release), range(4))
    assert again is not None
    assert torch.equal(again, centers)
    assert bool((centers == centers[0]).all()) == (first != "local")


def test_a_trusted_server_is_said_to_see_all_parts(make_runtime: MakeRuntime) -> None:
    beside = {"noise_by": "server", "center_share": 0.1, "scatter_share": 0.1}
    neither = {"noise_by": "server", "center_share": 0.0, "scatter_share": 0.0}
    for parts, seen in ((neither, False), (beside, True)):
        ledger = made(make_runtime, "promptfl", SYSTEM | parts).start().ledger
        assert ("their sum over all classes" in ledger.disclosures[0].content) == seen
        assert ("sums of their products" in ledger.disclosures[0].content) == seen
