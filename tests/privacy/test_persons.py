"""The person as unit of privacy: one person in or out moves what is released by at most the clip, with all images."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sordino.algorithms.base import ClientData
from sordino.encoders import prompt_model
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError, RunError
from sordino.privacy import persons as by_persons
from sordino.privacy.accounting import compose, default_delta, epsilon, noise_multiplier, spent
from sordino.privacy.cotangent import CotangentGradients, summed_cotangents
from sordino.privacy.dp_sgd import DpSgdGradients, Group
from sordino.privacy.gradients import Batch
from sordino.privacy.ledger import ALL_CLIENTS, Disclosure, Ledger, Release
from sordino.privacy.persons import person_products, person_sums
from sordino.privacy.sampling import PoissonSampler, Sampling
from sordino.privacy.settings import PrivacySettings
from sordino.privacy.statement import as_summary, as_text, statement
from sordino.privacy.statistics.estimates import Released
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.randomness import Streams
from sordino.runtime.client import ClientEnd
from sordino.runtime.facts import client_data
from sordino.runtime.local import LocalRuntime

CPU = torch.device("cpu")
CLIP, SHARED_CLIP = 4e-3, 7e-3
ROUNDING = 1e-7  # see test_sensitivity
DELTA = 1e-5

# What an image may be, and what is done to an ordinary one.
KINDS = ("ordinary", "duplicate", "zero", "mislabeled", "enormous", "beyond", "not a number", "infinite")
people = st.lists(st.lists(st.sampled_from(KINDS), min_size=1, max_size=9), min_size=1, max_size=4)


def odd(features: Tensor, labels: Tensor, kinds: list[str]) -> tuple[Tensor, Tensor]:
    """Images of these kinds from ordinary ones [n, D] and their labels [n]."""
    features, labels = features.clone(), labels.clone()
    for place, kind in enumerate(kinds):
        if kind == "duplicate":
            features[place], labels[place] = features[0], labels[0]
        elif kind == "mislabeled":
            labels[place] = (labels[place] + 1) % 4
        elif kind != "ordinary":
            factor = {"zero": 0.0, "enormous": 1e30, "beyond": 1e200, "not a number": math.nan, "infinite": math.inf}
            features[place] = features[place] * factor[kind]
    return features, labels


def batch_of(table: tuple[Tensor, Tensor], held: list[list[str]], seed: int) -> Batch:
    """A batch of two clients: the first has these persons' images in any order, the second an ordinary person."""
    kinds = [kind for images in held for kind in images]
    owners = torch.tensor([person for person, images in enumerate(held) for _ in images])
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))
    features, labels = odd(table[0][: len(kinds)], table[1][: len(kinds)], kinds)
    features, labels, owners = features[order], labels[order], owners[order]
    stacked = torch.stack([features, table[0][40 - len(kinds) :]])
    sizes = torch.full((2,), 4.0, dtype=torch.float64)
    return Batch(
        stacked,
        torch.stack([labels, table[1][40 - len(kinds) :]]),
        torch.ones(2, len(kinds), dtype=torch.bool),
        Sampling(sizes / 8, sizes, 0),
        persons=torch.stack([owners, torch.zeros_like(owners)]),
    )


def without(batch: Batch, *persons: int) -> Batch:
    """The neighboring batch: some of the first client's persons are not in it."""
    assert batch.persons is not None
    mask = batch.mask.clone()
    mask[0] &= ~torch.isin(batch.persons[0], torch.tensor(persons, dtype=torch.int64))
    return replace(batch, mask=mask)


def factored(by: dict[str, Tensor]) -> Tensor:
    return by["shared"] + by["u"] @ by["v"]


