"""One example, person or client in or out: what is released moves by at most the bound, and nothing else moves at all.

Over every method that learns, every mechanism that fits it, and everyone who may add the noise, with the noise off.
What is released is recorded where it passes the mechanism: each call for a gradient with its arguments, so that a call
can be made again with one example less and all that was released before as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.states import started_in_double
from sordino.algorithms import METHODS, algorithm, settings_for
from sordino.algorithms.base import Broadcast, ClientState, RoundContext, model_class, named_tensors, take
from sordino.encoders.encode import forward
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy import cotangent
from sordino.privacy.gradients import Batch, Gradient, Parameters, PromptOf
from sordino.privacy.mechanism import WEIGHT, Average, ClientRoundMechanism
from sordino.privacy.settings import PrivacySettings
from sordino.privacy.uploads.secure_mean import ServerSums, sum_parties
from sordino.randomness import Streams
from sordino.runtime.local import LocalRuntime, Training
from sordino.runtime.settings import RuntimeSettings
from sordino.secure import in_process
from sordino.secure.sums.plan import GROWTH

LEARNING = [name for name in METHODS if algorithm(name).ABOUT.trains]
CLIP, PERSONAL_CLIP = 1e-3, 4e-4
# Kernels round otherwise for stacks of other shapes. A sum of a dozen vectors of norm at most the clip, each the result
# of a few thousand float64 operations, of which the worst conditioned loses six digits, is right to this many clips.
ROUNDING = 1e-7

TABLES = {
    "context_length": 3,
    "rank": 2,
    "batch_size": 0,
    "optimizer": {"learning_rate": 0.5},
    "local_learning_rate": 0.5,
    "fedperfix": {"bottleneck": 3, "initial_up": "random"},
    "sgpt": {"groups": 3},
    "fedbpt": {"search_width": 6, "population": 4},
}


def privacy_of(mechanism: str, **more: Any) -> PrivacySettings:
    """Without noise, and with coins that can be tossed again: every test here has its `[privacy]` table from here."""
    fixed = {"noise_multiplier": 0.0, "clip": CLIP, "delta": 1e-3, "simulation": True, "nonce": "0" * 32}
    return PrivacySettings(mechanism=mechanism, **fixed | more)  # type: ignore[arg-type]


def randomness_of(clients: Sequence[int]) -> Streams:
    return Streams(0, 1, clients, torch.device("cpu"))


def fits(name: str, mechanism: str, noise_by: str) -> bool:
    """Whether a method may run with a mechanism, by what the methods say of themselves."""
    about = algorithm(name).ABOUT
    if mechanism == "cotangent":
        return noise_by == "client" and model_class(algorithm(name)).linear and not about.forward_only
    if mechanism == "dp-fedavg":
        return about.server_uses == "mean"
    return noise_by == "client" or bool(about.averages)


EVERY = [
    (name, mechanism, noise_by)
    for name in LEARNING
    for mechanism in ("dp-sgd", "cotangent", "dp-fedavg")
    for noise_by in ("client", "server", "shares")
]
BY_EXAMPLE = [each for each in EVERY if fits(*each) and each[1] != "dp-fedavg"]
BY_CLIENT = [each for each in EVERY if fits(*each) and each[1] == "dp-fedavg"]
REFUSED = [each for each in EVERY if not fits(*each)]


# Examples of every kind, at known rows.

ORDINARY, TWIN, MISLABELED, OUTLIER, ENORMOUS, BEYOND, NOT_A_NUMBER, INFINITE, ONE_BAD_ENTRY = range(1, 10)
ODD = (TWIN, MISLABELED, OUTLIER, ENORMOUS, BEYOND, NOT_A_NUMBER, INFINITE, ONE_BAD_ENTRY)
NOT_FINITE = (NOT_A_NUMBER, INFINITE, ONE_BAD_ENTRY)
FIRST = 10  # how many examples the first client holds: all of these, and row 0


def with_odd_ones(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The table with odd examples among the first client's rows."""
    features, labels = features.clone(), labels.clone()
    features[TWIN], labels[TWIN] = features[ORDINARY], labels[ORDINARY]
    labels[MISLABELED] = (labels[MISLABELED] + 1) % 4
    generator = torch.Generator().manual_seed(7)
    strange = torch.randn(features.shape[1:], generator=generator, dtype=torch.float64)
    features[OUTLIER] = 3 * strange * features[OUTLIER].norm() / strange.norm()
    features[ENORMOUS] *= 1e30
    features[BEYOND] *= 1e200
    features[NOT_A_NUMBER] = math.nan
    features[INFINITE] = math.inf
    features[ONE_BAD_ENTRY].view(-1)[-1] = -math.inf
    return features, labels


