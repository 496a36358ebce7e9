"""Every fleet gives the local runtime's numbers, and a round goes on without those who are lost."""

from __future__ import annotations

import contextlib
import errno
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from runtime.federations import FEDERATIONS
from runtime.fleets import ProcessFleet, TimedFleet
from runtime.site_process import EXPERIMENT, LEDGER, turns_of
from runtime.test_two_processes import trained_locally
from sordino.algorithms.base import Broadcast, named_tensors
from sordino.errors import RunError
from sordino.privacy.client_level import SAMPLE_SECRET
from sordino.runtime import messages, turns
from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import Ask, LocalFleet, Patience, ServerRuntime
from sordino.runtime.local import LocalRuntime
from sordino.runtime.messages import MessageError, RoundHeader
from sordino.runtime.release import Told
from sordino.runtime.server import ServerEnd, ServerRecord, ServerTraining
from sordino.runtime.waiting import MOST_MISSED, Stalled, drive, put
from sordino.secure import Refusal, SecureError, SumServer, Traffic, carry_exchange

HALVES = {"north": [0, 1, 2], "south": [3, 4, 5]}
THIRDS = {"east": [0, 1], "north": [2, 3], "west": [4, 5]}
Turn = Callable[[bytes], bytes]
ROWS_OF_FIVE = [[4 * place + label for place in range(k, 10, 5) for label in range(4)] for k in range(5)]


class Saved:
    """What a server runtime saved, in order."""

    def __init__(self) -> None:
        self.states: list[ServerTraining] = []
        self.records: list[ServerRecord] = []
        self.lost: list[dict[str, str]] = []

    def __call__(self, training: ServerTraining, record: ServerRecord | None, lost: Mapping[str, str]) -> None:
        self.states.append(training)
        if record is not None:
            self.records.append(record)
            self.lost.append(dict(lost))


def server_of(
    runtime: LocalRuntime,
    groups: Mapping[str, list[int]],
    saved: Saved,
    patience: Patience | None = None,
    training: ServerTraining | None = None,
) -> ServerRuntime:
    given = runtime.randomness if runtime.privacy.simulation else None
    end = ServerEnd(runtime.federation, given)
    start = runtime.start().at_server
    return ServerRuntime(end, training or start, groups, EXPERIMENT, patience or Patience(), saved)


def sites_of(runtime: LocalRuntime, groups: Mapping[str, list[int]], folder: Path) -> dict[str, turns.Turns]:
    return {site: turns_of(runtime, clients, folder / site) for site, clients in groups.items()}


def fleet_of(sites: Mapping[str, turns.Turns], **others: Turn) -> LocalFleet:
    return LocalFleet({site: turn.turn for site, turn in sites.items()} | others)


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", FEDERATIONS)
def test_one_site_has_the_local_runtimes_numbers(name: str, spec_of: Any, tmp_path: Path) -> None:
    """To the bit: states at both ends, clip, ledger, and bytes of a client's messages."""
    spec = spec_of(name)
    runtime = spec.build()
    expected, records = trained_locally(runtime)
    groups, saved = {"all": spec.clients}, Saved()
    sites = sites_of(runtime, groups, tmp_path)
    training = drive(server_of(runtime, groups, saved), fleet_of(sites))
    assert same(named_tensors(training.state), named_tensors(expected.server))
    assert same(named_tensors(sites["all"].training.state), named_tensors(expected.clients))
    assert same(sites["all"].training.release, expected.at_clients.release)
    assert same(training.mechanism, expected.mechanism)
    assert training.ledger.releases == expected.ledger.releases
    sizes = [(record.upload_bytes, record.broadcast_bytes) for record in saved.records]
    assert sizes == [(record.upload_bytes, record.broadcast_bytes) for record in records]
    assert not any(saved.lost)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["dp-fpl, adaptive clip, a secure sum", "promptfl, statistics, noise by client", "secfpp"]
)
def test_processes_are_the_same_fleet(name: str, spec_of: Any, tmp_path: Path) -> None:
    spec = spec_of(name)
    runtime = spec.build()
    here = drive(server_of(runtime, HALVES, Saved()), fleet_of(sites_of(runtime, HALVES, tmp_path / "here")))
    fleet = ProcessFleet(spec, HALVES, tmp_path)
    there = drive(server_of(runtime, HALVES, Saved()), fleet)
    fleet.close()
    assert same(named_tensors(here.state), named_tensors(there.state))
    assert here.ledger.releases == there.ledger.releases