def parameters(model: PromptModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    context = 0.3 * torch.randn(2, 3, model.encoder.context_width, generator=generator, dtype=torch.float64)
    return {"shared": context, "u": context[..., :2].clone(), "v": context[:, :2].clone()}


def dp_sgd(model: PromptModel, clip: float = CLIP, shared_clip: float = SHARED_CLIP) -> DpSgdGradients:
    nothing = torch.zeros(2, dtype=torch.float64)
    streams = Streams(0, 1, range(2), CPU)
    return DpSgdGradients(model, frozenset({"shared"}), Group(clip, nothing), Group(shared_clip, nothing), streams)


def norm(*tensors: Tensor) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


# Sensitivity


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(people, st.integers(0, 2**32 - 1))
def test_a_person_moves_the_sums_of_dp_sgd_by_at_most_the_clips(
    model: PromptModel, table: tuple[Tensor, Tensor], held: list[list[str]], seed: int
) -> None:
    """Each group by its own clip; each person by what they add alone, and by nothing of the other client's."""
    batch, by, take = batch_of(table, held, seed), parameters(model), dp_sgd(model)

    def released(some: Batch) -> dict[str, Tensor]:
        return {name: 4.0 * value for name, value in take(factored, by, {}, some).values.items()}

    everyone = range(len(held))
    whole = released(batch)
    assert not any(value[0].any() for value in released(without(batch, *everyone)).values())
    for person in everyone:
        rest = released(without(batch, person))
        alone = released(without(batch, *(other for other in everyone if other != person)))
        move = {name: whole[name] - rest[name] for name in whole}
        assert norm(move["u"][0], move["v"][0]) <= CLIP * (1 + ROUNDING)
        assert norm(move["shared"][0]) <= SHARED_CLIP * (1 + ROUNDING)
        for name, value in move.items():
            assert torch.equal(whole[name][1], rest[name][1])
            torch.testing.assert_close(value[0], alone[name][0], rtol=0, atol=ROUNDING * CLIP)
        if not set(held[person]) - {"not a number", "infinite"}:
            assert not any(value[0].any() for value in alone.values())


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(people, st.integers(0, 2**32 - 1), st.booleans())
def test_a_person_moves_the_cotangent_by_at_most_the_clip(
    model: PromptModel,
    table: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    held: list[list[str]],
    seed: int,
    in_pieces: bool,
) -> None:
    monkeypatch.setattr(by_persons, "ENTRIES_AT_ONCE", 1 if in_pieces else 2**24)
    batch, clip = batch_of(table, held, seed), 0.3
    directions = torch.linalg.qr(torch.randn(model.encoder.feature_width, 4, dtype=torch.float64)).Q
    logits = model.logits(model.text_features(factored(parameters(model))), batch.features)
    everyone = range(len(held))

    def released(some: Batch) -> Tensor:
        return summed_cotangents(logits, some, directions, clip)

    whole = released(batch)
    assert not released(without(batch, *everyone))[0].any()
    for person in everyone:
        rest = released(without(batch, person))
        alone = released(without(batch, *(other for other in everyone if other != person)))
        assert norm((whole - rest)[0]) <= clip * (1 + ROUNDING)
        assert torch.equal(whole[1], rest[1])
        torch.testing.assert_close((whole - rest)[0], alone[0], rtol=0, atol=ROUNDING * clip)
        if not set(held[person]) - {"not a number", "infinite"}:
            assert not alone[0].any()


def test_a_clip_beyond_reach_gives_the_plain_sums(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    """Then it does not matter whose the images are: the gradients are those of the examples."""
    batch, by = batch_of(table, [["ordinary"] * 3, ["ordinary"] * 4], 3), parameters(model)
    examples = replace(batch, persons=None)
    far = dp_sgd(model, 1e9, 1e9)
    everything = torch.eye(model.encoder.feature_width, dtype=torch.float64)
    cotangents = CotangentGradients(model, everything, 1e9, 0.0, Streams(0, 1, range(2), CPU))
    plain = far(factored, by, {}, examples).values
    for take in (far, cotangents):
        found = take(factored, by, {}, batch).values
        for name in by:
            torch.testing.assert_close(found[name], plain[name], rtol=1e-7, atol=1e-12)


def test_a_person_of_one_image_is_an_example(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    batch, by = batch_of(table, [["ordinary"]] * 6, 3), parameters(model)
    assert batch.persons is not None
    batch = replace(batch, persons=torch.arange(6).expand(2, 6))
    one, other = (dp_sgd(model)(factored, by, {}, some).values for some in (batch, replace(batch, persons=None)))
    for name in by:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-15)


def test_pieces_of_examples_change_nothing(
    model: PromptModel, table: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person's images may be in several of the passes that memory allows."""
    batch, by = batch_of(table, [["ordinary"] * 3, ["ordinary", "infinite"], ["ordinary"] * 2], 3), parameters(model)
    whole = dp_sgd(model)(factored, by, {}, batch).values
    monkeypatch.setitem(prompt_model.FLOPS_AT_ONCE, "cpu", 1.0)
    parts = dp_sgd(model)(factored, by, {}, batch).values
    for name in by:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_sums_by_person_do_not_depend_on_the_pieces(counts: list[int], at_once: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    persons = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    left, right = (torch.randn(len(persons), width, generator=generator).double() for width in (3, 2))
    products = left[:, :, None] * right[:, None, :]
    expected = torch.stack([products[persons == person].sum(0) for person in range(len(counts))])
    pieces = ({"products": part} for part in products.split(at_once))
    torch.testing.assert_close(torch.cat([piece["products"] for piece in person_sums(pieces, persons)]), expected)
    torch.testing.assert_close(torch.cat(list(person_products(left, right, persons))), expected)


# Samples


def data_of(table: tuple[Tensor, Tensor], owners: list[int], clients: int = 2) -> ClientData:
    """The forty pictures, divided over clients so that persons, by number, are whole."""
    rows = [[row for row in range(40) if owners[row] % clients == client] for client in range(clients)]
    return client_data(*table, rows, "uniform", owners)


@given(
    st.lists(st.integers(0, 9), min_size=40, max_size=40).filter(lambda owners: len({o % 2 for o in owners}) == 2),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_images_of_a_person_are_in_a_batch_or_none(
    table: tuple[Tensor, Tensor], owners: list[int], most: int, size: int, seed: int
) -> None:
    data, streams = data_of(table, owners), Streams(seed, 1, [0, 1], CPU)
    data = replace(data, poisson=PoissonSampler(streams, most))
    for batch in data.batches(3, size, streams):
        assert batch.sampling is not None
        assert batch.persons is not None
        assert batch.rows is not None
        for client in range(2):
            held = {owner for owner in owners if owner % 2 == client}
            assert float(batch.sampling.rate[client]) == min(1.0, size / len(held))
            assert float(batch.sampling.expected[client]) == min(1.0, size / len(held)) * len(held)
            chosen = batch.rows[client][batch.mask[client]].tolist()
            numbers = batch.persons[client][batch.mask[client]].tolist()
            drawn = {owners[row] for row in chosen}
            # Of each person who was drawn, the first images and no other; a number for each.
            expected = [row for person in drawn for row in [r for r in range(40) if owners[r] == person][:most]]
            assert sorted(chosen) == sorted(expected)
            assert len({(owners[row], number) for row, number in zip(chosen, numbers, strict=True)}) == len(drawn)


def test_persons_are_sampled_by_independent_coins(table: tuple[Tensor, Tensor]) -> None:
    owners = [row % 10 for row in range(40)]
    data = client_data(*table, [range(40)], "uniform", owners)
    drawn = torch.zeros(10)
    sizes = []
    for number in range(600):
        streams = Streams(0, number, [0], CPU)
        (batch,) = replace(data, poisson=PoissonSampler(streams, 16)).batches(1, 3, streams)
        assert batch.rows is not None
        numbers = [owners[row] for row in batch.rows[0][batch.mask[0]].tolist()]
        there = torch.tensor(numbers, dtype=torch.int64).bincount(minlength=10)
        assert set(there.tolist()) <= {0, 4}
        drawn += there > 0
        sizes.append(int((there > 0).sum()))
    assert bool(((drawn - 180).abs() < 5 * math.sqrt(600 * 0.3 * 0.7)).all())
    assert torch.tensor(sizes).double().var().item() == pytest.approx(10 * 0.3 * 0.7, rel=0.25)


def test_what_a_person_shows_decides_over_no_coin(table: tuple[Tensor, Tensor]) -> None:
    """With other images of one person, or more of them, the same others are drawn."""
    few, many = [0, 1, 1, 2, 3, 3, 4], [0, 1, 1, 2, 2, 2, 3, 3, 4]
    streams = Streams(3, 1, [0], CPU)
    seen = []
    for owners in (few, many):
        data = client_data(table[0], table[1], [range(len(owners))], "uniform", [*owners, *[0] * (40 - len(owners))])
        data = replace(data, poisson=PoissonSampler(streams, 16))
        batches = list(data.batches(20, 2, streams))
        seen.append([{owners[row] for row in b.rows[0][b.mask[0]].tolist()} for b in batches])  # type: ignore[index]
    assert seen[0] == seen[1]


def test_a_sample_of_persons_needs_persons(table: tuple[Tensor, Tensor]) -> None:
    streams = Streams(0, 1, [0], CPU)
    data = replace(client_data(*table, [range(40)], "uniform"), poisson=PoissonSampler(streams, 16))
    with pytest.raises(RunError, match="whose each image is"):
        next(data.batches(1, 3, streams))


# Settings and whole rounds


@pytest.mark.parametrize(
    ("mechanism", "unit", "expected"),
    [
        ("dp-fedavg", "person", "use 'statistics', 'dp-sgd' or 'cotangent'"),
        ("dp-fedavg", "example", "unit of mechanism 'dp-fedavg' is 'client'"),
        ("dp-sgd", "client", "is 'example' or 'person'"),
        ("cotangent", "client", "is 'example' or 'person'"),
    ],
)
def test_a_unit_that_a_mechanism_does_not_protect_is_refused(mechanism: Any, unit: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"privacy\.unit.*{expected}"):
        PrivacySettings(mechanism=mechanism, unit=unit, epsilon=1.0)


def test_the_unit_without_a_setting_is_that_of_the_mechanism() -> None:
    units = {name: PrivacySettings(mechanism=name, epsilon=1.0).unit for name in ("none", "dp-sgd", "dp-fedavg")}
    assert units == {"none": "example", "dp-sgd": "example", "dp-fedavg": "client"}


def make(
    make_runtime: Any, rows: list[list[int]], owners: list[int] | None, name: str = "dp-fpl", **more: Any
) -> LocalRuntime:
    plain = make_runtime(name, rows, {"context_length": 3, "batch_size": 2, "local_steps": 1, "dp-fpl": {"rank": 2}})
    privacy = PrivacySettings(**{"mechanism": "cotangent", "epsilon": 4.0, "unit": "person", "delta": 0.01} | more)
    return LocalRuntime(
        plain.algorithm,
        plain.settings,
        plain.model,
        plain.data.features,
        plain.data.labels,
        rows,
        plain.rounds,
        plain.runtime,
        0,
        privacy,
        persons=owners,
    )


ROWS = [list(range(24)), list(range(24, 40))]
OWNERS = [row // 4 for row in range(40)]  # six persons, and four


@pytest.mark.parametrize("algorithm", ["dp-fpl", "local"])
def test_the_center_rests_on_the_number_of_examples_but_not_of_persons(algorithm: str, make_runtime: Any) -> None:
    """How much a person counts in the center's sums depends on that person's images and the clip."""
    release = {"mechanism": "statistics", "epsilon": None, "noise_multiplier": 0.2, "center_share": 0.5}
    for unit in ("example", "person"):
        runtime = make(make_runtime, ROWS, OWNERS, algorithm, **release, unit=unit)
        mechanism = runtime.mechanism
        assert isinstance(mechanism, StatisticsMechanism)
        released = Released.of(runtime.release(runtime.start())[0].at_clients.release)
        name = "center" if released.own_center is None else "own_center"
        more = getattr(released, name).clone()
        more[..., 0] += 5
        centers, others = (mechanism.centers(each, range(2)) for each in (released, replace(released, **{name: more})))
        assert centers is not None
        assert others is not None
        assert centers.norm(dim=1).min() > 0
        assert torch.equal(centers, others) == (unit == "example")


def test_persons_must_be_known_and_whole(make_runtime: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.person_column.*data\.persons.*data\.person_level"):
        make(make_runtime, ROWS, None)
    with pytest.raises(ConfigError, match="person 5 has images at clients 0 and 1.*give all images of a person to one"):
        make(make_runtime, [list(range(22)), list(range(22, 40))], OWNERS)


@pytest.mark.parametrize(
    ("mechanism", "noise_by"),
    [("cotangent", "client"), ("dp-sgd", "client"), ("dp-sgd", "server"), ("dp-sgd", "shares")],
)
def test_a_round_is_accounted_by_persons(mechanism: str, noise_by: str, make_runtime: Any) -> None:
    rows = [*ROWS[:1], list(range(24, 32)), list(range(32, 40))]
    runtime = make(make_runtime, rows, OWNERS, mechanism=mechanism, noise_by=noise_by)
    inputs = runtime.mechanism.inputs
    assert inputs.sizes == (6, 2, 2)
    assert inputs.weights == (6.0, 2.0, 2.0) == tuple(runtime.data.weights.tolist())
    assert inputs.largest_share == pytest.approx(6 / 2)  # weight over two expected persons
    training, _ = runtime.round(runtime.start())
    entered = training.ledger.releases
    assert {(release.unit, release.party, release.sampling_rate) for release in entered} == {
        ("person", "client 0", 2 / 6),
        ("person", "client 1", 1.0),
        ("person", "client 2", 1.0),
    }
    observer = "clients"
    assert spent(runtime.mechanism.total, observer, "person").epsilon <= 4.0 + 1e-6
    text = statement(training.ledger, "person")
    assert "for each person" in text
    assert "how many persons each client holds" in text
    assert "unit person" in as_text(training.ledger)
    assert as_summary(training.ledger, "person")["unit"] == "person"
    again = Ledger.from_json(training.ledger.to_json())
    assert again == training.ledger
    assert again.whole_persons


def test_the_default_delta_is_that_of_the_number_of_persons(make_runtime: Any) -> None:
    runtime = make(make_runtime, ROWS, OWNERS, delta=None)
    assert runtime.mechanism.delta == default_delta(10)
    with pytest.raises(ConfigError, match="delta"):
        make(make_runtime, ROWS, OWNERS, delta=0.11)


def test_the_noise_is_what_the_rate_of_persons_needs(make_runtime: Any) -> None:
    runtime = make(make_runtime, [list(range(24)), list(range(24, 40))], OWNERS)
    steps = runtime.rounds
    assert runtime.mechanism.noise_multiplier == noise_multiplier(4.0, 0.01, {(2 / 6, steps), (2 / 4, steps)})


def test_a_client_that_counts_images_is_refused(make_runtime: Any) -> None:
    """Where another party adds the noise, it is calibrated to weights that count persons."""
    runtime = make(make_runtime, ROWS, OWNERS, mechanism="dp-sgd", noise_by="server")
    heavy = replace(runtime.data, weights=runtime.data.counts.float())
    for data in (heavy, replace(runtime.data, persons=None)):
        with pytest.raises(ConfigError, match="must say whose their images are"):
            ClientEnd(runtime.federation, data, [0, 1])
    ClientEnd(runtime.federation, runtime.data, [0, 1])


def test_a_method_that_samples_examples_ends_the_run(make_runtime: Any) -> None:
    """A batch that does not say whose the examples are would be clipped by example."""
    runtime = make(make_runtime, ROWS, OWNERS)
    object.__setattr__(runtime.mechanism, "sampler", lambda randomness: PoissonSampler(randomness))
    with pytest.raises(RunError, match=r"privacy\.unit = 'person'"):
        runtime.round(runtime.start())


def test_whose_the_images_are_is_part_of_the_key_of_simulated_noise(make_runtime: Any) -> None:
    fixed = {"simulation": True, "nonce": "0" * 32}
    halves = [row // 2 for row in range(40)]
    one, same, other = (make(make_runtime, ROWS, owners, **fixed) for owners in (OWNERS, OWNERS, halves))
    same.mechanism = other.mechanism = one.mechanism  # of another noise multiplier, which is in the key too
    assert one.identity == same.identity != other.identity


# Accounting


def release(unit: Any, z: float = 4.0, rate: float = 0.2, steps: int = 10, party: str = "client 0") -> Release:
    return Release("sums", party, unit, (z,), rate, steps, "client", ("server",))


def ledger(*releases: Release, whole: bool = True, **more: Any) -> Ledger:
    return replace(Ledger(delta=DELTA, whole_persons=whole, **more).add(releases), **more)


HALVED = epsilon([release("any", 2.0, 1.0)], DELTA)
ITSELF = epsilon([release("any")], DELTA)


@pytest.mark.parametrize(
    ("of", "asked", "expected"),
    [
        ("example", "example", ITSELF),
        ("example", "person", math.inf),
        ("example", "client", math.inf),
        ("person", "example", HALVED),
        ("person", "person", ITSELF),
        ("person", "client", math.inf),
        ("client", "example", HALVED),
        ("client", "person", HALVED),
        ("client", "client", ITSELF),
    ],
)
def test_a_release_protects_its_unit_and_smaller_ones(of: Any, asked: Any, expected: float) -> None:
    assert spent(ledger(release(of)), "server", asked).epsilon == expected


def test_noise_of_a_client_says_nothing_of_persons_who_may_be_at_two() -> None:
    """Such a person moves two uploads. Nor is it known of a ledger that was written before persons were."""
    assert spent(ledger(release("client"), whole=False), "server", "person").epsilon == math.inf
    content = ledger(release("client")).to_json().replace('"whole_persons": true', '"whole": true')
    assert not Ledger.from_json(content).whole_persons


def test_runs_add_up_for_a_person() -> None:
    """Of one party's data, for each unit; a run in which persons are divided leaves nothing of the claim."""
    data = {"client 0": "a", "client 1": "b"}
    first = ledger(release("person"), release("person", party="client 1"), run="1", data=data)
    second = ledger(release("person", 3.0), run="2", data=data)
    both = epsilon([release("person"), release("person", 3.0)], DELTA)
    assert spent(compose([first, second]), "server", "person").epsilon == pytest.approx(both)
    elsewhere = replace(second, data={"client 0": "c"})
    assert spent(compose([first, elsewhere]), "server", "person").epsilon == pytest.approx(both)
    by_client = ledger(release("client", 6.0, 1.0, party=ALL_CLIENTS), run="3", data=data)
    mixed = epsilon([release("person"), release("any", 3.0, 1.0)], DELTA)
    assert spent(compose([first, by_client]), "server", "person").epsilon == pytest.approx(mixed)
    assert spent(compose([first, replace(by_client, whole_persons=False)]), "server", "person").epsilon == math.inf
    by_example = ledger(release("example"), run="4", data=data)
    assert spent(compose([first, by_example]), "server", "person").epsilon == math.inf
    assert math.isfinite(spent(compose([first, by_example]), "server", "example").epsilon)


def test_what_is_disclosed_without_noise_is_unbounded_for_a_person() -> None:
    told = ledger(disclosures=(Disclosure("something", "upload"),))
    assert spent(told, "server", "person").epsilon == math.inf
    assert spent(told, "public", "person").epsilon == 0.0
