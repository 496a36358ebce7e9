"""An epsilon that bounds nothing is marked wherever it shows, whoever says that the prompt is private."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from serving.conftest import some_facts
from serving.test_hostile import resigned
from sordino.errors import ConfigError, PromptError
from sordino.privacy.ledger import LEAST_PRIVATE_NOISE, Ledger, Release
from sordino.privacy.statement import as_summary, is_private
from sordino.results.summary import MOST_PRIVATE_EPSILON
from sordino.serving.manifest import CARD
from sordino.serving.registry import Registry
from sordino.serving.sources import check_claim, from_run


def ledger_of(noise: float, rate: float = 1.0, delta: float | None = 1e-5, steps: int = 1) -> Ledger:
    release = Release("sums", "client 0", "example", (noise,), rate, steps, "client", ("server",))
    return Ledger((release,), delta=delta)


@pytest.mark.parametrize("noise", ["1e-30", "1e-20"])  # of the first, epsilon is no number any more
def test_a_run_with_next_to_no_noise_is_published_with_a_mark_or_not_at_all(
    noise: str, make_run: Callable[..., Path], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    run = make_run("privacy.mechanism=dp-sgd", f"privacy.noise_multiplier={noise}")
    summary = json.loads((run / "summary.json").read_bytes())["privacy"]
    assert summary["private"] is False
    assert summary["statement"].startswith("Not private: ")
    assert json.loads((run / "ledger.json").read_bytes())["private"] is False
    material = from_run(run, key)
    assert (material.facts.mark, material.facts.promise) == ("NOT PRIVATE", "NOT PRIVATE")
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        with pytest.raises(ConfigError, match="--accept-not-private"):
            registry.publish("fabric", material.facts, material.files, key)
        registry.publish("fabric", material.facts, material.files, key, accept_not_private=True)
        card = registry.inspect("fabric").files[CARD].decode()
    assert "**NOT PRIVATE.**" in card
    assert "differential-privacy" not in card


@pytest.mark.parametrize("epsilon", [None, MOST_PRIVATE_EPSILON * 1.01, 5e39])
def test_whoever_says_private_without_a_bound_is_marked(epsilon: float | None) -> None:
    said = {"private": True, "simulated": False, "delta": 1e-5, "unit": "example", "statement": "Private, it says."}
    facts = some_facts(privacy=said | {"epsilon": epsilon, "ledger_sha256": None})
    assert (facts.mark, facts.promise) == ("NOT PRIVATE", "NOT PRIVATE")
    nothing = some_facts(privacy=said | {"epsilon": 0.0, "ledger_sha256": None})
    assert (nothing.mark, nothing.promise) == ("", "private: nothing was released")
    most = some_facts(privacy=said | {"epsilon": MOST_PRIVATE_EPSILON, "ledger_sha256": None})
    assert most.promise == "epsilon = 100 for each example"


def test_a_version_from_elsewhere_that_leaves_its_epsilon_out_is_refused(
    make_run: Callable[..., Path], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    run = make_run("settings.batch_size=0", "privacy.mechanism=cotangent", "privacy.epsilon=8.0")
    material = from_run(run, key)
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        registry.publish("fabric", material.facts, material.files, key)
        honest = registry.inspect("fabric", 1)
        check_claim(honest)
        said = honest.manifest.privacy.model_dump()
        silent = resigned(registry, key, 2, {}, privacy=said | {"epsilon": None})
        with pytest.raises(PromptError, match=r"claims another privacy than ledger\.json: epsilon = None, and "):
            check_claim(silent)
        assert silent.manifest.mark == "NOT PRIVATE"


@pytest.mark.parametrize(
    ("ledger", "private"),
    [
        (ledger_of(1e-30), False),
        (ledger_of(1e-20), False),
        (ledger_of(1e-30, steps=1000), False),
        (ledger_of(0.05), False),
        (ledger_of(1.0, delta=None), False),
        (ledger_of(1.0, steps=1000), False),
        (ledger_of(0.1), True),
        (ledger_of(1e-3, rate=1e-6), True),  # in nearly no sample: delta is more
        (Ledger(), True),
    ],
)
def test_a_ledger_is_private_up_to_an_epsilon_that_says_something(ledger: Ledger, private: bool) -> None:
    summary = as_summary(ledger, "example")
    assert (summary["private"], is_private(ledger, "example")) == (private, private)
    assert summary["statement"].startswith("Not private") is not private
    assert private <= ledger.private  # which does not add releases up
    if private and ledger.releases:
        assert summary["epsilon"] <= MOST_PRIVATE_EPSILON


@pytest.mark.parametrize(("rate", "delta"), [(1.0, 0.5), (1e-3, 1e-5), (2e-8, 1e-8)])
def test_the_least_noise_is_far_below_the_largest_epsilon(rate: float, delta: float) -> None:
    """So a ledger whose own word is "not private", without epsilon being computed, is never private by epsilon."""
    ledger = ledger_of(LEAST_PRIVATE_NOISE, rate, delta)
    epsilon = as_summary(ledger, "example")["epsilon"]
    assert epsilon is None or epsilon > MOST_PRIVATE_EPSILON
