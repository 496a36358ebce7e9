"""Aggregations against scipy and numpy, what attackers can do to each, and where they are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sordino.algorithms import METHODS, algorithm, base, promptfl
from sordino.algorithms.base import RoundContext, Uploads, named_tensors
from sordino.errors import ConfigError, RunError
from sordino.privacy.mechanism import plain_mean
from sordino.privacy.settings import PrivacySettings
from sordino.randomness import Streams
from sordino.runtime import aggregation
from sordino.runtime.aggregation import aggregated, bounded, median, trimmed_mean
from sordino.runtime.facts import participants
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings

MakeRuntime = Callable[..., LocalRuntime]
Tensors = dict[str, Tensor]
ROWS = [list(range(8 * k, 8 * k + 8)) for k in range(5)]
TABLES = {"context_length": 3, "local_steps": 1, "batch_size": 0, "rank": 2}
ROBUST = ["trimmed-mean", "median", "norm-bound"]


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, 2, 3]
    other: Tensor  # [K, 4]
    weight: Tensor  # [K]


def upload_of(clients: int, seed: int = 0) -> Upload:
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(clients, *shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (4,))]
    return Upload(*numbers, torch.rand(clients, generator=generator, dtype=torch.float64) + 0.1)


def mean_of(settings: RuntimeSettings, upload: Upload, name: str = "change") -> Tensor:
    return aggregated(settings, upload, plain_mean).mean(name)


def settings_of(kind: str, **values: float) -> RuntimeSettings:
    return RuntimeSettings(aggregation=kind, **({"trim": 0.25, "norm_bound": 0.5} | values))  # type: ignore[arg-type]


clients_and_seed = given(st.integers(1, 12), st.integers(0, 1000))


@clients_and_seed
def test_the_median_is_numpys(clients: int, seed: int) -> None:
    values = upload_of(clients, seed).change
    np.testing.assert_allclose(median(values).numpy(), np.median(values.numpy(), axis=0), rtol=1e-14)


@given(st.integers(1, 12), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.4, 0.49]))
def test_the_trimmed_mean_is_scipys(clients: int, seed: int, trim: float) -> None:
    values = upload_of(clients, seed).change
    expected = scipy.stats.trim_mean(values.numpy(), trim, axis=0)
    np.testing.assert_allclose(trimmed_mean(values, trim).numpy(), expected, rtol=1e-12, atol=1e-15)


def test_a_fraction_that_is_a_whole_number_of_clients_cuts_that_many() -> None:
    """0.29 * 100 is a little below 29 in floating point."""
    values = torch.zeros(100, 1)
    values[:29] = -1e6
    assert trimmed_mean(values, 0.29) == 0


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 100])
def test_a_trimmed_mean_leaves_somebody(clients: int) -> None:
    """Nearly a half is cut at each end, and rounding does not make it a half: the median is what is left."""
    values = upload_of(clients).change
    torch.testing.assert_close(trimmed_mean(values, 0.5 - 1e-12), median(values))


@clients_and_seed
def test_without_trimming_it_is_the_mean_of_clients_that_count_the_same(clients: int, seed: int) -> None:
    upload = upload_of(clients, seed)
    alike = plain_mean("change", upload.change, torch.ones(clients))
    torch.testing.assert_close(mean_of(settings_of("trimmed-mean", trim=0.0), upload), alike)


@clients_and_seed
def test_a_bound_that_nobody_reaches_changes_nothing(clients: int, seed: int) -> None:
    upload = upload_of(clients, seed)
    torch.testing.assert_close(
        mean_of(settings_of("norm-bound", norm_bound=1e6), upload), mean_of(RuntimeSettings(), upload), rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", ["mean", *ROBUST])
@clients_and_seed
def test_the_order_of_clients_does_not_matter(kind: str, clients: int, seed: int) -> None:
    upload = upload_of(clients, seed)
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(seed))
    for name in ("change", "other"):
        torch.testing.assert_close(
            mean_of(settings_of(kind), base.take(upload, order), name), mean_of(settings_of(kind), upload, name)
        )


OUTLIERS = st.sampled_from([1e30, -1e30, float("inf"), float("-inf"), float("nan")])


@given(st.integers(1, 12), st.integers(0, 1000), st.lists(OUTLIERS, min_size=1, max_size=6))
def test_fewer_than_half_of_the_clients_leave_the_median_among_the_others(
    clients: int, seed: int, outliers: list[float]
) -> None:
    values = upload_of(clients, seed).change
    attackers = min(len(outliers), (clients - 1) // 2)
    for client, outlier in enumerate(outliers[:attackers]):
        values[client] = outlier
    honest = values[attackers:]
    found = median(values)
    assert bool(((found >= honest.amin(0)) & (found <= honest.amax(0))).all())


@given(st.integers(3, 12), st.integers(0, 1000), st.lists(OUTLIERS, min_size=6, max_size=6))
def test_as_many_attackers_as_are_cut_leave_the_trimmed_mean_among_the_others(
    clients: int, seed: int, outliers: list[float]
) -> None:
    values, trim = upload_of(clients, seed).change, 0.34
    attackers = int(trim * clients)
    for client, outlier in enumerate(outliers[:attackers]):
        values[client] = outlier
    honest, found = values[attackers:], trimmed_mean(values, trim)
    assert bool(((found >= honest.amin(0) - 1e-12) & (found <= honest.amax(0) + 1e-12)).all())


@given(st.integers(2, 12), st.integers(0, 1000), st.floats(1e-3, 1e3), OUTLIERS | st.floats(-1e6, 1e6))
def test_a_client_moves_the_bounded_mean_by_its_share_of_the_bound_at_most(
    clients: int, seed: int, bound: float, value: float
) -> None:
    """All fields together, compared with a client that sends zeros."""
    upload, settings = upload_of(clients, seed), settings_of("norm-bound", norm_bound=bound)
    share = float(upload.weight[0] / upload.weight.sum())
    for tensor in (upload.change, upload.other):
        tensor[0] = 0.0
    silent = [mean_of(settings, upload, name) for name in ("change", "other")]
    for tensor in (upload.change, upload.other):
        tensor[0] = value
    moved = [mean_of(settings, upload, name) - at for name, at in zip(("change", "other"), silent, strict=True)]
    assert float(torch.cat([each.flatten() for each in moved]).norm()) <= bound * share * (1 + 1e-9)


@given(st.integers(1, 12), st.integers(0, 1000), st.floats(0.5, 6))
def test_the_bounded_mean_is_numpys(clients: int, seed: int, bound: float) -> None:
    """Norms are about 3 over both fields, so that some uploads are shortened and some are not."""
    upload = upload_of(clients, seed)
    expected = by_hand("norm-bound", named_tensors(upload), 0.0, bound)
    for name in ("change", "other"):
        found = mean_of(settings_of("norm-bound", norm_bound=bound), upload, name)
        torch.testing.assert_close(found, expected(name), rtol=1e-12, atol=1e-14)


def test_the_bound_leaves_weights_and_directions_alone() -> None:
    upload = upload_of(4)
    short = bounded(upload, 0.1)
    assert torch.equal(short.weight, upload.weight)
    for client in range(4):
        whole, cut = (torch.cat([u.change[client].flatten(), u.other[client]]) for u in (upload, short))
        assert float(cut.norm()) == pytest.approx(0.1)
        assert float(torch.nn.functional.cosine_similarity(whole, cut, dim=0)) == pytest.approx(1)


# --- in a runtime ----------------------------------------------------------------------------------------------------


def joint_norms(sent: Tensors) -> Tensor:
    """Of each client's whole upload, [K]."""
    return torch.cat([tensor.flatten(1).double() for name, tensor in sent.items() if name != "weight"], 1).norm(dim=1)


