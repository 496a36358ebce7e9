"""The attack over rounds on small federations whose labels can only be learned by heart."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm

from audit.test_membership import make_task
from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import model_class
from sordino.audit.broken import with_defect
from sordino.audit.rounds import _gradients, _known, _vectors, coefficients, infer_from_rounds
from sordino.audit.subject import Subject, train
from sordino.audit.wiretap import repeated
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.experiments.config import Experiment
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings
from sordino.tasks.settings import DataSettings, PartitionSettings

ALL_IMAGES = {"context_length": 4, "batch_size": 0, "local_steps": 1, "optimizer": {"learning_rate": 0.1}}
PERSONAL = ALL_IMAGES | {"rank": 2, "local_learning_rate": 0.1}
NOISE = {"mechanism": "dp-sgd", "clip": 0.01, "epsilon": 1.0, "delta": 1e-5, "simulation": True, "nonce": "a5" * 16}


def make_subject(
    model: PromptModel,
    name: str = "promptfl",
    tables: dict[str, Any] | None = None,
    clients: int = 4,
    size: int = 12,
    rounds: int = 3,
    privacy: dict[str, Any] | None = None,
    **runtime: Any,
) -> Subject:
    """Clients with `size` random images each, and as many that test; labels say nothing of an image."""
    generator = torch.Generator().manual_seed(1)
    total = 2 * clients * size
    features = torch.randn(total, model.encoder.feature_width, generator=generator, dtype=torch.float64)
    features = F.normalize(features, dim=-1)
    labels = torch.arange(total) % len(model.classes)
    half = total // 2
    held = [list(range(client * size, (client + 1) * size)) for client in range(clients)]
    task = make_task(labels.numpy(), held, range(half, total))
    if tables is None:
        tables = PERSONAL if name.startswith("dp-fpl") else ALL_IMAGES
    settings, private = settings_for(name, tables), PrivacySettings(**(privacy or {}))
    method, parties = algorithm(name), RuntimeSettings(**runtime)
    own = model_class(method).of(settings, model.encoder, model.classes)
    federation = LocalRuntime(method, settings, own, features, labels, held, rounds, parties, 0, private)
    config = Experiment(
        algorithm=name,
        data=DataSettings(source="digits"),
        partition=PartitionSettings(scheme="iid", clients=clients),
    )
    training = train(federation)
    return Subject(config, federation, training, training.ledger, task, features, labels)


def by_chance(members: int) -> float:
    """The distance from a half that an AUC of members and non-members alike exceeds once in a thousand."""
    return float(norm.isf(0.0005)) * math.sqrt((2 * members + 1) / (12 * members**2))


# --- coefficients


def test_coefficients_of_a_sum_are_found_however_alike_the_gradients_are() -> None:
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(1, 200, generator=generator, dtype=torch.float64)
    gradients = 10 * common + torch.randn(12, 200, generator=generator, dtype=torch.float64)
    copies = gradients[::2] + 0.3 * torch.randn(6, 200, generator=generator, dtype=torch.float64)
    gradients[1::2] = copies  # of members, which were not trained on themselves
    weights = torch.tensor([1.0, 0.0] * 6, dtype=torch.float64)
    own = weights @ gradients
    found = coefficients(gradients, torch.stack([own, 3 * own]), 0)
    torch.testing.assert_close(found, torch.stack([weights, 3 * weights]), rtol=0, atol=1e-2)
    cosines = F.cosine_similarity(gradients, own[None])
    assert float(cosines[1::2].max()) > float(cosines[::2].min())  # where cosines do not tell them apart


def test_in_noise_the_coefficients_are_plain_products() -> None:
    """Far below the noise, inverting the gradients' products would only amplify it."""
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(5, 3000, generator=generator, dtype=torch.float64) * torch.arange(1, 6)[:, None]
    noise = 1e6 * torch.randn(1, 3000, generator=generator, dtype=torch.float64)
    noise -= noise @ torch.linalg.pinv(gradients) @ gradients * 0.5  # no longer in their span than elsewhere
    found, products = coefficients(gradients, noise, 0)[0], (gradients @ noise[0])
    assert float(F.cosine_similarity(found, products, dim=0)) > 0.99


def test_gradients_that_are_zero_have_no_coefficients() -> None:
    assert not coefficients(torch.zeros(3, 7).double(), torch.ones(2, 7).double(), 0).any()


# --- what the server computes


@pytest.mark.parametrize(
    ("name", "privacy"),
    [
        ("promptfl", None),
        ("dp-fpl-full", None),
        ("fedtpg", None),
        ("promptfl", NOISE | {"epsilon": None, "noise_multiplier": 0.0}),
    ],
)
def test_an_upload_is_the_sum_of_the_gradients_that_the_server_computes(
    model: PromptModel, name: str, privacy: dict[str, Any] | None
) -> None:
    """Of a client's own images, one step, all of them: in every round, with a personal prompt that is replayed."""
    subject = make_subject(model, name, privacy=privacy)
    _, messages = repeated(subject)
    seen = list(_known(subject.runtime, messages, [1, 2, 3], 5))
    assert len(seen) == 3
    for message, states in seen:
        uploads = _vectors(subject.runtime, message)
        for client, rows in enumerate(subject.task.train):
            mean = _gradients(subject, message, states, client, rows).mean(0)
            assert float(F.cosine_similarity(mean, uploads[client], dim=0)) > 1 - 1e-4
            other = _gradients(subject, message, states, client, subject.task.test[: len(rows)]).mean(0)
            assert float(F.cosine_similarity(other, uploads[client], dim=0)) < 0.9


