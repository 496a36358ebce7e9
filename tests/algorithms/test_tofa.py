"""TOFA: its posterior and its predictions computed directly, its limits, and that one release makes it private."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from sordino.algorithms import settings_for, tofa
from sordino.algorithms.base import ClientData
from sordino.encoders.prompt_model import Prompt, PromptModel
from sordino.errors import ConfigError
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.privacy.statistics.estimates import ClassStatistics
from sordino.randomness import Streams
from sordino.runtime.facts import init_context
from sordino.runtime.local import LocalRuntime

NAMES = ("cat", "dog", "sunflower", "grand piano")
ROWS = [[0, 1, 4, 5, 9, 13, 17], [2, 3, 6, 8, 12], [7, 11, 15]]


@pytest.fixture
def statistics(table: tuple[Tensor, Tensor]) -> ClassStatistics:
    """Without noise, but for a class that nobody holds: of the last one everybody's images are taken away."""
    features, labels = table
    counts = torch.stack([labels[rows].bincount(minlength=4) for rows in ROWS]).double()
    counts[:, 3] = 0
    held = torch.tensor([row for rows in ROWS for row in rows])
    shared = torch.stack([features[held][labels[held] == label].mean(0) for label in range(4)])
    means = shared.expand(3, -1, -1).clone()
    for client, rows in enumerate(ROWS):
        for label in counts[client].nonzero().flatten().tolist():
            means[client, label] = features[rows][labels[rows] == label].mean(0)
    nothing, within = torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.004, dtype=torch.float64)
    principal = torch.zeros(2, features.shape[1], dtype=torch.float64)
    principal[0, 0], principal[1, 1:3] = 0.2, 0.1
    known = (counts > 0).double()
    return ClassStatistics(counts, nothing, known, means, 0 * counts, within, shared, principal, counts.sum(0))


def made(
    statistics: ClassStatistics, model: PromptModel, candidates: tuple[str, ...] = NAMES, **strengths: float
) -> tuple[PromptModel, Prompt]:
    settings, clients = settings_for("tofa", {"tofa": strengths}), len(statistics.counts)
    known = replace(model, classes=model.encoder.class_tokens(NAMES))
    init = init_context(known, Streams(0, 0, range(clients), torch.device("cpu")))
    one = torch.ones(clients, dtype=torch.int64)
    data = ClientData(torch.zeros(1, 1), one[:1], one[:, None], one, one.float(), statistics=statistics)
    state = tofa.client_init(settings, init, data)
    prompt = tofa.prompt(tofa.Broadcast(), state)
    return tofa.Model.of(settings, model.encoder, model.encoder.class_tokens(candidates)), prompt