@pytest.mark.parametrize("name", ["dp-fpl, dp-sgd", "dp-fpl, adaptive clip, a secure sum", "secfpp"])
def test_a_server_that_died_gets_the_stored_answers(name: str, spec_of: Any, tmp_path: Path) -> None:
    """Sites are through a round that the server lost: asked again, they draw no second noise, and say the same."""
    spec = spec_of(name)
    spec = replace(spec, privacy=spec.privacy | ({"simulation": False, "nonce": None} if spec.privacy else {}))
    runtime, saved = spec.build(), Saved()
    sites = sites_of(runtime, HALVES, tmp_path)
    server = server_of(runtime, HALVES, saved, Patience(0.5))
    ask = server.next()
    assert isinstance(ask, Ask)
    answers = {site: sites[site].turn(payload) for site, payload in ask.payloads.items()}
    charged = {site: (tmp_path / site / LEDGER).read_text() for site in sites if (tmp_path / site / LEDGER).exists()}
    server.stop()
    restarted = sites_of(runtime, HALVES, tmp_path)  # and so did the sites
    for site, payload in ask.payloads.items():
        assert restarted[site].turn(payload) == answers[site]
        assert same(named_tensors(restarted[site].training.state), named_tensors(sites[site].training.state))
    again = server_of(runtime, HALVES, saved, Patience(0.5))
    training = drive(again, fleet_of(restarted))
    assert training.round == runtime.rounds
    for site, before in charged.items():
        after = json.loads((tmp_path / site / LEDGER).read_text())
        assert json.loads(before).items() <= after.items()
        assert len(after) <= runtime.rounds
    sums = runtime.mechanism.sums_securely  # whose session is new, so the round is not run again
    assert bool(saved.records[0].void) == sums
    if sums:  # the server that died may have opened the sum of the round that it forgot
        assert sum(release.steps for release in training.ledger.releases) == runtime.rounds
    assert not any(record.void for record in saved.records[1:])


def test_a_round_is_answered_once(spec_of: Any, tmp_path: Path) -> None:
    runtime = spec_of("dp-fpl, dp-sgd").build()
    sites = sites_of(runtime, HALVES, tmp_path)
    server = server_of(runtime, HALVES, Saved())
    ask = server.next()
    assert isinstance(ask, Ask)
    request = ask.payloads["north"]
    answer = sites["north"].turn(request)
    other = Envelope.decode(request)
    fewer = replace(other, contents={0: other.contents[0]}).encode()
    for turns_now in (sites["north"], turns_of(runtime, HALVES["north"], tmp_path / "north")):
        state = named_tensors(turns_now.training.state)
        with pytest.raises(MessageError, match="round 1 was answered here, and another request for round 1 is not"):
            turns_now.turn(fewer)
        assert same(named_tensors(turns_now.training.state), state)
        assert turns_now.turn(request) == answer
    with pytest.raises(MessageError, match="experiment cdcdcdcdcdcd"):
        sites["north"].turn(replace(other, experiment="cd" * 32).encode())
    server.stop()


