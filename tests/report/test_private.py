"""The page of private tuning: what its verdict claims, and does not."""

from __future__ import annotations

from typing import Any

import pytest

from sordino.report.private import verdict_sentences


def summary(gain: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    known = None if gain is None else {"prompt": "a photo of a", "accuracy": 0.5, "gain": gain}
    accuracy = {"zero_shot": 0.4, "tuned": 0.625}
    seconds = {"search": 30.0, "evaluate": 12.0}
    usual = {"accuracy": accuracy, "test_examples": 8, "clear": True, "seconds": seconds, "costs": None}
    return {**usual, "hand_written": known, **more}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.2, "better than the hand-written one with 50.0% (a difference of 1.0 to 20.0 points"),
        (-0.3, -0.1, "worse than the hand-written one with 50.0% (a difference of -30.0 to -10.0 points"),
        (-0.1, 0.3, "not shown to differ from the hand-written one"),
        (None, None, "not shown to differ from the hand-written one with 50.0%."),
    ],
)
def test_a_difference_is_claimed_only_where_its_interval_leaves_out_zero(
    low: float | None, high: float | None, words: str
) -> None:
    told = dict(verdict_sentences(summary({"mean": 0.1, "low": low, "high": high})))
    assert told["Accuracy"].startswith("The tuned prompt is right on 62.5% of 8 test examples and ")
    assert words in told["Accuracy"]


def test_what_was_secret_and_what_it_cost_follow_the_way_it_ran() -> None:
    clear = dict(verdict_sentences(summary()))
    assert "began at on 40.0%" in clear["Accuracy"]
    assert "in the clear" in clear["Secrecy"]
    assert clear["Cost"] == "Search and both accuracies took 42.0 s."
    costs = {"rounds": 1234, "online_bytes_per_server": 5 << 20}
    shared = dict(verdict_sentences(summary(clear=False, costs=costs)))
    assert "servers and dealer keep to the protocol and no two of the three" in shared["Secrecy"]
    assert "1,234 rounds between the servers" in shared["Cost"]
