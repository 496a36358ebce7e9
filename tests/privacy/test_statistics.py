"""Class statistics: what one unit can change of them, their noise, and what is inferred from a release."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy.statistics.estimates import EXAMPLES, ClassStatistics, drawn
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.privacy.statistics.posterior import (
    EXPECTED_PRODUCT,
    MOST_NORM,
    MOST_SPREAD,
    ClassMeans,
    Observed,
    center_of,
    held,
    observed,
    personal,
    pooled,
    principal,
    shrunk,
    within,
)
from sordino.privacy.statistics.release import (
    CENTER_COUNTS,
    CENTER_ERROR,
    LEAST_CENTER,
    LEAST_SCATTER,
    LEAST_SHARE,
    MOST_CENTER,
    MOST_SCATTER,
    MOST_SHARE,
    SCATTER_EDGE,
    center_share,
    center_sum,
    class_sums,
    contributions,
    count_share,
    packed,
    scatter_share,
    scatter_sum,
    unpacked,
)
from sordino.randomness import Streams
from sordino.runtime.local import LocalRuntime

CPU = torch.device("cpu")
ROUNDING = 1e-9
CLASSES, WIDTH = 5, 24
TABLES = {"context_length": 2, "dp-fpl": {"rank": 2}}
KINDS = ["normal", "nan", "inf", "-inf", "zero", "huge", "tiny", "copy"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features_of(kinds: list[str], width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Features [n, D] of the given kinds, at any norm."""
    features = torch.randn(len(kinds), width, generator=generator(seed), dtype=torch.float64).to(dtype)
    for row, kind in enumerate(kinds):
        if kind in ("nan", "inf", "-inf"):
            features[row, row % width] = float(kind)
        elif kind == "zero":
            features[row] = 0
        elif kind == "huge":
            features[row] *= 1e37
        elif kind == "tiny":
            features[row] *= 1e-42
        elif kind == "copy":
            features[row] = features[0]
    return features


def basis(width: int, rank: int | None) -> Tensor | None:
    if rank is None:
        return None
    return torch.linalg.qr(torch.randn(width, rank, generator=generator(7)))[0]


@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=8),
    st.sampled_from([1, 2, 5, 1000]),
    st.sampled_from([(2, None), (16, None), (16, 3), (768, None), (768, 16)]),
    st.floats(0.01, 0.99),
    st.sampled_from([None, 0.0, 0.5, MOST_NORM]),
    st.integers(0, 100),
    st.data(),
)
def test_one_example_changes_the_sums_by_at_most_one(
    kinds: list[str],
    classes: int,
    shape: tuple[int, int | None],
    share: float,
    from_center: float | None,
    seed: int,
    data: st.DataObject,
) -> None:
    """By exactly 1 if its feature has a direction; and the terms of the others stay as they are."""
    features = features_of(kinds, shape[0], seed)
    directions = basis(*shape)
    center = None if from_center is None else point(shape[0], from_center)
    labels = torch.randint(0, classes, (len(kinds),), generator=generator(seed))
    taken = data.draw(st.integers(0, len(kinds) - 1))
    others = torch.arange(len(kinds)) != taken

    rows = contributions(features, share, directions, center)
    of_others = contributions(features[others], share, directions, center)
    assert rows.isfinite().all()
    torch.testing.assert_close(of_others, rows[others], rtol=0, atol=1e-6)  # how matrices are multiplied

    change = class_sums(rows, labels, classes) - class_sums(rows[others], labels[others], classes)
    distance = float(change.norm())
    assert distance <= 1 + ROUNDING
    assert not change[torch.arange(classes) != labels[taken]].abs().gt(ROUNDING).any()
    kind = kinds[0] if kinds[taken] == "copy" else kinds[taken]
    if kind in ("normal", "huge", "copy"):
        assert distance == pytest.approx(1, abs=1e-6)
    elif kind == "zero" and not from_center:
        assert distance == pytest.approx(math.sqrt(share), abs=1e-6)  # the count alone
    elif kind in ("nan", "inf", "-inf"):
        assert distance == 0