def test_rounds_that_are_not_in_the_plan_are_refused(spec_of: Any, tmp_path: Path) -> None:
    """Epsilon was computed for so many rounds, and for who takes part in each."""
    spec = spec_of("dp-fpl, dp-sgd")
    runtime = replace(spec, runtime={"participation": 0.5}).build()
    turn = turns_of(runtime, spec.clients, tmp_path / "all")
    server = server_of(runtime, {"all": spec.clients}, Saved())
    ask = server.next()
    assert isinstance(ask, Ask)
    envelope = Envelope.decode(ask.payloads["all"])
    asked, content = next(iter(envelope.contents.items()))
    stranger = next(client for client in spec.clients if client not in envelope.contents)
    with pytest.raises(MessageError, match=f"round 1 for client {stranger}, who takes no part in it"):
        turn.turn(replace(envelope, contents={stranger: content}).encode())
    tensors = safetensors.torch.load(content)
    later = messages.with_head(tensors, messages.head_of(content) | {"round": 5})
    with pytest.raises(MessageError, match="a broadcast of round 5, and 4 were agreed"):
        turn.turn(replace(envelope, contents={asked: later}).encode())
    assert turn.turn(ask.payloads["all"])
    server.stop()


def test_noise_of_a_site_is_new_in_every_round_and_its_key_is_on_no_disk(spec_of: Any, tmp_path: Path) -> None:
    spec = spec_of("dp-fpl, dp-sgd")
    runtime = replace(spec, privacy=spec.privacy | {"simulation": False, "nonce": None}).build()
    keys = set()
    sites = sites_of(runtime, HALVES, tmp_path)

    def noting(request: bytes) -> bytes:
        answer = sites["north"].turn(request)
        keys.add(sites["north"]._journal.key)
        file = tmp_path / "north" / turns.FILE
        assert messages.head_of(file.read_bytes())["key"] == ""  # or its reader could take the noise off the answer
        assert file.stat().st_mode & 0o077 == 0
        return answer

    drive(server_of(runtime, HALVES, Saved()), fleet_of(sites, north=noting))
    assert len(keys) == runtime.rounds
    assert all(len(key) == turns.KEY_BYTES for key in keys)


def falls(request: bytes) -> bytes:
    """A site that is asked, and may have sent something before it fell."""
    raise RunError("it fell")


def broken(kind: str) -> Callable[[Turn], Turn]:
    """A site whose answers to the second round are wrong."""

    def of(turn: Turn) -> Turn:
        kept: list[bytes] = []

        def answer(request: bytes) -> bytes:
            kept.append(turn(request))
            if len(kept) != 2:
                return kept[-1]
            envelope = Envelope.decode(kept[-1])
            client, content = next(iter(envelope.contents.items()))
            tensors = safetensors.torch.load(content)
            name = max(tensors, key=lambda name: tensors[name].numel())
            if kind == "replayed":
                return kept[0]
            if kind == "garbage":
                return b"nothing of Sordino's"
            if kind == "another site's client":
                return replace(envelope, contents={0: content}).encode()
            if kind == "NaN":
                tensors[name] = tensors[name] * torch.nan
            if kind == "wrong shape":
                tensors[name] = tensors[name][..., :1]
            if kind == "oversized":
                tensors[name] = torch.zeros(10**6)
            changed = messages.with_head({k: t.contiguous() for k, t in tensors.items()}, messages.head_of(content))
            return replace(envelope, contents={**envelope.contents, client: changed}).encode()

        return answer

    return of


