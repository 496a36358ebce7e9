from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import logit
from scipy.stats import entropy, norm
from torch import Tensor

from sordino.algorithms import algorithm, settings_for
from sordino.audit.membership import (
    OWN_VARIANCE,
    Candidates,
    candidates,
    confidences,
    infer_membership,
    lira,
    shadow_attack,
    signals,
    train_shadows,
)
from sordino.audit.scores import Attack
from sordino.audit.statistics import roc
from sordino.audit.subject import Subject, train
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError, DataError
from sordino.experiments.config import Experiment
from sordino.privacy.ledger import Ledger
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings
from sordino.tasks.settings import DataSettings, PartitionSettings
from sordino.tasks.splits import Task

Labels = NDArray[np.int64]
MakeSubject = Callable[..., "Watched"]
QUICK = {"context_length": 2}
OVERFIT = {"context_length": 4, "optimizer": {"name": "adam", "learning_rate": 0.1}}


@dataclass(frozen=True)
class Watched(Subject):
    """A subject that remembers what its variations were given."""

    varied: list[tuple[list[list[int]], int]] = field(default_factory=list)

    def variation(
        self, features: Tensor, labels: Tensor, rows: Sequence[Sequence[int]], seed: int, **privacy: Any
    ) -> LocalRuntime:
        self.varied.append(([list(each) for each in rows], seed))
        return super().variation(features, labels, rows, seed, **privacy)


def make_task(labels: Labels, held: Sequence[Sequence[int]], test: Sequence[int]) -> Task:
    """A task whose cells are classes."""
    rows = [np.array(each) for each in held]
    tests = np.array(test)
    own = np.stack([np.isin(labels[tests], labels[each]) for each in rows]).astype(np.float64)
    local = own / np.maximum(own.sum(1, keepdims=True), 1)
    none = np.empty(0, dtype=np.int64)
    names = ("cat", "dog", "sunflower", "grand piano")
    return Task(names, (), labels, tuple(rows), tests, local, np.zeros_like(local), none, none, ((),) * len(rows), ())


@pytest.fixture
def make_subject(model: PromptModel) -> MakeSubject:
    """Runs a method over clients that share the first half of some images; the second half tests."""

    def make(
        name: str = "local",
        tables: dict[str, Any] | None = None,
        images: int = 48,
        clients: int = 3,
        rounds: int = 2,
        privacy: dict[str, Any] | None = None,
        alike: bool = False,
        task: Task | None = None,
    ) -> Watched:
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(images, model.encoder.feature_width, generator=generator, dtype=torch.float64)
        features = features[:1].expand_as(features) if alike else features
        # Labels that say nothing of the image, so that they can only be learned by heart; class 0 is the most frequent.
        labels = (torch.rand(images, generator=generator) ** 1.5 * 4).long()
        half = images // 2
        held = [range(client, half, clients) for client in range(clients)]
        task = task or make_task(labels.numpy(), held, range(half, images))
        runtime = LocalRuntime(
            algorithm(name),
            settings_for(name, tables or {}),
            model,
            (features / features.norm(dim=-1, keepdim=True))[np.concatenate(task.train)],
            torch.from_numpy(task.labels)[np.concatenate(task.train)],
            np.split(np.arange(sum(map(len, task.train))), np.cumsum([len(rows) for rows in task.train])[:-1]),
            rounds,
            RuntimeSettings(),
            0,
            PrivacySettings(**(privacy or {})),
        )
        config = Experiment(
            data=DataSettings(source="digits"), partition=PartitionSettings(scheme="iid", clients=clients)
        )
        features = features / features.norm(dim=-1, keepdim=True)
        labels = torch.from_numpy(task.labels)
        return Watched(config, runtime, train(runtime), Ledger(), task, features, labels)

    return make


def chosen_from(subject: Subject, seed: int = 0) -> Candidates:
    return candidates(subject, np.random.default_rng(seed))