def point(width: int, norm: float) -> Tensor:
    return norm * torch.nn.functional.normalize(torch.randn(width, generator=generator(5)), dim=0)


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from([2, 16, 768]),
    st.booleans(),
    st.floats(0.1, 20),
    st.integers(0, 100),
)
def test_one_unit_changes_center_and_scatter_by_at_most_its_bound(
    units: list[tuple[str, int]], width: int, by_person: bool, clip: float, seed: int
) -> None:
    features = features_of([kind for kind, _ in units], width, seed)
    persons = torch.tensor([person for _, person in units])
    bound = clip if by_person else 1.0
    rows = contributions(features, 0.0, None, point(width, 0.5))[:, 1:]

    def sums(chosen: Tensor) -> tuple[Tensor, Tensor]:
        whose = (persons[chosen], clip) if by_person else ()
        return center_sum(features[chosen], *whose), scatter_sum(rows[chosen], *whose)

    everyone = torch.ones(len(units), dtype=torch.bool)
    taken = persons == persons[0] if by_person else torch.arange(len(units)) == 0
    for whole, others, alone in zip(sums(everyone), sums(~taken), sums(taken), strict=True):
        change = whole - others
        assert whole.isfinite().all()
        assert float(change.norm()) <= bound + ROUNDING * max(1, bound)
        torch.testing.assert_close(change, alone, rtol=0, atol=1e-5)  # whatever the others are
    if not by_person and units[0][0] == "normal":
        assert [float(part.norm()) for part in sums(taken)] == pytest.approx([1, 1], abs=1e-6)


def test_a_packed_matrix_has_its_norm_and_comes_back() -> None:
    half = torch.randn(7, 7, generator=generator(0)).double()
    matrix = half + half.mT
    assert packed(matrix).shape == (28,)
    assert float(packed(matrix).norm()) == pytest.approx(float(matrix.norm()))
    torch.testing.assert_close(unpacked(packed(matrix)), matrix)


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from([1, 3, 1000]),
    st.floats(0.1, 20),
    st.integers(0, 100),
)
def test_one_person_changes_the_sums_by_at_most_clip(
    units: list[tuple[str, int]], classes: int, clip: float, seed: int
) -> None:
    features = features_of([kind for kind, _ in units], 16, seed)
    persons = torch.tensor([person for _, person in units])
    labels = torch.randint(0, classes, (len(units),), generator=generator(seed))
    rows = contributions(features, 0.3, None)
    whole = class_sums(rows, labels, classes, persons, clip)
    for person in persons.unique():
        others = persons != person
        change = whole - class_sums(rows[others], labels[others], classes, persons[others], clip)
        assert float(change.norm()) <= clip + ROUNDING * max(1, clip)
        alone = class_sums(rows[~others], labels[~others], classes)  # without a clip
        assert float(change.norm()) == pytest.approx(min(clip, float(alone.norm())), abs=1e-8)


def test_a_person_of_many_classes_is_clipped_over_all_of_them() -> None:
    rows = contributions(features_of(["normal"] * 100, 16, 0), 0.5, None)
    labels, persons = torch.arange(100) % 10, torch.zeros(100, dtype=torch.int64)
    assert float(class_sums(rows, labels, 10, persons, 2.0).norm()) == pytest.approx(2.0)


MakeRuntime = Callable[..., LocalRuntime]


def mechanism_of(make_runtime: MakeRuntime, method: str = "dp-fpl", **privacy: object) -> StatisticsMechanism:
    rows = [list(range(k, 40, 4)) for k in range(4)]
    settings = {"mechanism": "statistics", "noise_multiplier": 3.0, **privacy}
    mechanism = make_runtime(method, rows, TABLES, privacy=settings).mechanism
    assert isinstance(mechanism, StatisticsMechanism)
    return mechanism


def has_deviation(noise: Tensor, deviation: float) -> None:
    """See that n draws [n, ...] of noise have this standard deviation, on every entry and over all."""
    for draws in (noise.double().flatten(1), noise.double().reshape(-1, 1)):
        squares = (draws / deviation).pow(2).sum(0)
        count = len(draws)
        # Chi-squared, by its normal limit; six deviations leave less than 1e-6 for thousands of entries.
        assert ((squares - count).abs() < 6 * math.sqrt(2 * count) + 36).all()


@pytest.mark.parametrize("noise_by", ["client", "server", "shares"])
@pytest.mark.parametrize("method", ["dp-fpl", "local", "promptfl"])
@pytest.mark.parametrize("center", [0.0, 0.1])
def test_multipliers_of_all_parts_join_to_that_of_the_mechanism(
    method: str, noise_by: str, center: float, make_runtime: MakeRuntime
) -> None:
    if method == "local" and noise_by != "client":
        return  # nothing is summed
    shares = {"center_share": center, "scatter_share": 0.2}
    noise = mechanism_of(make_runtime, method, noise_by=noise_by, shared_budget=0.3, **shares).multipliers
    assert sum(z**-2 for z in noise.parts.values()) ** -0.5 == pytest.approx(3.0, rel=1e-12)
    assert (noise.own is None) == (noise_by != "client" and method == "promptfl")
    assert (noise.total is None) == (noise_by == "client")
    assert noise.center == (pytest.approx(3 / math.sqrt(center)) if center else None)
    assert noise.scatter == (None if method == "local" else pytest.approx(3 / math.sqrt(0.2)))  # of all clients