FAULTS = {
    "NaN": "not finite",
    "wrong shape": "shape",
    "oversized": "bytes where at most",
    "replayed": "it is of round 1",
    "garbage": "no message of Sordino's",
    "another site's client": "client 0, which is not its own",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_who_answers_otherwise_than_agreed_is_named_and_left_out(kind: str, spec_of: Any, tmp_path: Path) -> None:
    runtime, saved = spec_of("dp-fpl, dp-sgd").build(), Saved()
    sites = sites_of(runtime, THIRDS, tmp_path)
    fleet = fleet_of(sites, west=broken(kind)(sites["west"].turn))
    training = drive(server_of(runtime, THIRDS, saved, Patience(0.6)), fleet)
    assert training.round == runtime.rounds
    first, second, *rest = saved.records
    assert not first.lost
    assert not any(record.lost for record in rest)
    assert FAULTS[kind] in " ".join([*second.lost.values(), *saved.lost[1].values()])
    assert set(second.lost) <= {4, 5}, "the others are in it"
    assert set(second.participants) | set(second.lost) == set(range(6))
    # What was lost may have left: it stays counted.
    assert {release.steps for release in training.ledger.releases} == {2 * runtime.rounds}


@pytest.mark.parametrize("kind", [*FAULTS, "refusal"])
def test_who_answers_otherwise_takes_no_time_from_the_others(kind: str, spec_of: Any, tmp_path: Path) -> None:
    """It answers at once, and is no part of the quorum after which those who are slow have the grace only."""
    runtime, saved = spec_of("dp-fpl, dp-sgd").build(), Saved()
    sites = sites_of(runtime, THIRDS, tmp_path)
    refusal = Envelope("refusal", EXPERIMENT, {"reason": "it may not"}).encode()
    west = (lambda _: refusal) if kind == "refusal" else broken(kind)(sites["west"].turn)
    fleet = TimedFleet({"west": (0.0, west), "east": (1.0, sites["east"].turn), "north": (50.0, sites["north"].turn)})
    training = drive(server_of(runtime, THIRDS, saved, Patience(0.6, deadline=100.0, grace=10.0)), fleet)
    assert training.round == runtime.rounds
    for number, record in enumerate(saved.records, 1):
        assert set(record.participants) >= {0, 1}, (number, record)
        alone = set(record.lost) | {client for site in saved.lost[number - 1] for client in THIRDS[site]}
        # In a round without a fault the slow site is the one that is lost: two others have answered.
        faulty = kind == "refusal" or number == 2
        assert alone <= {4, 5} if faulty else alone == {2, 3}, (number, record, saved.lost)


def test_a_round_without_some_is_that_of_the_others(spec_of: Any, tmp_path: Path) -> None:
    """The server's prompt changes by the weighted mean of the uploads that came."""
    spec = spec_of("promptfl, statistics, noise by client")
    runtime, saved = replace(spec, privacy={}).build(), Saved()
    sites = sites_of(runtime, THIRDS, tmp_path)
    uploads: list[dict[str, torch.Tensor]] = []

    def noting(turn: Turn) -> Turn:
        def answer(request: bytes) -> bytes:
            content = turn(request)
            uploads.extend(map(safetensors.torch.load, Envelope.decode(content).contents.values()))
            return content

        return answer

    fleet = LocalFleet({"east": noting(sites["east"].turn), "north": noting(sites["north"].turn)})
    server = server_of(runtime, THIRDS, saved, Patience(0.6))
    ask = server.next()
    assert isinstance(ask, Ask)
    put(ask, server, fleet)
    server.close_round()
    weights = torch.stack([upload["weight"][0] for upload in uploads]).double()
    changes = torch.stack([upload["change"][0] for upload in uploads])
    mean = torch.tensordot(weights / weights.sum(), changes.double(), dims=1)
    before, after = (state.context.double() for state in (runtime.start().server, saved.states[0].state))
    torch.testing.assert_close(after - before, mean, rtol=1e-6, atol=1e-7)
    assert saved.lost[0] == {"west": "it is not there"}
    server.stop()


@pytest.mark.parametrize("stage", ["upload", "sum"])
def test_a_secure_sum_goes_on_without_those_who_drop_out(stage: str, spec_of: Any, tmp_path: Path) -> None:
    """With next to no noise it is the mean that the server would see of those who are left."""
    spec = spec_of("dp-fpl, adaptive clip, a secure sum")
    quiet = {"noise_multiplier": 1e-9, "dropouts": 2, "colluders": 1, "clip_quantile": None}
    states = []
    for noise_by in ("shares", "client"):
        privacy = {**spec.privacy, **quiet, "noise_by": noise_by}
        runtime, saved = replace(spec, privacy=privacy, rounds=1).build(), Saved()
        turn, asked = sites_of(runtime, THIRDS, tmp_path / noise_by), 0

        def west(request: bytes, turn: Any = turn, noise_by: str = noise_by) -> bytes:
            nonlocal asked
            asked += 1
            if stage == "upload" or noise_by == "client" or asked > 1:
                raise RunError("it fell")
            return bytes(turn["west"].turn(request))

        asked = 0
        training = drive(server_of(runtime, THIRDS, saved, Patience(0.6)), fleet_of(turn, west=west))
        assert not saved.records[0].void
        states.append(named_tensors(training.state))
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=1e-5)


