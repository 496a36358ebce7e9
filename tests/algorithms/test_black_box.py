"""What makes each forward-only method what it is, and the method whose prompt comes from the input."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from torch import Tensor

from runtime.states import started_in_double
from sordino.algorithms import fed_bbpt, fedbpt, feddpg, feddtpt, feddtpt_votes
from sordino.algorithms.base import RoundContext, Uploads
from sordino.algorithms.cma_es import Rates, Roots, Search, ask, tell
from sordino.algorithms.settings.fedbpt import Settings as FedBpt
from sordino.algorithms.settings.feddtpt import Settings as FedDtpt
from sordino.algorithms.zeroth_order import both_sides, directions_of, estimate
from sordino.audit import inversion, rounds
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError, PromptError
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.experiments.use.predict import predict
from sordino.privacy.forward.losses import ExactLosses
from sordino.privacy.gradients import ExactGradients
from sordino.privacy.mechanism import plain_mean
from sordino.prompt_file import SavedPrompt
from sordino.prompts.words import Vocabulary
from sordino.randomness import Streams
from sordino.runtime.local import LocalRuntime
from sordino.serving.manifest import CARD
from sordino.serving.registry import Registry
from sordino.serving.sources import from_run

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
TABLES = {"context_length": 3, "local_steps": 4, "fedbpt": {"search_width": 6, "population": 8}}


def ellipsoid(points: Tensor) -> Tensor:
    return (points.square() * torch.arange(1, points.shape[-1] + 1) ** 2).sum(-1)


@pytest.mark.parametrize(("width", "population"), [(6, 9), (10, 8), (12, 20)])
def test_a_search_is_that_of_the_package_cma(width: int, population: int) -> None:
    """From the same candidates, generation after generation: mean, step size, covariance and both paths."""
    cma = pytest.importorskip("cma")
    options = {"popsize": population, "seed": 3, "verbose": -9, "CMA_mirrors": 0, "CMA_diagonal_decoding": 0}
    reference = cma.CMAEvolutionStrategy(
        width * [0.3], 0.7, options | {"AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA}
    )
    reference.sm.lazy_update_gap = 0
    rates = Rates.of(width, population)
    reference.adapt_sigma.initialize(reference)
    reference.adapt_sigma.damps = rates.damping  # the tutorial's; the package has another for large populations
    assert rates.weights == pytest.approx(list(reference.sp.weights))
    start = torch.full((1, width), 0.3, dtype=torch.float64)
    search = Search.at(start, torch.tensor([0.7], dtype=torch.float64), torch.tensor(reference.sm.C)[None])
    for _ in range(25):
        candidates = torch.tensor(np.array(reference.ask()))[None]
        losses = ellipsoid(candidates)
        reference.tell(list(candidates[0].numpy()), losses[0].tolist())
        search = tell(search, Roots.of(search.covariance), rates, candidates, losses)
        for found, expected in (
            (search.mean, reference.mean),
            (search.step, np.array(reference.sigma)),
            (search.covariance, reference.sm.C),
            (search.path, reference.pc),
            (search.step_path, reference.adapt_sigma.ps),
        ):
            torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-9, atol=1e-11)


def searched(losses: Callable[[Tensor], Tensor], scale: float = 1.0, generations: int = 60) -> Search:
    width, rates = 5, Rates.of(5, 10)
    generator = torch.Generator().manual_seed(0)
    start = scale * torch.ones(2, width, dtype=torch.float64)
    search = Search.at(start, torch.tensor([scale * 0.5] * 2), torch.eye(width)[None])
    for _ in range(generations):
        roots = Roots.of(search.covariance)
        candidates = ask(search, roots, torch.randn(2, 10, width, generator=generator))
        search = tell(search, roots, rates, candidates, losses(candidates))
    return search


def test_only_the_order_of_losses_matters() -> None:
    one, other = searched(ellipsoid), searched(lambda points: 7 + 3 * ellipsoid(points).log())
    for name, tensor in vars(one).items():
        assert tensor == vars(other)[name] if name == "generation" else torch.equal(tensor, vars(other)[name])


def test_a_larger_space_is_searched_alike_and_the_minimum_is_found() -> None:
    one, twice = searched(ellipsoid), searched(ellipsoid, scale=2.0)
    torch.testing.assert_close(twice.mean, 2 * one.mean, rtol=1e-6, atol=1e-12)
    assert ellipsoid(searched(ellipsoid, generations=150).mean).max() < 1e-8


def test_searches_side_by_side_do_not_meet() -> None:
    both = searched(lambda points: torch.stack([ellipsoid(points[0]), ellipsoid(points[1] - 1)]))
    alone = searched(ellipsoid)
    torch.testing.assert_close(both.mean[0], alone.mean[0], rtol=1e-9, atol=1e-12)
    assert (both.mean[1] - both.mean[0]).abs().max() > 0.1


# FedBPT.


def fedbpt_round(runtime: LocalRuntime):
    start = started_in_double(runtime)
    context = runtime.round_context(1)
    upload, _ = fedbpt.client_round(
        runtime.settings,
        fedbpt.broadcast(start.server),
        start.clients,
        runtime.data,
        ExactLosses(runtime.model),
        context,
    )
    return start, context, upload


def test_a_round_of_one_client_is_plain_cma_es_bit_for_bit(make_runtime: MakeRuntime) -> None:
    """On the loss of its data; the server then holds that search's mean."""
    tables = TABLES | {"fedbpt": {"search_width": 6, "population": 8, "masked_share": 0.0}}
    runtime = make_runtime("fedbpt", [list(range(40))], tables)
    start, context, upload = fedbpt_round(runtime)
    rates, exact = Rates.of(6, 8), ExactLosses(runtime.model)
    batch = next(iter(runtime.data.batches(1, None, context.streams)))
    zeros = torch.zeros(1, 6, dtype=torch.float64)
    search = Search.at(zeros, torch.ones(1), torch.eye(6)[None])
    spread = 0.0
    for number in range(4):
        roots = Roots.of(search.covariance)
        candidates = ask(search, roots, context.streams.normal(f"candidates {number}", 8, 6))
        losses = exact(fedbpt.Question(dict, relative=False), {"z": candidates}, {}, batch).losses[:, 0]
        spread += float(search.step) ** 2
        search = tell(search, roots, rates, candidates, losses)
    assert torch.equal(upload.mean, search.mean)
    assert float(upload.squared_steps) == pytest.approx(spread)
    server = fedbpt.server_round(runtime.settings, start.server, Uploads(upload, plain_mean), context)
    torch.testing.assert_close(server.mean, search.mean[0])


