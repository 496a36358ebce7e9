"""SecFPP: what it is on shares and in the clear, before and after clusters are found, and what may go wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.states import started_in_double, with_states
from sordino import secure
from sordino.algorithms import algorithm, secfpp, secfpp_plain
from sordino.algorithms.base import ClientData, RoundContext, named_tensors
from sordino.errors import ConfigError
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.privacy.sampling import PoissonSampler
from sordino.randomness import Streams
from sordino.runtime import checkpoint
from sordino.runtime.facts import participants
from sordino.runtime.local import LocalRuntime, Training

MakeRuntime = Callable[..., LocalRuntime]

# Six clients, three with the first two classes and three with the others, as examples go by class modulo four.
TWO_KINDS = [[4 * i + c for i in range(k, 10, 3) for c in classes] for classes in ((0, 1), (2, 3)) for k in range(3)]
TABLES: dict[str, Any] = {
    "context_length": 4,
    "batch_size": 0,
    "local_steps": 2,
    "optimizer": {"name": "adam", "learning_rate": 0.05},
    "secfpp": {"cluster_every": 2, "clusters": 2},
}
ADAPTIVE = {"secfpp": {"cluster_every": 2}}


def trained(runtime: LocalRuntime, rounds: int | None = None) -> Training:
    training = runtime.start()
    while training.round < (rounds or runtime.rounds):
        training, _ = runtime.round(training)
    return training


def clock_of(runtime: LocalRuntime, number: int) -> RoundContext:
    streams = Streams(0, number, range(len(runtime.data)), torch.device("cpu"))
    return RoundContext(number, runtime.rounds, streams, len(runtime.data))


def test_on_shares_as_in_the_clear(make_runtime: MakeRuntime) -> None:
    """The same clusters every round; the same prompts, up to what a round quantizes means by."""
    shared, plain = (make_runtime(name, TWO_KINDS, TABLES | ADAPTIVE, rounds=6) for name in ("secfpp", "secfpp-plain"))
    one, other = shared.start(), plain.start()
    seen = set()
    for _ in range(6):
        one, record = shared.round(one)
        other, reference = plain.round(other)
        assert record.clusters == reference.clusters
        seen.add(tuple(record.clusters or ()))
        for key, tensor in named_tensors(one.clients).items():
            torch.testing.assert_close(named_tensors(other.clients)[key], tensor, rtol=0, atol=1e-5)
        torch.testing.assert_close(shared.prompts(one), plain.prompts(other), rtol=0, atol=1e-5)
    assert (0, 0, 0, 1, 1, 1) in seen


def test_alone_before_the_first_clustering(make_runtime: MakeRuntime) -> None:
    """Then a client's whole context is a local one: with balanced batches off, that of `local` from the same start."""
    tables = TABLES | {"secfpp": {"cluster_every": 7, "balanced": False}}
    runtime, local = make_runtime("secfpp", TWO_KINDS, tables), make_runtime("local", TWO_KINDS, tables)
    alone = local.start()
    start = runtime.start()
    alone = with_states(alone, clients=replace(alone.clients, context=start.clients.domain))  # type: ignore[attr-defined, call-arg]
    for _ in range(6):
        start, record = runtime.round(start)
        alone, _ = local.round(alone)
        assert record.clusters == [secure.NOBODY] * 6
        torch.testing.assert_close(runtime.prompts(start), local.prompts(alone), rtol=0, atol=0)