@pytest.mark.parametrize("noise_by", ["client", "server"])
def test_every_entry_of_a_clients_matrix_has_its_noise(
    noise_by: str, make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]
) -> None:
    mechanism = mechanism_of(make_runtime, noise_by=noise_by)
    rows = [torch.tensor([k % 40]) for k in range(400)]
    exact = mechanism.exact("matrix", *table, rows)
    own = mechanism.with_own_noise("matrix", exact, Streams(1, 0, range(400), CPU))
    assert own is not None
    assert mechanism.multipliers.own == pytest.approx(3.0 if noise_by == "client" else 3 * math.sqrt(2))
    has_deviation(own - exact, mechanism.multipliers.own or 0.0)
    first, second = (own - exact)[:2]
    assert (first - second).abs().min() > 0  # each client's own


def test_the_noise_of_persons_is_in_units_of_clip(
    make_runtime: MakeRuntime, model: object, table: tuple[Tensor, Tensor]
) -> None:
    plain = mechanism_of(make_runtime)
    settings = plain.settings.model_copy(update={"unit": "person", "clip": 5.0})
    mechanism = StatisticsMechanism(settings, plain.inputs, plain.model, 1e-3, 3.0)
    rows, persons = [torch.tensor([k % 40]) for k in range(400)], torch.arange(40)
    exact = mechanism.exact("matrix", *table, rows, persons)
    own = mechanism.with_own_noise("matrix", exact, Streams(1, 0, range(400), CPU))
    assert own is not None
    has_deviation(own - exact, 15.0)


def test_every_entry_of_the_servers_sum_has_its_noise(make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]) -> None:
    mechanism = mechanism_of(make_runtime, "promptfl", noise_by="server")
    exact = mechanism.exact("matrix", *table, [torch.arange(10)] * 4)
    assert mechanism.with_own_noise("matrix", exact, Streams(1, 0, range(4), CPU)) is None
    sums = torch.stack([mechanism.summed("matrix", exact, Streams(seed, 0, [0], CPU)) for seed in range(400)])
    has_deviation(sums - exact.sum(0), 3.0)


@pytest.mark.parametrize("method", ["dp-fpl", "promptfl"])
def test_every_entry_of_the_secure_sum_has_its_noise(method: str, make_runtime: MakeRuntime) -> None:
    """What is wanted is left without one share of four, so all four are a third more."""
    left = []
    for number in range(24):
        privacy = {"mechanism": "statistics", "noise_multiplier": 3.0, "noise_by": "shares"}
        privacy |= {"simulation": True, "nonce": f"{number:032x}"}
        rows = [list(range(k, 40, 4)) for k in range(4)]
        runtime = make_runtime(method, rows, TABLES, privacy=privacy)
        mechanism = runtime.mechanism
        assert isinstance(mechanism, StatisticsMechanism)
        total, _ = runtime.release(runtime.start())
        seen = total.at_server.release
        share = mechanism.count_share
        opened = torch.cat([seen["counts"][:, None] * share**0.5, seen["sums"] * (1 - share) ** 0.5], -1)
        table = (runtime.data.features, runtime.data.labels)
        chosen = [torch.tensor(part) for part in rows]
        exact = mechanism.exact("matrix", *table, chosen)
        left.append(opened - exact.sum(0))
    has_deviation(torch.stack(left), 3.0 * math.sqrt(4 / 3) * (math.sqrt(2) if method == "dp-fpl" else 1.0))


def test_the_counts_share_is_between_its_limits() -> None:
    assert count_share(0.0, 10, 100) == LEAST_SHARE
    assert count_share(1e9, 10, 100) == MOST_SHARE
    assert count_share(1.0, 1, 0) == MOST_SHARE
    shares = [count_share(z, 100, 50) for z in (0.1, 0.5, 1, 1.2, 1.4, 5)]
    assert shares == sorted(shares)
    # In between, a count of n / sqrt(C) stands three deviations of its noise, z / a, above zero.
    share = count_share(1.0, 100, 50)
    assert LEAST_SHARE < share < MOST_SHARE
    assert 50 / math.sqrt(100) == pytest.approx(3 * 1.0 / math.sqrt(share))


