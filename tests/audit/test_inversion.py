from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.states import started_in_double, with_states
from sordino.algorithms.base import map_tensors
from sordino.audit import inversion, tower_map
from sordino.audit.inversion import class_references, invert, observe, rank_one
from sordino.audit.subject import Subject
from sordino.audit.tower_map import Ridge, TowerMap
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.gradients import Batch, ExactGradients
from sordino.runtime.local import LocalRuntime, Training
from sordino.tasks.splits import Task

MakeRuntime = Callable[..., LocalRuntime]
Table = tuple[Tensor, Tensor]

ROWS = [list(range(0, 12)), list(range(12, 24)), list(range(24, 32))]
TEST = np.arange(32, 40)
ONE_STEP = {
    "context_length": 4,
    "rank": 2,
    "local_steps": 1,
    "optimizer": {"learning_rate": 0.1},
    "local_learning_rate": 0.1,
}
NOISE = {"mechanism": "dp-sgd", "clip": 0.1, "simulation": True, "nonce": "a5" * 16}


def subject_of(runtime: LocalRuntime, table: Table, rounds: int = 2) -> Subject:
    """A run in float64, trained for a few rounds."""
    training = started_in_double(runtime)
    for _ in range(rounds):
        training, _ = runtime.round(training)
    labels = table[1].numpy()
    task = Task(
        class_names=runtime.model.classes.names,
        novel_names=(),
        labels=labels,
        train=tuple(np.array(rows) for rows in ROWS),
        test=TEST,
        local=np.full((len(ROWS), len(TEST)), 1 / len(TEST)),
        neighbor=np.zeros((len(ROWS), len(TEST))),
        novel=TEST[:0],
        domain=TEST[:0],
        client_classes=(),
        client_domains=(),
    )
    config: Any = None  # no attack of these reads it
    return Subject(config, runtime, training, training.ledger, task, *table)


@pytest.fixture
def make_subject(make_runtime: MakeRuntime, table: Table) -> Callable[..., Subject]:
    def make(name: str, tables: dict[str, object] | None = None, **options: Any) -> Subject:
        return subject_of(make_runtime(name, ROWS, ONE_STEP | (tables or {}), **options), table)

    return make


MakeSubject = Callable[..., Subject]


