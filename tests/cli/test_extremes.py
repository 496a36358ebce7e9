"""Noise, budgets and sentences at the ends of what can be: right numbers, or a line that names the key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sordino.encoders.bundled import BundledEncoder
from sordino.errors import ConfigError, EncoderError
from sordino.experiments.config import load_config
from sordino.experiments.privacy.plan import as_text, plan
from sordino.experiments.privacy.plan_page import write_page
from sordino.privacy.accounting import epsilon, formula_epsilon, noise_multiplier
from sordino.privacy.ledger import Release


def release(*multipliers: float, rate: float = 1.0, steps: int = 6) -> Release:
    return Release("a sum", "client 0", "example", multipliers, rate, steps, "client", ("server",))


@pytest.mark.parametrize("rate", [1.0, 0.05])
@pytest.mark.parametrize("multiplier", [1e6, 1e9, 1e154, 1e200, 1e308, math.inf])
def test_noise_beyond_all_need_leaves_nothing_to_learn(multiplier: float, rate: float) -> None:
    """For a Gaussian release, delta at epsilon 0 is erf(1 / (sqrt(8) sigma)), which is below 1e-5 here."""
    for accountant in ("pld", "rdp"):
        found = epsilon([release(multiplier, rate=rate)], 1e-5, accountant)  # type: ignore[arg-type]
        assert 0 <= found < 1e-6


@pytest.mark.parametrize("rate", [1.0, 0.05])
def test_noise_that_is_hardly_any_is_stated_as_hardly_any(rate: float) -> None:
    """Epsilon of a Gaussian release nears steps / (2 sigma^2) from above, and is infinite where a float ends."""
    for multiplier in (1e-10, 1e-20):
        assert epsilon([release(multiplier, rate=rate)], 1e-5) == pytest.approx(6 / 2 / multiplier**2, rel=1e-5)
    for multiplier in (1e-31, 1e-160, 1e-200, 5e-324, 0.0):
        assert epsilon([release(multiplier, rate=rate)], 1e-5) == math.inf


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_vectors_released_together_reveal_what_one_would(scale: float) -> None:
    """3-4-5: (9^-1 + 16^-1)^(-1/2) = 12/5, on any scale; noise without end reveals nothing beside another."""
    assert release(3 * scale, 4 * scale).noise_multiplier == pytest.approx(2.4 * scale, rel=1e-12)
    assert release(7 * scale).noise_multiplier == 7 * scale
    assert release(scale, math.inf).noise_multiplier == scale
    assert release(scale, 0.0).noise_multiplier == 0.0
    assert release(math.inf, math.inf).noise_multiplier == math.inf


def test_a_tiny_budget_gets_the_noise_that_delta_alone_asks_for() -> None:
    """As epsilon goes to 0, delta = erf(1 / (sqrt(8) sigma)): sigma nears sqrt(steps) / (delta sqrt(2 pi))."""
    limit = math.sqrt(6) / (1e-5 * math.sqrt(2 * math.pi))
    assert noise_multiplier(1e-9, 1e-5, [(1.0, 6)]) == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("budget", [1e-10, 1e-300, 1e7, 1e300])
def test_a_budget_out_of_all_bounds_is_refused(budget: float, config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"privacy.epsilon = .*must be from 1e-09 to 1e\+06, or inf"):
        noise_multiplier(budget, 1e-5, [(0.05, 6)])
    with pytest.raises(ConfigError, match=r"privacy.epsilon = "):
        load_config(config_file, ["privacy.mechanism=dp-sgd", f"privacy.epsilon={budget}"])


@pytest.mark.parametrize("multiplier", ["1e10", "1e200", "inf", "1e-31", "5e-324"])
def test_noise_out_of_all_bounds_is_refused(multiplier: str, config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"privacy.noise_multiplier = .*must be from 1e-30 to 1e\+09, or 0"):
        load_config(config_file, ["privacy.mechanism=dp-sgd", f"privacy.noise_multiplier={multiplier}"])


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["noise_multiplier=1e6", "noise_multiplier=1e9", "epsilon=1e-9", "epsilon=1e6"])
def test_a_plan_at_the_bounds_can_be_read(keys: str, config_file: Path, tmp_path: Path) -> None:
    """Its curve of epsilon by round too, all of whose points may be 0."""
    chosen = plan(load_config(config_file, ["privacy.mechanism=dp-sgd", f"privacy.{keys}", "privacy.delta=0.01"]))
    assert "Epsilon by round" in as_text(chosen)
    write_page(chosen, tmp_path / "plan.html")
    if keys.startswith("epsilon"):
        assert max(view.epsilon for view in chosen.views) <= float(keys.partition("=")[2]) * (1 + 1e-9)


def test_the_formula_has_no_place_where_it_breaks_down() -> None:
    assert formula_epsilon(2.0, 8, 5e-324) == pytest.approx(math.sqrt(8 * 744.4401) / 2, rel=1e-6)


def test_a_sentence_longer_than_the_bundled_tower_is_refused_by_name() -> None:
    """At 512 tokens it fits, with one more it does not."""
    encoder = BundledEncoder.load(torch.device("cpu"))
    classes = encoder.class_tokens(["cat", "grand piano"])
    room = 512 - 1 - classes.mask.shape[1]
    assert encoder.text_features(torch.zeros(room, encoder.context_width), classes).shape[0] == 2
    message = rf"context_length = {room + 1}.*'grand piano'.* 513 tokens .* at most {room}"
    with pytest.raises(EncoderError, match=message):
        encoder.text_features(torch.zeros(room + 1, encoder.context_width), classes)
    with pytest.raises(EncoderError, match="takes 512: shorten it"):
        encoder.text_features(torch.zeros(1, encoder.context_width), encoder.class_tokens(["cat", "ab " * 600]))
