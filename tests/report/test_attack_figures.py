"""ROC curves and bounds on epsilon, against a real audit, and the bound of privacy against exact trade-offs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from report.test_report import Page, page_of
from sordino.audit.scores import CURVE_POINTS, Attack
from sordino.errors import RunError
from sordino.report.runs import read_run
from sordino.report.sections.evidence import Bound, evidence
from sordino.report.sections.roc import of_replaced, privacy_bound

RATES = np.concatenate([[0.0], np.geomspace(1e-6, 1, 400)])


@pytest.fixture
def page(audited: Path, tmp_path: Path) -> Page:
    return page_of(tmp_path, audited)


def results(folder: Path) -> dict[str, Any]:
    attacks: dict[str, Any] = json.loads((folder / "audit.json").read_bytes())["attacks"]
    return attacks


@given(st.floats(0.05, 4.0), st.floats(0.0, 8.0))
def test_the_bound_holds_for_a_gaussian_mechanism_and_touches_it(mu: float, epsilon: float) -> None:
    """Its exact trade-off and delta: Dong, Roth, Su, Gaussian Differential Privacy, JRSS B 2022, corollary 2.13."""
    delta = norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
    exact = norm.cdf(norm.ppf(RATES) + mu)
    bounds = np.array([privacy_bound(rate, epsilon, delta) for rate in RATES])
    assert (exact <= bounds + 1e-9).all()
    touching = norm.cdf(-epsilon / mu - mu / 2)  # where the likelihood ratio is e^epsilon
    assert privacy_bound(touching, epsilon, delta) == pytest.approx(norm.cdf(norm.ppf(touching) + mu), abs=1e-6)


@given(st.floats(0.0, 10.0))
def test_randomized_response_reaches_the_bound(epsilon: float) -> None:
    lie = 1 / (1 + math.exp(epsilon))
    assert privacy_bound(lie, epsilon, 0.0) == pytest.approx(1 - lie)


def test_the_bound_of_a_large_epsilon_is_one_and_of_none_is_guessing() -> None:
    assert privacy_bound(1e-4, 1e6, 0.0) == pytest.approx(1.0)
    assert privacy_bound(0.3, 0.0, 0.0) == pytest.approx(0.3)
    assert of_replaced(1.0, 1e-5) == pytest.approx((2.0, 1e-5 * (1 + math.e)))


def test_the_area_under_a_drawn_curve_is_the_auc_told(audited: Path) -> None:
    guesses = evidence(read_run(audited)).guesses
    assert [guess.title for guess in guesses] == [
        *("LiRA", "RMIA", "RMIA, offline", "shadow models", "uploads over rounds")
    ]
    for guess in guesses:
        x, y = np.array(guess.curve).T
        assert np.trapezoid(y, x) == pytest.approx(guess.auc, abs=1e-12), "short curves are whole"


@given(st.floats(0.0, 2.0), st.integers(0, 3))
def test_a_long_curve_is_thinned_to_a_bounded_size_and_keeps_its_area(shift: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    member = np.arange(4000) % 2 == 0
    attack = Attack.of(generator.normal(size=4000) + shift * member, member)
    x, y = np.array(attack.curve).T
    assert len(attack.curve) <= CURVE_POINTS
    # Each kept point is on the curve, and two that follow each other are a factor of 1000^(1/198) apart: 4%.
    assert np.trapezoid(y, x) == pytest.approx(attack.auc, abs=0.005)


def test_the_page_draws_the_curves_of_the_audit_and_the_bound_of_its_claim(audited: Path, page: Page) -> None:
    found = results(audited)
    traces = page.figures["roc"]["data"]
    curves = {trace["name"]: trace for trace in traces if trace["meta"]["role"] == "curve"}
    drawn = {"LiRA": found["membership"]["lira"], "RMIA": found["membership"]["rmia"]}
    drawn["uploads over rounds"] = found["rounds"]["attack"]
    assert len(curves) == len(drawn)
    for title, attack in drawn.items():
        (curve,) = [trace for name, trace in curves.items() if name.endswith(f": {title}")]
        assert curve["x"] == [max(x, 1e-4) for x, _ in attack["curve"]]
        assert curve["y"] == [max(y, 1e-4) for _, y in attack["curve"]]
    (bound,) = [trace for trace in traces if trace["meta"]["role"] == "bound"]
    claim = of_replaced(found["membership"]["claimed_epsilon"], found["membership"]["delta"])
    assert bound["y"] == pytest.approx([privacy_bound(rate, *claim) for rate in bound["x"]])
    for axis in ("xaxis", "yaxis"):
        assert page.figures["roc"]["layout"][axis]["type"] == "log"


def test_each_bound_stands_beside_the_claim_that_it_tests(audited: Path, page: Page) -> None:
    canaries = results(audited)["canaries"]
    bounds = evidence(read_run(audited)).bounds
    assert Bound("canaries", canaries["epsilon"], canaries["claimed_epsilon"], canaries["delta"], False) in bounds
    _, *rows = page.tables["Claimed and shown epsilon by attack"]
    assert [row[1] for row in rows] == [bound.title for bound in bounds]
    shown, claimed = page.figures["bounds"]["data"]
    assert shown["x"] == [bound.shown for bound in bounds]
    assert claimed["x"] == [bound.claimed for bound in bounds if bound.claimed is not None]
    low, high = page.figures["bounds"]["layout"]["xaxis"]["range"]
    assert low <= min(shown["x"]) <= max(*claimed["x"], *shown["x"]) < high


def test_a_bound_above_its_claim_stands_out(audited: Path, tmp_path: Path) -> None:
    run = read_run(audited)
    found = results(audited)
    found["canaries"] |= {"epsilon": 99.0, "refuted": True}
    assert evidence(replace(run, audit={"attacks": found})).refuted
    assert not evidence(run).refuted
    audit = json.loads((audited / "audit.json").read_bytes())
    folder = tmp_path / "refuted"
    shutil.copytree(audited, folder)
    (folder / "audit.json").write_text(json.dumps(audit | {"attacks": found}))
    page = page_of(tmp_path, folder)
    cells = page.column("Shown ε, at least", "Claimed and shown epsilon by attack")
    assert "99, which refutes the claim" in cells.values()
    assert "An attack refutes the claim" in page.text["In short"]


@pytest.mark.parametrize(
    "attacks",
    [
        *([1], "x", None, {"membership": "x", "canaries": 5}, {"canaries": {"epsilon": 1.0}}),
        {"canaries": {"epsilon": "1", "claimed_epsilon": 1.0, "delta": 1e-5, "refuted": False}},
        {"membership": {"lira": {"auc": 0.5, "auc_interval": [0.4], "found": []}}},
        {"membership": {"lira": {"auc": None, "auc_interval": [0.4, 0.6], "found": []}}},
        {"membership": {"lira": {"auc": 0.5, "auc_interval": [0.4, 0.6], "found": [5]}}},
        {"membership": {"lira": {"auc": 0.5, "auc_interval": [0.4, 0.6], "found": []}, "claimed_epsilon": "8"}},
        {"inversion": {"attacks": [{"size": 1}]}},
        {"stealing": {"victims": 5}},
        {"stealing": {"reason": 5}},
    ],
)
def test_a_damaged_audit_is_named(attacks: object, audited: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(audited, folder)
    (folder / "audit.json").write_text(json.dumps({"claimed": {"epsilon": 8.0}, "attacks": attacks}))
    with pytest.raises(RunError, match="run: audit.json is damaged.*repeat 'sordino audit'"):
        page_of(tmp_path, folder)