@pytest.fixture(scope="module")
def context(model: PromptModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.02 * torch.randn(4, model.encoder.context_width, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def tower(model: PromptModel, context: Tensor) -> TowerMap:
    return TowerMap.of(model, context)


def true_cotangent(model: PromptModel, context: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """S [C, D], from its definition."""
    logits = model.logits(model.text_features(context)[None], features)[0]
    errors = logits.softmax(-1) - F.one_hot(labels, len(model.classes))
    return model.encoder.logit_scale * errors.T @ features / len(labels)


def exact_gradient(gradients: ExactGradients, context: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    batch = Batch(features[None], labels[None], torch.ones(1, len(labels), dtype=torch.bool))
    return gradients(lambda by: by["x"], {"x": context[None]}, {}, batch).values["x"][0].flatten()


# --- the linear map, and its solution


def test_the_gradient_is_the_map_of_the_cotangent(
    model: PromptModel, context: Tensor, tower: TowerMap, table: Table, gradients: ExactGradients
) -> None:
    features, labels = table[0][:7], table[1][:7]
    expected = exact_gradient(gradients, context, features, labels)
    made = tower.forward(true_cotangent(model, context, features, labels).flatten())
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-12)


def test_s_is_recovered_but_for_the_null_space(
    model: PromptModel, context: Tensor, tower: TowerMap, table: Table, gradients: ExactGradients
) -> None:
    """What is never seen of row c is its part along the unit-norm feature of class c, and only that."""
    features, labels = table[0][:7], table[1][:7]
    gradient = exact_gradient(gradients, context, features, labels)
    found = tower.solve(gradient)
    torch.testing.assert_close(tower.forward(found), gradient, rtol=0, atol=1e-6 * float(gradient.norm()))
    true, text = true_cotangent(model, context, features, labels), model.text_features(context)
    seen = true - (true * text).sum(-1, keepdim=True) * text
    torch.testing.assert_close(found.view_as(seen), seen, rtol=0, atol=1e-3 * float(seen.norm()))
    assert float(tower.forward((true - seen).flatten()).norm()) < 1e-10


def test_products_with_the_jacobian_are_the_matrix(
    model: PromptModel, context: Tensor, tower: TowerMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower_map, "DENSE_ENTRIES", 0)
    products = TowerMap.of(model, context)
    assert products.matrix is None
    assert tower.matrix is not None
    generator = torch.Generator().manual_seed(4)
    s = torch.randn(tower.matrix.shape[1], generator=generator, dtype=torch.float64)
    u = torch.randn(tower.matrix.shape[0], generator=generator, dtype=torch.float64)
    e, x = s[: len(model.classes)], s[-model.encoder.feature_width :]
    for one, other in (
        (products, tower),
        (products.given_errors(e), tower.given_errors(e)),
        (products.given_feature(x), tower.given_feature(x)),
    ):
        assert other.matrix is not None
        v = s[: other.matrix.shape[1]]
        for forward in (one.forward, other.forward):
            torch.testing.assert_close(forward(v), other.matrix @ v, rtol=1e-8, atol=1e-10)
        for adjoint in (one.adjoint, other.adjoint):
            torch.testing.assert_close(adjoint(u), other.matrix.T @ u, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(40, 15), (15, 40)])
def test_the_ridge_of_largest_evidence_is_near_the_best(shape: tuple[int, int]) -> None:
    """With unknowns of variance 1 and noise of variance v the best ridge is v; it need not be told."""
    generator = torch.Generator().manual_seed(5)
    own, best = [], []
    for _ in range(30):
        matrix = torch.randn(*shape, generator=generator, dtype=torch.float64)
        matrix = matrix * torch.logspace(0, -2, shape[1], dtype=torch.float64)
        truth = torch.randn(shape[1], generator=generator, dtype=torch.float64)
        observed = matrix @ truth + 0.3 * torch.randn(shape[0], generator=generator, dtype=torch.float64)
        eye = torch.eye(shape[1], dtype=torch.float64)
        optimum = torch.linalg.solve(matrix.T @ matrix + 0.09 * eye, matrix.T @ observed)
        own.append(float((Ridge.of(matrix).solve(observed) - truth).square().sum()))
        best.append(float((optimum - truth).square().sum()))
    assert sum(own) < 1.2 * sum(best)


def test_an_exact_system_is_solved_exactly() -> None:
    generator = torch.Generator().manual_seed(6)
    matrix = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    truth = torch.randn(12, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(Ridge.of(matrix).solve(matrix @ truth), truth, rtol=1e-9, atol=1e-10)
    wide = Ridge.of(matrix.T).solve(matrix.T @ torch.ones(30, dtype=torch.float64))
    expected = torch.linalg.pinv(matrix.T) @ matrix.T @ torch.ones(30, dtype=torch.float64)
    torch.testing.assert_close(wide, expected, rtol=1e-9, atol=1e-10)
    assert not Ridge.of(matrix).solve(torch.zeros(30, dtype=torch.float64)).any()


# --- what is read off


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False])
def test_a_batch_of_one_gives_its_feature_and_label(
    dense: bool,
    model: PromptModel,
    context: Tensor,
    table: Table,
    gradients: ExactGradients,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not dense:
        monkeypatch.setattr(tower_map, "DENSE_ENTRIES", 0)
        monkeypatch.setattr(inversion, "REFINEMENTS", 1)
    tower = TowerMap.of(model, context)
    references = torch.stack([table[0][32:][table[1][32:] == label].mean(0) for label in range(4)])
    for row in range(8 if dense else 1):
        gradient = exact_gradient(gradients, context, table[0][[row]], table[1][[row]])
        first = tower.solve(gradient).view(tower.classes, -1)
        feature, label = rank_one(tower, gradient, first, references)
        assert label == int(table[1][row])
        cosine = float(feature @ table[0][row])
        assert cosine > (0.99 if dense else 0.7)


@pytest.mark.parametrize("name", ["dp-fpl", "promptfl"])
def test_without_noise_images_are_named(name: str, make_subject: MakeSubject) -> None:
    found = invert(make_subject(name, {"batch_size": 2}), seed=1, batches=6)
    assert found.reason is None
    assert found.gallery == 40
    one, two = found.attacks
    assert (one.size, one.batches, two.size, two.batches) == (1, 6, 2, 6)
    assert (one.labels_found, one.labels_right, one.reidentified) == (1.0, 1.0, 1.0)
    assert one.labels_chance == 0.25
    assert one.cosine > 0.99
    assert two.labels_found == 1.0  # not all that is named is right where both examples have one label
    assert two.labels_right > 2 * two.labels_found * 0.25
    assert two.cosine > 0.8


def test_two_labels_in_a_batch_are_both_named(
    tower: TowerMap, context: Tensor, table: Table, gradients: ExactGradients, make_subject: MakeSubject
) -> None:
    references = class_references(make_subject("dp-fpl"))
    for first in range(4):
        for second in range(first + 1, 4):
            rows = [first, 4 + second]
            gradient = exact_gradient(gradients, context, table[0][rows], table[1][rows])
            score = -(tower.solve(gradient).view(4, -1) * references).sum(-1)
            assert set(score.argsort(descending=True)[:2].tolist()) == {first, second}


@pytest.mark.slow
def test_clipping_alone_protects_nothing_and_strong_noise_does(make_subject: MakeSubject) -> None:
    clipped = invert(make_subject("dp-fpl", privacy=NOISE | {"noise_multiplier": 0.0}), seed=1, batches=6).attacks[0]
    assert clipped.cosine > 0.99
    assert clipped.labels_found == 1.0
    noised = invert(make_subject("dp-fpl", privacy=NOISE | {"noise_multiplier": 30.0}), seed=1, batches=30).attacks[0]
    # A random unit vector in 24 dimensions has a cosine of deviation 1 / sqrt(24) with any other; 30 are averaged.
    # That its sign is chosen by class references lifts the mean to that of |cos|, about 0.16, at most.
    assert abs(noised.cosine) < 0.16 + 4 / (24 * 30) ** 0.5
    assert noised.reidentified < 0.3


def test_a_trusted_server_sees_through_its_own_noise(make_subject: MakeSubject) -> None:
    """It adds the noise to the mean; single uploads reach it as they are."""
    by_server = NOISE | {"noise_multiplier": 30.0, "noise_by": "server"}
    found = invert(make_subject("dp-fpl", privacy=by_server), seed=1, batches=6, knows="prompt").attacks[0]
    assert found.cosine > 0.9  # with noise on uploads it is below 0.5
    assert found.reidentified == 1.0


def test_noise_on_uploads_counts(make_subject: MakeSubject) -> None:
    repeated = {"simulation": True, "nonce": "a5" * 16}
    fedavg = {"mechanism": "dp-fedavg", "clip": 0.1, "noise_multiplier": 30.0} | repeated
    noised = make_subject("promptfl", privacy=fedavg, weighting="uniform")
    plain = make_subject("promptfl", privacy=fedavg | {"noise_multiplier": 0.0}, weighting="uniform")
    assert invert(plain, seed=1, batches=3).attacks[0].cosine > 0.99
    assert invert(noised, seed=1, batches=12).attacks[0].cosine < 0.5


def test_observed_batches_are_the_clients_own(make_subject: MakeSubject, table: Table) -> None:
    subject = make_subject("dp-fpl")
    gradients, features, labels = observe(subject.runtime, subject.training, 3, seed=2)
    assert gradients.shape == (3, 4, subject.runtime.model.encoder.context_width)
    for client, rows in enumerate(ROWS):
        mine = table[0][rows]
        places = [int((mine == feature).all(-1).nonzero()) for feature in features[client]]
        assert len(set(places)) == 3
        assert table[1][rows][places].tolist() == labels[client].tolist()


def test_not_knowing_the_prompt_costs_little_at_first(make_subject: MakeSubject) -> None:
    subject = make_subject("dp-fpl")
    broadcast = invert(subject, seed=1, batches=6, knows="broadcast")
    assert broadcast.knows == "broadcast"
    assert broadcast.attacks[0].labels_found >= 0.5
    start = replace(subject, training=with_states(subject.training, clients=doubled_start(subject.runtime)))
    assert invert(start, seed=1, batches=6, knows="broadcast").attacks[0].cosine > 0.99


def doubled_start(runtime: LocalRuntime) -> Any:
    first: Training = runtime.start()
    return map_tensors(first.clients, lambda _, t: t.double())


@pytest.mark.parametrize(
    ("name", "tables", "reason"),
    [
        ("local", {}, "nothing that was learned leaves"),
        ("central", {}, "no upload"),
        ("promptfl", {"local_steps": 2}, "several steps"),
        ("promptfl", {"optimizer": {"name": "adam"}}, "Adam"),
    ],
)
def test_where_it_does_not_apply_it_says_why(
    name: str, tables: dict[str, object], reason: str, make_subject: MakeSubject
) -> None:
    found = invert(make_subject(name, tables), seed=1)
    assert found.reason is not None
    assert reason in found.reason
    assert found.as_dict()["attacks"] == ()