@pytest.fixture
def make(
    model: PromptModel, table: tuple[Tensor, Tensor], read: Callable[[Any], Tensor]
) -> Callable[..., LocalRuntime]:
    """A runtime of a method, on a table that `change` made of the forty pictures' one."""

    def of(
        name: str,
        privacy: PrivacySettings,
        rows: Sequence[Sequence[int]],
        change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = with_odd_ones,
        tables: Mapping[str, Any] | None = None,
        persons: Sequence[int] | None = None,
        **runtime: Any,
    ) -> LocalRuntime:
        method = algorithm(name)
        settings = settings_for(name, TABLES | (tables or {}))
        own = model_class(method).of(settings, model.encoder, model.classes)
        visual = getattr(own, "prompts_images", False)
        features = forward(model.encoder, own.reads, read("pixels")) if visual else read(own.reads)
        features, labels = change(features, table[1])
        federation = (rows, 4, RuntimeSettings(**runtime), 0, privacy)
        made = LocalRuntime(method, settings, own, features, labels, *federation, persons=persons)
        # A simulation keys its coins by the data too, so that neighboring runs share none. Here they shall share them.
        made.__dict__["identity"] = "the same for all tables"
        return made

    return of


# What passes the mechanism.


@dataclass(frozen=True)
class Call:
    """One call for a gradient, or for losses of candidates."""

    prompt_of: PromptOf
    parameters: Parameters
    fixed: Parameters
    batch: Batch

    def without(self, client: int, *examples: int) -> Call:
        mask = self.batch.mask.clone()
        mask[client, list(examples)] = False
        return replace(self, batch=replace(self.batch, mask=mask))

    def only(self, client: int, *examples: int) -> Call:
        others = sorted({*range(self.batch.mask.shape[1])} - {*examples})
        return self.without(client, *others)


