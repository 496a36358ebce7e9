"""Whether tuning was worth it: the interval against a simulation, and what is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sordino.private_tuning.worth import as_lines, by_class, gain_of, worse_classes


def share(correct: torch.Tensor) -> float:
    return float(correct.double().mean())


def pair(won: int, lost: int, both: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hits of two prompts, of which one alone is right on some examples."""
    before = torch.tensor([False] * won + [True] * lost + [True] * both + [False] * neither)
    after = torch.tensor([True] * won + [False] * lost + [True] * both + [False] * neither)
    return before, after


def summary(won: int, lost: int, both: int, neither: int) -> dict[str, Any]:
    before, after = pair(won, lost, both, neither)
    labels = torch.arange(len(before)) % 2
    return {
        "test_examples": len(before),
        "accuracy": {"zero_shot": 0.0, "tuned": share(after)},
        "hand_written": {"prompt": "a photo of a", "accuracy": share(before), "gain": gain_of(before, after)._asdict()},
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
        _, low, high = gain_of(before, after)
        assert low is not None
        assert high is not None
        covered += low <= won - lost <= high
    assert covered / 600 >= 0.93  # 0.95 less two standard errors of 600 samples


def test_the_difference_is_that_of_the_accuracies_and_its_sign_turns() -> None:
    before, after = pair(7, 3, 40, 10)
    (mean, low, high), back = gain_of(before, after), gain_of(after, before)
    assert low is not None
    assert high is not None
    assert mean == pytest.approx(share(after) - share(before))
    assert back == pytest.approx((-mean, -high, -low))
    assert low < mean < high


def test_examples_on_which_both_agree_do_not_hide_a_difference() -> None:
    """The interval is of a pair: it is narrower than that of two independent samples."""
    before, after = pair(30, 5, 500, 465)
    found = gain_of(before, after)
    assert found.low is not None
    assert found.high is not None
    independent = 1.96 * np.sqrt(sum(p * (1 - p) / 1000 for p in (share(before), share(after))))
    assert (found.high - found.low) / 2 < independent / 2
    assert found.above


@pytest.mark.parametrize(
    ("counts", "word", "advised"),
    [
        ((40, 5, 40, 15), "better than", False),
        ((5, 40, 40, 15), "worse than", True),
        ((6, 5, 50, 9), "no better than", True),
    ],
)
def test_it_is_said_in_a_line(counts: tuple[int, int, int, int], word: str, advised: bool) -> None:
    line = as_lines(summary(*counts))[1]
    assert line.startswith(f"{word} the hand-written prompt: ")
    assert ("keep the hand-written one" in line) == advised
    assert "\n" not in line


def test_classes_on_which_the_hand_written_prompt_is_better_are_named_worst_first() -> None:
    before = torch.tensor([True, True, True, True, False, False, True, False])
    after = torch.tensor([False, False, True, False, True, True, True, False])
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    parts = by_class(["a", "b", "c", "d", "e"], labels, before, after)
    assert parts is not None
    found = summary(2, 2, 2, 2) | {"by_class": parts}
    assert parts["d"] == {"hand_written": 0.5, "tuned": 0.5, "test_examples": 2}
    assert "e" not in parts  # which has no example
    assert [name for name, _ in worse_classes(found)] == ["a", "b"]
    assert as_lines(found)[2] == "the hand-written prompt is better on a (100.0 to 0.0), b (100.0 to 50.0)"


def test_a_summary_of_before_says_nothing() -> None:
    found = {"test_examples": 4, "accuracy": {"zero_shot": 0.5, "tuned": 0.4}}
    assert as_lines(found) == ["accuracy on 4 test examples: 0.400, 0.500 with the initial prompt before the search"]