def by_hand(kind: str, sent: Tensors, trim: float, bound: float) -> Callable[[str], Tensor]:
    """A field to its aggregate over clients, by numpy and scipy; `sent` is what the server got."""

    def aggregate(name: str) -> Tensor:
        values = sent[name].double().numpy()
        if kind == "median":
            return torch.from_numpy(np.median(values, axis=0))
        if kind == "trimmed-mean":
            return torch.from_numpy(scipy.stats.trim_mean(values, trim, axis=0))
        factors = np.minimum(1, bound / joint_norms(sent).numpy()).reshape(-1, *[1] * (values.ndim - 1))
        return torch.from_numpy(np.average(values * factors, axis=0, weights=sent["weight"].double().numpy()))

    return aggregate


def wiretapped(runtime: LocalRuntime) -> list[Uploads[base.Upload]]:
    """What the server of a runtime is given from now on."""
    heard, module = list[Uploads[base.Upload]](), runtime.algorithm

    def server_round(
        settings: object, server: object, uploads: Uploads[base.Upload], round_context: RoundContext
    ) -> object:
        heard.append(uploads)
        return module.server_round(settings, server, uploads, round_context)

    runtime.algorithm = SimpleNamespace(**vars(module) | {"server_round": server_round})  # type: ignore[assignment]
    return heard


UNEQUAL = [list(range(0, 3)), list(range(3, 12)), list(range(12, 20)), list(range(20, 34)), list(range(34, 40))]
MEANS = [name for name in METHODS if algorithm(name).ABOUT.server_uses == "mean" and algorithm(name).ABOUT.trains]