def test_a_center_needs_all_directions(make_runtime: MakeRuntime, model: PromptModel) -> None:
    width = model.encoder.feature_width
    with pytest.raises(ConfigError, match=rf"privacy\.center_share = 0\.1.*set privacy\.subspace = {width}"):
        mechanism_of(make_runtime, center_share=0.1, subspace=8)
    assert mechanism_of(make_runtime, noise_multiplier=0.0, subspace=8).multipliers.center is None
    everything = mechanism_of(make_runtime, center_share=0.1, subspace=width)
    assert everything.directions is None
    assert everything.multipliers.center is not None


def test_class_statistics_keep_a_part_of_the_budget(make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.scatter_share = 0\.4.*class statistics need the rest"):
        mechanism_of(make_runtime, center_share=0.5, scatter_share=0.4)


@pytest.mark.parametrize("part", ["center", "scatter"])
def test_every_entry_of_center_and_scatter_has_its_noise(
    part: str, make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]
) -> None:
    """Each client's own; or the server's, on the sum."""
    shares = {"center_share": 0.1, "scatter_share": 0.2}
    expected = 3 / math.sqrt(shares[f"{part}_share"])
    rows = [torch.tensor([k % 40]) for k in range(400)]
    mechanism = mechanism_of(make_runtime, noise_by="client", **shares)
    exact = mechanism.exact(part, *table, rows)
    own = mechanism.with_own_noise(part, exact, Streams(1, 0, range(400), CPU))
    assert own is not None
    assert own.shape[1:] == mechanism.part_shape(part)
    has_deviation(own - exact, expected)
    mechanism = mechanism_of(make_runtime, noise_by="server", **shares)
    exact = mechanism.exact(part, *table, rows[:4])
    assert mechanism.with_own_noise(part, exact, Streams(1, 0, range(4), CPU)) is None
    sums = torch.stack([mechanism.summed(part, exact, Streams(seed, 0, [0], CPU)) for seed in range(400)])
    has_deviation(sums - exact.sum(0), expected)


def test_center_and_scatter_get_what_their_errors_ask_for() -> None:
    for share, least, most in ((center_share, LEAST_CENTER, MOST_CENTER), (scatter_share, LEAST_SCATTER, MOST_SCATTER)):
        assert share(0.0, 10, 256, 1000) == least
        assert share(1e9, 10, 256, 1000) == 0  # it would tell nothing
        given = [share(z, 10, 256, 1258) for z in (0.1, 0.3, 0.5)]
        assert given == sorted(given)
        assert all(least <= each <= most for each in given)
    share = center_share(0.7, 10, 256, 1258)
    assert LEAST_CENTER < share < MOST_CENTER
    assert 0.7 / math.sqrt(share) * math.sqrt(10 * 256) / 1258 == pytest.approx(CENTER_ERROR)
    share = scatter_share(0.5, 10, 256, 1258)
    assert LEAST_SCATTER < share < MOST_SCATTER
    noise = torch.randn(256, 256, generator=generator(0)).double() * 0.5 / math.sqrt(share) * math.sqrt(10) / 1258
    radius = torch.linalg.eigvalsh((noise + noise.mT) / 2).abs().max()
    assert float(radius) == pytest.approx(2 * SCATTER_EDGE, rel=0.1)


@pytest.mark.parametrize("norm", [0.0, 0.3, 0.9])
def test_a_center_without_noise_is_the_mean_and_with_much_it_is_nowhere(norm: float) -> None:
    features = point(WIDTH, norm) + 0.2 * torch.randn(500, WIDTH, generator=generator(1))
    features = torch.nn.functional.normalize(features.double(), dim=-1)
    exact = center_sum(features)[None]
    mean, trust = center_of(exact, 0.0, CENTER_COUNTS)
    torch.testing.assert_close(mean[0], features.mean(0))
    assert trust.tolist() == pytest.approx([1])
    chance = torch.randn(200, 1 + WIDTH, generator=generator(2)).double()
    mean, trust = center_of(exact + 1e4 * chance, 1e8, CENTER_COUNTS)
    assert (trust >= 0).all()
    assert float(mean.norm(dim=1).max()) <= MOST_NORM + 1e-9
    # Noise is shrunk by more than half, in the mean.
    counts = (1e4 * chance[:, 0] / CENTER_COUNTS**0.5 + 500).clamp(1)
    told = 1e4 * chance[:, 1:] / (1 - CENTER_COUNTS) ** 0.5 / counts[:, None]
    assert float(mean.norm(dim=1).mean()) < 0.5 * float(told.norm(dim=1).clamp(max=1).mean()) + 0.2