def test_below_the_quorum_a_round_changes_nothing_but_the_ledger(spec_of: Any, tmp_path: Path) -> None:
    runtime, saved = spec_of("dp-fpl, dp-sgd").build(), Saved()
    sites = sites_of(runtime, THIRDS, tmp_path)
    fleet = fleet_of(sites, north=falls, west=falls)
    start = runtime.start().at_server
    with pytest.raises(Stalled, match="3 rounds in a row were void .* round 3 was void: 2 of 6 answered"):
        drive(server_of(runtime, THIRDS, saved, Patience(0.6)), fleet)
    training = saved.states[-1]
    assert same(named_tensors(training.state), named_tensors(start.state))
    assert training.round == MOST_MISSED == len(saved.records)
    assert all("2 of 6 answered" in record.void and record.participants == () for record in saved.records)
    assert {release.steps for release in training.ledger.releases} == {2 * MOST_MISSED}
    assert {release.party for release in training.ledger.releases} == {f"client {client}" for client in range(6)}


def test_a_sampled_client_is_told_nothing_of_who_else_is_in_the_sample(spec_of: Any, tmp_path: Path) -> None:
    """A sampling rate is worth something against those who do not know the sample, and the others' loss is at it."""
    spec = spec_of("dp-fpl, adaptive clip, noise by the server")
    privacy = spec.privacy | {"simulation": False, "nonce": None}
    runtime, saved = replace(spec, privacy=privacy, rounds=30).build(), Saved()
    sites = sites_of(runtime, THIRDS, tmp_path)
    told: dict[int, set[tuple[int, int]]] = {}

    def listening(turn: Turn) -> Turn:
        def answer(request: bytes) -> bytes:
            for client, content in Envelope.decode(request).contents.items():
                header = messages.round_header(content)
                told.setdefault(client, set()).add((header.place, header.clients))
            return turn(request)

        return answer

    fleet = LocalFleet({name: listening(site.turn) for name, site in sites.items()})
    training = drive(server_of(runtime, THIRDS, saved), fleet)
    assert len({record.participants for record in saved.records}) > 5
    assert told == {client: {(client, 6)} for client in range(6)}
    assert training.ledger.releases[0].sampling_rate == 0.5
    assert SAMPLE_SECRET in training.ledger.assumptions


def test_rounds_of_sampled_clients_count_also_if_they_are_void(spec_of: Any, tmp_path: Path) -> None:
    """A quorum decides by the size of a sample. The rounds that it lets pass are no Poisson samples."""
    spec = spec_of("dp-fpl, adaptive clip, noise by the server")
    privacy = spec.privacy | {"simulation": False, "nonce": None}
    runtime, saved = replace(spec, privacy=privacy, rounds=100).build(), Saved()
    sites = sites_of(runtime, THIRDS, tmp_path)
    fleet, training = fleet_of(sites, west=falls), runtime.start().at_server
    while training.round < 100:  # a coordinator goes on by hand after some void rounds in a row
        with contextlib.suppress(Stalled):
            drive(server_of(runtime, THIRDS, saved, Patience(1.0), training), fleet)
        training = saved.states[-1]
    voids = [record for record in saved.records if record.void]
    assert 0 < len(voids) < 100
    assert all(record.lost.keys() & {4, 5} for record in voids), "who was drawn and is there answered"
    (release,) = training.ledger.releases
    assert (release.steps, release.sampling_rate) == (100, 0.5)