@pytest.mark.parametrize("kind", ROBUST)
@pytest.mark.parametrize("name", MEANS)
def test_every_field_of_every_method_is_aggregated(name: str, kind: str, make_runtime: MakeRuntime) -> None:
    """A round ends where the method's server, given aggregates that numpy and scipy computed, ends.

    Clients differ in size, one of five stays away, and two attack.
    """
    server = {"name": "adam", "learning_rate": 0.1}
    tables = TABLES | {"local_steps": 2, "optimizer": {"learning_rate": 0.5}, "promptfl": {"server_optimizer": server}}
    plain = make_runtime(name, UNEQUAL, tables, participation=0.8)
    plain.boosts = {0: 10.0, 3: 10.0}
    heard, start = wiretapped(plain), plain.start()
    plain.round(start)
    upload = heard[0].each
    sent = named_tensors(upload)
    bound = float(joint_norms(sent).mean())  # some are above it, some are not
    aggregate = by_hand(kind, sent, 0.25, bound)
    for field in sent.keys() - {"weight"}:
        assert not torch.allclose(aggregate(field).to(sent[field]), heard[0].mean(field)), "it matters what is done"
    uploads = Uploads(upload, lambda field, values, weights: aggregate(field).to(values))
    round_context = RoundContext(1, plain.rounds, Streams(0, 1, [], torch.device("cpu")))
    expected = named_tensors(plain.algorithm.server_round(plain.settings, start.server, uploads, round_context))
    values = {"aggregation": kind, "trim": 0.25, "norm_bound": bound}
    robust = make_runtime(name, UNEQUAL, tables, participation=0.8, **values)
    robust.boosts = plain.boosts
    after = named_tensors(robust.round(start)[0].server)
    assert len(sent["weight"]) == 4
    assert after.keys() == expected.keys()
    for field, tensor in after.items():
        torch.testing.assert_close(tensor, expected[field].to(tensor), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ROBUST)
def test_what_is_not_finite_stops_a_mean_but_no_robust_aggregation(kind: str, make_runtime: MakeRuntime) -> None:
    mean = make_runtime("promptfl", ROWS, TABLES)
    robust = make_runtime("promptfl", ROWS, TABLES, aggregation=kind, trim=0.4, norm_bound=0.1)
    mean.boosts = robust.boosts = {0: float("inf"), 1: float("nan")}
    start = mean.start()
    with pytest.raises(RunError, match="diverged"):
        mean.round(start)
    moved = robust.round(start)[0].server.context - start.server.context  # type: ignore[attr-defined]
    assert 0 < float(moved.norm()) < 0.1


def test_a_boost_is_what_a_mean_cannot_bear(make_runtime: MakeRuntime) -> None:
    """Model replacement: the mean moves by the attacker's change times its boost over the number of clients."""
    quiet, loud = (make_runtime("promptfl", ROWS, TABLES, weighting="uniform") for _ in range(2))
    alone = make_runtime("promptfl", ROWS[:1], TABLES)
    loud.boosts = {0: 11.0}
    start = quiet.start()
    at, boosted, own = (r.round(start)[0].server.context for r in (quiet, loud, alone))  # type: ignore[attr-defined]
    torch.testing.assert_close(boosted - at, 10 * (own - start.server.context) / 5)  # type: ignore[attr-defined]


def test_attackers_attack_in_the_rounds_that_they_take_part_in(make_runtime: MakeRuntime) -> None:
    present = set(participants(0, 1, len(ROWS), 0.4).tolist())
    quiet, away, there = (make_runtime("promptfl", ROWS, TABLES, participation=0.4) for _ in range(3))
    away.boosts = {client: 1e3 for client in range(len(ROWS)) if client not in present}
    there.boosts = {max(present): 1e3}
    start = quiet.start()
    contexts = [r.round(start)[0].server.context for r in (quiet, away, there)]  # type: ignore[attr-defined]
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.equal(contexts[0], contexts[2])


