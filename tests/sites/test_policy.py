"""A site's policy covers all that would leave: every tensor by its name, and everything without noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from sites.owners import NOISE, experiment, write_pictures, write_site
from sordino.privacy.ledger import OBSERVERS, Disclosure, Ledger, Release
from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import LocalFleet, Patience
from sordino.sites.check import verdict
from sordino.sites.coordinator import coordinate
from sordino.sites.hello import names_digest
from sordino.sites.policy import ACCURACY, unnoised
from sordino.sites.proposal import Proposal
from sordino.sites.settings import PolicySettings, load_site
from sordino.sites.site import Site

STATISTICS = {"mechanism": "statistics", "epsilon": 8.0}
PRIVATE = ["statistics", "dp-sgd", "cotangent", "dp-fedavg"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures", 1, 8)


def verdict_of(folder: Path, policy: dict[str, Any], **tables: Any) -> dict[str, Any]:
    site = load_site(write_site(folder, "east", None, policy))
    uniform = {"runtime": {"weighting": "uniform"}}  # as 'dp-fedavg' needs it
    return verdict(site, Proposal.of(experiment(None, **uniform, **tables)))


CENTER = {"center_share": 0.2, "scatter_share": 0.2}


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(
    ("more", "parts"), [({}, ["sums.matrix"]), (CENTER, ["sums.center", "sums.matrix", "sums.scatter"])]
)
def test_the_tensors_of_a_release_of_statistics_leave_only_if_the_policy_names_them(
    more: dict[str, float], parts: list[str], shares: bool, pictures: Path
) -> None:
    upload = ["change", "weight"]
    privacy = STATISTICS | more | ({"noise_by": "shares", "colluders": 1} if shares else {})
    if not more:
        privacy |= {"center_share": 0.0, "scatter_share": 0.0}
    for part in parts:
        told = verdict_of(pictures.parent, {"fields": [*upload, *(set(parts) - {part})]}, privacy=privacy)
        assert not told["allowed"]
        assert f"upload's '{part}' may not leave" in told["reasons"][0]
    assert verdict_of(pictures.parent, {"fields": [*upload, *parts]}, privacy=privacy)["allowed"]
    kept = verdict_of(pictures.parent, {"fields": parts}, privacy=privacy)
    assert f"upload's '{upload[0]}' may not leave" in kept["reasons"][0]


def test_the_names_that_the_policy_is_asked_about_are_those_of_the_messages(pictures: Path, tmp_path: Path) -> None:
    site = Site(load_site(write_site(tmp_path, "east", None)))
    sent: set[str] = set()

    def turn(request: bytes) -> bytes:
        answer = site.turn(request)
        envelope = Envelope.decode(answer)
        for content in envelope.contents.values() if envelope.kind == "round" else ():
            sent.update(safetensors.torch.load(content))
        return answer

    config = experiment(None, privacy=STATISTICS | CENTER, rounds=1)
    coordinate(config, Proposal.of(config), LocalFleet({"east": turn}), tmp_path / "out", Patience())
    assert {"sums.center", "sums.matrix", "sums.scatter"} <= sent
    for name in sent:
        fields = sorted(sent - {name})
        assert f"'{name}' may not leave" in verdict_of(tmp_path, {"fields": fields}, **_tables(config))["reasons"][0]
    assert verdict_of(tmp_path, {"fields": sorted(sent)}, **_tables(config))["allowed"]


def _tables(config: Any) -> dict[str, Any]:
    return {"privacy": config.privacy.model_dump(exclude_none=True), "rounds": config.rounds}


@pytest.mark.parametrize(
    ("privacy", "key"),
    [
        (NOISE | {"noise_multiplier": 0.0}, "noise_multiplier = 0"),
        (NOISE | {"noise_multiplier": 0.0, "epsilon": 8.0}, "noise_multiplier = 0"),
        ({"mechanism": "statistics", "epsilon": float("inf")}, "epsilon = inf"),
        ({"mechanism": "dp-fedavg", "epsilon": float("inf")}, "epsilon = inf"),
    ],
)
def test_a_mechanism_that_adds_no_noise_needs_none_to_be_allowed(
    privacy: Mapping[str, Any], key: str, pictures: Path
) -> None:
    told = verdict_of(pictures.parent, {"mechanisms": PRIVATE}, privacy=privacy)
    assert not told["allowed"]
    assert told["reasons"][0].startswith(f"privacy.{key} adds no noise")
    assert json.dumps(told)
    assert verdict_of(pictures.parent, {"mechanisms": [*PRIVATE, "none"]}, privacy=privacy)["allowed"]


@pytest.mark.parametrize(
    "privacy",
    [NOISE, NOISE | {"epsilon": float("inf")}, STATISTICS, {"mechanism": "dp-fedavg", "noise_multiplier": 1.0}],
)
def test_noise_is_allowed_without_none(privacy: Mapping[str, Any], pictures: Path) -> None:
    policy = {"mechanisms": PRIVATE, "tells": ["sizes", "class_names", "accuracy"]}
    assert verdict_of(pictures.parent, policy, privacy=privacy)["allowed"]


def test_whatever_leaves_without_noise_needs_none_to_be_allowed() -> None:
    def release(multiplier: float) -> Ledger:
        return Ledger((Release("a sum", "client 0", "example", (2.0, multiplier), 1.0, 1, "client", OBSERVERS),))

    strict, open_ = (PolicySettings(epsilon=8.0, mechanisms=names) for names in (["dp-sgd"], ["dp-sgd", "none"]))
    plain = Ledger(disclosures=(Disclosure("each client's bias", "upload"),))
    for planned, words in ((plain, "each client's bias"), (release(0.0), "a release whose noise is 0")):
        assert words in unnoised(strict, planned)
        assert not unnoised(open_, planned)
    own = (ACCURACY, Disclosure("how many", "sizes"), Disclosure("a prompt", "prompt"))
    assert not unnoised(strict, Ledger(release(1.0).releases, own))


def test_who_guesses_classes_learns_no_more_than_whether_a_list_has_all(pictures: Path) -> None:
    """Where class names may not be told: answers to two guesses are the same words, whichever class is amiss."""
    site = Site(load_site(write_site(pictures.parent, "east", None, {"tells": ["sizes"]})))

    def told(*names: str) -> dict[str, Any]:
        proposal = Proposal.of(experiment(None, privacy=NOISE), names)
        answer = Envelope.decode(site.turn(Envelope("hello", proposal.fingerprint, proposal.facts).encode()))
        facts = {**answer.facts, "kind": answer.kind}
        if answer.kind == "hello":
            assert facts.pop("classes") == names_digest(names), "those of the proposal, not its own"
        return facts

    lacks = [
        told("red apple", "blue sky"),
        told("red apple", "green leaf"),
        told("red apple", "green leaf", "gray stone"),
        told("gray stone", "white cloud"),
    ]
    assert all(facts == lacks[0] for facts in lacks)
    assert lacks[0]["kind"] == "refusal"
    assert not any(name in str(lacks[0]) for name in ("apple", "sky", "leaf", "stone", "cloud"))
    every = ("red apple", "blue sky", "green leaf")
    has = [told(*every, "gray stone"), told(*every, "white cloud")]
    assert has[0] == has[1]
    assert has[0]["kind"] == "hello"