def cells(labels: Labels, chosen: Candidates, which: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Owners and classes of some candidates."""
    return sorted(zip(chosen.owner[which].tolist(), labels[chosen.rows[which]].tolist(), strict=True))


def by_chance(members: int) -> float:
    """What an AUC of as many members as non-members, exchangeable, leaves a half by once in a thousand."""
    return float(norm.isf(0.0005)) * math.sqrt((2 * members + 1) / (12 * members**2))


# --- candidates


@pytest.mark.parametrize("seed", range(5))
def test_members_and_non_members_differ_in_nothing_but_membership(make_subject: MakeSubject, seed: int) -> None:
    subject = make_subject()
    chosen, task, labels = chosen_from(subject, seed), subject.task, subject.labels.numpy()
    member = chosen.member
    assert len(np.unique(chosen.rows)) == len(chosen.rows) == 2 * member.sum()
    for row, owner in zip(chosen.rows[member], chosen.owner[member], strict=True):
        assert row in task.train[owner]
    for row, owner in zip(chosen.rows[~member], chosen.owner[~member], strict=True):
        assert task.local[owner, np.flatnonzero(task.test == row)[0]] > 0
    assert cells(labels, chosen, member) == cells(labels, chosen, ~member)


def test_there_are_as_many_candidates_as_images_allow_and_clients_get_equal_parts(make_subject: MakeSubject) -> None:
    # Class 0: client 0 has two images, client 1 has six, and six test. Class 1: client 1 has one, three test. Class 2
    # is trained on and never tested; class 3 is tested and never trained on.
    labels = np.array([0] * 8 + [1] + [2] * 3 + [0] * 6 + [1] * 3 + [3] * 2)
    task = make_task(labels, [[0, 1, 9, 10], [2, 3, 4, 5, 6, 7, 8, 11]], range(12, 23))
    chosen = chosen_from(make_subject(task=task, clients=2))
    expected = [(0, 0)] * 2 + [(1, 0)] * 4 + [(1, 1)]
    assert cells(labels, chosen, chosen.member) == cells(labels, chosen, ~chosen.member) == expected
    scarce = make_task(labels, [[0, 1, 9, 10], [2, 3, 4, 5, 6, 7, 8, 11]], range(12, 15))
    dealt = chosen_from(make_subject(task=scarce, clients=2)).owner
    assert sorted(np.bincount(dealt).tolist()) == [2, 4]  # three images for two clients: one and two non-members


def test_non_members_are_of_their_owners_own_cells(make_subject: MakeSubject) -> None:
    labels = np.zeros(12, dtype=np.int64)  # one class in two domains, one for each client
    task = make_task(labels, [[0, 1, 2], [3, 4, 5]], range(6, 12))
    local = np.array([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.25, 0.25, 0.25, 0.25]])
    chosen = chosen_from(make_subject(task=replace(task, local=local), clients=2))
    owner = dict(zip(chosen.rows[~chosen.member].tolist(), chosen.owner[~chosen.member].tolist(), strict=True))
    assert {row for row, client in owner.items() if client == 0} == {6, 7}
    assert len(owner) == 5


def test_without_candidates_there_is_nothing_to_attack(make_subject: MakeSubject) -> None:
    labels = np.array([0, 0, 1, 1])
    with pytest.raises(DataError, match="of the same class"):
        chosen_from(make_subject(task=make_task(labels, [[0], [1]], [2, 3]), clients=2))


# --- shadows


@pytest.mark.parametrize("name", ["local", "promptfl", "central"])
def test_shadows_train_on_what_is_included_and_on_no_other_candidate(make_subject: MakeSubject, name: str) -> None:
    subject = make_subject(name, QUICK)
    chosen, labels = chosen_from(subject), subject.labels.numpy()
    known = set(np.concatenate(subject.task.train).tolist()) - set(chosen.rows.tolist())
    assert known  # training images that are nobody's candidates
    shadows = train_shadows(subject, chosen, 6, seed=3)
    assert torch.stack(shadows.prompts).shape == (6, *subject.runtime.prompts(subject.training).shape)
    assert len({seed for _, seed in subject.varied}) == 6
    for included, (rows, _) in zip(shadows.included, subject.varied, strict=True):
        everyone = [row for client in rows for row in client]
        assert len(everyone) == len(set(everyone))
        assert set(everyone) == known | set(chosen.rows[included].tolist())
        for candidate in np.flatnonzero(included):
            assert chosen.rows[candidate] in rows[chosen.owner[candidate]]
        for client, original in zip(rows, subject.task.train, strict=True):
            assert sorted(labels[client]) == sorted(labels[original])
        assert cells(labels, chosen, included) == cells(labels, chosen, ~included)
    assert (shadows.included.sum(0) == 3).all()
    assert len(np.unique(shadows.included, axis=1).T) > 5  # candidates are not all in the same shadows


def test_shadows_depend_on_the_seed_alone(make_subject: MakeSubject) -> None:
    subject = make_subject("local", QUICK)
    chosen = chosen_from(subject)
    one, same, other = (train_shadows(subject, chosen, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.stack(one.prompts), torch.stack(same.prompts))
    assert np.array_equal(one.included, same.included)
    assert not np.array_equal(one.included, other.included)
    assert not any(torch.equal(*pair) for pair in zip(one.prompts, other.prompts, strict=True))
    assert set(np.unique(one.included.sum(0))) <= {2, 3}


def test_shadows_at_once_are_those_one_after_the_other(make_subject: MakeSubject) -> None:
    subject = make_subject("local", QUICK)
    told: list[int] = []
    watched = replace(subject, progress=lambda stage, done, total, note="": told.append(done))
    chosen = chosen_from(subject)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels divide work among threads, and round in another order
    try:
        one, same = (train_shadows(watched, chosen, 5, 1, jobs) for jobs in (1, 3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.stack(one.prompts), torch.stack(same.prompts))
    assert np.array_equal(one.included, same.included)
    assert told[:5] == [1, 2, 3, 4, 5]
    assert sorted(told[5:]) == [1, 2, 3, 4, 5]


def test_shadows_of_a_run_that_ended_early_end_early_too(make_subject: MakeSubject) -> None:
    subject = make_subject("local", QUICK | {"optimizer": {"learning_rate": 0.5}}, rounds=3)
    ended = replace(subject, training=subject.runtime.round(subject.runtime.start())[0])
    shadows = train_shadows(ended, chosen_from(subject), 4, seed=1)
    for contexts, (rows, seed) in zip(shadows.prompts, list(subject.varied), strict=True):
        runtime = subject.variation(subject.features, subject.labels, rows, seed)
        assert torch.equal(contexts, runtime.prompts(runtime.round(runtime.start())[0]))


def test_too_few_shadows_are_refused(make_subject: MakeSubject) -> None:
    with pytest.raises(ConfigError, match="shadows = 3: at least 4"):
        infer_membership(make_subject(), 3)


# --- signals


@pytest.mark.parametrize("prompts", [1, 3])
def test_confidences_are_those_of_the_owners_prompt(model: PromptModel, prompts: int) -> None:
    generator = torch.Generator().manual_seed(2)
    contexts = torch.randn(prompts, 2, model.encoder.context_width, generator=generator, dtype=torch.float64)
    features = torch.randn(7, model.encoder.feature_width, generator=generator, dtype=torch.float64)
    owner = np.array([2, 0, 0, 2, 2, 0, 2])  # client 1 has no image
    seen = confidences(model, contexts, features, owner)
    for image, client in enumerate(owner):
        text = model.text_features(contexts[min(client, prompts - 1)])
        expected = (model.encoder.logit_scale * features[image] @ text.T).log_softmax(-1)
        assert seen[image] == pytest.approx(expected.numpy(), abs=1e-12)
    assert np.exp(seen).sum(1) == pytest.approx(np.ones(7))


def test_signals_are_what_they_are_called() -> None:
    rng = np.random.default_rng(1)
    probabilities, labels = rng.dirichlet(np.ones(6), size=20), rng.integers(6, size=20)
    seen = signals(np.log(probabilities), labels)
    true = probabilities[np.arange(20), labels]
    wrong = np.stack([np.delete(row, label) for row, label in zip(probabilities, labels, strict=True)])
    assert seen[:, 0] == pytest.approx(logit(true))
    assert seen[:, 1] == pytest.approx(np.log(true))
    assert seen[:, 2] == pytest.approx(entropy(probabilities, axis=1))
    assert np.exp(seen[:, 3:]) == pytest.approx(np.sort(wrong)[:, :-4:-1])


@pytest.mark.parametrize("gap", [1.0, 40.0, 1e4])
def test_confidence_keeps_its_digits_where_the_probability_rounds_to_one(gap: float) -> None:
    logits = np.array([[gap, 0.0, 0.0]])
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    certain, hopeless = signals(log_probabilities, np.array([0])), signals(log_probabilities, np.array([1]))
    assert certain[0, 0] == pytest.approx(gap - math.log(2), rel=1e-12)
    assert hopeless[0, 0] == pytest.approx(-gap - math.log1p(math.exp(-gap)), rel=1e-12)
    assert np.isfinite(certain).all()
    assert np.isfinite(hopeless).all()


# --- LiRA


def test_lira_is_the_log_likelihood_ratio_of_two_gaussians() -> None:
    # In: (1, 3) and (7, 5). Out: (0, 2) and (4, 4). Variances around the candidates' own means: (2 + 2) / 2 in,
    # (2 + 0) / 2 out. Candidate 0 at 2: log N(2; 2, 2) - log N(2; 1, 1) = -log(sqrt 2) + 1/2; candidate 1 at 5:
    # log N(5; 6, 2) - log N(5; 4, 1) = -log(sqrt 2) - 1/4 + 1/2.
    shadows = np.array([[1.0, 4.0], [0.0, 7.0], [3.0, 5.0], [2.0, 4.0]])
    included = np.array([[True, False], [False, True], [True, True], [False, False]])
    expected = np.array([0.5, 0.25]) - math.log(2) / 2
    assert lira(np.array([2.0, 5.0]), shadows, included) == pytest.approx(expected)
    shift = np.array([100.0, -3.0])  # how hard an image is says nothing of its membership
    assert lira(np.array([2.0, 5.0]) + shift, shadows + shift, included) == pytest.approx(expected)


def test_lira_has_a_variance_for_each_candidate_where_shadows_are_many() -> None:
    rng = np.random.default_rng(1)
    included = np.arange(2 * OWN_VARIANCE)[:, None] % 2 == np.zeros(3)
    shadows = rng.normal(size=included.shape) * [0.1, 1, 10] + included * [1, 1, 1]
    target = np.array([0.4, 0.4, 0.4])
    inside, outside = shadows[::2], shadows[1::2]
    by_hand = norm.logpdf(target, inside.mean(0), inside.std(0, ddof=1)) - norm.logpdf(
        target, outside.mean(0), outside.std(0, ddof=1)
    )
    assert lira(target, shadows, included) == pytest.approx(by_hand)
    few = lira(target, shadows[2:], included[2:])
    pooled = [math.sqrt(part[1:].var(0, ddof=1).mean()) for part in (inside, outside)]
    by_hand = norm.logpdf(target, inside[1:].mean(0), pooled[0]) - norm.logpdf(target, outside[1:].mean(0), pooled[1])
    assert few == pytest.approx(by_hand)


def test_lira_needs_shadows_with_and_without_each_candidate() -> None:
    included = np.array([[True, True], [False, True], [True, True], [False, True]])
    with pytest.raises(ValueError, match="candidate 1 has 0 shadows"):
        lira(np.zeros(2), np.zeros((4, 2)), included)
    with pytest.raises(ValueError, match="1 shadows with or without"):
        lira(np.zeros(2), np.zeros((2, 2)), np.array([[True, False], [False, True]]))


# --- the attack by shadow models


def test_the_shadow_attack_learns_each_class_by_itself() -> None:
    # Members of class 0 have higher confidences, those of class 1 lower ones; class 2 is too rare for its own model.
    rng = np.random.default_rng(1)
    labels = np.array([0] * 20 + [1] * 20 + [2])
    included = rng.permuted(np.arange(20)[:, None] % 2 == np.zeros(41), axis=0)
    direction = np.array([1, -1, 0])[labels]
    shadows = (direction * included + 0.5 * rng.normal(size=included.shape))[..., None]
    target = np.linspace(-1, 2, 41)[:, None]
    scores = shadow_attack(target, shadows, included, labels)
    assert (np.diff(scores[:20]) > 0).all()
    assert (np.diff(scores[20:40]) < 0).all()
    alone = shadow_attack(target, shadows, included, np.zeros(41, dtype=np.int64))
    assert scores[40] == alone[40]


def test_what_depends_on_client_and_class_alone_wins_nothing(make_subject: MakeSubject) -> None:
    subject = make_subject(images=96)
    chosen, rng = chosen_from(subject), np.random.default_rng(1)
    labels = subject.labels.numpy()[chosen.rows]
    included = rng.permuted(np.arange(10)[:, None] % 2 == np.zeros(len(labels)), axis=0)
    seen = rng.normal(size=(11, 3, 4, 2))[:, chosen.owner, labels]  # [S + 1, n, F]
    scores = shadow_attack(seen[0], seen[1:], included, labels)
    assert len(np.unique(scores.round(9))) > 4
    assert roc(scores.round(9), chosen.member).auc == 0.5


@pytest.mark.parametrize("alike", [False, True])
def test_where_nothing_is_learned_nothing_is_found(make_subject: MakeSubject, alike: bool) -> None:
    found = infer_membership(make_subject("zero-shot", images=200, alike=alike), 6)
    assert found.members == found.non_members > 60
    assert found.lira.auc == 0.5  # in and out are the same Gaussian
    assert found.rmia.auc == 0.5  # and all ratios are 1
    assert found.lira.epsilon == found.rmia.epsilon == 0
    assert found.shadow_attack.auc == (0.5 if alike else pytest.approx(0.5, abs=by_chance(found.members)))


@pytest.mark.slow
def test_where_noise_drowns_everything_nothing_is_found(make_subject: MakeSubject) -> None:
    noise = {"mechanism": "dp-sgd", "noise_multiplier": 1000.0, "simulation": True, "nonce": "a5" * 16}
    found = infer_membership(make_subject("local", QUICK, images=200, rounds=4, privacy=noise), 12)
    for attack in (found.lira, found.rmia, found.rmia_offline, found.shadow_attack):
        assert not attack.refuted
        assert attack.auc == pytest.approx(0.5, abs=by_chance(found.members))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "central"])
def test_what_was_learned_by_heart_is_found(
    make_subject: MakeSubject, model: PromptModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(model.encoder, "logit_scale", 30.0)
    stages = []
    clients, images = (8, 160) if name == "local" else (2, 40)
    subject = make_subject(name, OVERFIT, images=images, clients=clients, rounds=100)
    subject = replace(subject, progress=lambda stage, done, total, note="": stages.append((done, total)))
    found = infer_membership(subject, 12)
    assert stages == [(done, 12) for done in range(1, 13)]
    for attack in (found.lira, found.rmia, found.rmia_offline, found.shadow_attack):
        assert attack.auc > 0.7
        assert attack.auc_interval[0] > 0.5
    assert json.loads(json.dumps(found.as_dict()))["lira"]["auc"] == found.lira.auc


# --- figures


def test_scores_say_nothing_of_permuted_membership() -> None:
    rng = np.random.default_rng(1)
    member = np.arange(400) % 2 == 0
    scores = rng.normal(size=400) + 2 * member
    assert Attack.of(scores, member).auc_interval[0] > 0.8
    aucs = [Attack.of(scores, rng.permutation(member)).auc for _ in range(10)]
    assert aucs == pytest.approx([0.5] * 10, abs=by_chance(200))


def test_a_thinned_curve_is_part_of_the_curve() -> None:
    rng = np.random.default_rng(1)
    member = rng.random(5000) < 0.4
    scores = rng.normal(size=5000) + member
    attack, whole = Attack.of(scores, member), roc(scores, member)
    points = set(zip(whole.false_positive_rate.tolist(), whole.true_positive_rate.tolist(), strict=True))
    assert 100 < len(attack.curve) <= 200
    assert attack.curve[0] == (0.0, 0.0)
    assert attack.curve[-1] == (1.0, 1.0)
    assert set(attack.curve) <= points
    assert list(attack.curve) == sorted(attack.curve)
    for x in np.geomspace(1e-3, 1, 20):  # nowhere far from the curve, on an axis of magnitudes
        assert max(y for rate, y in attack.curve if rate <= x) >= whole.at(x / 1.05)
    assert [point.false_positive_rate for point in attack.found] == [0.001, 0.01]
    for point in attack.found:
        assert point.low <= point.true_positive_rate == whole.at(point.false_positive_rate) <= point.high
