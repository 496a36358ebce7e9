"""Methods on class statistics: identities that tie them to zero-shot and to each other, and an oracle for each part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import ClientData, model_class
from sordino.encoders import load_encoder
from sordino.encoders.prompt_model import Prompt, PromptModel, map_prompt, named_parts, prompt_count
from sordino.errors import ConfigError
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.privacy.statistics.estimates import ClassStatistics
from sordino.prompt_file import EncoderRecord, PrivacyRecord, SavedPrompt
from sordino.prompts.by_class import class_numbers
from sordino.randomness import Streams
from sordino.runtime.facts import init_context
from sordino.runtime.local import LocalRuntime

METHODS = ("class-prior", "head", "dp-residual")
NAMES = ("cat", "dog", "sunflower", "grand piano")
# 40 images, four classes in turn: clients with two classes, three, and one.
ROWS = [[0, 1, 4, 5, 9, 13, 17], [2, 3, 6, 8, 12], [7, 11, 15]]
# How far two ways to the same logits may differ: 10 times a cosine, in float64.
ROUNDING = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture
def statistics(table: tuple[Tensor, Tensor]) -> ClassStatistics:
    """Without noise: a client's class means are those of its images; of a class that it lacks, those of all clients."""
    features, labels = table
    counts = torch.stack([labels[rows].bincount(minlength=4) for rows in ROWS]).double()
    held = torch.tensor(sorted(row for rows in ROWS for row in rows))
    shared = torch.stack([features[held][labels[held] == label].mean(0) for label in range(4)])
    means = shared.expand(3, -1, -1).clone()
    for client, rows in enumerate(ROWS):
        for label in labels[rows].unique().tolist():
            means[client, label] = features[rows][labels[rows] == label].mean(0)
    nothing = torch.zeros(3, dtype=torch.float64)
    return ClassStatistics(counts, nothing, (counts > 0).double(), means, 0 * counts, nothing, shared)


def made(
    name: str,
    settings: dict[str, Any],
    statistics: ClassStatistics,
    model: PromptModel,
    trained: Sequence[str] = NAMES,
    candidates: Sequence[str] = NAMES,
) -> tuple[PromptModel, Prompt]:
    """Return a method's model of `candidates`, and the prompt that it makes of statistics of the `trained` classes."""
    method, chosen = algorithm(name), settings_for(name, {name: settings})
    clients = len(statistics.counts)
    known = replace(model, classes=model.encoder.class_tokens(trained))
    init = init_context(known, Streams(0, 0, range(clients), torch.device("cpu")))
    one = torch.ones(clients, dtype=torch.int64)
    data = ClientData(torch.zeros(1, 1), one[:1], one[:, None], one, one.float(), statistics=statistics)
    state = method.client_init(chosen, init, data)
    prompt = method.prompt(method.broadcast(method.server_init(chosen, init)), state)
    return model_class(method).of(chosen, model.encoder, model.encoder.class_tokens(candidates)), prompt


def logits(
    name: str,
    settings: dict[str, Any],
    statistics: ClassStatistics,
    model: PromptModel,
    images: Tensor,
    trained: Sequence[str] = NAMES,
    candidates: Sequence[str] = NAMES,
) -> Tensor:
    """Return each client's logits [K, B, C]."""
    own, prompt = made(name, settings, statistics, model, trained, candidates)
    found = own.predict(prompt, images)
    return found.expand(len(statistics.counts), -1, -1)


def text(model: PromptModel, names: Sequence[str] = NAMES) -> Tensor:
    """Return the text features [C, D] of the hand-written prompt."""
    encoder = model.encoder
    return encoder.text_features(encoder.embed("a photo of a"), encoder.class_tokens(names))


def zero_shot(model: PromptModel, images: Tensor, names: Sequence[str] = NAMES) -> Tensor:
    """Return logits [B, C]."""
    return model.encoder.logit_scale * images @ text(model, names).mT