def test_a_known_number_of_examples_takes_the_place_of_its_noisy_count() -> None:
    """Features near their mean vary little around it, so an error of the count would make another spread of them."""
    features = point(WIDTH, 5.0) + torch.randn(400, WIDTH, generator=generator(3))
    exact = center_sum(torch.nn.functional.normalize(features.double(), dim=-1))[None]
    wrong = exact.clone()
    wrong[:, 0] *= 1.1
    noise, expected = 16.0, torch.tensor([400.0])
    mean, trust = center_of(exact, noise, CENTER_COUNTS, expected)
    for with_wrong, right in zip(center_of(wrong, noise, CENTER_COUNTS, expected), (mean, trust), strict=True):
        assert torch.equal(with_wrong, right)
    shorter, _ = center_of(wrong, noise, CENTER_COUNTS)
    assert float(shorter.norm()) == pytest.approx(float(center_of(exact, noise, CENTER_COUNTS)[0].norm()) / 1.1)

    def counted(rate: float, noise: float) -> float:
        """Return the count that was used, by the length of the mean without its shrinkage."""
        found, trusted = center_of(wrong, noise, CENTER_COUNTS, expected, rate)
        return float(exact[0, 1:].norm() / (1 - CENTER_COUNTS) ** 0.5 / (found / trusted[:, None]).norm())

    # A sample's number is as uncertain as sampling makes it: 400 with a variance of 200, beside 440 with one of 160.
    assert counted(0.5, 16.0) == pytest.approx((400 / 200 + 440 / 160) / (1 / 200 + 1 / 160), rel=1e-5)
    assert counted(0.5, 1e-9) == pytest.approx(440, rel=1e-5)
    assert counted(1.0, 1e-9) == pytest.approx(400, rel=1e-5)


def test_features_of_norm_one_alone_do_not_exceed_the_sphere() -> None:
    same = torch.nn.functional.normalize(torch.ones(10, WIDTH).double(), dim=-1)
    mean, trust = center_of(center_sum(same)[None], 0.0, CENTER_COUNTS)
    assert float(mean.norm()) == pytest.approx(MOST_NORM)
    assert trust.tolist() == pytest.approx([MOST_NORM])


def spiked(rank: int = 60, strength: float = 0.08) -> tuple[Tensor, Tensor, float]:
    """A covariance with two directions that stand out."""
    directions = torch.linalg.qr(torch.randn(rank, 2, generator=generator(8)).double())[0]
    base = 0.3 / rank
    spikes = torch.diag(torch.tensor([strength, strength / 2]).double())
    matrix = base * torch.eye(rank).double() + directions @ spikes @ directions.mT
    return matrix, directions, float(matrix.trace()) / rank


def test_without_noise_the_principal_directions_are_those_of_the_scatter() -> None:
    matrix, directions, width = spiked()
    between = 0.05 * torch.outer(point(60, 1.0), point(60, 1.0)).double()
    found = principal(matrix + between, 0.0, between, width)
    own = matrix - width * torch.eye(60).double()
    kept = found.mT @ found
    assert len(found) == 2
    torch.testing.assert_close(kept, directions @ (directions.mT @ own @ directions) @ directions.mT, rtol=0, atol=1e-9)
    assert float(found.pow(2).sum()) <= MOST_SPREAD * 60 * width + 1e-12


def test_noise_has_no_principal_directions() -> None:
    """And where some stand out, they are estimated better than by what is seen."""
    for seed in range(20):
        noise = 0.002 * torch.randn(60, 60, generator=generator(seed)).double()
        noise = (noise + noise.mT) / math.sqrt(2)
        none = principal(0.005 * torch.eye(60).double() + noise, 0.0022, torch.zeros(60, 60).double(), 0.005)
        assert len(none) == 0
        matrix, _, width = spiked()
        found = principal(matrix + noise, 0.002, torch.zeros(60, 60).double(), width)
        assert 1 <= len(found) <= 2
        own = matrix - width * torch.eye(60).double()
        assert (found.mT @ found - own).norm() < 0.7 * noise.norm()


def test_counts_without_noise_are_known() -> None:
    counts = torch.tensor([0.0, 3, 1, 0, 7])
    probability, expected = held(counts, torch.zeros(5), 11)
    assert probability.tolist() == [0, 1, 1, 0, 1]
    assert expected.tolist() == counts.tolist()


