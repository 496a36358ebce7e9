"""The schema of `summary.json`, and the aggregates that terminal and report share."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from sordino.errors import ConfigError
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.results import Results, Spread, Summary, crossed, rounded_up, unequal_steps, verdict

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


@given(st.floats(1e-6, 1e6), st.integers(2, 6))
def test_epsilon_is_never_shown_too_small(epsilon: float, digits: int) -> None:
    assert epsilon <= float(rounded_up(epsilon, digits)) <= epsilon * (1 + 1.1 * 10 ** (1 - digits))
    assert rounded_up(epsilon) == rounded_up(epsilon, 3)


def held_against(learned: list[float], given: list[float], seed: int = 0, **changes: Any) -> dict[str, Any]:
    """What a run of clients with these local accuracies writes, beside the hand-written prompt's."""
    mean = {"local": statistics.fmean(given)}
    hand_written = {"prompt": "a photo of a", "accuracy": mean, "per_client": [{"local": value} for value in given]}
    clients = [{"client": client, "local": value} for client, value in enumerate(learned)]
    return {
        "seed": seed,
        "clients": len(learned),
        "accuracy": {"local": statistics.fmean(learned)},
        "per_client": clients,
        "hand_written": hand_written | changes,
        "before": {"local": 0.1},
        "best": {"round": 3 + seed, "measure": "local", "accuracy": {"local": 0.9}},
    }


def test_a_run_says_what_it_is_held_against(config_file: Path, tmp_path: Path, summary: Summary) -> None:
    """The start of `metrics.jsonl`, the accuracy that `zero-shot` has, and the best evaluated round."""
    zero = run(load_config(config_file, ["algorithm=zero-shot"]), tmp_path / "zero")
    learned = run(load_config(config_file, ["algorithm=promptfl"]), tmp_path / "learned")
    lines = [json.loads(line) for line in (tmp_path / "learned" / "metrics.jsonl").read_text().splitlines()]
    assert learned.before is not None
    assert learned.before.model_dump() == lines[0]["accuracy"]
    assert learned.hand_written is not None
    assert learned.hand_written.prompt == "a photo of a"
    assert learned.hand_written.accuracy == zero.accuracy
    assert [one.local for one in learned.hand_written.per_client] == [one.local for one in zero.per_client]
    assert learned.best is not None
    evaluated = {line["round"]: line["accuracy"]["local"] for line in lines if line["accuracy"]}
    assert set(evaluated) == {0, 2, 4, 6}
    assert evaluated[learned.best.round] == max(evaluated.values()) == learned.best.accuracy.local
    assert zero.hand_written is not None
    assert zero.hand_written.itself
    assert (zero.before, zero.best) == (None, None)
    assert verdict(Results((zero,))) is None
    random = run(load_config(config_file, ["algorithm=random-prompt"]), tmp_path / "random")
    assert random.hand_written is not None
    assert not random.hand_written.itself, "it learns nothing either, but is no hand-written prompt"
    assert random.hand_written.accuracy == zero.accuracy
    assert random.privacy.private


@pytest.mark.parametrize("simulated", [False, True])
def test_a_private_run_offers_no_best_round(simulated: bool, config_file: Path, tmp_path: Path) -> None:
    private = ["privacy.mechanism=dp-sgd", "privacy.epsilon=8.0", "privacy.delta=0.01"]
    config = load_config(config_file, [*private, f"privacy.simulation={str(simulated).lower()}"])
    summary = run(config, tmp_path / "private")
    assert summary.before is not None
    assert summary.best is None
    assert Results((summary,)).best_withheld


def test_the_hand_written_prompt_of_a_method_that_reads_patches_is_zero_shots(
    config_file: Path, tmp_path: Path
) -> None:
    zero = run(load_config(config_file, ["algorithm=zero-shot"]), tmp_path / "zero")
    patches = run(load_config(config_file, ["algorithm=fedotp", "rounds=1"]), tmp_path / "patches")
    assert patches.hand_written is not None
    assert patches.hand_written.accuracy == zero.accuracy


def test_bad_words_are_refused_before_training(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["settings.zero-shot.prompt_text=the picture of a"])
    words = run(config, tmp_path / "words").hand_written
    assert words is not None
    assert words.prompt == "the picture of a"
    with pytest.raises(ConfigError, match="settings.zero-shot.prompt_text = 3"):
        run(load_config(config_file, ["settings.prompt_text=3"]), tmp_path / "bad")
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()


def test_a_summary_of_an_earlier_version_still_reads(summary: Summary) -> None:
    content = summary.as_dict()
    for name in ("before", "hand_written", "best", "effort"):
        del content[name]
    results = Results((Summary.from_json(json.dumps(content)),))
    assert verdict(results) is None
    assert results.gain("local") is results.hand_written("local") is results.before("local") is None
    assert results.best is results.gradient_steps is results.steps_a_round is None
    assert not results.best_withheld