@pytest.mark.parametrize("kind", ROBUST)
@pytest.mark.parametrize("adaptive", [{}, {"clip_quantile": 0.5}], ids=["fixed clip", "adaptive clip"])
def test_noise_that_clients_add_themselves_can_be_aggregated_as_one_likes(
    adaptive: dict[str, float], kind: str, make_runtime: MakeRuntime
) -> None:
    """Clients clip and noise, and the server aggregates what it got; what is released does not depend on how."""
    privacy = {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "clip": 0.1, "simulation": True} | adaptive
    common = {"weighting": "uniform", "privacy": privacy, "norm_bound": 0.05, "trim": 0.2}
    mean, robust = (make_runtime("fedprompt", ROWS, TABLES, aggregation=each, **common) for each in ("mean", kind))
    mean.boosts = robust.boosts = {0: 100.0}
    robust.nonce, robust.identity = mean.nonce, mean.identity  # so that both draw the same noise
    heard, start = wiretapped(mean), mean.start()
    (reference, record), (after, other_record) = mean.round(start), robust.round(start)
    sent = named_tensors(heard[0].each)
    assert float(joint_norms(sent).min()) > 0.05, "noise alone is louder than the bound"
    moved = [each.server.context - start.server.context for each in (reference, after)]  # type: ignore[attr-defined]
    torch.testing.assert_close(moved[0], sent["change"].mean(0), rtol=1e-5, atol=1e-7)
    expected = by_hand(kind, sent, 0.2, 0.05)("change").to(moved[1])
    torch.testing.assert_close(moved[1], expected, rtol=1e-5, atol=1e-7)
    assert after.ledger == reference.ledger
    assert after.mechanism == reference.mechanism, "an adaptive clip follows the clients' bits alone"
    assert other_record.upload_bytes == record.upload_bytes


def test_a_boost_does_not_pass_the_clip(make_runtime: MakeRuntime) -> None:
    privacy = {"mechanism": "dp-fedavg", "noise_multiplier": 0.0, "clip": 1e-3}
    runtime = make_runtime("fedprompt", ROWS, TABLES, weighting="uniform", privacy=privacy)
    runtime.boosts, heard = {0: 1e3}, wiretapped(runtime)
    runtime.round(runtime.start())
    assert joint_norms(named_tensors(heard[0].each)).tolist() == pytest.approx([1e-3] * 5, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("local", {}, "runtime.aggregation = 'median': this method sends nothing to be averaged; use 'mean'"),
        ("zero-shot", {}, "runtime.aggregation = 'median': this method sends nothing"),
        ("central", {"aggregation": "norm-bound", "norm_bound": 1.0}, "'norm-bound': this method sends nothing"),
        ("pfedpg", {}, "runtime.aggregation = 'median': this method looks at each upload by itself; use 'mean'"),
        ("promptfl", {"aggregation": "norm-bound"}, "runtime.norm_bound = None: .*needs it; give the largest norm"),
        (
            "promptfl",
            {"aggregation": "trimmed-mean", "trim": 0.1},
            "runtime.trim = 0.1: cuts nobody of 5 .* 0.2 or more",
        ),
        (
            "promptfl",
            {"aggregation": "trimmed-mean", "trim": 0.49, "participation": 0.4},
            "runtime.aggregation = 'trimmed-mean': 2 of the clients .* have 3 or more by .*, or use 'mean'",
        ),
        ("promptfl", {"participation": 0.1}, "runtime.aggregation = 'median': 1 of the clients .* too few"),
        (
            "promptfl",
            {"privacy": {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "noise_by": "server"}},
            "runtime.aggregation = 'median': with privacy.noise_by = 'server' .*noise_by = 'client'",
        ),
        (
            "dp-fpl",
            {"privacy": {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "noise_by": "shares"}},
            "runtime.aggregation = 'median': with privacy.noise_by = 'shares'",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    name: str, values: dict[str, object], message: str, make_runtime: MakeRuntime
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_runtime(name, ROWS, TABLES, **({"aggregation": "median", "weighting": "uniform"} | values))


@pytest.mark.parametrize("clients", [3, 4, 5, 7, 10, 31, 999, 1500])
def test_the_trim_that_a_message_names_cuts_somebody(clients: int) -> None:
    def check(trim: float) -> None:
        aggregation.check(settings_of("trimmed-mean", trim=trim), PrivacySettings(), promptfl.ABOUT, clients)

    with pytest.raises(ConfigError, match="cuts nobody") as caught:
        check(1e-5)
    named = re.search(r"give (\S+) or more", str(caught.value))
    assert named is not None
    check(float(named[1]))


@pytest.mark.parametrize("noise_by", ["client", "server", "shares"])
def test_a_boost_does_not_undo_the_clip_of_examples(noise_by: str, make_runtime: MakeRuntime) -> None:
    """Where a sum is noised, it would multiply what one example of the attacker's moves it by."""
    tables = {"context_length": 3, "rank": 2, "batch_size": 0, "local_steps": 1}
    privacy = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "noise_by": noise_by}

    def build(boost: float) -> None:
        make_runtime("dp-fpl", ROWS, tables, privacy=privacy, boosts={0: boost})

    build(1.0)
    if noise_by == "client":
        build(50.0)
    else:
        with pytest.raises(ConfigError, match="poisoning.boost"):
            build(50.0)