def test_counts_with_little_noise_are_nearly_known() -> None:
    counts = torch.tensor([0.0, 30, 0, 30, 0, 0, 0, 0])
    noisy = counts + 0.5 * torch.randn(8, generator=generator(0))
    probability, expected = held(noisy, torch.full((8,), 0.25), 60)
    torch.testing.assert_close(probability, (counts > 0).double(), rtol=0, atol=0.05)
    torch.testing.assert_close(expected, counts.double(), rtol=0, atol=1.5)


@pytest.mark.parametrize("seed", range(4))
def test_counts_that_are_all_noise_tell_nothing(seed: int) -> None:
    """A class is then expected to have its part of the examples, whatever the noise."""
    noise = 1e9 * torch.randn(8, generator=generator(seed), dtype=torch.float64)
    probability, expected = held(noise, torch.full((8,), 1e18), 60)
    torch.testing.assert_close(expected, torch.full((8,), 60 / 8, dtype=torch.float64), rtol=2e-3, atol=0)
    torch.testing.assert_close(probability, probability[:1].expand(8), rtol=1e-6, atol=0)
    again = held(noise, torch.full((8,), 1e18), 60)
    assert torch.equal(again[0], probability)
    assert torch.equal(again[1], expected)


def some_observed(seed: int = 0, deviation: float = 1.0, counts: Tensor | None = None) -> Observed:
    """A party's statistics of five classes around unit directions, with noise."""
    chance = generator(seed)
    counts = torch.tensor([8.0, 0, 5, 20, 1]) if counts is None else counts
    means = 0.6 * torch.nn.functional.normalize(torch.randn(CLASSES, WIDTH, generator=generator(9)), dim=-1)
    sums = counts[:, None] * means + deviation * torch.randn(CLASSES, WIDTH, generator=chance)
    noisy = counts + deviation * torch.randn(CLASSES, generator=chance)
    variance = torch.full((CLASSES,), deviation**2)
    return observed(sums.double(), noisy.double(), variance.double(), variance.double(), float(counts.sum()))


def text() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(CLASSES, WIDTH, generator=generator(3)).double(), dim=-1)


def rearranged(seen: Observed, order: Tensor) -> Observed:
    return Observed(*(getattr(seen, entry.name)[order] for entry in fields(Observed)))


def test_the_order_of_the_classes_does_not_matter() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    counts, variance = torch.tensor([0.3, 9, -2, 4, 1]), torch.full((5,), 2.0)
    for ours, theirs in zip(held(counts[order], variance, 12), held(counts, variance, 12), strict=True):
        torch.testing.assert_close(ours, theirs[order])
    seen = some_observed()
    ours, theirs = shrunk(rearranged(seen, order), text()[order]), shrunk(seen, text())
    torch.testing.assert_close(ours.means, theirs.means[order])
    torch.testing.assert_close(ours.variance, theirs.variance[order])


def test_without_noise_means_are_those_of_the_images() -> None:
    counts = torch.tensor([8.0, 2, 5, 20, 1])
    seen = some_observed(deviation=0.0, counts=counts)
    exact = seen.sums / counts.double()[:, None]
    torch.testing.assert_close(shrunk(seen, text()).means, exact)
    assert float(shrunk(seen, text()).variance.max()) == pytest.approx(0, abs=1e-12)
    others = ClassMeans(exact.flip(0), torch.zeros(CLASSES).double())  # a party that differs from all trusts its own
    torch.testing.assert_close(personal(seen, others).means, exact)