def test_clients_of_a_cluster_share_its_mean(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("secfpp", TWO_KINDS, TABLES)
    training = trained(runtime, 3)
    before = training.clients.domain  # type: ignore[attr-defined]
    server = training.server
    for members in (slice(0, 3), slice(3, 6)):
        mean = before[members].mean(0)
        for context in server.contexts[members]:  # type: ignore[attr-defined]
            torch.testing.assert_close(context, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        runtime.prompts(training),
        server.contexts + training.clients.personal,  # type: ignore[attr-defined]
        rtol=0,
        atol=0,
    )


def vanishing(drop: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have clients vanish from the protocol, each from an exchange of the round on."""
    whole = secfpp.server_exchange

    def server_exchange(*given: Any) -> secure.SharedExchange:
        *first, carrier = given
        exchanges = 0

        def carry(messages: Mapping[int, bytes]) -> list[tuple[int, bytes | secure.Refusal]]:
            nonlocal exchanges
            exchanges += 1
            reached = {client: content for client, content in messages.items() if exchanges < drop.get(client, 99)}
            return list(carrier(reached))

        return whole(*first, carry)

    monkeypatch.setattr(secfpp, "server_exchange", server_exchange)


def test_a_cluster_below_the_minimum_is_not_opened(make_runtime: MakeRuntime) -> None:
    """Its clients keep their own domain-level parts."""
    runtime = make_runtime("secfpp", TWO_KINDS, TABLES)
    training = trained(runtime, 2)
    labels = torch.tensor([0.0, 1, 1, 1, 1, 1])
    training = with_states(training, server=replace(training.server, labels=labels))  # type: ignore[call-arg]
    after, _ = runtime.round(training)
    assert after.server.opened.tolist() == [0, 1, 1, 1, 1, 1]  # type: ignore[attr-defined]
    whole = after.clients.domain + after.clients.personal  # type: ignore[attr-defined]
    torch.testing.assert_close(runtime.prompts(after)[0], whole[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["secfpp", "secfpp-plain"])
def test_an_absent_client_keeps_its_clusters_mean(make_runtime: MakeRuntime, name: str, tmp_path: Path) -> None:
    """Half of twelve clients take part in a round, and the run is loaded again after each.

    An absent client has what it had, or its cluster's new mean. A participant of a cluster that is not opened has its
    own part.
    """
    runtime = make_runtime(name, TWO_KINDS + TWO_KINDS, TABLES, rounds=8, participation=0.5)
    training, kept, returned = runtime.start(), 0, 0
    for number in range(1, 9):
        came = participants(runtime.seed, number, 12, 0.5).tolist()
        before, prompts = training.server, runtime.prompts(training)
        checkpoint.save(tmp_path, runtime.round(training)[0])
        loaded = checkpoint.load(tmp_path, training)
        assert loaded is not None
        training = loaded
        after, now = training.server, runtime.prompts(training)
        labels = after.labels.tolist()  # type: ignore[attr-defined]
        present = [labels[client] for client in came]
        fresh = {label for label in present if label != secure.NOBODY and present.count(label) >= 3}
        for client in range(12):
            opened = after.opened[client] > 0  # type: ignore[attr-defined]
            if labels[client] in fresh:
                assert opened
            elif client in came:
                assert not opened
                own = training.clients.domain[client] + training.clients.personal[client]  # type: ignore[attr-defined]
                assert torch.equal(now[client], own)
                returned += int(before.opened[client])  # type: ignore[attr-defined]
            else:
                assert torch.equal(now[client], prompts[client])
                assert opened == before.opened[client]  # type: ignore[attr-defined]
                kept += int(opened)
    assert kept > 0
    assert returned > 0


@pytest.mark.parametrize("name", ["secfpp", "secfpp-plain"])
@pytest.mark.parametrize(("colluders", "labels"), [(1, [0, 0, 1, 1, 1, 1]), (2, [0, 0, 0, 1, 1, 1])])
def test_no_member_computes_anothers_prompt(
    make_runtime: MakeRuntime, name: str, colluders: int, labels: list[int]
) -> None:
    """T members of a cluster of T + 1 would have the last one's part: T + 1 times the mean, minus their own."""
    runtime = make_runtime(name, TWO_KINDS, TABLES | {"secfpp": TABLES["secfpp"] | {"colluders": colluders}})
    training = trained(runtime, 2)
    numbers = torch.tensor(labels, dtype=torch.float64)
    training = with_states(training, server=replace(training.server, labels=numbers))  # type: ignore[call-arg]
    after, _ = runtime.round(training)
    opened = after.server.opened > 0  # type: ignore[attr-defined]
    for number in (0.0, 1.0):
        members = numbers == number
        assert opened[members].all() == (int(members.sum()) >= colluders + 2)
    assert not after.server.contexts[~opened].any()  # type: ignore[attr-defined]


def test_fewer_members_than_colluders_leave_two_of_are_refused(make_runtime: MakeRuntime) -> None:
    for colluders, least in ((1, 3), (2, 4), (4, 6)):
        assert secfpp.Settings(colluders=colluders).minimum == least
        assert secfpp.Settings(colluders=colluders, smallest_cluster=least + 1).minimum == least + 1
        with pytest.raises(ConfigError, match=rf"smallest_cluster = {least - 1}: must be 0, or {least} or more"):
            secfpp.Settings(colluders=colluders, smallest_cluster=least - 1)
    with pytest.raises(ConfigError, match=r"settings\.secfpp.*smallest_cluster = 2: must be 0, or 3 or more"):
        make_runtime("secfpp", TWO_KINDS, TABLES | {"secfpp": {"smallest_cluster": 2}})
    with pytest.raises(ConfigError, match="no cluster of 6 clients a round could be opened"):
        make_runtime("secfpp", TWO_KINDS, TABLES | {"secfpp": {"smallest_cluster": 7}})


@pytest.mark.parametrize("exchange", [1, 4])
def test_if_too_few_answer_training_goes_on_with_the_last_clusters(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, exchange: int
) -> None:
    """From the first exchange on nothing comes of the round; from the fourth on there are no distances."""
    runtime = make_runtime("secfpp", TWO_KINDS, TABLES)
    training = trained(runtime, 3)
    labels = training.server.labels  # type: ignore[attr-defined]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    vanishing(dict.fromkeys(range(5), exchange), monkeypatch)
    with caplog.at_level(logging.WARNING):
        after, record = runtime.round(training)
    assert "keeps the last clusters" in caplog.text
    assert "answers are needed" in caplog.text
    assert torch.equal(after.server.labels, labels)  # type: ignore[attr-defined]
    assert record.upload_bytes == 0 if exchange == 1 else record.upload_bytes > 0
    monkeypatch.undo()
    assert runtime.round(after)[0].round == 5


def test_a_client_that_vanishes_in_the_middle_changes_nothing_for_others(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make_runtime("secfpp", TWO_KINDS, TABLES)
    training = trained(runtime, 3)
    complete, _ = runtime.round(training)

    vanishing({5: 4}, monkeypatch)  # after it dealt its point
    after, _ = runtime.round(training)
    assert torch.equal(after.server.labels, complete.server.labels)  # type: ignore[attr-defined]
    # It dealt no domain-level part: its cluster is one of two members now, which is not opened.
    assert after.server.opened.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]  # type: ignore[attr-defined]
    torch.testing.assert_close(
        after.server.contexts[0],  # type: ignore[attr-defined]
        complete.server.contexts[0],  # type: ignore[attr-defined]
        rtol=0,
        atol=1e-7,
    )


def test_points_have_unit_norm_and_do_not_see_what_no_softmax_sees(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("secfpp", TWO_KINDS, TABLES)
    training = trained(runtime, 1)
    settings, module = runtime.settings, algorithm("secfpp")
    upload, _ = module.client_round(
        settings,
        module.broadcast(training.server),
        training.clients,
        runtime.data,
        runtime.mechanism.client_end(clock_of(runtime, 2).streams, range(6)).gradients,
        clock_of(runtime, 2),
    )
    points, changes = secfpp.reduced(settings, runtime.model, training.server.start, upload, clock_of(runtime, 2))  # type: ignore[arg-type]
    assert points.shape[1] <= settings.width
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
    by_class = points.reshape(6, len(runtime.model.classes), -1)
    np.testing.assert_allclose(by_class.sum(1), 0, atol=1e-6)
    assert np.abs(changes).max() > 0
    idle, _ = secfpp.reduced(settings, runtime.model, training.server.start, upload, clock_of(runtime, 1))  # type: ignore[arg-type]
    assert not idle.any()


def test_more_classes_than_numbers_are_projected(make_runtime: MakeRuntime) -> None:
    wide = make_runtime("secfpp", TWO_KINDS, TABLES)
    narrow = make_runtime("secfpp", TWO_KINDS, TABLES | {"secfpp": TABLES["secfpp"] | {"width": 3}})
    assert trained(narrow, 2).server.labels.tolist() == trained(wide, 2).server.labels.tolist()  # type: ignore[attr-defined]


def test_balanced_batches_count_every_class_alike() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 0, 1])
    data = ClientData(
        torch.arange(8.0)[:, None],
        labels,
        torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]),
        torch.tensor([4, 3]),
        torch.ones(2),
    )
    balanced = data.balanced()
    held = [balanced.labels[row[:count]].tolist() for row, count in zip(balanced.rows, balanced.counts, strict=True)]
    assert [sorted(each) for each in held] == [[0, 0, 0, 1, 1, 1], [0, 0, 2, 2]]
    assert {*balanced.rows[0][:6].tolist()} == {0, 1, 2, 3}  # nothing is left out
    # A repeated example has more than one coin, and how many depends on the others: no mechanism bounds that.
    with pytest.raises(ValueError, match="cannot be balanced"):
        replace(data, poisson=PoissonSampler(Streams(0, 1, [0, 1], torch.device("cpu")))).balanced()


