"""Runs are composed over data: who is called what, and in which run, does not matter."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sordino.cli.app import app
from sordino.errors import ConfigError, RunError
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.privacy.accounting import compose, epsilon, spent
from sordino.privacy.ledger import ALL_CLIENTS, OBSERVERS, Disclosure, Ledger, Release, joint_digest
from sordino.privacy.statement import is_private, read_ledgers, statement
from sordino.runtime.local import LocalRuntime

MakeRuntime = Callable[..., LocalRuntime]
DELTA = 1e-3


def release(party: str, z: float, rate: float = 1.0, steps: int = 10) -> Release:
    return Release("x", party, "example", (z,), rate, steps, "client", OBSERVERS)


def ledger(held: dict[str, float], digests: dict[str, str], run: str) -> Ledger:
    releases = tuple(release(party, z) for party, z in held.items())
    return Ledger(releases, delta=DELTA, run=run, data=digests)


def example_level(rows: list[list[int]], make_runtime: MakeRuntime) -> Ledger:
    privacy = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "clip": 0.5, "delta": DELTA}
    runtime = make_runtime("promptfl", rows, {"context_length": 2, "batch_size": 2, "local_steps": 1}, 4, 0, privacy)
    training = runtime.start()
    while training.round < 4:
        training, _ = runtime.round(training)
    return training.ledger


def close(value: float) -> object:
    """Compositions in another order round otherwise."""
    return pytest.approx(value, rel=1e-9)


def of_parties(*parts: tuple[Ledger, str]) -> float:
    """Epsilon of one example that is with a given party in each run."""
    return epsilon([each for ledger, party in parts for each in ledger.releases if each.party == party], DELTA)


@pytest.mark.parametrize("told", [True, False])
def test_several_runs_are_private_only_if_each_is(told: bool) -> None:
    """One tells an untrusted server an accuracy; another one trusts the server, which is no matter of the first."""
    accuracy = (Disclosure("each client's accuracy", "upload"),) if told else ()
    bare = Disclosure("each client's gradient", "upload")
    noisy = replace(ledger({"client 0": 5.0}, {"client 0": "d"}, "a"), disclosures=accuracy)
    trusting = replace(ledger({"client 0": 5.0}, {"client 0": "d"}, "b"), disclosures=(bare,), trusted=("server",))
    seen = tuple(replace(entry, observers=("clients", "public")) for entry in trusting.releases)
    trusting = replace(trusting, releases=seen)
    both = compose([noisy, trusting])
    assert trusting.private
    assert both.private == noisy.private == (not told)
    assert is_private(both, "example") == (not told)
    assert both.trusted == ()
    said = statement(both, "example")
    assert "In 1 of the 2 runs the server is trusted: there it sees each client's gradient." in said
    assert said.startswith("Not private" if told else "Differentially private")
    for observer in OBSERVERS:  # more runs never tell less, but for one whom the second run trusts with all
        alone, together = (spent(each, observer, "example").epsilon for each in (noisy, both))
        assert together >= alone
        assert (together > alone) == (observer != "server" and not (told and observer == "server"))
    assert compose([trusting, replace(trusting, run="c")]).trusted == ("server",)


def test_examples_that_change_client_are_followed(make_runtime: MakeRuntime) -> None:
    """Four examples are client 0 in one run and client 1 in the other: names would add the small to the large."""
    few, many = list(range(4)), list(range(4, 40))
    one, other = example_level([few, many], make_runtime), example_level([many, few], make_runtime)
    assert one.data["client 0"] == other.data["client 1"] != one.data["client 1"]
    both = spent(compose([one, other]), "server", "example")
    assert both.epsilon == close(of_parties((one, "client 0"), (other, "client 1")))
    assert both.epsilon > 1.3 * of_parties((one, "client 0"), (other, "client 0"))


def test_where_data_differ_the_worst_parties_add_up(make_runtime: MakeRuntime) -> None:
    few, many = list(range(4)), list(range(4, 40))
    one, other = (
        example_level([few, many], make_runtime),
        example_level([list(range(5)), list(range(5, 40))], make_runtime),
    )
    assert not set(one.data.values()) & set(other.data.values())
    both = spent(compose([one, other]), "server", "example")
    assert both.epsilon == close(of_parties((one, "client 0"), (other, "client 0")))
    assert both.party == "client 0 of run 1, client 0 of run 2"


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_no_choice_of_parties_is_worse_than_what_is_stated(data: st.DataObject) -> None:
    """Against every choice, for one example, of the party that holds it in each run; no party need hold it."""
    names = ["client 0", "client 1", "client 2"]
    runs = []
    for number in range(data.draw(st.integers(2, 3))):
        digests = data.draw(st.permutations(["a", "b", "c", f"only in {number}"]))[:3]
        held = {name: data.draw(st.sampled_from([1.0, 2.0, 5.0])) for name in names}
        runs.append(ledger(held, dict(zip(names, digests, strict=True)), f"run {number}"))
    stated = spent(compose(runs), "server", "example").epsilon
    known = {digest for each in runs for digest in each.data.values()}
    worst = 0.0
    for parties in itertools.product([None, *names], repeat=len(runs)):
        mine = [None if party is None else each.data[party] for each, party in zip(runs, parties, strict=True)]
        # An example of equal data is in it wherever these are: a run that holds them cannot have it with another party.
        possible = all(
            mine[other] == digest or digest not in each.data.values()
            for digest in known & {x for x in mine if x}
            for other, each in enumerate(runs)
        )
        if possible:
            chosen = [(each, party) for each, party in zip(runs, parties, strict=True) if party]
            worst = max(worst, of_parties(*chosen) if chosen else 0.0)
    assert stated >= worst * (1 - 1e-9)
    everybody = [max(of_parties((each, name)) for name in names) for each in runs]
    assert stated >= max(everybody)


def test_the_same_parties_are_not_mixed_up() -> None:
    """Where all data are equal, a party adds up with itself alone: runs on one partition cost what they cost."""
    digests = {"client 0": "a", "client 1": "b"}
    one = ledger({"client 0": 1.0, "client 1": 3.0}, digests, "one")
    other = ledger({"client 0": 3.0, "client 1": 1.0}, digests, "other")
    both = spent(compose([one, other]), "server", "example").epsilon
    assert both == close(of_parties((one, "client 0"), (other, "client 0")))
    assert both < of_parties((one, "client 0"), (other, "client 1"))


def test_unknown_or_repeated_data_count_as_different() -> None:
    one = ledger({"client 0": 1.0, "client 1": 3.0}, {}, "one")
    other = ledger({"client 0": 3.0, "client 1": 1.0}, {"client 0": "a", "client 1": "a"}, "other")
    worst = of_parties((one, "client 0"), (other, "client 1"))
    assert spent(compose([one, other]), "server", "example").epsilon == close(worst)


def test_releases_of_all_clients_join_by_all_their_data() -> None:
    both = {"client 0": "a", "client 1": "b"}
    released = (release(ALL_CLIENTS, 2.0),)
    one, other = (Ledger(released, delta=DELTA, run=name, data=both) for name in ("one", "other"))
    assert one.digest_of(ALL_CLIENTS) == joint_digest(["b", "a"])
    assert spent(compose([one, other]), "public", "example").epsilon == close(epsilon(released * 2, DELTA))
    mixed = compose([one, ledger({"client 0": 1.0, "client 1": 3.0}, both, "third")])
    assert spent(mixed, "public", "example").epsilon == close(epsilon([*released, release("", 1.0)], DELTA))


def test_a_run_is_composed_once() -> None:
    one = ledger({"client 0": 1.0}, {}, "one")
    with pytest.raises(RunError, match="run one is given 2 times"):
        compose([one, replace(one, delta=0.1)])


def written(folder: Path, *ledgers: Ledger) -> list[Path]:
    """A folder for each ledger."""
    folders = [folder / str(number) for number, _ in enumerate(ledgers)]
    for place, each in zip(folders, ledgers, strict=True):
        place.mkdir(parents=True)
        (place / "ledger.json").write_text(each.to_json())
    return folders


@pytest.mark.parametrize("name", ["", "abc"])
def test_published_ledgers_of_unknown_runs_add_up(name: str, tmp_path: Path) -> None:
    """Nobody can say that they are one run, or of the same clients, or of one release: so the worst clients add up."""
    published = ledger({"client 0": 1.0, "client 1": 3.0}, {}, "")
    published = replace(published, releases=tuple(replace(each, name=name) for each in published.releases))
    own = ledger({"client 0": 2.0}, {"client 0": "d"}, "own")
    own = replace(own, releases=tuple(replace(each, name=name) for each in own.releases))
    folders = written(tmp_path, published, own, published)
    worst = [release("", z) for z in (1.0, 2.0, 1.0)]
    assert spent(read_ledgers(folders), "public", "example").epsilon == close(epsilon(worst, DELTA))
    assert read_ledgers(folders[:1]) == published, "nothing is composed"
    for again in (folders[0], tmp_path / "1" / ".." / "0"):
        with pytest.raises(RunError, match=r"0 is the same run as .*0; its releases happened once"):
            read_ledgers([*folders, again])


def test_the_command_refuses_a_run_that_is_given_twice(config_file: Path, tmp_path: Path) -> None:
    keys = ["privacy.mechanism=dp-sgd", "privacy.epsilon=2.0", "privacy.delta=0.01", "rounds=2"]
    run(load_config(config_file, keys), tmp_path / "one")
    run(load_config(config_file, keys), tmp_path / "two")
    runner = CliRunner()

    def composed(*words: str) -> object:
        names = [word if word.startswith("-") or word[0].isdigit() else str(tmp_path / word) for word in words]
        return runner.invoke(app, ["privacy", "ledger", *names, "--json"])

    with pytest.raises(RunError, match=r"one is the same run as .*one; its releases happened once, so give it once"):
        raise composed("one", "two", "one").exception  # type: ignore[attr-defined]
    both = json.loads(composed("one", "two").stdout)  # type: ignore[attr-defined]
    alone = json.loads(composed("one").stdout)  # type: ignore[attr-defined]
    names = [json.loads((tmp_path / name / "ledger.json").read_bytes())["run"] for name in ("one", "two")]
    printed = json.dumps(both) + json.dumps(alone) + composed("one", "two").stdout  # type: ignore[attr-defined]
    assert not any(name in printed for name in names), "a run's name is the salt of digests that are published"
    with pytest.raises(ConfigError, match=r"--delta = 0\.9: must be below 1/16, at most"):
        raise composed("one", "--delta", "0.9").exception  # type: ignore[attr-defined]
    assert 1.2 * alone["spent"][0]["epsilon"] < both["spent"][0]["epsilon"] < 2 * alone["spent"][0]["epsilon"]