def watch(
    runtime: LocalRuntime, change: Callable[[Batch], Batch] = lambda batch: batch
) -> tuple[list[Call], list[Any]]:
    """Record a runtime's calls for gradients, and its uploads as they leave, while batches are changed."""
    calls: list[Call] = []
    uploads: list[dict[str, Tensor]] = []
    opened = runtime.mechanism.client_end

    def open_watched(*arguments: Any) -> ClientRoundMechanism:
        mechanism_round = opened(*arguments)
        gradients, protect = mechanism_round.gradients, mechanism_round.protect

        def watched(prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
            batch = change(batch)
            calls.append(Call(prompt_of, dict(parameters), dict(fixed), batch))
            return gradients(prompt_of, parameters, fixed, batch)

        def protected(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            uploads.append(protect(tensors))
            return uploads[-1]

        mechanism_round.gradients, mechanism_round.protect = watched, protected
        return mechanism_round

    object.__setattr__(runtime.mechanism, "client_end", open_watched)
    return calls, uploads


def releaser(runtime: LocalRuntime) -> Callable[[Call], dict[str, Tensor]]:
    """What a call releases of every client, in the unit of the clipped sum; the noise is off, so it can be repeated."""
    clients = list(range(len(runtime.data)))

    def released(call: Call) -> dict[str, Tensor]:
        # A round takes no two gradients of one batch, so each is in a round of its own.
        gradients = runtime.mechanism.client_end(randomness_of(clients), clients).gradients
        assert call.batch.sampling is not None
        expected = call.batch.sampling.expected.double()
        by = gradients(call.prompt_of, call.parameters, call.fixed, call.batch).values
        return {name: value * expected.view(-1, *[1] * (value.ndim - 1)) for name, value in by.items()}

    return released


def norm_of(tensors: Mapping[str, Tensor], client: int, names: Sequence[str]) -> float:
    return math.sqrt(sum(float(tensors[name][client].double().square().sum()) for name in names))


def less(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one[name] - other[name] for name in one}


def steps_of(noise_by: str) -> int:
    """Methods that train two parts in turns need two steps; who averages gradients takes one."""
    return 2 if noise_by == "client" else 1


def example_runtime(make: Callable[..., LocalRuntime], name: str, mechanism: str, noise_by: str) -> LocalRuntime:
    about = algorithm(name).ABOUT
    own = {"personal_clip": PERSONAL_CLIP} if mechanism == "dp-sgd" and about.averages else {}
    rows = [list(range(FIRST)), list(range(FIRST, 18)), list(range(18, 24))]
    tables = {"local_steps": steps_of(noise_by)}
    return make(name, privacy_of(mechanism, noise_by=noise_by, **own), rows, tables=tables)


@pytest.mark.parametrize(("name", "mechanism", "noise_by"), REFUSED)
def test_every_other_combination_is_refused(name: str, mechanism: str, noise_by: str, make: Any) -> None:
    """So that the lists here are all that can be run."""
    weighting = "uniform" if mechanism == "dp-fedavg" else "examples"
    rows = [list(range(8 * k, 8 * k + 8)) for k in range(5)]
    with pytest.raises(ConfigError, match=r"privacy\.(mechanism|noise_by)"):
        make(name, privacy_of(mechanism, noise_by=noise_by), rows, tables={"local_steps": 1}, weighting=weighting)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mechanism", "noise_by"), BY_EXAMPLE)
def test_an_example_moves_what_is_released_by_at_most_the_clip(
    name: str, mechanism: str, noise_by: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a batch releases the sum of what its examples release alone, so none changes what another contributes.

    Of each call in a round with examples of all kinds: other clients' releases are the same to the bit.
    """
    runtime = example_runtime(make, name, mechanism, noise_by)
    calls, _ = watch(runtime)
    runtime.round(started_in_double(runtime))
    assert len(calls) == runtime.mechanism.inputs.steps
    sums: list[Tensor] = []  # what the cotangent mechanism clips and noises
    summed = cotangent.summed_cotangents
    monkeypatch.setattr(cotangent, "summed_cotangents", lambda *given: sums.append(summed(*given)) or sums[-1])
    released = releaser(example_runtime(make, name, mechanism, noise_by))
    shared = set(runtime.mechanism.inputs.shared) if mechanism == "dp-sgd" else set()
    for call in calls:
        everyone = call.batch.mask.shape[1]
        assert everyone == (24 if name == "central" else FIRST)  # all are in the sample, in the order of their rows
        whole, nobody = released(call), released(call.only(0))
        groups = [[n for n in whole if (n in shared) == of_shared] for of_shared in (False, True)]
        alone = [less(released(call.only(0, example)), nobody) for example in range(everyone)]
        for example, moved in enumerate(alone):
            for group, clip in zip(groups, (PERSONAL_CLIP if shared else CLIP, CLIP), strict=True):
                if mechanism == "dp-sgd":
                    assert norm_of(moved, 0, group) <= clip * (1 + ROUNDING)
                if example in NOT_FINITE:
                    assert norm_of(moved, 0, group) == 0.0
        together = {n: sum(each[n] for each in alone) for n in whole}
        assert_close(less(whole, nobody), together)
        for example in ODD:
            rest = released(call.without(0, example))
            assert_close(less(whole, rest), alone[example])
            for tensors in (rest, nobody):
                assert all(torch.equal(tensors[n][1:], whole[n][1:]) for n in whole)
        if mechanism == "cotangent":
            assert_sums_are_bounded(sums, everyone)
            sums.clear()


# Whose the first client's examples are: persons of one kind of examples and of several; everyone else has two each.
OWNERS = [0, 0, 0, 1, 1, 1, 2, 1, 2, 2, *[row // 2 for row in range(FIRST, 40)]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mechanism", "noise_by"), [each for each in BY_EXAMPLE if each[2] == "client"])
def test_a_person_moves_what_is_released_by_at_most_the_clip(
    name: str, mechanism: str, noise_by: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all their examples; and a batch releases the sum of what its persons release alone."""
    rows = [list(range(FIRST)), list(range(FIRST, 18)), list(range(18, 24))]
    shared = set(algorithm(name).ABOUT.averages) if mechanism == "dp-sgd" else set()
    own = {"personal_clip": PERSONAL_CLIP} if shared else {}
    privacy = privacy_of(mechanism, unit="person", **own)
    tables = {"local_steps": steps_of(noise_by)}
    runtime, again = (make(name, privacy, rows, tables=tables, persons=OWNERS) for _ in range(2))
    calls, _ = watch(runtime)
    runtime.round(started_in_double(runtime))
    assert len(calls) == runtime.mechanism.inputs.steps
    sums: list[Tensor] = []  # what the cotangent mechanism clips and noises
    summed = cotangent.summed_cotangents
    monkeypatch.setattr(cotangent, "summed_cotangents", lambda *given: sums.append(summed(*given)) or sums[-1])
    released = releaser(again)
    for call in calls:
        assert call.batch.persons is not None
        owners = call.batch.persons[0].tolist()
        assert len(owners) == (24 if name == "central" else FIRST)
        whole, nobody = released(call), released(call.only(0))
        groups = [[n for n in whole if (n in shared) == of_shared] for of_shared in (False, True)]
        sums.clear()
        for person in sorted(set(owners)):
            places = [place for place, owner in enumerate(owners) if owner == person]
            rest, alone = released(call.without(0, *places)), less(released(call.only(0, *places)), nobody)
            assert_close(less(whole, rest), alone)
            assert all(torch.equal(rest[n][1:], whole[n][1:]) for n in whole)
            for group, clip in zip(groups, (PERSONAL_CLIP if shared else CLIP, CLIP), strict=True):
                if mechanism == "dp-sgd":
                    assert norm_of(less(whole, rest), 0, group) <= clip * (1 + ROUNDING)
        assert all(float(matrix[0].norm()) <= CLIP * (1 + ROUNDING) for matrix in sums[1::2])  # each person alone


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    for name in one:
        torch.testing.assert_close(one[name][0], other[name][0], rtol=0, atol=ROUNDING * CLIP)


def assert_sums_are_bounded(sums: Sequence[Tensor], examples: int) -> None:
    """Of a whole batch, of nobody, and of each example alone: matrices [K, C, r]."""
    whole, nobody, *rest = sums
    alone = rest[:examples]
    assert not nobody[0].any()
    for example, matrix in enumerate(alone):
        assert float(matrix[0].norm()) <= CLIP * (1 + ROUNDING)
        assert example not in NOT_FINITE or not matrix[0].any()
        assert torch.equal(matrix[1:], whole[1:])
    torch.testing.assert_close(whole[0], sum(matrix[0] for matrix in alone), rtol=0, atol=ROUNDING * CLIP)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mechanism", "noise_by"), BY_EXAMPLE)
def test_an_example_changes_nothing_of_anybody_elses(name: str, mechanism: str, noise_by: str, make: Any) -> None:
    """A round with and without one of a client's examples: the others' states and uploads are the same to the bit."""

    def after(without: Sequence[int]) -> tuple[Training, dict[str, Tensor]]:
        def dropped(batch: Batch) -> Batch:
            mask = batch.mask.clone()
            mask[0, list(without)] = False
            return replace(batch, mask=mask)

        runtime = example_runtime(make, name, mechanism, noise_by)
        _, uploads = watch(runtime, dropped)
        training, record = runtime.round(started_in_double(runtime))
        assert record.participants == len(runtime.data)
        return training, uploads[0]

    if name == "central":
        pytest.skip("there is nobody else")
    (training, upload), others = after(ODD), slice(1, None)
    moved = 0.0
    for example in ([*ODD[1:]], [OUTLIER], [ENORMOUS], [NOT_A_NUMBER], [INFINITE], []):
        other, sent = after(example)
        for name_of, tensor in (*named_tensors(training.clients).items(), *upload.items()):
            its = sent[name_of] if name_of in upload else named_tensors(other.clients)[name_of]
            assert torch.equal(its[others], tensor[others])
            moved = max(moved, float((its[:1] - tensor[:1]).abs().max()))
    assert moved > 0  # its own did change: that nothing moved is no accident


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mechanism", "noise_by"), BY_EXAMPLE)
def test_what_an_example_shows_decides_over_no_coin(name: str, mechanism: str, noise_by: str, make: Any) -> None:
    """Batches of about half of the examples: with another content of one of them, all else of all batches is equal."""
    if noise_by != "client":
        pytest.skip("who adds the noise plays no part in sampling")

    def changed(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features, labels = features.clone(), labels.clone()
        features[3], labels[3] = math.nan, (labels[3] + 1) % 4
        return features, labels

    def drawn(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[Call]:
        tables = {"local_steps": 7, "batch_size": 6}
        rows = [list(range(FIRST)), list(range(FIRST, 19)), list(range(19, 24))]
        runtime = make(name, privacy_of(mechanism), rows, change, tables)
        calls, _ = watch(runtime)
        runtime.round(started_in_double(runtime))
        return calls

    plain, odd = drawn(lambda *table: table), drawn(changed)
    seen = 0
    for before, after in zip(plain, odd, strict=True):
        assert torch.equal(before.batch.mask, after.batch.mask)
        assert before.batch.sampling is not None
        assert after.batch.sampling is not None
        assert torch.equal(before.batch.sampling.rate, after.batch.sampling.rate)
        assert torch.equal(before.batch.sampling.expected, after.batch.sampling.expected)
        here = after.batch.features.isnan().flatten(2).all(-1) & after.batch.mask
        seen += int(here.sum())
        rest = after.batch.mask & ~here
        assert torch.equal(before.batch.features[rest], after.batch.features[rest])
        assert torch.equal(before.batch.labels[rest], after.batch.labels[rest])
    assert seen  # by chance of the coins it could be in none


def patches_alike(odd: int, spread: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images whose patches are near each other, so that their plans are found at once; and one that takes long."""

    def change(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(9)
        center = torch.randn(1, 1, features.shape[-1], generator=generator, dtype=torch.float64)
        noise = spread * torch.randn(features.shape, generator=generator, dtype=torch.float64)
        features = torch.nn.functional.normalize(center + noise, dim=-1)
        strange = torch.randn(features.shape[1:], generator=generator, dtype=torch.float64)
        features[odd] = torch.nn.functional.normalize(strange, dim=-1)
        return features, torch.where(torch.arange(len(labels)) == odd, 2, 1)

    return change


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.8])
def test_an_image_does_not_decide_how_far_other_images_plans_converge(spread: float, make: Any) -> None:
    """FedOTP under DP-SGD: where the iterations end for all at once, this image moves the sum by up to 1.01 clips."""
    runtime = make("fedotp", privacy_of("dp-sgd"), [list(range(12))], patches_alike(0, spread), {"local_steps": 1})
    calls, _ = watch(runtime)
    runtime.round(started_in_double(runtime))
    released = releaser(make("fedotp", privacy_of("dp-sgd"), [list(range(12))], patches_alike(0, spread)))
    whole, rest, alone = released(calls[0]), released(calls[0].without(0, 0)), released(calls[0].only(0, 0))
    assert_close(less(whole, rest), alone)
    assert norm_of(alone, 0, list(alone)) <= CLIP * (1 + ROUNDING)


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.8])
def test_a_client_does_not_decide_how_far_other_clients_plans_converge(spread: float, make: Any) -> None:
    """FedOTP under DP-FedAvg, or none: clients in one stack, of which one has the image that takes long."""
    rows = [list(range(10)), list(range(10, 20)), list(range(20, 30)), list(range(30, 40))]
    privacy, tables = privacy_of("dp-fedavg"), {"local_steps": 2}
    runtime = make("fedotp", privacy, rows, patches_alike(35, spread), tables, weighting="uniform")
    training = started_in_double(runtime)
    _, before, states = sent_by(runtime, training, [0, 1, 2])
    _, after, all_states = sent_by(runtime, training, [0, 1, 2, 3])
    torch.testing.assert_close(after["change"][:3], before["change"], rtol=0, atol=ROUNDING * CLIP)
    torch.testing.assert_close(all_states.context[:3], states.context, rtol=1e-9, atol=1e-9)


# Clients.


def newcomers() -> Iterator[tuple[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], list[int]]]:
    """(Name, what is done to the table, rows of a fourth client): rows from 30 on are nobody else's."""

    def at(features: Tensor, labels: Tensor, value: float, rows: slice) -> tuple[Tensor, Tensor]:
        features = features.clone()
        features[rows] = features[rows] * value
        return features, labels

    yield "ordinary", lambda f, y: (f, y), list(range(30, 40))
    yield "larger than all others", lambda f, y: (f, y), [*range(30, 40)] * 2
    yield "one example", lambda f, y: (f, y), [30]
    yield "mislabeled", lambda f, y: (f, torch.where(torch.arange(40) < 30, y, (y + 1) % 4)), list(range(30, 40))
    yield "one image not a number", lambda f, y: at(f, y, math.nan, slice(33, 34)), list(range(30, 40))
    yield "no image a number", lambda f, y: at(f, y, math.nan, slice(30, 40)), list(range(30, 40))
    yield "infinite", lambda f, y: at(f, y, math.inf, slice(30, 36)), list(range(30, 40))
    yield "enormous", lambda f, y: at(f, y, 1e30, slice(30, 36)), list(range(30, 40))
    yield "beyond", lambda f, y: at(f, y, 1e200, slice(30, 36)), list(range(30, 40))


def sent_by(
    runtime: LocalRuntime, training: Training, clients: list[int]
) -> tuple[ClientRoundMechanism, dict[str, Tensor], Any]:
    """What these clients send in a round, as it leaves them, and their states."""
    chosen, module, number = torch.tensor(clients), runtime.algorithm, 1
    streams = Streams(0, number, clients, torch.device("cpu"))
    data = replace(
        runtime.data,
        rows=runtime.data.rows[chosen],
        counts=runtime.data.counts[chosen],
        weights=runtime.data.weights[chosen],
    )
    clip = runtime.mechanism.initial_state().get("clip")
    mechanism_round = runtime.mechanism.client_end(streams, clients, clip)
    told: Broadcast = module.broadcast(training.server)
    state: ClientState = take(training.clients, chosen)
    round_context = RoundContext(number, 4, streams)
    upload, state = module.client_round(runtime.settings, told, state, data, mechanism_round.gradients, round_context)
    return mechanism_round, mechanism_round.protect(named_tensors(upload)), state


def average_at_the_server(
    runtime: LocalRuntime, at_clients: ClientRoundMechanism, sent: dict[str, Tensor], clients: list[int]
) -> Average:
    """The server's mean of what these clients sent, by a secure sum where that is how it is made."""
    mechanism, randomness, sums = runtime.mechanism, randomness_of(clients), None
    if mechanism.sums_securely:
        session, count = "ab" * 16, len(clients)
        parties = sum_parties(runtime.privacy, at_clients.summed, randomness, session, range(count), count)
        fields = {name: tensor[:1] for name, tensor in sent.items() if name != WEIGHT}
        sums = ServerSums(runtime.privacy, session, count, in_process(parties), fields)
    server = mechanism.server_end(randomness, clients, mechanism.initial_state(), sums)
    server.releases.extend(mechanism.entered(clients, []))
    return server.average


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mechanism", "noise_by"), BY_CLIENT)
def test_a_client_moves_the_sum_by_at_most_the_clip_and_nothing_else(
    name: str, mechanism: str, noise_by: str, make: Any
) -> None:
    """Whatever it holds. The others' uploads, bits and states stay as they are, to rounding."""
    for kind, change, held in newcomers():
        rows = [list(range(9)), list(range(9, 20)), list(range(20, 30)), held]
        adaptive = {"clip_quantile": 0.5}
        tables = {"local_steps": 2, "batch_size": 6}
        privacy = privacy_of(mechanism, noise_by=noise_by, **adaptive)
        runtime = make(name, privacy, rows, change, tables, weighting="uniform")
        training = started_in_double(runtime)
        fewer, before, states = sent_by(runtime, training, [0, 1, 2])
        mechanism_round, after, all_states = sent_by(runtime, training, [0, 1, 2, 3])
        learned = [name for name in before if name != WEIGHT]
        three = average_at_the_server(runtime, fewer, before, [0, 1, 2])
        all_four = average_at_the_server(runtime, mechanism_round, after, [0, 1, 2, 3])
        assert norm_of(after, 3, learned) <= CLIP * (1 + ROUNDING), kind
        for key in learned:
            torch.testing.assert_close(after[key][:3], before[key], rtol=0, atol=ROUNDING * CLIP)
            # With the divisor of the larger federation, the mean moves by the newcomer's upload over it.
            many, few = (
                average(key, sent[key], sent[WEIGHT]) for average, sent in ((all_four, after), (three, before))
            )
            moved = many * 4 - few * 3
            # A secure sum rounds each vector to steps, by GROWTH of the clip at most, and is charged for it.
            rounded = 7 * (GROWTH if noise_by == "shares" else ROUNDING)
            torch.testing.assert_close(moved, after[key][3], rtol=0, atol=rounded * CLIP)
        for key, tensor in named_tensors(states).items():
            torch.testing.assert_close(named_tensors(all_states)[key][:3], tensor, rtol=1e-9, atol=1e-9)
        assert mechanism_round.below_clip is not None
        assert fewer.below_clip is not None
        assert torch.equal(mechanism_round.below_clip[:3], fewer.below_clip)
        assert abs(float(mechanism_round.below_clip[3])) == 0.5