@given(st.lists(st.integers(-1, 3), min_size=6, max_size=6), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_renaming_changes_names_only(old: list[int], new: list[int]) -> None:
    before, clients, found = np.array(old), np.array([0, 2, 3, 5]), np.array(new)
    after = secure.renamed(before, clients, found)
    assert after[[1, 4]].tolist() == before[[1, 4]].tolist()
    same = found[:, None] == found
    assert ((after[clients][:, None] == after[clients]) == same).all()
    assert (after[clients] >= 0).all()


def test_renaming_keeps_the_names_of_clusters_that_stay() -> None:
    before = np.array([4, 4, 4, 1, 1, 1])
    assert secure.renamed(before, np.arange(6), np.array([0, 0, 0, 1, 1, 1])).tolist() == [4, 4, 4, 1, 1, 1]
    assert secure.renamed(before, np.arange(6), np.array([0, 0, 1, 1, 1, 1])).tolist() == [4, 4, 1, 1, 1, 1]
    assert secure.renamed(before, np.arange(6), np.array([0, 0, 0, 1, 1, 2])).tolist() == [4, 4, 4, 1, 1, 0]


def test_too_few_clients_are_refused_before_training(make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match="2 clients a round"):
        make_runtime("secfpp", TWO_KINDS[:2], TABLES)


def test_noise_covers_all_that_the_exchange_tells(make_runtime: MakeRuntime) -> None:
    """What is computed of noised gradients, on shares or not, is covered; without noise, all of it is disclosed."""
    open_ = make_runtime("secfpp", TWO_KINDS, TABLES)
    ways = {each.channel for each in open_.start().ledger.disclosures}
    assert ways == {"shares", "clusters", "mean", "prompt"}
    noised = make_runtime("secfpp", TWO_KINDS, TABLES, privacy={"mechanism": "dp-sgd", "noise_multiplier": 1.0})
    training = trained(noised, 4)
    assert training.ledger.private
    assert sum(each.steps for each in training.ledger.releases if each.party == "client 0") == 4 * 2
    with pytest.raises(ConfigError, match="averages within clusters"):
        make_runtime("secfpp", TWO_KINDS, TABLES, privacy={"mechanism": "dp-fedavg", "noise_multiplier": 1.0})


def test_ratios_and_centers_run_too(make_runtime: MakeRuntime) -> None:
    for change in ({"reveal": "ratios"}, {"search": "centers"}, {"search": "centers", "clusters": 0}):
        runtime = make_runtime("secfpp", TWO_KINDS, TABLES | {"secfpp": TABLES["secfpp"] | change})
        training, record = trained(runtime, 1), None
        training, record = runtime.round(training)
        assert record.protocol is not None
        assert record.protocol.opened
        assert not record.protocol.rejected
        if "clusters" not in change:
            assert record.clusters == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("changes", [{"reveal": "distances", "factor_bits": 0}, {"columns": 500}, {"bits": 3}])
def test_a_server_that_names_other_numbers_learns_nothing(
    make_runtime: MakeRuntime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
) -> None:
    """Above all exact distances where clients agreed on ratios: they compute the numbers themselves."""
    runtime = make_runtime("secfpp", TWO_KINDS, TABLES | {"secfpp": TABLES["secfpp"] | {"reveal": "ratios"}})
    training = trained(runtime, 1)

    def server_exchange(*given: Any) -> secure.SharedExchange:
        settings, model, server, _, clients, context, carrier = given
        setup = secfpp.agreed(settings, model, len(clients), server.start.numel(), context.round)
        return secure.SharedExchange(replace(setup, **changes), clients, carrier)

    monkeypatch.setattr(secfpp, "server_exchange", server_exchange)
    with caplog.at_level(logging.WARNING):
        after, record = runtime.round(training)
    assert "answers are needed and 0 came" in caplog.text
    assert record.protocol is not None
    assert not record.protocol.opened
    assert not after.server.opened.any()  # type: ignore[attr-defined]


def test_a_server_that_plays_clients_of_its_own_is_dealt_nothing(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nine of 15 shares would be enough to decode everybody's point, where 6 clients take part."""
    runtime = make_runtime("secfpp", TWO_KINDS, TABLES)
    training, phantoms = trained(runtime, 1), dict.fromkeys(range(6, 15), 0)

    def server_exchange(*given: Any) -> secure.SharedExchange:
        settings, model, server, _, clients, context, carrier = given
        setup = secfpp.agreed(settings, model, 15, server.start.numel(), context.round)
        ends = {
            place: secure.Client(place, np.zeros(setup.width), np.zeros(setup.length), cipher=secure.EncryptingCipher())
            for place in phantoms
        }

        def carry(messages: Mapping[int, bytes]) -> Iterator[tuple[int, bytes | secure.Refusal]]:
            yield from carrier({place: content for place, content in messages.items() if place < 6})
            for place, end in ends.items():
                if place in messages:
                    phantoms[place] += isinstance(reply := secure.answered(end, messages[place]), bytes)
                    yield place, reply

        return secure.SharedExchange(setup, [*clients, *([clients[0]] * 9)], carry)

    monkeypatch.setattr(secfpp, "server_exchange", server_exchange)
    with caplog.at_level(logging.WARNING):
        after, record = runtime.round(training)
    assert all(phantoms.values())
    assert record.protocol is not None
    assert not record.protocol.opened
    assert not after.server.opened.any()  # type: ignore[attr-defined]


def test_a_run_keeps_what_the_server_saw(config_file: Path, tmp_path: Path) -> None:
    overrides = ["algorithm=secfpp", "partition.clients=4", "settings.local_steps=2", "settings.secfpp.cluster_every=2"]
    out = tmp_path / "run"
    summary = run(load_config(config_file, overrides), out)
    assert "squared distances" in summary.privacy.statement
    assert sorted(each.name for each in (out / "distances").iterdir()) == [f"round-00000{n}.json" for n in (2, 4, 6)]
    seen = json.loads((out / "distances" / "round-000004.json").read_bytes())
    assert [column["members"] for column in seen["columns"]] == [[0], [1], [2], [3]]
    for number, column in enumerate(seen["columns"]):
        assert column["values"][number] == 0
        assert len(column["values"]) == len(column["clients"]) == 4
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(len(line["clusters"]) == 4 for line in lines[1:])
    assert lines[2]["protocol"]["columns"] == 4
    assert lines[1]["upload_bytes"] == 0  # nothing is sent before there is something to cluster
    assert lines[2]["upload_bytes"] > 4 * 4 * 8 * 4


def test_the_plain_oracle_sees_prompts_and_says_so() -> None:
    assert any(each.channel == "upload" for each in secfpp_plain.ABOUT.discloses)
    assert secfpp_plain.Settings is secfpp.Settings


def test_double_precision_state_is_clustered_alike(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("secfpp", TWO_KINDS, TABLES)
    start = runtime.start()
    precise = make_runtime("secfpp", TWO_KINDS, TABLES)
    doubled = started_in_double(precise)
    for _ in range(2):
        start, doubled = runtime.round(start)[0], precise.round(doubled)[0]
    assert start.server.labels.tolist() == doubled.server.labels.tolist()  # type: ignore[attr-defined]