@pytest.mark.parametrize(
    ("name", "settings"), [("class-prior", {"prior": 0.0}), ("dp-residual", {"residual": 0.0, "prior": 0.0})]
)
def test_without_residual_and_prior_it_is_zero_shot(
    name: str,
    settings: dict[str, Any],
    statistics: ClassStatistics,
    model: PromptModel,
    table: tuple[Tensor, Tensor],
) -> None:
    found = logits(name, settings, statistics, model, table[0])
    torch.testing.assert_close(found, zero_shot(model, table[0]).expand(3, -1, -1), **ROUNDING)


def test_without_residual_it_is_the_class_prior(
    statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    found = logits("dp-residual", {"residual": 0.0, "prior": 0.7}, statistics, model, table[0])
    expected = logits("class-prior", {"prior": 0.7}, statistics, model, table[0])
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert (found - zero_shot(model, table[0])).abs().amax() > 0.1, "the prior matters"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [0.07, 0.0])
def test_where_noise_hides_everything_it_is_zero_shot(
    name: str, length: float, statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    """Then expected means are the text features at some length, and expected counts 0. Means of 0 tell nothing."""
    shared = length * text(model)
    hidden = replace(
        statistics,
        counts=torch.zeros(3, 4, dtype=torch.float64),
        count_deviation=torch.full((3,), 50.0, dtype=torch.float64),
        means=shared.expand(3, -1, -1),
        shared=shared,
    )
    found = logits(name, {}, hidden, model, table[0])
    torch.testing.assert_close(found, zero_shot(model, table[0]).expand(3, -1, -1), **ROUNDING)


def test_head_is_the_nearest_class_mean(
    statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    own, prompt = made("head", {}, statistics, model)
    assert prompt_count(prompt) == 1, "all clients share it"
    assert statistics.shared is not None
    means = statistics.shared.numpy()
    cosines = table[0].numpy() @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    torch.testing.assert_close(own.predict(prompt, table[0])[0], 10.0 * torch.from_numpy(cosines), **ROUNDING)


def test_the_residual_at_full_strength_is_head_with_the_clients_own_means(
    statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    assert statistics.shared is not None
    alike = replace(statistics, means=statistics.shared.expand(3, -1, -1))
    found = logits("dp-residual", {"residual": 1.0, "prior": 0.0}, alike, model, table[0])
    torch.testing.assert_close(found, logits("head", {}, statistics, model, table[0]), **ROUNDING)
    own = logits("dp-residual", {"residual": 1.0, "prior": 0.0}, statistics, model, table[0])
    expected = 10.0 * table[0] @ F.normalize(statistics.means[1], dim=-1).mT
    torch.testing.assert_close(own[1], expected, **ROUNDING)
    assert (own[0] - own[1]).abs().amax() > 0.1, "clients differ"


@pytest.mark.parametrize("strength", [0.3, 1.0, 1.5])
def test_logits_are_those_of_the_formula(
    strength: float, statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    """By numpy, client by client and class by class."""
    noised = replace(statistics, count_deviation=torch.tensor([0.0, 0.5, 2.5], dtype=torch.float64))
    found = logits("dp-residual", {"residual": strength, "prior": 0.8}, noised, model, table[0]).numpy()
    hand_written, images = text(model).numpy(), table[0].numpy()
    for client, kappa in enumerate([1.0, 1.0, 2.5]):
        for label in range(4):
            mean = statistics.means[client, label].numpy()
            residual = mean / np.linalg.norm(mean) - hand_written[label]
            feature = hand_written[label] + strength * residual
            feature /= np.linalg.norm(feature)
            prior = 0.8 * math.log((float(statistics.counts[client, label]) + kappa) / kappa)
            np.testing.assert_allclose(found[client, :, label], 10.0 * images @ feature + prior, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_the_linear_part_is_all_but_a_term_without_image_and_features(
    name: str, statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    own, prompt = made(name, {}, statistics, model)
    assert type(own).linear
    features = own.class_features(prompt)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones_like(features[..., 0]), **ROUNDING)
    images = table[0].expand(len(features), -1, -1)
    rest = own.scores(features, prompt, images) - 10.0 * images @ own.linear_part(features).mT
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest), **ROUNDING)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_classes_does_not_matter(
    name: str, statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    """Whether the statistics, the candidates or both come in another order."""
    order = [2, 0, 3, 1]
    names = [NAMES[label] for label in order]
    assert statistics.shared is not None
    shuffled = replace(
        statistics,
        counts=statistics.counts[:, order],
        means=statistics.means[:, order],
        shared=statistics.shared[order],
    )
    expected = logits(name, {}, statistics, model, table[0])
    both = logits(name, {}, shuffled, model, table[0], trained=names, candidates=names)
    torch.testing.assert_close(both, expected[..., order], **ROUNDING)
    trained_only = logits(name, {}, shuffled, model, table[0], trained=names)
    torch.testing.assert_close(trained_only, expected, **ROUNDING)


@pytest.mark.parametrize("name", METHODS)
def test_candidates_without_statistics_have_plain_text_features_and_no_prior(
    name: str, statistics: ClassStatistics, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    novel = logits(name, {}, statistics, model, table[0], candidates=["tree", "boat"])
    expected = zero_shot(model, table[0], ["tree", "boat"])
    torch.testing.assert_close(novel, expected.expand(3, -1, -1), **ROUNDING)
    mixed = logits(name, {}, statistics, model, table[0], candidates=["tree", "dog", "boat"])
    torch.testing.assert_close(mixed[..., [0, 2]], expected.expand(3, -1, -1), **ROUNDING)
    own = logits(name, {}, statistics, model, table[0])[..., 1]
    torch.testing.assert_close(mixed[..., 1], own, **ROUNDING)


def test_a_clients_prior_depends_on_its_own_counts_alone(statistics: ClassStatistics, model: PromptModel) -> None:
    assert statistics.shared is not None
    noise = torch.Generator().manual_seed(0)
    counts = statistics.counts + torch.tensor([[0.0], [5.0], [9.0]], dtype=torch.float64)
    means = torch.randn(statistics.means.shape, generator=noise, dtype=torch.float64)
    others = replace(statistics, counts=counts, means=means, shared=means[0])
    for name in ("class-prior", "dp-residual"):
        prior = named_parts(made(name, {}, statistics, model)[1])["prior"]
        changed = named_parts(made(name, {}, others, model)[1])["prior"]
        assert prior[0].equal(changed[0])
        assert not prior[1].equal(changed[1])


def test_the_prior_is_zero_without_images_and_grows_with_them(statistics: ClassStatistics, model: PromptModel) -> None:
    counts = torch.tensor([[0.0, 1.0, 20.0, 20.0]], dtype=torch.float64)
    prior = {}
    for deviation in (0.0, 1.0, 4.0, 100.0):
        noise = torch.tensor([deviation], dtype=torch.float64)
        one = replace(statistics, counts=counts, count_deviation=noise, means=statistics.means[:1])
        prior[deviation] = named_parts(made("class-prior", {}, one, model)[1])["prior"][0]
        assert prior[deviation][0] == 0
        assert prior[deviation][2] == prior[deviation][3] > prior[deviation][1] > 0
    assert prior[0.0].equal(prior[1.0])
    assert prior[1.0][2] > prior[4.0][2] > prior[100.0][2]
    assert prior[100.0][2] < 0.2, "where noise is larger than the count, the prior is small"


@pytest.mark.parametrize("name", METHODS)
def test_a_stack_of_clients_equals_each_client_alone(
    name: str, statistics: ClassStatistics, model: PromptModel
) -> None:
    together = named_parts(made(name, {}, statistics, model)[1])
    for client in range(3):
        chosen = slice(client, client + 1)
        one = replace(
            statistics,
            counts=statistics.counts[chosen],
            count_deviation=statistics.count_deviation[chosen],
            means=statistics.means[chosen],
        )
        alone = named_parts(made(name, {}, one, model)[1])
        for part, tensor in alone.items():
            assert tensor.equal(together[part][:1] if name == "head" else together[part][chosen])


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_file_serves_what_the_run_had(
    name: str, statistics: ClassStatistics, clip_folder: Path, table: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """And with other candidates; settings come from the file."""
    encoder = load_encoder("clip", str(clip_folder), "float32", torch.device("cpu"))
    model = PromptModel(encoder, encoder.class_tokens(NAMES))
    settings = {"prompt_text": "a drawing of a"} | ({"residual": 0.6} if name == "dp-residual" else {})
    own, stack = made(name, settings, statistics, model)
    client = prompt_count(stack) - 1
    saved = SavedPrompt(
        prompt=map_prompt(stack, lambda part: part[client]),
        method=name,
        settings=settings,
        class_names=NAMES,
        encoder=EncoderRecord(name="clip", fingerprint=encoder.fingerprint, checkpoint=str(clip_folder)),
        privacy=PrivacyRecord(private=False, simulated=False, statement="Not private.", ledger_sha256=None),
        version="0.1.0",
    )
    saved.save(tmp_path / "prompt.safetensors")
    loaded = SavedPrompt.load(tmp_path / "prompt.safetensors")
    images = table[0].float()
    expected = own.predict(stack, images)[client]
    torch.testing.assert_close(loaded.model().logits(images), expected, rtol=1e-6, atol=1e-5)
    fewer = replace(loaded, class_names=("grand piano", "tree", "cat")).model().logits(images)
    torch.testing.assert_close(fewer[:, [2, 0]], expected[:, [0, 3]], rtol=1e-6, atol=1e-5)
    drawing = encoder.text_features(encoder.embed("a drawing of a"), encoder.class_tokens(["tree"]))
    torch.testing.assert_close(fewer[:, 1:2], encoder.logit_scale * images @ drawing.mT, rtol=1e-5, atol=1e-4)


def test_without_noise_a_run_uses_exact_means_and_counts(
    make_runtime: Callable[..., LocalRuntime], statistics: ClassStatistics, table: tuple[Tensor, Tensor]
) -> None:
    """The runtime's own statistics: a client has the means of its images, and of absent classes those of all."""
    runtime = make_runtime("dp-residual", ROWS)
    assert runtime.rounds == 0
    training, _ = runtime.release(runtime.start())
    parts = named_parts(runtime.prompts(training))
    found = parts["directions"].double()
    expected = F.normalize(statistics.means, dim=-1)
    held = statistics.counts > 0
    torch.testing.assert_close(found[held], expected[held], rtol=0, atol=1e-5)  # messages are in float32
    torch.testing.assert_close(parts["prior"].double(), torch.log1p(statistics.counts), rtol=0, atol=1e-5)
    assert parts["classes"].equal(class_numbers(NAMES).expand(3, -1))
    guesses = runtime.model.predict(runtime.prompts(training), table[0]).argmax(-1)
    for client, rows in enumerate(ROWS):
        assert (guesses[client][rows] == table[1][rows]).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_run_says_what_left(name: str, config_file: Path, tmp_path: Path) -> None:
    """Without a mechanism all of it is named; with noise there is an epsilon; other mechanisms are refused."""
    plain = run(load_config(config_file, [f"algorithm={name}"]), tmp_path / "plain").privacy
    assert not plain.private
    assert ("to the server once" in plain.statement) == (name != "class-prior")
    noised = [f"algorithm={name}", "privacy.mechanism=statistics", "privacy.epsilon=8.0", "privacy.delta=0.01"]
    assert run(load_config(config_file, noised), tmp_path / "noised").privacy.epsilon == pytest.approx(8.0, rel=1e-2)
    refused = load_config(config_file, [f"algorithm={name}", "privacy.mechanism=dp-sgd", "privacy.epsilon=8.0"])
    with pytest.raises(ConfigError, match="privacy.mechanism = 'dp-sgd': this method works on class statistics"):
        run(refused, tmp_path / "refused")


@pytest.mark.parametrize("name", METHODS)
def test_statistics_that_are_missing_are_named(name: str, statistics: ClassStatistics, model: PromptModel) -> None:
    init = init_context(model, Streams(0, 0, [0], torch.device("cpu")))
    one = torch.ones(1, dtype=torch.int64)
    data = ClientData(torch.zeros(1, 1), one, one[:, None], one, one.float())
    with pytest.raises(ValueError, match="statistics"):
        algorithm(name).client_init(settings_for(name, {}), init, data)


@pytest.mark.parametrize("key", ["prior", "residual"])
@pytest.mark.parametrize("value", [-1.0, 101.0, math.inf, math.nan])
def test_weights_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"settings.dp-residual.{key}"):
        settings_for("dp-residual", {"dp-residual": {key: value}})
