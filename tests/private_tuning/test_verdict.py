"""Whether tuning was worth it: the interval against a simulation, and what is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sordino.private_tuning.verdict import accuracy_of, by_class, gain, verdict


def pair(won: int, lost: int, both: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hits of two prompts, of which one alone is right on some examples."""
    before = torch.tensor([False] * won + [True] * lost + [True] * both + [False] * neither)
    after = torch.tensor([True] * won + [False] * lost + [True] * both + [False] * neither)
    return before, after


def summary(won: int, lost: int, both: int, neither: int) -> dict[str, Any]:
    before, after = pair(won, lost, both, neither)
    labels = torch.arange(len(before)) % 2
    return {
        "accuracy": {"zero_shot": accuracy_of(before), "tuned": accuracy_of(after)},
        "gain": gain(before, after),
        "by_class": by_class(["even", "odd"], labels, before, after),
    }


@pytest.mark.parametrize(
    ("count", "won", "lost"), [(20, 0.2, 0.1), (100, 0.05, 0.05), (400, 0.3, 0.1), (60, 0.02, 0.0)]
)
def test_the_interval_covers_the_true_difference(count: int, won: float, lost: float) -> None:
    """In 95 of 100 samples or more, as the adjustment is there for: the plain Wald interval covers fewer."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        kinds = generator.choice(3, size=count, p=[won, lost, 1 - won - lost])
        before, after = torch.from_numpy(kinds == 1), torch.from_numpy(kinds == 0)
        found = gain(before, after)
        covered += found["low"] <= won - lost <= found["high"]
    assert covered / 600 >= 0.93  # 0.95 less two standard errors of 600 samples


def test_the_difference_is_that_of_the_accuracies_and_its_sign_turns() -> None:
    before, after = pair(7, 3, 40, 10)
    there, back = gain(before, after), gain(after, before)
    assert there["difference"] == pytest.approx(accuracy_of(after) - accuracy_of(before))
    assert (back["low"], back["high"]) == pytest.approx((-there["high"], -there["low"]))
    assert there["low"] < there["difference"] < there["high"]


def test_examples_on_which_both_agree_do_not_hide_a_difference() -> None:
    """The interval is of a pair: it is narrower than that of two independent samples."""
    before, after = pair(30, 5, 500, 465)
    found = gain(before, after)
    independent = 1.96 * np.sqrt(sum(p * (1 - p) / 1000 for p in (accuracy_of(before), accuracy_of(after))))
    assert (found["high"] - found["low"]) / 2 < independent / 2
    assert found["low"] > 0


@pytest.mark.parametrize(
    ("counts", "word", "advised"),
    [
        ((40, 5, 40, 15), "better than", False),
        ((5, 40, 40, 15), "worse than", True),
        ((6, 5, 50, 9), "no better than", True),
    ],
)
def test_it_is_said_in_a_line(counts: tuple[int, int, int, int], word: str, advised: bool) -> None:
    first, *_ = verdict(summary(*counts))
    assert f"the tuned prompt is {word} the hand-written one: " in first
    assert ("keep the hand-written one" in first) == advised
    assert "\n" not in first


def test_classes_on_which_the_hand_written_prompt_is_better_are_named_worst_first() -> None:
    before = torch.tensor([True, True, True, True, False, False, True, False])
    after = torch.tensor([False, False, True, False, True, True, True, False])
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    found = {
        "accuracy": {"zero_shot": accuracy_of(before), "tuned": accuracy_of(after)},
        "gain": gain(before, after),
        "by_class": by_class(["a", "b", "c", "d", "e"], labels, before, after),
    }
    assert found["by_class"]["d"] == {"zero_shot": 0.5, "tuned": 0.5, "test_examples": 2}
    assert "e" not in found["by_class"]  # which has no example
    assert verdict(found)[1] == "the hand-written prompt is better on a (100.0 to 0.0), b (100.0 to 50.0)"


def test_a_summary_of_before_says_nothing() -> None:
    assert verdict({"accuracy": {"zero_shot": 0.5, "tuned": 0.4}}) == []