@pytest.mark.parametrize("deviation", [300.0, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_noise_is_large_means_are_the_text_features(deviation: float, seed: int, dtype: torch.dtype) -> None:
    """Their direction, never the opposite, and at the length that is expected of any class."""
    seen = some_observed(seed, deviation)
    seen = Observed(*(getattr(seen, entry.name).to(dtype) for entry in fields(Observed)))
    means = shrunk(seen, text().to(dtype))
    assert (torch.nn.functional.cosine_similarity(means.means.double(), text()) > 0.99).all()
    assert means.means.norm(dim=-1).tolist() == pytest.approx([EXPECTED_PRODUCT] * CLASSES, rel=0.1)
    assert (means.variance * WIDTH <= 1 + 1e-6).all()


@pytest.mark.parametrize("deviation", [0.1, 1.0, 5.0, 100.0])
def test_a_personal_mean_is_between_the_shared_and_its_own(deviation: float) -> None:
    shared = shrunk(some_observed(1, 0.2, torch.full((5,), 40.0)), text())
    own = some_observed(2, deviation)
    result = personal(own, shared)
    observed_means = own.sums / own.expected.clamp(min=1e-3)[:, None]
    whole, part = observed_means - shared.means, result.means - shared.means
    trust = (part * whole).sum(-1) / whole.pow(2).sum(-1)
    torch.testing.assert_close(part, trust[:, None] * whole)
    assert ((trust >= 0) & (trust <= 1)).all()
    assert (trust[own.probability <= 0.5] == 0).all()
    if deviation == 100.0:
        assert part.norm(dim=-1).max() < 0.1


def test_one_party_pooled_is_itself() -> None:
    own = some_observed(0, 0.5, torch.full((5,), 20.0))
    one = pooled(Observed(*(getattr(own, entry.name)[None] for entry in fields(Observed))))
    for entry in fields(Observed):
        torch.testing.assert_close(getattr(one, entry.name), getattr(own, entry.name))


def unit_features(count: int, seed: int) -> Tensor:
    directions = torch.randn(CLASSES, 1, WIDTH, generator=generator(9)).double()
    features = directions + 0.7 * torch.randn(CLASSES, count, WIDTH, generator=generator(seed)).double()
    return torch.nn.functional.normalize(features, dim=-1)


def exactly(features: Tensor) -> Observed:
    """The statistics without noise of features [..., C, n, D]."""
    counts = torch.full(features.shape[:-2], float(features.shape[-2]), dtype=torch.float64)
    none = torch.zeros_like(counts)
    ones = torch.ones_like(counts)
    return Observed(features.sum(-2), counts, none, none, counts, counts.clone(), ones, ones.clone())


def side_by_side(parties: Sequence[Observed]) -> Observed:
    return Observed(*(torch.stack([getattr(each, entry.name) for each in parties]) for entry in fields(Observed)))


@pytest.mark.parametrize("sizes", [(6, 6, 6), (1, 9), (30, 1, 2), (0, 5)])
def test_without_noise_pooled_means_are_those_of_all_examples(sizes: tuple[int, ...]) -> None:
    parties = [unit_features(max(size, 1), seed)[:, :size] for seed, size in enumerate(sizes)]
    everybody, whole = torch.cat(parties, 1), pooled(side_by_side([exactly(each) for each in parties]))
    torch.testing.assert_close(shrunk(whole, text()).means, everybody.mean(1))
    assert whole.examples.tolist() == pytest.approx([sum(sizes)] * CLASSES)
    of_everybody = exactly(everybody)
    assert within(whole, shrunk(whole, text())) == pytest.approx(within(of_everybody, shrunk(of_everybody, text())))


def test_pooled_means_are_the_best_linear_ones() -> None:
    """Weights are by inverse variances: of the noise, and of 1 / r for each image around the mean."""
    sizes, deviations = torch.tensor([2.0, 11.0, 40.0]).double(), torch.tensor([3.0, 0.5, 2.0]).double()
    seen = side_by_side([exactly(unit_features(int(size), seed)) for seed, size in enumerate(sizes)])
    seen = replace(seen, sum_variance=(deviations**2)[:, None].expand(-1, CLASSES))
    whole, precision = pooled(seen), 1 / ((1 / WIDTH) / sizes + (deviations / sizes) ** 2)
    means = seen.sums / sizes[:, None, None]
    best = (precision[:, None, None] * means).sum(0) / precision.sum()
    torch.testing.assert_close(whole.sums / whole.expected[:, None], best)
    assert (whole.sum_variance / whole.expected**2).tolist() == pytest.approx(
        [float((precision**2 * (deviations / sizes) ** 2).sum() / precision.sum() ** 2)] * CLASSES
    )
    assert whole.examples.tolist() == pytest.approx([53.0] * CLASSES)


def test_a_class_that_nobody_holds_adds_little_noise() -> None:
    seen = exactly(torch.stack([unit_features(4, seed) for seed in range(3)]))
    nobody = seen.expected.clone()
    nobody[:, 0] = 1e-9
    whole = pooled(replace(seen, expected=nobody, sum_variance=torch.full_like(nobody, 4.0)))
    assert float(whole.sum_variance[0]) < 1e-9
    assert float(whole.sum_variance[1]) > 1


def test_the_variance_within_classes_is_that_of_the_images() -> None:
    features = unit_features(12, 4)
    seen = exactly(features)
    expected = (features - features.mean(1, keepdim=True)).pow(2).mean()
    assert within(seen, shrunk(seen, text())) == pytest.approx(float(expected), rel=1e-9)


def test_the_variance_within_classes_is_possible_under_any_noise() -> None:
    for deviation in (0.0, 1.0, 1e3, 1e9):
        seen = some_observed(1, deviation)
        assert 0 <= within(seen, shrunk(seen, text())) <= 1 / WIDTH


def some_statistics(clients: int) -> ClassStatistics:
    chance = generator(11)
    counts = 10 * torch.rand(clients, CLASSES, generator=chance) + 1
    probability = torch.rand(clients, CLASSES, generator=chance)
    means = 0.4 * torch.nn.functional.normalize(torch.randn(clients, CLASSES, WIDTH, generator=chance), dim=-1)
    spread = 0.02 * torch.ones(clients)
    return ClassStatistics(counts, 0 * spread, probability, means, 0 * counts, spread, None)


def part(statistics: ClassStatistics, place: int) -> ClassStatistics:
    values = {entry.name: getattr(statistics, entry.name) for entry in fields(ClassStatistics)}
    return ClassStatistics(**{name: value if value is None else value[[place]] for name, value in values.items()})


@pytest.mark.parametrize("certainty", [0.1, 0.5, 0.999])
def test_drawn_examples_are_of_the_classes_that_are_held(certainty: float) -> None:
    statistics = some_statistics(6)
    features, labels, sizes = drawn(statistics, Streams(3, 0, range(6), CPU), certainty)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
    for place, own in enumerate(labels.split(sizes)):
        probability = statistics.probability[place]
        expected = {c for c in range(CLASSES) if probability[c] >= certainty} or {int(probability.argmax())}
        assert set(own.tolist()) == expected
        assert abs(len(own) - EXAMPLES * len(expected)) <= len(expected)  # rounded, class by class


def test_drawn_examples_depend_on_the_seed_and_the_release_alone() -> None:
    statistics = some_statistics(3)
    features, labels, _ = drawn(statistics, Streams(3, 0, range(3), CPU), 0.5)
    again, same, _ = drawn(statistics, Streams(3, 0, range(3), CPU), 0.5)
    assert torch.equal(features, again)
    assert torch.equal(labels, same)
    other, _, _ = drawn(statistics, Streams(4, 0, range(3), CPU), 0.5)
    assert (features - other).abs().min() > 0


def test_a_client_draws_alone_what_it_draws_in_a_stack() -> None:
    statistics = some_statistics(3)
    features, labels, sizes = drawn(statistics, Streams(3, 0, [4, 7, 9], CPU), 0.5)
    parts = zip([4, 7, 9], features.split(sizes), labels.split(sizes), strict=True)
    for place, (client, own, own_labels) in enumerate(parts):
        alone, its_labels, _ = drawn(part(statistics, place), Streams(3, 0, [client], CPU), 0.5)
        assert torch.equal(alone, own)
        assert torch.equal(its_labels, own_labels)


def test_drawn_examples_have_the_means_and_the_spread_of_their_class() -> None:
    """Many clients with one class of one mean: their examples are around it."""
    clients = 200
    mean = 0.4 * torch.nn.functional.one_hot(torch.tensor(0), WIDTH).float()
    ones = torch.ones(clients, 1)
    means = mean.expand(clients, 1, WIDTH)
    statistics = ClassStatistics(ones, ones[:, 0], ones, means, 0 * ones, 0.84 / WIDTH * ones[:, 0], None)
    features, _, _ = drawn(statistics, Streams(0, 0, range(clients), CPU), 0.5)
    assert len(features) == clients * EXAMPLES
    # The norm before normalization is near 1: 0.4^2 + 0.84.
    torch.testing.assert_close(features.mean(0), mean, rtol=0.05, atol=0.02)


def test_estimates_of_means_have_a_shape_whatever_is_held() -> None:
    nobody = some_observed(0, 0.0, torch.zeros(5))
    means = shrunk(nobody, text())
    assert isinstance(means, ClassMeans)
    assert means.means.isfinite().all()


@pytest.mark.parametrize("mechanism", ["statistics", "cotangent"])
def test_directions_of_public_images_go_with_an_epsilon(
    mechanism: str, make_runtime: MakeRuntime, model: PromptModel
) -> None:
    public = torch.randn(30, model.encoder.feature_width, generator=torch.Generator().manual_seed(0)).double()
    privacy = {"mechanism": mechanism, "epsilon": 4.0, "delta": 1e-3, "directions": "images", "subspace": 3}
    rows = [list(range(20)), list(range(20, 40))]
    runtime = make_runtime("promptfl", rows, {"context_length": 4}, privacy=privacy, public=public)
    assert runtime.mechanism.noise_multiplier > 0
    if mechanism == "statistics":
        assert runtime.mechanism.directions.shape == (model.encoder.feature_width, 3)