@pytest.mark.parametrize("far", [1.0, 60.0])
def test_the_server_steps_as_the_published_code_does(far: float) -> None:
    """Which asks the package `cma`: all means are parents, the step size is made of the clients', two in turn."""
    cma = pytest.importorskip("cma")
    width, clients, generator = 8, 4, torch.Generator().manual_seed(1)
    settings = FedBpt(search_width=width, population=5)
    options = {"popsize": clients, "CMA_mu": clients, "seed": 1, "verbose": -9, "CMA_diagonal_decoding": 0}
    reference = cma.CMAEvolutionStrategy(
        width * [0], 1.0, options | {"AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA, "CMA_mirrors": 0}
    )
    reference.sm.lazy_update_gap, local_step = 0, 1.0
    double = torch.float64
    server = fedbpt.Server(
        torch.zeros(width, dtype=double),
        torch.ones((), dtype=double),
        torch.tensor(reference.sm.C),
        torch.zeros(width, dtype=double),
        torch.zeros(width, dtype=double),
        torch.zeros((), dtype=torch.int64),
    )
    for _ in range(3):
        means = server.mean + far * torch.randn(clients, width, generator=generator, dtype=double)
        spreads = torch.rand(clients, generator=generator, dtype=double) + 1
        losses = torch.rand(clients, generator=generator, dtype=double)
        reference.sigma = before = math.sqrt(float(spreads.sum()) / clients / 2)  # two parents of five candidates
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference.ask()
            reference.tell(list(means.numpy()), losses.tolist())
        local_step *= reference.sigma / before
        upload = fedbpt.Upload(means, losses, spreads)
        server = fedbpt.server_round(settings, server, Uploads(upload, plain_mean), None)  # type: ignore[arg-type]
        torch.testing.assert_close(server.mean, torch.tensor(reference.mean), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(server.covariance, torch.tensor(reference.sm.C), rtol=1e-8, atol=1e-10)
        assert float(server.step) == pytest.approx(local_step, rel=1e-8)
    assert int(server.generation) == 3


def test_fitness_is_the_loss_over_the_loss_under_masked_inputs(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("fedbpt", ROWS, TABLES)
    _, context, upload = fedbpt_round(runtime)
    width = runtime.model.encoder.feature_width
    view = fedbpt.masked(0.5, width, context.streams)
    batch = next(iter(runtime.data.batches(1, None, context.streams)))
    hidden = view(batch.features)
    torch.testing.assert_close(hidden.norm(dim=-1), batch.features.norm(dim=-1))
    same = (hidden / hidden.norm(dim=-1, keepdim=True)).isclose(batch.features)
    assert not torch.equal(hidden[0, 0], hidden[1, 0])
    assert int(same.sum()) < same.numel() / 2  # norms are kept, so entries that stay are scaled
    exact, question = ExactLosses(runtime.model), fedbpt.Question(dict, relative=False)
    of_mean = {"z": upload.mean[:, None]}
    plain = exact(question, of_mean, {}, batch).losses[:, 0, 0]
    masked = exact(question, of_mean, {}, replace(batch, features=hidden)).losses[:, 0, 0]
    torch.testing.assert_close(upload.fitness, plain / masked)


def test_a_prompt_is_its_start_at_zero_and_moves_by_the_projection(make_runtime: MakeRuntime) -> None:
    model = make_runtime("fedbpt", ROWS, TABLES).model
    zero, one = torch.zeros(1, 6), torch.eye(6)[:1]
    assert torch.equal(model.context({"z": zero})[0], model.start)
    torch.testing.assert_close(model.context({"z": 2 * one})[0] - model.start, 2 * model.projection[0])


# Fed-BBPT.


def streams_of(clients: int, number: int = 1) -> RoundContext:
    return RoundContext(number, 9, Streams(0, number, range(clients), torch.device("cpu")))


def test_entries_of_directions_are_away_from_zero_and_symmetric() -> None:
    at = {"x": torch.zeros(2, 30, 50, dtype=torch.float64)}
    directions = directions_of(at, 4, streams_of(2), 0)["x"]
    assert directions.shape == (2, 4, 30, 50)
    assert 0.5 <= float(directions.abs().min()) < 0.51
    assert 0.99 < float(directions.abs().max()) <= 1.0
    assert abs(float(directions.sign().mean())) < 5 / math.sqrt(directions.numel())
    assert float(directions.abs().mean()) == pytest.approx(0.75, abs=0.01)
    alone = directions_of(
        {"x": at["x"][1:]}, 4, replace(streams_of(2), streams=Streams(0, 1, [1], torch.device("cpu"))), 0
    )
    assert torch.equal(alone["x"][0], directions[1])


def test_the_estimate_is_unbiased_for_a_linear_loss_however_far_it_looks() -> None:
    count, smoothing = 20000, 3.0
    point = {"x": torch.ones(1, 4, dtype=torch.float64)}
    slope = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    directions = directions_of(point, count, streams_of(1), 0)
    losses = both_sides(point, directions, smoothing)["x"] @ slope + 7
    found = estimate(losses, directions, smoothing)["x"][0]
    # An entry d_j / d_i with j other than i has variance E d^2 E d^-2 = 7 / 12 * 2.
    deviation = float(slope.norm()) * math.sqrt(7 / 6 / count)
    assert float((found - slope).abs().max()) < 5 * deviation


def test_the_estimate_is_the_directional_derivative_in_the_limit(make_runtime: MakeRuntime) -> None:
    """In one direction: its product with the direction is the derivative along it, for each of the entries."""
    runtime = make_runtime("fed-bbpt", ROWS, {"context_length": 3})
    start = started_in_double(runtime)
    point = {name: value[None] + 0.3 for name, value in start.server.generator.items()}  # type: ignore[attr-defined]
    batch = next(iter(runtime.data.batches(1, None, runtime.round_context(1).streams)))
    one = replace(batch, features=batch.features[:1], labels=batch.labels[:1], mask=batch.mask[:1])
    gradient = ExactGradients(runtime.model)(dict, point, {}, one).values
    errors = []
    for smoothing in (1e-3, 1e-4):
        directions = directions_of(point, 1, streams_of(1), 0)
        losses = ExactLosses(runtime.model)(
            fed_bbpt.Question(dict), both_sides(point, directions, smoothing), {}, one
        ).losses[:, 0]
        found = estimate(losses, directions, smoothing)
        entries = sum(value[0].numel() for value in point.values())
        along = sum(float((found[name] * directions[name][:, 0]).sum()) for name in point) / entries
        expected = sum(float((gradient[name] * directions[name][:, 0]).sum()) for name in point)
        errors.append(abs(along - expected))
    assert errors[1] < 1e-2 * abs(expected)
    assert errors[1] < errors[0] / 50  # two-sided: the error falls with the square


def test_a_generator_starts_at_the_words_and_all_of_it_moves(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("fed-bbpt", ROWS, {"context_length": 3, "local_steps": 2})
    start = started_in_double(runtime)
    assert torch.equal(runtime.model.context(runtime.prompts(start))[0], runtime.model.start)  # type: ignore[attr-defined]
    after, _ = runtime.round(start)
    for name, value in after.server.generator.items():  # type: ignore[attr-defined]
        moved = (value - start.server.generator[name]).norm()  # type: ignore[attr-defined]
        assert moved > 0, name


def test_hidden_units_of_a_new_generator_tell_positions_apart(make_runtime: MakeRuntime) -> None:
    """A step of the last layer moves the prompt by the products of hidden units: the metric between positions.

    With triggers near zero it is close to nothing; with triggers of one sign it is close to one number for all pairs,
    so that all positions move alike.
    """
    squares = []
    for seed in range(10):
        start = make_runtime("fed-bbpt", ROWS, {"context_length": 8}, seed=seed).start()
        generator = start.server.generator  # type: ignore[attr-defined]
        hidden = torch.tanh(generator["trigger"] @ generator["hidden"] + generator["bias"])
        products = hidden @ hidden.mT
        assert float(products.min()) < 0
        squares.append(float(products.diagonal().mean()))
    # Four units, each the tanh of a number of variance 1/3: about 4/3, less what tanh takes.
    assert 0.5 < sum(squares) / len(squares) < 4 / 3


def test_a_step_is_that_of_the_gradient_correction(make_runtime: MakeRuntime) -> None:
    """Where the two-sided difference is exact, which it is for a loss that is linear in the generator."""
    tables = {"context_length": 3, "local_steps": 2, "fed-bbpt": {"directions": 1}}
    runtime = make_runtime("fed-bbpt", [list(range(8))], tables)
    start, context, settings = started_in_double(runtime), runtime.round_context(3), runtime.settings
    asked = []

    def linear(question, candidates, fixed, batch):
        asked.append(candidates)
        sums = sum(value.flatten(2).sum(-1) for value in candidates.values())  # [K, 2]
        return replace(ExactLosses(runtime.model)(question, candidates, fixed, batch), values={"losses": sums[:, None]})

    upload, _ = fed_bbpt.client_round(
        settings, fed_bbpt.broadcast(start.server), start.clients, runtime.data, linear, context
    )
    position = {name: torch.zeros_like(value)[None] for name, value in start.server.generator.items()}  # type: ignore[attr-defined]
    moments = dict(position)
    for step in range(2):
        number = 2 * 2 + step + 1
        directions = directions_of(position, 1, context, step)
        slope = sum(float(value.sum()) for value in directions.values())
        rate = 0.1 / (number + 1) ** 0.4
        for name in position:
            gradient = slope / directions[name][:, 0]
            moments[name] = 0.9 * moments[name] + gradient
            position[name] = position[name] - rate * (gradient + 0.9 * moments[name])
    for name, value in position.items():
        torch.testing.assert_close(upload.change[name], value, rtol=1e-6, atol=1e-9)
    assert len(asked) == 2


# FedDTPT.

# Words in the plane: two groups of near ones, and one far from all.
PLANE = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-3.0, -3.0], [1.0, 0.05]], dtype=torch.float64)


def cosine(one: int, other: int) -> float:
    return float(torch.nn.functional.cosine_similarity(PLANE[one], PLANE[other], dim=0))


def test_attention_is_the_mean_cosine_to_others_tokens_and_softmax_within_a_client() -> None:
    words = torch.tensor([[0, 2], [1, 4], [3, 0]])
    found = feddtpt.attention(PLANE, words)
    for client in range(3):
        others = [int(word) for other in range(3) if other != client for word in words[other]]
        means = [sum(cosine(int(word), other) for other in others) / 4 for word in words[client]]
        expected = torch.tensor(means, dtype=torch.float64).softmax(0)
        torch.testing.assert_close(found[client], expected)
    torch.testing.assert_close(feddtpt.attention(PLANE, words[:1]), torch.full((1, 2), 0.5, dtype=torch.float64))


def test_tokens_fall_into_the_groups_that_they_were_made_in() -> None:
    points = PLANE[[0, 1, 5, 2, 3, 4]].numpy()
    assert feddtpt.clusters(points, 2) == [0, 0, 0, 1, 1, -1]
    distances = np.array([0.1, 0.1, 0.1, 0.12, 0.11, 5.0, 5.2])
    assert feddtpt.elbow(distances) == 0.12
    assert feddtpt.elbow(np.zeros(4)) == feddtpt.LEAST_REACH


def test_the_heaviest_token_of_each_cluster_stays_in_the_order_of_places() -> None:
    """Then the heaviest of the rest; the one far from all has most weight and comes last, as it is in no cluster."""

    def kept(length: int) -> list[int]:
        settings = FedDtpt(context_length=length)
        return feddtpt.kept_words(settings, PLANE, [0, 1, 5, 2, 3, 4], [2, 2, 2, 0, 1, 1], [1, 3, 2, 2, 1, 9])

    assert kept(2) == [2, 1]
    assert kept(1) == [1]
    assert kept(3) == [2, 4, 1]
    assert kept(4) == [2, 4, 1, 5]


def test_prompts_that_agree_stay_as_they_are() -> None:
    settings, context = FedDtpt(context_length=3), streams_of(4)
    server = feddtpt.Server(torch.tensor([4, 0, 2]), PLANE)
    words = torch.tensor([[2, 4, 0]] * 4)
    after = feddtpt.server_round(settings, server, Uploads(feddtpt.Upload(words), plain_mean), context)
    assert after.words.tolist() == [2, 4, 0]
    votes = torch.nn.functional.one_hot(words, 6) - torch.nn.functional.one_hot(server.words, 6)
    upload = feddtpt_votes.Upload(votes.double(), torch.ones(4))
    after = feddtpt_votes.server_round(settings, server, Uploads(upload, plain_mean), context)
    assert after.words.tolist() == [2, 4, 0]
    twice = feddtpt.kept_words(settings, PLANE, [4, 4, 4], [0, 1, 2], [1, 1, 1])
    assert twice == [4, 4, 4]  # nothing else is left


@pytest.mark.parametrize("name", ["feddtpt", "feddtpt-votes"])
@pytest.mark.parametrize("mechanism", ["none", "dp-sgd"])
def test_a_prompt_is_always_words_of_the_vocabulary(name: str, mechanism: str, make_runtime: MakeRuntime) -> None:
    privacy = {"mechanism": mechanism, "noise_multiplier": 3.0} if mechanism != "none" else {}
    runtime = make_runtime(name, ROWS, {"context_length": 4}, privacy=privacy)
    training, model = runtime.start(), runtime.model
    allowed = set(model.vocabulary.words)
    for _ in range(3):
        training, _ = runtime.round(training)
        prompt = runtime.prompts(training)
        (text,) = model.text(prompt)
        assert len(text.split()) == 4
        assert set(text.split()) <= allowed
        torch.testing.assert_close(model.context(prompt)[0], model.encoder.embed(text))  # what it says is what it is


def test_a_client_ends_with_no_more_errors_than_it_began_with(make_runtime: MakeRuntime) -> None:
    """On its own examples, all of which are in each batch."""
    runtime = make_runtime("feddtpt", ROWS, {"context_length": 4, "local_steps": 12})
    start, context, exact = runtime.start(), runtime.round_context(1), ExactLosses(runtime.model)
    told = feddtpt.broadcast(start.server)  # type: ignore[arg-type]
    upload, _ = feddtpt.client_round(runtime.settings, told, start.clients, runtime.data, exact, context)
    batch = next(iter(runtime.data.batches(1, None, context.streams)))
    pairs = torch.stack([told.words.expand(3, -1), upload.words], dim=1)
    errors = exact(feddtpt.Question(dict, "error", relative=False), {"words": pairs}, {}, batch).losses[:, 0]
    assert (errors[:, 1] <= errors[:, 0]).all()
    assert errors[:, 1].sum() < errors[:, 0].sum()


def test_votes_are_bounded_before_the_run_and_noise_on_them_is_client_level(make_runtime: MakeRuntime) -> None:
    bound = math.sqrt(2 * 3)
    privacy = {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "delta": 0.01, "clip": bound}
    runtime = make_runtime(
        "feddtpt-votes", ROWS, {"context_length": 4, "local_steps": 3}, privacy=privacy, weighting="uniform"
    )
    start, context = runtime.start(), runtime.round_context(1)
    told = feddtpt.broadcast(start.server)  # type: ignore[arg-type]
    for seed in range(5):
        again = replace(context, streams=replace(context.streams, seed=seed))
        upload, _ = feddtpt_votes.client_round(
            runtime.settings, told, start.clients, runtime.data, ExactLosses(runtime.model), again
        )
        norms = upload.change.flatten(1).norm(dim=1)
        assert (norms <= bound * (1 + 1e-6)).all()
        assert norms.max() > 0
    training, _ = runtime.round(start)
    assert training.ledger.private
    assert {release.unit for release in training.ledger.releases} == {"client"}
    with pytest.raises(ConfigError, match="looks at each upload by itself; use 'dp-sgd'$"):
        make_runtime("feddtpt", ROWS, {}, privacy=privacy, weighting="uniform")


def test_a_vocabulary_is_words_of_one_token() -> None:
    def embed(text: str) -> Tensor:  # a word of n letters has n // 4 + 1 tokens
        return torch.zeros(sum(len(word) // 4 + 1 for word in text.split()), 2)

    vocabulary = Vocabulary.of("cat dog elephant cat owl", embed)
    assert vocabulary.words == ("cat", "dog", "owl")
    numbers = vocabulary.numbers("dog cat", 4, lambda count: torch.arange(count).flip(0))
    assert vocabulary.text(numbers) == "owl dog dog cat"
    for text, initial, message in (
        ("elephant cat", "", "vocabulary = 'elephant cat': 1 of the words"),
        ("cat dog", "cat elephant", "initial_context = 'cat elephant': 'elephant' is no word"),
        ("cat dog", "cat " * 5, "initial_context = .*has 5 words, more than context_length = 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            Vocabulary.of(text, embed).numbers(initial, 4, torch.arange)


def test_a_run_says_its_words(config_file: Path, tmp_path: Path) -> None:
    """In its summary, report, saved prompt, predictions and published card. The tensors are the same words."""
    run(load_config(config_file, ["algorithm=feddtpt", "rounds=1"]), tmp_path / "run")
    (words,) = json.loads((tmp_path / "run" / "summary.json").read_text())["words"]
    assert len(words.split()) == 4
    file = tmp_path / "run" / "prompts" / "shared.safetensors"
    saved = SavedPrompt.load(file)
    model = saved.model()
    assert model.model.text(model.prompt) == [words] == [saved.words]
    assert f"<td>{words} CLASS</td>" in (tmp_path / "run" / "report.html").read_text()
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    found = predict(file, [tmp_path / "picture.png"])
    assert found.as_text(1).splitlines()[0] == f"Prompt: {words} CLASS"
    assert found.as_dict(1)["words"] == words
    with Registry(f"sqlite:///{tmp_path / 'prompts.db'}", create=True) as registry:
        key = Ed25519PrivateKey.generate()
        material = from_run(tmp_path / "run", key)
        registry.publish("digits", material.facts, material.files, key, accept_not_private=True)
        published = registry.inspect("digits", 1)
    assert published.manifest.words == words
    assert f"the words “{words} CLASS”" in published.files[CARD].decode()


def test_words_that_a_file_names_are_those_of_its_tensors(config_file: Path, tmp_path: Path) -> None:
    """A file cannot show one prompt and use another. A prompt of vectors names none."""
    run(load_config(config_file, ["algorithm=feddtpt", "rounds=1"]), tmp_path / "run")
    saved = SavedPrompt.load(tmp_path / "run" / "prompts" / "shared.safetensors")
    with pytest.raises(PromptError, match="is not the words 'a harmless photo' that it names"):
        replace(saved, words="a harmless photo").model()
    run(load_config(config_file, ["algorithm=promptfl", "rounds=1"]), tmp_path / "vectors")
    content = (tmp_path / "vectors" / "prompts" / "shared.safetensors").read_bytes()
    assert SavedPrompt.from_bytes(content).words is None
    assert b'"words"' not in content.replace(b"\\", b"")


# FedDPG sees gradients, and makes a prompt of its input.


def test_an_image_has_a_prompt_of_its_own_and_a_zero_generator_makes_one_for_all(make_runtime: MakeRuntime) -> None:
    """Which is then scored as PromptFL's is."""
    runtime = make_runtime("feddpg", ROWS, {"context_length": 3})
    start, model = started_in_double(runtime), runtime.model
    images, generator = runtime.data.features[None, :6], runtime.prompts(start)
    contexts = model.contexts(generator, images)
    assert torch.equal(contexts, contexts[:, :1].expand_as(contexts))  # it starts as one prompt
    plain = PromptModel(model.encoder, model.classes).predict(generator["output_bias"], images[0])
    torch.testing.assert_close(model.predict(generator, images[0]), plain)
    moved = {**generator, "output": torch.randn(generator["output"].shape, dtype=torch.float64)}
    contexts = model.contexts(moved, images)
    for place in range(6):
        hidden = (images[0, place] @ moved["input"][0] + moved["input_bias"][0]).clamp(min=0)
        expected = moved["output_bias"][0] + torch.einsum("h,hne->ne", hidden, moved["output"][0])
        torch.testing.assert_close(contexts[0, place], expected)
    assert (contexts[0, 0] - contexts[0, 1]).norm() > 0.01


def test_pieces_of_a_batch_are_the_batch_and_its_gradient_is_right(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images go through the text tower a few at a time, and an image's logits do not depend on the others."""
    runtime = make_runtime("feddpg", ROWS, {"context_length": 3})
    start = started_in_double(runtime)
    point = {name: value + 0.05 for name, value in runtime.prompts(start).items()}
    batch = next(iter(runtime.data.batches(1, None, runtime.round_context(1).streams)))
    one = replace(batch, features=batch.features[:1], labels=batch.labels[:1], mask=batch.mask[:1])
    whole = ExactGradients(runtime.model)(dict, point, {}, one)
    monkeypatch.setattr(feddpg.Model, "images_at_once", lambda model, prompts: 2)
    pieces = ExactGradients(runtime.model)(dict, point, {}, one)
    torch.testing.assert_close(pieces.loss, whole.loss)
    for name, value in whole.values.items():
        torch.testing.assert_close(pieces.values[name], value, rtol=1e-7, atol=1e-10)
        step = 1e-6 * torch.randn(value.shape, dtype=torch.float64)
        ahead, behind = ({**point, name: point[name] + sign * step} for sign in (1, -1))
        losses = [ExactGradients(runtime.model)(dict, at, {}, one).loss for at in (ahead, behind)]
        torch.testing.assert_close((losses[0] - losses[1])[0] / 2, (value * step).sum(), rtol=1e-4, atol=1e-10)


def test_with_nothing_but_its_last_bias_it_is_promptfl(make_runtime: MakeRuntime) -> None:
    """From the same context: the bias's gradient at a zero generator is that of a shared context."""
    runtime, other = (make_runtime(name, ROWS, {"context_length": 3}) for name in ("feddpg", "promptfl"))
    point = runtime.prompts(started_in_double(runtime))
    batch = next(iter(runtime.data.batches(1, None, runtime.round_context(1).streams)))
    one = replace(batch, features=batch.features[:1], labels=batch.labels[:1], mask=batch.mask[:1])
    found = ExactGradients(runtime.model)(dict, point, {}, one).values["output_bias"]
    context = {"context": point["output_bias"]}
    expected = ExactGradients(other.model)(lambda parts: parts["context"], context, {}, one).values["context"]
    torch.testing.assert_close(found, expected)


def test_a_mechanism_for_class_features_is_refused_and_one_that_draws_images_is_not(make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match="privacy.mechanism.*use 'dp-sgd'"):
        make_runtime("feddpg", ROWS, {}, privacy={"mechanism": "cotangent", "noise_multiplier": 1.0})
    assert make_runtime("feddpg", ROWS, {}, privacy={"mechanism": "statistics", "noise_multiplier": 1.0})


@pytest.mark.parametrize("name", ["fedbpt", "fed-bbpt", "feddtpt", "feddtpt-votes"])
def test_attacks_on_gradients_say_that_there_are_none(name: str, make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(name, ROWS, TABLES)
    assert "uploads come of losses" in str(inversion.inapplicable(runtime))
    subject = SimpleNamespace(runtime=runtime, config=SimpleNamespace(algorithm=name))
    with pytest.raises(ConfigError, match=f"algorithm = '{name}': uploads come of losses"):
        rounds._check(subject)  # type: ignore[arg-type]