def test_several_seeds_are_paired_and_a_gain_is_one_above_zero(summary: Summary) -> None:
    learned, given = [0.614, 0.66, 0.63], [0.602, 0.61, 0.605]
    runs = tuple(
        varied(summary, **held_against([one] * 2, [two] * 2, seed))
        for seed, (one, two) in enumerate(zip(learned, given, strict=True))
    )
    results = Results(runs)
    expected = ttest_rel(learned, given).confidence_interval(0.95)
    gain = results.gain("local")
    assert gain is not None
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))
    said = verdict(results)
    assert said == (
        "local accuracy no better than the hand-written prompt: 63.5 to 60.6, "
        f"interval of the difference {100 * expected.low:.1f} to {100 * expected.high:.1f}"
    )
    assert str(results.best) == "90.0 (3-5)"
    assert results.before("local") == pytest.approx(0.1)


def test_one_run_pairs_honest_clients_with_pictures(summary: Summary) -> None:
    learned, given = [0.9, 0.8, 0.85, 0.95], [0.5, 0.45, 0.5, 0.52]
    variance = {"local": {"pictures": 50, "over_pictures": 0.001, "over_pairs": 0.0004}}
    alone = Results((varied(summary, **held_against(learned, given, variance=variance)),))
    differences = [one - two for one, two in zip(learned, given, strict=True)]
    gain = alone.gain("local")
    assert gain == crossed(statistics.fmean(differences), differences, 50, 0.001, 0.0004)
    attacked = held_against(learned, given, variance=variance)
    for client, success in zip(attacked["per_client"], (None, 0.1, 0.2, 0.1), strict=True):
        client["attack_success"] = success
    content = attacked | {"attack_success": 0.13, "accuracy": {"local": statistics.fmean(learned[1:])}}
    content["hand_written"]["accuracy"] = {"local": statistics.fmean(given[1:])}
    gain = Results((varied(summary, **content),)).gain("local")
    assert gain == pytest.approx(crossed(statistics.fmean(differences[1:]), differences[1:], 50, 0.001, 0.0004))
    assert "too few values" in str(verdict(Results((varied(summary, **held_against(learned, given)),))))


def test_a_gain_tells_what_fell_and_a_loss_tells_what_rose(summary: Summary) -> None:
    def of(local: float, neighbor: float) -> Results:
        runs = []
        for seed in range(3):
            content = held_against([local + 0.01 * seed], [0.5], seed)
            content["accuracy"]["neighbor"] = neighbor + 0.001 * seed
            content["hand_written"]["accuracy"]["neighbor"] = 0.5
            runs.append(varied(summary, **content))
        return Results(tuple(runs))

    assert str(verdict(of(0.8, 0.4))).startswith("local accuracy better than the hand-written prompt: 81.0 to 50.0")
    assert "; but neighbor fell: 40.1 to 50.0, -10.1 to -9.7" in str(verdict(of(0.8, 0.4)))
    assert "neighbor" not in str(verdict(of(0.8, 0.6)))
    assert "worse than the hand-written prompt" in str(verdict(of(0.2, 0.6)))
    assert "; neighbor is better: 60.1 to 50.0" in str(verdict(of(0.2, 0.6)))


def test_differences_to_the_first_are_paired_by_seed_and_by_data(summary: Summary) -> None:
    def of(values: dict[int, float], **changes: Any) -> Results:
        return Results(
            tuple(varied(summary, seed=seed, accuracy={"local": value}, **changes) for seed, value in values.items())
        )

    first = of({0: 0.5, 1: 0.6, 2: 0.4})
    other = of({2: 0.45, 0: 0.52, 1: 0.66, 9: 0.9})
    expected = ttest_rel([0.52, 0.66, 0.45], [0.5, 0.6, 0.4]).confidence_interval(0.95)
    difference = other.difference(first, "local")
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert first.difference(first, "local") is None
    assert of({7: 0.5}).difference(first, "local") is None
    assert of({0: 0.5, 1: 0.6}, dataset="others").difference(first, "local") is None
    assert of({1: 0.7}).difference(first, "local") == (pytest.approx(0.1), None, None)


def test_unequal_steps_are_told_in_one_line() -> None:
    assert unequal_steps({"promptfl": (4, 80.0), "dp-fpl": (1, 20.0), "zero-shot": (0, 0.0)}) == (
        "promptfl takes 4 local steps a round, dp-fpl 1; compare --equal-steps gives all the same number"
    )
    told = unequal_steps({"local": (1, 20.0), "dp-fpl": (1, 20.0), "promptfl": (4, 80.0)})
    assert str(told).startswith("local and dp-fpl take 1 local step a round, promptfl 4;")
    assert str(unequal_steps({"a": (1, 50.0), "b": (1, 90.0)})).startswith("a takes 50 gradient steps a client, b 90;")
    assert unequal_steps({"a": (4, 80.0), "b": (1, 80.0), "zero-shot": (0, 0.0)}) is None
    assert unequal_steps({"zero-shot": (0, 0.0)}) is None