def text(model: PromptModel, names: tuple[str, ...] = NAMES) -> np.ndarray:
    encoder = model.encoder
    found: np.ndarray = encoder.text_features(encoder.embed("a photo of a"), encoder.class_tokens(names)).numpy()
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("principal", [True, False])
def test_predictions_are_those_of_the_posterior_by_scipy(
    principal: bool, statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    """Prototypes by their formulas, normal densities with the whole covariance, and the fusion, client by client."""
    if not principal:
        statistics = replace(statistics, principal=None)
    strengths = {"text_strength": 2.0, "shared_strength": 3.0, "covariance_strength": 5.0}
    own, prompt = made(statistics, model, **strengths)
    found = own.predict(prompt, table[0][:9])
    assert statistics.shared is not None
    assert statistics.shared_counts is not None
    hand_written, images = text(model), table[0][:9].numpy()
    shared, totals = statistics.shared.numpy(), statistics.shared_counts.numpy()
    gap = np.average(shared, axis=0, weights=totals) - np.average(hand_written, axis=0, weights=totals)
    width, everyone = images.shape[1], totals.sum()
    for client in range(3):
        within = 0.004 * np.eye(width)
        if statistics.principal is not None:
            within = within + sum(np.outer(row, row) for row in statistics.principal.numpy())
        covariance = (5.0 * np.eye(width) / width + everyone * within) / (5.0 + everyone)
        densities = []
        for label in range(4):
            prior = hand_written[label] + gap
            together = (2.0 * prior + totals[label] * shared[label]) / (2.0 + totals[label])
            count, mean = float(statistics.counts[client, label]), statistics.means[client, label].numpy()
            prototype = (3.0 * together + count * mean) / (3.0 + count)
            densities.append(multivariate_normal(prototype, covariance).logpdf(images))
        by_image, by_text = softmax(np.stack(densities, axis=-1)), softmax(10.0 * images @ hand_written.T)
        sure = [1 + (each * np.log(each)).sum(-1) / np.log(4) for each in (by_image, by_text)]
        weight = (sure[0] / (sure[0] + sure[1]))[:, None]
        fused = weight * by_image + (1 - weight) * by_text
        np.testing.assert_allclose(found[client].exp().numpy(), fused, rtol=1e-7, atol=1e-10)


def test_a_class_that_nobody_holds_has_its_text_as_prototype(statistics: ClassStatistics, model: PromptModel) -> None:
    own, prompt = made(statistics, model)
    features = own.class_features(prompt)
    moved = (features[:, 1, 3] - features[:, 0, 3]).numpy()
    assert statistics.shared is not None
    assert statistics.shared_counts is not None
    gap = np.average(statistics.shared.numpy() - text(model), axis=0, weights=statistics.shared_counts.numpy())
    np.testing.assert_allclose(moved, np.stack([gap] * 3), rtol=0, atol=1e-12)


def test_without_any_statistics_it_is_zero_shot(
    statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    """Where candidates are all new, and where counts are zero."""
    new = ("tree", "boat")
    own, prompt = made(statistics, model, candidates=new)
    expected = torch.from_numpy(10.0 * table[0].numpy() @ text(model, new).T).log_softmax(-1)
    torch.testing.assert_close(own.predict(prompt, table[0]), expected.expand(3, -1, -1), rtol=0, atol=1e-12)
    empty = replace(statistics, counts=0 * statistics.counts, shared_counts=torch.zeros(4, dtype=torch.float64))
    own, prompt = made(empty, model)
    expected = torch.from_numpy(10.0 * table[0].numpy() @ text(model).T).log_softmax(-1)
    torch.testing.assert_close(own.predict(prompt, table[0]), expected.expand(3, -1, -1), rtol=0, atol=1e-12)


def test_strengths_draw_prototypes_to_where_they_say(statistics: ClassStatistics, model: PromptModel) -> None:
    """To the client's means without any, to the shared means where those are strong, to the text where it is."""
    held = statistics.counts > 0
    free = made(statistics, model, text_strength=1e-12, shared_strength=1e-12)
    found = free[0].class_features(free[1])[:, 1]
    torch.testing.assert_close(found[held], statistics.means[held], rtol=0, atol=1e-9)
    assert statistics.shared is not None
    alike = made(statistics, model, text_strength=1e-12, shared_strength=1e12)
    found = alike[0].class_features(alike[1])[:, 1, :3]
    torch.testing.assert_close(found, statistics.shared[:3].expand(3, -1, -1), rtol=0, atol=1e-9)
    wordy = made(statistics, model, text_strength=1e12, shared_strength=1e12)
    features = wordy[0].class_features(wordy[1])
    moved = features[:, 1] - features[:, 0]
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-9)


def test_a_run_without_noise_knows_its_images(
    make_runtime: Callable[..., LocalRuntime], table: tuple[Tensor, Tensor]
) -> None:
    """The runtime's own statistics, counts of all clients among them; no rounds."""
    runtime = make_runtime("tofa", ROWS)
    assert runtime.rounds == 0
    training, _ = runtime.release(runtime.start())
    prompt = runtime.prompts(training)
    assert (prompt["shared_counts"] > 0).all()
    guesses = runtime.model.predict(prompt, table[0]).argmax(-1)
    for client, rows in enumerate(ROWS):
        assert (guesses[client][rows] == table[1][rows]).all()


def test_one_release_makes_it_private(config_file: Path, tmp_path: Path) -> None:
    noised = ["algorithm=tofa", "privacy.mechanism=statistics", "privacy.epsilon=8.0", "privacy.delta=0.01"]
    summary = run(load_config(config_file, noised), tmp_path / "noised")
    assert summary.privacy.private
    assert summary.privacy.epsilon == pytest.approx(8.0, rel=1e-2)
    plain = run(load_config(config_file, ["algorithm=tofa"]), tmp_path / "plain").privacy
    assert not plain.private
    assert "to the server once" in plain.statement
    with pytest.raises(ConfigError, match=r"works on class statistics; use 'statistics' or 'none'"):
        run(load_config(config_file, [*noised, "privacy.mechanism=dp-sgd"]), tmp_path / "refused")


@pytest.mark.parametrize("key", ["text_strength", "shared_strength", "covariance_strength"])
def test_bad_settings_are_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings.tofa.{key} = "):
        settings_for("tofa", {"tofa": {key: 0.0}})
