"""How much an audit could have shown: the ceiling of canaries, and the number that a claim would need."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from sordino.audit.findings.strength import judge
from sordino.audit.statistics import best_guesses, canaries_to_contradict, most_shown, numbers_of_guesses
from sordino.errors import RunError
from sordino.privacy.ledger import OBSERVERS, Ledger, Release


def shown(canaries: int, delta: float, confidence: float) -> float:
    """The bound of an attack that is right about every canary, by the audit itself."""
    included = np.arange(canaries) % 2 == 0
    return best_guesses(included.astype(float), included, delta, confidence, np.random.default_rng(0)).epsilon


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("delta", [0.0, 1e-6, 1e-5])
def test_a_perfect_attack_contradicts_with_so_many_canaries_and_not_with_two_less(epsilon: float, delta: float) -> None:
    needed = canaries_to_contradict(epsilon, delta, 0.975)
    assert needed is not None
    assert shown(needed, delta, 0.975) > epsilon
    assert shown(needed - 2, delta, 0.975) <= epsilon


def test_the_numbers_of_the_page_on_privacy() -> None:
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"at delta 1e-5 (a claim of \d+ takes .*?) or more cannot be\s", page, re.DOTALL)
    stated = {int(claim): int(count) for claim, count in re.findall(r"of (\d+)\s+takes\s+(\d+)", words)}
    assert stated == {claim: canaries_to_contradict(float(claim), 1e-5, 0.975) for claim in (2, 4, 5)}
    assert canaries_to_contradict(6.0, 1e-5, 0.975) is None


@pytest.mark.parametrize("canaries", [2, 15, 16, 100])
def test_the_most_that_can_be_shown_is_what_a_perfect_attack_shows(canaries: int) -> None:
    assert most_shown(canaries, 1e-5, 0.95) == pytest.approx(shown(canaries, 1e-5, 0.95), abs=1e-9)


def test_without_delta_the_number_is_known() -> None:
    """No wrong guess among m has probability (1 - p)^m at p = 1 / (1 + e^epsilon)."""
    epsilon = 6.0
    needed = canaries_to_contradict(epsilon, 0.0, 0.975)
    significance = 0.025 / len(numbers_of_guesses(needed))
    exact = math.log(significance) / math.log1p(-1 / (1 + math.exp(epsilon)))
    assert exact <= needed <= exact + 2


@pytest.mark.parametrize(("epsilon", "delta"), [(8.0, 1e-5), (4.0, 1e-3), (60.0, 0.0), (1000.0, 1e-5), (1.0, 0.5)])
def test_some_claims_no_number_of_canaries_contradicts(epsilon: float, delta: float) -> None:
    assert canaries_to_contradict(epsilon, delta, 0.975) is None
    for canaries in (10, 300, 20_000):
        assert most_shown(canaries, delta, 0.975) <= epsilon


RELEASE = Release("a sum", "client 0", "example", (1.0,), 1.0, 1, "client", OBSERVERS)
LEDGER = Ledger((RELEASE,), delta=1e-5, run="ab")


def text(blocks: object) -> str:
    return str(blocks)


def test_no_audit_is_said_and_what_one_would_need() -> None:
    data, blocks, refuted = judge(None, LEDGER, "example")
    assert not refuted
    assert data["audited"] is False
    assert "Not audited" in text(blocks)
    needed = canaries_to_contradict(data["canaries"]["claimed_epsilon"], 1e-5, 0.975)
    assert data["canaries"]["needed"] == needed
    assert f"takes {needed:,} canaries or more" in text(blocks)


def test_an_attack_that_does_not_apply_is_no_audit() -> None:
    data, blocks, _ = judge({"attacks": {"canaries": {"reason": "its unit is the client"}}}, LEDGER, "client")
    assert not data["audited"]
    assert "no attack applies to this run" in text(blocks)
    assert data["canaries"] is None  # canaries audit examples only


CANARIES = {
    "epsilon": 5.0,
    "guesses": 64,
    "correct": 64,
    "observer": "every gradient as it was released",
    "canaries": 64,
    "claimed_epsilon": 1.0,
    "delta": 1e-5,
    "refuted": True,
}


def test_a_contradiction_is_not_hidden() -> None:
    _, blocks, refuted = judge({"attacks": {"canaries": CANARIES}}, LEDGER, "example")
    assert refuted
    assert "the claim is false" in text(blocks)


def test_a_damaged_audit_is_refused_in_a_line() -> None:
    broken = [{}, {"attacks": 3}, {"attacks": {"canaries": {}}}, {"attacks": {"canaries": CANARIES | {"delta": "x"}}}]
    for content in broken:
        with pytest.raises(RunError, match=r"^audit.json is damaged"):
            judge(content, LEDGER, "example")
