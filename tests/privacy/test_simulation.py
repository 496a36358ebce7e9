"""Noise that can be drawn again: only by the very same run, and never called private."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sordino.cli.terminal import _privacy
from sordino.errors import ConfigError
from sordino.experiments.compare import compare, row_of
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.experiments.variants import grid
from sordino.privacy.ledger import Ledger
from sordino.privacy.settings import PrivacySettings
from sordino.prompt_file import SavedPrompt
from sordino.runtime.local import LocalRuntime

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(10 * k, 10 * k + 10)) for k in range(4)]
TABLES = {"context_length": 3, "batch_size": 0, "local_steps": 1, "dp-fpl": {"rank": 2}}
DP_SGD = {"mechanism": "dp-sgd", "clip": 0.5, "delta": 1e-3}
NONCE = "0123456789abcdef" * 2


def upload(make_runtime: MakeRuntime, z: float, rows: list[list[int]] = ROWS, **privacy: Any) -> Tensor:
    """The gradient of the shared context that client 0 sends in the first round."""
    runtime = make_runtime("dp-fpl", rows, TABLES, privacy=DP_SGD | {"noise_multiplier": z} | privacy)
    heard: list[Tensor] = []
    algorithm = runtime.algorithm

    class Wiretap:
        def __getattr__(self, name: str) -> Any:
            return getattr(algorithm, name)

        def server_round(self, settings: Any, server: Any, uploads: Any, round_context: Any) -> Any:
            heard.append(uploads.each.gradient[0])
            return algorithm.server_round(settings, server, uploads, round_context)

    runtime.algorithm = Wiretap()  # type: ignore[assignment]
    runtime.round(runtime.start())
    return heard[0].double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), 0))


@pytest.mark.parametrize("privacy", [{}, {"simulation": True}, {"simulation": True, "nonce": NONCE}])
def test_two_noise_multipliers_do_not_give_away_the_gradient(
    privacy: dict[str, Any], make_runtime: MakeRuntime
) -> None:
    """(8 u2 - 4 u1) / 4 would be the noiseless gradient if both runs drew the same noise, of one seed and one nonce."""
    one, other = (upload(make_runtime, z, **privacy) for z in (8.0, 4.0))
    bare = upload(make_runtime, 0.0)
    assert abs(cosine((8 * other - 4 * one) / 4, bare)) < 0.5  # 5 deviations of the cosine of random vectors
    assert bare.numel() >= 96


def test_nor_does_a_run_with_one_image_less(make_runtime: MakeRuntime) -> None:
    privacy = {"simulation": True, "nonce": NONCE}
    less = [ROWS[0][1:], *ROWS[1:]]
    difference = upload(make_runtime, 8.0, **privacy) - upload(make_runtime, 8.0, less, **privacy)
    bare = upload(make_runtime, 0.0) - upload(make_runtime, 0.0, less)
    assert abs(cosine(difference, bare)) < 0.5
    assert float(difference.norm()) > 10 * float(bare.norm())  # the noises do not cancel


def test_the_very_same_run_draws_the_same_noise(make_runtime: MakeRuntime) -> None:
    privacy = {"simulation": True, "nonce": NONCE}
    one, other = (upload(make_runtime, 8.0, **privacy) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, upload(make_runtime, 8.0, simulation=True))
    assert not torch.equal(one, upload(make_runtime, 8.0))


def test_noise_and_coins_are_the_operating_systems_unless_a_simulation_is_asked_for(make_runtime: MakeRuntime) -> None:
    assert not PrivacySettings().simulation
    tables = TABLES | {"batch_size": 4}
    starts = []
    for _ in range(2):
        runtime = make_runtime("promptfl", ROWS, tables, privacy=DP_SGD | {"noise_multiplier": 0.0, "delta": 0.01})
        training, _ = runtime.round(runtime.start())
        starts.append(training.server.context)  # type: ignore[attr-defined]
        assert training.ledger.randomness == "system"
    assert not torch.equal(*starts), "without noise the coins alone make the difference"


def test_a_seed_that_is_guessed_does_not_give_the_noise(make_runtime: MakeRuntime) -> None:
    """Whoever tries seeds must know the nonce too, which has 128 bits."""
    seen = upload(make_runtime, 1e4, simulation=True)
    for seed in range(50):
        runtime = make_runtime("dp-fpl", ROWS, TABLES, seed=seed, privacy=DP_SGD | {"noise_multiplier": 1e4})
        guess = runtime.federation.round_context(1, [0]).streams.normal("noise on shared, 0", *seen.shape)[0]
        assert abs(cosine(seen, guess.double())) < 0.6


def test_a_nonce_without_a_simulation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy.nonce = .*privacy.simulation = true"):
        PrivacySettings(nonce=NONCE)


KEYS = ["privacy.mechanism=dp-sgd", "privacy.epsilon=4", "privacy.delta=0.01"]


def test_a_simulated_run_is_never_called_private(config_file: Path, tmp_path: Path) -> None:
    real = run(load_config(config_file, KEYS), tmp_path / "real")
    simulated = run(load_config(config_file, [*KEYS, "privacy.simulation=true"]), tmp_path / "simulated")
    assert (real.privacy.private, real.privacy.simulated) == (True, False)
    assert (simulated.privacy.private, simulated.privacy.simulated) == (False, True)
    assert 3.9 < simulated.privacy.epsilon <= 4
    assert simulated.privacy.statement.startswith("Simulated, not private")
    assert real.privacy.statement.startswith("Differentially private")
    for summary, name, cell in ((real, "real", "ε = 4"), (simulated, "simulated", "simulated ε = 4")):
        assert _privacy(row_of([summary])) == cell
        page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        assert ("simulated, not private: ε = 4" in page) == (name == "simulated")
        saved = SavedPrompt.load(tmp_path / name / "prompts" / "client-0000.safetensors")
        assert (saved.privacy.private, saved.privacy.simulated) == (name == "real", name == "simulated")
        ledger = json.loads((tmp_path / name / "ledger.json").read_bytes())
        assert (ledger["private"], ledger["simulated"]) == (name == "real", name == "simulated")


def test_a_simulation_can_be_repeated_from_its_own_folder_alone(config_file: Path, tmp_path: Path) -> None:
    """Its resolved configuration has the nonce; the one that it was made of does not."""
    config = load_config(config_file, [*KEYS, "privacy.simulation=true"])
    run(config, tmp_path / "one")
    run(config, tmp_path / "two")
    run(load_config(tmp_path / "one" / "config.toml"), tmp_path / "again")
    names = ("one", "two", "again")
    prompts = [load_file(tmp_path / name / "prompts" / "client-0000.safetensors")["context"] for name in names]
    assert torch.equal(prompts[0], prompts[2])
    assert not torch.equal(prompts[0], prompts[1])
    ledgers = [Ledger.from_json((tmp_path / name / "ledger.json").read_bytes()) for name in names]
    assert ledgers[0].run == ledgers[2].run != ledgers[1].run


@pytest.mark.slow
def test_runs_of_one_comparison_share_no_noise(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, [*KEYS, "privacy.simulation=true", "rounds=1"])
    compare(grid(config, ["dp-fpl"], {"privacy.epsilon": [4.0, 2.0]}), 1, tmp_path / "all")
    nonces = {load_config(file).privacy.nonce for file in (tmp_path / "all").glob("**/config.toml")}
    assert len(nonces) == 2
    assert None not in nonces
