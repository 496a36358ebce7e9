"""The audit with canaries: that its premises hold, that it sees what is there, and that honest claims stand.

A bound may exceed an honest claim in 5 % of all audits; the seeds here are fixed, and no audit of theirs does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import named_tensors
from sordino.audit import decoding
from sordino.audit.canaries import Canaries, with_canaries
from sordino.audit.one_run import audit_in_one_run
from sordino.audit.scores import claimed
from sordino.audit.subject import train
from sordino.audit.white_box import Watching
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError, RunError
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings

ALL_AT_ONCE = {"context_length": 8, "local_steps": 1, "batch_size": 0}
DP_FPL = {"context_length": 8, "rank": 4, "batch_size": 0}
REPEATED = {"simulation": True, "nonce": "a5" * 16}  # noise that two runs of one identity share
EPSILON_1 = {"mechanism": "dp-sgd", "epsilon": 1.0, "delta": 1e-6, "clip": 0.3} | REPEATED
Make = Callable[..., LocalRuntime]


def federation(
    model: PromptModel,
    name: str,
    clients: int,
    size: int,
    rounds: int,
    settings: dict[str, Any],
    privacy: dict[str, Any] | None = None,
    **runtime: Any,
) -> LocalRuntime:
    """Clients with `size` random unit features each, whose labels are random too."""
    generator = torch.Generator().manual_seed(5)
    total = clients * size
    features = torch.randn(total, model.encoder.feature_width, generator=generator, dtype=torch.float64)
    labels = torch.randint(len(model.classes), (total,), generator=generator)
    rows = [list(range(client * size, (client + 1) * size)) for client in range(clients)]
    return LocalRuntime(
        algorithm(name),
        settings_for(name, settings),
        model,
        F.normalize(features, dim=-1),
        labels,
        rows,
        rounds,
        RuntimeSettings(**runtime),
        0,
        PrivacySettings(**(privacy or {})),
    )


# --- what does not depend on the coins; that a canary left out is nothing is in test_canaries.py


def test_neither_claim_nor_weights_nor_batches_depend_on_the_coins(model: PromptModel) -> None:
    runtime = federation(model, "dp-fpl", 3, 6, 4, DP_FPL | {"batch_size": 4}, EPSILON_1, participation=0.7)
    drawn = Canaries.draw(7, 3, model, (model.encoder.feature_width,), 1)
    nobody, everybody = (
        with_canaries(runtime, replace(drawn, included=torch.full((7,), value)), 1) for value in (False, True)
    )
    assert nobody.mechanism.inputs == everybody.mechanism.inputs
    assert nobody.mechanism.inputs.sizes == (9, 8, 8)
    assert nobody.mechanism.noise_multiplier == everybody.mechanism.noise_multiplier
    first, second = (replace(train(each).ledger, run="", data={}) for each in (nobody, everybody))
    assert first == second
    torch.testing.assert_close(nobody.data.rows, everybody.data.rows)
    torch.testing.assert_close(nobody.data.features, everybody.data.features)
    assert nobody.data.hidden.nonzero().flatten().tolist() == list(range(18, 25))  # type: ignore[union-attr]
    assert not everybody.data.hidden.any()  # type: ignore[union-attr]


def test_the_audited_training_has_the_noise_of_the_run_and_its_own_claim(model: PromptModel) -> None:
    runtime = federation(model, "promptfl", 2, 10, 3, ALL_AT_ONCE | {"batch_size": 4}, EPSILON_1)
    audit = audit_in_one_run(runtime, 20, seed=0)
    varied = with_canaries(runtime, Canaries.draw(20, 2, model, (model.encoder.feature_width,), 0), 0)
    assert varied.mechanism.noise_multiplier == runtime.mechanism.noise_multiplier
    assert audit.delta == 1e-6
    assert audit.claimed_epsilon == pytest.approx(claimed(train(varied).ledger))
    assert audit.claimed_epsilon is not None
    assert audit.claimed_epsilon < 1.0  # batches of 4 of 20 now, not of 10


# --- coins and canaries


def test_coins_are_fair_and_follow_the_seed(model: PromptModel) -> None:
    drawn, again, other = (Canaries.draw(10_000, 7, model, (16,), seed) for seed in (3, 3, 4))
    for name in ("features", "labels", "owners", "included"):
        assert torch.equal(getattr(drawn, name), getattr(again, name))
    assert not torch.equal(drawn.included, other.included)
    four_deviations = 4 * 50  # of Binomial(10000, 1/2)
    assert abs(int(drawn.included.sum()) - 5000) < four_deviations
    assert abs(int((drawn.included == other.included).sum()) - 5000) < four_deviations
    for client in range(7):  # and at every client, and for every label
        assert abs(drawn.included[drawn.owners == client].double().mean() - 0.5) < 4 * 0.5 / 1400**0.5
    for label in range(4):
        assert abs(drawn.included[drawn.labels == label].double().mean() - 0.5) < 4 * 0.5 / 2300**0.5
    torch.testing.assert_close(drawn.features.norm(dim=1), torch.ones(10_000).double())


def test_audits_repeat_by_seed(model: PromptModel) -> None:
    runtime = federation(model, "promptfl", 4, 5, 2, ALL_AT_ONCE, EPSILON_1)
    first, again, other = (audit_in_one_run(runtime, 16, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first.black_box.guesses <= 16
    content = json.loads(json.dumps(first.as_dict(), allow_nan=False))
    assert content["epsilon"] == max(content["black_box"]["epsilon"], content["white_box"]["epsilon"])
    assert content["canaries"] == 16


# --- the white box


@pytest.mark.parametrize(
    ("name", "settings", "privacy"),
    [
        ("promptfl", ALL_AT_ONCE, {}),
        ("dp-fpl", DP_FPL, {}),
        ("promptfl", ALL_AT_ONCE, {"mechanism": "dp-sgd", "noise_multiplier": 0.0, "clip": 1e6}),
        ("dp-fpl", DP_FPL, {"mechanism": "dp-sgd", "noise_multiplier": 0.0, "clip": 1e6}),
        ("dp-fpl", DP_FPL, {"mechanism": "dp-sgd", "noise_multiplier": 0.0, "clip": 1e6, "noise_by": "server"}),
    ],
)
def test_without_noise_and_ridge_the_scores_are_the_coins(
    model: PromptModel, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any], privacy: dict[str, Any]
) -> None:
    """Sums of fewer gradients than there are parameters have one solution. Only a client alone is its federation's
    mean, so there is one here; full batches, and no clipping that turns the sum of the other examples."""
    monkeypatch.setattr(decoding, "RIDGE", 1e-12)
    runtime = federation(model, name, 1, 10, 2, settings, privacy)
    drawn = Canaries.draw(9, 1, model, (model.encoder.feature_width,), 2)
    audited = with_canaries(runtime, drawn, 2)
    watching = Watching(audited.mechanism, drawn, audited.data)
    audited.mechanism = watching  # type: ignore[assignment]
    train(audited)
    # A plain mean is of those who are there; who watches takes it for one of all who could be.
    scale = 1.0 if privacy else (10 + 9) / (10 + int(drawn.included.sum()))
    torch.testing.assert_close(watching.scores() / scale, drawn.included.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("privacy", "others"), [({}, {"participation": 0.7}), ({"noise_by": "shares"}, {})])
def test_watching_changes_nothing(model: PromptModel, privacy: dict[str, Any], others: dict[str, Any]) -> None:
    noise = EPSILON_1 | privacy
    runtime = federation(model, "dp-fpl", 3, 6, 3, DP_FPL | {"batch_size": 4}, noise, **others)
    drawn = Canaries.draw(7, 3, model, (model.encoder.feature_width,), 1)
    plain, watched = (with_canaries(runtime, drawn, 1) for _ in range(2))
    watched.mechanism = Watching(watched.mechanism, drawn, watched.data)  # type: ignore[assignment]
    ended, as_watched = train(plain), train(watched)
    assert ended.ledger == as_watched.ledger
    for part in ("server", "clients"):
        assert all(
            torch.equal(one, other)
            for one, other in zip(
                named_tensors(getattr(ended, part)).values(),
                named_tensors(getattr(as_watched, part)).values(),
                strict=True,
            )
        )


# --- what it finds


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("promptfl", ALL_AT_ONCE), ("dp-fpl", DP_FPL)])
def test_without_noise_canaries_are_found(model: PromptModel, name: str, settings: dict[str, Any]) -> None:
    runtime = federation(model, name, 20, 20, 3, settings)
    for seed in range(2):
        audit = audit_in_one_run(runtime, 200, seed)
        assert audit.claimed_epsilon is None
        assert not audit.refuted  # nothing is claimed
        assert audit.white_box.epsilon > 1.5
        assert audit.strongest is audit.white_box


@pytest.mark.slow
def test_a_prompt_that_memorized_its_canaries_gives_them_away(model: PromptModel) -> None:
    """Clients with two examples and six canaries each, alone, trained for long."""
    adam = {"name": "adam", "learning_rate": 0.03}
    settings = {"context_length": 8, "local_steps": 4, "batch_size": 0, "optimizer": adam}
    runtime = federation(model, "local", 10, 2, 10, settings)
    for seed in range(2):
        assert audit_in_one_run(runtime, 60, seed).black_box.epsilon > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["dp-sgd", "cotangent"])
@pytest.mark.parametrize(
    ("name", "settings", "others"),
    [
        ("promptfl", ALL_AT_ONCE, {}),
        ("promptfl", ALL_AT_ONCE | {"batch_size": 8, "local_steps": 2}, {"participation": 0.5}),
        ("dp-fpl", DP_FPL, {}),
    ],
)
def test_honest_claims_stand(
    model: PromptModel, mechanism: str, name: str, settings: dict[str, Any], others: dict[str, Any]
) -> None:
    runtime = federation(model, name, 10, 20, 3, settings, EPSILON_1 | {"mechanism": mechanism}, **others)
    for seed in range(3):
        audit = audit_in_one_run(runtime, 100, seed)
        assert audit.claimed_epsilon is not None
        assert audit.claimed_epsilon <= 1.0 + 1e-6
        assert not audit.refuted


@pytest.mark.parametrize("noise_by", ["server", "shares"])
def test_honest_claims_stand_where_means_are_noised(model: PromptModel, noise_by: str) -> None:
    runtime = federation(model, "dp-fpl", 5, 20, 3, DP_FPL, EPSILON_1 | {"noise_by": noise_by})
    audit = audit_in_one_run(runtime, 50, seed=0)
    assert audit.claimed_epsilon == pytest.approx(1.0, abs=1e-3)
    assert not audit.refuted


# --- what it refuses


def test_what_canaries_cannot_audit_is_refused(make_runtime: Make) -> None:
    rows = [list(range(20)), list(range(20, 40))]
    clients = {"mechanism": "dp-fedavg", "noise_multiplier": 1.0}
    with pytest.raises(ConfigError, match=r"dp-fedavg.*example-level privacy only"):
        audit_in_one_run(make_runtime("promptfl", rows, privacy=clients, weighting="uniform"), 10, 0)
    with pytest.raises(ConfigError, match="canaries = 1"):
        audit_in_one_run(make_runtime("promptfl", rows), 1, 0)
    with pytest.raises(RunError, match="does not train"):
        audit_in_one_run(make_runtime("zero-shot", rows), 10, 0)