# --- the attack


@pytest.mark.parametrize("name", ["promptfl", "dp-fpl"])
def test_without_noise_members_are_found(model: PromptModel, name: str) -> None:
    found = infer_from_rounds(make_subject(model, name), 1)
    assert found.members == found.non_members == 48
    assert found.rounds == 3
    assert found.same_run
    assert found.claimed_epsilon is None
    assert found.attack.auc_interval[0] > 0.7
    assert found.attack.epsilon is not None
    assert found.attack.epsilon > 0
    assert not found.attack.refuted  # where nothing is claimed
    assert json.loads(json.dumps(found.as_dict()))["attack"]["auc"] == found.attack.auc


def test_scores_do_not_depend_on_which_is_the_member(model: PromptModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from sordino.audit import rounds

    subject, seen = make_subject(model, rounds=1), []
    choose = rounds.candidates

    def swapped(subject: Subject, rng: np.random.Generator) -> Any:
        chosen = choose(subject, rng)
        return replace(chosen, member=~chosen.member)

    def attack(scores: Any, member: Any, persons: Any) -> Any:
        seen.append(scores)
        return judge(scores, member, persons)

    judge = rounds.Attack.of
    monkeypatch.setattr(rounds.Attack, "of", attack)
    infer_from_rounds(subject, 1)
    monkeypatch.setattr(rounds, "candidates", swapped)
    infer_from_rounds(subject, 1)
    assert np.array_equal(*seen)


def test_at_epsilon_one_it_is_near_chance_and_a_broken_mechanism_is_refuted(model: PromptModel) -> None:
    subject = make_subject(model, size=40, rounds=2, privacy=NOISE)
    honest = infer_from_rounds(subject, 1)
    assert honest.claimed_epsilon == pytest.approx(1.0, abs=0.01)
    assert honest.attack.auc == pytest.approx(0.5, abs=by_chance(honest.members))
    assert not honest.attack.refuted
    runtime = with_defect(subject.runtime, "noise skipped")  # and here the gradient is always above the bound
    broken = infer_from_rounds(replace(subject, runtime=runtime, training=train(runtime)), 1)
    assert broken.claimed_epsilon == honest.claimed_epsilon
    assert broken.attack.auc_interval[0] > 0.5 + by_chance(broken.members)
    assert broken.attack.refuted


def test_a_trusted_server_refutes_nothing(model: PromptModel) -> None:
    """It sees uploads without noise, about which nothing is claimed."""
    found = infer_from_rounds(make_subject(model, "dp-fpl", privacy=NOISE | {"noise_by": "server"}), 1)
    assert found.attack.auc_interval[0] > 0.5
    assert found.claimed_epsilon is None
    assert not found.attack.refuted


@pytest.mark.parametrize(
    "name",
    [
        *("fedpgp", "fedprompt", "pfedprompt", "fedtpg", "pfedmoap", "proda", "promptfolio"),
        *("kgcoop", "prograd", "cocoop", "feddpg"),
    ],
)
def test_it_reads_what_other_methods_upload(model: PromptModel, name: str) -> None:
    found = infer_from_rounds(make_subject(model, name, {"context_length": 4}, rounds=2), 1)
    assert 0 <= found.attack.auc <= 1
    assert found.rounds == 2


def test_only_those_who_took_part_are_compared(model: PromptModel) -> None:
    found = infer_from_rounds(make_subject(model, rounds=4, participation=0.5), 1)
    assert found.attack.auc_interval[0] > 0.5


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": "local"}, "no upload leaves"),
        ({"name": "central"}, "no upload leaves"),
        ({"name": "dp-fpl", "privacy": NOISE | {"noise_by": "shares"}}, "the server sees the sum"),
    ],
)
def test_where_the_server_sees_no_upload_it_is_refused(model: PromptModel, options: dict[str, Any], why: str) -> None:
    tables = {"context_length": 2} | ({"rank": 2} if options["name"] == "dp-fpl" else {})
    subject = make_subject(model, tables=tables, rounds=1, **options)
    with pytest.raises(ConfigError, match=why):
        infer_from_rounds(subject, 1)


@pytest.mark.parametrize(("name", "why"), [("secfpp", "on secret shares"), ("secfpp-plain", "upload prompts")])
def test_methods_of_shares_are_refused(model: PromptModel, name: str, why: str) -> None:
    subject = make_subject(model, rounds=1)
    runtime = subject.runtime
    runtime.algorithm = algorithm(name)
    with pytest.raises(ConfigError, match=why):
        infer_from_rounds(subject, 1)