def test_a_full_disk_at_a_site_loses_a_round_and_nothing_else(
    spec_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, saved = spec_of("dp-fpl, dp-sgd").build(), Saved()
    sites = sites_of(runtime, THIRDS, tmp_path)
    real, full = turns.write_private, []

    def write(path: Path, content: bytes) -> None:
        if full and path.parent.name == "north":
            raise RunError(f"cannot write {path}: {OSError(errno.ENOSPC, 'No space left on device').strerror}")
        real(path, content)

    monkeypatch.setattr(turns, "write_private", write)
    server = server_of(runtime, THIRDS, saved, Patience(0.6))
    fleet = fleet_of(sites)
    for number in range(1, runtime.rounds + 1):
        full[:] = [True] if number == 2 else []
        ask = server.next()
        assert isinstance(ask, Ask)
        before = named_tensors(sites["north"].training.state)
        put(ask, server, fleet)
        if full:
            assert same(named_tensors(sites["north"].training.state), before)
        server.close_round()
    assert "No space left on device" in saved.lost[1]["north"]
    assert [set(record.lost) for record in saved.records] == [set(), {2, 3}, set(), set()]


@pytest.mark.parametrize("how", ["another round is asked for", "nothing is asked", "all sites are started again"])
def test_a_release_is_summed_once(how: str, make_runtime: Any, tmp_path: Path) -> None:
    """Two secure sums of one vector, with its noise, would show the difference: one client's, with its noise alone."""
    privacy = {"mechanism": "statistics", "noise_multiplier": 20.0, "noise_by": "shares", "dropouts": 1}
    whole = privacy | {"center_share": 0.0, "scatter_share": 0.0, "colluders": 1}
    runtime = make_runtime("promptfl", ROWS_OF_FIVE, {"context_length": 4, "batch_size": 4}, privacy=whole)
    sites = [turns_of(runtime, [client], tmp_path / str(client)) for client in range(5)]
    session, salt = "ab" * 16, 0

    def ask(contents: Mapping[int, bytes]) -> list[tuple[int, bytes | Refusal]]:
        came: list[tuple[int, bytes | Refusal]] = []
        for client, content in contents.items():
            # Other facts: a server that wants another answer than the one that was kept.
            request = Envelope("round", EXPERIMENT, {"answered": 0, "salt": salt}, {client: content})
            answer = Envelope.decode(sites[client].turn(request.encode()))
            came += answer.contents.items()
            came += [(asked, Refusal(reason)) for asked, reason in answer.refused.items()]
        return came

    def opening(number: int) -> dict[int, bytes]:
        return {k: messages.encode(Broadcast(), RoundHeader(number, k, 5, session)) for k in range(5)}

    ask(opening(0))
    mechanism = runtime.mechanism
    dimension = math.prod(mechanism.part_shape("matrix"))
    setup = mechanism.terms("matrix").setup(mechanism.settings, session, 5, dimension)
    assert carry_exchange(SumServer(setup).sum(), ask, Traffic()).survivors == tuple(range(5))
    salt = 1
    if how == "all sites are started again":
        sites = [turns_of(runtime, [client], tmp_path / str(client)) for client in range(5)]
    elif how == "another round is asked for":
        with pytest.raises(MessageError):
            ask(opening(7))
    with pytest.raises(SecureError):
        carry_exchange(SumServer(setup).sum(), ask, Traffic())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_release_that_is_refused_by_the_budget_takes_part_in_no_sum(
    stage: int, make_runtime: Any, tmp_path: Path
) -> None:
    """Nothing is charged, so nothing may leave: neither the answer nor a message of the sum that it opens."""
    privacy = {"mechanism": "statistics", "noise_multiplier": 20.0, "noise_by": "shares", "scatter_share": 0.0}
    privacy |= {"center_share": 0.1 if stage == 2 else 0.0}
    runtime = make_runtime("promptfl", ROWS_OF_FIVE, {"context_length": 4}, privacy=privacy)
    site, mechanism = turns_of(runtime, [0], tmp_path), runtime.mechanism
    charge, header = site._charge, RoundHeader(0, 0, 5, "ab" * 16)

    def sent(content: bytes) -> Envelope:
        return Envelope.decode(site.turn(Envelope("round", EXPERIMENT, {}, {0: content}).encode()))

    def refuse(number: int, releases: Any) -> None:
        raise MessageError("it has no budget")

    assert len(mechanism.stages) == stage
    opening = messages.encode(Broadcast(), header)
    if stage == 2:
        sent(opening)
        opening = messages.encode(Told({"center": torch.zeros(mechanism.part_shape("center"))}), header)
    site._charge = refuse
    with pytest.raises(MessageError, match="no budget"):
        sent(opening)
    setup = mechanism.terms("matrix").setup(mechanism.settings, "ab" * 16, 5, math.prod(mechanism.part_shape("matrix")))
    asked = next(SumServer(setup).sum())
    answer = sent(asked[0])
    assert (set(answer.contents), set(answer.refused)) == (set(), {0})
    site._charge = charge
    assert set(sent(opening).contents) == {0}, "with a budget it answers"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_site_that_restarts_in_the_middle_of_a_release_goes_on_with_it(
    stage: int, spec_of: Any, tmp_path: Path
) -> None:
    """What it keeps of the release is what it sent: it drew no second sample and no second noise."""
    spec = spec_of("promptfl, statistics, noise by client")
    runtime = replace(spec, privacy=spec.privacy | {"simulation": False, "nonce": None}).build()
    groups = {"all": spec.clients}
    sites = sites_of(runtime, groups, tmp_path)
    sent: list[dict[str, torch.Tensor]] = []
    asked = 0

    def restarting(request: bytes) -> bytes:
        nonlocal asked
        if asked == stage:
            sites.update(sites_of(runtime, groups, tmp_path))
        asked += 1
        answer = sites["all"].turn(request)
        sent.append(safetensors.torch.load(Envelope.decode(answer).contents[3]))
        return answer

    drive(server_of(runtime, groups, Saved()), LocalFleet({"all": restarting}))
    uploaded = {name.removeprefix("sums."): tensor for upload in sent[:2] for name, tensor in upload.items()}
    assert torch.equal(sites["all"].training.release["own"][3], uploaded["matrix"][0])


@pytest.mark.slow
def test_a_site_is_killed_in_a_round_and_comes_back(spec_of: Any, tmp_path: Path) -> None:
    spec = spec_of("dp-fpl, dp-sgd")
    spec = replace(spec, privacy=spec.privacy | {"simulation": False, "nonce": None})
    runtime, saved = spec.build(), Saved()
    fleet = ProcessFleet(spec, THIRDS, tmp_path)
    server = server_of(runtime, THIRDS, saved, Patience(0.6, deadline=120, grace=60))
    for number in range(1, runtime.rounds + 1):
        ask = server.next()
        assert isinstance(ask, Ask)
        assert ask.round == number
        if number == 2:
            fleet.kill("north")
        put(ask, server, fleet)
        server.close_round()
        if number == 2:
            fleet.start("north")
    fleet.close()
    assert [set(record.lost) for record in saved.records] == [set(), {2, 3}, set(), set()]
    # Its own ledger has the rounds that it was in.
    assert list(json.loads((tmp_path / "north" / LEDGER).read_text())) == ["1", "3", "4"]
    assert list(json.loads((tmp_path / "east" / LEDGER).read_text())) == ["1", "2", "3", "4"]
