"""The verdict against summaries that are varied from real ones: its numbers, and that it claims only what is shown."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from report.conftest import Comparison
from sordino.report.groups import Group, group_runs
from sordino.report.runs import Run, read_run
from sordino.report.sections.verdict import best_of, contenders, verdict_sentences
from sordino.results import Accuracy

ACCURACIES = st.lists(st.floats(0, 1), min_size=3, max_size=3)
HAND_WRITTEN = 0.25
CLAIMS = re.compile(r"([\d.]+) points (better|worse) than ([^;.]*?[\d.]+%[^;(]*?) ?\(")


@pytest.fixture(scope="session")
def real(comparisons: dict[str, Comparison]) -> dict[str, Run]:
    """A real run of each method; of those with noise, one that is private and one that simulates it."""
    return {name: read_run(comparisons["one seed"].runs(name)[0]) for name in ("promptfl", "dp-fpl", "local")}


def varied(run: Run, algorithm: str, seed: int, local: float, **changes: Any) -> Run:
    """Return a real run with another name and accuracy, the same for all clients and measures."""
    assert run.summary.hand_written is not None
    known = run.summary.hand_written.model_copy(update={"accuracy": Accuracy(local=HAND_WRITTEN), "variance": {}})
    update = {"algorithm": algorithm, "seed": seed, "accuracy": Accuracy(local=local), "hand_written": known}
    config = run.config | {"algorithm": algorithm, "seed": seed} | changes
    return replace(run, summary=run.summary.model_copy(update=update), config=config)


def groups_of(run: Run, accuracies: dict[str, Sequence[float]]) -> list[Group]:
    return group_runs(
        [varied(run, name, seed, value) for name, values in accuracies.items() for seed, value in enumerate(values)]
    )


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Student's interval of 95%, computed without the package."""
    mean, count = statistics.fmean(differences), len(differences)
    half = student.ppf(0.975, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return mean - half, mean + half


def sentence(groups: Sequence[Group], topic: str) -> str:
    found = dict(verdict_sentences(groups))
    assert list(found) == ["Accuracy", "Privacy", "Attacks"]
    return found[topic]


@given(ACCURACIES, ACCURACIES, ACCURACIES)
def test_a_difference_is_claimed_exactly_where_its_interval_leaves_zero_out(
    real: dict[str, Run], one: list[float], two: list[float], alone: list[float]
) -> None:
    groups = groups_of(real["promptfl"], {"one": one, "two": two, "local": alone})
    text = sentence(groups, "Accuracy")
    best, other = (one, two) if statistics.fmean(one) >= statistics.fmean(two) else (two, one)
    chosen = best_of(groups)
    assert chosen is not None
    assert chosen[0].label in ("one", "two"), "training alone is what others are held against"
    assert f"local accuracy, {100 * statistics.fmean(best):.1f}%" in text.replace("-0.0", "0.0")
    claimed = {"prompt" if "hand-written" in name else "local": word for _, word, name in CLAIMS.findall(text)}
    for name, values in (("prompt", [HAND_WRITTEN] * 3), ("local", alone)):
        low, high = interval([a - b for a, b in zip(best, values, strict=True)])
        if min(abs(low), abs(high)) > 1e-9:  # else rounding decides
            assert claimed.get(name) == ("better" if low > 0 else "worse" if high < 0 else None), (name, text)
    low, _ = interval([a - b for a, b in zip(best, other, strict=True)])
    if abs(low) > 1e-9:
        assert ("ahead of" in text) == (low > 0)
        assert ("do not tell it apart" in text) == (low <= 0)


def test_the_numbers_are_those_of_the_summaries(real: dict[str, Run]) -> None:
    accuracies = {"one": [0.80, 0.82, 0.81], "local": [0.60, 0.61, 0.59], "class-prior": [0.9, 0.5, 0.7]}
    text = sentence(groups_of(real["promptfl"], accuracies), "Accuracy")
    expected = (
        ("the hand-written prompt's 25.0%", "better than", [value - HAND_WRITTEN for value in accuracies["one"]]),
        ("the 60.0% of local", "better than", [0.2, 0.21, 0.22]),
        ("the 70.0% of class-prior", "not shown to differ from", [-0.1, 0.32, 0.11]),
    )
    for name, word, differences in expected:
        low, high = (100 * end for end in interval(differences))
        mean = 100 * statistics.fmean(differences)
        assert f"{low:.1f} to {high:.1f}" in text
        told = f"{mean:.1f} points {word} {name}" if "not" not in word else f"{word} {name} ({mean:.1f} points"
        assert told in text, text


def test_a_control_is_never_the_best(real: dict[str, Run]) -> None:
    best = {"one": [0.3, 0.3], "random-prompt": [0.9, 0.9], "class-prior": [0.8, 0.8]}
    groups = groups_of(real["promptfl"], best)
    assert [group.label for group in contenders(groups)] == ["one"]


def test_one_seed_tells_no_two_methods_apart(real: dict[str, Run]) -> None:
    groups = groups_of(real["promptfl"], {"one": [0.99], "two": [0.01], "local": [0.02]})
    text = sentence(groups, "Accuracy")
    assert "one seed does not tell it apart from two" in text
    assert "of too few seeds to claim a difference" in text
    assert not [name for _, _, name in CLAIMS.findall(text) if "local" in name]
    assert "ahead" not in text


def test_no_accuracy_and_other_data_are_said(real: dict[str, Run]) -> None:
    run = varied(real["promptfl"], "one", 0, 0.5)
    nothing = replace(run, summary=run.summary.model_copy(update={"accuracy": Accuracy()}))
    assert "No accuracy was measured" in sentence(group_runs([nothing]), "Accuracy")
    elsewhere = replace(run, summary=run.summary.model_copy(update={"dataset": "other", "seed": 1}))
    assert "none of them is called the best" in sentence(group_runs([run, elsewhere]), "Accuracy")


def test_a_prompt_that_learned_nothing_is_not_the_best(comparisons: dict[str, Comparison]) -> None:
    """In a real comparison, the hand-written prompt and training alone are yardsticks."""
    comparison = comparisons["two seeds"]
    groups = group_runs([read_run(folder) for row in comparison.rows for folder in comparison.runs(row.algorithm)])
    assert [group.label for group in contenders(groups)] == ["promptfl", "dp-fpl"]
    only = [group for group in groups if group.label == "zero-shot"]
    assert "nothing was learned" in sentence(only, "Accuracy")
    assert "nothing to protect" in sentence(only, "Privacy")


def test_privacy_is_promised_only_where_it_is(real: dict[str, Run]) -> None:
    def said(name: str) -> str:
        return sentence(group_runs([real[name]]), "Privacy")

    assert said("promptfl").startswith("Nothing here is private: what was learned")
    assert said("local").startswith("Nothing here is private: noise was simulated")
    summary = real["dp-fpl"].summary.privacy
    assert summary.epsilon is not None
    assert said("dp-fpl").startswith("dp-fpl promises ε = 8 at δ = 0.01 for each example")
    assert "what this cost in accuracy is not known" in said("dp-fpl")


@pytest.mark.parametrize(
    ("noisy", "expected"),
    [
        ([0.5, 0.51, 0.49], "costs 30.0 points of local accuracy"),
        ([0.5, 0.9, 0.85], "is not shown to cost local accuracy (-5.0 points"),
        ([0.9, 0.91, 0.92], "is better by 11.0 points"),
    ],
)
def test_the_cost_of_privacy_is_against_the_same_settings_without_noise(
    real: dict[str, Run], noisy: list[float], expected: str
) -> None:
    private, bare = real["dp-fpl"], real["promptfl"]
    with_noise = [varied(private, "dp-fpl", seed, value, privacy={"epsilon": 8.0}) for seed, value in enumerate(noisy)]
    without = [0.8, 0.8, 0.8]

    def plain(**changes: Any) -> list[Run]:
        runs = [
            varied(private, "dp-fpl", seed, value, **({"privacy": {"mechanism": "none"}} | changes))
            for seed, value in enumerate(without)
        ]
        privacy = {"privacy": bare.summary.privacy}
        return [replace(run, summary=run.summary.model_copy(update=privacy)) for run in runs]

    text = sentence(group_runs([*with_noise, *plain()]), "Privacy")
    assert expected in text, text
    assert "not private: dp-fpl no ε" in text.replace("\N{NO-BREAK SPACE}", " ")
    other = sentence(group_runs([*with_noise, *plain(rounds=99)]), "Privacy")
    assert "is not known" in other, "a difference in rounds is no cost of privacy"


def test_attacks_that_were_made_are_told_as_they_went(audited: Path, real: dict[str, Run]) -> None:
    assert "No attack was tried" in sentence(group_runs([real["dp-fpl"]]), "Attacks")
    run = read_run(audited)
    assert run.audit is not None
    found = {name: dict(attack) for name, attack in run.audit["attacks"].items()}
    membership = {name: found["membership"][name] for name in ("lira", "rmia", "rmia_offline", "shadow_attack")}

    def said(auc: tuple[float, float, float], canaries: dict[str, Any] | None = None) -> str:
        low, middle, high = auc
        guesses = {name: attack | {"auc": middle, "auc_interval": [low, high]} for name, attack in membership.items()}
        rounds = found["rounds"] | {"attack": found["rounds"]["attack"] | {"auc": 0.3, "auc_interval": [0.2, 0.4]}}
        attacks = found | {"membership": found["membership"] | guesses, "rounds": rounds}
        attacks |= {"canaries": found["canaries"] | (canaries or {})}
        return sentence(group_runs([replace(run, audit={"attacks": attacks})]), "Attacks")

    assert "none of 5 attacks on membership is shown to beat guessing (highest AUC 0.60" in said((0.49, 0.6, 0.7))
    assert "4 of 5 attacks on membership beat guessing (highest AUC 0.60" in said((0.51, 0.6, 0.7))
    assert "proves nothing" in said((0.49, 0.6, 0.7))
    refuted = said((0.49, 0.6, 0.7), {"epsilon": 99.0, "refuted": True})
    assert refuted == "An attack refutes the claim of dp-fpl: it shows ε of at least 99."


def test_the_page_of_a_comparison_begins_with_the_verdict(comparisons: dict[str, Comparison]) -> None:
    comparison = comparisons["two seeds"]
    html = (comparison.folder / "report.html").read_text(encoding="utf-8")
    assert html.index('id="verdict"') < html.index('id="results"')
    best = max((row for row in comparison.rows if row.algorithm in ("promptfl", "dp-fpl")), key=mean_local)
    assert f"{best.algorithm} has the highest local accuracy, {100 * mean_local(best):.1f}%" in html


def mean_local(row: Any) -> float:
    return float(row.accuracy["local"].mean)
