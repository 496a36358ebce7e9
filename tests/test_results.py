"""The schema of `summary.json`, and the aggregates that terminal and report share."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.results import Results, Spread, Summary, rounded_up

FRACTIONS = st.floats(0, 1)


@pytest.fixture
def summary(config_file: Path, tmp_path: Path) -> Summary:
    return run(load_config(config_file, ["rounds=1"]), tmp_path / "run")


def varied(summary: Summary, **changes: Any) -> Summary:
    return Summary.model_validate(summary.as_dict() | changes)


def test_reading_gives_what_was_written(summary: Summary, tmp_path: Path) -> None:
    content = (tmp_path / "run" / "summary.json").read_bytes()
    assert Summary.from_json(content) == summary
    assert json.loads(content) == summary.as_dict()
    summary.write(tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == content


def test_names_that_are_not_unicode_are_kept(summary: Summary, tmp_path: Path) -> None:
    client = summary.as_dict()["per_client"][0] | {"classes": ["caf\udce9"]}
    odd = varied(summary, per_client=[client])
    odd.write(tmp_path)
    assert Summary.from_json((tmp_path / "summary.json").read_bytes()) == odd
    assert odd.per_client[0].classes == ("caf\udce9",)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"accuracy": {"local": 1.5}}, r"accuracy\.local: .*less than or equal to 1"),
        ({"accuracy": {"local": float("nan")}}, r"accuracy\.local: "),
        ({"algorithm": 3}, "algorithm: .*valid string"),
        ({"per_client": [{"client": -1}]}, r"per_client\.0\.client: "),
        ({"seconds": {"total": 1.0}}, r"seconds\.train: Field required"),
    ],
)
def test_damage_is_named_in_one_line(changes: dict[str, Any], complaint: str, summary: Summary) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        Summary.from_json(json.dumps(summary.as_dict() | changes))
    assert "\n" not in str(error.value)


def test_rounding_above_one_is_no_damage(summary: Summary) -> None:
    """Thirteen test images, each with a weight of 1/13, can sum to a little more than 1."""
    accuracy = 1 + 2**-52
    assert varied(summary, accuracy={"local": accuracy}).accuracy.local == accuracy


@given(st.lists(FRACTIONS, min_size=2))
def test_a_spread_is_mean_and_sample_deviation(values: list[float]) -> None:
    spread = Spread.of([None, *values, None])
    assert spread is not None
    assert spread.mean == pytest.approx(statistics.fmean(values))
    assert spread.deviation == pytest.approx(statistics.stdev(values))


def test_one_value_has_no_deviation_and_none_has_no_spread() -> None:
    assert Spread.of([0.5, None]) == (0.5, None)
    assert Spread(0.3891, None).percent() == "38.9"
    assert Spread(0.3891, 0.0692).percent() == "38.9 ± 6.9"
    assert Spread.of([None, None]) is None


def test_one_run_keeps_its_mean_and_spreads_over_its_clients(summary: Summary) -> None:
    clients = [
        result | {"novel": value, "attack_success": None}
        for result, value in zip(summary.as_dict()["per_client"], (0.25, 0.75), strict=True)
    ]
    one = varied(summary, per_client=clients, accuracy={"novel": 0.6})  # a mean that weights clients
    assert Results((one,)).accuracy("novel") == (0.6, pytest.approx(0.5 / 2**0.5))
    assert Results((one,)).accuracy("domain") is None


def test_the_deviation_leaves_out_attackers_as_the_mean_does(summary: Summary) -> None:
    template = summary.as_dict()["per_client"][0]
    values = [(0.0, None), (0.5, 0.25), (0.7, 0.75)]  # local accuracy, and the attack's success; the first one attacks
    clients = [
        template | {"client": client, "local": local, "attack_success": success}
        for client, (local, success) in enumerate(values)
    ]
    attacked = varied(summary, clients=3, per_client=clients, accuracy={"local": 0.6}, attack_success=0.5)
    assert Results((attacked,)).accuracy("local") == (0.6, pytest.approx(0.2 / 2**0.5))
    assert Results((attacked,)).attack_success() == (0.5, pytest.approx(0.5 / 2**0.5))


def test_several_runs_spread_over_seeds_only(summary: Summary) -> None:
    runs = tuple(
        varied(summary, seed=seed, accuracy={"local": local}, seconds={"train": seconds, "total": 100.0})
        for seed, local, seconds in ((1, 0.5, 1.0), (0, 0.7, 4.0))
    )
    results = Results(runs)
    assert results.seeds == [0, 1]
    assert results.accuracy("local") == (pytest.approx(0.6), pytest.approx(0.2 / 2**0.5))
    assert results.seconds == 2.5, "of training, not of the whole run"
    assert results.mean_bytes("upload_bytes_per_client_round") == summary.communication.upload_bytes_per_client_round
    some = Results((runs[0], varied(runs[1], accuracy={"local": None})))
    assert some.accuracy("local") == (0.5, None), "a single value has no deviation"


def test_the_claim_is_that_of_the_worst_run(summary: Summary) -> None:
    def spent(private: bool, simulated: bool, epsilon: float | None) -> Summary:
        privacy = {"private": private, "simulated": simulated, "epsilon": epsilon, "delta": 1e-5, "unit": "client"}
        return varied(summary, privacy=privacy | {"statement": ""})

    low, high = spent(True, False, 1.0), spent(True, False, 2.0)
    exposed, simulated = spent(False, False, None), spent(False, True, 3.0)
    claim = Results((low, high)).claim
    assert (claim.private, claim.bounded, claim.epsilon, claim.units) == (True, True, 2.0, ("client",))
    assert not Results((low, exposed)).claim.bounded
    assert Results((low, exposed)).claim.epsilon is None
    mixed = Results((low, simulated)).claim
    assert (mixed.private, mixed.simulated, mixed.bounded, mixed.epsilon) == (False, True, True, 3.0)
    assert not Results((simulated, exposed)).claim.bounded


@given(st.floats(1e-6, 1e6))
def test_epsilon_is_never_shown_too_small(epsilon: float) -> None:
    assert epsilon <= float(rounded_up(epsilon)) <= epsilon * 1.011
